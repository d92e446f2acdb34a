"""What the scheduler knows of pages and of pruning, on vLLM's /metrics and in its log."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from .work import PHASES

if TYPE_CHECKING:
    from .manager import StreamPageManager
    from .spec import StreamPageSpec

SAMPLE_S = 1.0
"""Seconds after which the pages of layers are added up again: Prometheus asks less often."""

COUNTERS = {
    "allocated": "KV pages (of a layer's KV head, or of a layer) ever allocated to requests.",
    "released": "KV pages given back by pruning while their request was running.",
    "evicted": "KV pages of cached prefixes that were given to other requests.",
    "to_host": "KV pages of cached prefixes that were copied to host memory.",
    "from_host": "KV pages of cached prefixes that came back from host memory.",
}
HOST_BYTES = {"to_host": "to", "from_host": "from"}
"""Counters of pages whose bytes another counter counts too, and that counter's label ``direction``."""
GAUGES = {
    "live": "KV pages that requests hold now.",
    "cached": "KV pages that only the prefix cache holds now. vLLM counts them as free.",
    "in_host": "KV pages of cached prefixes that host memory has now.",
}
HOST = ("to_host", "from_host", "in_host")
"""Counters and gauges that the log names only where there is something in host memory."""
HOST_HITS = "host_hits"
"""Name of the counter of prompt tokens that were found in host memory and not on the device."""
FREE = "free"
"""Name of the gauge of pages that nobody holds, which appears with the first step."""
LAYER_GAUGES = {
    "live": "KV pages of a layer that running requests' live ranges have now. A page that several requests share "
    "counts for each.",
    "dense": "KV pages of a layer that the same requests would have now if nothing were pruned.",
}
WORK = {
    "": "KV pages that dense attention would read, added up over queries and streams.",
    "_pruned": "KV pages among them that pruning has spared queries, at least.",
}
LAGS = (0.5, 1, 2, 3, 4, 6, 8, 16)
"""Upper limits of the histogram's buckets in steps. Ray takes none that is 0."""


class PageStats(KVConnectorStats):
    """Counters since the last stats, and gauges as they are now, of the pages of all ranks.

    A page is live if requests hold it, cached if only the prefix cache does, and free otherwise. The keys are those
    of :data:`COUNTERS` and :data:`GAUGES`, :data:`HOST_HITS`, :data:`FREE`, :func:`work_keys`, ``page_bytes``,
    ``lags`` (steps, a number for each report), and now and then ``layers`` (lists of pages by layer under the keys
    of :data:`LAYER_GAUGES`) and ``bytes_saved``.
    """

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> PageStats:
        keys = (*COUNTERS, HOST_HITS, *work_keys())
        added = {key: self.data.get(key, 0) + other.data.get(key, 0) for key in keys}
        lags = [*self.data.get("lags", ()), *other.data.get("lags", ())]
        return PageStats(data={**self.data, **other.data, **added, "lags": lags})

    def reduce(self) -> dict[str, int | float]:
        shown: dict[str, int | float] = {
            f"KV pages {key.replace('_', ' ')}": self.data[key]
            for key in (*COUNTERS, *GAUGES)
            if key not in HOST or self.data["in_host"]
        }
        for phase in PHASES:
            dense, pruned = self.data[phase], self.data[f"{phase}_pruned"]
            if dense:
                shown[f"share of {phase} pruned"] = round(pruned / dense, 4)
        if "bytes_saved" in self.data:
            shown["KV bytes saved"] = self.data["bytes_saved"]
        return shown

    def is_empty(self) -> bool:
        # Stats that are all zero are not empty: the change of ``live`` to zero must be shown.
        return not self.data


def work_keys() -> tuple[str, ...]:
    """Return the keys of what attention would read, and of what it is spared, by phase."""
    return tuple(f"{phase}{kind}" for phase in PHASES for kind in WORK)


