r"""Bounds on attention logits that hold for every query and key a model can make.

Adaptive computation pruning (ACP, arXiv 2504.06949) may skip key j for query i once the log forget gates
between them sum to less than ``-2U - log L + log eps``, where ``U >= |q_i . k_j| / sqrt(d)`` for all i, j.
A server prunes, and frees memory, before it has seen all queries, so U must hold for later queries as well: it
has to follow from the weights alone. docs/acp.md states and proves the bounds; with n the hidden size, d the head
size, s(M) the largest singular value of M and D = diag(attn_norm.weight),

    with QK-norm                           U = max|w_q| max|w_k| sqrt(d)
    no QK-norm, but biases or RoPE         U = (s(W_q D) sqrt(n) + ||b_q||) (s(W_k D) sqrt(n) + ||b_k||) / sqrt(d)
    no QK-norm, no biases and no RoPE      U = n s(D W_q^T W_k D) / sqrt(d)

Where weights are quantised, W is what the kernels multiply with, and some kernels round their inputs as well: each
number x to one of (1 + r) x at most, and then by at most a. Of the input D u with ||u|| <= sqrt(n) this makes
D (I + E) u + e, where E is diagonal with |I + E| <= 1 + r, and ||e|| <= a sqrt(n). So in the second line
s(W D) sqrt(n) becomes ((1 + r) s(W D) + a s(W)) sqrt(n), which is then used without biases and RoPE as well.

These bounds hold in exact arithmetic. A rounding makes a number larger by a factor of at most 1 + eps / 2, where
eps is the dtype's machine epsilon. :func:`with_rounding` allows for two roundings of q and two of k themselves
(shift, norm, rotation). Bounds that go back to the projection's input also have the factor ``(1 + eps / 2)^6``: for
q and for k, two roundings in the input norm's output and one in the projection's. These are powers rather than
multiples of eps, because multiples leave out the products of errors, and a bound has to hold.
"""

from __future__ import annotations

import torch

from vllm_fox.kernels.acp import pruning_threshold


