"""What the page manager adds to one scheduler step, beside vLLM's own full-attention manager.

64 requests decode at 16k tokens on a model of 24 layers of 24 heads (pages of 64 tokens): every step each request
asks for its slots, some cross a page boundary, and one report of dead pages comes back.

    python -m benchmarks.scheduler_cost [--steps 512] [--out results/scheduler_cost.json]
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec

from benchmarks.record import save
from vllm_fox.pages.manager import StreamPageManager
from vllm_fox.pages.messages import PageReport
from vllm_fox.pages.spec import PageGeometry, StreamPageSpec

LAYERS, HEADS, DIM, PAGE = 24, 24, 64, 64
REQUESTS, TOKENS = 64, 16_384


def fox_manager(num_blocks: int, max_model_len: int = 2 * TOKENS) -> StreamPageManager:
    spec = StreamPageSpec(
        block_size=PAGE,
        num_kv_heads=HEADS,
        head_size=DIM,
        dtype=torch.bfloat16,
        dcp_sharded=False,
        tokens_per_state=PAGE,
        state_content_bytes=17_024,
        num_gates=1,
        token_shift=True,
        num_layers=LAYERS,
        num_ranks=1,
        num_slots=256,
        max_model_len=max_model_len,
        max_step_tokens=8192,
        release=True,
    )
    return StreamPageManager(spec, **common(num_blocks))


def dense_manager(num_blocks: int) -> FullAttentionManager:
    spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=HEADS, head_size=DIM, dtype=torch.bfloat16)
    return FullAttentionManager(spec, **common(num_blocks))


def common(num_blocks: int) -> dict:
    pool = BlockPool(num_gpu_blocks=num_blocks, enable_caching=False, hash_block_size=PAGE)
    return {
        "block_pool": pool,
        "enable_caching": False,
        "kv_cache_group_id": 0,
        "scheduler_block_size": PAGE,
    }


def ask(manager: SingleTypeKVCacheManager, request: str, tokens: int) -> None:
    """What KVCacheManager.allocate_slots asks of a manager for one request."""
    manager.remove_skipped_blocks(request, tokens - 1)
    manager.get_num_blocks_to_allocate(request, tokens, (), tokens - 1, tokens - 1, tokens)
    manager.allocate_new_blocks(request, tokens, tokens)


def run(steps: int) -> dict[str, list[float]]:
    """Times of each part, in ms per step."""
    blocks = REQUESTS * (TOKENS // PAGE + steps // PAGE + 2) + 1
    fox, dense = fox_manager(blocks), dense_manager(blocks)
    names = [f"request-{i}" for i in range(REQUESTS)]
    # Staggered lengths, so that requests cross page boundaries at different steps.
    lengths = TOKENS - np.arange(REQUESTS) % PAGE
    for name, length in zip(names, lengths.tolist()):
        dense.num_cached_block[name] = 0
        ask(fox, name, length)
        ask(dense, name, length)
    rng = np.random.default_rng(0)
    # A live window per stream; a sixth of the KV is live in all, and each window has its own phase.
    window = np.minimum(rng.exponential(TOKENS / 6, (REQUESTS, LAYERS * HEADS)), TOKENS * 2)
    phase = rng.integers(0, PAGE, window.shape)
    update = fox.take_update(names)
    times: dict[str, list[float]] = {
        "fox allocate": [],
        "fox update": [],
        "fox report": [],
        "dense allocate": [],
    }
    for step in range(-1, steps):
        now = lengths + step + 1
        starts = np.maximum((now[:, None] - window - phase) // PAGE, 0).astype(np.int32)
        report = PageReport(update.step, update.slots, update.epochs, 0, torch.from_numpy(starts), None)
        t0 = time.perf_counter()
        fox.apply(report)
        t1 = time.perf_counter()
        for name, length in zip(names, now.tolist()):
            ask(fox, name, length)
        t2 = time.perf_counter()
        update = fox.take_update(names)
        t3 = time.perf_counter()
        for name, length in zip(names, now.tolist()):
            ask(dense, name, length)
        t4 = time.perf_counter()
        if step >= 0:  # the first report frees the prompts' dead pages at once
            for key, value in zip(times, (t2 - t1, t3 - t2, t1 - t0, t4 - t3)):
                times[key].append(1e3 * value)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=512)
    parser.add_argument("--out", default="results/scheduler_cost.json")
    args = parser.parse_args()
    times = run(args.steps)
    times["fox total"] = [sum(parts) for parts in zip(*(times[k] for k in times if k.startswith("fox")))]
    times["added by fox"] = [a - b for a, b in zip(times["fox total"], times["dense allocate"])]
    print(f"ms per step; {REQUESTS} requests of {TOKENS} tokens, {LAYERS} layers of {HEADS} heads, page {PAGE}")
    print(f"{'':16}{'median':>9}{'mean':>9}{'p99':>9}")
    figures = {}
    for name, values in times.items():
        row = statistics.median(values), statistics.mean(values), float(np.percentile(values, 99))
        figures[name] = dict(zip(("median", "mean", "p99"), row))
        print(f"{name:16}" + "".join(f"{value:9.3f}" for value in row))

    print("page table as a share of the KV memory (256 slots):")
    for length in (16_384, 32_768, 131_072):
        for gib in (8, 64, 120):
            blocks = (gib << 30) // (LAYERS * HEADS * 17_024)
            spec = fox_manager(2, length).kv_cache_spec
            share = PageGeometry.of(spec, blocks).table_bytes / (gib << 30)
            figures[f"table share, {length} tokens, {gib} GiB"] = share
            print(f"  {length:7} tokens a request, {gib:4} GiB: {100 * share:.2f} %")
    save(args.out, figures)


if __name__ == "__main__":
    main()
