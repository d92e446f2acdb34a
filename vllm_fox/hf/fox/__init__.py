"""Forgetting Transformers for transformers."""
