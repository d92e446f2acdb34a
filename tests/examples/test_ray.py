"""examples/ray_batch.py with two engines on this machine's CPUs."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.engines import engine
from tests.support import ROOT, patience, stuck_engine

LIMIT_S = 300
PROMPTS = {f"{n:02}.txt": f"def function_{n}(a, b):\n    " for n in range(18)}
TOKENS = 80

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'ray[data]'"
)


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ray_batch() -> ModuleType:
    return example("ray_batch")


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


def no_cluster(address: str) -> str:
    """How the sentence about a RAY_ADDRESS begins with which there is no cluster."""
    return (
        f"RAY_ADDRESS is '{address}', with which Ray finds no cluster: start one (`ray start --head`), or unset "
        "RAY_ADDRESS to use this machine alone. Ray says: "
    )


def test_an_address_that_none_can_be_is_named(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    wanted = no_cluster("nowhere") + "Invalid address format: nowhere"
    assert refused(prompts, tmp_path / "a") == f"ray_batch: {wanted}"
    script = [sys.executable, str(ROOT / "examples" / "ray_serve.py")]
    done = subprocess.run(script, capture_output=True, text=True, timeout=patience(60))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == f"ray_serve: {wanted}"


def test_an_address_without_a_cluster_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself is not asked: it would find a cluster that anybody runs on this machine."""
    import ray
    import ray_common

    def init(**_: object) -> None:
        raise ConnectionError("Could not find any\nrunning Ray instance.")

    monkeypatch.setattr(ray, "init", init)
    args = argparse.Namespace(verbose=False)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(ray_common.ClusterError) as refusal:
        ray_common.start_ray(args, "--replicas", 1)
    assert str(refusal.value) == no_cluster("auto") + "Could not find any running Ray instance."
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(ConnectionError):
        ray_common.start_ray(args, "--replicas", 1)


def test_prompts_and_parts(ray_batch: ModuleType, prompts: Path, tmp_path: Path) -> None:
    found = {row["id"]: row["prompt"] for row in ray_batch.read_prompts(prompts)}
    assert found == PROMPTS | {"more.jsonl:1": PROMPTS["00.txt"]}
    rows = [{"id": "a", "prompt_tokens": 1, "answer": "x\n", "answer_tokens": 2, "error": ""}]
    for form in ray_batch.FORMATS:
        ray_batch.write_part(tmp_path, rows, form)
    assert list(ray_batch.read_parts(tmp_path)) == rows * 2


def test_lines_of_answers_end_at_newlines_alone(ray_batch: ModuleType, tmp_path: Path) -> None:
    """Else an answer with another of Unicode's line ends could not be read again."""
    rows = [{"id": "a", "answer": f"x{mark}y", "error": ""} for mark in "\u2028\u2029\x85\x0b\x0c\x1c\r\n"]
    for form in ray_batch.FORMATS:
        ray_batch.write_part(tmp_path, rows, form)
    assert list(ray_batch.read_parts(tmp_path)) == rows * 2
    (tmp_path / "prompts").mkdir()
    line = json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False)
    (tmp_path / "prompts" / "p.jsonl").write_text(f"\ufeff{line}\r\n{line}\n", newline="", encoding="utf-8")
    found = [(row["id"], row["prompt"]) for row in ray_batch.read_prompts(tmp_path / "prompts")]
    assert found == [("p.jsonl:1", "a\u2028b"), ("p.jsonl:2", "a\u2028b")]