class StatsSource:
    """Makes the stats of a scheduler's manager, step by step."""

    def __init__(self, manager: StreamPageManager) -> None:
        self._manager = manager
        self._layer_of = layers_of_streams(manager.kv_cache_spec)
        self._streams_of = np.bincount(self._layer_of)
        self._last: dict[str, int] = {}
        self._sample_at, self._sampled_any = 0.0, False

    def take(self) -> PageStats | None:
        """Return what has changed since the last call; None if nothing has."""
        manager = self._manager
        pool, work, cache, host = manager.pool, manager.work, manager.pool.prefixes, manager.host
        live, cached = pool.used_total, sum(cache.idle) if cache is not None else 0
        now = {
            "allocated": pool.allocated_total,
            "released": pool.released_total,
            "evicted": cache.evicted_total if cache is not None else 0,
            "to_host": host.saved_total if host is not None else 0,
            "from_host": host.fetched_total if host is not None else 0,
            HOST_HITS: host.hit_pages_total * manager.block_size if host is not None else 0,
        }
        for phase in PHASES:
            now[phase], now[f"{phase}_pruned"] = work.dense[phase], work.pruned[phase]
        data: dict[str, Any] = {key: value - self._last.get(key, 0) for key, value in now.items()}
        held = host.used_total if host is not None else 0
        gauges = {"live": live, "cached": cached, "in_host": held, FREE: sum(pool.capacity) - live - cached}
        changed = self._last != {**now, **gauges}
        self._last = {**now, **gauges}
        data |= gauges
        data["page_bytes"] = manager.kv_cache_spec.page_format.page_bytes
        data["lags"], manager.report_lags = manager.report_lags, []
        # No step comes after the last request has ended, so its end is not left to the next sample.
        if time.monotonic() >= self._sample_at or (self._sampled_any and not live):
            data |= self._sample()
            changed = True
        return PageStats(data=data) if changed or data["lags"] else None

    def _sample(self) -> dict[str, Any]:
        """Add up the pages of each layer."""
        pool, spec = self._manager.pool, self._manager.kv_cache_spec
        live = np.bincount(self._layer_of, weights=pool.live_by_stream()).astype(np.int64)
        dense = self._streams_of * int(pool.num_pages.sum())
        self._sample_at, self._sampled_any = time.monotonic() + SAMPLE_S, bool(dense.any())
        saved = int((dense - live).sum()) * spec.page_format.page_bytes
        return {"layers": {"live": live.tolist(), "dense": dense.tolist()}, "bytes_saved": saved}


def layers_of_streams(spec: StreamPageSpec) -> np.ndarray:
    """Return the layer [streams of all ranks] of each stream."""
    layers, first = [], 0
    for count in spec.stage_layers:
        layers += [np.repeat(np.arange(first, first + count), spec.num_kv_heads)] * spec.tensor_ranks
        first += count
    return np.concatenate(layers)


class PageMetrics(KVConnectorPromMetrics):
    """The metrics ``vllm:fox_*`` of :class:`PageStats`, which README.md lists."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)

        def counter(name: str, text: str, *labels: str) -> Any:
            return self._counter_cls(name=name, documentation=text, labelnames=[*labelnames, *labels])

        def gauge(name: str, text: str, *labels: str) -> Any:
            kind: Any = self._gauge_cls
            return kind(
                name=name, documentation=text, labelnames=[*labelnames, *labels], multiprocess_mode="mostrecent"
            )

        def per_engine(metric: Any, *values: str) -> dict[int, Any]:
            return {engine: metric.labels(*own, *values) for engine, own in per_engine_labelvalues.items()}

        prefix = "vllm:fox_kv"
        self._counters = {
            name: per_engine(counter(f"{prefix}_pages_{name}", text)) for name, text in COUNTERS.items()
        }
        self._counters[HOST_HITS] = per_engine(
            counter("vllm:fox_prefix_cache_host_hits", "Tokens of prompts that were found in host memory.")
        )
        moved = counter("vllm:fox_host_bytes", "Bytes of KV pages copied to and from host memory.", "direction")
        self._bytes = {name: per_engine(moved, direction) for name, direction in HOST_BYTES.items()}
        for kind, text in WORK.items():
            metric = counter(f"vllm:fox_attention_pages{kind}", text, "phase")
            self._counters |= {f"{phase}{kind}": per_engine(metric, phase) for phase in PHASES}
        self._gauges = {name: per_engine(gauge(f"{prefix}_pages_{name}", text)) for name, text in GAUGES.items()}
        self._free = gauge(f"{prefix}_pages_{FREE}", "KV pages that nobody holds now.")
        self._saved = per_engine(
            gauge(
                f"{prefix}_bytes_saved",
                "Bytes of KV that running requests would hold besides if nothing were pruned, each by itself.",
            )
        )
        layers = range(vllm_config.model_config.get_total_num_hidden_layers())
        self._layers = {}
        for name, text in LAYER_GAUGES.items():
            metric = gauge(f"{prefix}_layer_pages_{name}", text, "layer")
            self._layers[name] = [per_engine(metric, str(layer)) for layer in layers]
        histogram: Any = self._histogram_cls
        self._lags = per_engine(
            histogram(
                name=f"{prefix}_report_lag_steps",
                documentation="Steps scheduled after a live range had moved until the scheduler knew of it.",
                buckets=list(LAGS),
                labelnames=labelnames,
            )
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, counters in self._counters.items():
            if change := transfer_stats_data[name]:
                counters[engine_idx].inc(change)
        for name, moved in self._bytes.items():
            if change := transfer_stats_data[name]:
                moved[engine_idx].inc(change * transfer_stats_data["page_bytes"])
        for name, gauges in self._gauges.items():
            gauges[engine_idx].set(transfer_stats_data[name])
        self._free.labels(*self.per_engine_labelvalues[engine_idx]).set(transfer_stats_data[FREE])
        for lag in transfer_stats_data["lags"]:
            self._lags[engine_idx].observe(lag)
        if "layers" in transfer_stats_data:
            self._saved[engine_idx].set(transfer_stats_data["bytes_saved"])
            for name, pages in transfer_stats_data["layers"].items():
                for layer, count in zip(self._layers[name], pages):
                    layer[engine_idx].set(count)
