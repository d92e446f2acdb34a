"""New weights for a running engine on a CUDA GPU: asleep and awake, under CUDA graphs, and part by part."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from vllm import LLM

from benchmarks.engines import GPU_DEFAULTS, engine, generate, greedy
from tests.support.engines import assert_all_free
from tests.support.gradients import real_tokens
from tests.support.new_weights import all_others, changed, found, wanted

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
# Logits of up to 300 are rounded by 2e-5 each in float32, and add up over four layers.
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def others(fox_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return changed(fox_tiny, tmp_path_factory.mktemp("others") / "fox", all_others)


@pytest.fixture(scope="module")
def llm(fox_tiny: Path) -> Iterator[LLM]:
    with engine(fox_tiny, max_model_len=4096, enable_sleep_mode=True, **GPU_DEFAULTS) as started:
        yield started


@pytest.fixture(scope="module")
def text(fox_tiny: Path) -> list[int]:
    return real_tokens(fox_tiny, 2000).tolist()


def assert_serves(llm: LLM, folder: Path, text: list[int]) -> None:
    torch.testing.assert_close(found(llm, text), wanted(folder, text), atol=TOLERANCE, rtol=0)
    assert_all_free(llm)


def answer(llm: LLM, text: list[int]) -> list[int]:
    """Decoded by CUDA graphs, which hold the addresses of all state."""
    (out,) = generate(llm, [text[:1500]], greedy(40))
    return list(out.outputs[0].token_ids)


def test_memory_goes_and_comes_back(llm: LLM, text: list[int]) -> None:
    """The whole cache, while the engine sleeps. Others on the card may take and free memory: the median counts."""
    core: Any = llm.llm_engine.engine_core
    config = core.engine_core.scheduler.kv_cache_manager.kv_cache_config
    cache = sum(tensor.size for tensor in config.kv_cache_tensors)
    assert cache > 2**29
    given, taken = list[int](), list[int]()
    for _ in range(5):
        awake = torch.cuda.mem_get_info()[0]
        llm.sleep(level=1)
        asleep = torch.cuda.mem_get_info()[0]
        llm.wake_up()
        given.append(asleep - awake)
        taken.append(asleep - torch.cuda.mem_get_info()[0])
    print(f"the cache takes {cache:,} bytes; given back {given}, taken again {taken}")
    for sizes in (given, taken):
        assert statistics.median(sizes) == pytest.approx(cache, rel=0.1)
    answer(llm, text)


def test_sleep_keeps_weights_and_tables(llm: LLM, fox_tiny: Path, text: list[int]) -> None:
    before = answer(llm, text)
    assert_serves(llm, fox_tiny, text)
    llm.sleep(level=1)
    llm.wake_up()
    assert answer(llm, text) == before
    assert_serves(llm, fox_tiny, text)


def test_new_weights_after_deep_sleep(llm: LLM, fox_tiny: Path, others: Path, text: list[int]) -> None:
    before = answer(llm, text)
    llm.sleep(level=2)
    llm.wake_up()
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(others)})
    assert_serves(llm, others, text)
    llm.sleep(level=2)
    llm.wake_up()
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(fox_tiny)})
    assert_serves(llm, fox_tiny, text)
    assert answer(llm, text) == before


def test_parts_straight_into_the_model(llm: LLM, fox_tiny: Path, others: Path, text: list[int]) -> None:
    """As trainers that call load_weights with a bucket of tensors at a time."""
    for folder in (others, fox_tiny):
        weights = list(load_file(folder / "model.safetensors").items())

        def load(model: Any, weights: list[tuple[str, torch.Tensor]] = weights) -> None:
            for start in range(0, len(weights), 3):
                model.load_weights(weights[start : start + 3])

        llm.apply_model(load)
        assert_serves(llm, folder, text)
