"""A conversation's KV pages over its turns: live, cached and given away, beside those of a dense cache.

python -m benchmarks.cached_pages [--model examples/fox-tiny] [--out docs/cached_pages.png]

There is room for all of this conversation and no more. Before each of its last turns another one has a turn, so
that cached pages have to be given away.
"""

# ruff: noqa: E402 (the environment comes before torch and vLLM)
from __future__ import annotations

import os

from vllm_fox.cpu import prepare_cpu_environment

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
prepare_cpu_environment(threads=1)

import argparse
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from vllm import LLM

from benchmarks.engines import add, engine, manager, num_blocks, source_tokens, step
from benchmarks.options import Parser, non_negative_int, positive_int
from benchmarks.record import save

LONGEST = 8192
"""Tokens of a request, at most."""
PAGE = 64
"""Tokens of a page."""
COLOURS = ("#0b6e4f", "#a9d3c1", "#b23a48")
"""Of pages that are live, cached, and given away."""


class Conversation:
    """A conversation of one user with the model, turn by turn.

    Args:
        llm: its engine.
        steps: a list for each figure, to which every engine step appends.
        number: tells the conversations apart, and their texts.
        system, user, answer: tokens of the system text, of what the user says in a turn, and of its answer.
    """

    def __init__(
        self, llm: LLM, steps: dict[str, list[int]], number: int, *, system: int, user: int, answer: int
    ) -> None:
        self.llm, self.steps, self.number, self.user, self.answer = llm, steps, number, user, answer
        self.tokens = source_tokens(llm, system, seed=1000 * number)
        self.dense = self.turns = 0

    def turn(self, others: int) -> dict[str, int]:
        """Let the user say something and the model answer it.

        Args:
            others: pages that a dense cache would hold of other conversations.

        Returns:
            Which conversation it was, the number of its turn, its first engine step and the one after its last,
            and the tokens of its prompt and how many of them were found in the cache.
        """
        self.turns += 1
        self.tokens += source_tokens(self.llm, self.user, seed=1000 * self.number + self.turns)
        begin, prompt, found = len(self.steps["live"]), len(self.tokens), 0
        add(self.llm, f"{self.number}, {self.turns}", self.tokens, self.answer)
        pool = manager(self.llm).pool
        cache = pool.prefixes
        assert cache is not None
        while self.llm.llm_engine.has_unfinished_requests():
            for out in step(self.llm):
                found = out.num_cached_tokens or 0
                if out.finished:
                    self.tokens = [*self.tokens, *out.outputs[0].token_ids]
            # Only this request runs. What a turn has filled is kept for the next one by a dense cache.
            self.dense = max(self.dense, int(pool.num_pages.max()) * int(pool.streams.sum()))
            self.steps["live"].append(pool.used_total)
            self.steps["cached"].append(sum(cache.idle))
            self.steps["given away"].append(cache.evicted_total)
            self.steps["dense"].append(self.dense + others)
        return {
            "conversation": self.number,
            "turn": self.turns,
            "begin": begin,
            "end": len(self.steps["live"]),
            "prompt_tokens": prompt,
            "cached_tokens": found,
        }


