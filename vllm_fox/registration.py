"""Register everything that the plugin adds to vLLM and transformers, for all families."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from .families import all_families


def register_plugin() -> None:
    """Register configs, models, backend, cache spec, connector and config hooks with vLLM; safe to call again.

    Under a vLLM of another release line it logs an error and registers nothing: other models are served as before.
    """
    import vllm
    from vllm.logger import init_logger

    from .compat import check_vllm_version

    try:
        check_vllm_version(vllm.__version__)
    except RuntimeError as error:
        init_logger(__name__).error("%s Models that forget cannot be served until then.", error)
        return

    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .config_hook import config_hook_of, lookalike_hook_of

    register_configs()
    _register_pages()
    for family in all_families():
        hook = config_hook_of(family)
        for name, model in family.architectures.items():
            if name not in MODELS_CONFIG_MAP:
                ModelRegistry.register_model(name, model)
                MODELS_CONFIG_MAP[name] = hook
        for name, refusal in family.lookalikes.items():
            MODELS_CONFIG_MAP.setdefault(name, lookalike_hook_of(refusal))


@cache
def _register_pages() -> None:
    """Register what all families share: the backend, the cache spec with its manager, and the connector."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.v1.attention.backends.registry import register_backend
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from .config_hook import CONNECTOR
    from .pages.manager import StreamPageManager
    from .pages.spec import StreamPageSpec

    register_backend("VLLM_FOX", "vllm_fox.attention.backend.PagedAttentionBackend")
    # The registry adds vLLM's own specs only while it is empty, so they must go first.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(StreamPageSpec, StreamPageManager, uniform_type_base_spec=StreamPageSpec)
    KVConnectorFactory.register_connector(CONNECTOR, "vllm_fox.pages.connector", CONNECTOR)


def register_configs() -> None:
    """Register the families' config classes with transformers' AutoConfig; safe to call again.

    They replace classes that another package registered for the same model types.
    """
    from transformers import AutoConfig

    for family in all_families():
        for config in family.configs:
            AutoConfig.register(config.model_type, config, exist_ok=True)
        family.prepare()


def register_transformers_models() -> None:
    """Register the families' models for transformers with AutoModelForCausalLM; safe to call again."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for family in all_families():
        for config, path in family.configs.items():
            if path is not None:
                module, _, name = path.partition(":")
                model: Any = getattr(import_module(module), name)
                AutoModelForCausalLM.register(config, model, exist_ok=True)
                # With label smoothing, Trainer learns from these names that each token's label is the next token.
                MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type] = name
