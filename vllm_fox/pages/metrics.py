"""Page counts on vLLM's /metrics and in its log."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from .pool import PagePool


class PageStats(KVConnectorStats):
    """Pages of all ranks: ``allocated`` and ``released`` since the last stats, and those that are ``live`` now."""

    @classmethod
    def of(cls, pool: PagePool) -> PageStats:
        """Return the totals since start-up."""
        return cls(
            data={"allocated": pool.allocated_total, "released": pool.released_total, "live": pool.used_total}
        )

    def since(self, earlier: PageStats) -> PageStats | None:
        """Return what changed since ``earlier``; None if nothing did."""
        if self.data == earlier.data:
            return None
        change = {key: self.data[key] - earlier.data.get(key, 0) for key in ("allocated", "released")}
        return PageStats(data={**change, "live": self.data["live"]})

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> PageStats:
        added = {key: self.data.get(key, 0) + other.data.get(key, 0) for key in ("allocated", "released")}
        return PageStats(data={**added, "live": other.data.get("live", self.data.get("live", 0))})

    def reduce(self) -> dict[str, int | float]:
        return {f"KV pages {key}": value for key, value in self.data.items()}

    def is_empty(self) -> bool:
        # Stats that are all zero are not empty: the change of ``live`` to zero must be shown.
        return not self.data


class PageMetrics(KVConnectorPromMetrics):
    """The metrics ``vllm:fox_kv_pages_allocated`` and ``..._released`` (counters) and ``..._live`` (gauge)."""

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

        self._allocated = per_engine(
            self._counter_cls(
                name="vllm:fox_kv_pages_allocated",
                documentation="KV pages (of a layer's KV head, or of a layer) ever allocated to requests.",
                labelnames=labelnames,
            )
        )
        self._released = per_engine(
            self._counter_cls(
                name="vllm:fox_kv_pages_released",
                documentation="KV pages given back by pruning while their request was running.",
                labelnames=labelnames,
            )
        )
        gauge: Any = self._gauge_cls
        self._live = per_engine(
            gauge(
                name="vllm:fox_kv_pages_live",
                documentation="KV pages that requests hold now.",
                labelnames=labelnames,
                multiprocess_mode="mostrecent",
            )
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        self._allocated[engine_idx].inc(transfer_stats_data["allocated"])
        self._released[engine_idx].inc(transfer_stats_data["released"])
        self._live[engine_idx].set(transfer_stats_data["live"])
