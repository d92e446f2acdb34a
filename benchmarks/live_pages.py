"""Live KV pages over time: one engine, the same prompts with and without release.

python -m benchmarks.live_pages [--model examples/fox-tiny] [--out docs/live_pages.png]
"""

# ruff: noqa: E402 (the environment comes before torch and vLLM)
from __future__ import annotations

import os

from vllm_fox.cpu import prepare_cpu_environment

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
prepare_cpu_environment(threads=1)

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.engines import add, engine, manager, num_blocks, scheduler, source_tokens
from benchmarks.options import Parser, positive_int
from benchmarks.record import save

LONGEST = 8192
"""Tokens of a request, at most."""


def trace(
    model: str, release: bool, requests: int, prompt: int, answer: int, blocks: int
) -> dict[str, list[float]]:
    """Blocks in use and requests running after every engine step."""
    rows: dict[str, list[float]] = {"blocks": [], "running": []}
    with engine(
        model,
        {"release": release},
        max_model_len=LONGEST,
        max_num_batched_tokens=512,
        num_gpu_blocks_override=blocks + 1,
    ) as llm:
        for i in range(requests):
            add(llm, f"r{i}", source_tokens(llm, prompt, seed=i), answer)
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
            pages = manager(llm).pool
            rows["blocks"].append(pages.used_blocks)
            rows["running"].append(len(scheduler(llm).running))
        rows["budget"] = [num_blocks(llm)]
    return rows


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="examples/fox-tiny")
    parser.add_argument("--requests", type=positive_int, default=8)
    parser.add_argument("--prompt", type=positive_int, default=4000)
    parser.add_argument("--answer", type=positive_int, default=200)
    parser.add_argument("--out", default="docs/live_pages.png")
    parser.add_argument("--json", default="results/live_pages.json")
    args = parser.parse_args()
    if args.prompt + args.answer > LONGEST:
        parser.error(f"--prompt {args.prompt} and --answer {args.answer} are together more than {LONGEST} tokens.")
    blocks = max(2 * -(-(args.prompt + args.answer) // 64), 128)
    traces = {
        name: trace(args.model, release, args.requests, args.prompt, args.answer, blocks)
        for name, release in (("pages given back", True), ("pages kept to the end", False))
    }
    figure, axes = plt.subplots(2, 1, figsize=(8, 5.2), sharex=True, height_ratios=[2, 1])
    for (name, rows), colour in zip(traces.items(), ("#0b6e4f", "#b23a48"), strict=True):
        axes[0].plot(rows["blocks"], color=colour, label=name)
        axes[1].step(range(len(rows["running"])), rows["running"], color=colour, where="post")
        print(
            f"{name}: {len(rows['blocks'])} steps, peak {max(rows['blocks']):.0f} blocks, "
            f"at most {max(rows['running']):.0f} requests at once"
        )
    axes[0].axhline(blocks, color="grey", linestyle=":", label="KV memory")
    axes[0].set_ylabel("KV memory in use (blocks)")
    axes[0].set_title(f"{args.requests} requests of {args.prompt} tokens, {args.answer} answered, in room for two")
    axes[0].legend(loc="center right")
    axes[1].set_ylabel("requests running")
    axes[1].set_xlabel("engine step")
    axes[1].yaxis.get_major_locator().set_params(integer=True)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(args.out, dpi=120)
    save(args.json, traces)


if __name__ == "__main__":
    main()
