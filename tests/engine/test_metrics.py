"""What /metrics say of pages and pruning is what a direct count finds, in engines that run the shipped models."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import LLM
from vllm.v1.metrics.reader import Histogram

from benchmarks.engines import add, engine, manager, run_to_the_end, scheduler, source_tokens, step
from tests.support.engines import random_traffic
from vllm_fox.pages import metrics
from vllm_fox.pages.manager import StreamPageManager
from vllm_fox.pages.messages import PageReport

PAGE = 16


@pytest.fixture(scope="module", params=["fox_tiny", "dcp_tiny"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    model: Path = request.getfixturevalue(request.param)
    with engine(
        model,
        {"page_size": PAGE},
        max_model_len=1024,
        max_num_batched_tokens=256,
        num_gpu_blocks_override=200,
        async_scheduling=False,
    ) as started:
        yield started


@pytest.fixture(autouse=True)
def sampled_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "SAMPLE_S", 0.0)


def shown(llm: LLM) -> dict[str, Any]:
    """Values of our metrics, by name and by label where they have one."""
    found: dict[str, Any] = {}
    for metric in llm.get_metrics():
        if metric.name.startswith("vllm:fox_"):
            label = "".join(metric.labels.get(name, "") for name in ("layer", "phase"))
            name = metric.name.removeprefix("vllm:fox_")
            value = (metric.count, metric.sum) if isinstance(metric, Histogram) else metric.value
            found[f"{name} {label}".strip()] = value
    return found


class Counted:
    """Counts again what queries read, one by one, from the pool's arrays and the workers' reports."""

    def __init__(self, pages: StreamPageManager, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pages, self.reads = pages, {"prefill": [0, 0], "decode": [0, 0]}
        # Of the step under way: each prompt's slot, its first query, its end, and its first live pages before.
        self.prompts: list[tuple[int, int, int, np.ndarray]] = []
        take, learn = pages.take_update, pages.free_dead

        def take_update(scheduled: Any, drafts: Any) -> Any:
            update = take(scheduled, drafts)
            pool, self.prompts = pages.pool, []
            for request_id, new in scheduled.items():
                length, slot = pages._length[request_id], pages._slot_of[request_id]
                if new == 1:
                    self.count("decode", length - 1, pool.start[slot])
                else:
                    self.prompts.append((slot, length - new, length, pool.start[slot].copy()))
            return update

        def free_dead(report: PageReport) -> None:
            # Live ranges at page boundaries follow those of the step's end, if prefixes are cached.
            boundaries = pages._boundaries.get(report.step)
            at: dict[tuple[int, int], np.ndarray] = {}
            if boundaries is not None:
                starts = np.concatenate([report.starts[rank] for rank in range(pages.pool.ranks)], axis=1)
                for slot, page, start in zip(
                    boundaries.inside.slots.tolist(), boundaries.inside.pages.tolist(), starts[len(report.slots) :]
                ):
                    at[slot, page] = start
            for slot, first, end, start in self.prompts:
                for query in range(first, end):
                    start = at.get((slot, query // PAGE), start) if query % PAGE == 0 else start
                    self.count("prefill", query, start)
            learn(report)

        monkeypatch.setattr(pages, "take_update", take_update)
        monkeypatch.setattr(pages, "free_dead", free_dead)

    def count(self, phase: str, query: int, start: np.ndarray) -> None:
        dense = (query // PAGE + 1) * len(start)
        self.reads[phase][0] += dense
        self.reads[phase][1] += dense - int((query // PAGE + 1 - start).sum())


def test_counts_are_those_of_every_query(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """With chunks, prompts that begin alike, preemptions and aborts, and in every step the gauges of the pool."""
    before, counted = shown(llm), Counted(manager(llm), monkeypatch)
    pool, spec = manager(llm).pool, manager(llm).kv_cache_spec
    looked = 0

    def look(llm: LLM) -> list[Any]:
        nonlocal looked
        outs = step(llm)
        found = shown(llm)
        held = pool.num_pages[:, None] - pool.start
        width = pool.start.shape[1] // len(spec.stage_layers * spec.tensor_ranks) // spec.stage_layers[0]
        live = held.sum(0).reshape(spec.stage_layers[0], width).sum(1)
        dense = int(pool.num_pages.sum()) * width
        assert [found[f"kv_layer_pages_live {n}"] for n in range(len(live))] == live.tolist()
        assert [found[f"kv_layer_pages_dense {n}"] for n in range(len(live))] == [dense] * len(live)
        saved = (dense * len(live) - live.sum()) * spec.page_format.page_bytes
        assert found["kv_bytes_saved"] == saved
        assert found["kv_pages_live"] == pool.used_total
        free = found.get("kv_pages_free")  # not known before the first step
        assert free is None or found["kv_pages_live"] + found["kv_pages_cached"] + free == sum(pool.capacity)
        looked += bool(saved)
        return outs

    monkeypatch.setattr("tests.support.engines.step", look)
    order, tokens = random.Random(1), [source_tokens(llm, 700, seed=n % 3) for n in range(12)]
    requests = {f"q{n}": (text[: order.randint(1, 700)], order.randint(1, 60)) for n, text in enumerate(tokens)}
    _, aborted, preempted = random_traffic(llm, requests, order, room=60)
    run_to_the_end(llm)
    found = shown(llm)
    assert looked > 50 and preempted
    for phase, (dense, pruned) in counted.reads.items():
        assert found[f"attention_pages {phase}"] - before.get(f"attention_pages {phase}", 0) == dense > 0
        change = found[f"attention_pages_pruned {phase}"] - before.get(f"attention_pages_pruned {phase}", 0)
        assert change == pruned > 0
        print(f"{phase}: {pruned} of {dense} reads pruned; {preempted} preempted, {len(aborted)} aborted")


def test_the_last_request_leaves_no_gauge_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it ends before the next sample is due. An aborted one does not either."""
    monkeypatch.setattr(metrics, "SAMPLE_S", 1000.0)
    for aborted in (False, True):
        add(llm, "a", source_tokens(llm, 300), 20)
        step(llm), step(llm), step(llm)
        if aborted:
            llm.llm_engine.abort_request([scheduler(llm).running[0].request_id])
            step(llm)
        run_to_the_end(llm)
        found = shown(llm)
        assert found["kv_pages_live"] == found["kv_bytes_saved"] == found["kv_layer_pages_dense 0"] == 0


def test_a_report_comes_in_the_step_itself_on_a_cpu(llm: LLM) -> None:
    """Without asynchronous scheduling, and with few requests: no step is scheduled in between."""
    count, total = shown(llm)["kv_report_lag_steps"]
    add(llm, "a", source_tokens(llm, 300), 40)
    run_to_the_end(llm)
    after, lags = shown(llm)["kv_report_lag_steps"]
    assert after > count + 2 and lags == total
