"""The KV connector that carries page-table changes to the workers and reports of dead pages back.

Nothing is transferred to or from other machines: vLLM's connector interface is the public channel by which a plugin
can ship data with every step in both directions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput

from vllm_fox.settings import host_cache_gib, poisons_free_pages

from .geometry import PageGeometry, host_blocks
from .host_pages import HostPages
from .manager import StreamPageManager
from .messages import NO_FETCHES, PageReport, TableUpdate
from .metrics import PageMetrics, PageStats, StatsSource
from .poison import Poison
from .spec import StreamPageSpec
from .tables import DeviceTables, FirstLiveAt

if TYPE_CHECKING:
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.request import Request


class FoxPageConnector(KVConnectorBase_V1, SupportsHMA):
    """The plugin's KV connector. In the scheduler it calls the manager; in a worker it owns the page table."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._manager: StreamPageManager | None = None
        self._tables: DeviceTables | None = None
        self._follow_weights: Callable[[], None] = lambda: None
        self._first_live_at: FirstLiveAt
        self._stats: StatsSource | None = None
        self._poisons = poisons_free_pages(vllm_config)
        self._poison: Poison | None = None
        self._host: HostPages | None = None

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    # Worker.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        spec = self._kv_cache_config.kv_cache_groups[0].kv_cache_spec
        assert isinstance(spec, StreamPageSpec)
        layers = self._vllm_config.compilation_config.static_forward_context
        geometry = PageGeometry.of(spec, self._kv_cache_config.num_blocks)
        device = next(iter(kv_caches.values())).device
        rank = get_pp_group().rank_in_group * spec.tensor_ranks + get_tensor_model_parallel_rank()
        self._tables = DeviceTables(geometry, rank, device)
        attention = [layers[name] for name in kv_caches]
        scheduler, compilation = self._vllm_config.scheduler_config, self._vllm_config.compilation_config
        # A CUDA graph's batch is padded to the next captured size.
        padded = [size for size in compilation.cudagraph_capture_sizes or () if size >= scheduler.max_num_seqs]
        max_rows = min(padded, default=scheduler.max_num_seqs)
        attention[0].bind_page_table(attention, self._tables.table, max_rows)
        self._follow_weights = attention[0].watch_weights(attention)
        self._first_live_at = attention[0].first_live_at
        if self._poisons:
            self._poison = Poison(attention[0].pool(), spec.page_format.page_bytes, geometry.streams[rank])
        if blocks := host_blocks(spec, host_cache_gib(self._vllm_config)):
            pages = blocks * geometry.streams[rank]
            self._host = HostPages(attention[0].pool(), spec.page_format.page_bytes, pages)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert self._tables is not None and isinstance(connector_metadata, TableUpdate)
        self._follow_weights()
        rank = self._tables.rank
        # In this order: what goes to host memory is read before others write it, and what comes back may fill pages
        # that were freed just now.
        if self._host is not None and connector_metadata.saved is not None:
            self._host.save(connector_metadata.saved, rank)
        if self._poison is not None and connector_metadata.freed is not None:
            self._poison.fill(connector_metadata.freed[rank])
        if self._host is not None and connector_metadata.fetched is not None:
            self._host.fetch(connector_metadata.fetched, rank, connector_metadata.last_fetch)
        self._tables.write(connector_metadata)

    def build_connector_worker_meta(self) -> PageReport:
        update = self._get_connector_metadata()
        assert self._tables is not None and isinstance(update, TableUpdate)
        fetches = self._host.fetches() if self._host is not None else NO_FETCHES
        return self._tables.report(update, self._first_live_at, fetches)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Nothing is loaded."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    # Scheduler.

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        (manager,) = kv_cache_manager.coordinator.single_type_managers
        assert isinstance(manager, StreamPageManager)
        self._manager, self._stats = manager, StatsSource(manager)
        if self._poisons:
            manager.pool.watch_freed()
        if blocks := host_blocks(manager.kv_cache_spec, host_cache_gib(self._vllm_config)):
            manager.open_host_tier(blocks)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> TableUpdate:
        assert self._manager is not None
        update = self._manager.take_update(
            scheduler_output.num_scheduled_tokens, scheduler_output.scheduled_spec_decode_tokens
        )
        if self._poisons:
            update.freed = self._manager.pool.take_freed()
        return update

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        assert self._manager is not None
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, PageReport):
            self._manager.enter_fetched(report)
            self._manager.free_dead(report)

    def has_pending_block_frees(self) -> bool:
        """Return whether pages are about to come back: waiting for them is better than preempting a request."""
        return self._manager is not None and self._manager.expects_release

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Return no tokens, or None for "ask again in the next step".

        More of the prompt will be cached then: another request computes it, or it comes from host memory. So the
        request finds it in vLLM's own look-up, and nothing is loaded for a single request.
        """
        assert self._manager is not None
        return (None if self._manager.must_wait(request, num_computed_tokens) else 0), False

    def reset_cache(self) -> bool | None:
        """Forget all cached prefixes. vLLM calls this when its own prefix cache is reset."""
        assert self._manager is not None
        self._manager.forget_prefixes()
        return True

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Nothing needs to be done: the manager has recorded the allocation already."""

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, None

    # Metrics.

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        return self._stats.take() if self._stats is not None else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats:
        return PageStats(data=dict(data or {}))

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PageMetrics:
        return PageMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
