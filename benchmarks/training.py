"""Training with and without ACP, and the peers' kernels, on one GPU.

python -m benchmarks.training kernels --gates gates.safetensors      # forward + backward of one layer, and peers
python -m benchmarks.training steps runs/fox --compile --as-started  # whole steps, each way to train, by context
python -m benchmarks.training steps runs/fox --layers 24 --checkpointing         # random weights
python -m benchmarks.training curves runs/fox runs/fox-unpruned      # the losses of two runs, one --no-pruning
python -m benchmarks.training patterns runs/fox --plot docs/forgetting.png
python -m benchmarks.training positions runs/fox                     # loss by position, live share by length

All but `kernels` read what examples/train_fox.py wrote: gates of real training on real text. What bfloat16 does to
gradients, and to what is learnt with them, is benchmarks.precision's.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from captured_gradients import CapturedGradients

from benchmarks.options import (
    Parser,
    existing_file,
    integer,
    positive_float,
    positive_int,
    read_records,
    training_run,
)
from benchmarks.peers import (
    PREFILL,
    Prefill,
    live_pairs,
    load_gates,
    median_ms,
    official_model,
    pruning_threshold,
)
from benchmarks.record import save
from vllm_fox.hf import ForgettingTransformerForCausalLM, compile_layers, live_shares
from vllm_fox.kernels import forgetting_attention

HEADS, DIM = 24, 64
PEERS = ("official FoX", "official FoX, ACP", "fla", "SDPA (cuDNN)")
STEP_TOKENS = 65536


def backward_too(call: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Callable[[], Any]:
    """The call, and the gradients of its inputs for a gradient of its output."""
    grad = torch.randn_like(call())
    return lambda: torch.autograd.grad(call(), leaves, grad, allow_unused=True)


def kernels(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of the forward pass, and of forward and backward, by length."""
    figures: dict[str, Any] = {}
    for length in args.lengths:
        gates = load_gates(args.gates, HEADS, length)
        leaves = [torch.randn(1, length, HEADS, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        leaves[:2] = [x / x.float().square().mean(-1, keepdim=True).sqrt().to(x) for x in leaves[:2]]  # as QK-norm
        leaves.append(gates.log_forget[None].cuda())
        for leaf in leaves:
            leaf.requires_grad_()
        bound = gates.logit_bound.cuda()
        threshold = pruning_threshold(bound, length)
        inputs = Prefill(leaves[0], leaves[1], leaves[2], leaves[3], bound)
        calls: dict[str, Callable[[], torch.Tensor]] = {
            "ours, ACP": partial(forgetting_attention, *leaves, threshold=threshold),
            "ours, nothing pruned": partial(forgetting_attention, *leaves),
        }
        absent = {}
        for peer in PREFILL:
            if peer.label in PEERS:
                call, why = peer.bind(inputs)
                if call is None:
                    absent[peer.label] = why
                else:
                    calls[peer.label] = call
        times = {}
        for name, call in calls.items():
            with torch.no_grad():
                forward = median_ms(call)
            times[name] = {"forward": forward, "forward and backward": median_ms(backward_too(call, leaves))}
        share = live_pairs(gates.log_forget, threshold, 64).share
        figures[str(length)] = {"live_share": share, "gates": gates.source, "ms": times, "absent": absent}
        print(f"{length:,} tokens, {100 * share:.1f} % of pairs live")
        for name, row in times.items():
            both, ours = row["forward and backward"], times["ours, ACP"]["forward and backward"]
            print(f"  {name:24}{row['forward']:9.3f} ms{both:9.3f} ms with backward ({both / ours:.2f}x)")
        for name, why in absent.items():
            print(f"  {name:24} absent: {why}")
    return figures


def load(run: Path, pruning: bool, context: int | None = None) -> Any:
    """A run's model in float32, as it was trained."""
    # By its class: the official package, once imported, takes AutoModel's place for this type.
    model: Any = ForgettingTransformerForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    return fresh(model, pruning, context)


def fresh(model: Any, pruning: bool, context: int | None = None) -> Any:
    """A copy of a model that reads as many tokens as ``context`` says."""
    config = copy.deepcopy(model.config)
    config.log_pruning_tolerance = -10.0 if pruning else None
    if context is not None:
        config.max_position_embeddings = context
    found = type(model)(config)
    found.load_state_dict(model.state_dict())
    return found


def text(run: Path, tokens: int) -> torch.Tensor:
    """[tokens] of the run's training text, from its start."""
    data = np.load(run / "data" / "train.npy", mmap_mode="r")
    return torch.from_numpy(np.resize(data, tokens).astype(np.int64))


class Loss(torch.nn.Module):
    """Our model as loss of token windows [B, T]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, **bounds: Any) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=input_ids, labels=input_ids, use_cache=False, **bounds).loss
        return loss


@dataclass
class System:
    """A way to train a model, for :func:`one_step`."""

    model: torch.nn.Module  # its output is the loss of token windows
    captured: bool = False
    packed: int = 0
    """Tokens of the texts that stand in one row, instead of windows; 0: none."""

    def __post_init__(self) -> None:
        self.model.cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)
        for weight in self.model.parameters():
            weight.grad = torch.zeros_like(weight)
        self.optimizer.step()  # makes its state
        self.optimizer.zero_grad()
        self.run: Callable[..., torch.Tensor] = self._backward
        if self.captured:
            self.run = CapturedGradients(self._backward, self.model.parameters())

    def _backward(self, part: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss: torch.Tensor = self.model(part, **self._bounds(part)) / self.parts
        loss.backward()
        return loss.detach()

    def _bounds(self, part: torch.Tensor) -> dict[str, Any]:
        if not self.packed:
            return {}
        bounds = torch.arange(0, part.numel() + 1, self.packed, dtype=torch.int32)
        names = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        return names | {"max_length_q": self.packed, "max_length_k": self.packed}

    def step(self, batch: torch.Tensor, windows: int) -> torch.Tensor:
        """Train on a batch [B, T], ``windows`` at once; returns its mean loss."""
        pieces = [part.reshape(1, -1) if self.packed else part for part in batch.split(windows)]
        self.parts = len(pieces)
        losses = [self.run(part) for part in pieces]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.captured)
        return torch.stack(losses).sum()


def of_other_size(config: Any, layers: int, hidden: int, heads: int) -> Any:
    """A config like another one, with an MLP as wide as its hidden size asks for."""
    given = config.to_dict() | {"num_hidden_layers": layers, "hidden_size": hidden, "num_heads": heads}
    return type(config)(**given | {"num_kv_heads": None, "intermediate_size": None})


def geometry(args: argparse.Namespace) -> Any:
    """A model with the run's vocabulary and random weights, whose heads forget half of the past in 2 to 5,600
    tokens. A trained model's gates leave less of it, and the losses mean nothing."""
    config = ForgettingTransformerForCausalLM.from_pretrained(args.run / "model").config
    config = of_other_size(config, args.layers, args.hidden, args.heads)
    config.log_pruning_tolerance = -10.0
    torch.manual_seed(0)
    with torch.device("cuda"):
        model: Any = ForgettingTransformerForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.attn.fgate_proj.bias.copy_(torch.linspace(1, 9, args.heads))
    return model


def systems(args: argparse.Namespace, context: int) -> tuple[dict[str, System], dict[str, str]]:
    """What trains the run's model, and what is missing, and why."""

    def ours(pruning: bool = True) -> Loss:
        model = fresh(args.random, pruning, context) if args.random else load(args.run, pruning, context)
        if args.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        return Loss(model).train()

    found: dict[str, System] = {}
    model: Any
    for name, pruning in (("ours, ACP", True), ("ours, no ACP", False)):
        model = ours(pruning)
        if args.compile:
            compile_layers(model)
        found[name] = System(model, captured=args.compile)
    if args.packed:
        model = ours()
        if args.compile:
            compile_layers(model)
        found["ours, packed"] = System(model, packed=context)
    if args.as_started:
        found["ours, no flag"] = System(ours())
        if not args.checkpointing:
            plain = ours()
            plain.model.model.eval()  # in evaluation mode layers compute in plain PyTorch
            found["ours, plain"] = System(plain)
    try:
        model = cast(Loss, found["ours, ACP"].model).model
        official: Any = official_model(model.config, model.state_dict())
    except ImportError as error:
        return found, {"official, ACP": str(error)}
    if args.checkpointing:
        official.gradient_checkpointing_enable({"use_reentrant": False})
    found["official, ACP"] = System(official.train())
    return found, {}


def one_step(system: System, batch: torch.Tensor, windows: int) -> tuple[float, float, float]:
    """Seconds of a step over a batch [B, T], ``windows`` at once, its mean loss, and the GiB that it takes at most
    beside weights and the optimizer's state."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    start = time.perf_counter()
    total = system.step(batch, windows)
    torch.cuda.synchronize()
    taken = time.perf_counter() - start
    return taken, float(total), (torch.cuda.max_memory_allocated() - held) / 2**30


def busy_seconds(system: System, batch: torch.Tensor, windows: int) -> float:
    """Return how long kernels run in a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        system.step(batch, windows)
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6


def operations(model: Any, batch: torch.Tensor, live: float) -> tuple[float, float]:
    """Return the floating-point operations of a step by the usual count, with the pairs that live, and with all.

    Six for each weight of a matrix and token, and in attention twelve for each pair, head and dimension of a head.
    """
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embeddings" not in name)
    if model.config.tie_word_embeddings:
        matrices += model.lm_head.weight.numel()
    sequences, length = batch.shape
    pairs = sequences * length * (length + 1) / 2 * model.config.num_hidden_layers * model.config.hidden_size
    found = 6.0 * matrices * batch.numel()
    return found + 12 * pairs * live, found + 12 * pairs


def steps(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of whole training steps, systems in turns, and the share of pairs that live."""
    args.random = geometry(args) if args.layers else None
    figures: dict[str, Any] = {}
    for context in args.lengths:
        torch.compiler.reset()  # every length is compiled for as if it were the first
        found, absent = systems(args, context)
        batch = text(args.run, max(STEP_TOKENS, context)).view(-1, context).cuda()
        windows = max(1, args.micro_tokens // context)
        rates: dict[str, list[float]] = {name: [] for name in found}
        losses: dict[str, float] = {}
        peaks: dict[str, float] = {}
        for repeat in range(args.repeats + 2):
            for name in list(rates):
                try:
                    taken, losses[name], peak = one_step(found[name], batch, windows)
                except Exception as error:  # whatever a peer's code raises, the others are still to be timed
                    if name.startswith("ours"):
                        raise
                    absent[name] = f"{type(error).__name__}: {error}"[:200]
                    del rates[name]
                    continue
                # A replayed graph uses memory that it took for itself when it was captured, in the first step.
                peaks[name] = max(peaks.get(name, 0.0), peak) if found[name].captured else peak
                if repeat >= 2:
                    rates[name].append(batch.numel() / taken)
        busy = {name: busy_seconds(found[name], batch, windows) for name in rates}
        model = args.random or load(args.run, True, context)
        live = live_shares(model.cuda().eval(), batch[:1]).mean().item()
        counted = operations(model, batch, live)
        speed = {name: statistics.median(rate) for name, rate in rates.items()}
        parameters = sum(p.numel() for p in model.parameters())
        figures[str(context)] = {
            "live_share": live,
            "compiled": args.compile,
            "checkpointing": args.checkpointing,
            "parameters": parameters,
            "tokens_per_second": speed,
            "all_tokens_per_second": rates,
            "busy_seconds": busy,
            "operations": dict(zip(("live pairs", "all pairs"), counted)),
            "losses": losses,
            "step_gib": peaks,
            "absent": absent,
        }
        print(f"{context:,} tokens, {parameters:,} parameters: {100 * live:.1f} % of pairs live")
        for name, rate in speed.items():
            seconds = batch.numel() / rate
            of_peak = " and ".join(f"{count / seconds / args.peak_tflops / 1e10:.0f}" for count in counted)
            print(
                f"  {name:16}{rate:12,.0f} tokens/s (ours with ACP {speed['ours, ACP'] / rate:.2f}x), "
                f"{1e3 * seconds:.1f} ms, GPU busy {100 * busy[name] / seconds:.0f} %, {of_peak} % of its peak "
                f"with live and all pairs, loss {losses[name]:.4f}, {peaks[name]:.1f} GiB"
            )
        for name, why in absent.items():
            print(f"  {name:16} absent: {why}")
        if args.save:
            save(args.save, {"command": "steps", "figures": figures})
        del found, model
        gc.collect()  # a captured system refers to itself
        torch.cuda.empty_cache()
    return figures


def curves(args: argparse.Namespace) -> dict[str, Any]:
    """Two runs from the same seed, with and without pruning: how far apart their losses are."""
    logs = [list(read_records(run / "log.jsonl")) for run in args.runs]
    for run, log in zip(args.runs, logs):
        if not any("validation_loss" in line for line in log):
            raise SystemExit(f"{run} was never validated: its log.jsonl has no validation_loss.")
    losses = [[line["loss"] for line in log] for log in logs]
    if len(losses[0]) != len(losses[1]):
        raise SystemExit(f"the runs have {len(losses[0])} and {len(losses[1])} steps: give two of equal length.")
    apart = statistics.mean(abs(a - b) for a, b in zip(*losses))
    final = [next(line["validation_loss"] for line in reversed(log) if "validation_loss" in line) for log in logs]
    print(f"{len(losses[0])} steps: losses {apart:.5f} nats apart; validation {final[0]:.4f}, {final[1]:.4f}")
    if args.plot:
        _plot_curves(args.plot, losses, [run.name for run in args.runs])
    return {"mean_absolute_difference": apart, "validation": final, "losses": losses}


def patterns(args: argparse.Namespace) -> dict[str, Any]:
    """Live share by layer and head on the run's own text."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(args.run, True, args.context).to(device).eval()
    shares = live_shares(model, text(args.run, args.context)[None].to(device))
    for layer, row in enumerate(shares.tolist()):
        print(f"layer {layer:2}: " + " ".join(f"{100 * share:5.1f}" for share in row))
    if args.plot:
        _plot_patterns(args.plot, shares)
    return {"context": args.context, "live_share": shares.tolist()}


def positions(args: argparse.Namespace) -> dict[str, Any]:
    """Loss by position in held-out texts, from their first token on, and live share by how much of them is read."""
    held_out = np.load(args.run / "data" / "held_out.npy").astype(np.int64)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(args.run, True).to(device).eval()
    ends = np.append(np.flatnonzero(held_out == model.config.eos_token_id), len(held_out))
    texts = [held_out[a : a + args.context] for a, b in zip(ends, ends[1:]) if b - a >= args.context][: args.texts]
    if not texts:
        raise SystemExit(f"--context is {args.context:,}: no held-out text is as long.")
    total = torch.zeros(args.context - 1, dtype=torch.float64)
    lengths = [args.context >> n for n in range(5, -1, -1)]
    shares = torch.zeros(len(lengths), dtype=torch.float64)
    for one in texts:
        ids = torch.from_numpy(one)[None].to(device)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").cpu().double()
        shares += torch.stack([live_shares(model, ids[:, :n]).mean() for n in lengths]).cpu().double()
    losses = [total[a:b].mean().item() / len(texts) for a, b in zip([0, *lengths], lengths)]
    print(f"{len(texts)} held-out texts of {args.context:,} tokens or more")
    for a, b, loss, share in zip([0, *lengths], lengths, losses, (shares / len(texts)).tolist()):
        print(f"positions {a:6,} to {b:6,}: loss {loss:.3f}; of the first {b:6,} tokens {share:6.1%} of pairs live")
    return {"texts": len(texts), "lengths": lengths, "losses": losses, "live_share": (shares / len(texts)).tolist()}


def _figure(width: float) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, 3.2))


def _plot_curves(path: str, losses: list[list[float]], names: list[str]) -> None:
    figure, axis = _figure(6)
    for loss, name, style in zip(losses, names, ("-", "--")):
        axis.plot(range(1, len(loss) + 1), loss, style, label=name, linewidth=1)
    axis.set_xlabel("step")
    axis.set_ylabel("loss, nats a token")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _plot_patterns(path: str, shares: torch.Tensor) -> None:
    figure, axis = _figure(5)
    image = axis.imshow(shares.numpy(), vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axis.set_xlabel("head")
    axis.set_ylabel("layer")
    figure.colorbar(image, label="share of pairs that live")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("kernels")
    one.add_argument(
        "--gates", type=existing_file, help="safetensors with log_forget and logit_bound; synthetic gates without"
    )
    one.add_argument("--lengths", type=positive_int, nargs="+", default=[4096, 16384, 65536])
    two = commands.add_parser("steps")
    two.add_argument("run", type=training_run)
    two.add_argument("--lengths", type=positive_int, nargs="+", default=[4096, 8192, 16384, 32768])
    two.add_argument("--micro-tokens", type=positive_int, default=32768)
    two.add_argument("--repeats", type=positive_int, default=5)
    two.add_argument("--compile", action="store_true", help="ours as examples/train_fox.py --compile computes")
    two.add_argument("--packed", action="store_true", help="also ours with a piece's windows packed into a row")
    two.add_argument("--checkpointing", action="store_true", help="layers are computed again in the backward pass")
    two.add_argument("--layers", type=positive_int, help="of a model of random weights instead of the run's")
    two.add_argument("--hidden", type=positive_int, default=2048)
    two.add_argument("--heads", type=positive_int, default=32)
    two.add_argument("--peak-tflops", type=positive_float, default=989.0, help="of the card in bfloat16")
    two.add_argument("--as-started", action="store_true", help="also ours without a flag, and with plain layers")
    three = commands.add_parser("curves")
    three.add_argument("runs", type=training_run, nargs=2)
    three.add_argument("--plot")
    four = commands.add_parser("patterns")
    four.add_argument("run", type=training_run)
    four.add_argument("--context", type=integer(2), default=8192)
    four.add_argument("--plot")
    five = commands.add_parser("positions")
    five.add_argument("run", type=training_run)
    five.add_argument("--context", type=integer(64), default=8192)
    five.add_argument("--texts", type=positive_int, default=64)
    for command in (one, two, three, four, five):
        command.add_argument("--save", help="JSON file for the figures")
    args = parser.parse_args()
    if args.command == "steps":
        for length in args.lengths:
            if length < STEP_TOKENS and STEP_TOKENS % length:
                two.error(f"--lengths is {length}: it must divide a step of {STEP_TOKENS} tokens, or be longer.")
    calls = {"kernels": kernels, "steps": steps, "curves": curves, "patterns": patterns, "positions": positions}
    figures = calls[args.command](args)
    if args.save:
        save(args.save, {"command": args.command, "figures": figures})


if __name__ == "__main__":
    main()
