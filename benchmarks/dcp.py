"""Dynamic Context Pruning: what dropping costs, what is dropped, and what it saves when served.

python -m benchmarks.dcp tradeoff RUN...             # runs of examples/finetune_dcp.py from one checkpoint
python -m benchmarks.dcp kinds RUN                   # which tokens its model drops, by layer and kind
python -m benchmarks.dcp serving MODEL --dense GPT2  # tokens a second and KV memory, beside vLLM's dense GPT-2
"""

from __future__ import annotations

import argparse
import json
import keyword
import os
import string
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.record import save

KINDS = ("whitespace", "punctuation", "keyword", "number", "name")


def window_share(window: int, context: int) -> float:
    """Share of the (query, earlier token) pairs of ``context`` tokens that a window of the newest ones keeps."""
    return sum(min(i, window - 1) for i in range(context)) / (context * (context - 1) / 2)


def tradeoff(args: argparse.Namespace) -> None:
    """Validation loss against the share of pairs left out, after as many steps from the same checkpoint."""
    rows: list[dict[str, Any]] = []
    for run in args.runs:
        given = json.loads((run / "arguments.json").read_text())
        last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
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
    tokenizer = AutoTokenizer.from_pretrained(args.run / "model")
    held_out = np.load(args.run / "data" / "held_out.npy")
    length = model.config.block_size
    count = min(args.windows, len(held_out) // length)
    ids = torch.from_numpy(held_out[: count * length].reshape(count, length).astype(np.int64))
    kind_of = [KINDS.index(classify(tokenizer.decode([i]))) for i in range(model.config.vocab_size)]
    kinds_of = torch.tensor(kind_of)[ids]
    # By token: over the queries that come after it, the share that sees it.
    later = torch.arange(length - 1, -1, -1).clamp(min=1)
    seen = torch.zeros(model.config.n_layer, len(KINDS), dtype=torch.float64)
    totals = torch.zeros(len(KINDS), dtype=torch.float64)
    for window, kind in zip(ids, kinds_of, strict=True):
        # The last tokens have too few queries after them to be judged by.
        share = (model.visible(window[None])[:, 0].sum(1) - 1) / later
        share, kind = share[:, : length * 3 // 4], kind[: length * 3 // 4]
        seen.index_add_(1, kind, share.double())
        totals.index_add_(0, kind, torch.ones_like(kind, dtype=torch.float64))
    shares = seen / totals
    print(f"{'layer':<8}" + "".join(f"{kind:>13}" for kind in KINDS))
    for layer, row in enumerate(shares.tolist()):
        print(f"{layer:<8}" + "".join(f"{value:>13.1%}" for value in row))
    print(f"{'tokens':<8}" + "".join(f"{value:>13.1%}" for value in (totals / totals.sum()).tolist()))
    figure, axis = plt.subplots(figsize=(7, 4))
    width = 0.8 / len(shares)
    for layer, row in enumerate(shares.tolist()):
        where = [n + layer * width for n in range(len(KINDS))]
        axis.bar(where, [100 * value for value in row], width, label=f"layer {layer}")
    axis.set_xticks([n + 0.4 - width / 2 for n in range(len(KINDS))], KINDS)
    axis.set_ylim(0, 100)
    axis.set_ylabel("later queries that see such a token, %")
    finish(figure, args.out)
    save(args.json, {"kinds": KINDS, "shares": shares.tolist(), "tokens": totals.tolist()})


def classify(text: str) -> str:
    """What a token of Python source is, as far as its text tells: one of :data:`KINDS`."""
    word = text.strip()
    if not word:
        return "whitespace"
    if all(character in string.punctuation and character != "_" for character in word):
        return "punctuation"
    if keyword.iskeyword(word):
        return "keyword"
    return "number" if word.isdigit() else "name"


def serving(args: argparse.Namespace) -> None:
    """Each model in a process of its own, the same prompts; both in float32 on a CPU, in bfloat16 on a GPU."""
    rows = []
    for name, model in (("DCP", args.model), ("dense", args.dense)):
        command = [sys.executable, "-m", "benchmarks.dcp", "measure", str(model)]
        command += ["--contexts", *map(str, args.contexts), "--batches", *map(str, args.batches)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows += [{"name": name} | row for row in json.loads(done.stdout.splitlines()[-1])]
    print(f"{'':<8}{'context':>9}{'batch':>7}{'prompt tok/s':>14}{'answer tok/s':>14}{'KV KiB a request':>18}")
    for row in sorted(rows, key=lambda row: (row["context"], row["batch"], row["name"])):
        print(
            f"{row['name']:<8}{row['context']:>9}{row['batch']:>7}{row['prompt_speed']:>14,.0f}"
            f"{row['answer_speed']:>14,.0f}{row['kv_bytes'] / 1024:>18,.0f}"
        )
    save(args.json, rows)


def measure(args: argparse.Namespace) -> None:
    """One model: prompts that fill a context but for its answer; prints JSON."""
    from tests.engines import add, engine, run_to_the_end, run_until_decoding, scheduler, source_tokens

    gpu = torch.cuda.is_available()
    rows = []
    with engine(
        args.model,
        dtype="bfloat16" if gpu else "float32",
        enforce_eager=not gpu,
        max_num_seqs=max(args.batches),
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,
    ) as llm:
        blocks = scheduler(llm).kv_cache_manager.block_pool
        config = scheduler(llm).kv_cache_config
        block_bytes = sum(tensor.size for tensor in config.kv_cache_tensors) / config.num_blocks
        for context in args.contexts:
            answer = context // 4
            for batch in (1, *args.batches):  # once to warm up
                for n in range(batch):
                    add(llm, f"{n}", source_tokens(llm, context - answer, seed=n), answer)
                start = time.perf_counter()
                run_until_decoding(llm, count=batch)
                decoding = time.perf_counter()
                run_until_decoding(llm, count=batch, tokens=answer - 2)
                end = time.perf_counter()
                used = blocks.num_gpu_blocks - 1 - blocks.get_num_free_blocks()
                run_to_the_end(llm)
                rows.append(
                    {
                        "context": context,
                        "batch": batch,
                        "prompt_speed": batch * (context - answer) / (decoding - start),
                        "answer_speed": batch * (answer - 3) / (end - decoding),
                        "kv_bytes": used * block_bytes / batch,
                    }
                )
            del rows[-len(args.batches) - 1]
    print(json.dumps(rows))


def finish(figure: Any, out: str) -> None:
    """Tidy and write a picture."""
    for axis in figure.axes:
        axis.legend()
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    print(f"saved {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    sub = commands.add_parser("tradeoff")
    sub.add_argument("runs", type=Path, nargs="+", help="OUTPUT folders of finetune_dcp.py")
    sub.add_argument("--out", default="docs/dcp_tradeoff.png")
    sub.add_argument("--json", default="results/dcp_tradeoff.json")
    sub.set_defaults(run_command=tradeoff)
    sub = commands.add_parser("kinds")
    sub.add_argument("run", type=Path)
    sub.add_argument("--windows", type=int, default=32)
    sub.add_argument("--out", default="docs/dcp_kinds.png")
    sub.add_argument("--json", default="results/dcp_kinds.json")
    sub.set_defaults(run_command=kinds)
    for name, command in (("serving", serving), ("measure", measure)):
        sub = commands.add_parser(name)
        sub.add_argument("model")
        sub.add_argument("--contexts", type=int, nargs="+", default=[256, 512, 1024])
        sub.add_argument("--batches", type=int, nargs="+", default=[1, 8])
        if name == "serving":
            sub.add_argument("--dense", required=True, help="a GPT-2 of the same size")
            sub.add_argument("--json", default="results/dcp_serving.json")
        sub.set_defaults(run_command=command)
    args = parser.parse_args()
    args.run_command(args)


if __name__ == "__main__":
    main()
