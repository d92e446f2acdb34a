"""Benchmarks: each prints a table, side by side in one run, and saves JSON."""
