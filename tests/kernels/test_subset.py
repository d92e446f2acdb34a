"""Leaf functions over pages of which a subset is live, against the formula in float64: through real pages, with
everything that is dropped, freed or not yet written full of NaN."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.one_layer import DEVICE, batch_of, extend, pool_and_table
from vllm_fox.families.sparse_gpt2.attention import SubsetFormula, SubsetState
from vllm_fox.kernels.float8 import FP8
from vllm_fox.kernels.paged import Batch
from vllm_fox.kernels.subset.attention import make_workspace, subset_attention
from vllm_fox.kernels.subset.compaction import compact
from vllm_fox.kernels.subset.drop_times import drop_times
from vllm_fox.kernels.subset.pages import NEVER, Evictions, SubsetPageFormat
from vllm_fox.kernels.subset.write import subset_write

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MAX_LEN = 512


class Layers:
    """The attention of some layers over one pool, without vLLM.

    Layers of one stream with interaction keys and without a window are those of Dynamic Context Pruning, and run by
    its formula; others by the leaf functions.

    Args:
        bias: of each layer's interaction scores.
        streams, heads, group: S, H and G of a layer.
        int_dim: r, or 0 for streams without interaction keys.
        window: W of tokens that are evicted as they are written, or by the next one; None without such decisions.
        lag: 1 if a token decides about the one before it.
        decisions: names which tokens go (:data:`DECISIONS`).
        period: of compaction.
        drafts: tokens at the end of a step that may be taken back.
        kv_dtype: of K and V in the pages; None: ``dtype``.
    """

    def __init__(
        self,
        bias: Sequence[float] = (1.5, 2.0),
        *,
        streams: int = 1,
        heads: int = 2,
        group: int = 1,
        dim: int = 32,
        int_dim: int = 16,
        window: int | None = None,
        lag: int = 0,
        decisions: str = "most",
        period: int = 1,
        drafts: int = 0,
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
        propagate: bool = True,
        num_slots: int = 4,
        num_pages: int = 400,
    ) -> None:
        self.sizes, self.bias, self.propagate = (streams, heads, group, dim, int_dim), bias, propagate
        self.window, self.lag, self.decisions, self.period = window, lag, decisions, period
        self.page_size, self.dtype, self.drafts = page_size, dtype, drafts
        form = SubsetPageFormat(page_size, heads, dim, int_dim, dtype, kv_dtype or dtype)
        raw = torch.full((num_pages * form.page_bytes,), 0xFF, dtype=torch.uint8, device=DEVICE)  # NaN bytes
        self.pages, self.raw = form.view(raw), raw.view(num_pages, form.page_bytes)
        self.pool, self.table = pool_and_table(len(bias) * streams, num_slots, num_pages, -(-MAX_LEN // page_size))
        self.state = SubsetState(self.table, self.pages, len(bias), num_slots, MAX_LEN, propagate)
        self.below = torch.full((num_slots, streams, MAX_LEN), NEVER, dtype=torch.int32, device=DEVICE)
        self.workspace = make_workspace(
            self.pages,
            layers=len(bias),
            streams=streams,
            groups=group,
            max_rows=num_slots,
            max_model_len=MAX_LEN,
        )
        self.lengths: dict[int, int] = {}

    def open(self) -> int:
        slot = self.pool.open()
        self.table.first_live[slot] = 0
        self.lengths[slot] = 0
        return slot

    def step(self, work: list[tuple[int, torch.Tensor]]) -> list[torch.Tensor]:
        """Rows of (slot, inputs [layers, new tokens, values]): outputs [layers, new tokens, S, H, G, d] of each."""
        lens, seqs = [], []
        for slot, inputs in work:
            lens.append(inputs.shape[1])
            self.lengths[slot] += lens[-1]
            seqs.append(self.lengths[slot])
            extend(self.pool, self.table, slot, seqs[-1], self.page_size)
        batch = batch_of(lens, seqs, [slot for slot, _ in work], self.page_size, unknown=self.drafts)
        self.state.begin_step(batch)
        if self.workspace is not None:
            self.workspace.update(self.table, batch)
        outs = [
            self.attend(layer, values.to(DEVICE, self.dtype), batch)
            for layer, values in enumerate(torch.cat([inputs for _, inputs in work], dim=1))
        ]
        if self.window is None:
            self.state.end_step(batch)
        else:
            compact(self.pages, self.table, batch, self.period, self.drafts)
        self._release([slot for slot, _ in work])
        return list(torch.stack(outs).cpu().split(lens, dim=1))

    def attend(self, layer: int, values: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Output [T, S, H, G, d] of a layer for a step's tokens."""
        q, k, v, int_q, int_k = cut_up(values, self.sizes)
        streams, _, group, dim, r = self.sizes
        out = torch.full_like(q, float("nan"), memory_format=torch.contiguous_format)
        bias = torch.tensor([float(self.bias[layer])] * streams, device=DEVICE)
        if streams == group == 1 and r and self.window is None:
            inputs = [x.flatten(1) for x in (q, k, v, int_q, int_k)]
            SubsetFormula(layer, dim**-0.5, bias).forward(inputs, batch, self.state, out.flatten(1))
            return out
        evictions = None
        if self.window is not None:
            evictions = Evictions(self.evicts(k, positions_of(batch)), self.window, self.lag)
        int_k = int_k if r else None
        subset_write(self.pages, self.table, batch, layer, k=k, v=v, int_k=int_k, evictions=evictions)
        if r:
            drop_times(self.pages, self.table, batch, layer, int_q, bias, self.below if self.propagate else None)
        subset_attention(self.pages, self.table, batch, layer, q, dim**-0.5, out, self.workspace)
        return out

    def evicts(self, k: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """[T, S] what tokens at [T] positions with keys [T, S, H, d] decide."""
        return DECISIONS[self.decisions](k[:, :, 0, 0], position[:, None]).expand(k.shape[:2]).contiguous()

    def _release(self, slots: list[int]) -> None:
        starts = self.table.first_live[torch.tensor(slots)].cpu().numpy()
        held = {slot: set(self.pool.held_ids(slot, 0).tolist()) for slot in slots}
        self.pool.release(0, np.array(slots), self.pool.epoch[slots], starts)
        for slot in slots:
            freed = sorted(held[slot] - set(self.pool.held_ids(slot, 0).tolist()))
            self.raw[torch.tensor(freed, dtype=torch.long)] = 0xFF
            mine = torch.from_numpy(self.pool.held_ids(slot, 0)).long()
            seen = self.pages.end[mine] > self.lengths[slot] - self.drafts
            for field in (self.pages.k, self.pages.v, self.pages.int_k):
                kept, raw = seen.view(*seen.shape, *[1] * (field.dim() - 2)), field.view(torch.uint8)
                raw[mine] = torch.where(kept, raw[mine], 0xFF)  # NaN bytes


def positions_of(batch: Batch) -> torch.Tensor:
    """[T] the positions of a step's tokens."""
    lens, seqs = batch.query_lens_host, batch.seq_lens.tolist()
    return torch.cat([torch.arange(n - new, n) for new, n in zip(lens, seqs, strict=True)]).to(DEVICE)


def cut_up(values: torch.Tensor, sizes: tuple[int, int, int, int, int]) -> tuple[torch.Tensor, ...]:
    """[T, values] to q [T, S, H, G, d], k and v [T, S, H, d], interaction queries and keys [T, S, r]."""
    streams, heads, group, dim, r = sizes
    shapes = [(streams, heads, group, dim), *[(streams, heads, dim)] * 2, *[(streams, r)] * 2]
    parts = values.split([math.prod(shape) for shape in shapes], dim=1)
    return tuple(part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True))


DECISIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "most": lambda key, at: key > -0.8,
    "all": lambda key, at: at >= 0,
    "none": lambda key, at: at < 0,
    "alternating": lambda key, at: at % 2 == 0,
    "bursts": lambda key, at: at // 24 % 2 == 1,
}
"""What a token decides, by the first number of its key in the stream [T, S] and its position [T, 1]."""


def inputs_of(layers: Layers, length: int, seed: int = 0) -> torch.Tensor:
    """Random inputs of one sequence: [layers, length, values]."""
    streams, heads, group, dim, r = layers.sizes
    rng = torch.Generator().manual_seed(seed)
    width = streams * (heads * (group + 2) * dim + 2 * r)
    return torch.randn(len(layers.bias), length, width, generator=rng).to(layers.dtype)


def formula(layers: Layers, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [layers, T, S, H, G, d] in float64, and how many tokens each query sees, [layers, T, S]."""
    streams, _, _, dim, r = layers.sizes
    length, outs, counts = inputs.shape[1], [], []
    position = torch.arange(length)
    causal = position[:, None] >= position
    below = torch.ones(streams, length, length, dtype=torch.bool)
    for bias, values in zip(layers.bias, inputs.double(), strict=True):
        q, k, v, int_q, int_k = cut_up(values, layers.sizes)
        visible = causal.expand(streams, length, length)
        if layers.window is not None:
            evicted = torch.zeros(streams, length, dtype=torch.bool)
            evicted[:, : length - layers.lag] = layers.evicts(k, position).T[:, layers.lag :]
            visible = visible & ((position[:, None] - position <= layers.window) | ~evicted[:, None])
        if r:
            scores = torch.einsum("isr,jsr->sij", int_q, int_k) / math.sqrt(r) + bias
            visible = visible & ((scores > 0) | (position[:, None] <= position)).cumprod(1).bool()
        if layers.propagate and r:
            below = visible = visible & below
        logits = torch.einsum("ishgd,jshd->shgij", q, k) / math.sqrt(dim)
        weights = logits.masked_fill(~visible[:, None, None], float("-inf")).softmax(-1)
        outs.append(torch.einsum("shgij,jshd->ishgd", weights, v))
        counts.append(visible.sum(2).T)
    return torch.stack(outs), torch.stack(counts)


# No decay: products of 32 terms, an exponential and a division, some 10 u.
EXACT = 1e-6 if DEVICE == "cpu" else 1e-5


def close(out: torch.Tensor, expected: torch.Tensor, tolerance: float = EXACT) -> None:
    error = (out.double() - expected).norm() / expected.norm()
    assert error < tolerance, float(error)


def chunks_then_decode(layers: Layers, tolerance: float = EXACT) -> None:
    """Outputs equal the formula's, in no more pages than live tokens ask for."""
    inputs = inputs_of(layers, 380)
    expected, seen = formula(layers, inputs)
    slot, at, out = layers.open(), 0, []
    for size in [1, 37, 150, 166, *[1] * (6 if INTERPRETED else 26)]:
        out += layers.step([(slot, inputs[:, at : at + size])])
        at += size
        held = int(layers.pool.num_pages[slot]) - layers.pool.start[slot]
        waiting = layers.period - 1
        assert (held <= (seen[:, at - 1].flatten().numpy() + waiting) / layers.page_size + 2).all()
    close(torch.cat(out, 1), expected[:, :at], tolerance)


@pytest.mark.parametrize("propagate", [True, False])
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("bias", [(2.0, 2.5), (-9.0, 2.0), (9.0, 1.0)])
def test_chunks_then_decode(bias: tuple[float, float], page_size: int, propagate: bool) -> None:
    """Any split into steps gives the formula's output, in no more pages than live tokens ask for."""
    if INTERPRETED and (page_size == 64 or (bias != (2.0, 2.5) and not propagate)):
        pytest.skip("left out of the interpreter's run to save time")
    layers = Layers(bias, page_size=page_size, propagate=propagate)
    chunks_then_decode(layers)
    if min(bias) < 9:
        assert layers.pool.released_total > 0


@pytest.mark.parametrize("int_dim, window", [(0, 20), (0, 100), (8, None), (8, 20)])
@pytest.mark.parametrize("streams, heads, group, dim", [(2, 1, 3, 24), (3, 2, 1, 32), (1, 1, 8, 256)])
def test_streams_of_grouped_heads(
    streams: int, heads: int, group: int, dim: int, int_dim: int, window: int | None
) -> None:
    """A KV head drops by itself what its query heads share, by interaction, after a window of queries, or by both.

    Tokens whose end is known ahead are still seen until then, also after compaction has moved them.
    """
    if INTERPRETED and (dim != 24 or window != 20):
        pytest.skip("left out of the interpreter's run to save time")
    layers = Layers((2.0, 2.5), streams=streams, heads=heads, group=group, dim=dim, int_dim=int_dim, window=window)
    chunks_then_decode(layers)
    assert layers.pool.released_total > 0


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("window", [1, 16, 60])
@pytest.mark.parametrize("decisions", list(DECISIONS))
def test_evictions(decisions: str, window: int, lag: int) -> None:
    """Tokens leave at the edge of their window, across chunks and page boundaries; compaction runs now and then."""
    if INTERPRETED and (decisions, window, lag) not in (("most", 16, 0), ("bursts", 16, 1)):
        pytest.skip("left out of the interpreter's run to save time")
    layers = Layers(
        streams=2, heads=1, group=3, dim=24, int_dim=0, window=window, lag=lag, decisions=decisions, period=16
    )
    chunks_then_decode(layers)
    assert (layers.pool.released_total > 0) == (decisions != "none")


@pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="of the Triton kernel")
def test_few_programs_share_the_tokens_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there are many rows: drop times of all blocks of tokens, whoever finds them."""
    from vllm_fox.kernels.subset.drop_times import kernel

    monkeypatch.setattr(kernel, "MAX_PROGRAMS", 1)
    layers = Layers((2.5,))
    inputs = inputs_of(layers, 203)
    slot = layers.open()
    out = [layers.step([(slot, part)])[0] for part in inputs.split([200, 1, 1, 1], dim=1)]
    close(torch.cat(out, 1), formula(layers, inputs)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, dim, int_dim", [(3, 64, 64), (1, 128, 8), (5, 48, 24)])
def test_dtypes_and_sizes(heads: int, dim: int, int_dim: int, dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no bfloat16 dot product")
    layers = Layers((1.5,), heads=heads, dim=dim, int_dim=int_dim, dtype=dtype)
    inputs = inputs_of(layers, 150)
    slot = layers.open()
    out = layers.step([(slot, inputs[:, :140])])
    out += [layers.step([(slot, inputs[:, t : t + 1])])[0] for t in range(140, 150)]
    # sqrt(2/3) u: weights and output.
    close(torch.cat(out, 1), formula(layers, inputs)[0], 3.2e-3 if dtype == torch.bfloat16 else 4e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, group, dim", [(1, 4, 64), (3, 1, 24)])
def test_float8_pages(heads: int, group: int, dim: int, dtype: torch.dtype) -> None:
    """Each token has its own scales, which travel with it: small ones beside large ones stay precise."""
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no bfloat16 dot product")
    layers = Layers(
        (0.0,), heads=heads, group=group, dim=dim, int_dim=0, window=20, period=16, dtype=dtype, kv_dtype=FP8
    )
    inputs = inputs_of(layers, 190)
    values = cut_up(inputs[0], layers.sizes)[2]
    values[60:] *= 2.0**-10  # where the window has moved on, only a few large ones are left
    rounded = inputs.clone()
    for part in cut_up(rounded[0], layers.sizes)[1:3]:
        part[:] = as_float8(part)
    # The interpreter rounds to float8 towards zero, so it gets numbers that need no rounding.
    given, slot = rounded if INTERPRETED else inputs, layers.open()
    out = [layers.step([(slot, part)])[0] for part in given.split([50, 90, *[1] * 50], dim=1)]
    assert layers.pool.released_total > 0
    # K and V as they are in the pages; weights and output are rounded.
    close(torch.cat(out, 1), formula(layers, rounded)[0], 8e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("kv_dtype", [FP8, None])
@pytest.mark.parametrize("heads", [1, 3])  # decode over pages, and over lists
def test_small_weights_beside_a_sink(heads: int, kv_dtype: torch.dtype | None) -> None:
    """The first token takes nearly all weight and adds nothing. The others have 2^-29, less than float16 has."""
    layers = Layers((0.0,), heads=heads, int_dim=0, window=400, dtype=torch.float16, kv_dtype=kv_dtype)
    inputs = inputs_of(layers, 90)
    q, k, v = cut_up(inputs[0], layers.sizes)[:3]
    unit = torch.eye(32)[0]
    q[:], k[:], v[:] = unit, 0.0, torch.where(torch.rand_like(v) < 0.5, 2.0**14, -(2.0**14))
    k[0], v[0] = 112 * unit, 0.0
    slot = layers.open()
    out = layers.step([(slot, inputs[:, :80])])
    out += [layers.step([(slot, inputs[:, t : t + 1])])[0] for t in range(80, 90)]
    close(torch.cat(out, 1), formula(layers, inputs)[0], 1e-3)  # weights and output are rounded


def test_values_of_any_size_in_float8_pages() -> None:
    """In bfloat16 scales may be far below the least float16, and far apart."""
    layers = Layers((0.0,), heads=1, int_dim=0, window=400, dtype=torch.bfloat16, kv_dtype=FP8)
    inputs = inputs_of(layers, 50)
    _, k, v = cut_up(inputs[0], layers.sizes)[:3]
    v *= 2.0**-60
    v[20:30] *= 2.0**-10
    k[:], v[:] = as_float8(k), as_float8(v)
    slot = layers.open()
    # The interpreter has no bfloat16 dot product, which prompts need.
    out = [layers.step([(slot, inputs[:, t : t + 1])])[0] for t in range(50)]
    close(torch.cat(out, 1), formula(layers, inputs)[0], 8e-3)  # weights and output are rounded


def as_float8(x: torch.Tensor) -> torch.Tensor:
    """[..., d] as a page holds it: numbers of at most 448 with three bits after the first, times a power of two."""
    wide = x.float()
    scale = (wide.abs().amax(-1, keepdim=True) / 448).log2().ceil().exp2()
    return ((wide / scale).to(FP8).float() * scale).to(x.dtype)


def test_a_request_of_nan_stays_alone() -> None:
    """Rows before and after it have the outputs that they have without it."""
    layers = Layers()
    data = [inputs_of(layers, 60, seed) for seed in range(3)]
    data[1] = torch.full_like(data[1], torch.nan)
    slots, outs = [layers.open() for _ in data], []
    for part in [(0, 40), (40, 41), (41, 58), (58, 59)]:
        outs.append(layers.step([(slot, x[:, slice(*part)]) for slot, x in zip(slots, data, strict=True)]))
    assert torch.cat([out[1] for out in outs], 1).isnan().any()
    for row in (0, 2):
        close(torch.cat([out[row] for out in outs], 1), formula(layers, data[row])[0][:, :59])


@settings(max_examples=5 if INTERPRETED else 40)
@given(data=st.data())
def test_ragged_batches(data: st.DataObject) -> None:
    """Rows of one query beside rows of many, requests that end and others that take their pages."""
    bias = data.draw(st.tuples(*[st.sampled_from([-9.0, 0.0, 1.5, 3.0, 9.0])] * 2))
    layers = Layers(bias, propagate=data.draw(st.booleans()), num_pages=120)
    running: dict[int, tuple[int, list[torch.Tensor]]] = {}  # slot: seed of its inputs, output so far
    for seed in range(data.draw(st.integers(2, 3 if INTERPRETED else 12))):
        if layers.pool.has_free_slot:
            running[layers.open()] = (seed, [])
        work = []
        for slot in sorted(running):
            new = data.draw(st.sampled_from([0, 1, 1, 2, 15, 40]))
            if new and layers.lengths[slot] + new <= 200:
                inputs = inputs_of(layers, 200, running[slot][0])
                work.append((slot, inputs[:, layers.lengths[slot] :][:, :new]))
        if not work:
            continue
        for (slot, _), out in zip(work, layers.step(work), strict=True):
            running[slot][1].append(out)
        if data.draw(st.booleans()):
            slot = data.draw(st.sampled_from([slot for slot, _ in work]))
            seed, out = running.pop(slot)
            found = torch.cat(out, 1)
            close(found, formula(layers, inputs_of(layers, 200, seed)[:, : found.shape[1]])[0])
            layers.raw[torch.from_numpy(layers.pool.held_ids(slot, 0)).long()] = 0xFF
            layers.pool.close(slot)


def test_pages_stay_empty_when_drafts_are_rejected() -> None:
    """A request that has fewer settled tokens than before keeps its first live page, whatever others empty."""
    drafts = 6
    layers = Layers((0.0,), heads=1, dim=24, int_dim=0, window=1, decisions="all", drafts=drafts)
    texts = [inputs_of(layers, 105, row) for row in range(2)]
    slots = [layers.open() for _ in texts]
    layers.step([(slots[0], texts[0][:, :104]), (slots[1], texts[1][:, :40])])
    before = layers.table.first_live.clone()
    layers.lengths[slots[0]] = 97
    layers.step([(slots[0], texts[0][:, 97:98]), (slots[1], texts[1][:, 40:80])])
    after = layers.table.first_live
    assert (after[slots[0]] == before[slots[0]]).all() and (after[slots[1]] > before[slots[1]]).all()


@settings(max_examples=3 if INTERPRETED else 25)
@given(data=st.data())
def test_rejected_drafts_evict_nothing(data: st.DataObject) -> None:
    """Steps whose last tokens are taken back, with what they have decided: outputs are those of the text alone."""
    drafts, rows = data.draw(st.integers(1, 6)), range(2)
    layers = Layers(
        (0.0,),
        streams=2,
        heads=1,
        dim=24,
        int_dim=0,
        window=data.draw(st.sampled_from([1, 5, 16])),
        lag=data.draw(st.integers(0, 1)),
        decisions=data.draw(st.sampled_from(["most", "most", "bursts"])),
        period=data.draw(st.sampled_from([1, 16])),
        drafts=drafts,
    )
    text, wrong = [inputs_of(layers, 200, row) for row in rows], inputs_of(layers, 200, 9)
    cut_up(wrong[0], layers.sizes)[1][..., 0] = 5.0  # what is wrong decides that most go
    slots, at = [layers.open() for _ in rows], [0 for _ in rows]
    outs: list[list[torch.Tensor]] = [[] for _ in rows]
    for step in range(6 if INTERPRETED else 16):
        work, right = [], []
        for row in rows:
            # A prompt, then a token with some drafts, of which the first few are those that follow.
            new = data.draw(st.integers(1, 90)) if not step else 1
            proposed = data.draw(st.integers(0, drafts)) if step else 0
            right.append(at[row] + new + data.draw(st.integers(0, proposed)))
            parts = text[row][:, at[row] : right[row]], wrong[:, right[row] : at[row] + new + proposed]
            work.append((slots[row], torch.cat(parts, 1)))
        for row, out in enumerate(layers.step(work)):
            outs[row].append(out[:, : right[row] - at[row]])
            at[row] = layers.lengths[slots[row]] = right[row]
    for row in rows:
        expected, seen = formula(layers, text[row][:, : at[row]])
        close(torch.cat(outs[row], 1), expected)
        held = int(layers.pool.num_pages[slots[row]]) - layers.pool.start[slots[row]]
        waiting = layers.period - 1 + 2 * drafts
        assert (held <= (seen[:, -1].flatten().numpy() + waiting) / layers.page_size + 3).all()
