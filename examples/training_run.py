"""What the training scripts share: a run that can be stopped, killed and gone on with, to the same result."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, set_seed
from captured_gradients import CapturedGradients
from command_line import (
    Parser,
    integer,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    refuse,
    seed_number,
)
from data_parallel import average_gradients, share_weights
from safetensors import SafetensorError, safe_open
from text_corpus import END, Corpus, prepare, window_order
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast
from whole_files import (
    CONTENTS,
    flaw_of,
    free_bytes,
    list_contents,
    pass_over,
    publish,
    read_record,
    read_records,
    refusal_said,
    write_whole,
)

from vllm_fox.hf import compile_layers

KEEP = 2  # checkpoints
ARGUMENTS = "arguments.json"  # in OUTPUT

RUN = (
    "text", "context", "batch", "micro_batch", "steps", "warmup", "optimizer", "lr", "weight_decay", "seed",
    "compile",
)  # fmt: skip
FIXED = (*RUN, "layers", "hidden", "heads", "vocab")
"""What must be the same when a run goes on; the rest may change. ``RUN``: of a run that makes no new model."""


def add_options(parser: Parser) -> None:
    """What scripts take that may train a new model."""
    add_run_options(parser)
    parser.add_argument("--layers", type=positive_int, default=12)
    parser.add_argument("--hidden", type=positive_int, default=768)
    parser.add_argument("--heads", type=positive_int, default=12)
    # One token a byte and the end of text are the least.
    parser.add_argument("--vocab", type=integer(257, 2**20), default=16384, help="of the tokenizer that is trained")


def add_run_options(parser: Parser) -> None:
    """What every training script takes."""
    parser.add_argument("text", type=Path, help="folder of text files; all that are UTF-8 are read")
    parser.add_argument("--output", type=Path, required=True, help="for data, checkpoints, logs and the model")
    parser.add_argument("--context", type=integer(2), default=8192, help="tokens of a training window")
    parser.add_argument("--batch", type=positive_int, default=32, help="windows a step, over all processes")
    parser.add_argument("--micro-batch", type=positive_int, default=2, help="windows at once on one device")
    parser.add_argument("--steps", type=positive_int, default=2000)
    parser.add_argument(
        "--warmup",
        type=non_negative_int,
        default=100,
        help="steps of rising learning rate, then a cosine to 0; a run of fewer steps ends while it rises",
    )
    parser.add_argument(
        "--optimizer",
        choices=("adamw", "muon"),
        default="adamw",
        help="muon: for the layers' matrices, AdamW for the rest",
    )
    parser.add_argument("--lr", type=positive_float, default=1e-3)
    parser.add_argument("--weight-decay", type=non_negative_float, default=0.1)
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument(
        "--compile", action="store_true", help="by torch.compile, faster on a GPU: docs/training.md says how"
    )
    parser.add_argument(
        "--eval-every", type=non_negative_int, default=100, help="steps between validations; 0: none"
    )
    parser.add_argument("--eval-windows", type=positive_int, default=16, help="held-out windows of each, at most")
    parser.add_argument("--save-every", type=positive_int, default=200, help="steps between checkpoints")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU (slow: for trying out)")


def check_options(parser: Parser, args: argparse.Namespace) -> None:
    """End the program if options do not go together, or ask for a GPU that there is not."""
    if args.batch % args.micro_batch:
        parser.error(f"--batch is {args.batch}: it must be a multiple of --micro-batch {args.micro_batch}.")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output is {args.output}, which is not a folder.")
    if not args.cpu and not torch.cuda.is_available():
        raise SystemExit("No CUDA GPU was found: train on a machine that has one, or pass --cpu (slow).")


def begin(
    args: argparse.Namespace, fixed: Iterable[str], tokenizer: Path | None = None
) -> tuple[Accelerator, Corpus]:
    """Processes, devices and text of a run, seeded. Nothing that a corrected command could trip over is written.

    Args:
        fixed: names of the options that must not change when the run goes on.
        tokenizer: a tokenizer.json; one is trained unless given.

    Raises:
        SystemExit: options do not go together, or there is no or too little text.
    """
    # cuBLAS needs it to sum in the same order in every run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    accelerator = Accelerator(
        cpu=args.cpu, mixed_precision="no" if args.cpu else "bf16", log_with="tensorboard", project_dir=args.output
    )
    if args.optimizer == "muon" and accelerator.distributed_type == DistributedType.FSDP:
        refuse("--optimizer is muon, which needs whole matrices: under FSDP give --optimizer adamw.")
    if args.batch % (args.micro_batch * accelerator.num_processes):
        refuse(
            f"--batch is {args.batch}: it must be a multiple of --micro-batch {args.micro_batch} times "
            f"{accelerator.num_processes} processes."
        )

    def enough(train: int, held_out: int) -> None:
        windows = train // args.context
        if windows < args.batch or held_out < args.context:
            raise SystemExit(
                f"{args.text} is too little text: {train:,} tokens to train on make {windows} windows of "
                f"--context {args.context}, where --batch {args.batch} needs as many a step; {held_out:,} "
                "are held out, of which one window is needed. Give more text, or a smaller --context or --batch."
            )

    data = args.output / "data"
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            check_same_run(args, fixed)
            prepare(args.text, data, getattr(args, "vocab", 0), args.seed, tokenizer, enough)
    corpus = Corpus.open(data)
    # Not only the same batches, the same sums: a run that went on cannot be told from one that never stopped.
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Nothing reads memory that it has not written, so nothing need be written to make it the same.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # What is all but dropped weighs so little that a CPU would compute with it many times slower.
    torch.set_flush_denormal(True)
    set_seed(args.seed)
    return accelerator, corpus


def check_disk(args: argparse.Namespace, parameters: int) -> None:
    """Raises SystemExit if the checkpoints would not fit, in place of those that a run to go on with has left."""
    old = [path for path in args.output.glob("*checkpoints/step-*/**/*") if path.is_file()]
    needed, free = (KEEP + 1) * 12 * parameters + 2 * parameters, free_bytes(args.output)
    free += sum(path.stat().st_size for path in old)
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
        new = self.folder / "unfinished"
        kept = f"step {max(self.steps())} is intact" if self.steps() else "there is none yet"
        lost = f"the checkpoint of step {step} was not written, {kept}. "
        try:
            with refusal_said(self.folder, lost + "Free some space and run the same command again."):
                if self.accelerator.is_main_process:
                    shutil.rmtree(new, ignore_errors=True)
                self.accelerator.wait_for_everyone()
                self.accelerator.save_state(str(new))
                self.accelerator.wait_for_everyone()
                if self.accelerator.is_main_process:
                    list_contents(new)
                    publish(new, self.folder / f"step-{step}")
        except SystemExit:
            shutil.rmtree(new, ignore_errors=True)
            raise
        if self.accelerator.is_main_process:
            for old in self.steps()[:-KEEP]:
                shutil.rmtree(self.folder / f"step-{old}")
        self.accelerator.wait_for_everyone()

    def restore(self) -> int:
        """Load the newest that is whole; returns the steps that are done. Torn ones are named and set aside."""
        done = [0]
        if self.accelerator.is_main_process:
            for step in self.steps():
                folder = self.folder / f"step-{step}"
                if flaw := flaw_of(folder) if (folder / CONTENTS).exists() else unlisted_flaw(folder):
                    pass_over(str(folder), flaw)
                    publish(folder, folder.with_suffix(".torn"))
            done = self.steps()[-1:] or [0]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(done)
        if done[0]:
            folder = self.folder / f"step-{done[0]}"
            try:
                self.accelerator.load_state(str(folder))
            except (RuntimeError, KeyError) as error:
                raise SystemExit(
                    f"{folder} has other weights than this run: {str(error).splitlines()[0]} If several processes "
                    "of an earlier version wrote it, go on with that version, or give another --output."
                ) from None
        return done[0]


def unlisted_flaw(folder: Path) -> str:
    """What is wrong with a checkpoint of an earlier version, which has no list of contents; empty if nothing is."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):  # compares the sizes
                    pass
            elif path.suffix in (".bin", ".pkl"):
                with zipfile.ZipFile(path) as archive:
                    if archive.testzip() is not None:
                        return f"{path.name} is torn"
        except (OSError, SafetensorError, zipfile.BadZipFile):
            return f"{path.name} is torn"
    return "" if any(folder.glob("*model*")) and any(folder.glob("optimizer*")) else "it is not complete"


