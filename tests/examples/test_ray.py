"""examples/ray_batch.py with two engines on this machine's CPUs."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.engines import engine, processes_under
from tests.support import ROOT, patience

LIMIT_S = 300
PROMPTS = {f"{n:02}.txt": f"def function_{n}(a, b):\n    " for n in range(18)}
TOKENS = 200

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'ray[data]'"
)


@pytest.fixture(scope="module")
def ray_batch() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ray_batch", ROOT / "examples" / "ray_batch.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name, prompt in PROMPTS.items():
        (folder / name).write_text(prompt)
    (folder / "more.jsonl").write_text(json.dumps({"prompt": PROMPTS["00.txt"]}) + "\n\n")
    return folder


def command(prompts: Path, answers: Path, *more: str) -> list[str]:
    script = str(ROOT / "examples" / "ray_batch.py")
    return [sys.executable, script, str(prompts), str(answers), "--max-tokens", str(TOKENS), *more]


def refused(prompts: Path, answers: Path, *more: str) -> str:
    """The one line that a run which cannot start ends with."""
    done = subprocess.run(command(prompts, answers, *more), capture_output=True, text=True, timeout=patience(60))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_prompts_and_parts(ray_batch: ModuleType, prompts: Path, tmp_path: Path) -> None:
    found = {row["id"]: row["prompt"] for row in ray_batch.read_prompts(prompts)}
    assert found == PROMPTS | {"more.jsonl:1": PROMPTS["00.txt"]}
    rows = [{"id": "a", "prompt_tokens": 1, "answer": "x\n", "answer_tokens": 2, "error": ""}]
    for form in ray_batch.FORMATS:
        ray_batch.write_part(tmp_path, rows, form)
    assert list(ray_batch.read_parts(tmp_path)) == rows * 2


def test_mistakes_end_in_one_sentence(prompts: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no prompts" in refused(empty, tmp_path / "a")
    assert "is not a folder" in refused(tmp_path / "none", tmp_path / "a")
    (empty / "bad.jsonl").write_text('{"text": "x"}\n')
    assert "bad.jsonl:1: expected" in refused(empty, tmp_path / "a")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").write_text('{"model": "other", "max_tokens": 200, "temperature": 0.0}')
    assert "model was 'other'" in refused(prompts, tmp_path / "old")


def test_every_prompt_is_answered_once_though_an_engine_dies(
    ray_batch: ModuleType, prompts: Path, fox_tiny: Path, tmp_path: Path
) -> None:
    """One answer is there before; after the first part an engine is killed."""
    answers = tmp_path / "answers"
    answers.mkdir()
    before = {"id": "17.txt", "prompt_tokens": 1, "answer": "from before", "answer_tokens": 2, "error": ""}
    ray_batch.write_part(answers, [before], "jsonl")
    options = json.dumps({"enforce_eager": True, "dtype": "float32", "max_num_seqs": 4})
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    log_path = tmp_path / "log"
    with log_path.open("w") as log:
        process = subprocess.Popen(
            command(prompts, answers, "--replicas", "2", "--batch-size", "2", "--engine-args", options),
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        limit = time.monotonic() + patience(LIMIT_S)
        while len(list(answers.glob("part-*"))) < 2:
            assert process.poll() is None and time.monotonic() < limit, log_path.read_text()[-4000:]
            time.sleep(0.05)
        processes_under(process.pid, "EngineCore")[0].kill()
        assert process.wait(max(1.0, limit - time.monotonic())) == 0, log_path.read_text()[-4000:]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    rows = list(ray_batch.read_parts(answers))
    found = {row["id"]: row["answer"] for row in rows}
    assert len(rows) == len(found) == len(PROMPTS) + 1
    assert not any(row["error"] for row in rows)
    assert found.pop("17.txt") == "from before"
    assert "19 prompts, 1 answered before" in log_path.read_text()
    assert "18 answered now, 0 failed" in log_path.read_text()

    from vllm import SamplingParams

    with engine(fox_tiny) as llm:
        texts = llm.generate(
            [PROMPTS[name.replace("more.jsonl:1", "00.txt")] for name in found],
            SamplingParams(max_tokens=TOKENS, temperature=0, seed=0),
        )
    assert list(found.values()) == [text.outputs[0].text for text in texts]
