"""What our models need of the engine's configuration, set without a flag; and what they refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from vllm.config import CompilationConfig, KVTransferConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from .settings import FoxSettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)

CAPTURED_TOKENS = 1024


class PagedConfigHook(VerifyAndUpdateConfig):
    """What models over our pages have in common.

    Attributes:
        family: the models, for errors.
        attention_op: the operator that stands for their attention layers.
        page_size: tokens per page unless ``fox.page_size`` says otherwise.
    """

    family: ClassVar[str]
    attention_op: ClassVar[str]
    page_size: ClassVar[int]

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """vLLM calls this before anything is loaded."""
        settings = FoxSettings.from_vllm_config(vllm_config)
        for found, what in cls.refusals(vllm_config, settings):
            if found:
                raise ValueError(f"{cls.family} do not support {what} in vllm-fox yet: leave it out.")
        _check_ranks(vllm_config)
        _set_page_size(vllm_config, settings.page_size or cls.page_size, cls.family)
        _route_pages(vllm_config)
        _split_graphs(vllm_config.compilation_config, cls.attention_op)
        _capture_short_prompts(vllm_config.compilation_config)
        cache = vllm_config.cache_config
        if cache.enable_prefix_caching:
            cache.enable_prefix_caching = False
            logger.info("Prefix caching is off: vllm-fox does not share released pages between requests yet.")

    @classmethod
    def refusals(cls, vllm_config: VllmConfig, settings: FoxSettings) -> list[tuple[object, str]]:
        """Whether something is asked for that this family lacks, and what."""
        return _unsupported(vllm_config)


class FoxConfigHook(PagedConfigHook):
    """For every ForgettingTransformerForCausalLM."""

    family = "Forgetting Transformers"
    attention_op = "vllm_fox::forgetting_attention"
    page_size = 64

    @classmethod
    def refusals(cls, vllm_config: VllmConfig, settings: FoxSettings) -> list[tuple[object, str]]:
        """Also of dtypes of the pages."""
        dtypes = [*_own_dtypes(vllm_config), *_float8_dtypes()]
        return [*super().refusals(vllm_config, settings), _unsupported_dtype(vllm_config, dtypes)]


class SparseGPT2ConfigHook(PagedConfigHook):
    """For every SparseGPT2LMHeadModel."""

    family = "Sparse GPT-2 models"
    attention_op = "vllm_fox::subset_attention"
    # A request holds up to two pages a layer beside its live tokens, so small pages pay.
    page_size = 16

    @classmethod
    def refusals(cls, vllm_config: VllmConfig, settings: FoxSettings) -> list[tuple[object, str]]:
        """Also of float8 pages, pipeline stages (layers need what those below drop), and FoX's own option."""
        stages = vllm_config.parallel_config.pipeline_parallel_size
        return [
            *super().refusals(vllm_config, settings),
            _unsupported_dtype(vllm_config, _own_dtypes(vllm_config)),
            (stages > 1, f"pipeline stages (--pipeline-parallel-size {stages})"),
            (
                settings.log_pruning_tolerance != FoxSettings.log_pruning_tolerance,
                f"fox.log_pruning_tolerance ({settings.log_pruning_tolerance!r}; they have learned what to drop)",
            ),
        ]


def _unsupported(vllm_config: VllmConfig) -> list[tuple[object, str]]:
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    return [
        (vllm_config.speculative_config, "speculative decoding (--speculative-config)"),
        (vllm_config.lora_config, "LoRA (--enable-lora)"),
        (vllm_config.kv_transfer_config, "a KV connector (--kv-transfer-config)"),
        (vllm_config.quant_config, "quantised weights (--quantization)"),
        (getattr(cache, "kv_offloading_size", None), "KV offloading (--kv-offloading-size)"),
        (parallel.decode_context_parallel_size > 1, "context parallelism (--decode-context-parallel-size)"),
        (parallel.prefill_context_parallel_size > 1, "context parallelism (--prefill-context-parallel-size)"),
    ]


def _check_ranks(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    heads, ranks = vllm_config.model_config.get_total_num_kv_heads(), parallel.tensor_parallel_size
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


def _unsupported_dtype(vllm_config: VllmConfig, dtypes: list[str]) -> tuple[object, str]:
    found = vllm_config.cache_config.cache_dtype
    return found not in dtypes, f"--kv-cache-dtype {found} (but {', '.join(dtypes)})"


def _own_dtypes(vllm_config: VllmConfig) -> list[str]:
    """The model's own type, as values of --kv-cache-dtype."""
    return ["auto", str(vllm_config.model_config.dtype).removeprefix("torch.")]


def _float8_dtypes() -> list[str]:
    """e4m3, where the GPU has it."""
    if current_platform.is_cuda() and not current_platform.has_device_capability(89):
        return []
    return ["fp8", "fp8_e4m3"]


def _set_page_size(vllm_config: VllmConfig, page_size: int, family: str) -> None:
    cache = vllm_config.cache_config
    if cache.user_specified_block_size and cache.block_size != page_size:
        raise ValueError(
            f"--block-size {cache.block_size} is not used by {family}: set "
            f'--additional-config \'{{"fox": {{"page_size": {cache.block_size}}}}}\' instead.'
        )
    cache.block_size = page_size
    cache.user_specified_block_size = True


def _route_pages(vllm_config: VllmConfig) -> None:
    from .registration import CONNECTOR

    vllm_config.kv_transfer_config = KVTransferConfig(kv_connector=CONNECTOR, kv_role="kv_producer")


def _split_graphs(compilation: CompilationConfig, attention_op: str) -> None:
    """Our attention operator ends a compiled piece, as vLLM's own do."""
    if compilation.splitting_ops is None:
        compilation.splitting_ops = [*CompilationConfig._attention_ops]
    if compilation.splitting_ops and attention_op not in compilation.splitting_ops:
        compilation.splitting_ops.append(attention_op)


def _capture_short_prompts(compilation: CompilationConfig) -> None:
    """Up to so many tokens a step waits for the host, not for the GPU: replay a graph, unless told otherwise.

    On newer GPUs vLLM captures as much itself; on older ones it stops at 512.
    """
    if compilation.cudagraph_capture_sizes is None and compilation.max_cudagraph_capture_size is None:
        compilation.max_cudagraph_capture_size = CAPTURED_TOKENS
