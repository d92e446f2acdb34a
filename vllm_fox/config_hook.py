"""Adapt the engine's configuration to the plugin's models, without a flag, and refuse what they do not support."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from vllm.config import CompilationConfig, KVTransferConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from .family import Family
from .host_memory import check_host_cache
from .refusals import (
    adapters,
    check_overrides,
    check_quantized_cache,
    check_quantized_inputs,
    quantized_weights,
    speculation,
    unsupported_environment,
    unsupported_options,
)

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger(__name__)

CONNECTOR = "FoxPageConnector"
"""Name of the plugin's KV connector."""
ATTENTION_OPERATOR = "vllm_fox::paged_attention"
"""Name of the operator that represents an attention layer of any family in compiled graphs."""
ALWAYS_CAPTURED = 1024
"""Steps of so many tokens are captured as CUDA graphs whatever the model's size, as vLLM does on newer GPUs."""
LAYER_LAUNCH_S, GPU_FLOPS = 1e-3, 5e14
"""Seconds that a host needs for the launches of one layer while it also schedules, and what a Hopper GPU computes
in a second: longer steps do not wait for the host, so they need no graph."""


class PagedConfigHook(VerifyAndUpdateConfig):
    """The configuration hook of a family's models.

    vLLM asks for a class, so :func:`config_hook_of` makes a subclass for each family.

    Attributes:
        family: the family of the models.
    """

    family: ClassVar[Family]

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Check the engine's configuration and complete it. vLLM calls this before it loads anything."""
        family = cls.family
        settings = family.settings.from_vllm_config(vllm_config)
        page_size = settings.page_size or family.page_size
        check_overrides(vllm_config)
        if family.quantized_weights:
            # First, as vLLM writes what the checkpoint asks for into --kv-cache-dtype.
            check_quantized_cache(vllm_config, family.name)
            check_quantized_inputs(vllm_config, family.name)
        refusals = [
            *unsupported_options(vllm_config),
            *speculation(vllm_config, family.speculation, page_size),
            *adapters(vllm_config, family.adapters),
            *quantized_weights(vllm_config.model_config, family.quantized_weights),
            *unsupported_environment(vllm_config),
            _unsupported_dtype(vllm_config, family.float8_pages),
            *family.refusals(vllm_config),
        ]
        for found, what in refusals:
            if found:
                raise ValueError(f"In vllm-fox, {family.name} do not support {what}: leave it out.")
        _check_ranks(vllm_config)
        _set_page_size(vllm_config, page_size, family.name)
        # The connector carries page-table changes to the workers, and reports of dead pages back.
        vllm_config.kv_transfer_config = KVTransferConfig(kv_connector=CONNECTOR, kv_role="kv_producer")
        _split_graphs(vllm_config.compilation_config)
        _capture_prompts(vllm_config)
        cache = vllm_config.cache_config
        if cache.enable_prefix_caching and family.shares_pages:
            logger.info(
                "Prefix caching is on: requests that begin alike share their first pages, except dead ones."
            )
        elif cache.enable_prefix_caching:
            cache.enable_prefix_caching = False
            logger.info("Prefix caching is off: %s do not share pages between requests.", family.name)
        check_host_cache(vllm_config, settings, cache.enable_prefix_caching)


def config_hook_of(family: Family) -> type[PagedConfigHook]:
    """Make the hook class that vLLM calls for a family's models."""
    return type("FamilyConfigHook", (PagedConfigHook,), {"family": family})


class LookalikeHook(VerifyAndUpdateConfig):
    """Refuses checkpoints that vLLM takes for a model of its own, and that belong to a family.

    Attributes:
        refusal: the family's function (:attr:`Family.lookalikes`).
    """

    refusal: ClassVar[Callable[[ModelConfig], str | None]]

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Check the model's configuration. vLLM calls this before it loads anything."""
        sentence = cls.refusal(vllm_config.model_config)
        if sentence is not None:
            raise ValueError(sentence)


