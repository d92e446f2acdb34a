"""Run the leaf functions of every family on this machine: ``python -m vllm_fox.cli.self_test cpu|cuda``.

A layer of each family is made on the spot, with random inputs. A request of some hundred tokens is read in pieces
and then goes on token by token, over real pages, with the same functions that the engine calls: plain PyTorch on a
CPU, Triton on a GPU. The result is held against the family's formula in float64. One JSON object with the greatest
differences is printed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from vllm_fox.attention.step import Formula, WorkerState
from vllm_fox.families.evicting.attention import EvictingFormula, EvictingState
from vllm_fox.families.fox.attention import ForgettingFormula, ForgettingState
from vllm_fox.families.sparse_gpt2.attention import SubsetFormula, SubsetState
from vllm_fox.kernels.forgetting.pages import ForgettingPageFormat
from vllm_fox.kernels.paged import TABLE_CHUNK, Batch, PageTable
from vllm_fox.kernels.subset.pages import SubsetPageFormat

HEADS, DIM = 2, 64
STEPS = (150, 135, 1, 1, 1)
"""New tokens of each step. Together they fill pages of 32 tokens: then decoders that evict give pages back."""
TOTAL = sum(STEPS)
FOX_PAGE, SUBSET_PAGE = 64, 32
"""Tokens per page, so that the request's pages fit into a chunk of the page table."""
SLOWEST, FASTEST = -0.01, -2.0
"""Log f of the two heads of a Forgetting Transformer: the second forgets its first pages."""
THRESHOLD = -40.0
"""Of log f, summed: everything under it weighs nothing in float32."""
INT_DIM, INT_BIAS = 16, 2.0
"""Size of interaction keys (DCP), and bias of their scores: most tokens are dropped some time."""
WINDOW, GROUPS = 40, 2
"""Tokens after which an evicted token goes (DMS, KVzap), and query heads of a KV head."""
DTYPE = torch.float16
"""Every GPU multiplies it, and so does Triton's interpreter, which has no product of bfloat16."""
TOLERANCE = 0.01
"""On outputs of up to about 4 from inputs in float16, whose roundings are of 2^-12 each."""


def main(device: str) -> dict[str, Any]:
    """Run the test.

    Args:
        device: "cpu" or "cuda".

    Returns:
        ``families``: for each, its ``family``, ``difference``, the greatest between an output and the formula's,
        ``released``, pages that were found dead, and ``expected``, how many are; ``tolerance``, what differences
        may be; ``device`` and ``seconds``.
    """
    start = time.monotonic()
    tests = {
        "Forgetting Transformers": forgetting,
        "Sparse GPT-2 models": sparse_gpt2,
        "Decoders that evict tokens": evicting,
    }
    return {
        "families": [{"family": name, **test(device)} for name, test in tests.items()],
        "tolerance": TOLERANCE,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "seconds": round(time.monotonic() - start, 1),
    }


