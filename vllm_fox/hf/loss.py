"""What a language model's head gives: logits, or in training a loss without logits of all tokens in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import library, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from .autocast import for_projections
from .fused import can_fuse, fused
from .inputs import kept_positions
from .line import NO_LABEL
from .plain import is_plain

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
    of_block = fused(_block) if can_fuse(hidden) else _block
    for at in range(0, len(hidden), rows):
        x = hidden[at : at + rows]
        losses, grad = of_block(x @ weight.T, labels[at : at + rows])
        total += losses.sum()
        if of_hidden:
            torch.mm(grad, weight, out=grad_hidden[at : at + rows])
        if of_weight:
            _add_product(grad_weight, grad.T, x)
    return total, grad_hidden, grad_weight.to(weight.dtype)


def _block(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses [n] of logits [n, vocab], in float32 or wider, and their gradients in the logits' dtype."""
    counts, wide = labels != NO_LABEL, logits.to(torch.promote_types(logits.dtype, torch.float32))
    lse, index = wide.logsumexp(-1), labels.where(counts, 0)[:, None]
    losses = torch.where(counts, lse - wide.gather(1, index)[:, 0], 0.0)
    own = torch.arange(wide.shape[1], device=wide.device) == index
    grad = torch.where(counts[:, None], (wide - lse[:, None]).exp() - own.to(wide.dtype), 0.0)
    return losses, grad.to(logits.dtype)


def _add_product(total: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    """Add x @ y to a total, which is in float32 or wider."""
    if total.is_cuda and x.dtype != total.dtype:
        # cuBLAS adds to float32 what it multiplies in half precision, and rounds no product. Only for CUDA does
        # PyTorch have this.
        torch.addmm(total, x, y, out_dtype=total.dtype, out=total)
    else:
        total += x @ y


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
    if torch.is_grad_enabled():
        raise RuntimeError(
            "The loss of a model in training mode is differentiable once: for create_graph=True compute it from "
            "logits, which the model returns without labels."
        )
    found = (_scaled(x, grad) if wanted else None for x, wanted in zip(ctx.saved_tensors, ctx.wanted))
    return *found, None, None, None


def _scaled(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return x times a number in float32 or wider, which rounded to the dtype of x would be wrong everywhere."""
    return torch.mul(x, factor.view(1), out=torch.empty_like(x))


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


def logits_and_loss(
    model: Any,
    hidden: torch.Tensor,
    labels: torch.Tensor | None,
    shift_labels: torch.Tensor | None,
    num_items_in_batch: int | torch.Tensor | None,
    logits_to_keep: int | torch.Tensor,
) -> tuple[Any, Any]:
    """Return the logits of a model's head, and the loss; None for what there is not.

    In training mode with labels there is the loss alone, which is computed a block of tokens at a time. There are
    logits as well with another loss function than transformers' own, and where the head has to be called: it has a
    bias or hooks, or an adapter or a quantised layer stands in its place. Without labels there is no loss.

    Args:
        hidden: [B, T, hidden] of the last layer.
        labels, shift_labels: [B, T] labels of the next tokens, or of the logits at their own place, or None.
        num_items_in_batch: what the sum is divided by, instead of the number of labels.
        logits_to_keep: number of positions at the end whose logits are computed (0: all), or an index of them.
    """
    given = labels if shift_labels is None else shift_labels
    head = model.lm_head
    plain = is_plain(head) and head.bias is None and model.loss_function is ForCausalLMLoss
    if given is None or not model.training or not plain:
        logits = head(hidden[:, kept_positions(logits_to_keep)])
        if given is None:
            return logits, None
        loss = model.loss_function(
            logits=logits,
            labels=labels,
            vocab_size=model.config.vocab_size,
            num_items_in_batch=num_items_in_batch,
            shift_labels=shift_labels,
        )
        return logits, loss
    if shift_labels is None:
        given = nn.functional.pad(given[:, 1:], (0, 1), value=NO_LABEL)
    count = (given != NO_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
    if isinstance(count, torch.Tensor):
        count = count.to(hidden.device)
    return None, linear_cross_entropy(hidden, head.weight, given.to(hidden.device)) / count
