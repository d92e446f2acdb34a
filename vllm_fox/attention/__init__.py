"""vLLM's side of a step: the attention layer, the FOX backend and its metadata."""
