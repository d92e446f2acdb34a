"""Dynamic Context Pruning: what dropping costs, and what is dropped. dcp_serving.py measures what it saves.

python -m benchmarks.dcp tradeoff RUN...             # runs of examples/finetune_dcp.py from one checkpoint
python -m benchmarks.dcp kinds RUN                   # which tokens its model drops, by layer and kind
python -m benchmarks.dcp layers DENSE_RUN            # which layers of a dense model need what is far
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.options import Parser, positive_int, read_record, read_records, refuse, training_run
from benchmarks.record import save
from vllm_fox.maps.classes import CLASSES, classify


def window_share(window: int, context: int) -> float:
    """Share of the (query, earlier token) pairs of ``context`` tokens that a window of the newest ones keeps."""
    return sum(min(i, window - 1) for i in range(context)) / (context * (context - 1) / 2)


def tradeoff(args: argparse.Namespace) -> None:
    """Validation loss against the share of pairs left out, after as many steps from the same checkpoint."""
    rows: list[dict[str, Any]] = []
    for run in args.runs:
        given, log = read_record(run / "arguments.json") or {}, list(read_records(run / "log.jsonl"))
        if "gamma" not in given or not log or "validation_loss" not in log[-1]:
            raise SystemExit(f"{run} is no whole run of finetune_dcp.py that was validated at its end.")
        last = log[-1]
        row = {"run": run.name, "steps": last["step"], "loss": last["validation_loss"]}
        if given["dense"]:
            row |= {"kind": "dense", "pruned": 0.0}
        elif given["window"]:
            share = window_share(given["window"], given["context"])
            row |= {"kind": "window", "window": given["window"], "pruned": 1 - share}
        else:
            row |= {"kind": "DCP", "gamma": given["gamma"], "pruned": last["pruned_share"]}
        rows.append(row)
    rows.sort(key=lambda row: (row["kind"], row["pruned"]))
    dense = min((row["loss"] for row in rows if row["kind"] == "dense"), default=float("nan"))
    print(f"{'':<24}{'pruned':>9}{'loss':>9}{'perplexity':>12}{'over dense':>12}")
    for row in rows:
        knobs = {"dense": "", "window": f" of {row.get('window')}", "DCP": f", gamma {row.get('gamma')}"}
        print(
            f"{row['kind'] + knobs[row['kind']]:<24}{row['pruned']:>9.1%}{row['loss']:>9.4f}"
            f"{np.exp(row['loss']):>12.3f}{row['loss'] - dense:>+12.4f}"
        )
    figure, axis = plt.subplots(figsize=(7, 4))
    for kind, colour in (("DCP", "#0b6e4f"), ("window", "#b23a48")):
        mine = [row for row in rows if row["kind"] == kind]
        axis.plot(
            [100 * row["pruned"] for row in mine], [row["loss"] for row in mine], "o-", color=colour, label=kind
        )
    axis.axhline(dense, color="grey", linestyle=":", label="dense")
    axis.set_xlabel("(query, earlier token) pairs left out, %")
    axis.set_ylabel("validation loss, nats a token")
    finish(figure, args.out)
    save(args.json, rows)


def kinds(args: argparse.Namespace) -> None:
    """Share of later queries that still see a token, by layer and by what the token is."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import vllm_fox.hf  # noqa: F401 (makes AutoModelForCausalLM know the model)

    model: Any = AutoModelForCausalLM.from_pretrained(args.run / "model", dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(args.run / "model")
    length = model.config.block_size
    ids = held_out(args.run, length, args.windows)
    kind_of = [CLASSES.index(classify(tokenizer.decode([i]))) for i in range(model.config.vocab_size)]
    kinds_of = torch.tensor(kind_of)[ids]
    # By token: over the queries that come after it, the share that sees it.
    later = torch.arange(length - 1, -1, -1).clamp(min=1)
    seen = torch.zeros(model.config.n_layer, len(CLASSES), dtype=torch.float64)
    totals = torch.zeros(len(CLASSES), dtype=torch.float64)
    for window, kind in zip(ids, kinds_of, strict=True):
        # The last tokens have too few queries after them to be judged by.
        share = (model.visible(window[None])[:, 0].sum(1) - 1) / later
        share, kind = share[:, : length * 3 // 4], kind[: length * 3 // 4]
        seen.index_add_(1, kind, share.double())
        totals.index_add_(0, kind, torch.ones_like(kind, dtype=torch.float64))
    shares = seen / totals
    print(f"{'layer':<8}" + "".join(f"{kind:>13}" for kind in CLASSES))
    for layer, row in enumerate(shares.tolist()):
        print(f"{layer:<8}" + "".join(f"{value:>13.1%}" for value in row))
    print(f"{'tokens':<8}" + "".join(f"{value:>13.1%}" for value in (totals / totals.sum()).tolist()))
    figure, axis = plt.subplots(figsize=(7, 4))
    width = 0.8 / len(shares)
    for layer, row in enumerate(shares.tolist()):
        where = [n + layer * width for n in range(len(CLASSES))]
        axis.bar(where, [100 * value for value in row], width, label=f"layer {layer}")
    axis.set_xticks([n + 0.4 - width / 2 for n in range(len(CLASSES))], CLASSES)
    axis.set_ylabel("later queries that see such a token, %")
    finish(figure, args.out)
    save(args.json, {"kinds": CLASSES, "shares": shares.tolist(), "tokens": totals.tolist()})


def layers(args: argparse.Namespace) -> None:
    """What it costs a dense model if one layer sees only the newest tokens, and the others all."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(args.run / "model", dtype=torch.float32).eval()
    length = model.config.n_positions
    if args.window > length:
        refuse(f"--window is {args.window}: it must be at most {length}, the positions of the model of {args.run}.")
    ids = held_out(args.run, length, args.texts)
    seen = torch.ones(1, 1, length, length, dtype=torch.bool).tril().triu(1 - args.window)

    def loss(near: int | None) -> float:
        blocks = model.transformer.h[near : near + 1] if near is not None else []
        hooks = [
            block.attn.register_forward_pre_hook(
                lambda _, given, named: (given, named | {"attention_mask": seen}), with_kwargs=True
            )
            for block in blocks
        ]
        with torch.no_grad():
            found = [model(input_ids=one[None], labels=one[None]).loss.item() for one in ids]
        for hook in hooks:
            hook.remove()
        return float(np.mean(found))

    dense = loss(None)
    costs = [loss(layer) - dense for layer in range(model.config.n_layer)]
    print(f"loss {dense:.4f}; with a window of {args.window} in one layer:")
    for layer, cost in enumerate(costs):
        print(f"layer {layer:2}: {cost:+.4f}")
    save(args.json, {"window": args.window, "loss": dense, "costs": costs})


def held_out(run: Path, length: int, count: int) -> torch.Tensor:
    """[count or fewer, length] of the run's held-out text."""
    data = np.load(run / "data" / "held_out.npy")
    count = min(count, len(data) // length)
    if not count:
        raise SystemExit(f"{run} has {len(data):,} tokens of held-out text: one window of {length:,} is needed.")
    return torch.from_numpy(data[: count * length].reshape(count, length).astype(np.int64))


def finish(figure: Any, out: str) -> None:
    """Tidy and write a picture."""
    for axis in figure.axes:
        axis.legend()
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    print(f"saved {out}")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    sub = commands.add_parser("tradeoff")
    sub.add_argument("runs", type=training_run, nargs="+", help="OUTPUT folders of finetune_dcp.py")
    sub.add_argument("--out", default="docs/dcp_tradeoff.png")
    sub.add_argument("--json", default="results/dcp_tradeoff.json")
    sub.set_defaults(run_command=tradeoff)
    sub = commands.add_parser("kinds")
    sub.add_argument("run", type=training_run)
    sub.add_argument("--windows", type=positive_int, default=32)
    sub.add_argument("--out", default="docs/dcp_kinds.png")
    sub.add_argument("--json", default="results/dcp_kinds.json")
    sub.set_defaults(run_command=kinds)
    sub = commands.add_parser("layers")
    sub.add_argument("run", type=training_run)
    sub.add_argument("--window", type=positive_int, default=32)
    sub.add_argument("--texts", type=positive_int, default=24)
    sub.add_argument("--json", default="results/dcp_layers.json")
    sub.set_defaults(run_command=layers)
    args = parser.parse_args()
    args.run_command(args)


if __name__ == "__main__":
    main()
