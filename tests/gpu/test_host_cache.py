"""Cached pages in host memory on a CUDA GPU: copies beside the compute stream, and an engine by default flags."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from vllm import LLM

from benchmarks.engines import GPU_DEFAULTS, engine, generate, manager, source_tokens
from tests.support.conversations import answer_of, assert_equal_without_cache, params, random_conversations
from tests.support.engines import assert_all_free, compiled_kernels
from vllm_fox.pages import host_pages
from vllm_fox.pages.host_pages import HostPages
from vllm_fox.pages.host_tier import Copies

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
RANDOM_REQUESTS = int(os.environ.get("FOX_RANDOM_REQUESTS", "300"))
# Logits of up to 300 are rounded by 2e-5 each in float32, and add up over four layers.
TOLERANCE = 2e-3
PAGE = 16


# Copies alone.


@pytest.mark.parametrize("page_bytes", [128, 9088, 33792])
def test_pages_come_back_as_they_went(page_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through buffers of few pages, while the compute stream overwrites each page as soon as it may."""
    monkeypatch.setattr(host_pages, "STAGING_BYTES", 20 * page_bytes)
    count, order = 3000, np.random.default_rng(0)
    pool = torch.randint(0, 256, (count * page_bytes,), dtype=torch.uint8, device="cuda")
    pages, before = pool.view(count, page_bytes), pool.view(count, page_bytes).clone()
    host = HostPages(pool, page_bytes, count)
    out, places = (order.permutation(np.arange(1, count))[:1000].astype(np.int32) for _ in range(2))
    host.save(Copies([out], [places]), 0)
    pages.fill_(7)  # the next tenants, without a wait
    back = order.permutation(np.arange(1, count))[:1000].astype(np.int32)
    host.fetch(Copies([back], [places]), 0, 3)
    reported, deadline = host.fetches(), time.monotonic() + 60
    while reported.last() != 3:
        assert time.monotonic() < deadline
    assert torch.equal(pages[torch.from_numpy(back).cuda().long()], before[torch.from_numpy(out).cuda().long()])
    others = torch.ones(count, dtype=torch.bool, device="cuda")
    others[torch.from_numpy(back).cuda().long()] = False
    assert (pages[others] == 7).all()
    assert host.fetches().under_way == ()


def test_memory_is_unpinned_with_its_owner() -> None:
    """Or the next engine of a process could not pin memory at the same address."""
    pool = torch.zeros(64 * 128, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        host = HostPages(pool, 128, 2**16)
        assert host._host.is_pinned()
        del host


# Engines.


@pytest.fixture(scope="module")
def llm(fox_tiny: Path) -> Iterator[LLM]:
    """So small a cache that pages go out all the time."""
    options = GPU_DEFAULTS | {"num_gpu_blocks_override": 48}
    fox = {"page_size": PAGE, "host_cache_gib": 0.5}
    with engine(fox_tiny, fox, max_model_len=704, max_num_seqs=8, **options) as started:
        before = compiled_kernels()
        yield started
        # Everything was compiled before the first request.
        assert before == compiled_kernels()


def test_conversations_come_back(llm: LLM) -> None:
    host = manager(llm).host
    assert host is not None
    prompts = [source_tokens(llm, 600, seed=seed) for seed in range(20, 50)]
    firsts = [answer_of(generate(llm, [prompt], params(2))[0]) for prompt in prompts]
    assert host.saved_total and not host.fetched_total
    second = [first.prompt + first.tokens + [5] * 20 for first in firsts]
    outs = [generate(llm, [prompt], params(10))[0] for prompt in second]
    assert [out.num_cached_tokens for out in outs] == [601 // PAGE * PAGE] * len(outs)
    assert host.fetched_total
    assert_equal_without_cache(llm, [answer_of(out) for out in outs], TOLERANCE)
    assert_all_free(llm)


def test_random_conversations(llm: LLM) -> None:
    """Turns, resent prompts, aborts and preemptions: free pages are NaN, and nothing reads one."""
    host = manager(llm).host
    assert host is not None
    order, before = random.Random(1), host.fetched_total
    traffic = random_conversations(llm, RANDOM_REQUESTS, order, room=47, longest=600, vocabulary=250)
    back = host.fetched_total - before
    assert traffic.hits > len(traffic.answers) // 3 and back
    assert_all_free(llm)
    farthest = assert_equal_without_cache(llm, traffic.answers, TOLERANCE)
    print(f"{traffic}; log-probabilities within {farthest:.1e}; {back} pages came back")
    assert_all_free(llm)
