"""Leaf functions of forgetting attention: one folder per operation.

``NAME/reference.py`` is the plain PyTorch form and reads like the formula; faster implementations stand beside
it with the same signature, and ``NAME/__init__.py`` picks one. Nothing here knows vLLM.

All but ``training_attention`` work on the pages of a server's KV cache; that one takes whole sequences.
"""

from .training_attention import forgetting_attention

__all__ = ["forgetting_attention"]
