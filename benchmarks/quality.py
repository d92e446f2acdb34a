"""What eviction costs: a decoder that evicts beside itself without eviction, and beside windows of the same memory.

python -m benchmarks.quality MODEL [MODEL ...] --text TEXT_FOLDER [--plot docs/quality.png]

Each MODEL is the folder of a decoder that evicts (docs/eviction.md). It is computed by transformers in four ways:
as it is; without eviction; with a plain window; and with a window behind the first tokens (sinks). The windows have
as many tokens as the model's KV heads hold on average at the end of a text, so all three take the same memory.

Where NVIDIA's kvpress can be imported, two of its presses are measured beside them, with the dense model and
kvpress's own code: SnapKV (arXiv 2404.14469), which keeps what the last tokens of a prompt attend to, and expected
attention (arXiv 2510.00636), which keeps what later tokens are likely to attend to. A press compresses once, when
all of a prompt has been read densely. Each KV head then keeps as many tokens as the model's KV heads hold on
average at the end of the same prompt. What is measured comes after that: the last eighth of a text, whose first
seven eighths are the prompt, and answers, whose question is part of the prompt. So "at the end" is what to compare,
the likelihood of the last eighth for all of them. The comparison favours the presses: they read the prompt densely,
and they evict nothing after it, which the other ways do.

kvpress 0.5.5 asks for a transformers below 5.3. With transformers 5.19 its presses fail for want of
``cache_position``, which transformers does not pass any more. They work if the caller passes it, as is done here.
So install it by ``pip install --no-deps kvpress datasets peft fire dill xxhash multiprocess termcolor``.

- text: negative log-likelihood a token on real text, by position.
- needle: a number that was said once, far back. keys: one of several such numbers, by its name. variables: a value
  that is handed on from name to name. copying: a passage that is to be repeated. Of these the share of answers is
  counted whose tokens are all the likeliest ones.

"Without eviction" is the model with nothing evicted. That is the model which learned to evict only if it has
adapters or predictors: a borrowed neuron is no part of the query then, either.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from benchmarks.exercises import TASKS, Task
from benchmarks.options import Parser, find_texts, integer, non_negative_int, positive_int, refuse
from benchmarks.record import save
from benchmarks.texts import token_windows
from vllm_fox.hf import EvictingDecoderForCausalLM
from vllm_fox.hf.evicting.modeling import EvictingSelfAttention
from vllm_fox.hf.line import Line

SYSTEMS = ("without eviction", "evicting", "window", "window and sinks")
PRESSES = {"SnapKV": "SnapKVPress", "expected attention": "ExpectedAttentionPress"}
"""Their names in the table, and in kvpress."""
OBSERVED = 64
"""Tokens at the end of a prompt by whose attention SnapKV chooses, and which it keeps: kvpress's default. Where
half of what is kept is less, it is that."""
SINKS = 4
"""Tokens at the beginning that the window with sinks keeps, as StreamingLLM (arXiv 2309.17453) does."""
COLUMNS = (("nats a token", 14), ("more", 10), ("at the end", 12), ("more", 10))
"""Of the table, with their widths: of the whole texts, and of their last part."""
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


# kvpress.


def kvpress() -> Any:
    """The package, or None with a sentence on standard error."""
    try:
        return import_module("kvpress")
    except ImportError as error:
        print(f"The presses of kvpress are left out, because it cannot be imported: {error}.", file=sys.stderr)
        return None


def dense_model(model: EvictingDecoderForCausalLM) -> Any:
    """The model before it learned to evict, of transformers' own class, with the same weights; or None with a
    sentence on standard error if there is none."""
    kind, method = model.config.base_model_type, model.config.eviction["method"]
    if kind is None or method == "dms_borrowed_neuron":
        why = "its config has no base_model_type" if kind is None else "a neuron of its queries decides"
        print(f"The presses of kvpress are left out, which need the dense model: {why}.", file=sys.stderr)
        return None
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
    )  # fmt: skip
    fields = {name: getattr(model.config, name) for name in names}
    if kind == "mistral":
        fields["sliding_window"] = None
    if kind != "qwen2":
        fields |= {name: getattr(model.config, name) for name in ("head_dim", "attention_bias", "mlp_bias")}
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields), dtype=model.dtype)
    weights = model.state_dict()
    dense.load_state_dict({name: weights[name] for name in dense.state_dict()})
    return dense.to(model.device).eval()


def make_press(package: Any, name: str, length: int, kept: int) -> Any:
    """A press that keeps ``kept`` of a prompt's ``length`` tokens in each KV head."""
    # kvpress rounds down.
    ratio = max(0.0, 1 - (kept + 0.5) / length)
    more = {"window_size": min(OBSERVED, kept // 2)} if name == "SnapKV" else {}
    return getattr(package, PRESSES[name])(compression_ratio=ratio, **more)


@torch.no_grad()
def logits_after(dense: Any, press: Any, prompt: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """Return the logits [m, vocab] of tokens [m] that follow a prompt [n], which the press has compressed."""
    cache = DynamicCache(config=dense.config)
    position = torch.arange(len(prompt) + len(rest), device=prompt.device)
    with press(dense):
        dense.model(prompt[None], past_key_values=cache, cache_position=position[: len(prompt)])
    after = position[len(prompt) :][None]
    logits: torch.Tensor = dense(rest[None], past_key_values=cache, position_ids=after).logits[0]
    return logits


def measure_press(
    package: Any,
    name: str,
    dense: Any,
    model: EvictingDecoderForCausalLM,
    texts: list[torch.Tensor],
    asked: dict[str, list[tuple[torch.Tensor, torch.Tensor]]],
) -> dict[str, Any]:
    """The figures of one press at the memory of the model that evicts."""

    def logits_of(prompt: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        kept = round(held_at_end(model, prompt[None]))
        return logits_after(dense, make_press(package, name, len(prompt), kept), prompt, rest)

    found = []
    for (ids,) in texts:
        begin = len(ids) - 1 - len(ids[1:].tensor_split(BUCKETS)[-1])
        logits = logits_of(ids[:begin], ids[begin:-1])
        found.append(torch.nn.functional.cross_entropy(logits.float(), ids[begin + 1 :]).item())
    row: dict[str, Any] = {"loss_at_end": sum(found) / len(found)}
    for task, some in asked.items():
        right = 0
        for prompt, answer in some:
            # The prompt's last token comes after it, so that the first token of the answer is no dense one.
            best = logits_of(prompt[:-1], torch.cat((prompt[-1:], answer[:-1]))).argmax(-1)
            right += bool(torch.equal(best, answer))
        row[task] = right / len(some)
    return row


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
    windows = token_windows(tokenizer, find_texts(args.text), args.windows, args.context, f"--text {args.text}")
    texts = [ids[None].to(args.device) for ids in windows]
    held = sum(held_at_end(model, ids) for ids in texts) / len(texts)
    asked = {name: questions(TASKS[name], tokenizer, args) for name in args.tasks}
    found: dict[str, Any] = {"held": held, "live_share": held / args.context, "systems": {}}
    for name in ways(model, held):
        by_position = losses(model, texts)
        row = {"loss": sum(by_position) / len(by_position), "loss_by_position": by_position}
        row["loss_at_end"] = by_position[-1]
        row |= {task: right_answers(model, some) for task, some in asked.items()}
        found["systems"][name] = row
    package = kvpress()
    if package is not None and (dense := dense_model(model)) is not None:
        for name in PRESSES:
            found["systems"][name] = measure_press(package, name, dense, model, texts, asked)
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


# What is said.


def table(found: dict[str, Any], context: int) -> str:
    """One line for each way of each model."""
    lines = []
    for model, figures in found.items():
        lines.append(
            f"{model}: a KV head holds {figures['held']:,.0f} of {context:,} tokens at the end "
            f"({figures['live_share']:.1%})."
        )
        dense = figures["systems"]["without eviction"]
        tasks = [name for name in figures["systems"]["evicting"] if name in TASKS]
        heads = "".join(f"{name:>{width}}" for name, width in (*COLUMNS, *((task, 11) for task in tasks)))
        lines.append(f"  {'':<18}{heads}")
        for name, row in figures["systems"].items():
            cells = ""
            # A press has no likelihoods of its prompt.
            for kind, width in (("loss", 14), ("loss_at_end", 12)):
                value = row.get(kind)
                cells += (
                    f"{'':>{width + 10}}" if value is None else f"{value:>{width}.4f}{value - dense[kind]:>+10.4f}"
                )
            cells += "".join(f"{row[task]:>11.0%}" for task in tasks)
            lines.append(f"  {name:<18}{cells}")
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
