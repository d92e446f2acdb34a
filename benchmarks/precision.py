"""What bfloat16 does to training: how far its gradients are from float32's, and how well a model learns with them.

python -m benchmarks.precision gradients CHECKPOINT TEXT --output runs/gradients    # distances from float32
python -m benchmarks.precision learning CHECKPOINT TEXT --output runs/learning      # held-out losses over seeds

CHECKPOINT is a FoX of the official dialect with its tokenizer.json, and TEXT a folder of text files. Every system
runs in a process of its own, as many at a time as there are GPUs. Systems called "before" run the code of another
checkout, which ``--before`` names; without it they are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

# Not from benchmarks.options: in the processes of an earlier checkout, "benchmarks" is that checkout's.
sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

from command_line import Parser, integer, positive_float, positive_int, seed_number
from text_corpus import load_tokenizer, prepare
from whole_files import files_under, read_record, replacing, write_whole

ROOT = Path(__file__).resolve().parent.parent
BATCH = 65536
"""Tokens a step: as many windows as hold them."""
TOGETHER = 32768
"""Tokens of a step at once, or one window."""
WIDE = "ours, float32"
LEARNERS = ("ours", "before", "official", "float32 attention")
SYSTEMS = (
    WIDE, "ours", "ours, compiled", "before", "official",
    "ours, bfloat16 weights", "before, bfloat16 weights", "official, bfloat16 weights",
)  # fmt: skip


# ---- in the process of one system ----


def make_model(system: str, checkpoint: Path, seed: int | None = None) -> tuple[Any, Callable[..., torch.Tensor]]:
    """The system's model on the GPU, and its mean loss of token windows [B, T].

    Args:
        seed: of a random start; None starts from the checkpoint's weights.
    """
    from vllm_fox.hf import ForgettingTransformerForCausalLM

    model: Any = ForgettingTransformerForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    if seed is not None:
        torch.manual_seed(seed)
        model = ForgettingTransformerForCausalLM(model.config)
    if system == "float32 attention":
        modeling: Any = sys.modules[ForgettingTransformerForCausalLM.__module__]
        plain = modeling.forgetting_attention

        def widened(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
            return plain(q.float(), k.float(), v.float(), *rest, **options).to(q.dtype)

        modeling.forgetting_attention = widened
    if system.startswith("official"):
        from benchmarks.peers import official_model

        model = official_model(model.config, model.state_dict())
        loss_of = model
    else:

        def loss_of(ids: torch.Tensor) -> torch.Tensor:
            loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
            return loss

    return model.to("cuda", torch.bfloat16 if "weights" in system else torch.float32).train(), loss_of


def backward(system: str, loss_of: Callable[..., torch.Tensor], windows: torch.Tensor) -> float:
    """Gradients of the mean loss over windows [B, T]; returns the loss."""
    # The official model asks for autocast whatever its weights are.
    plain = system == WIDE or ("weights" in system and not system.startswith("official"))
    precision = contextlib.nullcontext() if plain else torch.autocast("cuda", dtype=torch.bfloat16)
    parts, total = windows.split(max(1, TOGETHER // windows.shape[1])), 0.0
    for part in parts:
        with precision:
            loss = loss_of(part) / len(parts)
        loss.backward()
        total += loss.item()
    return total


def gradients_of(system: str, args: argparse.Namespace) -> None:
    """Save the gradients of one batch, cut into windows of each length."""
    from vllm_fox.hf import compile_layers

    ids = torch.from_numpy(np.load(args.output / "batch.npy")).cuda()
    model, loss_of = make_model(system, args.checkpoint)
    if "compiled" in system:
        compile_layers(model)
    for length in args.lengths:
        begun = time.perf_counter()
        model.zero_grad()
        backward(system, loss_of, ids.view(-1, length))
        grads = {name: weight.grad.float().cpu() for name, weight in model.named_parameters()}
        with replacing(args.output / f"{system}-{length}.safetensors") as new:
            save_file(grads, new)
        print(f"{system}, windows of {length:,}: {time.perf_counter() - begun:.0f} s", flush=True)


def learn(system: str, args: argparse.Namespace) -> None:
    """Train from one start by each seed; save the losses of each."""
    from vllm_fox.hf import ForgettingTransformerForCausalLM, compile_layers

    windows = {}
    for name in ("train", "held_out"):
        ids = np.load(args.output / "data" / f"{name}.npy")
        windows[name] = ids[: len(ids) // args.context * args.context].reshape(-1, args.context).astype(np.int64)
    judge: Any = ForgettingTransformerForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32)
    judge.cuda().eval()
    fresh = args.start == "random"
    steps, rate = (args.steps, args.lr) if fresh else (args.tuning_steps, args.tuning_lr)
    for seed in args.seeds:
        if read_record(learned(args.output, system, args.start, seed)) is not None:
            continue
        begun = time.perf_counter()
        model, loss_of = make_model(system, args.checkpoint, seed if fresh else None)
        if system != "official":
            compile_layers(model)
        weights = list(model.parameters())
        optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        order = np.random.default_rng(seed).permutation(len(windows["train"]))
        per_step = BATCH // args.context
        losses, norms = [], []
        for step in range(steps):
            warm_up = min(1.0, 6 * (step + 1) / steps)
            for group in optimizer.param_groups:
                group["lr"] = rate * warm_up * 0.5 * (1 + math.cos(math.pi * step / steps))
            picked = order[np.arange(step * per_step, (step + 1) * per_step) % len(order)]
            losses.append(backward(system, loss_of, torch.from_numpy(windows["train"][picked]).cuda()))
            norms.append(torch.nn.utils.clip_grad_norm_(weights, 1.0).item())
            optimizer.step()
            optimizer.zero_grad()
        judge.load_state_dict(model.state_dict())
        texts = torch.from_numpy(windows["held_out"][: args.eval_windows]).cuda()
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            judged = [judge(input_ids=one, labels=one, use_cache=False).loss.item() for one in texts.split(1)]
        held_out, seconds = statistics.mean(judged), time.perf_counter() - begun
        print(f"{system}, {args.start}, seed {seed}: held-out loss {held_out:.4f}, {seconds:.0f} s", flush=True)
        result = {"held_out": held_out, "losses": losses, "gradient_norms": norms, "seconds": seconds}
        write_whole(learned(args.output, system, args.start, seed), json.dumps(result))


# ---- in the process that was started ----


def prepare_batch(args: argparse.Namespace) -> None:
    """The first tokens of TEXT by the checkpoint's tokenizer, in OUTPUT/batch.npy."""
    tokenizer = load_tokenizer(args.checkpoint / "tokenizer.json")
    ids: list[int] = []
    for path in (path for path in files_under(args.text, args.output) if path.is_file()):
        ids += tokenizer.encode(path.read_text(errors="ignore")).ids
        if len(ids) >= BATCH:
            break
    else:
        raise SystemExit(f"{args.text} has {len(ids):,} tokens of text: {BATCH:,} are needed.")
    args.output.mkdir(parents=True, exist_ok=True)
    np.save(args.output / "batch.npy", np.array(ids[:BATCH]))


