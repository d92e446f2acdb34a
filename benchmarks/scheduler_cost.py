"""What the page manager adds to one scheduler step, beside vLLM's own full-attention manager.

A model of 24 layers of 24 heads, pages of 64 tokens. In decode 256 requests stand at 16k tokens: every step each
asks for its slots, some cross a page boundary, a report of dead pages comes back, and the step's metrics are taken.
In prefill every step reads 8,192 tokens of a prompt, whose dead pages are reported in the next, and now and then
a request ends. Both are measured without prefix caching; then decode with it, in both managers, what prompts cost
that are found in the cache or not, and conversations that take their turns at once. "stats" is what metrics of a
step take, and "counting", which is a part of "update", what counting the work of queries for them does.

    python -m benchmarks.scheduler_cost [--steps 512] [--out results/scheduler_cost.json]
"""

from __future__ import annotations

import hashlib
import statistics
import time
from typing import Any

import numpy as np
import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec

from benchmarks.options import Parser, positive_int
from benchmarks.record import save
from vllm_fox.kernels.forgetting.pages import LIVE_RANGE_PERIOD, ForgettingPageFormat
from vllm_fox.pages.geometry import PageGeometry
from vllm_fox.pages.manager import StreamPageManager
from vllm_fox.pages.messages import PageReport, TableUpdate
from vllm_fox.pages.metrics import StatsSource
from vllm_fox.pages.spec import StreamPageSpec

LAYERS, HEADS, DIM, PAGE = 24, 24, 64, 64
FORM = ForgettingPageFormat(PAGE, DIM, torch.bfloat16, 1, True, torch.bfloat16)
REQUESTS, TOKENS, CHUNK = 256, 16_384, 8_192


def fox_manager(
    num_blocks: int, max_model_len: int = 2 * TOKENS, caching: bool = False, unsettled: int = 0
) -> StreamPageManager:
    spec = StreamPageSpec(
        block_size=PAGE,
        num_kv_heads=HEADS,
        head_size=DIM,
        dtype=torch.bfloat16,
        dcp_sharded=False,
        tokens_per_state=PAGE,
        state_content_bytes=FORM.page_bytes,
        page_format=FORM,
        report_period=LIVE_RANGE_PERIOD,
        stage_layers=(LAYERS,),
        tensor_ranks=1,
        num_slots=256,
        max_model_len=max_model_len,
        max_step_tokens=CHUNK,
        release=True,
        unsettled=unsettled,
    )
    return StreamPageManager(spec, **common(num_blocks, caching))


def dense_manager(num_blocks: int, caching: bool = False) -> FullAttentionManager:
    spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=HEADS, head_size=DIM, dtype=torch.bfloat16)
    return FullAttentionManager(spec, **common(num_blocks, caching))


def common(num_blocks: int, caching: bool = False) -> dict:
    pool = BlockPool(num_gpu_blocks=num_blocks, enable_caching=caching, hash_block_size=PAGE)
    return {
        "block_pool": pool,
        "enable_caching": caching,
        "kv_cache_group_id": 0,
        "scheduler_block_size": PAGE,
    }


