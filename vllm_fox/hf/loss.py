"""The cross-entropy of a language model, from its last hidden states, without logits of all tokens in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import library, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from .autocast import for_projections
from .line import NO_LABEL

MIN_ROWS = 1024
"""Logits of so many tokens at least are computed at once."""


@library.custom_op("vllm_fox::linear_cross_entropy", mutates_args=())
def _with_gradients(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, of_hidden: bool, of_weight: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum up the cross-entropies of ``hidden @ weight.T`` with labels, and compute its gradients along the way.

    The logits of a block of tokens are computed, used and thrown away, so that they take no more memory than the
    hidden states do. They are rounded to the dtype of the hidden states, as those of a projection, and all that
    follows is in float32 or wider.

    Args:
        hidden: [N, hidden].
        weight: [vocab, hidden], in the same dtype.
        labels: [N]; where it is -100 nothing is added.
        of_hidden, of_weight: which gradients to compute.

    Returns:
        The sum, in float32 or wider, and the gradients; empty ones that were not asked for.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=hidden.device)
    grad_hidden, grad_weight = _room(hidden, of_hidden), _room(weight, of_weight).to(wide).zero_()
    rows = max(MIN_ROWS, -(-hidden.numel() // len(weight)))
    for at in range(0, len(hidden), rows):
        x, label = hidden[at : at + rows], labels[at : at + rows, None]
        logits = (x @ weight.T).to(wide)
        counts, index = label != NO_LABEL, label.clamp(min=0)
        logits -= logits.logsumexp(-1, keepdim=True)
        own = logits.gather(1, index)
        total -= own.masked_fill(~counts, 0).sum()
        if of_hidden or of_weight:
            logits.exp_().scatter_(1, index, own.exp() - 1).masked_fill_(~counts, 0)
            grad = logits.to(x.dtype)
            if of_hidden:
                torch.mm(grad, weight, out=grad_hidden[at : at + rows])
            if of_weight:
                grad_weight += grad.T @ x
    return total, grad_hidden, grad_weight.to(weight.dtype)


def _room(x: torch.Tensor, wanted: bool) -> torch.Tensor:
    return x.new_empty(x.shape if wanted else (0,))


@_with_gradients.register_fake
def _(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, of_hidden: bool, of_weight: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    return total, _room(hidden, of_hidden), _room(weight, of_weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.wanted = inputs[3:]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    found = (x * grad.to(x.dtype) if wanted else None for x, wanted in zip(ctx.saved_tensors, ctx.wanted))
    return *found, None, None, None


_with_gradients.register_autograd(_differentiate, setup_context=_save)


def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the sum of the cross-entropies of logits ``hidden @ weight.T``, in float32 or wider.

    It is differentiable once in its first two tensors, and computes their gradients with the sum itself.

    Args:
        hidden: [..., hidden].
        weight: [vocab, hidden].
        labels: [...], as ``hidden`` without its last dimension; -100 stands for no label.
    """
    hidden, weight = for_projections(hidden), for_projections(weight)
    graded = torch.is_grad_enabled()
    of_hidden, of_weight = graded and hidden.requires_grad, graded and weight.requires_grad
    rows = hidden.reshape(-1, hidden.shape[-1])
    total: torch.Tensor = _with_gradients(rows, weight, labels.reshape(-1), of_hidden, of_weight)[0]
    return total


def training_loss(
    model: Any,
    hidden: torch.Tensor,
    labels: torch.Tensor | None,
    shift_labels: torch.Tensor | None,
    num_items_in_batch: int | torch.Tensor | None,
) -> torch.Tensor | None:
    """Return the loss of a model in training mode that nobody asks for logits, or None if that is something else.

    It is something else in evaluation, without labels, with another loss function than transformers' own, and where
    an adapter or a quantised layer stands in the place of the model's head.

    Args:
        hidden: [B, T, hidden] of the last layer.
        labels, shift_labels: [B, T] labels of the next tokens, or of the logits at their own place, or None.
        num_items_in_batch: what the sum is divided by, instead of the number of labels.
    """
    given = labels if shift_labels is None else shift_labels
    if not model.training or given is None or type(model.lm_head) is not nn.Linear:
        return None
    if model.loss_function is not ForCausalLMLoss:
        return None
    if shift_labels is None:
        given = nn.functional.pad(given[:, 1:], (0, 1), value=NO_LABEL)
    count = (given != NO_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
    if isinstance(count, torch.Tensor):
        count = count.to(hidden.device)
    return linear_cross_entropy(hidden, model.lm_head.weight, given.to(hidden.device)) / count
