"""Two tensor-parallel ranks answer as one does, and each gives its own heads' pages back.

The ranks are processes of their own (vLLM's multiprocessing executor). So is the engine that leads them
(``python -m tests.test_tensor_parallel``), so that a hanging one can be ended together with its ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import VARIANTS, make_checkpoint
from tests.engines import (
    add,
    assert_all_free,
    engine,
    manager,
    run_to_the_end,
    run_until_decoding,
    source_tokens,
)
from tests.reference_model import reference_logits

ROOT = Path(__file__).resolve().parent.parent
PAGE, ANSWER, LENGTHS = 16, 24, (300, 700, 1500)
LIMIT_S = 300


def serve(model: str, ranks: int) -> dict[str, Any]:
    """Three requests together: prompts, answers, and the pages in use on each rank while they were answered."""
    with engine(
        model,
        {"page_size": PAGE},
        tensor_parallel_size=ranks,
        distributed_executor_backend="mp" if ranks > 1 else None,
        max_model_len=2048,
        max_num_seqs=4,
        max_num_batched_tokens=512,
        num_gpu_blocks_override=300,
    ) as llm:
        prompts = [source_tokens(llm, length, seed=length) for length in LENGTHS]
        for name, prompt in enumerate(prompts):
            add(llm, str(name), prompt, ANSWER)
        # The shortest prompt is through first; all are running by the time it has answered some tokens.
        run_until_decoding(llm, count=len(prompts), tokens=4)
        pool = manager(llm).pool
        used = [int(pool.capacity[rank]) - len(pool.free_ids(rank)) for rank in range(pool.ranks)]
        held = (pool.num_pages.sum() * pool.streams).tolist()
        finished = run_to_the_end(llm)
        assert_all_free(llm)
        answers = [finished[str(name)] for name in range(len(prompts))]
        return {"prompts": prompts, "answers": answers, "used": used, "dense": held}


def serve_in_two_processes(models: dict[str, Path], folder: Path) -> dict[str, dict[str, Any]]:
    """:func:`serve` each model with two ranks; after ``LIMIT_S`` seconds all its processes are ended."""
    result = folder / "result.json"
    command = [sys.executable, "-m", "tests.test_tensor_parallel", str(result)]
    command += [f"{name}={model}" for name, model in models.items()]
    cores = sorted(os.sched_getaffinity(0))
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code: int | None = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # Whatever happened, none of its processes stays behind.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = (folder / "log").read_text()[-6000:]
    assert code == 0, f"no answer after {LIMIT_S} s\n{text}" if code is None else f"exit code {code}\n{text}"
    return json.loads(result.read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, fox_tiny: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        # Four heads a rank; token shift, QK-norm, output norm and gate.
        "official": fox_tiny,
        # Grouped queries with biases: one KV head a rank.
        "two_kv_heads": make_checkpoint(folder / "two", **VARIANTS["fla_gqa_bias_qk_norm"]),
        # The only KV head is on both ranks, each with its own query heads' gates.
        "one_kv_head": make_checkpoint(folder / "one", **VARIANTS["fla_gqa_gate"]),
    }


@pytest.fixture(scope="module")
def by_two(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What two ranks answered, for each model."""
    return serve_in_two_processes(models, tmp_path_factory.mktemp("two_ranks"))


@pytest.mark.parametrize(
    "name, forgetting",
    # In the grouped checkpoints the second rank's query heads hardly forget, so that its pages stay.
    [("official", [0, 1]), ("two_kv_heads", [0]), ("one_kv_head", [0])],
)
def test_two_ranks_answer_as_one(
    name: str, forgetting: list[int], models: dict[str, Path], by_two: dict[str, dict[str, Any]]
) -> None:
    model, two = models[name], by_two[name]
    one = serve(str(model), 1)
    assert two["prompts"] == one["prompts"]
    assert two["answers"] == one["answers"]
    print(f"{name}: pages in use {one['used']} of {one['dense']}, {two['used']} of {two['dense']}")
    assert len(two["used"]) == 2
    for rank, used in enumerate(two["used"]):
        if rank in forgetting:
            assert used < two["dense"]
        else:
            assert used == two["dense"]
    # Both compute the right thing, not only the same: the first answer by the formulas.
    prompt, answer = one["prompts"][0], one["answers"][0]
    logits = reference_logits(model, prompt + answer)[len(prompt) - 1 : -1]
    assert answer == logits.argmax(-1).tolist()


if __name__ == "__main__":
    result_path, *named = sys.argv[1:]
    served = {name: serve(path, 2) for name, _, path in (pair.partition("=") for pair in named)}
    Path(result_path).write_text(json.dumps(served))
