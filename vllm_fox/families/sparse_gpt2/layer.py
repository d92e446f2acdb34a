"""The attention layer of models that learn which tokens to drop, as the model calls it."""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import VllmConfig

from vllm_fox.attention.layer import PagedAttention
from vllm_fox.kernels.paged import PageTable
from vllm_fox.kernels.subset.pages import SubsetPageFormat
from vllm_fox.settings import PageSettings

from .attention import SubsetFormula, SubsetState


class SubsetAttention(PagedAttention[SubsetState]):
    """Attention of one layer over the tokens that it has not dropped (DCP, arXiv 2305.15805).

    Args:
        vllm_config: the engine's configuration.
        prefix: the layer's unique name.
        num_heads: number of heads on this tensor-parallel rank.
        head_dim: d, the size of a head.
        int_dim: r, the size of interaction queries and keys.
        bias: [1] bias of their scores.
        propagate: whether what a layer drops is dropped in all layers above it.
    """

    impl: SubsetFormula
    page_format: SubsetPageFormat

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        prefix: str,
        num_heads: int,
        head_dim: int,
        int_dim: int,
        bias: nn.Parameter,
        propagate: bool,
    ) -> None:
        dtype = vllm_config.model_config.dtype
        assert isinstance(dtype, torch.dtype)
        page_size = vllm_config.cache_config.block_size
        super().__init__(
            vllm_config,
            prefix,
            page_format=SubsetPageFormat(page_size, num_heads, head_dim, int_dim, dtype, dtype),
            streams=1,
            head_size=num_heads * head_dim,
            release=PageSettings.from_vllm_config(vllm_config).release,
            # All heads share a layer's tokens, so there is little to compute, and every step does it.
            report_period=1,
        )
        self.max_model_len, self.propagate = vllm_config.model_config.max_model_len, propagate
        self.impl = SubsetFormula(self.index, head_dim**-0.5, bias)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, int_q: torch.Tensor, int_k: torch.Tensor
    ) -> torch.Tensor:
        """Compute attention for T tokens, with H heads on this rank.

        Args:
            q, k, v: [T, H * d].
            int_q, int_k: [T, r].

        Returns:
            The output [T, H * d].
        """
        return self.run([q, k, v, int_q, int_k])

    @classmethod
    def make_state(cls, layers: list[SubsetAttention], table: PageTable, max_rows: int) -> SubsetState:
        one = layers[0]
        pages = one.page_format.view(one.pool())
        return SubsetState(table, pages, len(layers), max_rows, one.max_model_len, one.propagate)

    def dry_inputs(self, tokens: int, device: torch.device) -> list[torch.Tensor]:
        form = self.page_format
        widths = [form.heads * form.head_dim] * 3 + [form.int_dim] * 2
        return [torch.zeros(tokens, width, dtype=form.dtype, device=device) for width in widths]
