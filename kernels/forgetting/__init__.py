"""Leaf functions of forgetting attention (FoX, arXiv 2503.02130; pruning as in ACP, arXiv 2504.06949)."""
