"""Two tensor-parallel ranks or two pipeline stages answer as one process does, and each gives its own pages back.

The ranks are processes of their own (vLLM's multiprocessing executor). So is the engine that leads them
(``python -m tests.engine.test_parallel``), so that a hanging one can be ended together with its ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from benchmarks.engines import (
    add,
    engine,
    generate,
    greedy,
    manager,
    processes_under,
    run_to_the_end,
    run_until_decoding,
    source_tokens,
)
from tests.support import ROOT, patience
from tests.support.checkpoints import VARIANTS, make_checkpoint, save_sparse_gpt2
from tests.support.collector import keep_imports_from_the_collector
from tests.support.engines import assert_all_free
from tests.support.evicting import VARIANTS as EVICTING
from tests.support.evicting import make_evicting
from tests.support.reference_evicting import reference_logits as evicting_logits
from tests.support.reference_model import reference_logits
from tests.support.reference_sparse_gpt2 import reference_logits as sparse_gpt2_logits
from vllm_fox.pages import metrics

PAGE, ANSWER, LENGTHS = 16, 24, (300, 700, 1500)
LIMIT_S = 600


def serve(model: str, tensor: int = 1, stages: int = 1, host: bool = False, kill: bool = False) -> dict[str, Any]:
    """Three requests together: prompts, answers, and the pages in use on each rank while they were answered.

    With ``host``, the longest then goes on after its pages have gone to host memory. With ``kill``, then a worker
    dies in mid-request; the result says how the engine took it.
    """
    every_step = patch.object(metrics, "SAMPLE_S", 0.0)
    with (
        every_step,
        engine(
            model,
            {"page_size": PAGE, "host_cache_gib": 0.5 if host else 0},
            tensor_parallel_size=tensor,
            pipeline_parallel_size=stages,
            distributed_executor_backend="mp" if tensor * stages > 1 else None,
            # Without a graph to warm up, vLLM's CPU worker forgets to make a later stage's input buffers.
            enforce_eager=stages == 1,
            compilation_config={"backend": "eager"},
            max_model_len=2048,
            max_num_seqs=4,
            max_num_batched_tokens=512,
            num_gpu_blocks_override=300,
        ) as llm,
    ):
        prompts = [source_tokens(llm, length, seed=length) for length in LENGTHS]
        for name, prompt in enumerate(prompts):
            add(llm, str(name), prompt, ANSWER)
        # The shortest prompt is through first; all are running by the time it has answered some tokens.
        run_until_decoding(llm, count=len(prompts), tokens=4)
        pool = manager(llm).pool
        used = pool.used
        held = (pool.num_pages.sum() * pool.streams).tolist()
        layers = {kind: pages_of_layers(llm, kind) for kind in ("dense", "live")}
        assert sum(layers["dense"]) == sum(held) and len(set(layers["dense"])) == 1
        assert sum(layers["live"]) == pool.live_pages.sum()
        finished = run_to_the_end(llm)
        assert_all_free(llm)
        answers = [finished[str(name)] for name in range(len(prompts))]
        result = {"prompts": prompts, "answers": answers, "used": used, "dense": held}
        if host:
            result["back"] = come_back(llm, prompts[-1] + answers[-1])
        if kill:
            result["killed"] = kill_a_worker(llm, prompts[0])
        return result


def come_back(llm: Any, text: list[int]) -> dict[str, Any]:
    """The answer to a text whose pages have gone to host memory meanwhile, and how much of it was cached."""
    for seed in range(12):
        generate(llm, [source_tokens(llm, 1900, seed=seed)], greedy(1))
    (out,) = generate(llm, [text], greedy(ANSWER))
    host = manager(llm).host
    assert host is not None
    return {"answer": out.outputs[0].token_ids, "cached": out.num_cached_tokens, "fetched": host.fetched_total}


def pages_of_layers(llm: Any, kind: str) -> list[float]:
    """On /metrics, where the ranks are added up."""
    return [one.value for one in llm.get_metrics() if one.name == f"vllm:fox_kv_layer_pages_{kind}"]


def kill_a_worker(llm: Any, prompt: list[int]) -> str:
    """What the engine raises once a worker has died while a request runs; empty if it raises nothing."""
    add(llm, "unlucky", prompt, 1500)
    run_until_decoding(llm)
    processes_under(os.getpid(), "Worker")[0].kill()
    try:
        run_to_the_end(llm)
    except Exception as error:
        return str(error)
    return ""


def serve_in_two_processes(runs: list[dict[str, Any]], folder: Path, **environment: str) -> list[dict[str, Any]]:
    """:func:`serve` for each of ``runs``, its arguments; if they hang, all processes are ended."""
    result, limit = folder / "result.json", patience(LIMIT_S)
    command = [sys.executable, "-m", "tests.engine.test_parallel", str(result), json.dumps(runs)]
    cores = sorted(os.sched_getaffinity(0))
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}", **environment}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # Whatever happened, none of its processes stays behind.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = (folder / "log").read_text()[-6000:]
    assert code == 0, f"no answer after {limit:.0f} s\n{text}" if code is None else f"exit code {code}\n{text}"
    return json.loads(result.read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, fox_tiny: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        # Four heads a rank; token shift, QK-norm, output norm and gate.
        "official": fox_tiny,
        # Grouped queries with biases: one KV head a rank.
        "two_kv_heads": make_checkpoint(folder / "two", **VARIANTS["fla_gqa_bias_qk_norm"]),
        # Both ranks drop the same tokens, each of its own head.
        "sparse": save_sparse_gpt2(folder / "sparse", block_size=2048, score=2.8),
        # A KV head a rank, each with its own rows of the adapters that decide.
        "evicting": make_evicting(folder / "evicting", EVICTING["llama-adapter"], num_hidden_layers=4).served,
        # The only KV head is on both ranks, each with its own query heads' gates.
        "one_kv_head": make_checkpoint(folder / "one", **VARIANTS["fla_gqa_gate"]),
    }


@pytest.fixture(scope="module")
def alone(models: dict[str, Path]) -> Callable[[str], dict[str, Any]]:
    """What one process answers for a model."""
    return cache(lambda name: serve(str(models[name]), host=name == "official"))


@pytest.fixture(scope="module")
def by_two(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What two tensor-parallel ranks answered, for each model; the last loses a worker in the end."""
    runs = [{"model": str(model), "tensor": 2, "host": name == "official"} for name, model in models.items()]
    runs[-1]["kill"] = True
    return dict(zip(models, serve_in_two_processes(runs, tmp_path_factory.mktemp("two_ranks"))))


