"""What the training scripts share: a run that can be stopped, killed and gone on with, to the same result."""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from text_corpus import END, Corpus, prepare, window_order
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast

from vllm_fox.hf import compile_layers

KEEP = 2  # checkpoints


FIXED = (
    "text", "layers", "hidden", "heads", "vocab", "context", "batch", "micro_batch", "steps", "warmup", "optimizer",
    "lr", "weight_decay", "seed", "compile",
)  # fmt: skip
"""What must be the same when a run goes on; the rest may change."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every training script takes."""
    parser.add_argument("text", type=Path, help="folder of text files; all that are UTF-8 are read")
    parser.add_argument("--output", type=Path, required=True, help="for data, checkpoints, logs and the model")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=16384, help="of the tokenizer that is trained")
    parser.add_argument("--context", type=int, default=8192, help="tokens of a training window")
    parser.add_argument("--batch", type=int, default=32, help="windows a step, over all processes")
    parser.add_argument("--micro-batch", type=int, default=2, help="windows at once on one device")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--warmup", type=int, default=100, help="steps of rising learning rate; then a cosine to 0")
    parser.add_argument(
        "--optimizer",
        choices=("adamw", "muon"),
        default="adamw",
        help="muon: for the layers' matrices, AdamW for the rest",
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--compile", action="store_true", help="the layers, by torch.compile: twice as fast on a GPU"
    )
    parser.add_argument("--eval-every", type=int, default=100, help="steps between validations")
    parser.add_argument("--eval-windows", type=int, default=16)
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU (slow: for trying out)")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program if an option makes no sense, or asks for a GPU that there is not."""
    for name in ("layers", "hidden", "heads", "vocab", "context", "batch", "micro_batch", "steps", "save_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least 1.")
    if args.vocab < 257:
        parser.error(f"--vocab is {args.vocab}: it must be at least 257, one token a byte and the end of text.")
    if not args.cpu and not torch.cuda.is_available():
        raise SystemExit("No CUDA GPU was found: train on a machine that has one, or pass --cpu (slow).")


def begin(
    args: argparse.Namespace, fixed: Iterable[str], tokenizer: Path | None = None
) -> tuple[Accelerator, Corpus]:
    """Processes, devices and text of a run, seeded.

    Args:
        fixed: names of the options that must not change when the run goes on.
        tokenizer: a tokenizer.json; one is trained unless given.

    Raises:
        SystemExit: options do not go together, or there is no or too little text.
    """
    # cuBLAS needs it to sum in the same order in every run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    args.output.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        cpu=args.cpu, mixed_precision="no" if args.cpu else "bf16", log_with="tensorboard", project_dir=args.output
    )
    if args.optimizer == "muon" and accelerator.distributed_type == DistributedType.FSDP:
        raise SystemExit("--optimizer is muon, which needs whole matrices: under FSDP give --optimizer adamw.")
    per_step = args.micro_batch * accelerator.num_processes
    if args.batch % per_step:
        raise SystemExit(
            f"--batch is {args.batch}: it must be a multiple of --micro-batch {args.micro_batch} times "
            f"{accelerator.num_processes} processes."
        )
    data = args.output / "data"
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            check_same_run(args, fixed)
            prepare(args.text, data, args.vocab, args.seed, tokenizer)
    corpus = Corpus.open(data)
    windows = len(corpus.train) // args.context
    if windows < args.batch or len(corpus.held_out) < args.context:
        raise SystemExit(
            f"{args.text} is too little text: {len(corpus.train):,} tokens to train on make {windows} windows of "
            f"--context {args.context}, where --batch {args.batch} needs as many a step; {len(corpus.held_out):,} "
            "are held out, of which one window is needed. Give more text, or a smaller --context or --batch."
        )
    # Not only the same batches, the same sums: a run that went on cannot be told from one that never stopped.
    torch.use_deterministic_algorithms(True, warn_only=True)
    # What is all but dropped weighs so little that a CPU would compute with it many times slower.
    torch.set_flush_denormal(True)
    set_seed(args.seed)
    return accelerator, corpus


def check_disk(args: argparse.Namespace, parameters: int) -> None:
    """Raises SystemExit if the checkpoints would not fit."""
    needed, free = (KEEP + 1) * 12 * parameters + 2 * parameters, shutil.disk_usage(args.output).free
    if free < needed:
        raise SystemExit(
            f"--output {args.output} is on a disk with {free / 1e9:.1f} GB free: {KEEP + 1} checkpoints of "
            f"{parameters / 1e6:.0f} million parameters and the model take {needed / 1e9:.1f} GB. Choose another "
            "disk."
        )