def lookalike_hook_of(refusal: Callable[[ModelConfig], str | None]) -> type[LookalikeHook]:
    """Make the hook class that vLLM calls for an architecture of its own."""
    return type("FamilyLookalikeHook", (LookalikeHook,), {"refusal": staticmethod(refusal)})


def _check_ranks(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    heads, ranks = vllm_config.model_config.get_total_num_kv_heads(), parallel.tensor_parallel_size
    if heads % ranks and ranks % heads:
        raise ValueError(
            f"--tensor-parallel-size {ranks} does not divide the model's {heads} KV heads: choose a divisor or a "
            "multiple."
        )
    layers = vllm_config.model_config.get_total_num_hidden_layers()
    if parallel.pipeline_parallel_size > layers:
        raise ValueError(
            f"--pipeline-parallel-size {parallel.pipeline_parallel_size} is more than the model's {layers} layers: "
            f"choose at most {layers}."
        )


def _unsupported_dtype(vllm_config: VllmConfig, float8_pages: bool) -> tuple[object, str]:
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    # vLLM has no name for float32 here.
    allowed = ["auto"] if dtype == "float32" else ["auto", dtype]
    if float8_pages and (not current_platform.is_cuda() or current_platform.has_device_capability(89)):
        allowed += ["fp8", "fp8_e4m3"]
    found = vllm_config.cache_config.cache_dtype
    return found not in allowed, f"--kv-cache-dtype {found} (but {', '.join(allowed)})"


def _set_page_size(vllm_config: VllmConfig, page_size: int, family: str) -> None:
    cache = vllm_config.cache_config
    if cache.user_specified_block_size and cache.block_size != page_size:
        raise ValueError(
            f"--block-size {cache.block_size} is not used by {family}: set "
            f'--additional-config \'{{"fox": {{"page_size": {cache.block_size}}}}}\' instead.'
        )
    cache.block_size = page_size
    cache.user_specified_block_size = True


def _split_graphs(compilation: CompilationConfig) -> None:
    """Make the attention operator end a compiled piece of the graph, as vLLM's own attention operators do."""
    if compilation.splitting_ops is None:
        compilation.splitting_ops = [*CompilationConfig._attention_ops]
    if compilation.splitting_ops and ATTENTION_OPERATOR not in compilation.splitting_ops:
        compilation.splitting_ops.append(ATTENTION_OPERATOR)


def _capture_prompts(vllm_config: VllmConfig) -> None:
    """Capture the steps that wait for the host rather than for the GPU, unless the user has set the sizes.

    These are steps of few tokens, and in small models those of whole prompts. Replaying a graph spares the host.
    """
    compilation, scheduler = vllm_config.compilation_config, vllm_config.scheduler_config
    if compilation.cudagraph_capture_sizes is None and compilation.max_cudagraph_capture_size is None:
        size, ranks = vllm_config.model_config.get_hidden_size(), vllm_config.parallel_config.tensor_parallel_size
        most = min(waits_for_host(size) * ranks, scheduler.max_num_batched_tokens)
        compilation.cudagraph_capture_sizes = captured_sizes(most)


def waits_for_host(hidden_size: int) -> int:
    """Tokens of the largest step whose layers a GPU computes faster than a host launches them."""
    flops_per_token = 2 * 12 * hidden_size**2
    return max(ALWAYS_CAPTURED, int(LAYER_LAUNCH_S * GPU_FLOPS / flops_per_token) // 256 * 256)


def captured_sizes(most: int) -> list[int]:
    """Tokens of the steps to capture, up to ``most``: vLLM's own sizes first, and coarser ones for prompts.

    A step is padded to the next size: from 1,024 tokens on by a quarter at most.
    """
    short = [1, 2, 4, *range(8, 256, 8), *range(256, ALWAYS_CAPTURED + 1, 16)]
    long = [*range(1280, 2048, 256), *range(2048, most + 1, 512)]
    return [size for size in [*short, *long] if size < most] + [most]
