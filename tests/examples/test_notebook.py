"""examples/what_does_it_forget.ipynb: runs from its first cell to its last, and shows what it promises."""

from __future__ import annotations

import re

import pytest

from tests.support import ROOT, patience

nbformat = pytest.importorskip("nbformat", reason="pip install nbclient ipykernel")
nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
jupyter_client = pytest.importorskip("jupyter_client", reason="pip install nbclient ipykernel")
pytest.importorskip("ipykernel", reason="pip install nbclient ipykernel")

LIMIT_S = 300
NOTEBOOK = ROOT / "examples" / "what_does_it_forget.ipynb"


def test_it_shows_maps_and_what_a_tolerance_costs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in cells), "store it without outputs"
    limit = int(patience(LIMIT_S))
    # Files instead of ports, which another program could be given before the kernel has started.
    kernel = jupyter_client.AsyncKernelManager(kernel_name="python3", transport="ipc")
    options = {"timeout": limit, "startup_timeout": limit, "resources": {"metadata": {"path": str(ROOT)}}}
    nbclient.NotebookClient(notebook, km=kernel, **options).execute()
    shown = [output for cell in cells for output in cell.outputs]
    pages = [output.data["text/html"] for output in shown if "data" in output]
    assert len(pages) == 2 and all("<iframe srcdoc=" in page for page in pages)
    said = "".join(output.text for output in shown if output.get("name") == "stdout")
    assert said.count(" live tokens") == 32 and "of later queries see it" in said
    rows = re.findall(r"(-\d+\.0): ([\d.]+)% of all pairs live, ([\d.]+) nats", said)
    shares, losses = ([float(row[n]) for row in rows] for n in (1, 2))
    assert len(rows) == 5 and shares == sorted(shares, reverse=True) and shares[0] > shares[-1]
    # The promise is a sum of weights of exp(-20) to exp(-1); what is really lost is far less.
    assert max(losses) - min(losses) < 1e-3
