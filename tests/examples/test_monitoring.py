"""The dashboard in examples/monitoring, held against what a real server has said on /metrics."""

from __future__ import annotations

import json
import re
from itertools import combinations
from typing import Any

from tests.support import ROOT

FOLDER = ROOT / "examples" / "monitoring"
RECORDED = (ROOT / "tests" / "cli" / "metrics" / "fox-tiny-1.txt").read_text()
SAMPLES = set(re.findall(r"^([\w:]+)\{", RECORDED, re.MULTILINE))
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "grafana.json").read_text())


def test_every_metric_of_the_dashboard_is_on_metrics() -> None:
    """And the dashboard leaves out none of ours."""
    asked = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    asked += [str(variable["query"]) for variable in DASHBOARD["templating"]["list"]]
    named = {name for text in asked for name in re.findall(r"vllm:\w+", text)}
    assert named <= SAMPLES, named - SAMPLES
    ours = {re.sub(r"_(bucket|sum|count)$", "", name) for name in SAMPLES if name.startswith("vllm:fox_")}
    assert ours <= {re.sub(r"_(bucket|sum|count)$", "", name) for name in named}


def test_labels_of_the_dashboard_are_on_metrics() -> None:
    """``job`` is Prometheus' own."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            for name, labels in re.findall(r"(vllm:\w+)\{([^}]*)\}", target["expr"]):
                line = next(line for line in RECORDED.splitlines() if line.startswith(f"{name}{{"))
                assert set(re.findall(r"(\w+)=", labels)) - {"job"} <= set(re.findall(r"(\w+)=", line))


def test_panels_have_numbers_of_their_own_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, two in combinations([panel["gridPos"] for panel in panels], 2):
        apart = (one[at] + one[size] <= two[at] or two[at] + two[size] <= one[at] for at, size in ("xw", "yh"))
        assert any(apart)
        assert one["x"] + one["w"] <= 24


def test_the_readme_lists_our_metrics() -> None:
    table = (ROOT / "README.md").read_text().split("\n## Metrics\n")[1].split("\n## ")[0]
    listed = dict(re.findall(r"^\| `(vllm:fox_\w+)(?:\{\w+\})?` \| (\w+) \|", table, re.MULTILINE))
    kinds = dict(re.findall(r"^# TYPE (vllm:fox_\w+) (\w+)$", RECORDED, re.MULTILINE))
    assert listed == kinds
