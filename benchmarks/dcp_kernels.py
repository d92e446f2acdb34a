"""The kernels of a decode step of Dynamic Context Pruning on one GPU, beside what their bytes would take to copy.

python -m benchmarks.dcp_kernels [--rows 64 512 2048] [--context 1024]

A layer of 12 heads of 64 (GPT-2 small's) and random inputs, with a bias for each share of live tokens asked for.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import torch

from benchmarks.kernels import timed
from benchmarks.one_layer import batch_of, extend, pool_and_table
from benchmarks.options import Parser, inner_fraction, integer, positive_int
from benchmarks.peers import copy_bandwidth
from benchmarks.record import save
from vllm_fox.kernels.subset.attention import make_workspace, subset_attention
from vllm_fox.kernels.subset.attention.workspace import SeenTokens
from vllm_fox.kernels.subset.compaction import compact
from vllm_fox.kernels.subset.drop_times import drop_times
from vllm_fox.kernels.subset.pages import SubsetPageFormat
from vllm_fox.kernels.subset.write import subset_write

HEADS, DIM, INTS, PAGE = 12, 64, 64, 16
TOGETHER = 32
"""Prompts that are read at once."""


def bias_of(live: float, context: int) -> float:
    """Of standard normal scores, so that a query of the last position sees about ``live`` of the context."""
    low, high = 0.0, 1.0  # chance that a query drops a token: of n earlier queries, none did
    for _ in range(60):
        chance = (low + high) / 2
        seen = (1 - (1 - chance) ** context) / (chance * context)
        low, high = (chance, high) if seen > live else (low, chance)
    return -NormalDist().inv_cdf(high)


def decode(rows: int, context: int, live: float, bandwidth: float) -> dict[str, Any]:
    """Milliseconds of each kernel for ``rows`` requests of ``context`` tokens, and of copying their bytes."""
    pages_each = -(-context // PAGE)
    form = SubsetPageFormat(PAGE, HEADS, DIM, INTS, torch.bfloat16, torch.bfloat16)
    pages = form.view(torch.zeros((rows * pages_each + 1) * form.page_bytes, dtype=torch.uint8, device="cuda"))
    pool, table = pool_and_table(1, rows, rows * pages_each + 1, pages_each + 16)
    bias = torch.tensor([bias_of(live, context)], device="cuda")
    workspace = make_workspace(pages, layers=1, streams=1, groups=1, max_rows=rows, max_model_len=context)
    assert isinstance(workspace, SeenTokens)
    slots = [pool.open() for _ in range(rows)]
    for slot in slots:
        extend(pool, table, slot, context, PAGE)

    def inputs(tokens: int) -> tuple[torch.Tensor, ...]:
        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

        keys = (draw(tokens, 1, HEADS, DIM) for _ in range(2))
        return draw(tokens, 1, HEADS, 1, DIM), *keys, *(draw(tokens, 1, INTS) for _ in range(2))

    for start in range(0, rows, TOGETHER):
        mine = slots[start : start + TOGETHER]
        batch = batch_of([context - 1] * len(mine), [context - 1] * len(mine), mine, PAGE)
        _, k, v, int_q, int_k = inputs((context - 1) * len(mine))
        subset_write(pages, table, batch, 0, k=k, v=v, int_k=int_k)
        drop_times(pages, table, batch, 0, int_q, bias, None)
        compact(pages, table, batch)
    batch = batch_of([1] * rows, [context] * rows, slots, PAGE)
    q, k, v, int_q, int_k = inputs(rows)
    out = torch.empty_like(q)
    calls = {
        "write": lambda: subset_write(pages, table, batch, 0, k=k, v=v, int_k=int_k),
        "drop times": lambda: drop_times(pages, table, batch, 0, int_q, bias, None),
        "attention": lambda: subset_attention(pages, table, batch, 0, q, DIM**-0.5, out, workspace),
        "compaction": lambda: compact(pages, table, batch),
    }
    times = {name: timed(call) for name, call in calls.items()}
    seen = workspace.counts[:rows].sum().item()
    held = (pages_each - table.first_live[torch.tensor(slots)]).sum().item() * PAGE
    sizes = {
        "drop times": held * (2 * INTS + 8),
        "attention": seen * 2 * HEADS * DIM * 2,
        "dense attention": rows * context * 2 * HEADS * DIM * 2,
    }
    limits = {name: 1e3 * size / bandwidth for name, size in sizes.items()}
    return {
        "rows": rows,
        "live": seen / rows / context,
        "held": held / rows / context,
        "ms": times,
        "limit": limits,
    }


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=positive_int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--context", type=integer(2), default=1024)
    parser.add_argument("--live", type=inner_fraction, nargs="+", default=[0.1, 0.4], help="shares of the context")
    parser.add_argument("--out", default="results/dcp_kernels.json")
    args = parser.parse_args()
    if min(args.live) * args.context <= 1:
        parser.error(f"--live is {min(args.live)}: it must be more than one token of --context {args.context}.")
    bandwidth = copy_bandwidth()
    print(f"{args.context} tokens; {bandwidth / 1e12:.2f} TB/s; microseconds of a layer (of its bytes alone)")
    found = []
    for live in args.live:
        for rows in args.rows:
            found.append(row := decode(rows, args.context, live, bandwidth))
            parts = [
                f"{name} {1e3 * ms:.0f}" + (f" ({1e3 * row['limit'][name]:.0f})" if name in row["limit"] else "")
                for name, ms in row["ms"].items()
            ]
            dense = 1e3 * row["limit"]["dense attention"]
            what = f"{rows:5} rows, {row['live']:.1%} live, {row['held']:.1%} held"
            print(f"{what}: {', '.join(parts)}; dense attention ({dense:.0f})")
    save(args.out, {"context": args.context, "copy_bandwidth": bandwidth, "decode": found})


if __name__ == "__main__":
    main()
