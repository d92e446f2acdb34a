"""The command ``vllm-fox``, with a module for each of its commands.

A command's module imports torch, transformers, vLLM, and modules that import these, inside functions, so that
``vllm-fox --help`` is there at once.
"""
