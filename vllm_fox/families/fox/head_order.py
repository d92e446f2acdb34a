"""Which heads go to which tensor-parallel rank.

Heads forget at very different speeds, and blocks are counted by the fullest rank, so ranks should hold equally many
pages. Heads of a layer can change places, with all their weights, without changing any output.
"""

from __future__ import annotations

import torch


def memory_score(
    weight: torch.Tensor | None, bias: torch.Tensor, input_norm: torch.Tensor | None, groups: int
) -> torch.Tensor:
    """[KV heads] a number that is higher for heads that remember longer, guessed from the forget gates' weights.

    The logit of a gate is ``w . x + b`` with x the normed input, about ``input_norm`` times a vector of mean square
    1. A head remembers by a large b, and by a large w along what all inputs have in common. Biases move little in
    training, hence their weight: of the sums tried, ``8 b + |w * input_norm|^2`` orders heads most like the pages
    that they were measured to hold (rank correlation 0.75 and 0.87 in two trained models).

    Args:
        weight: [heads, hidden] of the gates' projection, or None where gates are constants.
        bias: [heads].
        input_norm: [hidden] weight of the norm before the projection; None with ``weight``.
        groups: query heads that share a KV head. Its pages live as long as for the one that remembers longest.
    """
    score = 8.0 * bias.double()
    if weight is not None:
        assert input_norm is not None
        score = score + (weight.double() * input_norm.double()).square().sum(1)
    return score.view(-1, groups).amax(1)


def deal(score: torch.Tensor, ranks: int, layer: int) -> list[int]:
    """Heads in the order of ranks: the first ``len(score) / ranks`` are rank 0's, and so on.

    Dealt like cards, there and back again, so that no rank gets the longest memory of every round; the next layer
    begins at the other end.
    """
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for place, head in enumerate(score.argsort(descending=True, stable=True).tolist()):
        way, rank = divmod(place, ranks)
        hands[rank if (way + layer) % 2 == 0 else ranks - 1 - rank].append(head)
    return [head for hand in hands for head in sorted(hand)]
