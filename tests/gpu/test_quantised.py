"""Quantised weights of Forgetting Transformers on a CUDA GPU, with vLLM's default flags."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from vllm import LLM

from benchmarks.engines import GPU_DEFAULTS, assert_all_free, engine, generate, greedy
from tests.support.checkpoints import VARIANTS, make_checkpoint
from tests.support.new_weights import found
from tests.support.quantised import as_float8, as_int8, fox_likelihood, quantise, quantised_at_load, rms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

TOKENS = torch.randint(1, 257, (1200,), generator=torch.Generator().manual_seed(1)).tolist()
OPTIONS = {
    "dtype": "float16",
    "max_model_len": 2048,
    "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8]},
    **GPU_DEFAULTS,
}
METHODS = {"fp8": as_float8, "float8": as_float8, "int8": as_int8}
"""While weights are loaded, and stored by compressed-tensors; and how each rounds the inputs of projections."""


def made(folder: Path, variant: str, method: str, seed: int = 0) -> tuple[Path, Path, Path]:
    """A checkpoint, the folder that is served, and the weights that this stands for."""
    first = make_checkpoint(folder / "first", **VARIANTS[variant], dtype=torch.float16, seed=seed)
    if method == "fp8":
        return first, first, quantised_at_load(first)
    return first, *quantise(first, method, torch.float16)


def check_likelihood(llm: LLM, first: Path, plain: Path, method: str) -> None:
    """Log-probabilities are those of transformers on the weights that are meant, but for rounding.

    float16 moves some inputs over the middle of two 8-bit numbers: they are then off by a whole step, where
    rounding leaves a twelfth of a step's square otherwise. A share p of such inputs leaves sqrt(12 p) of the
    difference that rounding makes. float16 has 128 values in a step of float8, and 16 to 32 in one of int8 for most
    inputs, and a result is rounded a few times in a layer, so p is a few hundredths at most.
    """
    served = found(llm, TOKENS)
    want, unrounded = (fox_likelihood(plain, TOKENS, rounded) for rounded in (METHODS[method], None))
    other = fox_likelihood(first, TOKENS, None)
    sizes = {"off": served - want, "rounding of inputs": unrounded - want, "quantisation": other - want}
    print(method, {name: round(rms(size), 4) for name, size in sizes.items()})
    assert rms(served - want) < rms(unrounded - want)
    assert rms(served - want) < rms(served - other)


@pytest.mark.parametrize("variant", ["pro", "llama", "fla_gqa_bias"])
@pytest.mark.parametrize("method", METHODS)
def test_likelihoods_are_those_of_the_weights_that_are_meant(tmp_path: Path, method: str, variant: str) -> None:
    """With a bound from QK-norm, and with one from the quantised projections, with and without biases."""
    first, served, plain = made(tmp_path, variant, method)
    quantization = "fp8" if method == "fp8" else None
    with engine(served, {"page_size": 16}, quantization=quantization, **OPTIONS) as llm:
        check_likelihood(llm, first, plain, method)
        assert_all_free(llm)


@pytest.mark.parametrize("method", METHODS)
def test_new_weights_and_sleep(tmp_path: Path, method: str) -> None:
    """Weights that come later are quantised as the first ones were, and graphs go on with them."""
    first, served, plain = made(tmp_path / "one", "llama", method)
    others, others_served, others_plain = made(tmp_path / "two", "llama", method, seed=1)
    quantization = "fp8" if method == "fp8" else None
    with engine(served, quantization=quantization, enable_sleep_mode=True, **OPTIONS) as llm:

        def answer() -> list[int]:
            (out,) = generate(llm, [TOKENS[:300]], greedy(40))
            return list(out.outputs[0].token_ids)

        before = answer()
        llm.sleep(level=1)
        llm.wake_up()
        assert answer() == before
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(others_served)})
        assert llm.reset_prefix_cache()
        check_likelihood(llm, others, others_plain, method)
        llm.sleep(level=2)
        llm.wake_up()
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(served)})
        assert llm.reset_prefix_cache()
        check_likelihood(llm, first, plain, method)
        assert answer() == before
