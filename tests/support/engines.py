"""What tests ask of an engine in this process: random requests, nothing kept afterwards, and nothing compiled."""

from __future__ import annotations

import gc
import random
import sys
import weakref
from typing import Any

import numpy as np
import torch
from vllm import LLM

from benchmarks.engines import add, manager, num_blocks, scheduler, step, usage


def random_traffic(
    llm: LLM, requests: dict[str, tuple[list[int], int]], order: random.Random, room: int
) -> tuple[dict[str, list[int]], set[str], int]:
    """Greedy requests (prompt, answer length) that arrive at random, with aborts and preemptions at random.

    Args:
        room: blocks that they have; the rest is held aside.

    Returns:
        Answers of those that finished, those that were aborted, and how often one was preempted.
    """
    waiting = list(requests)
    aborted: set[str] = set()
    finished: dict[str, list[int]] = {}
    preempted: dict[str, int] = {}
    sched = scheduler(llm)
    blocks = sched.kv_cache_manager.block_pool
    aside = blocks.get_new_blocks(num_blocks(llm) - room)
    while waiting or llm.llm_engine.has_unfinished_requests():
        for _ in range(order.randint(0, 3)):
            if waiting:
                add(llm, waiting[0], *requests[waiting.pop(0)])
        for out in step(llm):
            if out.finished:
                finished[out.request_id] = list(out.outputs[0].token_ids)
        for request in sched.requests.values():
            preempted[request.request_id] = request.num_preemptions
        if sched.running and order.random() < 0.02:
            sched._preempt_request(sched.running.pop(), 0.0)
        unfinished = sorted(set(requests) - set(waiting) - set(finished) - aborted)
        if unfinished and order.random() < 0.02:
            name = order.choice(unfinished)
            aborted.add(name)
            llm.llm_engine.abort_request([name])
    blocks.free_blocks(aside)
    return finished, aborted, sum(preempted.values())


def assert_all_free(llm: LLM) -> None:
    """Every page, slot, table chunk and block is back; what is cached counts as free and is held by nobody."""
    pages = manager(llm)
    pool = pages.pool
    assert pool.used_total == 0 and usage(llm) == 0
    assert not pool.live_pages.any() and not pool.num_pages.any()
    assert len(pool._free_slots) == len(pool.epoch) - 1
    assert len(pool._free_chunks) == len(pool._entries) - 1
    assert not pages._slot_of and not pages._prompt_pages and not pages._room
    for rank in range(pool.ranks):
        parts = [pool.free_ids(rank), *([pool.prefixes.held_ids(rank)] if pool.prefixes is not None else [])]
        ids = torch.from_numpy(np.concatenate(parts)).sort().values
        first = pool.streams[rank]
        assert torch.equal(ids, torch.arange(first, first + pool.capacity[rank], dtype=torch.int32))


def compiled_kernels() -> dict[str, int]:
    """Variants of each of our Triton kernels that this process has compiled, by the kernel's full name."""
    from triton.runtime import JITFunction

    found = {}
    for module in [name for name in sys.modules if name.startswith("vllm_fox.kernels.")]:
        for name, value in vars(sys.modules[module]).items():
            if isinstance(value, JITFunction) and value.device_caches:
                found[f"{module}.{name}"] = sum(len(cache[0]) for cache in value.device_caches.values())
    return found


def a_layer(llm: LLM) -> weakref.ref[Any]:
    """One of a model's attention layers, for :func:`assert_gone`."""
    return weakref.ref(next(iter(llm.llm_engine.vllm_config.compilation_config.static_forward_context.values())))


def assert_gone(layer: weakref.ref[Any]) -> None:
    """An engine that has ended leaves no model, or many of them would fill the memory of one process."""
    gc.collect()
    assert layer() is None