def recorded(args: argparse.Namespace, fixed: Iterable[str]) -> dict[str, Any]:
    """The arguments ``fixed``, as JSON has them."""
    values = {name: getattr(args, name) for name in fixed}
    return {name: str(value.resolve()) if isinstance(value, Path) else value for name, value in values.items()}


def check_same_run(args: argparse.Namespace, fixed: Iterable[str]) -> None:
    """Raises SystemExit if OUTPUT holds checkpoints of a run with other arguments ``fixed``."""
    if not any(args.output.glob("*checkpoints/step-*[0-9]")):
        return  # nothing to go on with, such as after a first step that failed
    now = recorded(args, fixed)
    for name, before in (read_record(args.output / ARGUMENTS) or {}).items():
        option = name if name == "text" else "--" + name.replace("_", "-")
        if name not in now:
            raise SystemExit(f"{args.output} holds a run of another script, with {option}: give another --output.")
        if now[name] != before:
            raise SystemExit(
                f"{args.output} holds a run with {option} {before}, not {now[name]}: give the same, or another "
                "--output."
            )


def record_run(args: argparse.Namespace, fixed: Iterable[str], accelerator: Accelerator) -> None:
    """Remember the arguments ``fixed`` in OUTPUT. Only once all is checked: a refused command binds nobody."""
    if accelerator.is_main_process:
        write_whole(args.output / ARGUMENTS, json.dumps(recorded(args, fixed), indent=1))