class Interruption:
    """Ctrl-C and SIGTERM end the run after the step under way; a second Ctrl-C at once."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def everywhere(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked."""
        if accelerator.num_processes == 1:
            return self.asked
        flag = torch.tensor(float(self.asked), device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum").item())


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine that ends at 0."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, args.steps - args.warmup)))


def batch_windows(step: int, corpus: Corpus, args: argparse.Namespace) -> list[int]:
    """Numbers of the windows of a step: all windows once in each epoch, in the epoch's own order."""
    windows = len(corpus.train) // args.context
    found: list[int] = []
    for position in range(step * args.batch, (step + 1) * args.batch):
        epoch, index = divmod(position, windows)
        found.append(int(window_order(windows, epoch, args.seed)[index]))
    return found


class Checkpoints:
    """Complete states of training under OUTPUT/checkpoints, the last :data:`KEEP` of them."""

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.folder, self.accelerator = folder, accelerator

    def steps(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*[0-9]"))

    def save(self, step: int) -> None:
        """After ``step`` steps. A checkpoint gets its name once it is complete."""
        new, done = self.folder / "unfinished", self.folder / f"step-{step}"
        try:
            if self.accelerator.is_main_process:
                shutil.rmtree(new, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(new))
            self.accelerator.wait_for_everyone()
        except (OSError, RuntimeError) as error:
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            if not full and shutil.disk_usage(self.folder).free > 1 << 20:
                raise
            shutil.rmtree(new, ignore_errors=True)
            kept = f"step {max(self.steps())} is intact" if self.steps() else "there is none yet"
            raise SystemExit(
                f"The disk of {self.folder} is full: the checkpoint of step {step} was not written, {kept}. "
                "Free some space and run the same command again."
            ) from None
        if self.accelerator.is_main_process:
            shutil.rmtree(done, ignore_errors=True)
            new.rename(done)
            for old in self.steps()[:-KEEP]:
                shutil.rmtree(self.folder / f"step-{old}")
        self.accelerator.wait_for_everyone()

    def restore(self) -> int:
        """Load the last one; returns the steps that are done."""
        if not self.steps():
            return 0
        self.accelerator.load_state(str(self.folder / f"step-{self.steps()[-1]}"))
        return self.steps()[-1]


def check_same_run(args: argparse.Namespace, fixed: Iterable[str]) -> None:
    """Remember the arguments ``fixed``; raises SystemExit if OUTPUT holds a run with others."""
    path = args.output / "arguments.json"
    now = {name: getattr(args, name) for name in fixed}
    now = {name: str(value.resolve()) if isinstance(value, Path) else value for name, value in now.items()}
    if path.exists():
        for name, before in json.loads(path.read_text()).items():
            if now[name] != before:
                option = name if name == "text" else "--" + name.replace("_", "-")
                raise SystemExit(
                    f"{args.output} holds a run with {option} {before}, not {now[name]}: give the same, or another "
                    "--output."
                )
    path.write_text(json.dumps(now, indent=1))


class Log:
    """One line of JSON a step, in OUTPUT/log.jsonl. Lines of steps that a run has to repeat are dropped."""

    def __init__(self, path: Path, done: int, active: bool) -> None:
        self.file = None
        if active:
            lines = path.read_text().splitlines() if path.exists() else []
            kept = [line for line in lines if json.loads(line)["step"] <= done]
            path.write_text("".join(line + "\n" for line in kept))
            self.file = path.open("a")

    def write(self, **values: Any) -> None:
        if self.file is not None:
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()


def make_optimizers(
    model: Any, args: argparse.Namespace, rate_of: Callable[[str], float]
) -> list[torch.optim.Optimizer]:
    """One for all weights, or Muon (torch.optim.Muon) for the layers' matrices and AdamW for the others.

    Args:
        rate_of: learning rate of a weight, by name, over --lr; AdamW's where it is not 1.
    """
    named = list(model.named_parameters())
    rates = {id(p): rate_of(name) for name, p in named}
    # QK-norm's gains decay too: they set ACP's bound on logits, and what has no other pull drifts up.
    decaying = {id(p) for name, p in named if p.dim() > 1 or "q_norm" in name or "k_norm" in name}
    matrices: list[torch.nn.Parameter] = []
    if args.optimizer == "muon":
        inside = [p for name, p in named if ".layers." in name or ".h." in name]
        matrices = [p for p in inside if p.dim() > 1 and rates[id(p)] == 1]
    apart = {id(p) for p in matrices}
    groups = []
    for rate in sorted(set(rates.values())):
        mine = [p for _, p in named if rates[id(p)] == rate and id(p) not in apart]
        for decays in (True, False):
            params = [p for p in mine if (id(p) in decaying) == decays]
            groups.append({"params": params, "weight_decay": args.weight_decay * decays, "rate": rate})
    groups = [group for group in groups if group["params"]]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))]
    if matrices:
        # Its steps are scaled to be as large as AdamW's, so one learning rate serves both.
        muon = torch.optim.Muon(
            matrices, lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    return optimizers


def held_out(accelerator: Accelerator, corpus: Corpus, args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Windows [1, T] of text that is not trained on."""
    for index in range(min(args.eval_windows, len(corpus.held_out) // args.context)):
        start = index * args.context
        ids = torch.from_numpy(corpus.held_out[start : start + args.context].astype("int64"))[None]
        yield ids.to(accelerator.device)


def train(
    args: argparse.Namespace,
    accelerator: Accelerator,
    corpus: Corpus,
    model: Any,
    loss_of: Callable[[Any, torch.Tensor, int], torch.Tensor],
    validate: Callable[[Any], dict[str, float]],
    *,
    name: str = "",
    rate_of: Callable[[str], float] = lambda name: 1.0,
) -> Any:
    """All steps, or what is left of them, with checkpoints and a log under OUTPUT.

    Args:
        model: on the CPU.
        loss_of: mean loss of the wrapped model on windows [B, T], at a step.
        validate: figures of the wrapped model in evaluation mode; "validation_loss" is one.
        name: of the run's part, if it has several: begins the names of its files.
        rate_of: see :func:`make_optimizers`.

    Returns:
        The wrapped model, trained.
    """
    if args.compile:
        compile_layers(model)
    optimizers = make_optimizers(model, args, rate_of)
    accelerator.print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters, {len(corpus.train):,} tokens, "
        f"{accelerator.num_processes} processes on {accelerator.device.type}"
    )
    model, *optimizers = accelerator.prepare(model, *optimizers)
    checkpoints = Checkpoints(args.output / f"{name}checkpoints", accelerator)
    checkpoints.folder.mkdir(exist_ok=True)
    done = checkpoints.restore()
    log = Log(args.output / f"{name}log.jsonl", done, accelerator.is_main_process)
    accelerator.init_trackers(f"{name}tensorboard")
    stop = Interruption()
    bar = tqdm(total=args.steps, initial=done, unit="step", disable=not accelerator.is_main_process)
    model.train()
    shown: dict[str, float] = {}
    for step in range(done, args.steps):
        start = time.perf_counter()
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(step, args) * group.get("rate", 1.0)
        mine = batch_windows(step, corpus, args)[accelerator.process_index :: accelerator.num_processes]
        pieces = [mine[n : n + args.micro_batch] for n in range(0, len(mine), args.micro_batch)]
        total = torch.zeros((), device=accelerator.device)
        for piece in pieces:
            ids = torch.stack([torch.from_numpy(corpus.window(n, args.context)) for n in piece])
            loss = loss_of(model, ids.to(accelerator.device), step) / len(pieces)
            accelerator.backward(loss)
            total += loss.detach()
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        values = {"loss": accelerator.reduce(total, "mean").item(), "gradient_norm": float(norm)}
        if not math.isfinite(values["loss"]):
            raise SystemExit(f"The loss of step {step + 1} is {values['loss']}: try a smaller --lr than {args.lr}.")
        finished = step + 1
        if args.eval_every and (finished % args.eval_every == 0 or finished == args.steps):
            model.eval()
            # A few windows, whose shape would have to be compiled for.
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                shown = validate(model)
            model.train()
            values |= shown
        speed = args.batch * args.context / (time.perf_counter() - start)
        log.write(step=finished, **values)
        accelerator.log(values | {"tokens_per_second": speed}, step=finished)
        texts = {"loss": f"{values['loss']:.3f}", "tok/s": f"{speed:,.0f}"}
        bar.set_postfix(texts | {name: f"{value:.3f}" for name, value in shown.items()})
        bar.update()
        asked = stop.everywhere(accelerator)
        if finished % args.save_every == 0 or finished == args.steps or asked:
            checkpoints.save(finished)
        if asked and finished < args.steps:
            bar.close()
            accelerator.end_training()
            print(f"Stopped after step {finished}, which is saved. Run the same command to go on.", flush=True)
            sys.exit(130)
    bar.close()
    return model


def export(accelerator: Accelerator, model: Any, args: argparse.Namespace, folder: Path) -> None:
    """bfloat16 safetensors, config and tokenizer. Constant forget gates stay float32: all decay follows them."""
    state = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return
    whole = accelerator.unwrap_model(model)
    tied = whole.all_tied_weights_keys  # saved once, under the other name
    weights = {
        name: tensor.float() if name.endswith("fgate_bias") else tensor.bfloat16()
        for name, tensor in state.items()
        if name not in tied
    }
    whole.save_pretrained(folder, state_dict=weights)
    whole.config.dtype = torch.bfloat16  # saved with the model's weights' own
    whole.config.save_pretrained(folder)
    tokenizer = Tokenizer.from_file(str(args.output / "data" / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    GenerationConfig(bos_token_id=end, eos_token_id=end).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=args.context
    ).save_pretrained(folder)
