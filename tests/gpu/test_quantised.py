"""Quantised weights of Forgetting Transformers on a CUDA GPU, with vLLM's default flags."""

from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from vllm import LLM

from benchmarks.engines import GPU_DEFAULTS, engine, generate, greedy
from tests.support.checkpoints import VARIANTS, make_checkpoint
from tests.support.engines import assert_all_free
from tests.support.new_weights import found
from tests.support.quantised import (
    as_float8,
    as_int8,
    check_fox_weights,
    fox_likelihood,
    quantise,
    quantised_at_load,
    rms,
)

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


def made(folder: Path, variant: str, method: str, seed: int = 0) -> tuple[Path, Path]:
    """A checkpoint, and the weights that it stands for."""
    first = make_checkpoint(folder / "first", **VARIANTS[variant], dtype=torch.float16, seed=seed)
    if method == "fp8":
        return first, quantised_at_load(first)
    return quantise(first, method, torch.float16)


def check(llm: LLM, plain: Path, method: str) -> None:
    """Every layer multiplies with the weights that are meant, and log-probabilities are those of transformers.

    But for the rounding of inputs. float16 moves some of them over the middle of two 8-bit numbers, and where one
    layer has rounded otherwise, so do most inputs of the next. Two ways of rounding that have nothing to do with
    one another leave sqrt(2) of the difference that one of them makes, and some more by chance.
    """
    llm.apply_model(lambda model: check_fox_weights(model, plain, rtol=2**-10))
    served = found(llm, TOKENS)
    want, unrounded = (fox_likelihood(plain, TOKENS, rounded) for rounded in (METHODS[method], None))
    print(method, f"off by {rms(served - want):.4f}, where rounding makes {rms(unrounded - want):.4f}")
    assert rms(served - want) < 1.6 * rms(unrounded - want)


@pytest.mark.parametrize("variant", ["pro", "llama", "fla_gqa_bias"])
@pytest.mark.parametrize("method", METHODS)
def test_likelihoods_are_those_of_the_weights_that_are_meant(tmp_path: Path, method: str, variant: str) -> None:
    """With a bound from QK-norm, and with one from the quantised projections, with and without biases."""
    served, plain = made(tmp_path, variant, method)
    quantization = "fp8" if method == "fp8" else None
    with engine(served, {"page_size": 16}, quantization=quantization, **OPTIONS) as llm:
        check(llm, plain, method)
        assert_all_free(llm)


def check_new_weights_and_sleep(folder: Path, method: str) -> None:
    """In a process that has no other engine which sleeps, for that is all that vLLM allows in the life of one."""
    served, plain = made(folder / "one", "llama", method)
    others, others_plain = made(folder / "two", "llama", method, seed=1)
    quantization = "fp8" if method == "fp8" else None
    with engine(served, quantization=quantization, enable_sleep_mode=True, **OPTIONS) as llm:

        def answer() -> list[int]:
            (out,) = generate(llm, [TOKENS[:300]], greedy(40))
            return list(out.outputs[0].token_ids)

        before = answer()
        llm.sleep(level=1)
        llm.wake_up()
        assert answer() == before
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(others)})
        assert llm.reset_prefix_cache()
        check(llm, others_plain, method)
        llm.sleep(level=2)
        llm.wake_up()
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(served)})
        assert llm.reset_prefix_cache()
        check(llm, plain, method)
        assert answer() == before


@pytest.mark.parametrize("method", METHODS)
def test_new_weights_and_sleep(tmp_path: Path, method: str) -> None:
    """Weights that come later are quantised as the first ones were, and graphs go on with them."""
    process = get_context("spawn").Process(target=check_new_weights_and_sleep, args=(tmp_path, method))
    process.start()
    process.join()
    assert process.exitcode == 0
