"""Run the leaf functions of forgetting attention on this machine: ``python -m vllm_fox.cli.self_test cpu|cuda``.

A request of some hundred tokens is read in pieces and then goes on token by token, over real pages, with the same
functions that the engine calls: plain PyTorch on a CPU, Triton on a GPU. The result is held against the formula of
forgetting attention in float64. One JSON object with the greatest difference is printed.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from vllm_fox.families.fox.attention import ForgettingFormula, ForgettingState
from vllm_fox.kernels.forgetting.pages import ForgettingPageFormat
from vllm_fox.kernels.paged import TABLE_CHUNK, Batch, PageTable

HEADS, DIM, PAGE = 2, 64, 64
STEPS = (150, 130, 1, 1, 1)
"""New tokens of each step."""
SLOWEST, FASTEST = -0.01, -2.0
"""Log f of the two heads: the second forgets its first pages."""
THRESHOLD = -40.0
"""Of log f, summed: everything under it weighs nothing in float32."""
DTYPE = torch.float16
"""Every GPU multiplies it, and so does Triton's interpreter, which has no product of bfloat16."""
TOLERANCE = 0.01
"""On outputs of up to about 4 from inputs in float16, whose roundings are of 2^-12 each."""


def main(device: str) -> dict[str, float | int | str]:
    """Run the test.

    Args:
        device: "cpu" or "cuda".

    Returns:
        ``difference``, the greatest between an output and the formula's; ``tolerance``, what it may be;
        ``released``, pages that were found dead, and ``expected``, how many are; ``device`` and ``seconds``.
    """
    start = time.monotonic()
    rng = torch.Generator().manual_seed(0)
    total = sum(STEPS)
    q, k, v = (torch.randn(total, HEADS, DIM, generator=rng).to(DTYPE) for _ in range(3))
    log_f = torch.tensor([SLOWEST, FASTEST]).expand(total, HEADS)
    gate = log_f - torch.log(-torch.expm1(log_f))
    wanted = _formula(q, k, v, log_f)
    pages = -(-total // PAGE)
    table = PageTable(
        chunk_of=torch.tensor([[0], [1]], dtype=torch.int32, device=device),
        entries=torch.zeros(2, HEADS, TABLE_CHUNK, dtype=torch.int32, device=device),
        first_live=torch.zeros(2, HEADS, dtype=torch.int32, device=device),
    )
    ids = torch.arange(1, HEADS * pages + 1, dtype=torch.int32, device=device).view(HEADS, pages)
    table.entries[1, :, :pages] = ids
    form = ForgettingPageFormat(PAGE, DIM, DTYPE, 1, False, DTYPE)
    # Bytes that are NaN wherever nothing has been written, so that reading them shows.
    pool = torch.full(((HEADS * pages + 1) * form.page_bytes,), 0xFF, dtype=torch.uint8, device=device)
    limit = torch.full((HEADS, 1), THRESHOLD, dtype=torch.float32, device=device)
    state = ForgettingState(table, [limit], [float("inf")], form.view(pool), 1)
    layer = ForgettingFormula(0, DIM**-0.5, None, 1e-5, None, shift_k=False, shift_v=False)
    outputs, end = [], 0
    for count in STEPS:
        part, end = slice(end, end + count), end + count
        inputs = [x[part].flatten(1).to(device) for x in (q, k, v, gate)]
        out = torch.full_like(inputs[0], float("nan"))
        batch = _batch(count, end, device)
        state.begin_step(batch)
        layer.forward(inputs, batch, state, out)
        state.end_step(batch)
        outputs.append(out.view(count, HEADS, DIM).cpu())
    difference = (torch.cat(outputs).double() - wanted).abs().max().item()
    return {
        "difference": difference,
        "tolerance": TOLERANCE,
        "released": int(table.first_live[1].sum()),
        # Every page of the second head whose last token lies further back than its window.
        "expected": int((total - 1 - THRESHOLD / FASTEST) // PAGE),
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "seconds": round(time.monotonic() - start, 1),
    }


def _batch(count: int, end: int, device: str) -> Batch:
    """One row, in slot 1."""
    return Batch.of(
        query_start=torch.tensor([0, count], dtype=torch.int32, device=device),
        seq_lens=torch.tensor([end], dtype=torch.int32, device=device),
        slots=torch.ones(1, dtype=torch.int32, device=device),
        query_lens_host=[count],
        seq_lens_host=[end],
        page_size=PAGE,
    )


def _formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_f: torch.Tensor) -> torch.Tensor:
    """Forgetting attention (arXiv 2503.02130) of one sequence: [T, H, d] float64 from tensors of that shape."""
    sums = log_f.double().cumsum(0).T
    logits = torch.einsum("ihd,jhd->hij", q.double(), k.double()) / DIM**0.5
    logits = logits + sums[:, :, None] - sums[:, None]
    later = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    return torch.einsum("hij,jhd->ihd", logits.masked_fill(later, -torch.inf).softmax(-1), v.double())


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
