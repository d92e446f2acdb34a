"""Copies of pages from one pool to another, bit by bit."""

from __future__ import annotations

import pytest
import torch

from vllm_fox.kernels.page_copy import page_copy


@pytest.mark.parametrize("words", [32, 160, 5000])
@pytest.mark.parametrize("count", [0, 1, 40])
def test_the_named_pages_and_no_others(words: int, count: int) -> None:
    """More pages than programs, and pages that are more or less than what a program has under way."""
    generator = torch.Generator().manual_seed(count)
    everything = -(2**31), 2**31 - 1
    source = torch.randint(*everything, (50, words), dtype=torch.int32, generator=generator)
    target = torch.randint(*everything, (60, words), dtype=torch.int32, generator=generator)
    expected = target.clone()
    ids = torch.randint(0, 50, (count,), dtype=torch.int32, generator=generator)
    places = torch.randperm(60, generator=generator)[:count].to(torch.int32)
    for page, place in zip(ids.tolist(), places.tolist()):
        expected[place] = source[page]
    page_copy(ids, places, source=source, target=target)
    assert torch.equal(target, expected)
