"""Everything that the plugin adds to vLLM's registries."""

from __future__ import annotations

ARCHITECTURE = "ForgettingTransformerForCausalLM"
CONNECTOR = "FoxPageConnector"


def register_plugin() -> None:
    """Register configs, tokenizer, model, backend, connector and config hook; safe to call again.

    A wrong vLLM does not stop vLLM from serving other models: the error comes when a FoX model is loaded.
    """
    from vllm import ModelRegistry
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.v1.attention.backends.registry import register_backend

    from .config_hook import FoxConfigHook
    from .configs import register_configs
    from .tokenizer import register_tokenizer

    register_configs()
    register_tokenizer()
    if MODELS_CONFIG_MAP.get(ARCHITECTURE) is FoxConfigHook:
        return
    ModelRegistry.register_model(ARCHITECTURE, f"vllm_fox.models.fox:{ARCHITECTURE}")
    register_backend("FOX", "vllm_fox.attention.backend.FoxAttentionBackend")
    KVConnectorFactory.register_connector(CONNECTOR, "vllm_fox.pages.connector", CONNECTOR)
    MODELS_CONFIG_MAP[ARCHITECTURE] = FoxConfigHook