def test_torn_parts_are_named_and_the_rest_counts(
    ray_batch: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for form in ray_batch.FORMATS:
        ray_batch.write_part(tmp_path, [{"id": f"{form}{n}", "answer": "x", "error": ""} for n in range(2)], form)
    for path in tmp_path.iterdir():
        os.truncate(path, path.stat().st_size - 3)
    (tmp_path / "part-0.parquet").write_bytes(b"")
    assert [row["id"] for row in ray_batch.read_parts(tmp_path)] == ["jsonl0"]
    said = capsys.readouterr().err
    assert said.count("is passed over: it is torn.") == 3 and ".jsonl, line 2" in said


def test_prompts_as_others_wrote_them(ray_batch: ModuleType, tmp_path: Path) -> None:
    """What can be read is; of the rest the first is named."""
    for raw, content in ((b"caf\xe9.txt", b"a"), (b"marked.txt", "\ufeffb".encode()), (b"other.md", b"\xff")):
        (tmp_path / os.fsdecode(raw)).write_bytes(content)
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "folder.txt" / "inner.txt").write_text("c")
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "part-1.jsonl").write_text('{"id": "x", "error": ""}\n')
    found = {row["id"]: row["prompt"] for row in ray_batch.read_prompts(tmp_path, tmp_path / "answers")}
    assert found == {"caf\\xe9.txt": "a", "marked.txt": "b", "folder.txt/inner.txt": "c"}
    for name, content, said in (
        ("latin.txt", b"caf\xe9", "latin.txt is not UTF-8 text, from byte 3 on"),
        ("half.jsonl", b'{"prompt": "\\ud800"}', "half.jsonl:1: expected"),
        ("torn.jsonl", b'{"prompt": "a"}\n{"prom', "torn.jsonl:2: expected"),
        ("list.jsonl", b"[1]", "list.jsonl:1: expected"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises((ray_batch.BatchError, SystemExit), match=said):
            list(ray_batch.read_prompts(tmp_path, tmp_path / "answers"))
        (tmp_path / name).unlink()
    (tmp_path / "link.txt").symlink_to("nowhere")
    with pytest.raises(SystemExit, match="link.txt is a link to nothing"):
        list(ray_batch.read_prompts(tmp_path, tmp_path / "answers"))


def test_a_failure_that_repeats_itself_ends(ray_batch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not is tried again with what is left."""
    calls: list[list[str]] = []

    def answers(rows: list[dict[str, str]], *_: object) -> Iterator[list[dict[str, str]]]:
        calls.append([row["id"] for row in rows])
        if "b" in calls[-1]:  # two at once, before the engine dies
            yield rows[:2]
        raise RuntimeError("The actor died unexpectedly.\n\tpid: 1")

    monkeypatch.setattr(ray_batch, "connect", lambda args: False)
    monkeypatch.setattr(ray_batch, "answers", answers)
    todo = {name: {"id": name} for name in "abcd"}
    blocks = ray_batch.until_answered(todo, argparse.Namespace())
    assert [row["id"] for row in next(blocks)] == ["a", "b"]
    said = "any of the 2 prompts that are left, the first of which is c. .*Ray says: The actor died unexpectedly."
    with pytest.raises(ray_batch.BatchError, match=said):
        next(blocks)
    assert calls == [["a", "b", "c", "d"], ["c", "d"]]


def test_mistakes_end_in_one_sentence(prompts: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no prompts" in refused(empty, tmp_path / "a")
    assert "is not a folder" in refused(tmp_path / "none", tmp_path / "a")
    (empty / "bad.jsonl").write_text('{"text": "x"}\n')
    assert "bad.jsonl:1: expected" in refused(empty, tmp_path / "a")
    (tmp_path / "old").mkdir()
    settings = {"model": "other", "max_tokens": TOKENS, "temperature": 0.0, "engine_args": {}}
    (tmp_path / "old" / "run.json").write_text(json.dumps(settings))
    assert "model was 'other'" in refused(prompts, tmp_path / "old")
    settings |= {"model": str(ROOT / "examples" / "fox-tiny"), "engine_args": {"load_format": "dummy"}}
    (tmp_path / "old" / "run.json").write_text(json.dumps(settings))
    assert "engine_args was {'load_format': 'dummy'}, now {}" in refused(prompts, tmp_path / "old")
    (tmp_path / "old" / "run.json").write_text(json.dumps(settings | {"engine_args": {}}))
    row = {"id": "00.txt", "prompt_digest": "of another", "answer": "x", "error": ""}
    (tmp_path / "old" / "part-1-a.jsonl").write_text(json.dumps(row) + "\n")
    assert "holds an answer to another prompt of the name 00.txt" in refused(prompts, tmp_path / "old")
    assert "holds the prompts: name another folder for the answers" in refused(prompts, prompts)
    assert "is not a folder" in refused(prompts, prompts / "00.txt")
    assert not (tmp_path / "a").exists()
    assert "--replicas 1000 of 1 " in refused(prompts, tmp_path / "a", "--replicas", "1000")
    # Nor is what was asked remembered by a command that was refused.
    assert not (tmp_path / "a").exists()


def test_engines_that_cannot_start_end_the_run(prompts: Path, tmp_path: Path) -> None:
    """With a sentence that says why, and nothing that a corrected command would trip over."""
    options = command(prompts, tmp_path / "a", "--engine-args", '{"max_num_seqs": 0}')
    done = subprocess.run(options, capture_output=True, text=True, timeout=patience(LIMIT_S))
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    said = done.stderr.strip().splitlines()[-1]
    assert "end before they answer any of the 19 prompts" in said and "max_num_seqs" in said
    assert not (tmp_path / "a").exists()


def test_sampling_prompts_that_do_not_fit_a_step_ends(prompts: Path) -> None:
    """vLLM's CPU build fails on them if they have seeds. The answers are inside the prompts' folder."""
    (prompts / os.fsdecode(b"caf\xe9.txt")).write_text("import os\n")
    answers = prompts / "answers"
    engine_args = json.dumps({"enforce_eager": True, "dtype": "float32", "max_num_batched_tokens": 32})
    options = command(prompts, answers, "--temperature", "0.7", "--max-tokens", "8", "--engine-args", engine_args)
    for said in ("20 answered now, 0 failed", "20 prompts, 20 answered before"):
        done = subprocess.run(options, capture_output=True, text=True, timeout=patience(LIMIT_S))
        assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr[-3000:]


@pytest.fixture
def stuck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that says which engine stands still, of those that are started meanwhile."""
    installed, file = tmp_path / "site", tmp_path / "stuck"
    information = installed / "stuck_engine-1.0.dist-info"
    information.mkdir(parents=True)
    shutil.copy(stuck_engine.__file__, installed)
    (information / "METADATA").write_text("Name: stuck_engine\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[vllm.general_plugins]\nstuck = stuck_engine:register\n")
    monkeypatch.setenv("PYTHONPATH", str(installed), prepend=os.pathsep)
    monkeypatch.setenv("STUCK_ENGINE", str(file))
    return file


def test_every_prompt_is_answered_once_though_an_engine_dies(
    ray_batch: ModuleType, prompts: Path, fox_tiny: Path, tmp_path: Path, stuck: Path
) -> None:
    """One answer is there before; after the first part an engine is killed that holds prompts.

    It stands still until then, so the run cannot have ended, however late that is on a busy machine.
    """
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
        while len(list(answers.glob("part-*"))) < 2 or not stuck.exists():
            assert process.poll() is None and time.monotonic() < limit, log_path.read_text()[-4000:]
            time.sleep(0.05)
        os.kill(int(stuck.read_text()), signal.SIGKILL)
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


def test_replicas_find_room_on_as_many_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the command lets through: else they would wait for ever, and nobody would say so."""
    monkeypatch.setattr(os, "environ", dict(os.environ))  # it is written to
    sizes = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "engine_args": {}, "target_requests": 64}
    names = {"name": "a", "model": str(ROOT / "examples" / "fox-tiny")}
    for replicas in (1, 2, 64):
        args = argparse.Namespace(min_replicas=replicas, max_replicas=replicas, **sizes, **names)
        config = example("ray_serve").llm_config(args, on_gpu=False)
        worker = config.placement_group_config["bundle_per_worker"]["CPU"]
        replica = config.deployment_config["ray_actor_options"]["num_cpus"]
        front = 0.1
        assert replicas * (worker + replica) + front <= replicas + 1e-9