def trace(args: argparse.Namespace) -> dict[str, Any]:
    """Pages after every engine step, what every turn found, and the pages that there are."""
    steps: dict[str, list[int]] = {"live": [], "cached": [], "given away": [], "dense": []}
    turns = []
    with engine(
        args.model,
        {"page_size": PAGE},
        max_model_len=longest(args),
        max_num_batched_tokens=512,
        num_gpu_blocks_override=-(-longest(args) // PAGE) + 1,
    ) as llm:
        sizes = {"system": args.system, "user": args.user, "answer": args.answer}
        ours, other = (Conversation(llm, steps, number, **sizes) for number in (1, 2))
        for number in range(1, args.turns + 1):
            if number > args.turns - args.crowded:
                turns.append(other.turn(ours.dense))
            turns.append(ours.turn(other.dense))
        pages = num_blocks(llm) * int(manager(llm).pool.streams.sum())
    return {"pages": pages, "steps": steps, "turns": turns}


def longest(args: argparse.Namespace) -> int:
    """Tokens of the last turn, answer included."""
    return args.system + args.turns * (args.user + args.answer)


def plot(path: str, figures: dict[str, Any]) -> None:
    """Draw the pages over the engine steps, and below them what each turn found."""
    steps, turns = figures["steps"], figures["turns"]
    ours = sum(one["conversation"] == 1 for one in turns)
    live, cached, given_away = COLOURS
    figure, axes = plt.subplots(2, 1, figsize=(8, 5.6), sharex=True, height_ratios=[2, 1])
    # What is known after a step holds until the next one.
    edges = range(len(steps["live"]))
    axes[0].stackplot(
        edges,
        steps["live"],
        steps["cached"],
        colors=(live, cached),
        labels=("live: the running turn holds them", "cached: held by nobody"),
        step="post",
        lw=0,
    )
    axes[0].step(edges, steps["given away"], where="post", color=given_away, label="given away so far")
    axes[0].step(
        edges, steps["dense"], where="post", color="black", linestyle="--", label="in a dense cache of all turns"
    )
    axes[0].axhline(figures["pages"], color="grey", linestyle=":", label="KV memory")
    axes[0].set_ylabel("KV pages")
    others = f", and {len(turns) - ours} of another" if ours < len(turns) else ""
    axes[0].set_title(f"{ours} turns of a conversation{others}, in room for one")
    axes[0].legend(loc="upper left", fontsize="small")
    for one in turns:
        middle, width = (one["begin"] + one["end"]) / 2, one["end"] - one["begin"]
        mine = one["conversation"] == 1
        for tokens, colour in ((one["prompt_tokens"], "#dddddd"), (one["cached_tokens"], live)):
            axes[1].bar(middle, tokens, 0.9 * width, color=colour)
        name = f"turn {one['turn']}" if mine else f"other {one['turn']}"
        axes[1].annotate(name, (middle, one["prompt_tokens"]), ha="center", va="bottom", fontsize="small")
        if not mine:
            for axis in axes:
                axis.axvspan(one["begin"], one["end"], color="#f0f0f0", lw=0, zorder=0)
    axes[1].set_ylabel("prompt tokens\n(green: found)")
    axes[1].set_xlabel("engine step")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"saved {path}")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="examples/fox-tiny")
    parser.add_argument("--turns", type=positive_int, default=6)
    parser.add_argument(
        "--crowded", type=non_negative_int, default=2, help="last turns that another conversation comes before"
    )
    parser.add_argument("--system", type=positive_int, default=1024, help="tokens of the system text")
    parser.add_argument("--user", type=positive_int, default=480, help="tokens that the user says in a turn")
    parser.add_argument("--answer", type=positive_int, default=32, help="tokens of an answer")
    parser.add_argument("--out", default="docs/cached_pages.png")
    parser.add_argument("--json", default="results/cached_pages.json")
    args = parser.parse_args()
    if args.crowded > args.turns:
        parser.error(f"--crowded is {args.crowded}: it must be at most --turns {args.turns}.")
    if longest(args) > LONGEST:
        parser.error(f"--turns {args.turns} are together {longest(args)} tokens, which is more than {LONGEST}.")
    figures = trace(args)
    steps = figures["steps"]
    for one in figures["turns"]:
        span = slice(one["begin"], one["end"])
        print(
            f"conversation {one['conversation']}, turn {one['turn']}: {one['cached_tokens']} of "
            f"{one['prompt_tokens']} tokens found; at most {max(steps['live'][span])} of {figures['pages']} pages "
            f"live, {steps['cached'][one['end'] - 1]} cached and {steps['given away'][one['end'] - 1]} given away "
            f"at its end; {steps['dense'][one['end'] - 1]} in a dense cache"
        )
    plot(args.out, figures)
    save(args.json, figures)


if __name__ == "__main__":
    main()
