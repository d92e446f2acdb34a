"""What attention layers over our pages share: the side that faces vLLM and the page table."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Generic, TypeVar

import torch
from torch import library, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_fox.kernels.paged import Batch, PageTable
from vllm_fox.pages.spec import PageFormat, make_spec
from vllm_fox.settings import FoxSettings

from .backend import StepMetadata

OPERATORS = library.Library("vllm_fox", "FRAGMENT")
"""PyTorch's home for the operators that stand for attention layers in compiled graphs."""

State = TypeVar("State")


class PagedAttention(nn.Module, AttentionLayerBase, Generic[State]):
    """One layer's attention over pages of a pool that all layers share.

    Args:
        vllm_config: the engine's configuration.
        prefix: the layer's name; unique.
        page_format: of its pages.
        streams: of the layer on this rank.
        head_size: as vLLM reports it.
        report_period: tokens of a decoding request after which its live ranges are looked at again.

    Attributes:
        index: of the layer on this worker.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        prefix: str,
        *,
        page_format: PageFormat,
        streams: int,
        head_size: int,
        report_period: int,
    ) -> None:
        super().__init__()
        self.layer_name = prefix
        self.page_format: Any = page_format
        self._streams, self._head_size, self._report_period = streams, head_size, report_period
        self.kv_cache = torch.tensor([])
        self._state: State | None = None
        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"Duplicate layer name: {prefix}")
        self.index = sum(isinstance(layer, PagedAttention) for layer in layers.values())
        layers[prefix] = self

    def step(self) -> tuple[Batch, State] | None:
        """The step under way; None while vLLM measures memory, before there is a page table."""
        metadata: Any = get_forward_context().attn_metadata
        if isinstance(metadata, dict):
            metadata = metadata[self.layer_name]
        if metadata is None or self._state is None:
            return None
        assert isinstance(metadata, StepMetadata)
        return metadata.batch, self._state

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """As vLLM asks for it."""
        dtype = vllm_config.model_config.dtype
        assert isinstance(dtype, torch.dtype)
        return make_spec(
            vllm_config,
            self.page_format,
            streams=self._streams,
            head_size=self._head_size,
            dtype=dtype,
            report_period=self._report_period,
            release=FoxSettings.from_vllm_config(vllm_config).release,
        )

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Take the cache; vLLM passes this layer's view of it."""
        self.kv_cache = kv_cache

    def pool(self) -> torch.Tensor:
        """The whole cache as bytes: all streams share one pool of pages."""
        cache = self.kv_cache
        return torch.empty(0, dtype=torch.uint8, device=cache.device).set_(cache.untyped_storage())

    @staticmethod
    @abstractmethod
    def make_state(layers: list[Any], table: PageTable, max_rows: int) -> State:
        """What a worker's layers share from step to step.

        Args:
            layers: all of the worker's, in order.
            table: its page table.
            max_rows: most requests of a step.
        """

    @classmethod
    def bind_page_table(cls, layers: list[Any], table: PageTable, max_rows: int) -> None:
        """Give a worker's layers, in any order, its page table (called by the connector)."""
        layers = sorted(layers, key=lambda layer: layer.index)
        state = cls.make_state(layers, table, max_rows)
        for layer in layers:
            layer._state = state
