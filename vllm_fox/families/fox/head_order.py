"""Assign heads to tensor-parallel ranks.

Heads forget at very different speeds, and blocks are counted by the fullest rank, so ranks should hold equally many
pages. Heads of a layer can change places, with all their weights, without changing any output.
"""

from __future__ import annotations

import torch


def memory_score(
    weight: torch.Tensor | None, bias: torch.Tensor, input_norm: torch.Tensor | None, groups: int
) -> torch.Tensor:
    """Return a score [KV heads] that is higher for heads that remember longer, estimated from the gates' weights.

    The logit of a forget gate is ``w . x + b``. Its x is the normed input, about ``input_norm`` times a vector of
    mean square 1. A head remembers long if b is large, or if w is large in a direction that all inputs share.
    Biases move little in training, so they get a large factor: of the sums tried, ``8 b + |w * input_norm|^2``
    orders heads most like the numbers of pages that they were measured to hold (rank correlation 0.75 and 0.87 in
    two trained models).

    Args:
        weight: [heads, hidden] weight of the gates' projection, or None if the gates are constants.
        bias: [heads] bias of the gates.
        input_norm: [hidden] weight of the norm before the projection; None if ``weight`` is None.
        groups: query heads that share a KV head. The one that remembers longest decides how long its pages live.
    """
    score = 8.0 * bias.double()
    if weight is not None:
        assert input_norm is not None
        score = score + (weight.double() * input_norm.double()).square().sum(1)
    return score.view(-1, groups).amax(1)


def deal(score: torch.Tensor, ranks: int, layer: int) -> list[int]:
    """Return the heads in the order of ranks: the first ``len(score) / ranks`` are rank 0's, and so on.

    Heads are dealt like cards, the longest memory first, in rounds of alternating direction, so that no rank gets
    the longest memory of every round. The next layer begins with the other direction.
    """
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for place, head in enumerate(score.argsort(descending=True, stable=True).tolist()):
        way, rank = divmod(place, ranks)
        hands[rank if (way + layer) % 2 == 0 else ranks - 1 - rank].append(head)
    return [head for hand in hands for head in sorted(hand)]
