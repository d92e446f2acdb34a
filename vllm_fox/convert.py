"""Make a checkpoint that evicts tokens ready to be served: ``python -m vllm_fox.convert SOURCE OUT``.

SOURCE is a checkpoint with Dynamic Memory Sparsification (DMS), as NVIDIA's Model-Optimizer saves it, or any Llama,
Mistral, Qwen2 or Qwen3 beside a KVzap predictor. OUT becomes one folder that says all of itself. Weights are copied
file by file; the model is never in memory as a whole.

    python -m vllm_fox.convert Qwen3-8B-DMS-8x evicting-qwen3-8b
    python -m vllm_fox.convert Qwen3-8B evicting-qwen3-8b --predictor KVzap-mlp-Qwen3-8B --threshold -4

It is the same as ``vllm-fox convert``.
"""

from __future__ import annotations

import sys

from vllm_fox.cli.app import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
