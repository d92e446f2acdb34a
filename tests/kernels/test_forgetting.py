"""Leaf functions against the formula in float64: through real pages, in chunks, with dead pages poisoned."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.one_layer import DEVICE, OneLayer
from tests.support.harness import cut, formula, random_inputs
from vllm_fox.kernels.acp import pruning_threshold
from vllm_fox.kernels.float8 import FP8
from vllm_fox.kernels.forgetting.pages import LIVE_RANGE_PERIOD
from vllm_fox.kernels.forgetting.prefill.plan import PrefillPlan
from vllm_fox.kernels.paged import TABLE_CHUNK, PageTable
from vllm_fox.kernels.table_update import table_update

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GATES = ["mixed", "never", "all", "alternating", "floor"]
# float32 only: u times the decay and page sums of up to 50 that D is a difference of.
EXACT = 3e-6 if DEVICE == "cpu" else 1e-5


def close(out: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = (out.double() - expected).norm() / expected.norm()
    assert error < tolerance, float(error)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
def test_chunked_prefill_then_decode(gates: str, page_size: int) -> None:
    """Any split of a sequence into steps gives the formula's output; freed pages are NaN and are not read."""
    inputs = random_inputs(300, gates=gates, shift=True, seed=page_size)
    if INTERPRETED and page_size in (32, 128):
        pytest.skip("left out of the interpreter's run to save time")
    bound = 8.0  # |q.k|/sqrt(d) of these inputs stays below
    layer = OneLayer(page_size=page_size, shift=True, threshold=-2 * bound - math.log(300) - 10, logit_bound=bound)
    slot = layer.open()
    out, at = [], 0
    # Token by token over a page's end; the interpreter is slow.
    for size in [1, 37, 100, 146, *[1] * (6 if INTERPRETED else 16)]:
        out += layer.step([(slot, cut(inputs, at, at + size))])
        at += size
    close(torch.cat(out), formula(cut(inputs, 0, at)), 3e-5 if gates == "floor" else EXACT)
    freed = layer.pool.released_total
    if gates == "never":
        assert freed == 0
    if gates in ("all", "floor") and page_size <= 64:
        assert freed > 0


def test_one_plan_serves_all_layers_of_a_step() -> None:
    """Tiles are sorted anew in each, whatever the layer before has left."""
    inputs = cut(random_inputs(300, gates="mixed", seed=5), 0, 300)
    layer = OneLayer(threshold=-16 - math.log(300) - 10, logit_bound=8.0)
    step, batch = layer.prepare([(layer.open(), inputs)])
    layer.state.begin_step(batch)
    if layer.state.prefill_workspace is not None:  # so few tiles would not be sorted
        assert batch.work is not None
        layer.state.prefill_workspace = PrefillPlan(batch.work, layer.heads, layer.groups, sort=True)
    for _ in range(3):
        out = torch.full_like(step.q, float("nan"))
        layer.impl.forward(step.flat(), batch, layer.state, out.flatten(1))
        close(out.cpu(), formula(inputs), EXACT)