def prepare_corpus(args: argparse.Namespace) -> None:
    """TEXT as token ids by the checkpoint's tokenizer, in OUTPUT/data."""

    def enough(train: int, held_out: int) -> None:
        if train < BATCH or held_out < args.context:
            raise SystemExit(
                f"{args.text} is too little text: {train:,} tokens to train on, of which {BATCH:,} are needed, and "
                f"{held_out:,} held out, of which --context {args.context:,}."
            )

    prepare(args.text, args.output / "data", 0, 0, args.checkpoint / "tokenizer.json", enough)


def run_all(jobs: Sequence[list[str]], before: Path | None) -> None:
    """This file's own processes, each ``[call, system, argument, ...]``, one at a time on every GPU."""
    free: SimpleQueue[int] = SimpleQueue()
    for gpu in range(torch.cuda.device_count()):
        free.put(gpu)

    def run(job: list[str]) -> None:
        gpu = free.get()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        code = before if job[1].startswith("before") else ROOT
        path = os.pathsep.join(filter(None, (str(code), os.environ.get("PYTHONPATH"))))
        mine = {"CUDA_VISIBLE_DEVICES": visible[gpu] if gpu < len(visible) and visible[gpu] else str(gpu)}
        # -P: this folder's modules are not to be found by their bare names.
        done = subprocess.run([sys.executable, "-P", __file__, *job], env=os.environ | {"PYTHONPATH": path} | mine)
        free.put(gpu)
        if done.returncode:
            print(f"{job[1]}: ended with {done.returncode}", flush=True)

    with ThreadPoolExecutor(torch.cuda.device_count()) as threads:
        list(threads.map(run, jobs))


