"""GPT-2 with Dynamic Context Pruning for transformers."""
