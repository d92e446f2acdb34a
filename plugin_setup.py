"""Entry point ``vllm.general_plugins``: vLLM calls :func:`register` in each of its processes."""


def register() -> None:
    """Make the families' models, the attention backend and the connector known to vLLM. Cheap and idempotent."""
    from vllm_fox.registration import register_plugin

    register_plugin()
