"""Leaf functions of attention over a subset of a page's tokens (Dynamic Context Pruning, arXiv 2305.15805)."""
