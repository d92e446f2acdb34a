"""Benchmarks: each prints a table, side by side in one run, and saves JSON."""

import sys
from pathlib import Path

# Modules of examples/ are imported by their own names, as the scripts there import one another.
sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
