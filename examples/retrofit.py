"""Teach an ordinary Llama, Mistral, Qwen2 or Qwen3 to evict tokens: by adapters (Dynamic Memory Sparsification,
DMS, arXiv 2506.05345) or by predictors (KVzap, arXiv 2601.07891).

    python examples/retrofit.py CHECKPOINT TEXT_FOLDER --output runs/evicting --ratio 8 --window 256
    python examples/retrofit.py CHECKPOINT TEXT_FOLDER --output runs/evicting --ratio 2 --predictor mlp
    vllm serve runs/evicting/model

The checkpoint's weights stay as they are. Every layer gets a small module, which learns to decide for each KV head
and token whether it will be needed. An adapter learns from the same model without eviction, whose answers it is to
give (distillation), while the share that has to go rises from nothing to 1 - 1 / RATIO. The decision is soft and
noisy in training, and hard at the end. A predictor (--predictor) learns how much attention each token gets in the
model as it is, which never evicts in training. Run the same command again after an interruption, of whatever kind:
it goes on. At the end the threshold of the decisions is set so that just the share asked for goes, and OUTPUT/model
is a folder that vllm serve takes.

Memory grows with the length of --context and not with its square. The frozen weights are in bfloat16 on a GPU.
Several GPUs: accelerate launch examples/retrofit.py ..., or torchrun.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from adapter_distillation import TOKENS_AT_ONCE, Distillation, divergence, wanted_share
from command_line import Parser, number, positive_float, positive_int, refuse
from predictor_regression import Regression, repetition
from safetensors import SafetensorError
from safetensors.torch import load_file
from text_corpus import window_order
from torch.nn.functional import cross_entropy
from training_run import RUN, add_run_options, begin, check_disk, check_options, held_out, record_run, train
from transformers import AutoTokenizer
from whole_files import printable, publish, refusal_said, write_whole

from vllm_fox.families.evicting.convert import config_of, copy_others
from vllm_fox.hf import EvictingDecoderForCausalLM

OWN = ("checkpoint", "ratio", "window", "ramp", "budget", "predictor", "hidden_dim")
LEARN = ("dms_proj_alpha", "kvzap")  # parts of names of weights
SCALE, OFFSET = 100.0, 5.0  # of DMS, as published
FIRST_THRESHOLD = -100.0  # of a predictor: nothing has so low a score
CALIBRATION = 1 << 16  # tokens of the training texts by which the threshold is set, if there are so many
READ_AT_ONCE = 1 << 13  # of these tokens
CALIBRATIONS = 3  # what is evicted in one layer changes what later layers decide
ADAPTER = {
    "context": 8192, "batch": 16, "steps": 544, "warmup": 20, "weight_decay": 0.0, "window": 256, "budget": 1.0,
}  # fmt: skip
"""Defaults of options for adapters. Those for predictors: windows as long as the texts that KVzap's authors take,
their learning rate, decay, window and hidden size."""
PREDICTOR = {
    "context": 1024, "batch": 8, "steps": 2000, "warmup": 100, "lr": 5e-3, "weight_decay": 0.01, "window": 128,
    "hidden_dim": 512,
}  # fmt: skip
RATE = 0.12
"""Learning rate of adapters, times the hidden size: DMS's authors take 3e-5 where the hidden size is 4096. So a
step of Adam moves a logit by about 10 at most, however large the model is."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder of a Llama, Mistral, Qwen2 or Qwen3")
    add_run_options(parser)
    parser.set_defaults(micro_batch=1, lr=None, **dict.fromkeys(ADAPTER))
    above_1 = number(lambda value: value > 1, "a number above 1")
    parser.add_argument("--ratio", type=above_1, default=8.0, help="of all tokens to those that are kept")
    parser.add_argument("--window", type=positive_int, help="tokens for which an evicted one stays")
    parser.add_argument(
        "--predictor",
        choices=("linear", "mlp"),
        help="KVzap's: learns the unchanged model's attention; adapters else",
    )
    parser.add_argument("--hidden-dim", type=positive_int, help="of --predictor mlp: size of its hidden layer, 512")
    parser.add_argument(
        "--ramp", type=positive_int, help="of adapters: steps in which the ratio rises; half of --steps"
    )
    parser.add_argument(
        "--checkpointing", action="store_true", help="of adapters: keep no activations: slower, less memory"
    )
    parser.add_argument(
        "--budget", type=positive_float, help="of adapters: weight in the loss of a missed ratio, 1"
    )
    args = parser.parse_args(argv)
    if args.hidden_dim is not None and args.predictor != "mlp":
        parser.error("--hidden-dim is given: only --predictor mlp has a hidden layer.")
    for name in ("ramp", "budget", "checkpointing"):
        if args.predictor and getattr(args, name):
            parser.error(f"--{name} is given: it is for adapters, leave it out with --predictor.")
    for name, value in (PREDICTOR if args.predictor else ADAPTER).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.predictor == "linear":
        args.hidden_dim = None
    if not args.predictor:
        args.ramp = args.ramp or max(1, args.steps // 2)
        if args.ramp > args.steps:
            parser.error(f"--ramp is {args.ramp}: it must be at most --steps {args.steps}.")
    if args.window >= args.context:
        parser.error(
            f"--window is {args.window}: it must be less than --context {args.context}, or nothing is ever evicted."
        )
    check_options(parser, args)
    return args


def load(args: argparse.Namespace) -> EvictingDecoderForCausalLM:
    """The checkpoint with new adapters or predictors, of which alone gradients are asked. Ends the program if it
    cannot be."""
    eviction: dict[str, Any] = {"window": args.window}
    if args.predictor:
        eviction |= {"method": "kvzap", "shift": 0, "threshold": FIRST_THRESHOLD, "hidden_dim": args.hidden_dim}
    else:
        eviction |= {"method": "dms_adapter", "shift": 1, "scale": SCALE, "offset": OFFSET}
    dtype = torch.float32 if args.cpu else torch.bfloat16
    torch.manual_seed(args.seed)
    try:
        config = config_of(args.checkpoint, eviction)
        loaded: Any = EvictingDecoderForCausalLM.from_pretrained(
            args.checkpoint, config=config, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise SystemExit(f"CHECKPOINT {args.checkpoint}: {error}") from None
    model, found = loaded
    missing = [name for name in found["missing_keys"] if not learns(name)]
    if wrong := [*missing, *found["unexpected_keys"]]:
        raise SystemExit(f"CHECKPOINT {args.checkpoint}: the tensor {wrong[0]} is missing or left over.")
    if args.lr is None:
        args.lr = RATE / config.hidden_size
    if (most := config.max_position_embeddings) < args.context:
        refuse(f"--context is {args.context}: CHECKPOINT {args.checkpoint} has {most} positions.")
    for name, weight in model.named_parameters():
        weight.requires_grad_(learns(name))
        if learns(name):
            weight.data = weight.data.float()
    if args.checkpointing:
        # The other form gives no gradients where a layer's input has none, and the embeddings are frozen.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def learns(name: str) -> bool:
    """Whether a weight is learned; the others are frozen."""
    return any(part in name for part in LEARN)


def regression(args: argparse.Namespace, model: EvictingDecoderForCausalLM) -> Regression:
    """The model beside whose attention predictors learn. Ends the program if it has too few positions."""
    try:
        before, between = repetition(AutoTokenizer.from_pretrained(args.checkpoint))
    except (OSError, ValueError) as error:
        raise SystemExit(f"CHECKPOINT {args.checkpoint}: its tokenizer cannot be read: {error}") from None
    tokens = len(before) + 2 * args.context + len(between)
    if (most := model.config.max_position_embeddings) < tokens:
        refuse(
            f"--context is {args.context}: a window, the request to repeat it and its repetition are {tokens} "
            f"tokens, and CHECKPOINT {args.checkpoint} has {most} positions."
        )
    return Regression(model, before, between)


def save_learned_only(accelerator: Accelerator) -> None:
    """Leave the frozen weights out of checkpoints of the run: they are those that the run began with."""

    def drop_frozen(models: list[Any], weights: list[dict[str, torch.Tensor]], folder: str) -> None:
        for state in weights:
            for name in [name for name in state if not learns(name)]:
                del state[name]

    def load_learned(models: list[Any], folder: str) -> None:
        while models:  # what is left in the list is loaded by accelerate, as a whole
            whole = accelerator.unwrap_model(models.pop())
            loaded = whole.load_state_dict(load_file(Path(folder) / "model.safetensors"), strict=False)
            if loaded.unexpected_keys:
                raise KeyError(f"Unexpected key {loaded.unexpected_keys[0]}.")

    accelerator.register_save_state_pre_hook(drop_frozen)
    accelerator.register_load_state_pre_hook(load_learned)


def calibrate(args: argparse.Namespace, model: EvictingDecoderForCausalLM, windows: list[torch.Tensor]) -> None:
    """Set the offset or threshold so that of windows [B, T] just the share that was asked for goes.

    A budget only pulls at decisions that are near to their threshold, so training ends close to the share. A
    predictor's threshold is set only here.
    """
    for _ in range(CALIBRATIONS):
        found = torch.cat([model.decisions(ids).flatten().float().cpu() for ids in windows])
        kept = max(1, round(len(found) / args.ratio))
        threshold = found.kthvalue(kept).values.item()
        if math.isfinite(threshold):
            model.move_threshold(threshold)


def loss_of_text(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean negative log-likelihood of a token of windows [B, T], as the model is set."""
    states = model.model(ids).last_hidden_state[:, :-1].flatten(0, 1)
    labels, total = ids[:, 1:].flatten(), torch.zeros((), device=ids.device)
    for hidden, wanted in zip(states.split(TOKENS_AT_ONCE), labels.split(TOKENS_AT_ONCE), strict=True):
        total += cross_entropy(model.lm_head(hidden).float(), wanted, reduction="sum")
    return total / len(labels)


def cost_of_eviction(model: Any, windows: Iterable[torch.Tensor]) -> dict[str, float]:
    """What windows [1, T] lose by eviction, and how much is evicted, as the mean over the windows.

    Returns:
        Nats a token with eviction and without it (``validation_loss`` and ``dense_loss``), the divergence of the
        two in nats, and the evicted share of the tokens: of all layers, and of those that evict least and most.
    """
    losses, dense, divergences, shares = [], [], [], []
    for ids in windows:
        mean, evicted, _ = divergence(model, ids)
        divergences.append(mean)
        shares.append(evicted)
        losses.append(loss_of_text(model, ids))
        model.set_evicts(False)
        dense.append(loss_of_text(model, ids))
        model.set_evicts(True)
    by_layer = torch.stack(shares).mean(0)
    return {
        "validation_loss": torch.stack(losses).mean().item(),
        "dense_loss": torch.stack(dense).mean().item(),
        "divergence": torch.stack(divergences).mean().item(),
        "evicted_share": by_layer.mean().item(),
        "least_evicted_share": by_layer.min().item(),
        "most_evicted_share": by_layer.max().item(),
    }


def export(args: argparse.Namespace, model: EvictingDecoderForCausalLM, folder: Path) -> None:
    """The checkpoint's own weights and what was learned, in bfloat16, and its tokenizer and other files."""
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    tied = model.all_tied_weights_keys  # saved once, under the other name
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items() if name not in tied}
    model.config.dtype = torch.bfloat16
    model.save_pretrained(new, state_dict=state)
    model.config.save_pretrained(new)
    copy_others(args.checkpoint, new)
    publish(new, folder)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    model = load(args)
    with refusal_said(args.output, "Free some space and run the same command again."):
        retrofit(args, model)


def retrofit(args: argparse.Namespace, model: EvictingDecoderForCausalLM) -> None:
    """The whole run, or what is left of it."""
    fixed = (*RUN, *OWN)
    learner: Any = regression(args, model) if args.predictor else Distillation(model, args.budget, args.compile)
    accelerator, corpus = begin(args, fixed, args.checkpoint / "tokenizer.json")
    save_learned_only(accelerator)

    def loss_of(wrapped: Any, *inputs: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = wrapped(*inputs)
        return loss

    def inputs_of(ids: torch.Tensor, step: int) -> tuple[torch.Tensor, ...]:
        if args.predictor:
            return ()
        # Noise that follows from the windows alone: whichever process computes them, and after whatever break.
        torch.manual_seed(zlib.crc32(ids.numpy().tobytes(), args.seed + step))
        return (torch.full((), wanted_share(step, args), device=accelerator.device),)

    def figures(wrapped: Any) -> dict[str, float]:
        """What is worth knowing while it learns: a predictor has no threshold yet."""
        windows = held_out(accelerator, corpus, args)
        whole = accelerator.unwrap_model(wrapped)
        return whole.figures(windows) if args.predictor else cost_of_eviction(whole.model, windows)

    order = window_order(len(corpus.train) // args.context, 0, args.seed)[: -(-CALIBRATION // args.context)]
    read = torch.stack([torch.from_numpy(corpus.window(int(n), args.context)) for n in order])
    windows = list(read.to(accelerator.device).split(max(1, READ_AT_ONCE // args.context)))
    check_disk(args, sum(p.numel() for p in model.parameters() if p.requires_grad))
    record_run(args, fixed, accelerator)
    if args.predictor:
        learner.to(accelerator.device).start_at_mean(windows[0][:1])
    # Checkpointing looks at the device's generator, which a capture does not allow.
    captured = not (args.predictor or args.checkpointing)
    trained = train(args, accelerator, corpus, learner, loss_of, figures, inputs_of=inputs_of, captured=captured)
    if accelerator.is_main_process:
        model = accelerator.unwrap_model(trained).model.eval()
        with torch.no_grad():
            found = figures(trained) if args.predictor else {}
            for weight in model.parameters():
                # The threshold and the cost are those of what is saved.
                weight.data = weight.data.bfloat16().to(model.dtype)
            model.set_evicts(True)
            calibrate(args, model, windows)
            found |= cost_of_eviction(model, held_out(accelerator, corpus, args))
        write_whole(args.output / "figures.json", json.dumps(found, indent=1))
        if args.predictor:
            accelerator.print(
                f"Of the variance of the held-out text's scores the predictors explain {found['r_squared']:.1%}."
            )
        accelerator.print(
            f"Evicted: {found['evicted_share']:.1%} of the held-out text's tokens, from "
            f"{found['least_evicted_share']:.1%} to {found['most_evicted_share']:.1%} by layer. Loss a token: "
            f"{found['validation_loss']:.4f}, without eviction {found['dense_loss']:.4f}."
        )
        export(args, model, args.output / "model")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    accelerator.print(
        f"{printable(args.output / 'model')} is ready. Serve it with: vllm serve {printable(args.output / 'model')}"
    )


if __name__ == "__main__":
    main()
