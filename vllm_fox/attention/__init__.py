"""The part of attention that faces vLLM: the attention layer, the backend and its metadata."""
