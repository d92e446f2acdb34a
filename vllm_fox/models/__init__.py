"""vLLM models, one file each; vLLM imports them by name when a checkpoint asks for one."""
