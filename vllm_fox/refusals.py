"""What vLLM offers and no family of the plugin's models does: it would be ignored, or give wrong answers.

docs/vllm_features.md lists all of vLLM's switches, with those that work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from vllm import envs
from vllm.distributed.kv_transfer import has_kv_transfer_group
from vllm.platforms import current_platform

from .strict_config import StrictConfig

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

PAGE_LAYOUT = "BLHNC"
"""vLLM's name of the only layout in which the whole KV cache is one array of pages."""

Refusals = Iterator[tuple[object, str]]
"""Pairs: whether the feature is asked for (any true value), and its name, for "NAME do not support WHAT"."""


def unsupported_options(vllm_config: VllmConfig) -> Refusals:
    """Yield what the engine's arguments ask for in vain."""
    yield from _features(vllm_config)
    yield from _kv_cache(vllm_config)
    yield from _attention(vllm_config)
    yield from _batches(vllm_config)


def _features(vllm_config: VllmConfig) -> Refusals:
    model, cache, offload = vllm_config.model_config, vllm_config.cache_config, vllm_config.offload_config
    yield vllm_config.diffusion_config, "generation by diffusion (--diffusion-config)"
    yield (
        model.convert_type == "classify",
        "classification (--convert classify), as no weights are loaded for it",
    )
    yield vllm_config.aux_output_config.enabled, "routed experts (--enable-return-routed-experts)"
    yield vllm_config.kv_transfer_config, "a KV connector (--kv-transfer-config)"
    size = cache.kv_offloading_size
    yield size, f"KV offloading (--kv-offloading-size {size}; fox.host_cache_gib keeps cached pages in host memory)"
    # vLLM offloads layers that its make_layers has made, and the kernels keep references to weights.
    gib, group = offload.uva.cpu_offload_gb, offload.prefetch.offload_group_size
    yield gib, f"weights in CPU memory (--cpu-offload-gb {gib:g})"
    yield group, f"weights in CPU memory (--offload-group-size {group})"


def speculation(vllm_config: VllmConfig, supported: bool, page_size: int) -> Refusals:
    """Yield speculative decoding that is asked for in vain.

    Args:
        vllm_config: the engine's configuration.
        supported: whether rejected drafts can be taken back (:attr:`Family.speculation`).
        page_size: tokens per page.
    """
    config, name = vllm_config.speculative_config, "speculative decoding (--speculative-config)"
    if config is None:
        return
    yield not supported, f"{name}, since what a rejected draft drops cannot be undone"
    # Others read the KV cache of a draft model, or have not been tried. On a GPU vLLM has one n-gram drafter, and
    # schedules ahead of it under the second name.
    methods = ["ngram", "ngram_gpu"] if current_platform.is_cuda() else ["ngram"]
    allowed = " or ".join(f'"{method}"' for method in methods)
    yield config.method not in methods, f'{name} by method "{config.method}" (but by {allowed})'
    # vLLM's warm-up gives a request one block, which is a page for it, and two tokens more than there are drafts.
    drafts, most = config.num_speculative_tokens, page_size - 2
    yield drafts > most, f"{drafts} num_speculative_tokens in --speculative-config (but up to {most})"


def adapters(vllm_config: VllmConfig, supported: bool) -> Refusals:
    """Yield adapters that are asked for in vain.

    Args:
        vllm_config: the engine's configuration.
        supported: whether requests may use LoRA adapters (:attr:`Family.adapters`).
    """
    lora = vllm_config.lora_config
    yield lora and not supported, "LoRA (--enable-lora)"
    # vLLM 0.32's functions for CPUs take -1, which stands for no adapter, for the last one.
    yield lora and current_platform.is_cpu(), "LoRA (--enable-lora) on a CPU, where other requests would get it too"
    # vLLM's kernels for adapters assert this without a word.
    single = vllm_config.model_config.dtype == torch.float32
    yield lora and single, "LoRA (--enable-lora) with --dtype float32"


