"""What eviction costs: a decoder that evicts beside itself without eviction, and beside windows of the same memory.

python -m benchmarks.quality MODEL [MODEL ...] --text TEXT_FOLDER [--plot docs/quality.png]

Each MODEL is the folder of a decoder that evicts (docs/eviction.md). It is computed by transformers in four ways:
as it is; without eviction; with a plain window; and with a window behind the first tokens (sinks). The windows have
as many tokens as the model's KV heads hold on average at the end of a text, so all three take the same memory.

- text: negative log-likelihood a token on real text, by position.
- needle: a number that was said once, far back. keys: one of several such numbers, by its name. variables: a value
  that is handed on from name to name. copying: a passage that is to be repeated. Of these the share of answers is
  counted whose tokens are all the likeliest ones.

"Without eviction" is the model with nothing evicted. That is the model which learned to evict only if it learned by
adapters: a borrowed neuron is no part of the query then, either.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.exercises import TASKS, Task
from benchmarks.options import Parser, find_texts, integer, non_negative_int, positive_int, refuse
from benchmarks.record import save
from vllm_fox.hf import EvictingDecoderForCausalLM
from vllm_fox.hf.evicting.modeling import EvictingSelfAttention
from vllm_fox.hf.line import Line

SYSTEMS = ("without eviction", "evicting", "window", "window and sinks")
SINKS = 4
"""Tokens at the beginning that the window with sinks keeps, as StreamingLLM (arXiv 2309.17453) does."""
BUCKETS = 8
"""Positions are told apart in so many equal parts of a text."""


# The four ways.


def attentions(model: EvictingDecoderForCausalLM) -> list[EvictingSelfAttention]:
    """The attention layers, in order."""
    return [module for module in model.modules() if isinstance(module, EvictingSelfAttention)]


def held_at_end(model: EvictingDecoderForCausalLM, ids: torch.Tensor) -> float:
    """Tokens that a KV head holds after texts [B, T], on average."""
    window = attentions(model)[0].eviction.window
    gone = model.evicted(ids)[..., : max(0, ids.shape[1] - window - 1)]
    return ids.shape[1] - gone.float().sum(-1).mean().item()


@contextmanager
def windowed(model: EvictingDecoderForCausalLM, window: int, sinks: int) -> Iterator[None]:
    """All tokens but the first are evicted behind another window, whatever the model decides."""
    layers = attentions(model)
    before = [layer.eviction for layer in layers]

    def decide(x: torch.Tensor, residual: torch.Tensor, q: torch.Tensor, line: Line) -> torch.Tensor:
        goes = torch.where(line.offsets < sinks, -1.0, 1.0)
        return goes[:, None].expand(-1, q.shape[1])

    for layer in layers:
        layer.eviction = replace(layer.eviction, window=window)
        layer.decisions = decide  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer, eviction in zip(layers, before, strict=True):
            layer.eviction = eviction
            del layer.decisions


def ways(model: EvictingDecoderForCausalLM, held: float) -> Iterator[str]:
    """Each of :data:`SYSTEMS` in turn, with the model set to compute so."""
    model.set_evicts(False)
    yield "without eviction"
    model.set_evicts(True)
    yield "evicting"
    for name, sinks in (("window", 0), ("window and sinks", SINKS)):
        # A token is seen up to ``window`` queries after its own.
        with windowed(model, max(1, round(held) - 1 - sinks), sinks):
            yield name


# What is measured.


@torch.no_grad()
def losses(model: EvictingDecoderForCausalLM, texts: list[torch.Tensor]) -> list[float]:
    """Mean negative log-likelihood a token, in nats, by position; of texts [1, T]."""
    found = []
    for ids in texts:
        logits = model(ids).logits[0, :-1].float()
        found.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    return [part.mean().item() for part in torch.stack(found).tensor_split(BUCKETS, dim=1)]


@torch.no_grad()
def right_answers(model: EvictingDecoderForCausalLM, asked: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Share of (prompt [n], answer [m]) whose answer's tokens are all the likeliest."""
    right = 0
    for prompt, answer in asked:
        ids = torch.cat((prompt, answer))[None]
        best = model(ids, logits_to_keep=len(answer) + 1).logits[0, :-1].argmax(-1)
        right += bool(torch.equal(best, answer))
    return right / len(asked)


