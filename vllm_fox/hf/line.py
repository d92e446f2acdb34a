"""The tokens of a batch as one line, sequence after sequence, from any way in which a caller may lay them out.

A batch may be plain, padded on either side (``attention_mask``), or packed: several sequences in one row, told
apart by ``position_ids`` that begin again at 0, by bounds, or by ``seq_idx``.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        (batch, length), device = x.shape[:2], x.device
        where = source = None
        bounds = torch.arange(batch + 1, device=device) * length
        if attention_mask is not None:
            real = _real(attention_mask.to(device), batch, length, past, past_length)
            if real is not None:
                where = real.flatten().nonzero().squeeze(1)
                bounds = F.pad(real.sum(1).cumsum(0), (1, 0))
                newest = real.flatten().cumsum(0).view_as(real) - 1
                source = torch.where(newest >= bounds[:-1, None], newest, -1)
        tokens = batch * length if where is None else len(where)
        line = cls._between(batch, length, bounds, tokens, where, source)
        cu_seq_lens = {"cu_seqlens": cu_seqlens, "cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k}
        marks = {
            name: _by_bounds(name, given, batch, length, device)
            for name, given in cu_seq_lens.items()
            if given is not None
        }
        if seq_idx is not None:
            marks["seq_idx"] = _by_row("seq_idx", seq_idx, batch, length, device)
        line = line._divided({name: _begins(line.pack(mark)) for name, mark in marks.items()})
        if position_ids is not None:
            position_ids = line.pack(_by_row("position_ids", position_ids, batch, length, device))
            if past is None and not marks:
                line = line._divided({"position_ids": position_ids == 0})
        if past is not None:
            if line.packed:
                raise ValueError(f"{' and '.join(marks)}: packed sequences cannot go on from past_key_values.")
            line.positions = line.offsets + past[line.sequence]
        if position_ids is not None and not bool((position_ids == line.positions).all()):
            wrong = int((position_ids != line.positions).int().argmax())
            raise ValueError(
                f"position_ids has {int(position_ids[wrong])} at a token whose number is "
                f"{int(line.positions[wrong])}: it must count the tokens of each sequence from 0 on, without "
                "padding; leave it out if sequences are not packed."
            )
        _check_lengths(line, cache_position, past_length, max_length_q=max_length_q, max_length_k=max_length_k)
        return line

    @classmethod
    def _between(
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

    def _divided(self, begins: dict[str, torch.Tensor]) -> Line:
        """Divide rows into sequences that begin where all of ``begins``, [N] bool by argument, say so."""
        if not begins:
            return self
        rows = self.offsets == 0
        (name, first), *others = ((name, rows | one) for name, one in begins.items())
        for other, one in others:
            if not torch.equal(first, one):
                raise ValueError(f"{name} and {other} disagree on where sequences begin: give one of them.")
        if torch.equal(first, rows):
            return self
        bounds = F.pad(first.nonzero().squeeze(1), (0, 1), value=len(first))
        return self._between(self.batch, self.length, bounds, len(first), self.where, self.source, packed=True)

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
        kept = torch.full_like(labels, NO_LABEL).flatten()
        labels, later = self.pack(labels), self.offsets > 0
        index = torch.arange(len(labels), device=labels.device) if self.where is None else self.where
        kept[index[later]] = labels[later]
        return kept.view(self.batch, self.length)


def _real(
    mask: torch.Tensor, batch: int, length: int, past: torch.Tensor | None, past_length: int
) -> torch.Tensor | None:
    """Return which of the [B, T] tokens are no padding, or None if none is.

    Raises:
        ValueError: the mask is no padding mask, does not go with the earlier calls, or leaves nothing.
    """
    if mask.shape != (batch, past_length + length):
        raise ValueError(
            f"attention_mask is {list(mask.shape)}: it must be {[batch, past_length + length]}, 0 at padding and 1 "
            "at tokens, those in past_key_values included; masks of pairs of tokens are not supported."
        )
    real, new = mask != 0, mask[:, past_length:] != 0
    # The host waits for the device once.
    valid, some, every = torch.stack(((real == mask).all(), new.any(), new.all())).tolist()
    if not valid:
        raise ValueError("attention_mask has values other than 0, which is padding, and 1.")
    if past is not None and not torch.equal(real[:, :past_length].sum(1), past):
        raise ValueError(
            "attention_mask has other padding than the calls before, whose tokens are in past_key_values."
        )
    if not some:
        raise ValueError("attention_mask is 0 everywhere: there is no token.")
    return None if every else new


def _by_row(name: str, x: torch.Tensor, batch: int, length: int, device: torch.device) -> torch.Tensor:
    """Return x [B, T] or [1, T] as [B, T]."""
    if x.dim() != 2 or x.shape[0] not in (1, batch) or x.shape[1] != length:
        raise ValueError(f"{name} is {list(x.shape)}: it must be {[batch, length]} or {[1, length]}.")
    return x.to(device).expand(batch, -1)


def _by_bounds(name: str, bounds: torch.Tensor, batch: int, length: int, device: torch.device) -> torch.Tensor:
    """Return the number of each token's sequence [1, T], given their bounds in one row."""
    if batch != 1:
        raise ValueError(f"{name} is given for {batch} rows: sequences that it bounds are packed into one row.")
    if bounds.dim() != 1 or len(bounds) < 2 or bounds.is_floating_point():
        raise ValueError(f"{name} is {bounds.dtype} {list(bounds.shape)}: it must be int32 [sequences + 1].")
    bounds = bounds.to(device).long()
    if bounds[0] != 0 or bounds[-1] != length or bool((bounds.diff() < 0).any()):
        raise ValueError(f"{name} is {bounds.tolist()}: it must rise from 0 to the row's length, {length}.")
    return torch.searchsorted(bounds, torch.arange(length, device=device), right=True)[None]


def _begins(mark: torch.Tensor) -> torch.Tensor:
    """Return where mark [N] differs from the one before, as [N] bool."""
    return F.pad(mark[1:] != mark[:-1], (1, 0))


def _check_lengths(
    line: Line, cache_position: torch.Tensor | None, past_length: int, **longest: int | torch.Tensor | None
) -> None:
    """Raise a ValueError if lengths that the caller gives, the longest by argument, are not those of the line."""
    expected = torch.arange(past_length, past_length + line.length, device=line.cu_seqlens.device)
    if cache_position is not None and not torch.equal(cache_position.to(expected), expected):
        raise ValueError(
            f"cache_position must be the columns {past_length} to {past_length + line.length - 1}: leave it out."
        )
    for name, value in longest.items():
        if value is not None and int(value) != (found := int(line.cu_seqlens.diff().max())):
            raise ValueError(f"{name} is {int(value)}: the longest sequence has {found} tokens.")