@pytest.mark.parametrize(
    "name, forgetting",
    # In the grouped checkpoints the last query heads hardly forget. Where heads can be dealt out to ranks, neither
    # gets such heads in all layers.
    [
        ("official", [0, 1]),
        ("two_kv_heads", [0, 1]),
        ("sparse", [0, 1]),
        ("evicting", [0, 1]),
        ("one_kv_head", [0]),
    ],
)
def test_two_ranks_answer_as_one(
    name: str,
    forgetting: list[int],
    models: dict[str, Path],
    by_two: dict[str, dict[str, Any]],
    alone: Callable[[str], dict[str, Any]],
) -> None:
    one, two = alone(name), by_two[name]
    assert two["prompts"] == one["prompts"]
    assert two["answers"] == one["answers"]
    print(f"{name}: pages in use {one['used']} of {one['dense']}, {two['used']} of {two['dense']}")
    assert len(two["used"]) == 2
    if name == "official":
        for key in ("answer", "cached"):
            assert two["back"][key] == one["back"][key]
        assert one["back"]["cached"] == (LENGTHS[-1] + ANSWER - 1) // PAGE * PAGE
        assert one["back"]["fetched"] and two["back"]["fetched"]
    for rank, (used, dense) in enumerate(zip(two["used"], two["dense"])):
        if rank in forgetting:
            assert used < dense
        else:
            assert used == dense
    if name == "sparse":
        assert two["used"] == one["used"] * 2
    elif name != "one_kv_head":
        assert sum(two["used"]) == one["used"][0]
    # Both compute the right thing, not only the same: the first answer by the formulas.
    prompt, answer = one["prompts"][0], one["answers"][0]
    if name == "evicting":
        logits, _ = evicting_logits(models[name].parent / "published", prompt + answer)
    else:
        logits = (sparse_gpt2_logits if name == "sparse" else reference_logits)(models[name], prompt + answer)
    assert answer == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_a_dead_worker_is_an_error_not_a_hang(by_two: dict[str, dict[str, Any]]) -> None:
    """A hang would have ended the run of all models."""
    assert by_two["one_kv_head"]["killed"]


@pytest.fixture(scope="module")
def in_stages(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What two pipeline stages answered, with one layer on the first and three on the second."""
    names = ["official", "evicting"]
    runs = [{"model": str(models[name]), "stages": 2} for name in names]
    folder = tmp_path_factory.mktemp("two_stages")
    return dict(zip(names, serve_in_two_processes(runs, folder, VLLM_PP_LAYER_PARTITION="1,3")))


@pytest.mark.parametrize("name", ["official", "evicting"])
def test_two_stages_answer_as_one(
    name: str, in_stages: dict[str, dict[str, Any]], alone: Callable[[str], dict[str, Any]]
) -> None:
    """Each stage counts and releases its own streams."""
    one, two = alone(name), in_stages[name]
    assert two["answers"] == one["answers"]
    assert two["dense"] == [one["dense"][0] // 4, one["dense"][0] * 3 // 4]
    print(f"{name}: pages in use {one['used']} of {one['dense']}, {two['used']} of {two['dense']}")
    # Stages take turns, so the moments differ at which the two runs are looked at, but only by a few tokens.
    assert sum(two["used"]) == pytest.approx(one["used"][0], rel=0.05)
    assert all(used < dense for used, dense in zip(two["used"], two["dense"]))


if __name__ in ("__main__", "__mp_main__"):  # the engine's process and those of its ranks
    keep_imports_from_the_collector()

if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps([serve(**run) for run in json.loads(sys.argv[2])]))
