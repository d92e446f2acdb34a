"""Which query drops which token of a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .modeling import SparseGPT2LMHeadModel


def token_ends(model: SparseGPT2LMHeadModel, input_ids: torch.Tensor, page_size: int) -> torch.Tensor:
    """Return the first query that does not see each token, as ``Family.token_ends`` asks. A layer is one stream,
    and pages do not matter."""
    # A token is seen by the queries from its own on, without a gap.
    seen = model.visible(input_ids)[:, 0].sum(1)
    return (seen + torch.arange(seen.shape[1], device=seen.device))[:, None].int()
