"""Forgetting attention over whole sequences, forward and backward: for training and for transformers' models."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import library

from ...acp import DEFAULT_LOG_TOLERANCE, pruning_threshold
from ...leaf import LazyKernel, use_triton
from ..pages import GATE_FLOOR, HEAD_DIMS
from . import reference

if TYPE_CHECKING:
    from . import kernel as _kernel
else:
    _kernel = LazyKernel(__name__)


@library.custom_op("vllm_fox::whole_sequence_attention", mutates_args=())
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_forget: torch.Tensor,
    cu_seqlens: torch.Tensor,
    threshold: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`.reference.forward`."""
    if use_triton(q.device) and q.dtype != torch.float64:
        return _kernel.forward(q, k, v, log_forget, cu_seqlens, threshold, scale)
    return reference.forward(q, k, v, log_forget, cu_seqlens, threshold, scale)


@library.custom_op("vllm_fox::whole_sequence_attention_backward", mutates_args=())
def _backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    c: torch.Tensor,
    cu_seqlens: torch.Tensor,
    threshold: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`.reference.backward`."""
    if use_triton(q.device) and q.dtype != torch.float64:
        return _kernel.backward(grad_out, q, k, v, out, lse, c, cu_seqlens, threshold, scale)
    return reference.backward(grad_out, q, k, v, out, lse, c, cu_seqlens, threshold, scale)


@_forward.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_forget: torch.Tensor,
    cu_seqlens: torch.Tensor,
    threshold: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = (q.shape[1], q.shape[0])
    return q.new_empty(q.shape), q.new_empty(rows, dtype=wide), q.new_empty((3, *rows), dtype=torch.float32)


@_backward.register_fake
def _(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    c: torch.Tensor,
    cu_seqlens: torch.Tensor,
    threshold: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    return grad_q, grad_k, grad_v, c.new_empty((q.shape[0], q.shape[1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, log_forget, cu_seqlens, threshold, ctx.scale = inputs
    ctx.gate_dtype = log_forget.dtype
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, threshold)
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, grad_out: torch.Tensor, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    *grads, grad_gate = _backward(grad_out, *ctx.saved_tensors, ctx.scale)
    return *grads, grad_gate.to(ctx.gate_dtype), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def forgetting_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_forget: torch.Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    threshold: torch.Tensor | float | str | None = None,
    log_pruning_tolerance: float = DEFAULT_LOG_TOLERANCE,
) -> torch.Tensor:
    """Causal softmax attention that forgets (FoX, arXiv 2503.02130), differentiable in its four tensors.

    Logits are ``scale * q_i . k_j + D_ij``, where D_ij is the sum of the log forget gates of tokens j + 1 to i.
    With a threshold, pairs with D_ij below it are left out block by block, forward and backward (Adaptive
    Computation Pruning, arXiv 2504.06949). Results are the same, bit by bit, in every run: nothing is added up
    atomically.

    Args:
        q: [B, T, H, d] float16, bfloat16 or float32; d of 32, 64, 128 or 256 (:data:`..pages.HEAD_DIMS`).
        k, v: [B, T, KV heads, d], as q; KV heads divides H.
        log_forget: [B, T, H] log of the forget gates, at most 0; float32 whatever q is.
        scale: of the logits; 1 / sqrt(d) unless given.
        cu_seqlens: [S + 1] int32 or int64 on q's device, from 0 to T, for S sequences packed one after the other;
            then B is 1.
        threshold: None prunes nothing. A number, or a tensor [H], prunes D_ij below it. "auto" finds a threshold a
            head by ACP's rule, -2 U - log L + log_pruning_tolerance, with U the largest |q| times the largest |k|
            times scale and L the longest sequence.
        log_pruning_tolerance: log of what "auto" may leave out of a query's attention in total.

    Returns:
        [B, T, H, d] in q's dtype.

    Raises:
        ValueError: a tensor's shape, dtype or device does not fit; names it and what would.
    """
    _check(q, k, v, log_forget, cu_seqlens, threshold)
    batch, length, heads, dim = q.shape
    scale = dim**-0.5 if scale is None else float(scale)
    if cu_seqlens is None:
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * length
    q, k, v = (x.flatten(0, 1).contiguous() for x in (q, k, v))
    if isinstance(threshold, str):
        limit = _auto_threshold(q.detach(), k.detach(), cu_seqlens, scale, log_pruning_tolerance)
    elif isinstance(threshold, torch.Tensor):
        limit = threshold.detach().float().expand(heads).contiguous()
    else:
        limit = torch.full((heads,), -math.inf if threshold is None else threshold, device=q.device)
    gates = log_forget.flatten(0, 1).clamp(min=GATE_FLOOR)
    out: torch.Tensor = _forward(q, k, v, gates, cu_seqlens, limit, scale)[0]
    return out.view(batch, length, heads, dim)


def _auto_threshold(
    q: torch.Tensor, k: torch.Tensor, cu_seqlens: torch.Tensor, scale: float, log_tolerance: float
) -> torch.Tensor:
    """[H] float32: ACP's threshold, with U from the largest norms of q [N, H, d] and k [N, KV heads, d]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q_max, k_max = (torch.linalg.vector_norm(x, dim=-1, dtype=wide).amax(0).float() for x in (q, k))
    bound = q_max * k_max.repeat_interleave(q.shape[1] // k.shape[1]) * scale
    longest = cu_seqlens.diff().max().clamp(min=1).float()
    return pruning_threshold(bound, longest, log_tolerance)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_forget: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    threshold: torch.Tensor | float | str | None,
) -> None:
    """Raise a ValueError if an argument of :func:`forgetting_attention` does not fit."""

    def refuse(name: str, value: object, allowed: str) -> None:
        raise ValueError(f"forgetting_attention: {name} is {value}: {allowed}.")

    if q.dim() != 4 or q.shape[-1] not in HEAD_DIMS:
        *sizes, largest = HEAD_DIMS
        allowed = f"{', '.join(map(str, sizes))} or {largest}"
        refuse("q", list(q.shape), f"it must be [B, T, H, d] with d of {allowed}")
    batch, length, heads, dim = q.shape
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        refuse("q", q.dtype, "it must be float16, bfloat16 or float32")
    for name, x in (("k", k), ("v", v)):
        if x.dim() != 4 or x.shape[:2] != q.shape[:2] or x.shape[3] != dim or heads % x.shape[2]:
            refuse(
                name,
                list(x.shape),
                f"it must be [{batch}, {length}, KV heads, {dim}], KV heads a divisor of {heads}",
            )
        if x.dtype != q.dtype:
            refuse(name, x.dtype, f"it must be {q.dtype}, as q")
    if k.shape != v.shape:
        refuse("v", list(v.shape), f"it must be {list(k.shape)}, as k")
    if log_forget.shape != q.shape[:3]:
        refuse("log_forget", list(log_forget.shape), f"it must be {list(q.shape[:3])}")
    if not log_forget.is_floating_point():
        refuse("log_forget", log_forget.dtype, "it must be float32")
    tensors = {"k": k, "v": v, "log_forget": log_forget, "cu_seqlens": cu_seqlens, "threshold": threshold}
    for name, given in tensors.items():
        if isinstance(given, torch.Tensor) and given.device != q.device:
            refuse(name, f"on {given.device}", f"it must be on {q.device}, as q")
    if cu_seqlens is not None:
        if batch != 1:
            refuse("cu_seqlens", "given", f"q must have a batch of 1 then, and has {batch}")
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            refuse("cu_seqlens", f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}", "it must be int32 [sequences + 1]")
    if isinstance(threshold, str) and threshold != "auto":
        refuse("threshold", repr(threshold), 'it must be None, a number, a tensor [H] or "auto"')
    if isinstance(threshold, torch.Tensor) and threshold.shape not in ((), (heads,)):
        refuse("threshold", list(threshold.shape), f"it must be [{heads}]")


__all__ = ["forgetting_attention"]
