"""The attention backend of all families, and the metadata of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_fox.kernels.paged import Batch

from .step import Formula


class PagedAttentionBackend(AttentionBackend):
    """The backend for attention over pages that can be freed while their request runs."""

    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "VLLM_FOX"

    @staticmethod
    def get_impl_cls() -> type[Any]:
        return Formula

    @staticmethod
    def get_builder_cls() -> type[StepMetadataBuilder]:
        return StepMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # With blocks outermost the whole cache is one flat array of pages.
        return (KVCacheLayout.BLHNC,)


@dataclass
class StepMetadata(AttentionMetadata):
    """Metadata of one step.

    Attributes:
        batch: the requests of the step, one per row.
    """

    batch: Batch


class StepMetadataBuilder(AttentionMetadataBuilder[StepMetadata]):
    """Turns vLLM's description of a batch into a :class:`Batch`. vLLM's block table holds only a row's slot."""

    # Decode reads nothing on the host, so a graph can hold it. Prefill's grids depend on the batch, so prefill runs
    # between graphs.
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> StepMetadata:
        common = common_attn_metadata
        query_lens = common.query_start_loc_cpu.diff().tolist()
        # Rows that vLLM added as padding have no query; they come last.
        rows = len(query_lens)
        while rows and query_lens[rows - 1] == 0:
            rows -= 1
        seq_lens_host: list[int] = []
        if common.max_query_len > 1:
            host = common.seq_lens_cpu_upper_bound
            seq_lens_host = (common.seq_lens.cpu() if host is None else host)[:rows].tolist()
        # Views, not copies: a CUDA graph reads vLLM's own buffers again at every replay.
        batch = Batch.of(
            query_start=common.query_start_loc[: rows + 1],
            seq_lens=common.seq_lens[:rows],
            slots=common.block_table_tensor[:rows, 0],
            query_lens_host=query_lens[:rows],
            seq_lens_host=seq_lens_host,
            page_size=self.kv_cache_spec.block_size,
        )
        return StepMetadata(batch)
