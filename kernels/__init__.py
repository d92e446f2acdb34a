"""Leaf functions of paged forgetting attention: one folder per operation.

``NAME/reference.py`` is the plain PyTorch form and reads like the formula; faster implementations stand beside
it with the same signature, and ``NAME/__init__.py`` picks one. Nothing here knows vLLM.
"""