class Prompt:
    """What the managers read of a vLLM request."""

    skip_reading_prefix_cache = False
    shared_prefix_boundary = 0

    def __init__(self, request_id: str, text: str, tokens: int) -> None:
        self.request_id, self.num_tokens = request_id, tokens
        self.block_hashes = [
            hashlib.sha256(f"{text}, page {page}".encode()).digest() for page in range(tokens // PAGE)
        ]


def ask(manager: SingleTypeKVCacheManager, request: str, tokens: int, prompt: Prompt | None = None) -> None:
    """What KVCacheManager.allocate_slots asks of a manager for one request; with ``prompt``, also to cache it."""
    manager.remove_skipped_blocks(request, tokens - 1)
    manager.get_num_blocks_to_allocate(request, tokens, (), tokens - 1, tokens - 1, tokens)
    manager.allocate_new_blocks(request, tokens, tokens)
    if prompt is not None:
        manager.cache_blocks(prompt, tokens, replay_boundaries=())  # type: ignore[arg-type]


def live_windows(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Live window of every stream in tokens, a sixth of the KV in all, and the phase in which its pages die."""
    window = np.minimum(rng.exponential(TOKENS / 6, (rows, LAYERS * HEADS)), TOKENS * 2)
    return window, rng.integers(0, PAGE, window.shape)


def reported(update: TableUpdate, rows: np.ndarray, lengths: np.ndarray, window: Any, phase: Any) -> PageReport:
    """The report of a step's due rows, whose requests have ``lengths`` tokens."""
    starts = np.maximum((lengths[:, None] - window[rows] - phase[rows]) // PAGE, 0).astype(np.int32)
    return PageReport(update.step, update.slots, update.epochs, 0, torch.from_numpy(starts), None)


def decode(steps: int, caching: bool = False) -> dict[str, list[float]]:
    """Times of each part, in ms per step."""
    blocks = REQUESTS * (TOKENS // PAGE + steps // PAGE + 2) + 1
    fox, dense = fox_manager(blocks, caching=caching), dense_manager(blocks, caching)
    names = [f"request-{i}" for i in range(REQUESTS)]
    prompts = [Prompt(name, name, TOKENS + steps) if caching else None for name in names]

    # Staggered lengths, so that requests cross page boundaries at different steps.
    lengths = TOKENS - np.arange(REQUESTS) % PAGE
    for name, length, prompt in zip(names, lengths.tolist(), prompts):
        dense.num_cached_block[name] = 0
        ask(fox, name, length, prompt)
        ask(dense, name, length, prompt)
    window, phase = live_windows(np.random.default_rng(0), REQUESTS)
    row_of = np.zeros(REQUESTS + 1, dtype=np.int64)
    row_of[[fox._slot_of[name] for name in names]] = np.arange(REQUESTS)
    update = fox.take_update(dict(zip(names, lengths.tolist())))
    stats, counting = StatsSource(fox), timed_work(fox)
    parts = ("allocate", "update", "report", "stats", "dense allocate")
    times: dict[str, list[float]] = {key: [] for key in (*parts, "counting")}
    for step in range(-1, steps):
        rows = row_of[np.concatenate([update.slots, update.boundary_slots])]
        report = reported(update, rows, lengths[rows] + step, window, phase)
        now = lengths + step + 1
        t0 = time.perf_counter()
        fox.free_dead(report)
        t1 = time.perf_counter()
        for name, length, prompt in zip(names, now.tolist(), prompts):
            ask(fox, name, length, prompt)
        t2 = time.perf_counter()
        update = fox.take_update(dict.fromkeys(names, 1))
        t3 = time.perf_counter()
        stats.take()
        t4 = time.perf_counter()
        for name, length, prompt in zip(names, now.tolist(), prompts):
            ask(dense, name, length, prompt)
        t5 = time.perf_counter()
        if step >= 0:  # the first report frees the prompts' dead pages at once
            for key, value in zip(times, (t2 - t1, t3 - t2, t1 - t0, t4 - t3, t5 - t4, sum(counting))):
                times[key].append(1e3 * value)
        counting.clear()
    return times


def timed_work(manager: StreamPageManager) -> list[float]:
    """Let the manager time how long it counts what queries read, a part of "update"; return the seconds."""
    count: Any = manager._count_work
    taken: list[float] = []

    def timed(*args: Any) -> None:
        begun = time.perf_counter()
        count(*args)
        taken.append(time.perf_counter() - begun)

    manager._count_work = timed  # type: ignore[method-assign, assignment]
    return taken


def prefill(steps: int) -> dict[str, list[float]]:
    """The same for steps that each read a chunk of a prompt; a finished prompt's request ends 32 prompts later."""
    blocks = 40 * (TOKENS // PAGE + 2)
    fox, dense = fox_manager(blocks), dense_manager(blocks)
    window, phase = live_windows(np.random.default_rng(0), 1)
    stats, counting = StatsSource(fox), timed_work(fox)
    times: dict[str, list[float]] = {key: [] for key in ("allocate", "update", "report", "free", "stats")}
    times |= {"dense allocate": [], "dense free": [], "counting": []}
    update, length = fox.take_update({}), 0
    for step in range(steps):
        prompt, part = divmod(step, TOKENS // CHUNK)
        name, ends = f"request-{prompt}", f"request-{prompt - 32}"
        if part == 0:
            dense.num_cached_block[name] = 0
        report = reported(update, np.zeros(len(update.slots), int), np.array([length]), window, phase)
        length = (part + 1) * CHUNK
        t0 = time.perf_counter()
        fox.free_dead(report)
        t1 = time.perf_counter()
        if part == 0 and prompt >= 32:
            fox.pop_blocks_for_free(ends)
        t2 = time.perf_counter()
        ask(fox, name, length)
        t3 = time.perf_counter()
        update = fox.take_update({name: CHUNK})
        t4 = time.perf_counter()
        ask(dense, name, length)
        t5 = time.perf_counter()
        if part == 0 and prompt >= 32:
            dense.block_pool.free_blocks(reversed(dense.pop_blocks_for_free(ends)))
        t6 = time.perf_counter()
        stats.take()
        t7 = time.perf_counter()
        for key, value in zip(
            times, (t3 - t2, t4 - t3, t1 - t0, t2 - t1, t7 - t6, t5 - t4, t6 - t5, sum(counting))
        ):
            times[key].append(1e3 * value)
        counting.clear()
    return times


def prefix_caching(steps: int) -> dict[str, list[float]]:
    """Times of each part with prefix caching, in ms: 16k tokens in chunks, which are asked for again a while later.

    The pool is so small that every chunk has pages given away.
    """
    blocks = 12 * (TOKENS // PAGE + 2)
    fox = fox_manager(blocks, caching=True)
    window, phase = live_windows(np.random.default_rng(0), 1)
    times: dict[str, list[float]] = {key: [] for key in ("miss", "hit", "update", "report", "free")}

    def run(text: str, name: str) -> None:
        request = Prompt(name, text, TOKENS + PAGE)
        hashes = request.block_hashes
        now = time.perf_counter()
        (row,), start = fox.find_longest_cache_hit(hashes, TOKENS)
        if start:
            fox.get_num_blocks_to_allocate(name, start + PAGE, row, start, start, start + PAGE)
            fox.add_local_computed_blocks(name, row, start, 0)
        times["hit" if start else "miss"].append(1e3 * (time.perf_counter() - now))
        for end in [TOKENS + PAGE] if start else range(CHUNK, TOKENS + 1, CHUNK):
            ask(fox, name, end, request)
            begun = time.perf_counter()
            update = fox.take_update({name: end - start})
            times["update"].append(1e3 * (time.perf_counter() - begun))
            lengths = PAGE * update.boundary_pages[:, None]
            first = np.maximum((lengths - window - phase) // PAGE, 0).astype(np.int32)
            report = PageReport(update.step, update.slots, update.epochs, 0, torch.from_numpy(first), None)
            begun = time.perf_counter()
            fox.free_dead(report)
            times["report"].append(1e3 * (time.perf_counter() - begun))
            start = end
        begun = time.perf_counter()
        fox.pop_blocks_for_free(name)
        times["free"].append(1e3 * (time.perf_counter() - begun))

    for step in range(steps):
        run(f"text {step}", f"first {step}")
        if step >= 4:
            run(f"text {step - 4}", f"again {step}")
    assert fox.pool.prefixes is not None and fox.pool.prefixes.evicted_total
    return times


def chat(rounds: int) -> dict[str, list[float]]:
    """Times of each part in ms per request: conversations with a system prompt in common, whose turns come at once.

    Steps read as many turns as fit into :data:`CHUNK` tokens. Nothing has to be given away.
    """
    conversations, turns, shared, asked, answered = 32, 8, 2048, 512, 128
    fox = fox_manager(conversations * (shared + turns * (asked + answered)) // PAGE, caching=True)
    window, phase = live_windows(np.random.default_rng(0), 1)
    times: dict[str, list[float]] = {key: [] for key in ("look up", "allocate", "update", "report", "free")}

    def learn(update: TableUpdate) -> float:
        lengths = np.concatenate([fox.pool.num_pages[update.slots], update.boundary_pages])[:, None] * PAGE
        first = np.maximum((lengths - window - phase) // PAGE, 0).astype(np.int32)
        report = PageReport(update.step, update.slots, update.epochs, 0, torch.from_numpy(first), None)
        begun = time.perf_counter()
        fox.free_dead(report)
        return time.perf_counter() - begun

    for number in range(rounds):
        fox.forget_prefixes()
        system = Prompt("", f"system {number}", shared).block_hashes
        texts = [f"conversation {number}.{index}" for index in range(conversations)]
        for turn in range(turns):
            length = shared + turn * (asked + answered) + asked
            prompts = [Prompt(f"{text}, turn {turn}", text, length + answered) for text in texts]
            for prompt in prompts:
                prompt.block_hashes[: len(system)] = system
            reading = CHUNK // (asked + PAGE)
            for group in (prompts[first : first + reading] for first in range(0, conversations, reading)):
                taken = dict.fromkeys(times, 0.0)
                scheduled = {}
                for prompt in group:
                    name, t0 = prompt.request_id, time.perf_counter()
                    (row,), start = fox.find_longest_cache_hit(prompt.block_hashes, length - 1)
                    t1 = time.perf_counter()
                    fox.get_num_blocks_to_allocate(name, length, row, start, start, length)
                    fox.add_local_computed_blocks(name, row, start, 0)
                    ask(fox, name, length, prompt)
                    taken["look up"] += t1 - t0
                    taken["allocate"] += time.perf_counter() - t1
                    scheduled[name] = length - start
                begun = time.perf_counter()
                update = fox.take_update(scheduled)
                taken["update"] = time.perf_counter() - begun
                taken["report"] = learn(update)
                for prompt in group:
                    ask(fox, prompt.request_id, length + answered, prompt)
                learn(fox.take_update(dict.fromkeys(scheduled, answered)))
                begun = time.perf_counter()
                for prompt in group:
                    fox.pop_blocks_for_free(prompt.request_id)
                taken["free"] = time.perf_counter() - begun
                if turn:
                    for part, seconds in taken.items():
                        times[part].append(1e3 * seconds / len(group))
    return times


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=positive_int, default=512)
    parser.add_argument("--out", default="results/scheduler_cost.json")
    args = parser.parse_args()
    print(f"ms per step, or per request; {LAYERS} layers of {HEADS} heads, pages of {PAGE} tokens")
    figures: dict[str, Any] = {}
    measured = {
        "decode": decode(args.steps),
        "decode, caching": decode(args.steps, caching=True),
        "prefill": prefill(args.steps),
        "prefix caching": prefix_caching(max(args.steps // 8, 16)),
        "chat, each turn": chat(max(args.steps // 128, 1)),
    }
    for phase, times in measured.items():
        if any(key.startswith("dense") for key in times):  # parts of steps
            ours = [values for key, values in times.items() if key != "counting" and not key.startswith("dense")]
            vllm = [values for key, values in times.items() if key.startswith("dense")]
            times["total"] = [sum(parts) for parts in zip(*ours)]
            times["added"] = [total - sum(parts) for total, *parts in zip(times["total"], *vllm)]
        print(f"{phase:16}{'median':>9}{'mean':>9}{'p99':>9}")
        figures[phase] = {}
        for name, values in times.items():
            row = statistics.median(values), statistics.mean(values), float(np.percentile(values, 99))
            figures[phase][name] = dict(zip(("median", "mean", "p99"), row))
            print(f"  {name:14}" + "".join(f"{value:9.3f}" for value in row))

    print("page table as a share of the KV memory (256 slots):")
    for length in (16_384, 32_768, 131_072):
        for gib in (8, 64, 120):
            blocks = (gib << 30) // (LAYERS * HEADS * FORM.page_bytes)
            spec = fox_manager(2, length).kv_cache_spec
            share = PageGeometry.of(spec, blocks).table_bytes(0) / (gib << 30)
            figures[f"table share, {length} tokens, {gib} GiB"] = share
            print(f"  {length:7} tokens a request, {gib:4} GiB: {100 * share:.2f} %")
    save(args.out, figures)


if __name__ == "__main__":
    main()
