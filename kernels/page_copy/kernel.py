"""Copies of pages as one Triton kernel, for pools of which one is pinned host memory.

A GPU reads and writes pinned memory at the address that the host has for it. The limit is the bus, which a few
programs fill, so that they leave the GPU to the step that runs beside them: 16 programs with 16 KiB under way each
are 256 KiB, which at 2 microseconds from the GPU to host memory and back allow 128 GB/s.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import Launcher

PROGRAMS = 16
"""Most programs of a launch."""
WORDS_AT_ONCE = 4096
"""A program has at most so many words under way."""


@triton.jit(do_not_specialize=["num_pages"])
def _page_copy(
    source_ids, target_ids, source, target,
    num_pages,
    WORDS: tl.constexpr, WORDS_AT_ONCE: tl.constexpr,
):  # fmt: skip
    for page in range(tl.program_id(0), num_pages, tl.num_programs(0)):
        read = source + tl.load(source_ids + page).to(tl.int64) * WORDS
        write = target + tl.load(target_ids + page).to(tl.int64) * WORDS
        for first in range(0, WORDS, WORDS_AT_ONCE):
            word = first + tl.arange(0, WORDS_AT_ONCE)
            tl.store(write + word, tl.load(read + word, mask=word < WORDS), mask=word < WORDS)


_launch = Launcher(_page_copy)


def page_copy(
    source_ids: torch.Tensor, target_ids: torch.Tensor, *, source: torch.Tensor, target: torch.Tensor
) -> None:
    """See :func:`.reference.page_copy`."""
    pages, words = source_ids.shape[0], source.shape[1]
    if not pages:
        return
    _launch(
        (min(PROGRAMS, pages), 1, 1),
        (source_ids, target_ids, source, target),
        (pages,),
        (),
        (words, min(WORDS_AT_ONCE, triton.next_power_of_2(words))),
        num_warps=8,
    )
