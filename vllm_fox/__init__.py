"""vllm-fox: serve transformers that forget through an unmodified vLLM."""

__version__ = "0.2.0"
