"""Measure how much of the past a model's heads keep on a text."""

from __future__ import annotations

from typing import Any

import torch

from .modeling import ForgettingTransformerBlock


@torch.no_grad()
def live_shares(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Return the share of a text's (query, key) pairs that ACP (arXiv 2504.06949) would keep, by layer and head.

    Args:
        model: a FoX model for transformers, wrapped for training or not; it is run once on the text.
        input_ids: [1, T].

    Returns:
        [layers, heads] float64 on the CPU, each 0 to 1.

    Raises:
        ValueError: the model's config has no ``log_pruning_tolerance``, so nothing would be pruned; or there is not
            just one text.
    """
    if input_ids.dim() != 2 or len(input_ids) != 1:
        raise ValueError(
            f"live_shares: input_ids is {list(input_ids.shape)}: it must be [1, T], one text at a time."
        )
    blocks = [module for module in model.modules() if isinstance(module, ForgettingTransformerBlock)]
    if blocks[0].attn.arch.log_pruning_tolerance is None:
        raise ValueError("live_shares: the config's log_pruning_tolerance is null: give one, such as -10.")
    found: list[torch.Tensor] = []

    def measure(block: ForgettingTransformerBlock, normed: torch.Tensor) -> None:
        # While the block runs, its weights are whole even where they are sharded otherwise (FSDP).
        threshold = block.attn.threshold(block.attn_norm.weight)
        c = block.attn.log_forget(normed).double().cumsum(0).T.contiguous()
        first = torch.searchsorted(-c, -c + threshold[:, None])
        query = torch.arange(c.shape[1], device=c.device)
        found.append((query + 1 - first.minimum(query)).sum(1).cpu() / (query + 1).sum().cpu())

    hooks = [
        block.attn_norm.register_forward_hook(lambda _, inputs, out, block=block: measure(block, out))
        for block in blocks
    ]
    try:
        # Compiled code does not run hooks.
        with torch.compiler.set_stance("force_eager"):
            model(input_ids=input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found).double()