def quantized_weights(model: ModelConfig, supported: bool) -> Refusals:
    """Yield what asks for quantised weights in vain. vLLM makes its quant_config only after this.

    Args:
        model: the engine's model configuration.
        supported: whether weights may be quantised (:attr:`Family.quantized_weights`).
    """
    if supported:
        alone = model.quantization_config and not model.quantization
        yield alone, "--quantization-config without --quantization (vLLM would ignore it)"
    else:
        yield model.quantization, f"quantised weights (--quantization {model.quantization})"
        yield model.quantization_config, "quantised weights (--quantization-config)"


def _kv_cache(vllm_config: VllmConfig) -> Refusals:
    cache, events, shown = vllm_config.cache_config, vllm_config.kv_events_config, vllm_config.observability_config
    skipped = cache.cache_dtype.startswith("fp8") and cache.kv_cache_dtype_skip_layers
    yield skipped, f"layers without float8 pages (--kv-cache-dtype-skip-layers {' '.join(skipped or [])})"
    yield (
        events is not None and events.enable_kv_cache_events,
        "KV events (enable_kv_cache_events in --kv-events-config), since no block is cached",
    )
    yield shown.kv_cache_metrics, "residency of blocks (--kv-cache-metrics), since their pages are no blocks"
    yield shown.enable_mfu_metrics, "estimates of work (--enable-mfu-metrics), since they count what is forgotten"
    mode = cache.mamba_cache_mode
    yield mode != "none", f"states of Mamba layers (--mamba-cache-mode {mode})"
    for name in ("prefix_match_unit", "prefix_cache_retention_interval"):
        tokens = getattr(cache, name)
        yield tokens, f"cached prefixes (--{name.replace('_', '-')} {tokens})"


def _attention(vllm_config: VllmConfig) -> Refusals:
    attention, parallel = vllm_config.attention_config, vllm_config.parallel_config
    backend = attention.backend.name if attention.backend else None
    yield backend, f"an attention backend other than their own (--attention-backend {backend})"
    kinds = ", ".join(f"{kind}: {chosen.name}" for kind, chosen in attention.backend_per_kind.items())
    yield kinds, f"attention backends other than their own (backend_per_kind {{{kinds}}} in --attention-config)"
    yield attention.use_non_causal, "attention to later tokens (use_non_causal in --attention-config)"
    passes = vllm_config.compilation_config.pass_config
    yield passes.fuse_attn_quant, "fusion of attention with quantisation (fuse_attn_quant in --compilation-config)"
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel, name)
        yield size > 1, f"context parallelism (--{name.replace('_', '-')} {size})"


def _batches(vllm_config: VllmConfig) -> Refusals:
    parallel = vllm_config.parallel_config
    # The layers of a worker share the state of one step.
    yield parallel.enable_dbo, "two half batches at once (--enable-dbo)"
    yield parallel.ubatch_size > 1, f"parts of a batch at once (--ubatch-size {parallel.ubatch_size})"
    ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    # Every rank has a scheduler of its own there, which hears of no other rank's dead pages.
    external = ranks > 1 and parallel.distributed_executor_backend == "external_launcher"
    yield external, f"{ranks} ranks under --distributed-executor-backend external_launcher"


def unsupported_environment(vllm_config: VllmConfig) -> Refusals:
    """Yield what environment variables ask for in vain."""
    # vLLM has one connector in a process: the second engine's layers would never get a page table.
    yield has_kv_transfer_group(), "a second engine in one process (VLLM_ENABLE_V1_MULTIPROCESSING=0)"
    yield envs.VLLM_BATCH_INVARIANT, "batch invariance (VLLM_BATCH_INVARIANT=1)"
    # Such graphs are interrupted at vLLM's own attention only, and would hold what one prompt needed.
    yield envs.VLLM_USE_BREAKABLE_CUDAGRAPH, "breakable CUDA graphs (VLLM_USE_BREAKABLE_CUDAGRAPH=1)"
    layout = envs.VLLM_KV_CACHE_LAYOUT
    yield layout not in (None, PAGE_LAYOUT), f"another layout of the KV cache (VLLM_KV_CACHE_LAYOUT={layout})"
    # Under vLLM's own allocator for sleeping these segments are off where the KV cache is.
    if not vllm_config.model_config.enable_cumem_allocator:
        for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
            value = os.environ.get(name, "")
            # The first vLLM itself refuses on every platform, as it does for all models with a KV connector.
            matters = name == "PYTORCH_CUDA_ALLOC_CONF" or current_platform.is_cuda()
            expandable = "expandable_segments:true" in value.replace(" ", "").lower()
            yield matters and expandable, f"expandable segments of GPU memory ({name}={value})"


