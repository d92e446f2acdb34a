"""Teach an ordinary Llama, Mistral, Qwen2 or Qwen3 to evict tokens: Dynamic Memory Sparsification (DMS, arXiv
2506.05345) with adapters.

    python examples/retrofit.py CHECKPOINT TEXT_FOLDER --output runs/evicting --ratio 8 --window 256
    vllm serve runs/evicting/model

The checkpoint's weights stay as they are. Every layer gets a small projection, which learns to decide for each KV
head and token whether it will be needed. It learns from the same model without eviction, whose answers it is to
give (distillation), while the share that has to go rises from nothing to 1 - 1 / RATIO. The decision is soft and
noisy in training, and hard at the end. Run the same command again after an interruption, of whatever kind: it goes
on. At the end the threshold of the decisions is set so that just the share asked for goes, and OUTPUT/model is a
folder that vllm serve takes.

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
from command_line import Parser, number, positive_float, positive_int, refuse
from safetensors import SafetensorError
from safetensors.torch import load_file
from text_corpus import window_order
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from training_run import RUN, add_run_options, begin, check_disk, check_options, held_out, record_run, train
from whole_files import printable, publish, refusal_said, write_whole

from vllm_fox.families.evicting.convert import config_of, copy_others
from vllm_fox.hf import EvictingDecoderForCausalLM

OWN = ("checkpoint", "ratio", "window", "ramp")
SCALE, OFFSET = 100.0, 5.0  # of DMS, as published
TOKENS_AT_ONCE = 1024  # whose logits are in memory together
CALIBRATION = 1 << 16  # tokens of the training texts by which the threshold is set, if there are so many


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder of a Llama, Mistral, Qwen2 or Qwen3")
    add_run_options(parser)
    parser.set_defaults(context=8192, batch=16, micro_batch=1, steps=544, warmup=20, lr=1e-3, weight_decay=0.0)
    above_1 = number(lambda value: value > 1, "a number above 1")
    parser.add_argument("--ratio", type=above_1, default=8.0, help="of all tokens to those that are kept")
    parser.add_argument("--window", type=positive_int, default=256, help="tokens for which an evicted one stays")
    parser.add_argument(
        "--ramp", type=positive_int, help="steps in which the ratio rises; fifteen sixteenths of --steps"
    )
    parser.add_argument("--checkpointing", action="store_true", help="keep no activations: slower, less memory")
    parser.add_argument("--budget", type=positive_float, default=1.0, help="weight in the loss of a missed ratio")
    args = parser.parse_args(argv)
    if args.ramp is None:
        args.ramp = max(1, 15 * args.steps // 16)
    if args.ramp > args.steps:
        parser.error(f"--ramp is {args.ramp}: it must be at most --steps {args.steps}.")
    if args.window >= args.context:
        parser.error(
            f"--window is {args.window}: it must be less than --context {args.context}, or nothing is ever evicted."
        )
    check_options(parser, args)
    return args


def wanted_share(step: int, args: argparse.Namespace) -> float:
    """The share of tokens to evict: that of a ratio which rises from 1 to --ratio."""
    ratio = 1 + (args.ratio - 1) * min(1.0, (step + 1) / args.ramp)
    return 1 - 1 / ratio


class Distillation(nn.Module):
    """A model that evicts, and learns what the same model without eviction answers.

    Its output in training is the loss: the mean divergence KL(teacher || student) of the next token's distribution,
    plus what is missing to the share that is to be evicted.
    """

    def __init__(self, model: EvictingDecoderForCausalLM, budget: float) -> None:
        super().__init__()
        self.model: Any = model
        self.budget = budget

    def forward(self, ids: torch.Tensor, share: float) -> torch.Tensor:
        """Return the loss of windows [B, T], given the share of tokens to evict."""
        divergence, evicted = self.divergence(ids)
        return divergence + self.budget * (share - evicted.mean()).clamp(min=0.0)

    def divergence(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean divergence over the tokens of windows [B, T], and the evicted share [layers]."""
        with torch.no_grad():
            self.model.set_evicts(False)
            teacher = self.model.model(ids).last_hidden_state
        self.model.set_evicts(True)
        outputs = self.model.model(ids)
        total = torch.zeros((), device=ids.device)
        pairs = zip(
            teacher.flatten(0, 1).split(TOKENS_AT_ONCE),
            outputs.last_hidden_state.flatten(0, 1).split(TOKENS_AT_ONCE),
            strict=True,
        )
        for theirs, ours in pairs:
            total = total + checkpoint(self._divergence, theirs, ours, use_reentrant=False)
        return total / ids.numel(), outputs.evicted

    def loss_of_text(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the mean negative log-likelihood of a token of windows [B, T], as the model is set."""
        states = self.model.model(ids).last_hidden_state[:, :-1].flatten(0, 1)
        labels, total = ids[:, 1:].flatten(), torch.zeros((), device=ids.device)
        for hidden, wanted in zip(states.split(TOKENS_AT_ONCE), labels.split(TOKENS_AT_ONCE), strict=True):
            total += cross_entropy(self.model.lm_head(hidden).float(), wanted, reduction="sum")
        return total / len(labels)

    def _divergence(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        """Return the sum of KL(teacher || student) over hidden states [n, hidden]."""
        theirs, ours = (self.model.lm_head(x).float().log_softmax(-1) for x in (teacher, student))
        return (theirs.exp() * (theirs - ours)).sum()


def load(args: argparse.Namespace) -> EvictingDecoderForCausalLM:
    """The checkpoint with fresh adapters, of which alone gradients are asked. Ends the program if it cannot be."""
    eviction = {"method": "dms_adapter", "window": args.window, "shift": 1, "scale": SCALE, "offset": OFFSET}
    dtype = torch.float32 if args.cpu else torch.bfloat16
    try:
        config = config_of(args.checkpoint, eviction)
        loaded: Any = EvictingDecoderForCausalLM.from_pretrained(
            args.checkpoint, config=config, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise SystemExit(f"CHECKPOINT {args.checkpoint}: {error}") from None
    model, found = loaded
    missing = [name for name in found["missing_keys"] if "dms_proj_alpha" not in name]
    if wrong := [*missing, *found["unexpected_keys"]]:
        raise SystemExit(f"CHECKPOINT {args.checkpoint}: the tensor {wrong[0]} is missing or left over.")
    if (most := config.max_position_embeddings) < args.context:
        refuse(f"--context is {args.context}: CHECKPOINT {args.checkpoint} has {most} positions.")
    for name, weight in model.named_parameters():
        learns = "dms_proj_alpha" in name
        weight.requires_grad_(learns)
        if learns:
            weight.data = weight.data.float()
    if args.checkpointing:
        # The other form gives no gradients where a layer's input has none, and the embeddings are frozen.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def save_adapters_only(accelerator: Accelerator) -> None:
    """Leave the frozen weights out of checkpoints of the run: they are those that the run began with."""

    def drop_frozen(models: list[Any], weights: list[dict[str, torch.Tensor]], folder: str) -> None:
        for state in weights:
            for name in [name for name in state if "dms_proj_alpha" not in name]:
                del state[name]

    def load_adapters(models: list[Any], folder: str) -> None:
        while models:  # what is left in the list is loaded by accelerate, as a whole
            whole = accelerator.unwrap_model(models.pop())
            whole.load_state_dict(load_file(Path(folder) / "model.safetensors"), strict=False)

    accelerator.register_save_state_pre_hook(drop_frozen)
    accelerator.register_load_state_pre_hook(load_adapters)


def calibrate(args: argparse.Namespace, model: EvictingDecoderForCausalLM, windows: Iterable[torch.Tensor]) -> None:
    """Set the offset so that of windows [1, T] just the share that was asked for goes.

    The budget only pulls at decisions that are near to their threshold, so training ends close to the share.
    """
    found = torch.cat([model.decisions(ids).flatten().float().cpu() for ids in windows])
    kept = max(1, round(len(found) / args.ratio))
    threshold = found.kthvalue(kept).values.item()
    if math.isfinite(threshold):
        model.set_offset(model.config.eviction["offset"] + threshold)


def export(args: argparse.Namespace, model: EvictingDecoderForCausalLM, folder: Path) -> None:
    """The checkpoint's own weights and the adapters in bfloat16, and its tokenizer and other files."""
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
    accelerator, corpus = begin(args, fixed, args.checkpoint / "tokenizer.json")
    save_adapters_only(accelerator)

    def loss_of(distillation: Any, ids: torch.Tensor, step: int) -> torch.Tensor:
        # Noise that follows from the windows alone: whichever process computes them, and after whatever break.
        torch.manual_seed(zlib.crc32(ids.cpu().numpy().tobytes(), args.seed + step))
        loss: torch.Tensor = distillation(ids, wanted_share(step, args))
        return loss

    def figures(distillation: Any) -> dict[str, float]:
        whole = accelerator.unwrap_model(distillation)
        losses, dense, divergences, shares = [], [], [], []
        for ids in held_out(accelerator, corpus, args):
            divergence, evicted = whole.divergence(ids)
            divergences.append(divergence)
            shares.append(evicted)
            losses.append(whole.loss_of_text(ids))
            whole.model.set_evicts(False)
            dense.append(whole.loss_of_text(ids))
            whole.model.set_evicts(True)
        by_layer = torch.stack(shares).mean(0)
        return {
            "validation_loss": torch.stack(losses).mean().item(),
            "dense_loss": torch.stack(dense).mean().item(),
            "divergence": torch.stack(divergences).mean().item(),
            "evicted_share": by_layer.mean().item(),
            "least_evicted_share": by_layer.min().item(),
            "most_evicted_share": by_layer.max().item(),
        }

    check_disk(args, sum(p.numel() for p in model.parameters() if p.requires_grad))
    record_run(args, fixed, accelerator)
    trained = train(args, accelerator, corpus, Distillation(model, args.budget), loss_of, figures)
    if accelerator.is_main_process:
        model = accelerator.unwrap_model(trained).model.eval()
        order = window_order(len(corpus.train) // args.context, 0, args.seed)[: -(-CALIBRATION // args.context)]
        windows = [torch.from_numpy(corpus.window(int(n), args.context))[None] for n in order]
        calibrate(args, model, [ids.to(accelerator.device) for ids in windows])
        with torch.no_grad():
            found = figures(trained)
        write_whole(args.output / "figures.json", json.dumps(found, indent=1))
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