class Log:
    """One line of JSON a step, in OUTPUT/log.jsonl. Lines of steps that a run has to repeat are dropped."""

    def __init__(self, path: Path, done: int, active: bool) -> None:
        self.file = None
        if active:
            kept = [line for line in read_records(path) if line.get("step", math.inf) <= done]
            write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
            self.file = path.open("a")

    def write(self, **values: Any) -> None:
        if self.file is not None:
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()

    def settle(self) -> None:
        """Return once what is written would survive a power cut, as a checkpoint does that covers it."""
        if self.file is not None:
            os.fsync(self.file.fileno())


def make_optimizers(
    model: Any, args: argparse.Namespace, rate_of: Callable[[str], float]
) -> list[torch.optim.Optimizer]:
    """One for all weights, or Muon (torch.optim.Muon) for the layers' matrices and AdamW for the others.

    Args:
        rate_of: learning rate of a weight, by name, over --lr; AdamW's where it is not 1.
    """
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
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
    on_gpu = not args.cpu
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=on_gpu)
    ]
    if matrices:
        # Its steps are scaled to be as large as AdamW's, so one learning rate serves both.
        muon = torch.optim.Muon(
            matrices, lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    return optimizers


def held_out(accelerator: Accelerator, corpus: Corpus, args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Windows [1, T] of text that is not trained on, spread over all of it: files of one kind stand together."""
    there = len(corpus.held_out) // args.context
    count = min(args.eval_windows, there)
    for index in range(count):
        start = index * there // count * args.context
        ids = torch.from_numpy(corpus.held_out[start : start + args.context].astype("int64"))[None]
        yield ids.to(accelerator.device)


def train(
    args: argparse.Namespace,
    accelerator: Accelerator,
    corpus: Corpus,
    model: Any,
    loss_of: Callable[..., torch.Tensor],
    validate: Callable[[Any], dict[str, float]],
    *,
    inputs_of: Callable[[torch.Tensor, int], tuple[Any, ...]] = lambda ids, step: (),
    captured: bool = False,
    name: str = "",
    rate_of: Callable[[str], float] = lambda name: 1.0,
) -> Any:
    """All steps, or what is left of them, with checkpoints and a log under OUTPUT.

    Args:
        model: on the CPU.
        loss_of: mean loss of the wrapped model on windows [B, T], given these and what ``inputs_of`` returns.
        validate: figures of the wrapped model in evaluation mode; "validation_loss" is one.
        inputs_of: what the loss depends on besides, given windows on the CPU and the number of a step.
        captured: with --compile, whether each process captures its gradients in a CUDA graph, unless weights are
            sharded. Then what ``inputs_of`` returns are tensors on the device, and the loss must not wait for it.
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
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if sharded:
        # accelerate would compute with weights rounded to bfloat16, and add their gradients up in bfloat16.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
        model.forward = torch.autocast(accelerator.device.type, torch.bfloat16, not args.cpu)(model.forward)
        model, *optimizers = accelerator.prepare(model, *optimizers)
    else:
        # Not wrapped, in any number of processes: the gradients are averaged once a step.
        model = accelerator.prepare_model(model, evaluation_mode=True)
        optimizers = [accelerator.prepare_optimizer(optimizer) for optimizer in optimizers]
    count = args.batch // accelerator.num_processes // args.micro_batch

    def backward(*inputs: Any) -> torch.Tensor:
        loss = loss_of(model, *inputs) / count
        accelerator.backward(loss)
        return loss.detach()

    captured = captured and args.compile and not sharded and accelerator.device.type == "cuda"
    gradients = CapturedGradients(backward, model.parameters()) if captured else backward
    checkpoints = Checkpoints(args.output / f"{name}checkpoints", accelerator)
    checkpoints.folder.mkdir(exist_ok=True)
    done = checkpoints.restore()
    together = accelerator.num_processes > 1 and not sharded
    if together:
        share_weights(model)
    log = Log(args.output / f"{name}log.jsonl", done, accelerator.is_main_process)
    accelerator.init_trackers(f"{name}tensorboard")
    stop = Interruption()
    model.train()
    shown: dict[str, float] = {}
    with tqdm(total=args.steps, initial=done, unit="step", disable=not accelerator.is_main_process) as bar:
        for step in range(done, args.steps):
            start = time.perf_counter()
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = learning_rate(step, args) * group.get("rate", 1.0)
            mine = batch_windows(step, corpus, args)[accelerator.process_index :: accelerator.num_processes]
            pieces = [mine[n : n + args.micro_batch] for n in range(0, len(mine), args.micro_batch)]
            total = torch.zeros((), device=accelerator.device)
            for piece in pieces:
                ids = torch.stack([torch.from_numpy(corpus.window(n, args.context)) for n in piece])
                total += gradients(ids.to(accelerator.device), *inputs_of(ids, step))
            if together:
                average_gradients(model.parameters())
            norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=not captured)
            values = {"loss": accelerator.reduce(total, "mean").item(), "gradient_norm": float(norm)}
            finished = step + 1
            rate = f"--{name.replace('_', '-')}lr"
            refuse_what_is_no_number(finished, values, rate, args.lr)
            if args.eval_every and (finished % args.eval_every == 0 or finished == args.steps):
                model.eval()
                # A few windows, whose shape would have to be compiled for.
                with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                    shown = validate(model)
                model.train()
                refuse_what_is_no_number(finished, shown, rate, args.lr)
                values |= shown
            speed = args.batch * args.context / (time.perf_counter() - start)
            log.write(step=finished, **values)
            accelerator.log(values | {"tokens_per_second": speed}, step=finished)
            texts = {"loss": f"{values['loss']:.3f}", "tok/s": f"{speed:,.0f}"}
            bar.set_postfix(texts | {name: f"{value:.3f}" for name, value in shown.items()})
            bar.update()
            asked = stop.everywhere(accelerator)
            if finished % args.save_every == 0 or finished == args.steps or asked:
                refuse_what_is_no_number(finished, {"largest weight": largest_weight(model)}, rate, args.lr)
                log.settle()
                checkpoints.save(finished)
            if asked and finished < args.steps:
                bar.close()
                accelerator.end_training()
                print(f"Stopped after step {finished}, which is saved. Run the same command to go on.", flush=True)
                sys.exit(130)
    return model


def largest_weight(model: Any) -> float:
    """The greatest magnitude of all weights; NaN if one is NaN."""
    return torch.stack([weight.detach().abs().max().float() for weight in model.parameters()]).max().item()


def refuse_what_is_no_number(step: int, values: dict[str, float], rate: str, lr: float) -> None:
    """Raise SystemExit if a value of a step is NaN or infinite: what was saved before is intact."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise SystemExit(
                f"The {name.replace('_', ' ')} of step {step} is {value}: try a smaller {rate} than {lr}."
            )


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
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    whole.save_pretrained(new, state_dict=weights)
    whole.config.dtype = torch.bfloat16  # saved with the model's weights' own
    whole.config.save_pretrained(new)
    tokenizer = Tokenizer.from_file(str(args.output / "data" / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    GenerationConfig(bos_token_id=end, eos_token_id=end).save_pretrained(new)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=args.context
    ).save_pretrained(new)
    publish(new, folder)
