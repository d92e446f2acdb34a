"""Parts that vLLM models of several families are built from."""
