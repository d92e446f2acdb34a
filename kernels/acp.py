"""Adaptive Computation Pruning (ACP, arXiv 2504.06949): when forgetting makes attention weights negligible."""

from __future__ import annotations

import math
from typing import overload

import torch

DEFAULT_LOG_TOLERANCE = -10.0
"""ACP's own choice of log eps in eq. 5 of arXiv 2504.06949: what is pruned of a query's attention weights sums to
at most eps."""


@overload
def pruning_threshold(bound: float, max_length: float, log_tolerance: float) -> float: ...


@overload
def pruning_threshold(
    bound: torch.Tensor, max_length: float | torch.Tensor, log_tolerance: float
) -> torch.Tensor: ...


def pruning_threshold(
    bound: float | torch.Tensor, max_length: float | torch.Tensor, log_tolerance: float
) -> float | torch.Tensor:
    """ACP's ``-2 U - log L + log eps`` (eq. 5 of arXiv 2504.06949): pairs with D_ij below it are negligible.

    Args:
        bound: U, a number or [...] of any floating dtype: at least ``|q_i . k_j| * scale`` for all i and j.
        max_length: L, the longest context: a number, or [] on the device of ``bound``, which is then not read on
            the host.
        log_tolerance: log eps: what the pruned weights of a query may sum to.

    Returns:
        The threshold, a number or [...] in the dtype of ``bound``.
    """
    log_length = max_length.log() if isinstance(max_length, torch.Tensor) else math.log(max_length)
    return -2.0 * bound - log_length + log_tolerance
