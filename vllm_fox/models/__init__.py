"""Models for vLLM, one file each."""
