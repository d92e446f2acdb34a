"""The arithmetic of the metrics, and what a scheduler's manager gives them without an engine."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from benchmarks.scheduler_cost import PAGE, ask, fox_manager
from vllm_fox.pages import metrics
from vllm_fox.pages.messages import PageReport, TableUpdate
from vllm_fox.pages.metrics import PageMetrics, PageStats, StatsSource, layers_of_streams
from vllm_fox.pages.work import Prompts, WorkCount


def prompts(*rows: tuple[int, int, int]) -> Prompts:
    """Of (tokens before, tokens after, dead pages before), in slots 1, 2, ..."""
    before, after, dead = np.array(rows).T
    return Prompts(np.arange(1, len(rows) + 1), before, after, dead)


def test_reads_are_those_of_every_query() -> None:
    """A query at position p reads the pages 0 to p // page_size of each stream if nothing is dead."""
    rows = [(0, 1, 0), (0, 64, 0), (3, 70, 0), (16, 33, 4), (64, 200, 9)]
    count = WorkCount(page_size=16, streams=3)
    count.prefill(prompts(*rows))
    dense = sum(query // 16 + 1 for before, after, _ in rows for query in range(before, after))
    assert count.dense["prefill"] == 3 * dense
    assert count.pruned["prefill"] == sum((after - before) * dead for before, after, dead in rows)
    count.decode(pages=10, live=12)
    assert count.dense["decode"] == 30 and count.pruned["decode"] == 18


def test_what_dies_inside_a_prompt_is_learnt_at_its_boundaries() -> None:
    """From page to page: a boundary's dead pages are spared to the queries of the page behind it."""
    step = prompts((3, 70, 5), (16, 33, 4), (70, 79, 1))
    found = step.boundaries(16)
    assert list(zip(found.slots, found.pages, found.queries, found.dead)) == [
        *[(1, 1, 16, 5), (1, 2, 16, 5), (1, 3, 16, 5), (1, 4, 6, 5)],
        (2, 2, 1, 4),
    ]
    count = WorkCount(page_size=16, streams=3)
    count.prefill(step)
    before = count.pruned["prefill"]
    count.learn(found, np.array([5, 6, 7, 8, 5]))
    assert count.pruned["prefill"] - before == 16 * (1 + 2) + 6 * 3 + 1


def test_streams_of_all_ranks_belong_to_layers() -> None:
    """Two stages of 2 and 1 layers, two tensor-parallel ranks with 3 streams of a layer each."""
    spec = replace(fox_manager(2).kv_cache_spec, stage_layers=(2, 1), tensor_ranks=2, num_kv_heads=3)
    assert layers_of_streams(spec).tolist() == [0, 0, 0, 1, 1, 1] * 2 + [2] * 6
    assert len(layers_of_streams(spec)) == sum(spec.streams)


def report(update: TableUpdate, start: int) -> PageReport:
    """Of every stream's first live page."""
    rows = len(update.slots) + len(update.boundary_slots)
    return PageReport(update.step, update.slots, update.epochs, 0, torch.full((rows, 24 * 24), start), None)


@pytest.mark.parametrize("in_flight", [0, 1, 2])
def test_lag_is_what_was_scheduled_in_between(in_flight: int) -> None:
    """As with asynchronous scheduling, where steps are scheduled before the last ones' reports are back."""
    manager = fox_manager(1000)
    stats, updates, lags = StatsSource(manager), [], []
    for length in range(40, 40 + 64):
        ask(manager, "a", length)
        updates.append(manager.take_update({"a": length if length == 40 else 1}))
        if len(updates) > in_flight:
            manager.free_dead(report(updates.pop(0), 0))
        taken = stats.take()
        lags += taken.data["lags"] if taken is not None else []
    assert lags and set(lags) == {in_flight}


def test_a_report_that_waits_for_others_lags() -> None:
    """With many requests every fourth step reports: the oldest change that it tells is up to three steps old."""
    manager = fox_manager(1000)
    lengths = {f"request-{n}": 20 + n for n in range(32)}
    for step in range(48):
        for name in lengths:
            lengths[name] += 1
            ask(manager, name, lengths[name])
        manager.free_dead(report(manager.take_update(lengths if not step else dict.fromkeys(lengths, 1)), 0))
    assert max(manager.report_lags) == 3


def test_live_ranges_become_shares_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample comes once a second, and when the last request has ended."""
    now = 100.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    manager = fox_manager(1000)
    stats = StatsSource(manager)
    first = stats.take()
    assert first is not None and first.data["layers"]["dense"] == [0] * 24
    ask(manager, "a", 10 * PAGE)
    manager.free_dead(report(manager.take_update({"a": 10 * PAGE}), 4))
    second = stats.take()
    assert second is not None and "layers" not in second.data and second.data["released"] == 4 * 576
    assert second.data["prefill"] == 576 * PAGE * 55 and second.data["prefill_pruned"] == 0
    now += metrics.SAMPLE_S
    third = stats.take()
    assert third is not None and third.data["released"] == 0
    assert third.data["layers"] == {"live": [6 * 24] * 24, "dense": [10 * 24] * 24}
    assert third.data["bytes_saved"] == 4 * 576 * manager.kv_cache_spec.page_format.page_bytes
    assert stats.take() is None
    manager.pop_blocks_for_free("a")
    last = stats.take()
    assert last is not None and last.data["layers"]["dense"] == [0] * 24 and last.data["free"] == 999 * 576


def test_steps_add_up_to_what_the_log_and_prometheus_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters of two engines stay apart, and the log of an interval adds them up."""
    registry = CollectorRegistry()
    kinds: dict[Any, Any] = {}
    for kind in (Counter, Gauge, Histogram):

        def make(kind: type[MetricWrapperBase] = kind, **options: Any) -> Any:
            return kind(registry=registry, **options)

        kinds[kind] = make
    config: Any = SimpleNamespace(
        kv_transfer_config=None, model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: 2)
    )
    shown = PageMetrics(config, kinds, ["engine"], {0: ["0"], 1: ["1"]})
    zero = dict.fromkeys(
        ("allocated", "released", "evicted", "live", "cached", "free", *metrics.HOST, metrics.HOST_HITS), 0
    ) | {**dict.fromkeys(metrics.work_keys(), 0), "page_bytes": 64}
    one = {**zero, "allocated": 8, "live": 5, "decode": 10, "decode_pruned": 4, "lags": [0, 2]}
    layers = {"layers": {"live": [1, 2], "dense": [4, 4]}, "bytes_saved": 7}
    two = {**zero, "released": 3, "live": 2, "decode": 10, "decode_pruned": 6, "lags": [2], **layers}
    three = {**zero, "to_host": 3, "from_host": 2, "in_host": 5, metrics.HOST_HITS: 32, "lags": []}
    for data in (one, two, three, three):
        shown.observe(data, 1)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"vllm:fox_{name}", {"engine": "1", **labels})

    assert value("kv_pages_allocated_total") == 8 and value("kv_pages_live") == 0
    assert (value("kv_pages_to_host_total"), value("kv_pages_from_host_total")) == (6, 4)
    assert value("kv_pages_in_host") == 5 and value("prefix_cache_host_hits_total") == 64
    assert value("host_bytes_total", direction="to") == 6 * 64
    assert value("host_bytes_total", direction="from") == 4 * 64
    assert value("attention_pages_total", phase="decode") == 20
    assert value("attention_pages_pruned_total", phase="decode") == 10
    assert value("kv_layer_pages_live", layer="1") == 2 and value("kv_layer_pages_dense", layer="0") == 4
    assert value("kv_report_lag_steps_sum") == 4 and value("kv_report_lag_steps_count") == 3
    assert value("kv_report_lag_steps_bucket", le="0.5") == 1
    assert registry.get_sample_value("vllm:fox_kv_pages_allocated_total", {"engine": "0"}) == 0
    both = PageStats(data=one).aggregate(PageStats(data=two))
    assert both.data["lags"] == [0, 2, 2] and both.data["live"] == 2
    assert both.reduce() == {
        "KV pages allocated": 8,
        "KV pages released": 3,
        "KV pages evicted": 0,
        "KV pages live": 2,
        "KV pages cached": 0,
        "share of decode pruned": 0.5,
        "KV bytes saved": 7,
    }
    moved = PageStats(data=three).aggregate(PageStats(data=three))
    assert {
        **moved.reduce(),
        "KV pages to host": 6,
        "KV pages from host": 4,
        "KV pages in host": 5,
    } == moved.reduce()
    assert moved.data[metrics.HOST_HITS] == 64
