"""The attention layer of models that learn which tokens to drop, and its operator."""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_fox.kernels.paged import PageTable
from vllm_fox.kernels.subset import SubsetPageFormat

from .backend import SubsetAttentionBackend
from .paged_layer import OPERATORS, PagedAttention
from .subset import SubsetAttentionImpl, SubsetState
from .warm_up import warm_up_subset


class SubsetAttention(PagedAttention[SubsetState]):
    """Attention of one layer over the tokens that it has not dropped (DCP, arXiv 2305.15805).

    Args:
        vllm_config: the engine's configuration.
        prefix: the layer's name; unique.
        num_heads: on this tensor-parallel rank.
        head_dim: d.
        int_dim: size of interaction queries and keys.
        bias: [1], of their scores.
        propagate: whether what a layer drops is dropped in all layers above it.
    """

    impl: SubsetAttentionImpl  # type: ignore[assignment]  # its forward takes pages, not a layer's cache

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
            page_format=SubsetPageFormat(page_size, num_heads, head_dim, int_dim, dtype),
            streams=1,
            head_size=num_heads * head_dim,
            # All heads share a layer's tokens: there is little to look at, so it is looked at in every step.
            report_period=1,
        )
        self.num_heads, self.head_dim = num_heads, head_dim
        self.max_model_len, self.propagate = vllm_config.model_config.max_model_len, propagate
        self.impl = SubsetAttentionImpl(self.index, head_dim**-0.5, bias)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, int_q: torch.Tensor, int_k: torch.Tensor
    ) -> torch.Tensor:
        """Attend (T tokens, H heads on this rank).

        Args:
            q, k, v: [T, H * d].
            int_q, int_k: [T, r].

        Returns:
            [T, H * d].
        """
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        torch.ops.vllm_fox.subset_attention(q, k, v, int_q, int_k, out, self.layer_name)
        return out

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        int_q: torch.Tensor,
        int_k: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """The operator's body."""
        found = self.step()
        if found is None:
            out.zero_()
            return
        batch, state = found
        tokens = batch.num_tokens
        out[tokens:] = 0  # rows of padding
        q, k, v, out = (x[:tokens].unflatten(1, (self.num_heads, self.head_dim)) for x in (q, k, v, out))
        self.impl.forward(q, k, v, int_q[:tokens], int_k[:tokens], batch, state, out)

    def get_attn_backend(self) -> type[SubsetAttentionBackend]:
        return SubsetAttentionBackend

    @staticmethod
    def make_state(layers: list[SubsetAttention], table: PageTable, max_rows: int) -> SubsetState:
        """What a worker's layers share; compiles what a step may need."""
        one = layers[0]
        pages = one.page_format.view(one.pool())
        state = SubsetState(table, pages, len(layers), max_rows, one.max_model_len, one.propagate)
        warm_up_subset(one.impl, state, one.page_format.dtype)
        return state


def subset_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    int_q: torch.Tensor,
    int_k: torch.Tensor,
    out: torch.Tensor,
    layer_name: str,
) -> None:
    """The operator ``vllm_fox::subset_attention``; finds its layer by name."""
    get_forward_context().no_compile_layers[layer_name].attend(q, k, v, int_q, int_k, out)


def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    int_q: torch.Tensor,
    int_k: torch.Tensor,
    out: torch.Tensor,
    layer_name: str,
) -> None:
    return None


direct_register_custom_op(
    op_name="subset_attention",
    op_func=subset_attention,
    mutates_args=["out"],
    fake_impl=_fake,
    target_lib=OPERATORS,
)
