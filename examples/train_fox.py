"""Pretrain a Forgetting Transformer (FoX Pro, arXiv 2503.02130) on any folder of text files.

    python examples/train_fox.py TEXT_FOLDER --output runs/fox                    # one GPU
    torchrun --nproc-per-node 2 examples/train_fox.py TEXT_FOLDER --output ...    # two processes
    python examples/train_fox.py TEXT_FOLDER --output runs/tiny --cpu --layers 2 --hidden 64 --steps 20 ...

Attention is vllm_fox's own, with Adaptive Computation Pruning (arXiv 2504.06949) forward and backward. Run the same
command again after an interruption, of whatever kind: it goes on from the last checkpoint with the same batches. At
the end OUTPUT/model is a checkpoint that ``vllm serve`` takes as it is.

OUTPUT/log.jsonl has the loss of every step, OUTPUT/tensorboard the same for TensorBoard.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from command_line import Parser, refuse
from training_run import (
    FIXED,
    add_options,
    begin,
    check_disk,
    check_options,
    export,
    held_out,
    record_run,
    train,
)
from whole_files import printable, refusal_said

from vllm_fox.hf import ForgettingTransformerForCausalLM, FoxConfig, live_shares


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--no-pruning", dest="pruning", action="store_false", help="train without ACP")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    args = parser.parse_args(argv)
    check_options(parser, args)
    return args


def make_config(args: argparse.Namespace) -> FoxConfig:
    """FoX (Pro). Ends the program if the sizes do not go together."""
    try:
        return FoxConfig(
            vocab_size=args.vocab,
            hidden_size=args.hidden,
            hidden_ratio=3.5,
            num_hidden_layers=args.layers,
            num_heads=args.heads,
            max_position_embeddings=args.context,
            qk_norm=True,
            use_k_shift=True,
            use_v_shift=True,
            use_output_gate=True,
            use_output_norm=True,
            tie_word_embeddings=True,
            log_pruning_tolerance=-10.0 if args.pruning else None,
            bos_token_id=0,
            eos_token_id=0,
        )
    except ValueError as error:
        refuse(
            f"--hidden is {args.hidden} and --heads {args.heads}, which make no model: {error} "
            "(--layers, --hidden and --heads set these.)"
        )


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    config = make_config(args)
    with refusal_said(args.output, "Free some space and run the same command again."):
        pretrain(args, config)


def pretrain(args: argparse.Namespace, config: FoxConfig) -> None:
    """The whole run, or what is left of it."""
    fixed = (*FIXED, "pruning")
    accelerator, corpus = begin(args, fixed)
    model = ForgettingTransformerForCausalLM(config)
    check_disk(args, sum(p.numel() for p in model.parameters()))
    record_run(args, fixed, accelerator)
    if args.gradient_checkpointing:
        # No layer draws random numbers, and a capture does not allow to look at their generator.
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})

    def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    def validate(model: Any) -> dict[str, float]:
        losses = [loss_of(model, ids).float() for ids in held_out(accelerator, corpus, args)]
        values = {"validation_loss": torch.stack(losses).mean().item()}
        if args.pruning:  # one window tells enough about the gates
            values["live_share"] = live_shares(model, next(held_out(accelerator, corpus, args))).mean().item()
        return values

    trained = train(args, accelerator, corpus, model, loss_of, validate, captured=True)
    export(accelerator, trained, args, args.output / "model")
    accelerator.end_training()
    folder = printable(args.output / "model")
    accelerator.print(f"{folder} is ready: vllm serve {folder}")


if __name__ == "__main__":
    main()