def qk_norm_bound(q_weight: torch.Tensor, k_weight: torch.Tensor) -> torch.Tensor:
    """Return U of every query head of a layer whose q and k are RMS-normed per head.

    Args:
        q_weight: [Hq, d] norm weights.
        k_weight: [Hkv, d] norm weights; Hkv divides Hq, and query head h reads KV head ``h // (Hq / Hkv)``.

    Returns:
        [Hq] float32 on the CPU.
    """
    q_max = q_weight.detach().double().abs().amax(-1).cpu()
    k_max = k_weight.detach().double().abs().amax(-1).cpu()
    bound = q_max * k_max.repeat_interleave(len(q_max) // len(k_max)) * q_weight.shape[-1] ** 0.5
    return _up(bound)


def projection_bound(
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    norm_weight: torch.Tensor,
    b_q: torch.Tensor | None = None,
    b_k: torch.Tensor | None = None,
    rotated: bool = False,
    rounding: tuple[float, float] | None = None,
) -> torch.Tensor:
    """Return U of every query head of a layer whose q and k are plain projections of its normed input.

    Args:
        w_q: [Hq, d, n] projection of each query head, in the dtype that the model computes in.
        w_k: [Hkv, d, n]; Hkv divides Hq.
        norm_weight: [n] weight of the RMS norm in front.
        b_q: [Hq, d] bias, or None.
        b_k: [Hkv, d] bias, or None.
        rotated: whether q and k are rotated (RoPE) afterwards.
        rounding: of quantised weights: the relative error r and the absolute error a of the inputs. The weights are
            then given with each number rounded up to three times.

    Returns:
        [Hq] float32 on the CPU.
    """
    heads, dim, hidden = w_q.shape
    groups = heads // w_k.shape[0]
    slack = _growth(w_q.dtype, 6)
    scale = norm_weight.detach().double().cpu()
    factor_q, factor_k = _factor(w_q, scale), _factor(w_k, scale)
    if rounding is not None:
        norm_q = _rounded_radius(factor_q, w_q, rounding, b_q)
        norm_k = _rounded_radius(factor_k, w_k, rounding, b_k).repeat_interleave(groups)
        return _up(slack * norm_q * norm_k / dim**0.5)
    if b_q is None and b_k is None and not rotated:
        joint = factor_q @ factor_k.repeat_interleave(groups, dim=0).transpose(-1, -2)
        return _up(slack * hidden * torch.linalg.matrix_norm(joint, ord=2) / dim**0.5)
    norm_q = _radius(factor_q, hidden, b_q)
    norm_k = _radius(factor_k, hidden, b_k).repeat_interleave(groups)
    return _up(slack * norm_q * norm_k / dim**0.5)


def with_rounding(bound: torch.Tensor, q_dtype: torch.dtype, k_dtype: torch.dtype) -> torch.Tensor:
    """Widen a bound [...] for exact q and k to q and k that are each rounded twice to these dtypes.

    The result is float64.
    """
    return _growth(q_dtype, 2) * _growth(k_dtype, 2) * bound.double()


def serving_threshold(bound: torch.Tensor, max_length: float, log_tolerance: float) -> torch.Tensor:
    """Return the threshold by which a server prunes: ACP's ``-2 U - log L + log eps``, never rounded up.

    Args:
        bound: [...] U that allows for rounding, as :func:`with_rounding` returns it.
        max_length: L, the longest context that the server admits, so that a page that is dead now is dead for all
            later queries.
        log_tolerance: log eps: what the pruned weights of a query may sum to.

    Returns:
        [...] float32. A threshold that is rounded up would prune pairs that the bound says nothing about.
    """
    return rounded_down(pruning_threshold(bound, max_length, log_tolerance))


def rounded_down(threshold: torch.Tensor) -> torch.Tensor:
    """Round a threshold to float32, never up."""
    found = threshold.float()
    below = torch.nextafter(found, torch.full_like(found, -torch.inf))
    return torch.where(found.double() > threshold.double(), below, found)


def _growth(dtype: torch.dtype, roundings: int) -> float:
    """Return the factor by which this many roundings, one after the other, can make a number larger."""
    growth: float = (1.0 + torch.finfo(dtype).eps / 2) ** roundings
    return growth


def _factor(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Replace [H, d, n] matrices ``W D`` by the smaller R [H, d, d] of the QR decompositions ``(W D)^T = Q R``.

    Q has orthonormal columns, so s(W D) = s(R) and s(D W_q^T W_k D) = s(Q_q R_q R_k^T Q_k^T) = s(R_q R_k^T).
    """
    return torch.linalg.qr((weight.detach().double().cpu() * scale).transpose(-1, -2), mode="r").R


def _radius(factor: torch.Tensor, hidden: int, bias: torch.Tensor | None) -> torch.Tensor:
    """Return the largest 2-norm [H] that each head's projection can have."""
    radius = torch.linalg.matrix_norm(factor, ord=2) * hidden**0.5
    return radius if bias is None else radius + bias.detach().double().cpu().norm(dim=-1)


def _rounded_radius(
    factor: torch.Tensor, weight: torch.Tensor, rounding: tuple[float, float], bias: torch.Tensor | None
) -> torch.Tensor:
    """Return the same where the inputs are rounded, and the weight [H, d, n] has been rounded up to three times."""
    relative, absolute = rounding
    # A number that is rounded up to three times is off by less than this, relative to what it has become.
    off = _growth(weight.dtype, 4) - 1.0

    def largest(matrix: torch.Tensor) -> torch.Tensor:
        return torch.linalg.matrix_norm(matrix, ord=2) + off * torch.linalg.matrix_norm(matrix)

    plain = _factor(weight, torch.ones(weight.shape[-1], dtype=torch.float64))
    radius = ((1 + relative) * largest(factor) + absolute * largest(plain)) * weight.shape[-1] ** 0.5
    return radius if bias is None else radius + bias.detach().double().cpu().norm(dim=-1)


def _up(bound: torch.Tensor) -> torch.Tensor:
    """Round a bound to float32, never down."""
    return torch.nextafter(bound.float(), torch.tensor(float("inf")))
