"""Page counts on vLLM's /metrics and in its log."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from .pool import PagePool

COUNTERS = {
    "allocated": "KV pages (of a layer's KV head, or of a layer) ever allocated to requests.",
    "released": "KV pages given back by pruning while their request was running.",
    "evicted": "KV pages of cached prefixes that were given to other requests.",
}
GAUGES = {
    "live": "KV pages that requests hold now.",
    "cached": "KV pages that only the prefix cache holds now. vLLM counts them as free.",
}


class PageStats(KVConnectorStats):
    """Pages of all ranks: counters since the last stats, and gauges as they are now.

    A page is live if requests hold it, cached if only the prefix cache does, and free otherwise.
    """

    @classmethod
    def of(cls, pool: PagePool) -> PageStats:
        """Return the totals since start-up."""
        cache = pool.prefixes
        return cls(
            data={
                "allocated": pool.allocated_total,
                "released": pool.released_total,
                "evicted": cache.evicted_total if cache is not None else 0,
                "live": pool.used_total,
                "cached": sum(cache.idle) if cache is not None else 0,
            }
        )

    def since(self, earlier: PageStats) -> PageStats | None:
        """Return what changed since ``earlier``; None if nothing did."""
        if self.data == earlier.data:
            return None
        change = {key: self.data[key] - earlier.data.get(key, 0) for key in COUNTERS}
        return PageStats(data={**change, **{key: self.data[key] for key in GAUGES}})

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> PageStats:
        added = {key: self.data.get(key, 0) + other.data.get(key, 0) for key in COUNTERS}
        return PageStats(data={**added, **{key: other.data.get(key, self.data.get(key, 0)) for key in GAUGES}})

    def reduce(self) -> dict[str, int | float]:
        return {f"KV pages {key}": value for key, value in self.data.items()}

    def is_empty(self) -> bool:
        # Stats that are all zero are not empty: the change of ``live`` to zero must be shown.
        return not self.data


class PageMetrics(KVConnectorPromMetrics):
    """The metrics ``vllm:fox_kv_pages_NAME``: counters and gauges of :class:`PageStats`."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)

        def per_engine(metric: Any) -> dict[int, Any]:
            return {engine: metric.labels(*values) for engine, values in per_engine_labelvalues.items()}

        gauge: Any = self._gauge_cls
        self._counters = {
            name: per_engine(
                self._counter_cls(name=f"vllm:fox_kv_pages_{name}", documentation=text, labelnames=labelnames)
            )
            for name, text in COUNTERS.items()
        }
        self._gauges = {
            name: per_engine(
                gauge(
                    name=f"vllm:fox_kv_pages_{name}",
                    documentation=text,
                    labelnames=labelnames,
                    multiprocess_mode="mostrecent",
                )
            )
            for name, text in GAUGES.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, counters in self._counters.items():
            counters[engine_idx].inc(transfer_stats_data[name])
        for name, gauges in self._gauges.items():
            gauges[engine_idx].set(transfer_stats_data[name])
