"""When the tokens of a text leave, KV head by KV head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_fox.families.evicting.config import Eviction

if TYPE_CHECKING:
    from .modeling import EvictingDecoderForCausalLM


def token_ends(model: EvictingDecoderForCausalLM, input_ids: torch.Tensor, page_size: int) -> torch.Tensor:
    """Return the first query that does not see each token, as ``Family.token_ends`` asks. Pages do not matter.

    An evicted token stays for the W queries that follow it.
    """
    evicted = model.evicted(input_ids)[:, 0]
    length = evicted.shape[-1]
    leaves = torch.arange(length, device=evicted.device) + Eviction.from_dict(model.config.eviction).window + 1
    return torch.where(evicted, leaves.clamp(max=length), length).int()
