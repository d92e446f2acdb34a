"""One attention layer over real pages, without vLLM: the pool, the table and the leaf functions together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_fox.families.fox.attention import ForgettingFormula, ForgettingState
from vllm_fox.kernels.forgetting.pages import ForgettingPageFormat
from vllm_fox.kernels.paged import TABLE_CHUNK, Batch, PageTable
from vllm_fox.pages.pool import PagePool

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pool_and_table(
    streams: int, num_slots: int, num_pages: int, max_pages: int, device: str = DEVICE
) -> tuple[PagePool, PageTable]:
    """The book of one rank's pages, and the table on the device."""
    max_chunks = -(-max_pages // TABLE_CHUNK)
    num_chunks = num_slots * max_chunks + 1
    pool = PagePool(
        num_blocks=num_pages // streams,
        streams=[streams],
        num_slots=num_slots,
        num_chunks=num_chunks,
        max_chunks=max_chunks,
    )

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    table = PageTable(
        zeros(num_slots + 1, max_chunks), zeros(num_chunks, streams, TABLE_CHUNK), zeros(num_slots + 1, streams)
    )
    return pool, table


def extend(pool: PagePool, table: PageTable, slot: int, length: int, page_size: int) -> None:
    """Give a slot the pages that ``length`` tokens need."""
    missing = -(-length // page_size) - int(pool.num_pages[slot])
    if missing <= 0:
        return
    pool.reserve(slot, missing)
    columns, device = pool.hand_out(), table.entries.device
    index, chunk, offset = (
        torch.from_numpy(x).long() for x in (columns.new_chunk_index, columns.chunk, columns.offset)
    )
    table.chunk_of[slot, index] = torch.from_numpy(columns.new_chunk).to(device)
    table.entries.transpose(1, 2)[chunk, offset] = torch.from_numpy(columns.ids).to(device)


def batch_of(
    lens: list[int], seqs: list[int], slots: list[int], page_size: int, device: str = DEVICE, unknown: int = 0
) -> Batch:
    """Rows of ``lens`` new tokens, of ``seqs`` tokens in all; the host takes them for ``unknown`` tokens longer."""
    return Batch.of(
        query_start=torch.tensor([0, *np.cumsum(lens)], dtype=torch.int32, device=device),
        seq_lens=torch.tensor(seqs, dtype=torch.int32, device=device),
        slots=torch.tensor(slots, dtype=torch.int32, device=device),
        query_lens_host=lens,
        seq_lens_host=[length + unknown for length in seqs],
        page_size=page_size,
    )


@dataclass
class StepInputs:
    """What a layer's attention is given (T tokens, H KV heads, G query heads a KV head).

    Attributes:
        q: [T, H, G, d].
        k, v: [T, H, d].
        gate: [T, H, G] logits of the forget gate.
        shift_k, shift_v: [T, H] logits of the token shift, or None.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gate: torch.Tensor
    shift_k: torch.Tensor | None
    shift_v: torch.Tensor | None

    def flat(self) -> list[torch.Tensor]:
        """As the model hands them over."""
        parts = (self.q, self.k, self.v, self.gate, self.shift_k, self.shift_v)
        return [x.flatten(1) for x in parts if x is not None]


class OneLayer:
    """H streams of one layer; every page starts as NaN, and freed pages become NaN again."""

    def __init__(
        self,
        *,
        heads: int = 2,
        groups: int = 1,
        dim: int = 32,
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
        shift: bool = False,
        k_norm: torch.Tensor | None = None,
        rope_base: float | None = None,
        threshold: float | torch.Tensor = float("-inf"),
        num_slots: int = 4,
        num_pages: int = 512,
        max_pages: int = 128,
        device: str = DEVICE,
        kv_dtype: torch.dtype | None = None,
        logit_bound: float = float("inf"),
        drafts: int = 0,
    ) -> None:
        self.heads, self.groups, self.dim, self.page_size = heads, groups, dim, page_size
        self.dtype, self.device, self.drafts = dtype, device, drafts
        form = ForgettingPageFormat(page_size, dim, dtype, groups, shift, kv_dtype or dtype, drafts)
        self.raw = torch.full((num_pages * form.page_bytes,), 0xFF, dtype=torch.uint8, device=device)  # NaN bytes
        self.pages = form.view(self.raw)
        self.raw_pages = self.raw.view(num_pages, form.page_bytes)
        self.pool, self.table = pool_and_table(heads, num_slots, num_pages, max_pages, device)
        norm = None if k_norm is None else k_norm.to(device)
        self.impl = ForgettingFormula(0, dim**-0.5, norm, 1e-5, rope_base, shift_k=shift, shift_v=shift)
        limit = torch.as_tensor(threshold, dtype=torch.float32, device=device).expand(heads, groups)
        self.state = ForgettingState(self.table, [limit], [logit_bound], self.pages, num_slots, drafts)
        self.lengths: dict[int, int] = {}

    def open(self) -> int:
        slot = self.pool.open()
        self.table.first_live[slot] = 0
        self.lengths[slot] = 0
        return slot

    def close(self, slot: int) -> None:
        self._poison(self.pool.held_ids(slot, 0))
        self.pool.close(slot)
        del self.lengths[slot]

    def _poison(self, ids: np.ndarray) -> None:
        self.raw_pages[torch.from_numpy(ids).long().to(self.device)] = 0xFF

    def prepare(self, work: list[tuple[int, dict[str, torch.Tensor]]]) -> tuple[StepInputs, Batch]:
        """Pages and inputs for rows of (slot, inputs with leading dimension = new tokens)."""
        lens, seqs = [], []
        for slot, inputs in work:
            new = inputs["k"].shape[0]
            self.lengths[slot] += new
            lens.append(new)
            seqs.append(self.lengths[slot])
            extend(self.pool, self.table, slot, seqs[-1], self.page_size)
        device = self.device
        batch = batch_of(lens, seqs, [slot for slot, _ in work], self.page_size, device, self.drafts)

        def joined(name: str) -> torch.Tensor:
            whole = torch.cat([inputs[name] for _, inputs in work]).to(device)
            return whole.to(self.dtype) if name in "qkv" else whole.float()

        def shift(name: str) -> torch.Tensor | None:
            return torch.logit(joined(name)) if name in work[0][1] else None

        step = StepInputs(
            q=joined("q"),
            k=joined("k"),
            v=joined("v"),
            gate=gate_logits(joined("log_f")),
            shift_k=shift("shift_k"),
            shift_v=shift("shift_v"),
        )
        return step, batch

    def step(self, work: list[tuple[int, dict[str, torch.Tensor]]], release: bool = True) -> list[torch.Tensor]:
        """Run rows of (slot, inputs with leading dimension = new tokens); returns each row's output."""
        inputs, batch = self.prepare(work)
        slots = [slot for slot, _ in work]
        out = torch.full_like(inputs.q, float("nan"))
        self.state.begin_step(batch)
        self.impl.forward(inputs.flat(), batch, self.state, out.flatten(1))
        self.state.end_step(batch)
        if release:
            starts = self.table.first_live[torch.tensor(slots)].cpu().numpy()
            held = {slot: set(self.pool.held_ids(slot, 0).tolist()) for slot in slots}
            self.pool.release(0, np.array(slots), self.pool.epoch[slots], starts)
            for slot in slots:
                dead = held[slot] - set(self.pool.held_ids(slot, 0).tolist())
                self._poison(np.array(sorted(dead), dtype=np.int32))
        return [part.cpu() for part in out.split(batch.query_lens_host)]


def gate_logits(log_f: torch.Tensor) -> torch.Tensor:
    """The logits whose logsigmoid is ``log_f``; +inf where it is 0."""
    return log_f - torch.log(-torch.expm1(log_f))
