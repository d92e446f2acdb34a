"""The KV-cache spec through which vLLM sizes the pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from vllm.config import VllmConfig
from vllm.distributed.utils import get_pp_indices
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec


class PageFormat(Protocol):
    """Layout of a page. It is hashable, and equal in all layers."""

    @property
    def page_size(self) -> int:
        """Tokens per page."""

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of one stream."""


@dataclass(frozen=True, kw_only=True)
class StreamPageSpec(AttentionSpec):
    """The KV-cache spec of one layer, whose part of a block ("slab") is one page for each of its streams.

    A block, as vLLM counts it, has one page for every stream of a worker.
    :class:`~vllm_fox.pages.manager.StreamPageManager` decides which page belongs to which request; vLLM's pool only
    keeps the count. The spec is the same for all layers of all workers, as vLLM requires. AttentionSpec's
    ``num_kv_heads`` is the number of streams of a layer on one rank.

    Attributes:
        page_format: layout of every stream's pages.
        report_period: tokens after which the live ranges of a decoding request are computed again.
        stage_layers: number of attention layers of each pipeline stage.
        tensor_ranks: tensor-parallel ranks of a stage, each with ``num_kv_heads`` streams per layer.
        num_slots: requests that may run at once.
        max_model_len, max_step_tokens: most tokens of a request, and of one step.
        release: whether dead pages are given back while a request runs.
        unsettled: see :func:`unsettled_tokens`.
    """

    page_format: PageFormat
    report_period: int
    stage_layers: tuple[int, ...]
    tensor_ranks: int
    num_slots: int
    max_model_len: int
    max_step_tokens: int
    release: bool
    unsettled: int

    @property
    def streams(self) -> tuple[int, ...]:
        """Number of streams of every rank: the tensor-parallel ranks of the first stage, then those of the next."""
        return tuple(n * self.num_kv_heads for n in self.stage_layers for _ in range(self.tensor_ranks))

    @property
    def uses_slot_mapping(self) -> bool:
        return False

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Return the memory of the longest request if it forgets nothing: so much must fit to serve it at all."""
        return cdiv(vllm_config.model_config.max_model_len, self.block_size) * self.page_size_bytes


def make_spec(
    vllm_config: VllmConfig,
    page_format: PageFormat,
    *,
    streams: int,
    head_size: int,
    dtype: torch.dtype,
    report_period: int,
    release: bool,
) -> StreamPageSpec:
    """Make the spec of one layer with ``streams`` streams on this rank."""
    page_size, parallel = vllm_config.cache_config.block_size, vllm_config.parallel_config
    layers, stages = vllm_config.model_config.get_total_num_hidden_layers(), parallel.pipeline_parallel_size
    bounds = [get_pp_indices(layers, stage, stages) for stage in range(stages)]
    return StreamPageSpec(
        block_size=page_size,
        num_kv_heads=streams,
        head_size=head_size,
        dtype=dtype,
        dcp_sharded=False,
        # A page is one opaque state for vLLM, so that it can hold gates and raw values besides K and V.
        tokens_per_state=page_size,
        state_content_bytes=page_format.page_bytes,
        page_format=page_format,
        report_period=report_period,
        stage_layers=tuple(end - start for start, end in bounds),
        tensor_ranks=parallel.tensor_parallel_size,
        num_slots=vllm_config.scheduler_config.max_num_seqs,
        max_model_len=vllm_config.model_config.max_model_len,
        max_step_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        release=release,
        unsettled=unsettled_tokens(vllm_config),
    )


def unsettled_tokens(vllm_config: VllmConfig) -> int:
    """Return how many of a request's newest tokens may be of no effect yet: 0 without speculative decoding.

    A step's drafts may all be rejected. What the scheduler knows of a request is late by the steps in flight. It
    tells the workers which page boundaries a request has passed for certain, and they then compute the live ranges
    there, so these must not have moved on.
    """
    drafts = vllm_config.num_speculative_tokens
    in_flight = vllm_config.max_concurrent_batches - 1
    return drafts + in_flight * (1 + drafts) if drafts else 0
