"""Make a checkpoint that evicts tokens ready to be served: ``python -m vllm_fox.convert SOURCE OUT``.

SOURCE is a checkpoint with Dynamic Memory Sparsification (DMS), as NVIDIA's Model-Optimizer saves it, or any Llama,
Mistral, Qwen2 or Qwen3 beside a KVzap predictor. OUT becomes one folder that says all of itself. Weights are copied
file by file; the model is never in memory as a whole.

    python -m vllm_fox.convert Qwen3-8B-DMS-8x evicting-qwen3-8b
    python -m vllm_fox.convert Qwen3-8B evicting-qwen3-8b --predictor KVzap-mlp-Qwen3-8B --threshold -4
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vllm_fox.families.evicting.convert import convert


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_fox.convert", description="Make a checkpoint that evicts tokens ready to be served."
    )
    parser.add_argument("source", type=Path, help="folder of the checkpoint")
    parser.add_argument("out", type=Path, help="folder to write; it must not exist")
    parser.add_argument("--predictor", type=Path, help="folder of a KVzap predictor for an unchanged model")
    parser.add_argument(
        "--threshold", type=float, help="evict tokens with a lower predicted score; with --predictor"
    )
    parser.add_argument(
        "--window", type=int, help="tokens for which an evicted one stays, 128 by default; with --predictor"
    )
    parser.add_argument(
        "--original",
        type=Path,
        help="folder of the model beside which the predictor was trained, if SOURCE is quantised; with --predictor",
    )
    args = parser.parse_args()
    try:
        for line in convert(args.source, args.out, args.predictor, args.threshold, args.window, args.original):
            print(line)
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
