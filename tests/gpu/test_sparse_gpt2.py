"""Dynamic Context Pruning on a CUDA GPU, with vLLM's default flags: compiled, graphs, asynchronous scheduling."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from vllm import LLM

from benchmarks.engines import GPU_DEFAULTS, engine, generate, greedy, manager
from tests.support.checkpoints import save_sparse_gpt2
from tests.support.engines import assert_all_free, compiled_kernels
from tests.support.reference_sparse_gpt2 import reference_logits
from vllm_fox.families.sparse_gpt2.layer import SubsetAttention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sparse_gpt2(tmp_path_factory.mktemp("sparse"), block_size=2048, score=2.8, n_embd=128)


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with engine(model, dtype="float32", **GPU_DEFAULTS) as started:
        before = compiled_kernels()
        assert any("subset" in name for name in before)
        yield started
        # Everything was compiled before the first request.
        assert before == compiled_kernels()


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(1, 257), k=length)


def test_graphs_and_the_formula(llm: LLM, model: Path) -> None:
    config = llm.llm_engine.vllm_config
    assert config.scheduler_config.async_scheduling
    assert config.compilation_config.cudagraph_mode.name == "FULL_AND_PIECEWISE"
    tokens = prompt(300)
    (out,) = generate(llm, [tokens], greedy(60, logprobs=0))
    answer = list(out.outputs[0].token_ids)
    want = reference_logits(model, tokens + answer)[len(tokens) - 1 : -1].log_softmax(-1)
    found = [at[token].logprob for at, token in zip(out.outputs[0].logprobs, answer, strict=True)]
    want = want.gather(1, torch.tensor(answer)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found).double(), want, atol=1e-3, rtol=0)


def test_decoding_is_one_graph(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention runs as Python code for the prompt only: a graph's replay calls nothing."""
    calls: list[int] = []
    attend = SubsetAttention.attend

    def counted(self: SubsetAttention, inputs: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        calls.append(self.index)
        attend(self, inputs, out)

    monkeypatch.setattr(SubsetAttention, "attend", counted)
    generate(llm, [prompt(100)], greedy(33))
    assert len(calls) == len(set(calls)) > 0


def test_batched_requests_equal_their_solo_runs(llm: LLM) -> None:
    prompts = [prompt(50 + 231 * i, seed=i) for i in range(8)]
    together = generate(llm, prompts, greedy(48))
    assert manager(llm).pool.released_total > 0
    for one, out in zip(prompts, together, strict=True):
        (alone,) = generate(llm, [one], greedy(48))
        assert list(alone.outputs[0].token_ids) == list(out.outputs[0].token_ids)
    assert_all_free(llm)
