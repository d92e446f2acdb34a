"""Attention over whole sequences whose tokens fade behind a window: for training and for transformers' models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import library

from ...leaf import LazyKernel, use_triton
from . import reference

if TYPE_CHECKING:
    from . import kernel as _kernel
else:
    _kernel = LazyKernel(__name__)


@library.custom_op("vllm_fox::fading_attention", mutates_args=())
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_kept: torch.Tensor,
    cu_seqlens: torch.Tensor,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`.reference.forward`."""
    if use_triton(q.device) and q.dtype != torch.float64:
        return _kernel.forward(q, k, v, log_kept, cu_seqlens, window, scale)
    return reference.forward(q, k, v, log_kept, cu_seqlens, window, scale)


@library.custom_op("vllm_fox::fading_attention_backward", mutates_args=())
def _backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_kept: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`.reference.backward`."""
    if use_triton(q.device) and q.dtype != torch.float64:
        return _kernel.backward(grad_out, q, k, v, log_kept, out, lse, cu_seqlens, window, scale)
    return reference.backward(grad_out, q, k, v, log_kept, out, lse, cu_seqlens, window, scale)


@_forward.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_kept: torch.Tensor,
    cu_seqlens: torch.Tensor,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=wide)


@_backward.register_fake
def _(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_kept: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    return grad_q, grad_k, grad_v, lse.new_empty(log_kept.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.window, ctx.scale = inputs
    *differentiable, cu_seqlens = tensors
    ctx.save_for_backward(*differentiable, *output, cu_seqlens)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_out: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: gradient checkpointing computes them when they are asked for
    *grads, grad_kept = _backward(grad_out.contiguous(), *saved, ctx.window, ctx.scale)
    return *grads, grad_kept.to(saved[3].dtype), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def fading_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_kept: torch.Tensor,
    *,
    window: int,
    cu_seqlens: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """Causal softmax attention whose tokens fade behind a window (DMS, arXiv 2506.05345), differentiable.

    Logits are ``scale * q_i . k_j``, and ``log_kept_j`` more where ``i - j > window``. A token with -inf there is
    evicted, one with 0 stays whole, and what lies between is for training. A token of which less than 2^-24 is left
    counts as evicted (:data:`.reference.GONE`), and what is evicted takes no time. Nothing of the size of all pairs
    of tokens is ever in memory. Results are the same, bit by bit, in every run: nothing is added up atomically.

    Args:
        q: [N, H, d] float16, bfloat16 or float32, sequences one after the other.
        k, v: [N, KV heads, d], as q; KV heads divides H.
        log_kept: [N, KV heads] float32, at most 0.
        window: W, from 1 on.
        cu_seqlens: [S + 1] int32 or int64 on q's device, from 0 to N.
        scale: of the logits; 1 / sqrt(d) unless given.

    Returns:
        [N, H, d] in q's dtype.

    Raises:
        ValueError: a tensor's shape does not fit; names it and what would.
    """
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or len(k) != len(q) or k.shape[2] != q.shape[2]:
        raise ValueError(
            f"fading_attention: q, k and v are {list(q.shape)}, {list(k.shape)} and {list(v.shape)}: they must be "
            "[N, H, d], [N, KV heads, d] and as k."
        )
    if q.shape[1] % k.shape[1] or log_kept.shape != k.shape[:2]:
        raise ValueError(
            f"fading_attention: log_kept is {list(log_kept.shape)}: it must be {list(k.shape[:2])}, and its KV "
            f"heads must divide {q.shape[1]}."
        )
    if window < 1:
        raise ValueError(f"fading_attention: window is {window}: it must be an integer from 1 on.")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    tensors = (x.contiguous() for x in (q, k, v, log_kept))
    out: torch.Tensor = _forward(*tensors, cu_seqlens, window, scale)[0]
    return out


__all__ = ["fading_attention"]
