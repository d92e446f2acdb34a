"""Two tensor-parallel ranks answer as one does, and each gives its own heads' pages back.

The ranks are processes of their own (vLLM's multiprocessing executor). The engine that leads them runs in a process
of its own too, so that a hanging one can be ended together with its ranks: ``python -m tests.test_tensor_parallel``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
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
LIMIT_S = 240


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
        used = [pool.capacity - len(pool.free_ids(rank)) for rank in range(pool.ranks)]
        held = pool.num_pages.sum().item() * pool.streams
        finished = run_to_the_end(llm)
        assert_all_free(llm)
        answers = [finished[str(name)] for name in range(len(prompts))]
        return {"prompts": prompts, "answers": answers, "used": used, "dense": held}


def serve_in_two_processes(model: Path, folder: Path) -> dict[str, Any]:
    """:func:`serve` with two ranks, ended with all its processes after ``LIMIT_S`` seconds."""
    result = folder / "result.json"
    command = [sys.executable, "-m", "tests.test_tensor_parallel", str(model), str(result)]
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
            with_group_ended(process)
    text = (folder / "log").read_text()[-6000:]
    assert code == 0, f"no answer after {LIMIT_S} s\n{text}" if code is None else f"exit code {code}\n{text}"
    return json.loads(result.read_text())


def with_group_ended(process: subprocess.Popen[bytes]) -> None:
    """Whatever happened, none of its processes stays behind."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def official(folder: Path, shipped: Path) -> Path:
    """The shipped checkpoint: four heads a rank, token shift, QK-norm, output norm and gate."""
    return shipped


def two_kv_heads(folder: Path, shipped: Path) -> Path:
    """Grouped queries with biases: one KV head a rank; the second rank's group never forgets."""
    return make_checkpoint(folder / "model", **VARIANTS["fla_gqa_bias_qk_norm"])


def one_kv_head(folder: Path, shipped: Path) -> Path:
    """The only KV head is on both ranks, each with its own query heads' gates; the second rank's never forget."""
    return make_checkpoint(folder / "model", **VARIANTS["fla_gqa_gate"])


@pytest.mark.parametrize("checkpoint, forgetting", [(official, [0, 1]), (two_kv_heads, [0]), (one_kv_head, [0])])
def test_two_ranks_answer_as_one(
    checkpoint: Callable[[Path, Path], Path], forgetting: list[int], tmp_path: Path, fox_tiny: Path
) -> None:
    model = checkpoint(tmp_path, fox_tiny)
    two = serve_in_two_processes(model, tmp_path)
    one = serve(str(model), 1)
    assert two["prompts"] == one["prompts"]
    assert two["answers"] == one["answers"]
    print(f"{checkpoint.__name__}: pages in use {one['used']} of {one['dense']}, {two['used']} of {two['dense']}")
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
    model_path, result_path = sys.argv[1:]
    Path(result_path).write_text(json.dumps(serve(model_path, 2)))
