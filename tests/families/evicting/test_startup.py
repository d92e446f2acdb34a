"""What is refused before anything is loaded, and what the pages are made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.engines import engine, generate, greedy, manager, source_tokens
from tests.support.engines import assert_all_free
from tests.support.evicting import VARIANTS, Made, make_evicting


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_evicting(tmp_path_factory.mktemp("made"), VARIANTS["qwen3-borrowed"])


def refusal(model: Path, **options: int) -> str:
    with pytest.raises(ValueError) as error, engine(model, **options):
        pass
    return str(error.value)


def test_a_published_checkpoint_is_not_served_as_a_dense_model(made: Made) -> None:
    """Its ``model_type`` is qwen3, and it names no architecture."""
    found = refusal(made.published)
    assert f"{made.published} evicts tokens by DMS" in found
    assert f"run `python -m vllm_fox.convert {made.published} OUT` and serve OUT" in found


def test_a_borrowed_neuron_is_on_one_rank(made: Made) -> None:
    found = refusal(made.served, tensor_parallel_size=4)
    assert "do not support --tensor-parallel-size 4 with 2 KV heads and a borrowed neuron" in found


def test_float8_pages(made: Made) -> None:
    """A number has 3 bits after its first, and what that costs averages out over a text."""
    found = {}
    for kind in ("auto", "fp8"):
        options = {"dtype": "bfloat16", "max_model_len": 512, "max_num_batched_tokens": 160}
        with engine(made.served, kv_cache_dtype=kind, **options) as llm:
            tokens = source_tokens(llm, 400)
            (out,) = generate(llm, [tokens], greedy(20, prompt_logprobs=0))
            given = [at[token].logprob for at, token in zip(out.prompt_logprobs[1:], tokens[1:], strict=True)]
            found[kind] = sum(given) / len(given), manager(llm).kv_cache_spec.page_format.page_bytes
            assert_all_free(llm)
    (plain, whole), (rounded, half) = found["auto"], found["fp8"]
    assert rounded == pytest.approx(plain, abs=0.02) and rounded != plain
    assert half < 0.56 * whole
