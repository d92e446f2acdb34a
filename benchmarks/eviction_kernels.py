"""The kernels of decoders that evict tokens on one GPU, beside FlashAttention 3 and what their bytes take to copy.

python -m benchmarks.eviction_kernels [--kv-heads 8] [--groups 4] [--dims 64 128] [--float8]

One layer with random inputs in bfloat16, whose tokens are evicted at random behind a window. A prompt is read in
chunks, and the last chunk is timed; so is a decode step of requests of one length. The limit of a prompt is the
time of FlashAttention 3 times the share of pairs that are seen; that of decode is the live K and V at copy
bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.kernels import timed
from benchmarks.one_layer import batch_of, extend, pool_and_table
from benchmarks.options import Parser, inner_fraction, integer, positive_int
from benchmarks.peers import copy_bandwidth, flash_attention_3
from benchmarks.record import save
from vllm_fox.kernels.float8 import FP8
from vllm_fox.kernels.paged import Batch
from vllm_fox.kernels.subset.attention import make_workspace, subset_attention
from vllm_fox.kernels.subset.compaction import compact
from vllm_fox.kernels.subset.pages import Evictions, SubsetPageFormat
from vllm_fox.kernels.subset.write import subset_write

PAGE, CHUNK = 32, 8192


@dataclass(frozen=True)
class Shape:
    """A layer: KV heads, query heads for each, head size; window and share of the tokens that are kept behind it;
    whether pages are float8."""

    heads: int
    groups: int
    dim: int
    window: int
    kept: float
    float8: bool


class EvictingLayer:
    """Pages of one layer for some requests of up to ``length`` tokens."""

    def __init__(self, shape: Shape, rows: int, length: int) -> None:
        self.shape, each = shape, -(-length // PAGE)
        dtype = FP8 if shape.float8 else torch.bfloat16
        form = SubsetPageFormat(PAGE, 1, shape.dim, 0, torch.bfloat16, dtype)
        count = (rows * each + 1) * shape.heads
        self.pages = form.view(torch.zeros(count * form.page_bytes, dtype=torch.uint8, device="cuda"))
        self.pool, self.table = pool_and_table(shape.heads, rows, count, each + 16)
        self.workspace = make_workspace(
            self.pages, layers=1, streams=shape.heads, groups=shape.groups, max_rows=rows, max_model_len=length
        )
        self.slots = [self.pool.open() for _ in range(rows)]
        for slot in self.slots:
            extend(self.pool, self.table, slot, length, PAGE)

    def draw(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Evictions]:
        """Random q, k, v, and decisions, of new tokens."""
        shape = self.shape

        def normal(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, device="cuda", dtype=torch.bfloat16)

        q = normal(tokens, shape.heads, 1, shape.groups, shape.dim)
        k, v = (normal(tokens, shape.heads, 1, shape.dim) for _ in range(2))
        evicts = torch.rand(tokens, shape.heads, device="cuda") >= shape.kept
        return q, k, v, Evictions(evicts, shape.window, 1)

    def write(self, batch: Batch, k: torch.Tensor, v: torch.Tensor, evictions: Evictions) -> None:
        """K and V of new tokens into their pages."""
        subset_write(self.pages, self.table, batch, 0, k=k, v=v, int_k=None, evictions=evictions)

    def read(self, slots: list[int], start: int, stop: int) -> None:
        """Take in a part of each request's prompt, without computing attention."""
        lens = [stop - start] * len(slots)
        batch = batch_of(lens, [stop] * len(slots), slots, PAGE)
        _, k, v, evictions = self.draw(sum(lens))
        self.write(batch, k, v, evictions)
        compact(self.pages, self.table, batch)

    def attend(self, batch: Batch, q: torch.Tensor, out: torch.Tensor) -> None:
        """Attention of a step's queries."""
        subset_attention(self.pages, self.table, batch, 0, q, self.shape.dim**-0.5, out, self.workspace)


def seen_pairs(shape: Shape, start: int, stop: int) -> float:
    """(query, token) pairs of a head that are seen by queries from ``start`` to ``stop``, on average."""
    at = torch.arange(start, stop, dtype=torch.float64) + 1
    near = at.clamp(max=shape.window + 1)
    return (near + shape.kept * (at - near)).sum().item()


