"""Compile every kernel that a step may need, before vLLM measures, captures and serves."""

from __future__ import annotations

import torch

from vllm_fox.kernels.dispatch import use_triton
from vllm_fox.kernels.paged import Batch

from .implementation import ForgettingAttentionImpl, StepInputs, WorkerState
from .subset import SubsetAttentionImpl, SubsetState


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


def warm_up(
    impl: ForgettingAttentionImpl, state: WorkerState, dtype: torch.dtype, shift: tuple[bool, bool]
) -> None:
    """Run the kernels on rows of padding (slot 0), which neither write pages nor move live ranges.

    Kernels are compiled for a model's constants, not for a batch's sizes, so one small batch of each kind is
    enough: one with a query a row, and one with several, once with its tiles sorted and once without.

    Args:
        dtype: of the model.
        shift: whether k and v are shifted.
    """
    pages, device = state.pages, state.table.entries.device
    if not use_triton(device):
        return
    from vllm_fox.kernels.prefill_attention import kernel as prefill
    from vllm_fox.kernels.prefill_attention.plan import PrefillPlan

    heads, groups = state.thresholds.shape[1:]
    dim = pages.k.shape[2]

    def inputs(tokens: int) -> StepInputs:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        k_shift, v_shift = (zeros(tokens, heads) if has else None for has in shift)
        kv = zeros(tokens, heads, dim)
        return StepInputs(zeros(tokens, heads, groups, dim), kv, kv, zeros(tokens, heads, groups), k_shift, v_shift)

    for tokens in (1, 2):
        batch = _padding(tokens, pages.page_size, device)
        step = inputs(tokens)
        out = torch.empty_like(step.q)
        impl.forward(step, batch, state, out)
        if batch.work is not None:
            limit, plan = state.thresholds[impl.layer], PrefillPlan(batch.work, heads, groups, sort=True)
            prefill.prefill_attention(
                pages, state.table, batch, impl.layer, limit, step.q, impl.scale, state.bounded, out, plan
            )
    state.end_step(batch)


def warm_up_subset(impl: SubsetAttentionImpl, state: SubsetState, dtype: torch.dtype) -> None:
    """The same for models that learn which tokens to drop.

    Args:
        dtype: of the model.
    """
    pages, device = state.pages, state.pages.k.device
    if not use_triton(device):
        return
    for tokens in (1, 2):
        qkv = torch.zeros(tokens, *pages.k.shape[2:], dtype=dtype, device=device)
        ints = torch.zeros(tokens, pages.int_k.shape[2], dtype=dtype, device=device)
        batch = _padding(tokens, pages.page_size, device)
        impl.forward(qkv, qkv, qkv, ints, ints, batch, state, torch.empty_like(qkv))
        state.end_step(batch)
