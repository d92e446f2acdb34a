"""What a FoX model needs of the engine's configuration, set without a flag; and what it refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.config import CompilationConfig, KVTransferConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from .settings import FoxSettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)

ATTENTION_OP = "vllm_fox::forgetting_attention"
CAPTURED_TOKENS = 1024


class FoxConfigHook(VerifyAndUpdateConfig):
    """vLLM calls this for every ForgettingTransformerForCausalLM, before anything is loaded."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        settings = FoxSettings.from_vllm_config(vllm_config)
        _refuse_unsupported(vllm_config)
        _set_page_size(vllm_config, settings)
        _route_pages(vllm_config)
        _split_graphs(vllm_config.compilation_config)
        _capture_short_prompts(vllm_config.compilation_config)
        cache = vllm_config.cache_config
        if cache.enable_prefix_caching:
            cache.enable_prefix_caching = False
            logger.info("Prefix caching is off: vllm-fox does not share released pages between requests yet.")


def _refuse_unsupported(vllm_config: VllmConfig) -> None:
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    heads = vllm_config.model_config.get_total_num_kv_heads()
    refusals = [
        (vllm_config.speculative_config, "speculative decoding (--speculative-config)"),
        (vllm_config.lora_config, "LoRA (--enable-lora)"),
        (vllm_config.kv_transfer_config, "a KV connector (--kv-transfer-config)"),
        (vllm_config.quant_config, "quantised weights (--quantization)"),
        (
            cache.cache_dtype not in _kv_cache_dtypes(vllm_config),
            f"--kv-cache-dtype {cache.cache_dtype} (but {', '.join(_kv_cache_dtypes(vllm_config))})",
        ),
        (getattr(cache, "kv_offloading_size", None), "KV offloading (--kv-offloading-size)"),
        (parallel.decode_context_parallel_size > 1, "context parallelism (--decode-context-parallel-size)"),
        (parallel.prefill_context_parallel_size > 1, "context parallelism (--prefill-context-parallel-size)"),
    ]
    for found, what in refusals:
        if found:
            raise ValueError(f"Forgetting Transformers do not support {what} in vllm-fox yet: leave it out.")
    ranks = parallel.tensor_parallel_size
    if heads % ranks and ranks % heads:
        raise ValueError(
            f"--tensor-parallel-size {ranks} does not divide the model's {heads} KV heads: choose a divisor."
        )
    layers = vllm_config.model_config.get_total_num_hidden_layers()
    if parallel.pipeline_parallel_size > layers:
        raise ValueError(
            f"--pipeline-parallel-size {parallel.pipeline_parallel_size} is more than the model's {layers} layers: "
            f"choose at most {layers}."
        )


def _kv_cache_dtypes(vllm_config: VllmConfig) -> list[str]:
    """The values of --kv-cache-dtype that work: the model's own type, and float8 e4m3 where the GPU has it."""
    own = ["auto", str(vllm_config.model_config.dtype).removeprefix("torch.")]
    if current_platform.is_cuda() and not current_platform.has_device_capability(89):
        return own
    return [*own, "fp8", "fp8_e4m3"]


def _set_page_size(vllm_config: VllmConfig, settings: FoxSettings) -> None:
    cache = vllm_config.cache_config
    if cache.user_specified_block_size and cache.block_size != settings.page_size:
        raise ValueError(
            f"--block-size {cache.block_size} is not used by Forgetting Transformers: set "
            f'--additional-config \'{{"fox": {{"page_size": {cache.block_size}}}}}\' instead.'
        )
    cache.block_size = settings.page_size
    cache.user_specified_block_size = True


def _route_pages(vllm_config: VllmConfig) -> None:
    from .registration import CONNECTOR

    vllm_config.kv_transfer_config = KVTransferConfig(kv_connector=CONNECTOR, kv_role="kv_producer")


def _split_graphs(compilation: CompilationConfig) -> None:
    """Our attention operator ends a compiled piece, as vLLM's own do."""
    if compilation.splitting_ops is None:
        compilation.splitting_ops = [*CompilationConfig._attention_ops]
    if compilation.splitting_ops and ATTENTION_OP not in compilation.splitting_ops:
        compilation.splitting_ops.append(ATTENTION_OP)


def _capture_short_prompts(compilation: CompilationConfig) -> None:
    """Up to so many tokens a step waits for the host, not for the GPU: replay a graph, unless told otherwise.

    On newer GPUs vLLM captures as much itself; on older ones it stops at 512.
    """
    if compilation.cudagraph_capture_sizes is None and compilation.max_cudagraph_capture_size is None:
        compilation.max_cudagraph_capture_size = CAPTURED_TOKENS