def prompt(shape: Shape, length: int) -> dict[str, float]:
    """Milliseconds of the last chunk of a prompt, and of the same queries in FlashAttention 3."""
    layer, start = EvictingLayer(shape, 1, length), max(0, length - CHUNK)
    for at in range(0, start, CHUNK):
        layer.read(layer.slots, at, at + CHUNK)
    new = length - start
    batch = batch_of([new], [length], layer.slots, PAGE)
    q, k, v, evictions = layer.draw(new)
    out = torch.empty_like(q)
    layer.write(batch, k, v, evictions)
    attention, _ = flash_attention_3()
    bounds, ends = (torch.tensor([0, n], dtype=torch.int32, device="cuda") for n in (new, length))
    keys, values = (
        torch.randn(length, shape.heads, shape.dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )

    def dense() -> None:
        attention(
            q.flatten(1, 3), keys, values, max_seqlen_q=new, cu_seqlens_q=bounds, max_seqlen_k=length,
            cu_seqlens_k=ends, causal=True, fa_version=3,
        )  # fmt: skip

    fa3 = timed(dense)
    causal = (start + 1 + length) * new / 2
    return {
        "length": length,
        "attention": timed(lambda: layer.attend(batch, q, out)),
        "write": timed(lambda: layer.write(batch, k, v, evictions)),
        "FlashAttention 3": fa3,
        "limit": fa3 * seen_pairs(shape, start, length) / causal,
    }


def decode(shape: Shape, length: int, rows: int, bandwidth: float) -> dict[str, float]:
    """Milliseconds of a decode step of requests of ``length`` tokens, and of copying their live K and V."""
    layer = EvictingLayer(shape, rows, length)
    for slot in layer.slots:
        for at in range(0, length - 1, CHUNK):
            layer.read([slot], at, min(at + CHUNK, length - 1))
    batch = batch_of([1] * rows, [length] * rows, layer.slots, PAGE)
    q, k, v, evictions = layer.draw(rows)
    out = torch.empty_like(q)
    layer.write(batch, k, v, evictions)
    if layer.workspace is not None:
        layer.workspace.update(layer.table, batch)
    first = layer.table.first_live[torch.tensor(layer.slots)]
    live = ((length - 1) // PAGE + 1 - first).clamp(min=0).sum().item() * PAGE
    size = live * 2 * shape.dim * (1 if shape.float8 else 2)
    return {
        "length": length,
        "rows": rows,
        "live": live / (rows * shape.heads * length),
        "attention": timed(lambda: layer.attend(batch, q, out)),
        "write": timed(lambda: layer.write(batch, k, v, evictions)),
        "compaction": timed(lambda: compact(layer.pages, layer.table, batch)),
        "limit": 1e3 * size / bandwidth,
    }


def line(found: dict[str, float], keys: tuple[str, ...]) -> str:
    """One measurement."""
    what = f"{found['rows']:.0f} x {found['length']:,}" if "rows" in found else f"{found['length']:,}"
    parts = ", ".join(f"{key} {1e3 * found[key]:.1f}" for key in keys)
    share = found["limit"] / found["attention"]
    return f"  {what:>12}: {parts}, limit {1e3 * found['limit']:.1f} us ({share:.0%} of it reached)"


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--kv-heads", type=positive_int, default=8)
    parser.add_argument("--groups", type=positive_int, default=4, help="query heads for each KV head")
    parser.add_argument("--dims", type=positive_int, nargs="+", default=[64, 128])
    parser.add_argument("--window", type=positive_int, default=512)
    parser.add_argument("--kept", type=inner_fraction, default=0.125)
    parser.add_argument("--float8", action="store_true")
    parser.add_argument("--prompts", type=integer(2), nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--length", type=integer(2), default=8192, help="of requests that are decoded")
    parser.add_argument("--rows", type=positive_int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--json", default="results/eviction_kernels.json")
    args = parser.parse_args()
    bandwidth = copy_bandwidth()
    found: list[dict[str, Any]] = []
    for dim in args.dims:
        shape = Shape(args.kv_heads, args.groups, dim, args.window, args.kept, args.float8)
        print(f"{shape}, copies at {bandwidth / 1e12:.2f} TB/s")
        for length in args.prompts:
            found.append({"part": "prompt", "dim": dim} | (one := prompt(shape, length)))
            print(line(one, ("attention", "FlashAttention 3", "write")), flush=True)
        for rows in args.rows:
            found.append({"part": "decode", "dim": dim} | (one := decode(shape, args.length, rows, bandwidth)))
            print(line(one, ("attention", "write", "compaction")), flush=True)
        save(args.json, {"options": vars(args), "copy_bandwidth": bandwidth, "found": found})


if __name__ == "__main__":
    main()
