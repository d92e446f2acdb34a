"""Measure how much of the past a model's heads keep on a text."""

from __future__ import annotations

from typing import Any

import torch

from vllm_fox.kernels.acp import DEFAULT_LOG_TOLERANCE

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
    if _blocks(model)[0].attn.arch.log_pruning_tolerance is None:
        raise ValueError("live_shares: the config's log_pruning_tolerance is null: give one, such as -10.")
    found = []
    for c, threshold in _sums(model, input_ids):
        first = torch.searchsorted(-c, -c + threshold[:, None])
        query = torch.arange(c.shape[1], device=c.device)
        found.append((query + 1 - first.minimum(query)).sum(1).cpu() / (query + 1).sum().cpu())
    return torch.stack(found).double()


@torch.no_grad()
def token_ends(model: Any, input_ids: torch.Tensor, page_size: int) -> torch.Tensor:
    """Return when a server gives each token back, as ``Family.token_ends`` asks.

    A server drops a page once ACP has proved it negligible for the last query of some later page, in all query
    heads that share the KV head. Where the config has no ``log_pruning_tolerance``, the server's default holds.
    """
    ends = []
    length = input_ids.shape[1]
    for block, (c, threshold) in zip(_blocks(model), _sums(model, input_ids, DEFAULT_LOG_TOLERANCE), strict=True):
        groups = block.attn.arch.num_heads // block.attn.arch.num_kv_heads
        boundary = c[:, page_size - 1 :: page_size].unflatten(0, (-1, groups))
        found = torch.full((len(boundary), length), length, dtype=torch.int32, device=c.device)
        for head, (sums, least) in enumerate(zip(boundary, threshold.unflatten(0, (-1, groups)), strict=True)):
            # Of page p for the last query of page b; it falls with b.
            decay = sums[:, :, None] - sums[:, None, :]
            live = (decay >= least[:, None, None]).any(0) | torch.ones_like(decay[0], dtype=torch.bool).triu()
            drops = (live.sum(0) + 1) * page_size
            whole = drops.repeat_interleave(page_size).clamp(max=length)
            found[head, : len(whole)] = whole.to(found.dtype)
        ends.append(found)
    return torch.stack(ends)


def _blocks(model: Any) -> list[ForgettingTransformerBlock]:
    return [module for module in model.modules() if isinstance(module, ForgettingTransformerBlock)]


def _sums(
    model: Any, input_ids: torch.Tensor, tolerance: float | None = None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Run a model once on a text, input_ids [1, T].

    Args:
        tolerance: stands in for a ``log_pruning_tolerance`` that the config does not have.

    Returns:
        Of each layer, the sum of log f up to each token, [H, T] float64, and ACP's threshold [H].
    """
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def measure(block: ForgettingTransformerBlock, normed: torch.Tensor) -> None:
        # While the block runs, its weights are whole even where they are sharded otherwise (FSDP).
        threshold = block.attn.threshold(block.attn_norm.weight, tolerance)
        found.append((block.attn.log_forget(normed).double().cumsum(0).T.contiguous(), threshold))

    hooks = [
        block.attn_norm.register_forward_hook(lambda _, inputs, out, block=block: measure(block, out))
        for block in _blocks(model)
    ]
    try:
        # Compiled code does not run hooks.
        with torch.compiler.set_stance("force_eager"):
            model(input_ids=input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found
