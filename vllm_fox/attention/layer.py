"""The attention layer of all families: the side that faces vLLM, the page table, and the operator."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Generic

import torch
from torch import library, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_fox.kernels.leaf import use_triton
from vllm_fox.kernels.paged import Batch, PageTable
from vllm_fox.pages.spec import PageFormat, make_spec

from .backend import PagedAttentionBackend, StepMetadata
from .step import Formula, State


class PagedAttention(nn.Module, AttentionLayerBase, Generic[State]):
    """One layer's attention over pages of a pool that all layers share.

    A family's layer says what its pages look like, gives a formula, makes the state that a worker's layers share,
    and calls :meth:`run`.

    Args:
        vllm_config: the engine's configuration.
        prefix: the layer's name; unique.
        page_format: of its pages.
        streams: of the layer on this rank.
        head_size: as vLLM reports it.
        release: whether dead pages are given back while their request runs.
        report_period: tokens of a decoding request after which its live ranges are looked at again.

    Attributes:
        index: of the layer on this worker.
        impl: its formula, which the family sets; vLLM looks at it by this name.
    """

    impl: Formula[State]  # type: ignore[assignment]  # its forward takes pages, not one layer's cache

    def __init__(
        self,
        vllm_config: VllmConfig,
        prefix: str,
        *,
        page_format: PageFormat,
        streams: int,
        head_size: int,
        release: bool,
        report_period: int,
    ) -> None:
        super().__init__()
        self.layer_name = prefix
        self.page_format = page_format
        self._streams, self._head_size = streams, head_size
        self._release, self._report_period = release, report_period
        self.kv_cache = torch.tensor([])
        self._state: State | None = None
        self._is_last = False
        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"Duplicate layer name: {prefix}")
        self.index = sum(isinstance(layer, PagedAttention) for layer in layers.values())
        layers[prefix] = self

    # What a family says.

    @classmethod
    @abstractmethod
    def make_state(cls, layers: list[Any], table: PageTable, max_rows: int) -> State:
        """What a worker's layers share from step to step.

        Args:
            layers: all of the worker's, in order.
            table: its page table.
            max_rows: most requests of a step.
        """

    @abstractmethod
    def dry_inputs(self, tokens: int, device: torch.device) -> list[torch.Tensor]:
        """Tensors like those that :meth:`run` gets, of so many tokens, for compiling kernels ahead."""

    def warm_up_variants(self, inputs: list[torch.Tensor], batch: Batch, state: State, out: torch.Tensor) -> None:
        """Compile kernels that other batches may need and the dry batch at hand does not run."""

    # What the model calls.

    def run(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        """Attend (T tokens, which may include padding at the end).

        Args:
            inputs: [T, ...] each; the first is q [T, heads * d].

        Returns:
            [T, heads * d].
        """
        out = torch.empty(inputs[0].shape, dtype=inputs[0].dtype, device=inputs[0].device)
        torch.ops.vllm_fox.paged_attention(inputs, out, self.layer_name)
        return out

    def attend(self, inputs: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """The operator's body."""
        metadata: Any = get_forward_context().attn_metadata
        if isinstance(metadata, dict):
            metadata = metadata[self.layer_name]
        if metadata is None or self._state is None:
            out.zero_()  # vLLM measures memory, before there is a page table
            return
        assert isinstance(metadata, StepMetadata)
        batch, tokens = metadata.batch, metadata.batch.num_tokens
        if tokens < len(out):
            out[tokens:] = 0  # rows of padding
            inputs, out = [x[:tokens] for x in inputs], out[:tokens]
        if self.index == 0:
            self._state.begin_step(batch)
        self.impl.forward(inputs, batch, self._state, out)
        if self._is_last:
            self._state.end_step(batch)

    # What vLLM calls.

    def get_attn_backend(self) -> type[PagedAttentionBackend]:
        return PagedAttentionBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        dtype = vllm_config.model_config.dtype
        assert isinstance(dtype, torch.dtype)
        return make_spec(
            vllm_config,
            self.page_format,
            streams=self._streams,
            head_size=self._head_size,
            dtype=dtype,
            report_period=self._report_period,
            release=self._release,
        )

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Take the cache; vLLM passes this layer's view of it."""
        self.kv_cache = kv_cache

    # What our connector calls.

    @classmethod
    def bind_page_table(cls, layers: list[Any], table: PageTable, max_rows: int) -> None:
        """Give a worker's layers, in any order, its page table, and compile what a step may need."""
        layers = sorted(layers, key=lambda layer: layer.index)
        state = cls.make_state(layers, table, max_rows)
        for layer in layers:
            layer._state, layer._is_last = state, layer is layers[-1]
        if use_triton(table.entries.device):
            layers[0]._warm_up(state)

    def pool(self) -> torch.Tensor:
        """The whole cache as bytes: all streams share one pool of pages."""
        cache = self.kv_cache
        return torch.empty(0, dtype=torch.uint8, device=cache.device).set_(cache.untyped_storage())

    def _warm_up(self, state: State) -> None:
        """Run the kernels on rows of padding (slot 0), which neither write pages nor move live ranges.

        Kernels are compiled for a model's constants, not for a batch's sizes, so one small batch of each kind is
        enough: one with a query a row, and one with several.
        """
        for tokens in (1, 2):
            device = state.table.entries.device
            batch = _padding(tokens, self.page_format.page_size, device)
            inputs = self.dry_inputs(tokens, device)
            out = torch.empty_like(inputs[0])
            state.begin_step(batch)
            self.impl.forward(inputs, batch, state, out)
            self.warm_up_variants(inputs, batch, state, out)
            state.end_step(batch)


def _padding(tokens: int, page_size: int, device: torch.device) -> Batch:
    """A row of padding (slot 0)."""
    return Batch.of(
        query_start=torch.tensor([0, tokens], dtype=torch.int32, device=device),
        seq_lens=torch.tensor([tokens], dtype=torch.int32, device=device),
        slots=torch.zeros(1, dtype=torch.int32, device=device),
        query_lens_host=[tokens],
        seq_lens_host=[tokens],
        page_size=page_size,
    )


def paged_attention(inputs: list[torch.Tensor], out: torch.Tensor, layer_name: str) -> None:
    """The operator ``vllm_fox::paged_attention``; finds its layer by name."""
    get_forward_context().no_compile_layers[layer_name].attend(inputs, out)


def _fake(inputs: list[torch.Tensor], out: torch.Tensor, layer_name: str) -> None:
    return None


_LIBRARY = library.Library("vllm_fox", "FRAGMENT")  # PyTorch drops its operators with it
direct_register_custom_op(
    op_name="paged_attention", op_func=paged_attention, mutates_args=["out"], fake_impl=_fake, target_lib=_LIBRARY
)
