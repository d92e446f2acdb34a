"""Our kernels and their peers on one GPU, side by side: prefill and decode, 1k to 128k tokens.

python -m benchmarks.kernels [--gates gates.safetensors] [--lengths 1024 4096 ...] [--float8] [--plot kernels.png]

One layer of 24 heads of 64 in bfloat16; with --float8 our pages hold K and V as float8. Prefill is one prompt as
one chunk; decode is one new token of 64 sequences (16 from 64k on). Everything is timed as replays of a CUDA graph
with a cold L2 cache. The limit of prefill is the time of FlashAttention 3 times the share of pairs that are live;
that of decode is the live bytes at copy bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.one_layer import OneLayer
from benchmarks.options import Parser, existing_file, positive_int
from benchmarks.peers import (
    DECODE,
    PREFILL,
    AbsentError,
    Decode,
    Gates,
    Prefill,
    copy_bandwidth,
    flash_attention_3,
    live_pairs,
    load_gates,
    median_ms,
    pruning_threshold,
)
from benchmarks.record import save
from vllm_fox.kernels.float8 import FP8
from vllm_fox.kernels.forgetting.cache_write import cache_write
from vllm_fox.kernels.forgetting.decode import decode_attention
from vllm_fox.kernels.forgetting.live_range import live_range
from vllm_fox.kernels.forgetting.pages import LIVE_RANGE_PERIOD
from vllm_fox.kernels.forgetting.prefill import prefill_attention
from vllm_fox.kernels.paged import Batch

HEADS, DIM, PAGE = 24, 64, 64
SCALE = DIM**-0.5
LAYERS = 8
"""Layers that a captured piece of a decode step repeats."""

SHORT_PROMPTS, SHORTEST, LONGEST = 14, 200, 1000
"""Prompts that are read in one step, and their lengths in tokens, which lie evenly: 8,394 tokens together."""

SLOWEST = {"official FoX": 65536, "official FoX, head first": 65536, "fla": 65536, "SDPA, contiguous": 16384}
"""Longest prompt at which a slow peer is timed."""


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds of a call as a CUDA graph, or as it is if it cannot be captured."""
    try:
        return median_ms(call, graph=True, rep_ms=150)
    except RuntimeError:
        torch.cuda.synchronize()
        return median_ms(call, rep_ms=150)


