"""Teach a GPT-2 to drop what it no longer needs: Dynamic Context Pruning (DCP, arXiv 2305.15805).

    python examples/finetune_dcp.py TEXT_FOLDER --output runs/dcp --gpt2 CHECKPOINT     # a GPT-2 of transformers
    python examples/finetune_dcp.py TEXT_FOLDER --output runs/dcp --dense-steps 2000    # trains a small one first
    python examples/finetune_dcp.py TEXT_FOLDER --output runs/dense --gpt2 CHECKPOINT --dense   # to compare with,
    python examples/finetune_dcp.py TEXT_FOLDER --output runs/near --gpt2 CHECKPOINT --window 200       # and that

The decision to drop is soft at first and hardens: the alpha of its alpha-sigmoid rises from 1 to --alpha along a
cosine. --gamma is what keeping costs: the larger, the more is dropped. Run the same command again after an
interruption, of whatever kind: it goes on. At the end OUTPUT/model is a checkpoint of transformers, bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from command_line import Parser, integer, non_negative_float, number, positive_float, positive_int, refuse
from safetensors import SafetensorError
from text_corpus import END
from tokenizers import Tokenizer
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
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel
from whole_files import printable, refusal_said

from vllm_fox.hf import SparseGPT2LMHeadModel
from vllm_fox.hf.sparse_gpt2.modeling import INITIAL_BIAS

OWN = (
    "gpt2", "dense", "window", "dense_steps", "dense_lr", "gamma", "alpha", "alpha_steps", "int_n_embd",
    "int_bias", "int_rate", "propagate",
)  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.set_defaults(context=1024, lr=3e-4)
    parser.add_argument("--gpt2", type=Path, help="folder of a GPT-2 of transformers, with its tokenizer.json")
    parser.add_argument("--dense", action="store_true", help="train on without dropping: the baseline")
    parser.add_argument("--window", type=positive_int, help="see only so many newest tokens: a baseline")
    parser.add_argument("--dense-steps", type=positive_int, default=2000, help="of the small GPT-2, without --gpt2")
    parser.add_argument("--dense-lr", type=positive_float, default=1e-3)
    parser.add_argument("--gamma", type=non_negative_float, default=0.3, help="weight in the loss of what is kept")
    alpha = number(lambda value: value >= 1, "a number from 1 on")
    parser.add_argument("--alpha", type=alpha, default=8.0, help="of the alpha-sigmoid, at the end")
    parser.add_argument("--alpha-steps", type=positive_int, help="steps until then; three quarters of --steps")
    parser.add_argument(
        "--int-n-embd", type=integer(1, 2**16), default=64, help="size of the interaction projections"
    )
    parser.add_argument(
        "--int-bias",
        type=non_negative_float,
        default=INITIAL_BIAS,
        help="first score; more, and far tokens fade less at first",
    )
    parser.add_argument(
        "--int-rate", type=non_negative_float, default=10.0, help="learning rate of what decides, over --lr"
    )
    parser.add_argument(
        "--no-propagate",
        dest="propagate",
        action="store_false",
        help="what a layer drops, layers above may still see",
    )
    args = parser.parse_args(argv)
    if args.gpt2 is None and args.hidden % args.heads:
        parser.error(f"--hidden is {args.hidden}: it must be a multiple of --heads {args.heads}.")
    if args.window is not None and (args.dense or args.window > args.context):
        parser.error(f"--window is {args.window}: it must be from 1 to --context {args.context}, without --dense.")
    if args.alpha_steps is None:
        args.alpha_steps = max(1, 3 * args.steps // 4)
    if args.alpha_steps > args.steps:
        parser.error(f"--alpha-steps is {args.alpha_steps}: it must be at most --steps {args.steps}.")
    check_options(parser, args)
    return args


def alpha_at(step: int, args: argparse.Namespace) -> float:
    """A cosine from 1 to --alpha."""
    done = min(1.0, step / args.alpha_steps)
    return args.alpha + 0.5 * (1 - args.alpha) * (1 + math.cos(math.pi * done))


def load_gpt2(args: argparse.Namespace) -> GPT2LMHeadModel:
    """The model of --gpt2. Ends the program if it is none, or too short for --context."""
    try:
        config = AutoConfig.from_pretrained(args.gpt2)
        if config.model_type != "gpt2":
            raise SystemExit(f"--gpt2 {args.gpt2} is a {config.model_type}: a gpt2 is needed.")
        if config.n_positions < args.context:
            refuse(f"--gpt2 {args.gpt2} has {config.n_positions} positions: --context is {args.context}.")
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        return GPT2LMHeadModel.from_pretrained(args.gpt2, config=config, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise SystemExit(f"--gpt2 {args.gpt2} is no GPT-2 checkpoint: {error}") from None


def new_gpt2(args: argparse.Namespace, vocab: int, end: int) -> GPT2LMHeadModel:
    """A small one."""
    sizes = {"n_positions": args.context, "n_embd": args.hidden, "n_layer": args.layers, "n_head": args.heads}
    config = GPT2Config(vocab_size=vocab, **sizes, bos_token_id=end, eos_token_id=end)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    dense = None if args.gpt2 is None else load_gpt2(args)
    with refusal_said(args.output, "Free some space and run the same command again."):
        finetune(args, dense)


def finetune(args: argparse.Namespace, dense: GPT2LMHeadModel | None) -> None:
    """The whole run, or what is left of it.

    Args:
        dense: to begin with; a small one is trained first unless given.
    """
    fixed = (*FIXED, *OWN)
    tokenizer = None if args.gpt2 is None else args.gpt2 / "tokenizer.json"
    accelerator, corpus = begin(args, fixed, tokenizer)
    tokens = Tokenizer.from_file(str(corpus.folder / "tokenizer.json"))
    vocab = tokens.get_vocab_size()
    if dense is not None and dense.config.vocab_size < vocab:
        raise SystemExit(f"--gpt2 {args.gpt2} knows {dense.config.vocab_size} tokens, its tokenizer.json {vocab}.")

    def losses(model: Any, **how: Any) -> dict[str, float]:
        windows = held_out(accelerator, corpus, args)
        found = [model(input_ids=ids, labels=ids, **how).loss.float() for ids in windows]
        return {"validation_loss": torch.stack(found).mean().item()}

    def dense_loss(model: Any, ids: torch.Tensor, **how: Any) -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False, **how).loss
        return loss

    # What a token sees of its window, as transformers takes it: [1, 1, T, T], True where it looks.
    seen = torch.ones(1, 1, args.context, args.context, dtype=torch.bool).tril()
    near = {} if args.window is None else {"attention_mask": seen.triu(1 - args.window).to(accelerator.device)}

    def sparse_loss(model: Any, ids: torch.Tensor, step: int) -> torch.Tensor:
        whole = accelerator.unwrap_model(model)
        whole.alpha, whole.gamma = alpha_at(step, args), args.gamma
        loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    def sparse_figures(model: Any) -> dict[str, float]:
        whole = accelerator.unwrap_model(model)
        shares = [whole.visible_shares(ids).mean() for ids in held_out(accelerator, corpus, args)]
        return losses(model) | {"pruned_share": 1 - torch.stack(shares).mean().item()}

    if dense is None:
        dense = new_gpt2(args, vocab, tokens.token_to_id(END))
        check_disk(args, sum(p.numel() for p in dense.parameters()))
        record_run(args, fixed, accelerator)
        folder = args.output / "dense"
        first = copy.copy(args)
        first.steps, first.lr = args.dense_steps, args.dense_lr
        trained = train(first, accelerator, corpus, dense, dense_loss, losses, name="dense_")
        dense = copy.deepcopy(accelerator.unwrap_model(trained)).cpu().float()
        export(accelerator, trained, args, folder)
        accelerator.free_memory()
    model: Any = dense
    plain = args.dense or args.window is not None
    if not plain:
        sizes = {"int_bias": args.int_bias, "int_n_embd": args.int_n_embd, "propagate_in_depth": args.propagate}
        try:
            model = SparseGPT2LMHeadModel.from_gpt2(dense, **sizes)
        except ValueError as error:
            refuse(f"--gpt2 {args.gpt2}: {error}")
    check_disk(args, sum(p.numel() for p in model.parameters()))
    record_run(args, fixed, accelerator)
    baseline = (partial(dense_loss, **near), partial(losses, **near))
    functions = baseline if plain else (sparse_loss, sparse_figures)

    def inputs_of(ids: torch.Tensor, step: int) -> tuple[int, ...]:
        return () if plain else (step,)

    trained = train(
        args,
        accelerator,
        corpus,
        model,
        *functions,
        inputs_of=inputs_of,
        rate_of=lambda name: args.int_rate if "int" in name else 1.0,
    )
    export(accelerator, trained, args, args.output / "model")
    accelerator.end_training()
    accelerator.print(f"{printable(args.output / 'model')} is ready.")


if __name__ == "__main__":
    main()
