"""Everything that the plugin adds to vLLM's registries."""

from __future__ import annotations

FOX = "ForgettingTransformerForCausalLM"
SPARSE_GPT2 = "SparseGPT2LMHeadModel"
CONNECTOR = "FoxPageConnector"


def register_plugin() -> None:
    """Register configs, tokenizer, model, backend, connector and config hook; safe to call again.

    Under a vLLM of another release line nothing is registered and an error is logged: other models go on as before.
    """
    import vllm
    from vllm.logger import init_logger

    from .compat import check_vllm_version

    try:
        check_vllm_version(vllm.__version__)
    except RuntimeError as error:
        init_logger(__name__).error("%s Models that forget cannot be served until then.", error)
        return

    from vllm import ModelRegistry
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.v1.attention.backends.registry import register_backend

    from .config_hook import FoxConfigHook, SparseGPT2ConfigHook
    from .configs import register_configs
    from .tokenizer import register_tokenizer

    register_configs()
    register_tokenizer()
    if MODELS_CONFIG_MAP.get(FOX) is FoxConfigHook:
        return
    ModelRegistry.register_model(FOX, f"vllm_fox.models.fox:{FOX}")
    ModelRegistry.register_model(SPARSE_GPT2, f"vllm_fox.models.sparse_gpt2:{SPARSE_GPT2}")
    register_backend("FOX", "vllm_fox.attention.backend.FoxAttentionBackend")
    register_backend("DCP", "vllm_fox.attention.backend.SubsetAttentionBackend")
    KVConnectorFactory.register_connector(CONNECTOR, "vllm_fox.pages.connector", CONNECTOR)
    MODELS_CONFIG_MAP[FOX] = FoxConfigHook
    MODELS_CONFIG_MAP[SPARSE_GPT2] = SparseGPT2ConfigHook