def new_layer(gates: Gates, length: int, rows: int, prune: bool, float8: bool) -> OneLayer:
    """An empty layer for ``rows`` sequences of ``length`` tokens."""
    threshold = pruning_threshold(gates.logit_bound, length)[:, None]
    pages = -(-length // PAGE)
    return OneLayer(
        heads=HEADS,
        dim=DIM,
        page_size=PAGE,
        dtype=torch.bfloat16,
        kv_dtype=FP8 if float8 else None,
        shift=True,
        threshold=threshold if prune else float("-inf"),
        num_slots=rows,
        num_pages=(rows * pages + 1) * HEADS,
        max_pages=pages + 16,
        logit_bound=gates.logit_bound.max().item(),
    )


def random_tokens(gates: Gates, start: int, end: int, roll: int = 0) -> dict[str, torch.Tensor]:
    """Normal q, k, v and the gates of tokens ``start:end`` (moved on by ``roll``, for another sequence)."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(end - start, HEADS, *shape, device="cuda", dtype=torch.bfloat16)

    log_f = gates.log_forget.roll(-roll, 0)[start:end, :, None].cuda()
    shift = torch.full((end - start, HEADS), 0.1, device="cuda")
    return {
        "q": normal(1, DIM),
        "k": normal(DIM),
        "v": normal(DIM),
        "log_f": log_f,
        "shift_k": shift,
        "shift_v": shift,
    }


def write(layer: OneLayer, step: Any, batch: Batch) -> None:
    """The page write of a step."""
    norm = torch.ones(HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    cache_write(
        layer.pages,
        layer.table,
        batch,
        0,
        k=step.k,
        v=step.v,
        gate=step.gate,
        shift_k=step.shift_k,
        shift_v=step.shift_v,
        k_norm=norm,
        norm_eps=1e-5,
        rope_base=None,
    )


def ours_prefill(gates: Gates, length: int, prune: bool, float8: bool = False) -> dict[str, float]:
    """Milliseconds of prefill attention and of the page write for one prompt."""
    layer = new_layer(gates, length, 1, prune, float8)
    step, batch = layer.prepare([(layer.open(), random_tokens(gates, 0, length))])
    write(layer, step, batch)
    attention = timed(prefill_call(layer, step, batch))
    return {"attention": attention, "write": timed(lambda: write(layer, step, batch))}


def prefill_call(layer: OneLayer, step: Any, batch: Batch) -> Callable[[], None]:
    """Prefill attention of a step that has been written."""
    out, state, threshold = torch.empty_like(step.q), layer.state, layer.state.thresholds[0]
    state.begin_step(batch)

    def attend() -> None:
        prefill_attention(
            layer.pages,
            layer.table,
            batch,
            0,
            threshold,
            step.q,
            SCALE,
            state.bounded,
            out,
            state.prefill_workspace,
        )

    return attend


def short_prompts(gates_path: str | None, float8: bool) -> dict[str, float | None]:
    """Milliseconds of many short prompts in one step, and of the same in FlashAttention 3 if it runs here."""
    lengths = torch.linspace(SHORTEST, LONGEST, SHORT_PROMPTS).long().tolist()
    gates = load_gates(gates_path, HEADS, LONGEST)
    layer = new_layer(gates, LONGEST, SHORT_PROMPTS, True, float8)
    work = [(layer.open(), random_tokens(gates, 0, length)) for length in lengths]
    step, batch = layer.prepare(work)
    write(layer, step, batch)
    times: dict[str, float | None] = {"ours": timed(prefill_call(layer, step, batch)), "FlashAttention 3": None}
    try:
        attention, _ = flash_attention_3()
    except (ImportError, AbsentError):
        return times
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().to(step.q.device)
    q, k, v = step.q[:, :, 0], step.k, step.v

    def dense() -> None:
        attention(
            q, k, v, max_seqlen_q=LONGEST, cu_seqlens_q=bounds, max_seqlen_k=LONGEST, cu_seqlens_k=bounds,
            causal=True, fa_version=3,
        )  # fmt: skip

    return times | {"FlashAttention 3": timed(dense)}


def ours_decode(gates: Gates, length: int, rows: int, prune: bool, float8: bool = False) -> dict[str, float]:
    """Milliseconds of decode attention, of the page write and the live range, and of the plan; and live pages."""
    layer = new_layer(gates, length, rows, prune, float8)
    slots = [layer.open() for _ in range(rows)]
    # Requests come to a live-range check at different times.
    ends = [length - row % LIVE_RANGE_PERIOD for row in range(rows)]
    for row, slot in enumerate(slots):
        step, batch = layer.prepare([(slot, random_tokens(gates, 0, ends[row] - 1, roll=97 * row))])
        write(layer, step, batch)
        layer.state.end_step(batch)
    one = [(slots[row], random_tokens(gates, end - 1, end, roll=97 * row)) for row, end in enumerate(ends)]
    step, batch = layer.prepare(one)
    write(layer, step, batch)
    newest = (length - 1) // PAGE
    live_pages = (newest + 1 - layer.table.first_live[torch.tensor(slots)]).sum().item()
    out, state = torch.empty_like(step.q), layer.state
    state.begin_step(batch)
    limits = state.thresholds.flatten(0, 1)

    def attend() -> None:
        decode_attention(layer.pages, layer.table, batch, 0, step.q, SCALE, out, state.decode_workspace)

    def attend_in_turn() -> None:
        for _ in range(LAYERS):
            attend()

    def all_in_turn() -> None:
        for _ in range(LAYERS):
            write(layer, step, batch)
            attend()
            live_range(layer.pages, layer.table, batch, limits, 0)

    alone = timed(attend_in_turn) / LAYERS
    return {
        "attention": timed(attend),
        # As in a step: between attentions, which leave none of it in the cache.
        "write and live range": timed(all_in_turn) / LAYERS - alone,
        "plan": timed(lambda: state.begin_step(batch)),
        "live_pages": live_pages,
        "live_share": live_pages / (rows * HEADS * (newest + 1)),
        # K, V and gates of live pages; q and out are a thousandth of them.
        "bytes": live_pages * PAGE * (2 * DIM * layer.pages.k.element_size() + 4),
    }


def time_peers(peers: Any, inputs: Any, length: int) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds of every peer that runs, and why the others do not."""
    times, absent = {}, {}
    for peer in peers:
        if length > SLOWEST.get(peer.label, length):
            absent[peer.label] = "left out: slow or large at this length"
            continue
        call, reason = peer.bind(inputs)
        if call is None:
            absent[peer.label] = reason
        else:
            times[peer.label] = timed(call)
        del call
        torch.cuda.empty_cache()
    return times, absent


def prefill(gates_path: str | None, length: int, float8: bool) -> dict[str, Any]:
    """One row of the prefill table."""
    gates = load_gates(gates_path, HEADS, length)
    pruned, dense = (ours_prefill(gates, length, prune, float8) for prune in (True, False))
    tokens = random_tokens(gates, 0, length)
    inputs = Prefill(
        q=tokens["q"][None, :, :, 0],
        k=tokens["k"][None],
        v=tokens["v"][None],
        log_forget=gates.log_forget[None].cuda(),
        logit_bound=gates.logit_bound.cuda(),
    )
    times, absent = time_peers(PREFILL, inputs, length)
    share = live_pairs(gates.log_forget, pruning_threshold(gates.logit_bound, length), PAGE).share
    times = {"ours, ACP": pruned["attention"], "ours, all live": dense["attention"], **times}
    if "FlashAttention 3" in times:
        times["limit"] = times["FlashAttention 3"] * share
    return {
        "length": length,
        "gates": gates.source,
        "live_share": share,
        "page_write_ms": pruned["write"],
        "ms": times,
        "absent": absent,
    }


def decode(gates_path: str | None, length: int, bandwidth: float, float8: bool) -> dict[str, Any]:
    """One row of the decode table."""
    rows = 64 if length <= 16384 else 16
    gates = load_gates(gates_path, HEADS, length)
    pruned = ours_decode(gates, length, rows, True, float8)
    torch.cuda.empty_cache()
    dense = ours_decode(gates, length, rows, False, float8)
    torch.cuda.empty_cache()
    blocks = rows * -(-length // 256)
    cache = torch.randn(2, blocks, 256, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    inputs = Decode(
        q=torch.randn(rows, HEADS, DIM, device="cuda", dtype=torch.bfloat16),
        k_cache=cache[0],
        v_cache=cache[1],
        block_table=torch.randperm(blocks, device="cuda").int().view(rows, -1),
        seq_lens=torch.full((rows,), length, dtype=torch.int32, device="cuda"),
    )
    times, absent = time_peers(DECODE, inputs, length)
    times = {"ours, ACP": pruned["attention"], "ours, all live": dense["attention"], **times}
    times["limit"] = 1e3 * pruned["bytes"] / bandwidth
    return {
        "length": length,
        "sequences": rows,
        "gates": gates.source,
        "live_share": pruned["live_share"],
        "bandwidth_share": {
            "ours, ACP": 1e3 * pruned["bytes"] / pruned["attention"] / bandwidth,
            "ours, all live": 1e3 * dense["bytes"] / dense["attention"] / bandwidth,
        },
        "other_ms": {name: pruned[name] for name in ("write and live range", "plan")},
        "ms": times,
        "absent": absent,
    }


def table(title: str, rows: list[dict[str, Any]]) -> str:
    """Milliseconds by peer and length; in brackets how much longer than ours with ACP."""
    labels = list(dict.fromkeys(label for row in rows for label in row["ms"]))
    lines = [f"{title:<42}" + "".join(f"{row['length']:>20,}" for row in rows)]
    lines.append(f"{'live share':<42}" + "".join(f"{100 * row['live_share']:>18.1f} %" for row in rows))
    for label in labels:
        cells = []
        for row in rows:
            ms, ours = row["ms"].get(label), row["ms"]["ours, ACP"]
            cells.append(f"{'-':>20}" if ms is None else f"{ms:>11.3f} ({ms / ours:5.2f}x)")
        lines.append(f"{label:<42}" + "".join(cells))
    return "\n".join(lines)


def _times(found: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {'-' if ms is None else f'{ms:.3f} ms'}" for name, ms in found.items())


def plot(path: str, results: dict[str, list[dict[str, Any]]]) -> None:
    """Milliseconds against length, both in log scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for axis, (kind, rows) in zip(axes, results.items()):
        for label in dict.fromkeys(label for row in rows for label in row["ms"]):
            points = [(row["length"], row["ms"][label]) for row in rows if label in row["ms"]]
            style: dict[str, Any] = {"linewidth": 2.5} if label.startswith("ours") else {"linewidth": 1}
            if label == "limit":
                style = {"linestyle": ":", "color": "black"}
            axis.loglog(*zip(*points), marker=".", label=label, **style)
        axis.set(title=f"{kind}, 24 heads of 64", xlabel="tokens", ylabel="ms")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"saved {path}")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--gates", type=existing_file, help="safetensors with log_forget and logit_bound (default: synthetic gates)"
    )
    parser.add_argument("--lengths", type=positive_int, nargs="+", default=[1024, 4096, 16384, 65536, 131072])
    parser.add_argument("--float8", action="store_true", help="our pages hold K and V as float8")
    parser.add_argument("--out", default="results/kernels.json")
    parser.add_argument("--plot", help="also draw this picture")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.kernels needs a CUDA GPU: none was found.")
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    short = short_prompts(args.gates, args.float8)
    results: dict[str, list[dict[str, Any]]] = {"prefill": [], "decode": []}
    for length in args.lengths:
        results["prefill"].append(prefill(args.gates, length, args.float8))
        results["decode"].append(decode(args.gates, length, bandwidth, args.float8))
        torch.cuda.empty_cache()
        print(f"{length} tokens done", flush=True)
        for rows in results.values():
            rows.sort(key=lambda row: row["length"])
        save(args.out, {"copy_bandwidth": bandwidth, "float8": args.float8, "short_prompts_ms": short, **results})
    for kind, rows in results.items():
        print("\n" + table(f"{kind}, ms (times ours with ACP)", rows))
    for row in results["decode"]:
        share = row["bandwidth_share"]
        small = row["other_ms"]["write and live range"]
        print(
            f"decode {row['length']:>7,}: {100 * share['ours, ACP']:.0f} % of copy bandwidth on live bytes, "
            f"{100 * share['ours, all live']:.0f} % with all live; write and live range "
            f"{100 * small / row['ms']['ours, ACP']:.1f} % of attention"
        )
    print(f"{SHORT_PROMPTS} prompts of {SHORTEST} to {LONGEST:,} tokens in one step: {_times(short)}")
    reasons = {label: why for rows in results.values() for row in rows for label, why in row["absent"].items()}
    for label, why in reasons.items():
        print(f"not timed: {label}: {why}")
    if args.plot:
        plot(str(Path(args.plot)), results)


if __name__ == "__main__":
    main()