def forgetting(device: str) -> dict[str, float | int]:
    """Forgetting attention (arXiv 2503.02130)."""
    q, k, v = _random(3, HEADS, DIM)
    log_f = torch.tensor([SLOWEST, FASTEST]).expand(TOTAL, HEADS)
    gate = log_f - torch.log(-torch.expm1(log_f))
    sums = log_f.double().cumsum(0).T
    wanted = _attention(q, k, v, _causal().expand(HEADS, -1, -1), sums[:, :, None] - sums[:, None])
    form = ForgettingPageFormat(FOX_PAGE, DIM, DTYPE, 1, False, DTYPE)
    limit = torch.full((HEADS, 1), THRESHOLD, dtype=torch.float32, device=device)
    table, pool = _pages(HEADS, form, device)
    state = ForgettingState(table, [limit], [float("inf")], form.view(pool), 1)
    layer = ForgettingFormula(0, DIM**-0.5, None, 1e-5, None, shift_k=False, shift_v=False)
    # Every page of the second head whose last token lies further back than its window.
    dead = int((TOTAL - 1 - THRESHOLD / FASTEST) // FOX_PAGE)
    return _run(layer, state, [q, k, v, gate], FOX_PAGE, wanted, dead)


def sparse_gpt2(device: str) -> dict[str, float | int]:
    """Dynamic Context Pruning (arXiv 2305.15805): a query drops for good the tokens whose score is not positive."""
    q, k, v = _random(3, HEADS, DIM)
    int_q, int_k = _random(2, INT_DIM)
    scores = int_q.double() @ int_k.double().T / INT_DIM**0.5 + INT_BIAS
    # A token is not dropped by queries up to itself.
    visible = _causal() & ((scores > 0) | ~_causal().tril(-1)).cumprod(0).bool()
    form = SubsetPageFormat(SUBSET_PAGE, HEADS, DIM, INT_DIM, DTYPE, DTYPE)
    table, pool = _pages(1, form, device)
    state = SubsetState(table, form.view(pool), 1, 1, TOTAL, propagate=False)
    layer = SubsetFormula(0, DIM**-0.5, torch.tensor([INT_BIAS], device=device))
    wanted = _attention(q, k, v, visible.expand(HEADS, -1, -1))
    dropped = int((~visible[-1]).sum())
    return _run(layer, state, [q, k, v, int_q, int_k], SUBSET_PAGE, wanted, dropped // SUBSET_PAGE)


def evicting(device: str) -> dict[str, float | int]:
    """DMS and KVzap: each KV head evicts tokens a window after they were read."""
    (q,), (k, v) = _random(1, HEADS * GROUPS, DIM), _random(2, HEADS, DIM)
    evicts = k[:, :, 0] > -0.5
    position = torch.arange(TOTAL)
    inside = position[:, None] - position <= WINDOW
    visible = (_causal() & (inside | ~evicts.T[:, None])).repeat_interleave(GROUPS, 0)
    wanted = _attention(q, k.repeat_interleave(GROUPS, 1), v.repeat_interleave(GROUPS, 1), visible)
    form = SubsetPageFormat(SUBSET_PAGE, 1, DIM, 0, DTYPE, DTYPE)
    table, pool = _pages(HEADS, form, device)
    state = EvictingState(
        table, form.view(pool), layers=1, heads=HEADS, groups=GROUPS, max_rows=1, max_model_len=TOTAL
    )
    layer = EvictingFormula(0, DIM**-0.5, WINDOW, 0)
    # What the next query, at position TOTAL, does not see.
    dropped = evicts[: TOTAL - WINDOW].sum(0)
    return _run(layer, state, [q, k, v, evicts], SUBSET_PAGE, wanted, int((dropped // SUBSET_PAGE).sum()))


def _random(count: int, *shape: int) -> list[torch.Tensor]:
    """``count`` tensors [TOTAL, \\*shape], the same in every run."""
    rng = torch.Generator().manual_seed(count + 10 * len(shape))
    return [torch.randn(TOTAL, *shape, generator=rng).to(DTYPE) for _ in range(count)]


def _causal() -> torch.Tensor:
    return torch.ones(TOTAL, TOTAL, dtype=torch.bool).tril()


def _pages(streams: int, form: Any, device: str) -> tuple[PageTable, torch.Tensor]:
    """The page table of a request in slot 1, and a pool with just its pages."""
    pages = -(-TOTAL // form.page_size)
    table = PageTable(
        chunk_of=torch.tensor([[0], [1]], dtype=torch.int32, device=device),
        entries=torch.zeros(2, streams, TABLE_CHUNK, dtype=torch.int32, device=device),
        first_live=torch.zeros(2, streams, dtype=torch.int32, device=device),
    )
    ids = torch.arange(1, streams * pages + 1, dtype=torch.int32, device=device)
    table.entries[1, :, :pages] = ids.view(streams, pages)
    # Bytes that are NaN wherever nothing has been written, so that reading them shows.
    size = (streams * pages + 1) * form.page_bytes
    return table, torch.full((size,), 0xFF, dtype=torch.uint8, device=device)


def _run(
    layer: Formula[Any],
    state: WorkerState,
    inputs: Sequence[torch.Tensor],
    page_size: int,
    wanted: torch.Tensor,
    expected: int,
) -> dict[str, float | int]:
    """Run all steps; return the greatest difference from ``wanted`` [TOTAL, heads, d], and the dead pages."""
    device, outputs, end = state.table.entries.device, [], 0
    for count in STEPS:
        part, end = slice(end, end + count), end + count
        given = [x[part].flatten(1).to(device) for x in inputs]
        out = torch.full_like(given[0], float("nan"))
        batch = _batch(count, end, page_size, device)
        state.begin_step(batch)
        layer.forward(given, batch, state, out)
        state.end_step(batch)
        outputs.append(out.view(count, -1, DIM).cpu())
    return {
        "difference": (torch.cat(outputs).double() - wanted).abs().max().item(),
        "released": int(state.table.first_live[1].sum()),
        "expected": expected,
    }


def _batch(count: int, end: int, page_size: int, device: torch.device) -> Batch:
    """One row, in slot 1."""
    return Batch.of(
        query_start=torch.tensor([0, count], dtype=torch.int32, device=device),
        seq_lens=torch.tensor([end], dtype=torch.int32, device=device),
        slots=torch.ones(1, dtype=torch.int32, device=device),
        query_lens_host=[count],
        seq_lens_host=[end],
        page_size=page_size,
    )


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, bias: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """Attention [T, H, d] in float64 from q, k, v of that shape, where ``visible`` [H, T, T]; ``bias`` likewise."""
    logits = torch.einsum("ihd,jhd->hij", q.double(), k.double()) / DIM**0.5 + bias
    return torch.einsum("hij,jhd->ihd", logits.masked_fill(~visible, -torch.inf).softmax(-1), v.double())


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
