"""The Triton kernels at full size on a GPU: against the formula in float64, dead pages full of NaN."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks.one_layer import OneLayer
from tests.support.harness import cut, formula, random_inputs
from vllm_fox.kernels.float8 import FP8
from vllm_fox.pages.geometry import PageGeometry
from vllm_fox.pages.messages import TableUpdate
from vllm_fox.pages.pool import PagePool
from vllm_fox.pages.tables import DeviceTables

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3, FP8: 6e-2}


def expected(inputs: dict[str, torch.Tensor], heads: int, k_norm: torch.Tensor) -> torch.Tensor:
    """The formula head by head: [T, T] matrices in float64 are large."""
    parts = []
    for h in range(heads):
        one = {name: x[:, h : h + 1].cuda() for name, x in inputs.items()}
        parts.append(formula(one, k_norm[h : h + 1].cuda()).cpu())
    return torch.cat(parts, 1)


def error(out: torch.Tensor, want: torch.Tensor) -> float:
    return ((out.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("gates", ["mixed", "never", "all", "alternating", "floor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, FP8], ids=str)
def test_long_prompt_in_chunks_then_decode(gates: str, dtype: torch.dtype) -> None:
    """8k tokens in chunks of any size, then token by token; logits bounded, as QK-norm makes them."""
    heads, dim, length = 4, 64, 8192
    model = torch.bfloat16 if dtype == FP8 else dtype
    inputs = random_inputs(length, heads, dim=dim, gates=gates, shift=True, seed=1)
    inputs["q"] = torch.nn.functional.normalize(inputs["q"], dim=-1) * dim**0.5
    norm = torch.linspace(0.5, 2, heads)[:, None].expand(heads, dim).contiguous()
    inputs = {name: x.to(model).float() if name in "qkv" else x for name, x in inputs.items()}
    bound = 2.1 * dim**0.5
    layer = OneLayer(
        heads=heads,
        dim=dim,
        page_size=64,
        dtype=model,
        kv_dtype=dtype,
        shift=True,
        k_norm=norm.to(model),
        threshold=-2 * bound - math.log(length) - 10,
        logit_bound=bound,
        num_pages=1024,
        max_pages=256,
    )
    slot, out, at = layer.open(), [], 0
    for size in [5000, 1, 2000, 127, 1000, *[1] * 64]:
        out += layer.step([(slot, cut(inputs, at, at + size))])
        at += size
    assert at == length
    got, want = torch.cat(out), expected(inputs, heads, norm)
    assert error(got, want) < TOLERANCE[dtype]
    assert error(got[-64:], want[-64:]) < TOLERANCE[dtype]
    assert (layer.pool.released_total > 0) == (gates != "never")


@pytest.mark.parametrize(
    "groups, dim, page_size", [(1, 32, 16), (4, 128, 64), (7, 64, 32), (1, 256, 128), (2, 256, 256)]
)
def test_grouped_heads_and_other_sizes(groups: int, dim: int, page_size: int) -> None:
    inputs = random_inputs(2000, 2, groups, dim, shift=True, seed=2)
    inputs = {name: x.bfloat16().float() if name in "qkv" else x for name, x in inputs.items()}
    layer = OneLayer(
        heads=2, groups=groups, dim=dim, page_size=page_size, dtype=torch.bfloat16, shift=True, threshold=-60.0
    )
    slot = layer.open()
    out = layer.step([(slot, cut(inputs, 0, 1500))]) + layer.step([(slot, cut(inputs, 1500, 1990))])
    out += [layer.step([(slot, cut(inputs, t, t + 1))])[0] for t in range(1990, 2000)]
    assert error(torch.cat(out), formula({name: x.cuda() for name, x in inputs.items()}).cpu()) < 2e-2


def test_many_ragged_rows_decode_together() -> None:
    """Live lengths from one page to hundreds in one launch, with prefill rows between them."""
    lengths = [1, 3, 64, 65, 500, 4000, 7000, 2, 1000, 63, 129, 6000] * 3
    layer = OneLayer(heads=4, dim=64, page_size=64, dtype=torch.bfloat16, shift=True, threshold=-70.0,
                     num_slots=len(lengths), num_pages=40000, max_pages=128)  # fmt: skip
    slots = [layer.open() for _ in lengths]
    data, outs = [], []
    for row, n in enumerate(lengths):
        inputs = random_inputs(n + 260, 4, dim=64, shift=True, seed=row)
        data.append({name: x.bfloat16().float() if name in "qkv" else x for name, x in inputs.items()})
    for row, n in enumerate(lengths):
        layer.step([(slots[row], cut(data[row], 0, n))])
    # Every third row prefills 200 tokens more, the others decode; then all decode.
    more = [200 if row % 3 == 0 else 1 for row in range(len(lengths))]
    outs = layer.step([(slots[r], cut(data[r], n, n + more[r])) for r, n in enumerate(lengths)])
    last = layer.step([(slots[r], cut(data[r], n + more[r], n + more[r] + 1)) for r, n in enumerate(lengths)])
    for row, n in enumerate(lengths):
        end = n + more[row] + 1
        want = formula({name: x.cuda() for name, x in cut(data[row], 0, end).items()}).cpu()
        assert error(torch.cat((outs[row], last[row])), want[n:]) < 2e-2, row


def test_table_updates_and_reports_wait_for_nothing() -> None:
    """No host synchronisation (PyTorch raises at one), and the report holds what the step left."""
    geometry = PageGeometry(streams=(6,), num_slots=4, max_chunks=8, num_chunks=30)
    pool = PagePool(num_blocks=500, streams=[6], num_slots=4, num_chunks=30, max_chunks=8)
    tables, slot = DeviceTables(geometry, 0, torch.device("cuda")), pool.open()
    slots = np.array([slot])
    tables.table.first_live.fill_(7)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step, (opened, count) in enumerate([([slot], 40), ([], 1), ([], 30)]):
            pool.reserve(slot, count)
            new, ends = np.array(opened, dtype=int), np.array([3, 5])
            update = TableUpdate(
                step, slots, pool.epoch[slots], new, pool.start[new], pool.hand_out(), np.array([slot, slot]), ends
            )
            tables.write(update)
            report = tables.report(update, lambda slots, pages, before: pages[:, None] + before)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # What a step reports of a boundary is where the slot's live range begins in the next: at 5, and then at 5 + 5.
    assert report.starts[0].tolist() == [[10] * 6, [13] * 6, [15] * 6]
    chunks = tables.table.chunk_of[slot].long()
    entries = tables.table.entries[chunks].permute(0, 2, 1).reshape(-1, 6)[:71]
    assert sorted(entries.flatten().tolist()) == sorted(pool.held_ids(slot, 0).tolist())
