"""Pages of a stream that forgets: one KV head with the forget gates of its query heads."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property

import torch

from ..float8 import FP8
from ..native import Part

HEAD_DIMS = (32, 64, 128, 256)
"""Head sizes d that the kernels of forgetting attention are made for."""

LIVE_RANGE_PERIOD = 16
"""A decoding row's live ranges are looked at every so many tokens. A page holds as many or more, so a dead page is
found a fraction of a page late."""

PLAIN_EXP_BOUND = 60.0
"""Logits within +-60 can be exponentiated and summed over a million keys in float32 and bfloat16 as they are."""

GATE_FLOOR = -1024.0
"""Smallest log f that is stored. Below it every weight across the gate is zero in float32 anyhow, and a larger
number would cost the running sums behind it their precision."""


@dataclass(frozen=True)
class ForgettingPageFormat:
    """Bytes of one page, the same for every stream of a model.

    A page is ``[K | V | gates | scales | newest raw k, v]``, padded to whole rows of K and to 128 bytes, so that
    the pool can also be read as a matrix of rows of d.

    Args:
        page_size: tokens per page.
        head_dim: d.
        dtype: the model's.
        num_gates: query heads that share the KV head; each has its own forget gate.
        token_shift: whether the page keeps k and v of its newest tokens as projected, before token shift and
            QK-norm. The next token, perhaps in another step, mixes with those of the token before it.
        kv_dtype: of K and V in the page: ``dtype``, or float8 e4m3 with one scale each for the page's K and V.
        drafts: tokens at the end of a request that a later step may write anew, because they were drafts of
            speculative decoding. The page keeps k and v of so many tokens more than one.
    """

    page_size: int
    head_dim: int
    dtype: torch.dtype
    num_gates: int
    token_shift: bool
    kv_dtype: torch.dtype
    drafts: int = 0

    @property
    def kv_bytes(self) -> int:
        return self.page_size * self.head_dim * self.kv_dtype.itemsize

    @property
    def gate_bytes(self) -> int:
        return self.num_gates * self.page_size * 4

    @property
    def scale_bytes(self) -> int:
        return 16 if self.kv_dtype == FP8 else 0

    @property
    def last_bytes(self) -> int:
        return (1 + self.drafts) * 2 * self.head_dim * self.dtype.itemsize if self.token_shift else 0

    @property
    def page_bytes(self) -> int:
        size = 2 * self.kv_bytes + self.gate_bytes + self.scale_bytes + self.last_bytes
        row = max(128, self.head_dim * self.kv_dtype.itemsize)
        return -(-size // row) * row

    def view(self, pool: torch.Tensor) -> ForgettingPages:
        """Cut a flat pool of bytes into pages.

        Args:
            pool: uint8, 1-D, contiguous; its length is a multiple of ``page_bytes``.
        """
        raw = pool.view(-1, self.page_bytes)
        num_pages, at = raw.shape[0], 0

        def part(size: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
            nonlocal at
            piece = raw[:, at : at + size].view(dtype).view(num_pages, *shape)
            at += size
            return piece

        return ForgettingPages(
            k=part(self.kv_bytes, self.kv_dtype, self.page_size, self.head_dim),
            v=part(self.kv_bytes, self.kv_dtype, self.page_size, self.head_dim),
            gates=part(self.gate_bytes, torch.float32, self.num_gates, self.page_size),
            scales=part(self.scale_bytes, torch.float32, 4)[:, :2] if self.scale_bytes else None,
            last=part(self.last_bytes, self.dtype, 1 + self.drafts, 2, self.head_dim) if self.token_shift else None,
        )


class NativePages(ctypes.Structure):
    """``Pages`` of pages.hpp."""

    _fields_ = [("k", Part), ("v", Part), ("gates", Part), ("last", Part), ("kept", ctypes.c_int64)]


@dataclass(frozen=True, eq=False)
class ForgettingPages:
    """The page pool as typed views (P pages, N tokens a page, G gates, d head size).

    Attributes:
        k, v: [P, N, d], model dtype or float8. k is final: after token shift, QK-norm and rotation.
        gates: [P, G, N] float32; entry n is the sum of log f over the page's tokens 0..n. The last entry of a
            full page is the page's total. Sums start anew in every page, so a page means the same wherever
            in a sequence it stands.
        scales: [P, 2] float32, powers of two; with float8 pages K is ``k * scales[:, 0]`` and V is
            ``v * scales[:, 1]``. None otherwise.
        last: [P, L, 2, d], raw k and v of the L tokens written last, or None without token shift. Those of the
            page's token n are at ``n % L``.
    """

    k: torch.Tensor
    v: torch.Tensor
    gates: torch.Tensor
    scales: torch.Tensor | None
    last: torch.Tensor | None

    @property
    def page_size(self) -> int:
        return self.k.shape[1]

    @property
    def device(self) -> torch.device:
        return self.k.device

    @property
    def dtype(self) -> torch.dtype:
        """Of stored K and V."""
        return self.k.dtype

    @cached_property
    def native(self) -> NativePages:
        """The pages as C++ takes them, on a CPU."""
        parts = (Part.of(x) for x in (self.k, self.v, self.gates, self.last))
        return NativePages(*parts, 0 if self.last is None else self.last.shape[1])

    def keys(self, ids: torch.Tensor) -> torch.Tensor:
        """K of the pages ``ids`` as float32: [\\*ids, N, d]."""
        return self._gathered(self.k, ids, 0)

    def values(self, ids: torch.Tensor) -> torch.Tensor:
        """V of the pages ``ids`` as float32: [\\*ids, N, d]."""
        return self._gathered(self.v, ids, 1)

    def _gathered(self, stored: torch.Tensor, ids: torch.Tensor, which: int) -> torch.Tensor:
        # On a CPU index_select copies whole pages, where indexing copies number by number. It knows no float8.
        raw = stored if self.scales is None else stored.view(torch.uint8)
        found = raw.index_select(0, ids.flatten()).view(*ids.shape, *raw.shape[1:])
        if self.scales is None:
            return found.float()
        return found.view(FP8).float() * self.scales[ids, which][..., None, None]
