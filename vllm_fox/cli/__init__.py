"""The command ``vllm-fox``, with a module for each of its commands.

Modules here import torch, transformers and vLLM inside functions, so that ``vllm-fox --help`` is there at once.
"""
