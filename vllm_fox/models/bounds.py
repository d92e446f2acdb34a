"""Upper bounds on the attention logits, from the weights alone (statement and proof: docs/acp.md)."""

from __future__ import annotations

import math

import torch


def norm_bound(q_norm: torch.Tensor, k_norm: torch.Tensor) -> torch.Tensor:
    """With QK-norm: ``U = max|w_q| max|w_k| sqrt(d)``.

    Args:
        q_norm: [h, d] RMS-norm weights of the query heads.
        k_norm: [H, d] of the KV heads; h is a multiple of H.

    Returns:
        [h] float64.
    """
    heads, dim = q_norm.shape
    largest = k_norm.double().abs().amax(-1).repeat_interleave(heads // k_norm.shape[0])
    return q_norm.double().abs().amax(-1) * largest * math.sqrt(dim)


def projection_bound(
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    norm_weight: torch.Tensor,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    rotated: bool = False,
) -> torch.Tensor:
    """Without QK-norm: from singular values, knowing that the projections' input is RMS-normed.

    Args:
        q_weight: [h, d, n] projection of each query head.
        k_weight: [H, d, n] of each KV head; h is a multiple of H.
        norm_weight: [n] of the norm before the projections.
        q_bias, k_bias: [h, d] and [H, d], or None.
        rotated: whether RoPE stands between q and k.

    Returns:
        [h] float64.
    """
    heads, dim, hidden = q_weight.shape
    group = heads // k_weight.shape[0]
    scale = norm_weight.double()
    # Triangular factors of (W D)^T: they have its singular values, and are d x d.
    r_q = torch.linalg.qr((q_weight.double() * scale).mT, mode="r").R
    r_k = torch.linalg.qr((k_weight.double() * scale).mT, mode="r").R.repeat_interleave(group, 0)
    if not rotated and q_bias is None:
        return hidden * torch.linalg.matrix_norm(r_q @ r_k.mT, 2) / math.sqrt(dim)
    q_length = torch.linalg.matrix_norm(r_q, 2) * math.sqrt(hidden)
    k_length = torch.linalg.matrix_norm(r_k, 2) * math.sqrt(hidden)
    if q_bias is not None and k_bias is not None:
        q_length = q_length + q_bias.double().norm(dim=-1)
        k_length = k_length + k_bias.double().norm(dim=-1).repeat_interleave(group)
    return q_length * k_length / math.sqrt(dim)
