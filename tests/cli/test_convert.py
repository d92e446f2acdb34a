"""``vllm-fox convert``, which is ``python -m vllm_fox.convert`` as well."""

from __future__ import annotations

import filecmp
from pathlib import Path

from tests.support.evicting import THRESHOLD, VARIANTS, make_evicting

from .conftest import Run


def test_a_predictor_and_a_model_become_one(run: Run, tmp_path: Path) -> None:
    made = make_evicting(tmp_path, VARIANTS["qwen2-linear"])
    assert made.predictor is not None
    out = tmp_path / "out"
    words = ("--predictor", made.predictor, "--threshold", str(THRESHOLD), "--window", str(made.window))
    done = run("convert", made.published, out, *words)
    assert done.code == 0 and f"Serve it with: vllm serve {out}" in done.out
    names = sorted(path.name for path in made.served.iterdir())
    assert filecmp.cmpfiles(made.served, out, names, shallow=False) == (names, [], [])


def test_mistakes(run: Run, fox_tiny: Path, tmp_path: Path) -> None:
    for words, part in (
        ((fox_tiny, tmp_path / "out"), "model_type is 'forgetting_transformer-project_fox'"),
        ((fox_tiny, tmp_path), "exists: name a folder that does not"),
        ((tmp_path / "none", tmp_path / "out"), "none is no folder"),
    ):
        done = run("convert", *words)
        assert done.code == 1 and part in done.err and done.err.count("\n") == 1 and not done.out
    assert not list(tmp_path.iterdir())