@pytest.mark.parametrize("dim", [32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_head_sizes(dim: int, dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no bfloat16 dot product")
    inputs = random_inputs(200, dim=dim, shift=True)
    inputs = {name: x.to(dtype) if name in "qkv" else x for name, x in inputs.items()}
    layer = OneLayer(dim=dim, dtype=dtype, shift=True, page_size=32)
    slot = layer.open()
    out = torch.cat(
        [*layer.step([(slot, cut(inputs, 0, 190))])]
        + [layer.step([(slot, cut(inputs, t, t + 1))])[0] for t in range(190, 200)]
    )
    # sqrt(4/3) u: k and v after the shift, weights and output are rounded, each by u/sqrt(3) at most.
    close(out, formula(inputs), {torch.float32: EXACT, torch.bfloat16: 4.5e-3, torch.float16: 5.6e-4}[dtype])


def test_grouped_queries_norm_and_rotation() -> None:
    """A page lives as long as any query head that shares it needs it."""
    norm = torch.rand(2, 32) + 0.5
    inputs = random_inputs(260, heads=2, groups=3, shift=True)
    layer = OneLayer(groups=3, shift=True, k_norm=norm, rope_base=10000.0, threshold=-25.0)
    slot = layer.open()
    out = layer.step([(slot, cut(inputs, 0, 150))]) + layer.step([(slot, cut(inputs, 150, 259))])
    out += layer.step([(slot, cut(inputs, 259, 260))])
    # Angles of 260 rad from frequencies off by up to 1e-6, over many pairs.
    close(torch.cat(out), formula(inputs, norm, 10000.0), 1e-5 if DEVICE == "cpu" else 1e-4)
    assert layer.table.first_live[slot, 0] == 0  # its first gate never forgets
    assert layer.table.first_live[slot, 1] > 0


def test_one_remembering_head_keeps_its_groups_pages() -> None:
    """Of two query heads that share a KV head one forgets everything at once, the other nothing."""
    inputs = random_inputs(300, heads=1, groups=2, gates="never")
    inputs["log_f"][:, :, 0] = -5.0
    layer = OneLayer(heads=1, groups=2, threshold=-60.0)
    slot = layer.open()
    out = layer.step([(slot, cut(inputs, 0, 130))]) + layer.step([(slot, cut(inputs, 130, 299))])
    out += layer.step([(slot, cut(inputs, 299, 300))])
    close(torch.cat(out), formula(inputs), EXACT)
    assert layer.pool.released_total == 0


def test_mixed_batch_of_ragged_rows() -> None:
    """Prefill and decode rows of very different lengths in one step do not disturb each other."""
    lengths = [1, 17, 64, 250]
    data = [random_inputs(n + 3, seed=n, shift=True) for n in lengths]
    layer = OneLayer(shift=True, threshold=-60.0)
    slots = [layer.open() for _ in lengths]
    outs: list[list[torch.Tensor]] = [[] for _ in lengths]
    for row, length in enumerate(lengths[:2]):
        outs[row] += layer.step([(slots[row], cut(data[row], 0, length))])
    # First two decode while the last two prefill; then all decode together.
    work = [(slots[r], cut(data[r], n, n + 1) if r < 2 else cut(data[r], 0, n)) for r, n in enumerate(lengths)]
    for row, part in enumerate(layer.step(work)):
        outs[row].append(part)
    done = [n + 1 if r < 2 else n for r, n in enumerate(lengths)]
    work = [(slots[r], cut(data[r], done[r], done[r] + 1)) for r in range(4)]
    for row, part in enumerate(layer.step(work)):
        outs[row].append(part)
    for row in range(4):
        got = torch.cat(outs[row])
        close(got, formula(cut(data[row], 0, len(got))), EXACT)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", ["q", "k", "v", "log_f", "shift_k"])
def test_a_request_of_nan_stays_alone(name: str, scaled: bool) -> None:
    """Rows before and after it, in prefill and decode, have the outputs that they have without it."""
    if INTERPRETED and name not in ("k", "log_f"):
        pytest.skip("left out of the interpreter's run to save time")
    data = [random_inputs(60, seed=n, shift=True) for n in range(3)]
    kind = {"kv_dtype": FP8, "dtype": torch.float16} if scaled else {}

    def outputs(inputs: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        layer = OneLayer(shift=True, threshold=-60.0, **kind)
        slots = [layer.open() for _ in inputs]
        outs = [
            layer.step([(slot, cut(one, *part)) for slot, one in zip(slots, inputs, strict=True)])
            for part in [(0, 40), (40, 41), (41, 42), (42, 58), (58, 59)]
        ]
        return [torch.cat([out[row] for out in outs]) for row in range(len(inputs))]

    alone = outputs([data[0], data[2]])
    data[1] = {**data[1], name: torch.full_like(data[1][name], torch.nan)}
    together = outputs(data)
    # Work is shared out by the batch, so an output may be rounded to its other neighbour.
    tolerance = 2**-11 if scaled else EXACT
    close(together[0], alone[0].double(), tolerance)
    close(together[2], alone[1].double(), tolerance)


def test_pages_are_reused_by_another_request_while_the_first_runs() -> None:
    """A small pool, in which a second request fits only into what the first gave back."""
    inputs = [random_inputs(400, gates="alternating", seed=s) for s in range(2)]
    layer = OneLayer(threshold=-60.0, num_pages=2 + 2 * 20, max_pages=32)
    slots = [layer.open(), layer.open()]
    outs: list[list[torch.Tensor]] = [[], []]
    for t in range(0, 400, 40):  # 25 pages a stream each in the end; the pool has 20
        for row in range(2):
            outs[row] += layer.step([(slots[row], cut(inputs[row], t, t + 40))])
    for row in range(2):
        close(torch.cat(outs[row]), formula(inputs[row]), EXACT)


@pytest.mark.parametrize("log_eps", [-10.0, -4.0])
def test_pruned_weight_is_at_most_eps(log_eps: float) -> None:
    """With the threshold of ACP the output differs from the unpruned one by at most 2 eps max|v|."""
    inputs = random_inputs(512, gates="mixed", heads=4, seed=3)
    inputs["q"] = torch.nn.functional.normalize(inputs["q"], dim=-1) * 32**0.5 * 0.7
    inputs["k"] = torch.nn.functional.normalize(inputs["k"], dim=-1) * 32**0.5 * 0.7
    bound = 0.49 * 32**0.5
    layer = OneLayer(heads=4, threshold=-2 * bound - math.log(512) + log_eps)
    slot = layer.open()
    out = torch.cat(layer.step([(slot, cut(inputs, 0, 256))]) + layer.step([(slot, cut(inputs, 256, 512))]))
    assert layer.pool.released_total > 0
    worst = (out.double() - formula(inputs)).abs().max()
    assert worst <= (2 * math.exp(log_eps) + EXACT) * inputs["v"].abs().max()


@pytest.mark.parametrize("log_eps", [-10.0, -4.0])
def test_pruned_weight_is_at_most_eps_in_the_worst_case(log_eps: float) -> None:
    """Random inputs use little of what ACP allows. Here all keys that are pruned, and only they, have the largest
    logit there can be, the query's own key the smallest, and the gates stop just below the threshold."""
    first, length, dim = 480, 512, 32
    size, unit = 0.7 * dim**0.5, torch.eye(dim)[0]
    sign = torch.ones(length)
    sign[first:] = -1.0
    bound = size**2 / dim**0.5
    threshold = pruning_threshold(bound, length, log_eps)
    inputs = {
        "q": (size * unit).expand(length, 1, 1, dim),
        "k": size * sign[:, None, None] * unit,
        "v": sign[:, None, None].expand(length, 1, dim).contiguous(),
        "log_f": torch.zeros(length, 1, 1),
    }
    inputs["log_f"][first] = threshold - 1e-3
    layer = OneLayer(heads=1, threshold=threshold)
    slot = layer.open()
    parts = [(0, first), (first, length)]
    out = torch.cat([layer.step([(slot, cut(inputs, *part))])[0] for part in parts])
    assert layer.pool.released_total > 0
    worst, allowed = (out.double() - formula(inputs)).abs().max().item(), 2 * math.exp(log_eps)
    print(f"{worst / allowed:.2f} of what is allowed")
    # Were less pruned than should be, or nothing, the test would show nothing.
    assert 0.9 * allowed < worst <= allowed + EXACT


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float8_pages(page_size: int, dtype: torch.dtype) -> None:
    """One scale a page, which grows with what comes into it; small pages beside large ones stay precise."""
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no bfloat16 dot product")
    inputs = random_inputs(200, gates="alternating", shift=True, seed=7)
    size = torch.ones(200)
    size[:100] = torch.linspace(-6, 0, 100).exp2()  # the scale of the first pages grows step by step
    size[150:] = 1 / 64
    inputs["v"] = inputs["v"] * size[:, None, None]
    norm = torch.full((2, 32), 2.0)
    layer = OneLayer(page_size=page_size, dtype=dtype, kv_dtype=FP8, shift=True, k_norm=norm, threshold=-60.0)
    slot, out, at = layer.open(), [], 0
    for length in [*[1] * 20, 45, *[1] * 5, 130]:
        out += layer.step([(slot, cut(inputs, at, at + length))])
        at += length
    got, expected = torch.cat(out).double(), formula(inputs, norm)
    # The interpreter rounds to float8 towards zero, which doubles the error.
    for part in (slice(0, 20), slice(20, 100), slice(100, 150), slice(160, 200)):
        close(got[part], expected[part], 0.12 if INTERPRETED else 0.06)


@pytest.mark.parametrize("kv_dtype", [FP8, None])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("sink, size", [(44.0, 2.0**-7), (112.0, 2.0**10)])
def test_small_weights_beside_a_sink(
    sink: float, size: float, dtype: torch.dtype, tolerance: float, kv_dtype: torch.dtype | None
) -> None:
    """The first token takes nearly all weight and adds nothing, so what is left are small weights.

    Those of small values give no normal number in float16 when a float8 page's scale multiplies them. The others
    are 2^-29, which float16 does not have.
    """
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no bfloat16 dot product")
    length, dim, rng = 260, 32, torch.Generator().manual_seed(0)
    unit = torch.eye(dim)[0]
    inputs = {
        "q": unit.expand(length, 1, 1, dim).contiguous(),
        "k": torch.zeros(length, 1, dim),
        "v": torch.randint(2, (length, 1, dim), generator=rng).mul(2.0).sub(1.0) * size,
        "log_f": torch.zeros(length, 1, 1),
    }
    inputs["k"][0], inputs["v"][0] = sink * unit, 0.0  # numbers that float8 has
    layer = OneLayer(heads=1, page_size=64, dtype=dtype, kv_dtype=kv_dtype)
    slot = layer.open()
    out = layer.step([(slot, cut(inputs, 0, 250))])
    out += [layer.step([(slot, cut(inputs, t, t + 1))])[0] for t in range(250, length)]
    # Weights and output are rounded.
    close(torch.cat(out[:1]), formula(inputs)[:250], tolerance)
    close(torch.cat(out[1:]), formula(inputs)[250:], tolerance)


@pytest.mark.parametrize("large", [0, 1])
def test_heads_of_a_group_differ_beside_float8_pages(large: int) -> None:
    """In bfloat16 queries of one head may be above the largest float16, and infinite, and those of another need all
    their bits."""
    inputs = random_inputs(40, heads=1, groups=2, gates="never")
    inputs["q"][:, :, large] *= 2.0**22
    inputs["q"] = inputs["q"].bfloat16().float()
    for name in "kv":
        inputs[name] = (inputs[name] * 8).round().clamp(-15, 15) / 8  # numbers that float8 has
    expected = formula(inputs)
    inputs["q"][30, 0, large, 0] = torch.inf
    # The interpreter has no bfloat16 dot product, which prompts need.
    for lengths in [[1] * 40] if INTERPRETED else [[1] * 40, [40]]:
        layer = OneLayer(heads=1, groups=2, dtype=torch.bfloat16, kv_dtype=FP8)
        slot, out, at = layer.open(), [], 0
        for length in lengths:
            out += layer.step([(slot, cut(inputs, at, at + length))])
            at += length
        got = torch.cat(out)
        assert got[30, :, large].isnan().all()
        close(got[:, :, 1 - large], expected[:, :, 1 - large], 8e-3)  # weights and output are rounded
        rest = torch.arange(40) != 30
        close(got[rest], expected[rest], 8e-3)


@pytest.mark.parametrize("kv_dtype", [FP8, None])
def test_logits_too_large_for_small_steps(kv_dtype: torch.dtype | None) -> None:
    """Float32 numbers as large as these logits are 8 apart. All logits are the same, and so are all weights."""
    length, dim = 150, 32
    unit = torch.eye(dim)[0] * 2.0**14
    inputs = {
        "q": unit.expand(length, 1, 1, dim).contiguous(),
        "k": unit.expand(length, 1, dim).contiguous(),
        "v": torch.arange(length).remainder(4).float()[:, None, None].expand(length, 1, dim).contiguous(),
        "log_f": torch.zeros(length, 1, 1),
    }
    layer = OneLayer(heads=1, page_size=16, dtype=torch.float16, kv_dtype=kv_dtype)
    slot = layer.open()
    out = layer.step([(slot, cut(inputs, 0, 140))])
    out += [layer.step([(slot, cut(inputs, t, t + 1))])[0] for t in range(140, length)]
    close(torch.cat(out), formula(inputs), 1e-3)


def test_table_update_writes_what_is_new_and_nothing_else() -> None:
    """As a loop over its parts does; more streams than a program of the kernel takes."""
    streams, rng = 300, np.random.default_rng(0)
    tables = [
        torch.from_numpy(rng.integers(1, 99, shape).astype(np.int32))
        for shape in ((5, 4), (9, streams, TABLE_CHUNK), (5, streams))
    ]
    want = [x.clone() for x in tables]
    opened, chunks, columns = [2, 4], [(2, 0, 7), (2, 1, 3), (4, 3, 8)], [(7, 15), (3, 0), (3, 1), (8, 5)]
    ids = rng.integers(100, 999, (len(columns), streams)).astype(np.int32)
    first = rng.integers(0, 9, (len(opened), streams)).astype(np.int32)
    for slot, pages in zip(opened, first):
        want[2][slot] = torch.from_numpy(pages)
    for slot, index, chunk in chunks:
        want[0][slot, index] = chunk
    for (chunk, offset), pages in zip(columns, ids):
        want[1][chunk, :, offset] = torch.from_numpy(pages)
    # Parts of one array, as they come: no part but the first is aligned.
    parts = [opened, first.ravel(), *zip(*chunks), *zip(*columns), ids.ravel()]
    packed = torch.from_numpy(np.concatenate([np.array(part, dtype=np.int32) for part in parts]))
    table = PageTable(*(x.to(DEVICE) for x in tables))
    names = ("opened", "first", "chunk_slot", "chunk_index", "chunk_id", "column_chunk", "column_offset", "ids")
    table_update(table, **dict(zip(names, packed.to(DEVICE).split([len(part) for part in parts]), strict=True)))
    for found, expected in zip((table.chunk_of, table.entries, table.first_live), want):
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("groups, page_size", [(1, 16), (3, 32)])
def test_live_ranges_of_the_past(groups: int, page_size: int) -> None:
    """At every boundary inside a step they are what the formula says, and what a step that ends there leaves."""
    count, threshold = 400, -9.0
    inputs = random_inputs(count, heads=3, groups=groups, gates="mixed", seed=groups)
    one_step, many = (OneLayer(heads=3, groups=groups, page_size=page_size, threshold=threshold) for _ in range(2))
    slot, other = one_step.open(), many.open()
    one_step.step([(slot, cut(inputs, 0, 64))])
    before = one_step.table.first_live[[slot]].clone()
    one_step.step([(slot, cut(inputs, 64, count))], release=False)
    boundaries = torch.arange(64 // page_size + 1, count // page_size + 1, dtype=torch.int32, device=DEVICE)
    found = one_step.state.first_live_at(
        torch.full_like(boundaries, slot), boundaries, before.expand(len(boundaries), -1).contiguous()
    )
    decay = inputs["log_f"].double().cumsum(0)
    at = 0
    for boundary, row in zip(boundaries.tolist(), found.cpu()):
        end = boundary * page_size
        last_keys = torch.arange(page_size - 1, end, page_size)
        alive = (decay[end - 1] - decay[last_keys] >= threshold).any(-1)  # [pages, heads]
        alive[-1] = True
        assert torch.equal(row.long(), alive.int().argmax(0)), boundary
        many.step([(other, cut(inputs, at, end))])
        at = end
        assert torch.equal(row, many.table.first_live[other].cpu()), boundary
    assert (found[-1] > 0).any() and (found[-1] > found[0]).any()


def test_live_ranges_do_not_go_back() -> None:
    """A step of few drafts after one of many, all of them rejected, has fewer settled tokens."""
    inputs = random_inputs(30, gates="all")
    layer = OneLayer(threshold=-60.0, drafts=6)
    slot, found = layer.open(), []
    for length, written in [(0, 17), (17, 24), (18, 20)]:
        layer.lengths[slot] = length
        layer.step([(slot, cut(inputs, length, written))])
        found.append(layer.table.first_live[slot].tolist())
    assert found == [[0, 0], [1, 1], [1, 1]]


@settings(max_examples=3 if INTERPRETED else 20)
@given(data=st.data())
def test_rejected_drafts_leave_nothing(data: st.DataObject) -> None:
    """Steps whose last tokens are taken back, strong gates and all: outputs and pages are those of the text alone.

    Dead pages are full of NaN, and the first live page is always that of the formula without the newest tokens.
    """
    drafts, groups = data.draw(st.integers(1, 6)), data.draw(st.sampled_from([1, 3]))
    scaled, threshold, rows = data.draw(st.booleans()), -60.0, range(2)
    options = {"kv_dtype": FP8, "dtype": torch.float16} if scaled else {}
    gates = ["alternating", data.draw(st.sampled_from(["mixed", "all"]))]
    text = [random_inputs(130, groups=groups, gates=kind, shift=True, seed=5) for kind in gates]
    wrong = random_inputs(130, groups=groups, gates="all", shift=True, seed=9)
    layer = OneLayer(groups=groups, shift=True, threshold=threshold, drafts=drafts, **options)
    plain = OneLayer(groups=groups, shift=True, **options)
    slots, others = ([one.open() for _ in rows] for one in (layer, plain))
    decay = [inputs["log_f"].double().cumsum(0) for inputs in text]
    outs: list[list[torch.Tensor]] = [[] for _ in rows]
    at = [0 for _ in rows]
    for step in range(5 if INTERPRETED else 13):
        work, right = [], []
        for row in rows:
            # A prompt, then a token with some drafts, of which the first few are those that follow.
            new = data.draw(st.integers(1, 40)) if not step else 1
            proposed = data.draw(st.integers(0, drafts)) if step else 0
            right.append(new + data.draw(st.integers(0, proposed)))
            bad = slice(at[row] + right[row], at[row] + new + proposed)
            parts = (text[row][name][at[row] : bad.start] for name in wrong), (wrong[name][bad] for name in wrong)
            work.append((slots[row], dict(zip(wrong, map(torch.cat, zip(*parts)), strict=True))))
        before = layer.table.first_live[slots].cpu()
        steps = layer.step(work)
        plain.step([(others[row], cut(text[row], at[row], at[row] + right[row])) for row in rows])
        for row in rows:
            written = layer.lengths[slots[row]]
            outs[row].append(steps[row][: right[row]])
            at[row] += right[row]
            layer.lengths[slots[row]] = at[row]
            if len(steps[row]) > 1 or written % LIVE_RANGE_PERIOD == 0:
                settled = max(written - drafts, 1)
                last_keys = torch.arange((settled - 1) // layer.page_size) * layer.page_size + layer.page_size - 1
                dead = (decay[row][settled - 1] - decay[row][last_keys] < threshold).all(-1).sum(0)
                found = layer.table.first_live[slots[row]].cpu()
                assert torch.equal(found, torch.maximum(before[row], dead.int()))
    for row in rows:
        out, expected = torch.cat(outs[row]), formula(cut(text[row], 0, at[row]))
        close(out, expected, (0.12 if INTERPRETED else 0.06) if scaled else EXACT)
        if scaled:
            continue  # rejected drafts may have made the scale of a page larger
        position = torch.arange(int(layer.table.first_live[slots[row]].max()) * layer.page_size, at[row])
        page, offset = position // layer.page_size, (position % layer.page_size).to(DEVICE)
        here, there = (
            (one.table.page_ids(torch.tensor(slot), page[:, None], torch.arange(2)), one.pages)
            for one, slot in ((layer, slots[row]), (plain, others[row]))
        )
        for name in ("k", "v"):
            found, want = (getattr(pages, name)[ids, offset[:, None]] for ids, pages in (here, there))
            assert torch.equal(found, want)
        sums, want = (pages.gates[ids, :, offset[:, None]] for ids, pages in (here, there))
        torch.testing.assert_close(sums, want, rtol=1e-6, atol=1e-6)
        ids, pages = here
        assert pages.last is not None and there[1].last is not None
        assert torch.equal(pages.last[ids[-1], offset[-1] % (1 + drafts)], there[1].last[there[0][-1], 0])