def check_overrides(vllm_config: VllmConfig) -> None:
    """Check the model's config with ``--hf-overrides``, which vLLM writes into it past the config's own checks.

    Raises:
        ValueError: an override is no field of the config, or its value is not allowed.
    """
    model = vllm_config.model_config
    if model.hf_overrides and isinstance(model.hf_config, StrictConfig):
        try:
            type(model.hf_config)(**model.hf_config.to_dict())
        except ValueError as error:
            raise ValueError(f"--hf-overrides: {error}") from None


def check_quantized_inputs(vllm_config: VllmConfig, family: str) -> None:
    """Refuse a checkpoint that rounds inputs to 8-bit integers in a dtype which this CPU's kernels do not take.

    Where the CPU has AMX, vLLM multiplies such inputs, if they are symmetric, by kernels that compute in bfloat16
    alone. In float32 they fail in the first step, and in float16 they end the process.

    Args:
        vllm_config: the engine's configuration.
        family: plural name of the models.

    Raises:
        ValueError: that is so.
    """
    model = vllm_config.model_config
    groups = (model.model_arch_config.quantization_config or {}).get("config_groups")
    if model.dtype == torch.bfloat16 or not isinstance(groups, dict) or not current_platform.is_cpu():
        return
    inputs = [group.get("input_activations") or {} for group in groups.values() if isinstance(group, dict)]
    symmetric = any(one.get("type") == "int" and one.get("symmetric", True) for one in inputs)
    if symmetric and torch.cpu.get_capabilities().get("amx_tile"):
        dtype = str(model.dtype).removeprefix("torch.")
        raise ValueError(
            f"In vllm-fox, {family} do not support quantised inputs in {dtype} on a CPU with AMX, and the "
            f"quantisation config of {model.model} asks for symmetric 8-bit integers: set --dtype bfloat16."
        )


CACHE_FIELDS = ("kv_cache_scheme", "kv_cache_quant_algo")
"""Fields of a quantisation config by which vLLM quantises keys and values unless it is told otherwise."""


def check_quantized_cache(vllm_config: VllmConfig, family: str) -> None:
    """Refuse a checkpoint that asks for quantised keys and values, unless the user asks for those of the model.

    vLLM then ignores the checkpoint's scales of keys and values, and so does the plugin.

    Args:
        vllm_config: the engine's configuration.
        family: plural name of the models.

    Raises:
        ValueError: the checkpoint asks for it, and ``--kv-cache-dtype`` does not name the model's dtype.
    """
    model = vllm_config.model_config
    given = model.model_arch_config.quantization_config or {}
    inner = given.get("quantization")
    parts = [given, *([inner] if isinstance(inner, dict) else [])]
    found = {name: part[name] for part in parts for name in CACHE_FIELDS if part.get(name)}
    dtype = str(model.dtype).removeprefix("torch.")
    if found and vllm_config.cache_config.cache_dtype != dtype:
        (name, value), *_ = found.items()
        # vLLM has no name for pages of float32.
        fix = "--dtype bfloat16 --kv-cache-dtype bfloat16" if dtype == "float32" else f"--kv-cache-dtype {dtype}"
        raise ValueError(
            f"In vllm-fox, {family} do not support a quantised KV cache, and the quantisation config of "
            f"{model.model} asks for one ({name} {value}): set {fix} to keep keys and values as the model "
            "computes them."
        )
