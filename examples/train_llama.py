"""Pretrain a small Llama on any folder of text files, such as examples/retrofit.py then teaches to evict.

    python examples/train_llama.py TEXT_FOLDER --output runs/llama                  # one GPU
    torchrun --nproc-per-node 2 examples/train_llama.py TEXT_FOLDER --output ...    # two processes
    python examples/retrofit.py runs/llama/model TEXT_FOLDER --output runs/evicting

Run the same command again after an interruption, of whatever kind: it goes on from the last checkpoint with the
same batches. At the end OUTPUT/model is an ordinary Llama of transformers, which ``vllm serve`` takes as it is.

OUTPUT/log.jsonl has the loss of every step, OUTPUT/tensorboard the same for TensorBoard.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from command_line import Parser, positive_int, refuse
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
from transformers import LlamaConfig, LlamaForCausalLM
from whole_files import printable, refusal_said


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--kv-heads", type=positive_int, help="as many as --heads unless given")
    args = parser.parse_args(argv)
    args.kv_heads = args.kv_heads or args.heads
    check_options(parser, args)
    if args.hidden % args.heads or args.hidden // args.heads % 2:
        refuse(f"--hidden is {args.hidden}: it must be an even multiple of --heads {args.heads}.")
    if args.heads % args.kv_heads:
        refuse(f"--heads is {args.heads}: it must be a multiple of --kv-heads {args.kv_heads}.")
    return args


def make_config(args: argparse.Namespace) -> LlamaConfig:
    """A Llama whose MLP is about 8/3 as wide as the model."""
    return LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=-(-8 * args.hidden // (3 * 64)) * 64,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with refusal_said(args.output, "Free some space and run the same command again."):
        pretrain(args)


def pretrain(args: argparse.Namespace) -> None:
    """The whole run, or what is left of it."""
    fixed = (*FIXED, "kv_heads")
    accelerator, corpus = begin(args, fixed)
    model = LlamaForCausalLM(make_config(args))
    check_disk(args, sum(p.numel() for p in model.parameters()))
    record_run(args, fixed, accelerator)

    def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    def validate(model: Any) -> dict[str, float]:
        losses = [loss_of(model, ids).float() for ids in held_out(accelerator, corpus, args)]
        return {"validation_loss": torch.stack(losses).mean().item()}

    trained = train(args, accelerator, corpus, model, loss_of, validate)
    export(accelerator, trained, args, args.output / "model")
    accelerator.end_training()
    folder = printable(args.output / "model")
    accelerator.print(f"{folder} is ready: vllm serve {folder}")


if __name__ == "__main__":
    main()