def distance(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm."""
    error = sum((found[name] - want[name]).double().square().sum() for name in want)
    return float((error / sum(x.double().square().sum() for x in want.values())) ** 0.5)


def gradients(args: argparse.Namespace) -> dict[str, Any]:
    """Distances from float32's gradients: of all, of the gates', and of each parameter.

    Of systems that were cut off, what they had saved before counts.
    """
    if not args.read:
        prepare_batch(args)
        options = [str(args.checkpoint), str(args.text), "--output", str(args.output)]
        options += ["--lengths", *map(str, args.lengths)]
        names = [name for name in args.systems if args.before or not name.startswith("before")]
        run_all([["gradients-of", name, *options] for name in names], args.before)
    figures: dict[str, Any] = {}
    for length in args.lengths:
        files = {name: args.output / f"{name}-{length}.safetensors" for name in args.systems}
        found = {name: load_file(file) for name, file in files.items() if file.exists()}
        if WIDE not in found:
            print(f"windows of {length:,} tokens: float32's gradients are missing")
            continue
        want = found.pop(WIDE)
        gates = {name: x for name, x in want.items() if "fgate" in name}
        norm = float(sum(x.double().square().sum() for x in want.values()) ** 0.5)
        print(f"windows of {length:,} tokens; norm of float32's gradients {norm:.4f}")
        each = {name: {p: distance({p: x[p]}, {p: want[p]}) for p in want} for name, x in found.items()}
        figures[str(length)] = {"norm": norm, "systems": {}}
        for name, grads in found.items():
            official = each.get("official, bfloat16 weights" if "weights" in name else "official", {})
            allowed = {p: max(0.02, 1.2 * official.get(p, 0.0)) for p in want}
            over = sorted((p for p in want if each[name][p] > allowed[p]), key=lambda p: -each[name][p])
            row = {"all": distance(grads, want), "gates": distance(grads, gates), "each": each[name], "over": over}
            figures[str(length)]["systems"][name] = row
            print(f"  {name:28} all {row['all']:.4f}  gates {row['gates']:.4f}  over the limit {len(over)}")
            for p in over[:4]:
                print(f"    {p:44} {each[name][p]:.4f}  official {official.get(p, math.nan):.4f}")
    return figures


def learned(output: Path, system: str, start: str, seed: int) -> Path:
    """Where the result of one training is."""
    return output / f"{system}-{start}-{seed}.json"


def learning(args: argparse.Namespace) -> dict[str, Any]:
    """Held-out losses of the systems over seeds, from a random start and from the checkpoint.

    What an earlier call has left in OUTPUT is not done again.
    """
    prepare_corpus(args)
    names = [name for name in args.systems if args.before or not name.startswith("before")]
    options = [str(args.checkpoint), str(args.text), "--output", str(args.output)]
    for option in ("context", "steps", "lr", "tuning_steps", "tuning_lr", "eval_windows"):
        options += ["--" + option.replace("_", "-"), str(getattr(args, option))]
    jobs = []
    for start in args.starts:
        for name in reversed(names):  # the slow ones first
            missing = [n for n in args.seeds if read_record(learned(args.output, name, start, n)) is None]
            for part in filter(None, (missing[::2], missing[1::2])):
                jobs.append(["learn", name, *options, "--start", start, "--seeds", *map(str, part)])
    run_all(jobs, args.before)
    figures: dict[str, Any] = {}
    for start in args.starts:
        figures[start] = {name: {} for name in names}
        for name, seed in itertools.product(names, args.seeds):
            if (result := read_record(learned(args.output, name, start, seed))) is not None:
                figures[start][name][seed] = result
        base = figures[start][names[-1]]
        print(f"from a {start}: held-out loss over seeds, and by how much each is above {names[-1]}'s")
        for name, by_seed in figures[start].items():
            apart = [one["held_out"] - base[seed]["held_out"] for seed, one in by_seed.items() if seed in base]
            losses = [one["held_out"] for one in by_seed.values()]
            print(f"  {name:20} {_spread(losses)}   {_spread(apart)}   {len(losses)} seeds")
    return figures


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.mean(values):+.4f} +- {statistics.stdev(values) if len(values) > 1 else math.nan:.4f}"


def window_length(text: str) -> int:
    """The type of an option that takes the length of a step's windows."""
    length = integer(2, BATCH)(text)
    if BATCH % length:
        raise argparse.ArgumentTypeError(f"is {text}: it must divide {BATCH}, the tokens of a step.")
    return length


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("gradients", "learning", "gradients-of", "learn"):
        one = commands.add_parser(command)
        if command in ("gradients-of", "learn"):
            one.add_argument("system")
        one.add_argument("checkpoint", type=Path)
        one.add_argument("text", type=Path)
        one.add_argument(
            "--output", type=Path, required=True, help="folder for token ids and what the systems save"
        )
        if command.startswith("gradients"):
            one.add_argument("--lengths", type=window_length, nargs="+", default=[4096, 16384, 65536])
        else:
            one.add_argument("--context", type=window_length, default=16384)
            one.add_argument("--seeds", type=seed_number, nargs="+", default=[0, 1, 2, 3, 4])
            one.add_argument("--steps", type=positive_int, default=240, help="from a random start")
            one.add_argument("--lr", type=positive_float, default=2e-3)
            one.add_argument("--tuning-steps", type=positive_int, default=120, help="from the checkpoint")
            one.add_argument("--tuning-lr", type=positive_float, default=3e-4)
            one.add_argument("--eval-windows", type=positive_int, default=32)
        if command == "learn":
            one.add_argument("--start", required=True)
    for command, systems in (("gradients", SYSTEMS), ("learning", LEARNERS)):
        one = commands.choices[command]
        one.add_argument("--systems", nargs="+", choices=systems, default=systems)
        one.add_argument("--before", type=Path, help="checkout of an earlier commit")
        one.add_argument("--save", help="JSON file for the figures")
        if command == "gradients":
            one.add_argument("--read", action="store_true", help="print what an earlier call left in OUTPUT")
        else:
            one.add_argument(
                "--starts", nargs="+", choices=("random", "checkpoint"), default=("checkpoint", "random")
            )
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.command == "gradients-of":
        gradients_of(args.system, args)
    elif args.command == "learn":
        learn(args.system, args)
    else:
        from benchmarks.record import save

        figures = gradients(args) if args.command == "gradients" else learning(args)
        if args.save:
            save(args.save, {"command": args.command, "figures": figures})


if __name__ == "__main__":
    main()
