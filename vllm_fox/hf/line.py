"""The tokens of a batch as one line, sequence after sequence, from any way in which a caller may lay them out.

A batch may be plain, padded on either side (``attention_mask``), or packed: several sequences in one row, told
apart by ``position_ids`` that begin again at 0, by bounds, or by ``seq_idx``.

The host waits for the device once if it has to count: the tokens that an ``attention_mask`` leaves, or the
sequences in a row whose bounds are not given. With gradients, the device alone checks what a caller says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

NO_LABEL = -100
"""What transformers has in labels where there is none."""


@dataclass
class Line:
    """Layout of B rows of T tokens, of which some may be padding, as one line of N tokens.

    Attributes:
        batch, length: B and T.
        cu_seqlens: [S + 1] int32: where each of the S sequences begins in the line, and then N.
        sequence: [N] number of each token's sequence.
        offsets: [N] number of each token in its sequence, counted from 0 in this call.
        positions: [N] the same, counted from the beginning of the sequence in an earlier call if there was one.
        packed: whether a row has several sequences.
        where: [N] index of each token in the flattened [B * T]; None if nothing is padding.
        source: [B, T] index in the line of the newest token of each row so far, or -1 if there is none; None if
            nothing is padding.
    """

    batch: int
    length: int
    cu_seqlens: torch.Tensor
    sequence: torch.Tensor
    offsets: torch.Tensor
    positions: torch.Tensor
    packed: bool = False
    where: torch.Tensor | None = None
    source: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache_position: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: torch.Tensor | None = None,
        past: torch.Tensor | None = None,
        past_length: int = 0,
    ) -> Line:
        """Make the layout of x [B, T, ...].

        Args:
            attention_mask: [B, T], 0 at padding and 1 elsewhere; [B, past_length + T] if there was an earlier call.
            position_ids: [B, T] or [1, T] number of each token in its sequence, from 0; anything at padding.
            cache_position: [T] number of each column, from ``past_length``.
            cu_seqlens, cu_seq_lens_q, cu_seq_lens_k: [S + 1] bounds of sequences that are packed into one row; all
                three mean the same.
            max_length_q, max_length_k: length of the longest packed sequence.
            seq_idx: [B, T], equal at the tokens of a sequence, and different at those of the next.
            past: [B] number of tokens of each row in earlier calls, or None if this is the first.
            past_length: number of columns of earlier calls.

        Raises:
            ValueError: an argument has another shape, is no such description, or contradicts another; the message
                names it.
        """
        named = {"cu_seqlens": cu_seqlens, "cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k}
        bounds = {name: given for name, given in named.items() if given is not None}
        counts = attention_mask is not None or (not bounds and (position_ids is not None or seq_idx is not None))
        # torch.compile cannot go on where the host waits, and would try it line by line.
        make = _uncompiled if counts else _made
        line = make(x, attention_mask, position_ids, bounds, seq_idx, past, past_length)
        _check_lengths(line, cache_position, past_length, max_length_q=max_length_q, max_length_k=max_length_k)
        return line

    @classmethod
    def between(
        cls,
        batch: int,
        length: int,
        bounds: torch.Tensor,
        tokens: int,
        where: torch.Tensor | None,
        source: torch.Tensor | None,
        packed: bool = False,
    ) -> Line:
        """Make the layout of ``tokens`` tokens whose sequences have these bounds [S + 1]."""
        counts = bounds.diff()
        sequence = torch.arange(len(counts), device=bounds.device).repeat_interleave(counts, output_size=tokens)
        offsets = torch.arange(tokens, device=bounds.device) - bounds[:-1][sequence]
        return cls(batch, length, bounds.int(), sequence, offsets, offsets, packed, where, source)

    def divided(self, begins: dict[str, torch.Tensor]) -> Line:
        """Divide rows into sequences that begin where all of ``begins``, [N] bool by argument, say so."""
        rows = self.offsets == 0
        (name, first), *others = ((name, rows | one) for name, one in begins.items())
        for other, one in others:
            _require(f"{name} and {other}", (first == one).all(), partial(_disagreement, name, other))
        count, before = torch.stack((first.sum(), rows.sum())).tolist()
        if count == before:
            return self
        bounds = F.pad(torch.nonzero_static(first, size=count).squeeze(1), (0, 1), value=len(first))
        return self.between(self.batch, self.length, bounds, len(first), self.where, self.source, packed=True)

    @property
    def ragged(self) -> bool:
        """Whether the line is more than the B rows, each whole, one after the other."""
        return self.packed or self.where is not None

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [B, T, ...] to [N, ...]."""
        flat = x.flatten(0, 1)
        return flat if self.where is None else flat[self.where]

    def unpack(self, x: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
        """Map x [N, ...] to [B, T, ...]. Padding has what the token before it has.

        So the last column has every row's newest token, which is what ``generate`` reads. Where a row has no token
        yet in this call, it has what is in ``before`` [B, ...], or 0.
        """
        if self.source is None:
            return x.unflatten(0, (self.batch, self.length))
        missing = (self.source < 0).view(*self.source.shape, *[1] * (x.dim() - 1))
        earlier = torch.zeros_like(x[:1]) if before is None else before.to(x.dtype)
        return torch.where(missing, earlier[:, None], x[self.source.clamp(min=0)])

    def newest(self, x: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        """Return what x [N, ...] has for the last token of each sequence: [S, ...].

        A sequence without a token in this call has what is in ``before`` [S, ...], or 0.
        """
        found = x[self.cu_seqlens[1:].long() - 1]
        if self.where is None:
            return found
        missing = (self.cu_seqlens.diff() == 0).view(-1, *[1] * (x.dim() - 1))
        return torch.where(missing, torch.zeros_like(found) if before is None else before.to(found.dtype), found)

    def real(self) -> torch.Tensor | None:
        """Return which of the [B, T] are tokens, or None if all are."""
        if self.where is None:
            return None
        flat = torch.zeros(self.batch * self.length, dtype=torch.bool, device=self.where.device)
        return flat.index_fill(0, self.where, True).view(self.batch, self.length)

    def labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Return labels [B, T] without those of padding and of tokens that begin a sequence.

        The logits that are compared with a label are those of the token before it, and these have none.
        """
        if labels.shape != (self.batch, self.length):
            raise ValueError(
                f"labels is {list(labels.shape)}: it must be {[self.batch, self.length]}, as the tokens are."
            )
        if not self.ragged:
            return labels
        later = torch.where(self.offsets > 0, self.pack(labels), NO_LABEL)
        if self.where is not None:
            later = torch.full_like(labels, NO_LABEL).flatten().index_copy(0, self.where, later)
        return later.view(self.batch, self.length)


def _made(
    x: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    bounds: dict[str, torch.Tensor],
    seq_idx: torch.Tensor | None,
    past: torch.Tensor | None,
    past_length: int,
) -> Line:
    """Make the layout of x [B, T, ...] from what :meth:`Line.of` is given; ``bounds`` are by argument."""
    (batch, length), device = x.shape[:2], x.device
    ends, tokens = torch.arange(batch + 1, device=device) * length, batch * length
    where = source = None
    if attention_mask is not None:
        real, tokens = _real(attention_mask.to(device), batch, length, past, past_length)
        if tokens < batch * length:
            where = torch.nonzero_static(real.flatten(), size=tokens).squeeze(1)
            ends = F.pad(real.sum(1).cumsum(0), (1, 0))
            newest = real.flatten().cumsum(0).view_as(real) - 1
            source = torch.where(newest >= ends[:-1, None], newest, -1)
    line = Line.between(batch, length, ends, tokens, where, source)
    bounds = {name: _bounds(name, given, batch, length, device) for name, given in bounds.items()}
    marks = {name: _by_bounds(given, length) for name, given in bounds.items()}
    if seq_idx is not None:
        marks["seq_idx"] = _by_row("seq_idx", seq_idx, batch, length, device)
    begins = {name: _begins(line.pack(mark)) for name, mark in marks.items()}
    if bounds and where is None:
        # How many sequences there are is known without counting.
        name, ends = next(iter(bounds.items()))
        line = Line.between(batch, length, ends, tokens, None, None, packed=len(ends) > 2)
        for other, first in begins.items():
            same = (first == begins[name]).all()
            _require(f"{name} and {other}", same, partial(_disagreement, name, other))
    elif begins:
        line = line.divided(begins)
    if position_ids is not None:
        position_ids = line.pack(_by_row("position_ids", position_ids, batch, length, device))
        if past is None and not marks:
            line = line.divided({"position_ids": position_ids == 0})
    if past is not None:
        if line.packed:
            raise ValueError(f"{' and '.join(marks)}: packed sequences cannot go on from past_key_values.")
        line.positions = line.offsets + past[line.sequence]
    if position_ids is not None:
        right = (position_ids == line.positions).all()
        _require("position_ids", right, partial(_miscounted, position_ids, line.positions))
    return line


_uncompiled = torch.compiler.disable(_made)


def _require(names: str, holds: torch.Tensor, error: Callable[[], str]) -> None:
    """Raise a ValueError unless ``holds``. With gradients on a GPU, and in compiled code, the device checks it.

    Args:
        names: of the arguments that are wrong otherwise.
        error: returns what the ValueError says.
    """
    if torch.compiler.is_compiling() or (holds.device.type != "cpu" and torch.is_grad_enabled()):
        torch._assert_async(holds, f"{names}: wrong values. Call the model under torch.no_grad() to learn more.")
    elif not bool(holds):
        raise ValueError(error())


def _disagreement(name: str, other: str) -> str:
    return f"{name} and {other} disagree on where sequences begin: give one of them."


def _miscounted(position_ids: torch.Tensor, positions: torch.Tensor) -> str:
    wrong = int((position_ids != positions).int().argmax())
    return (
        f"position_ids has {int(position_ids[wrong])} at a token whose number is {int(positions[wrong])}: it must "
        "count the tokens of each sequence from 0 on, without padding; leave it out if sequences are not packed."
    )


def _real(
    mask: torch.Tensor, batch: int, length: int, past: torch.Tensor | None, past_length: int
) -> tuple[torch.Tensor, int]:
    """Return which of the [B, T] tokens are no padding, and how many these are.

    Raises:
        ValueError: the mask is no padding mask, does not go with the earlier calls, or leaves nothing.
    """
    if mask.shape != (batch, past_length + length):
        raise ValueError(
            f"attention_mask is {list(mask.shape)}: it must be {[batch, past_length + length]}, 0 at padding and 1 "
            "at tokens, those in past_key_values included; masks of pairs of tokens are not supported."
        )
    real, new = mask != 0, mask[:, past_length:] != 0
    before = real[:, :past_length].sum(1)
    same = (before == (0 if past is None else past)).all()
    valid, same, tokens = torch.stack(((real == mask).all().long(), same.long(), new.sum())).tolist()
    if not valid:
        raise ValueError("attention_mask has values other than 0, which is padding, and 1.")
    if not same:
        raise ValueError(
            "attention_mask has other padding than the calls before, whose tokens are in past_key_values."
        )
    if not tokens:
        raise ValueError("attention_mask is 0 everywhere: there is no token.")
    return new, tokens


def _by_row(name: str, x: torch.Tensor, batch: int, length: int, device: torch.device) -> torch.Tensor:
    """Return x [B, T] or [1, T] as [B, T]."""
    if x.dim() != 2 or x.shape[0] not in (1, batch) or x.shape[1] != length:
        raise ValueError(f"{name} is {list(x.shape)}: it must be {[batch, length]} or {[1, length]}.")
    return x.to(device).expand(batch, -1)


def _bounds(name: str, bounds: torch.Tensor, batch: int, length: int, device: torch.device) -> torch.Tensor:
    """Return bounds [S + 1] of sequences in one row, in int64."""
    if batch != 1:
        raise ValueError(f"{name} is given for {batch} rows: sequences that it bounds are packed into one row.")
    if bounds.dim() != 1 or len(bounds) < 2 or bounds.is_floating_point():
        raise ValueError(f"{name} is {bounds.dtype} {list(bounds.shape)}: it must be int32 [sequences + 1].")
    bounds = bounds.to(device).long()
    rises = (bounds[0] == 0) & (bounds[-1] == length) & (bounds.diff() >= 0).all()
    _require(
        name, rises, lambda: f"{name} is {bounds.tolist()}: it must rise from 0 to the row's length, {length}."
    )
    return bounds


def _by_bounds(bounds: torch.Tensor, length: int) -> torch.Tensor:
    """Return the number of each token's sequence [1, T], given their bounds in one row."""
    return torch.searchsorted(bounds, torch.arange(length, device=bounds.device), right=True)[None]


def _begins(mark: torch.Tensor) -> torch.Tensor:
    """Return where mark [N] differs from the one before, as [N] bool."""
    return F.pad(mark[1:] != mark[:-1], (1, 0))


def _check_lengths(
    line: Line, cache_position: torch.Tensor | None, past_length: int, **longest: int | torch.Tensor | None
) -> None:
    """Raise a ValueError if lengths that the caller gives, the longest by argument, are not those of the line."""
    if cache_position is not None:
        columns = torch.arange(past_length, past_length + line.length, device=line.cu_seqlens.device)
        wrong = (
            f"cache_position must be the columns {past_length} to {past_length + line.length - 1}: leave it out."
        )
        if cache_position.shape != columns.shape:
            raise ValueError(wrong)
        _require("cache_position", (cache_position.to(columns) == columns).all(), lambda: wrong)
    for name, value in longest.items():
        if value is not None:
            found = line.cu_seqlens.diff().max()
            _require(name, found == value, partial(_other_length, name, value, found))


def _other_length(name: str, value: int | torch.Tensor, found: torch.Tensor) -> str:
    return f"{name} is {int(value)}: the longest sequence has {int(found)} tokens."
