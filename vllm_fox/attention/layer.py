"""The attention layer of all families: the side that faces vLLM, the page table, and the operator."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic

import torch
from torch import library, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_fox.cpu import keep_freed_memory
from vllm_fox.kernels.leaf import use_native, use_triton
from vllm_fox.kernels.paged import Batch, PageTable
from vllm_fox.pages.spec import PageFormat, make_spec

from .backend import PagedAttentionBackend, StepMetadata
from .step import Formula, State


class PagedAttention(nn.Module, AttentionLayerBase, Generic[State]):
    """One layer's attention over pages of a pool that all layers share.

    A family's layer extends this class. It gives its page format and its formula, makes the state that a worker's
    layers share, and calls :meth:`run`.

    Args:
        vllm_config: the engine's configuration.
        prefix: the layer's unique name.
        page_format: layout of the layer's pages.
        streams: number of the layer's streams on this rank.
        head_size: head size that vLLM is told.
        release: whether dead pages are given back while their request runs.
        report_period: tokens after which the live ranges of a decoding request are computed again.

    Attributes:
        index: index of the layer on this worker.
        impl: formula of the layer, which the family sets; vLLM reads it by this name.
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

    # What a family defines.

    @classmethod
    @abstractmethod
    def make_state(cls, layers: list[Any], table: PageTable, max_rows: int) -> State:
        """Make the state that a worker's layers share from step to step.

        Args:
            layers: all layers of the worker, in order.
            table: the worker's page table.
            max_rows: most requests that a step can have.
        """

    @abstractmethod
    def dry_inputs(self, tokens: int, device: torch.device) -> list[torch.Tensor]:
        """Make tensors like those that :meth:`run` gets, of ``tokens`` tokens, to compile kernels in advance."""

    def source_weights(self) -> list[torch.Tensor]:
        """Return the weights that the layer derives something from, if any: thresholds, for example."""
        return []

    def follow_weights(self) -> None:
        """Compute again what the layer derives from weights. It is called whenever they have changed."""

    def warm_up_variants(self, inputs: list[torch.Tensor], batch: Batch, state: State, out: torch.Tensor) -> None:
        """Compile Triton kernels that the given batch of padding does not run, but other batches may need."""

    # What the model calls.

    def run(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        """Compute attention for T tokens, which may include padding at the end.

        Args:
            inputs: tensors [T, ...]; the first is q [T, heads * d].

        Returns:
            The output [T, heads * d].
        """
        out = torch.empty(inputs[0].shape, dtype=inputs[0].dtype, device=inputs[0].device)
        torch.ops.vllm_fox.paged_attention(inputs, out, self.layer_name)
        return out

    def attend(self, inputs: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Compute attention into ``out``. This is the body of the operator."""
        metadata: Any = get_forward_context().attn_metadata
        if isinstance(metadata, dict):
            metadata = metadata[self.layer_name]
        if metadata is None or self._state is None:
            out.zero_()  # vLLM is measuring memory: there is no page table yet
            return
        assert isinstance(metadata, StepMetadata)
        batch, tokens = metadata.batch, metadata.batch.num_tokens
        if tokens < len(out):
            out[tokens:] = 0  # these rows are padding
            inputs, out = [x[:tokens] for x in inputs], out[:tokens]
        if self.index == 0:
            self._state.begin_step(batch)
        self.impl.forward(inputs, batch, self._state, out)
        if self._is_last:
            if self._state.watch is not None:
                self._state.watch(batch)
            self._state.end_step(batch)

    # What vLLM calls.

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Follow the weights. vLLM calls this after all layers have been loaded or reloaded."""
        self.follow_weights()

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
        """Store the cache, of which vLLM passes this layer's view."""
        self.kv_cache = kv_cache

    # What the plugin's connector calls.

    @staticmethod
    def watch_weights(layers: list[Any]) -> Callable[[], None]:
        """Return a function that has the layers follow weights which were written in place since its last call.

        vLLM tells nobody about such writes ("kernel format"). A tensor's version counter does.
        """
        weights = [weight for layer in layers for weight in layer.source_weights()]
        seen = sum(weight._version for weight in weights)

        def follow() -> None:
            nonlocal seen
            now = sum(weight._version for weight in weights)
            if now != seen:
                seen = now
                for layer in layers:
                    layer.follow_weights()

        return follow

    @classmethod
    def bind_page_table(cls, layers: list[Any], table: PageTable, max_rows: int) -> None:
        """Give the page table to a worker's layers, in any order, and compile the kernels that a step may need."""
        layers = sorted(layers, key=lambda layer: layer.index)
        state = cls.make_state(layers, table, max_rows)
        for layer in layers:
            layer._state, layer._is_last = state, layer is layers[-1]
        if use_triton(table.entries.device) or use_native(table.entries.device):
            layers[0]._warm_up(state)
        if table.entries.device.type == "cpu":
            keep_freed_memory()

    @property
    def state(self) -> State:
        """The state that the worker's layers share, once the page table is there."""
        assert self._state is not None
        return self._state

    def first_live_at(self, slots: torch.Tensor, num_pages: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """See :meth:`~vllm_fox.attention.step.WorkerState.first_live_at`, for the streams of all layers."""
        return self.state.first_live_at(slots, num_pages, before)

    def pool(self) -> torch.Tensor:
        """Return the whole cache as bytes: all streams share one pool of pages."""
        cache = self.kv_cache
        return torch.empty(0, dtype=torch.uint8, device=cache.device).set_(cache.untyped_storage())

    def _warm_up(self, state: State) -> None:
        """Run the kernels on rows of padding (slot 0), which neither write pages nor move live ranges.

        Plain PyTorch, which serves the formats that C++ does not know, writes to the page of padding.

        Kernels, and functions in C++, are compiled for a model's constants, not for a batch's sizes. So
        one small batch of each kind is enough: one with a single query per row, and one with several.
        """
        for tokens in (1, 2):
            device = state.table.entries.device
            batch = _padding(tokens, self.page_format.page_size, device)
            inputs = self.dry_inputs(tokens, device)
            out = torch.empty_like(inputs[0])
            state.begin_step(batch)
            self.impl.forward(inputs, batch, state, out)
            if use_triton(device):
                self.warm_up_variants(inputs, batch, state, out)
            state.end_step(batch)


def _padding(tokens: int, page_size: int, device: torch.device) -> Batch:
    """Make a batch of one row of padding (slot 0)."""
    return Batch.of(
        query_start=torch.tensor([0, tokens], dtype=torch.int32, device=device),
        seq_lens=torch.tensor([tokens], dtype=torch.int32, device=device),
        slots=torch.zeros(1, dtype=torch.int32, device=device),
        query_lens_host=[tokens],
        seq_lens_host=[tokens],
        page_size=page_size,
    )


def paged_attention(inputs: list[torch.Tensor], out: torch.Tensor, layer_name: str) -> None:
    """Run the operator ``vllm_fox::paged_attention`` on the layer of the given name."""
    get_forward_context().no_compile_layers[layer_name].attend(inputs, out)


def _fake(inputs: list[torch.Tensor], out: torch.Tensor, layer_name: str) -> None:
    return None


_LIBRARY = library.Library("vllm_fox", "FRAGMENT")  # its operators exist as long as this object
direct_register_custom_op(
    op_name="paged_attention", op_func=paged_attention, mutates_args=["out"], fake_impl=_fake, target_lib=_LIBRARY
)
