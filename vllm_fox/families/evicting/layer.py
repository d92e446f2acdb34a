"""The attention layer of decoders that evict tokens, as the model calls it."""

from __future__ import annotations

import torch
from vllm.config import VllmConfig

from vllm_fox.attention.layer import PagedAttention
from vllm_fox.kernels.float8 import FP8
from vllm_fox.kernels.paged import PageTable
from vllm_fox.kernels.subset.pages import SubsetPageFormat
from vllm_fox.pages.spec import unsettled_tokens
from vllm_fox.settings import PageSettings

from .attention import EvictingFormula, EvictingState


class EvictingAttention(PagedAttention[EvictingState]):
    """Attention of one layer over pages of single KV heads, each with the tokens that this head has not evicted.

    Args:
        vllm_config: the engine's configuration.
        prefix: the layer's unique name.
        num_heads, num_kv_heads: numbers of heads on this tensor-parallel rank.
        head_dim: d, the size of a head.
        window: W, of evicted tokens.
        shift: 1 if a token decides about the one before it, 0 if about itself.
    """

    impl: EvictingFormula
    page_format: SubsetPageFormat

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        prefix: str,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int,
        shift: int,
    ) -> None:
        dtype = vllm_config.model_config.dtype
        assert isinstance(dtype, torch.dtype)
        page_size = vllm_config.cache_config.block_size
        kv_dtype = FP8 if vllm_config.cache_config.cache_dtype.startswith("fp8") else dtype
        super().__init__(
            vllm_config,
            prefix,
            page_format=SubsetPageFormat(page_size, 1, head_dim, 0, dtype, kv_dtype),
            streams=num_kv_heads,
            head_size=head_dim,
            release=PageSettings.from_vllm_config(vllm_config).release,
            # Pages become free when compaction runs.
            report_period=page_size,
        )
        self.unsettled = unsettled_tokens(vllm_config)
        self.num_heads, self.max_model_len = num_heads, vllm_config.model_config.max_model_len
        self.impl = EvictingFormula(self.index, head_dim**-0.5, window, shift)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, evicts: torch.Tensor) -> torch.Tensor:
        """Compute attention for T tokens, with H KV heads and G query heads for each on this rank.

        Args:
            q: [T, H * G * d].
            k, v: [T, H * d].
            evicts: [T, H] bool, what the tokens decide.

        Returns:
            The output [T, H * G * d].
        """
        return self.run([q, k, v, evicts])

    @classmethod
    def make_state(cls, layers: list[EvictingAttention], table: PageTable, max_rows: int) -> EvictingState:
        one = layers[0]
        pages = one.page_format.view(one.pool())
        return EvictingState(
            table,
            pages,
            layers=len(layers),
            heads=one._streams,
            groups=one.num_heads // one._streams,
            max_rows=max_rows,
            max_model_len=one.max_model_len,
            unsettled=one.unsettled,
        )

    def dry_inputs(self, tokens: int, device: torch.device) -> list[torch.Tensor]:
        dim, dtype = self.page_format.head_dim, self.page_format.dtype
        widths = [self.num_heads * dim, self._streams * dim, self._streams * dim]
        inputs = [torch.zeros(tokens, width, dtype=dtype, device=device) for width in widths]
        return [*inputs, torch.zeros(tokens, self._streams, dtype=torch.bool, device=device)]