def questions(task: Task, tokenizer: Any, args: argparse.Namespace) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Prompts and answers of a task as tokens."""

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    rng, asked = random.Random(args.seed), []
    for _ in range(args.questions):
        prompt, answer = task(rng, count, args.context - 64)
        tokens = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, answer))
        first, second = (torch.tensor(ids, device=args.device) for ids in tokens)
        asked.append((first, second))
    return asked


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model."""
    model = load(folder, args)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = text_windows(tokenizer, args)
    held = sum(held_at_end(model, ids) for ids in texts) / len(texts)
    asked = {name: questions(TASKS[name], tokenizer, args) for name in args.tasks}
    found: dict[str, Any] = {"held": held, "live_share": held / args.context, "systems": {}}
    for name in ways(model, held):
        by_position = losses(model, texts)
        row = {"loss": sum(by_position) / len(by_position), "loss_by_position": by_position}
        row |= {task: right_answers(model, some) for task, some in asked.items()}
        found["systems"][name] = row
    return found


def load(folder: Path, args: argparse.Namespace) -> EvictingDecoderForCausalLM:
    """The model. Ends the program if it is none, or has too few positions."""
    try:
        model = EvictingDecoderForCausalLM.from_pretrained(folder, dtype=args.dtype).to(args.device).eval()
    except (OSError, ValueError, RuntimeError) as error:
        refuse(f"MODEL {folder} is no decoder that evicts, as `python -m vllm_fox.convert` makes it: {error}")
    if (most := model.config.max_position_embeddings) < args.context:
        refuse(f"--context is {args.context}: MODEL {folder} has {most} positions.")
    assert isinstance(model, EvictingDecoderForCausalLM)
    return model


def text_windows(tokenizer: Any, args: argparse.Namespace) -> list[torch.Tensor]:
    """Texts [1, context] from the folder's files, one after the other."""
    ids: list[int] = []
    for path in find_texts(args.text):
        ids += tokenizer(path.read_text(), add_special_tokens=False).input_ids
        if len(ids) >= args.windows * args.context:
            break
    found = min(args.windows, len(ids) // args.context)
    if not found:
        refuse(f"--text {args.text} has {len(ids)} tokens, less than --context {args.context}: give more text.")
    return list(torch.tensor(ids[: found * args.context], device=args.device).view(found, 1, -1))


# What is said.


def table(found: dict[str, Any], context: int) -> str:
    """One line for each way of each model."""
    lines = []
    for model, figures in found.items():
        lines.append(
            f"{model}: a KV head holds {figures['held']:,.0f} of {context:,} tokens at the end "
            f"({figures['live_share']:.1%})."
        )
        dense = figures["systems"]["without eviction"]["loss"]
        tasks = [name for name in figures["systems"]["evicting"] if name in TASKS]
        lines.append(f"  {'':<18}{'nats a token':>14}{'more':>10}" + "".join(f"{name:>11}" for name in tasks))
        for name, row in figures["systems"].items():
            cells = "".join(f"{row[task]:>11.0%}" for task in tasks)
            lines.append(f"  {name:<18}{row['loss']:>14.4f}{row['loss'] - dense:>+10.4f}{cells}")
    return "\n".join(lines)


def plot(path: str, found: dict[str, Any]) -> None:
    """What eviction costs, against the share of the memory that it leaves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.6))
    for name, marker in zip(SYSTEMS[1:], ("o", "s", "^"), strict=True):
        points = sorted(
            (
                one["live_share"],
                one["systems"][name]["loss"] - one["systems"]["without eviction"]["loss"],
            )
            for one in found.values()
        )
        axis.plot(*zip(*points, strict=True), marker=marker, label=name)
    axis.set_xlabel("share of the KV memory that is left")
    axis.set_ylabel("nats a token lost")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"saved {path}")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--text", type=Path, required=True, help="folder of text files that were not trained on")
    parser.add_argument("--context", type=integer(128), default=4096, help="tokens of a text, and of a prompt")
    parser.add_argument("--windows", type=positive_int, default=16, help="texts, at most")
    parser.add_argument("--questions", type=positive_int, default=32, help="of each task")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seed", type=non_negative_int, default=0)
    parser.add_argument("--plot", help="PNG of what is lost, by share of the memory")
    parser.add_argument("--json", default="results/quality.json")
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    found: dict[str, Any] = {}
    for folder in args.models:
        found[str(folder)] = measure(folder, args)
        save(args.json, {"context": args.context, "models": found})
        print(table({str(folder): found[str(folder)]}, args.context), flush=True)
    if args.plot:
        plot(args.plot, found)


if __name__ == "__main__":
    main()
