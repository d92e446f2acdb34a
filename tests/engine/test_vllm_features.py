"""docs/vllm_features.md against vLLM's own lists of switches, what is refused, and the tests that it names."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

import vllm
from vllm import envs
from vllm.config import AttentionConfig
from vllm.config.compilation import PassConfig
from vllm.engine.arg_utils import AsyncEngineArgs

from tests.support import ROOT

from .test_refusals import ADAPTERS, QUANTISED, REFUSED, REFUSED_VARIABLES

NEW_IN_0_33 = """
    indexer_tp_shard_min_rows minimax_m3_indexer_cp monokernel sleep_mode_backend trtllm_ragged_backend
    watchdog_config VLLM_COHERE2_ATTN_MOE_DUAL_STREAM_TOKEN_THRESHOLD VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES
"""
GONE_IN_0_33 = """
    VLLM_USE_RAY_COMPILED_DAG_CHANNEL_TYPE VLLM_USE_RAY_COMPILED_DAG_OVERLAP_COMM VLLM_USE_RAY_WRAPPED_PP_COMM
"""
"""Names that only one of the supported releases knows; all others are in each of them."""

STATUSES = {"works", "refused", "vLLM refuses", "no effect", "not tried"}

OTHER_ARGUMENTS = """
    _api_process_count _api_process_rank additional_config aggregate_engine_logging all2all_backend
    allowed_local_media_path allowed_media_domains code_revision collect_detailed_traces config_format
    cpu_distributed_timeout_seconds custom_histogram_buckets data_parallel_address data_parallel_backend
    data_parallel_hybrid_lb data_parallel_multi_port_external_lb data_parallel_rank data_parallel_rpc_port
    data_parallel_size_local data_parallel_start_rank device_ids disable_log_stats distributed_timeout_seconds
    download_dir ec_manager_config ec_transfer_config elastic_ep_max_dp_size enable_layerwise_nvtx_tracing
    enable_log_requests enable_logging_iteration_details enable_mm_embeds enable_mm_processor_stats engram_config
    eplb_config expert_placement_strategy fail_on_environ_validation fault_tolerance_config hf_config_path hf_token
    ignore_patterns interleave_mm_strings io_processor_plugin jit_monitor_verbose language_model_only
    limit_mm_per_prompt log_config_file log_level logging_config logits_processors master_addr master_port
    max_parallel_loading_workers media_io_kwargs mm_device_do_normalize mm_encoder_attn_backend
    mm_encoder_attn_dtype mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_margin mm_encoder_fp8_scale_save_path
    mm_encoder_only mm_encoder_tp_mode mm_hasher_algorithm mm_ipc_gpu_memory_gb mm_processor_cache_gb
    mm_processor_cache_type mm_processor_device mm_processor_kwargs mm_shm_cache_max_object_size_mb mm_tensor_ipc
    model model_class_overrides model_loader_extra_config model_weights moe_backend monokernel nnodes node_rank
    numa_bind numa_bind_cpus numa_bind_nodes otlp_traces_endpoint profiler_config pt_load_map_location
    ray_workers_use_nsight reasoning_config reasoning_parser reasoning_parser_plugin renderer_num_workers revision
    safetensors_load_strategy safetensors_prefetch_block_size safetensors_prefetch_num_threads served_model_name
    show_hidden_metrics_for_version shutdown_timeout skip_mm_profiling skip_tokenizer_init structured_outputs_config
    tokenizer tokenizer_mode tokenizer_revision tokens_only trust_remote_code use_tqdm_on_load video_pruning_method
    video_pruning_rate watchdog_config worker_cls worker_extension_cls
"""
"""Arguments that say what is served, where and to whom, or that are about images, sound, experts or logs."""

TOUCHING = re.compile(
    "ATTN|ATTENTION|KV_|CACHE|MEMORY|CUDAGRAPH|COMPIL|BATCH|INVARIANT|PRECISION|OFFLOAD|MODEL_RUNNER|LAYOUT|DCP|DBO"
    "|FLASHINFER|CPU_|MODEL_LEN|PP_|TRITON|AOT|MULTIPROC|PREFILL|DECODE|SYNC|NAN|PLAN|FP8|SPEC|MLA|SLEEP|SEED"
    "|ALLREDUCE|SYMM"
)
"""Names of variables that may touch what the tables are about."""

OTHER_VARIABLES = """
    VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE VLLM_ASSETS_CACHE VLLM_ASSETS_CACHE_MODEL_CLEAN
    VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER VLLM_CACHE_ROOT VLLM_COHERE2_ATTN_MOE_DUAL_STREAM_TOKEN_THRESHOLD
    VLLM_CPU_NUM_OF_RESERVED_CPU VLLM_CPU_OMP_THREADS_BIND VLLM_ENABLE_FLA_PACKED_RECURRENT_DECODE
    VLLM_FLASHINFER_AUTOTUNE_CACHE_DIR VLLM_FLASHINFER_AUTOTUNE_SKIP_OPS
    VLLM_FLASHINFER_MOE_A2A_LOW_PRECISION_COMBINE VLLM_GDN_DECODE_KERNEL VLLM_HAS_FLASHINFER_CUBIN
    VLLM_KIMI_K3_AUX_ATTN_RES_STREAM VLLM_LOG_BATCHSIZE_INTERVAL VLLM_LOG_MODEL_INSPECTION
    VLLM_LORA_RESOLVER_CACHE_DIR VLLM_MAX_AUDIO_DECODE_BYTES VLLM_MAX_AUDIO_DECODE_DURATION_S
    VLLM_MAX_EMBED_DECODE_BYTES VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES VLLM_MEDIA_CACHE VLLM_MEDIA_CACHE_MAX_SIZE_MB
    VLLM_MEDIA_CACHE_TTL_HOURS VLLM_MXFP8_EMULATION_DEQUANT_AT_LOAD VLLM_REGEX_COMPILATION_TIMEOUT_S
    VLLM_SKIP_PRECOMPILED_VERSION_SUFFIX VLLM_SSM_CONV_STATE_LAYOUT VLLM_TRITON_FORCE_FIRST_CONFIG
    VLLM_TRITON_JIT_WARMUP_NUM_THREADS VLLM_USE_FLASHINFER_MOE_INT4 VLLM_USE_PRECOMPILED VLLM_USE_PRECOMPILED_RUST
    VLLM_USE_RAY_COMPILED_DAG_CHANNEL_TYPE VLLM_USE_RAY_COMPILED_DAG_OVERLAP_COMM VLLM_USE_RAY_WRAPPED_PP_COMM
    VLLM_USE_TRITON_AWQ VLLM_V1_USE_OUTLINES_CACHE VLLM_WORKER_MULTIPROC_METHOD VLLM_WSL2_ENABLE_PIN_MEMORY
    VLLM_XGRAMMAR_CACHE_MB
"""
"""Variables of such names that are about something else. So are all of other platforms."""
OTHER_PLATFORMS = ("VLLM_ROCM_", "VLLM_XPU_", "VLLM_XLA_")

ATTENTION_FIELDS = """
    backend backend_per_kind disable_flashinfer_q_quantization flash_attn_max_num_splits_for_cuda_graph
    flash_attn_version flex_attn_block_m flex_attn_block_n flex_attn_kv_block_size flex_attn_q_block_size
    hisparse_config indexer_kv_dtype indexer_sparse_logits indexer_tp_shard_min_rows minimax_m3_indexer_cp
    minimax_m3_msa_decode_backend mla_prefill_backend sparse_mla_force_mqa sparse_mla_prefill_workspace_factor
    tokenspeed_mla_min_split_kv tq_max_kv_splits_for_cuda_graph trtllm_ragged_backend use_non_causal
    use_prefill_query_quantization use_trtllm_attention
"""
"""All of ``--attention-config``, as the row on it knows it."""

FUSIONS = """
    eliminate_noops enable_qk_norm_rope_fusion fi_allreduce_fusion_max_size_mb fuse_act_padding fuse_act_quant
    fuse_allreduce_rms fuse_attn_quant fuse_mla_dual_rms_norm fuse_norm_quant fuse_qk_norm_rope_kvcache
    fuse_rope_kvcache fuse_rope_kvcache_cat_mla rope_kvcache_fusion_max_token_num
"""
"""All of ``pass_config`` in ``--compilation-config``."""


class Row(NamedTuple):
    """A row of the tables."""

    switches: frozenset[str]
    status: str
    how: str


def rows() -> list[Row]:
    text = (ROOT / "docs" / "vllm_features.md").read_text()
    found = re.findall(r"^\| (`.*?) \| ([\w ]+) \| (.*)\|$", text, re.MULTILINE)
    return [Row(frozenset(re.findall(r"`([^`]+)`", names)), status, how) for names, status, how in found]


def listed(names: str) -> set[str]:
    """Those of ``names`` that the installed release knows."""
    release = tuple(map(int, vllm.__version__.split(".")[:2]))
    return set(names.split()) - set((GONE_IN_0_33 if release >= (0, 33) else NEW_IN_0_33).split())


def fields(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


def documented() -> set[str]:
    every = [switch for row in rows() for switch in row.switches]
    assert len(every) == len(set(every))
    return set(every)


def test_every_argument_of_vllm_is_known() -> None:
    known = listed(" ".join(switch[2:].replace("-", "_") for switch in documented() if switch.startswith("--")))
    assert not known & listed(OTHER_ARGUMENTS)
    assert known | listed(OTHER_ARGUMENTS) == fields(AsyncEngineArgs)


def test_every_variable_of_vllm_is_known() -> None:
    known = listed(" ".join(switch for switch in documented() if switch.startswith("VLLM_")))
    assert known <= set(envs.environment_variables)
    assert not known & listed(OTHER_VARIABLES)
    touching = {name for name in envs.environment_variables if TOUCHING.search(name)}
    touching = {name for name in touching if not name.startswith(OTHER_PLATFORMS)}
    assert touching <= known | listed(OTHER_VARIABLES)
    assert touching >= listed(OTHER_VARIABLES)


def test_what_is_inside_of_arguments_is_known() -> None:
    assert fields(AttentionConfig) == listed(ATTENTION_FIELDS)
    assert fields(PassConfig) == listed(FUSIONS)


def test_statuses_are_those_of_the_tests() -> None:
    """What is refused has its sentence in a test, what is said to work has tests, and these exist."""
    sentences = " ".join([*REFUSED, *QUANTISED, ADAPTERS, *REFUSED_VARIABLES])
    for row in rows():
        assert row.status in STATUSES, row
        tests = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row.how)
        if row.status == "works":
            assert tests, row
        if row.status == "refused" and not tests:
            assert any(switch in sentences for switch in row.switches), row
        for file, name in tests:
            assert not name or name in functions_in(ROOT / file), (file, name)
    refused = {switch for row in rows() if "refused" in row.status + row.how for switch in row.switches}
    for switch in re.findall(r"--[a-z-]+|[A-Z_]+_[A-Z_]+(?==)", sentences):
        assert switch in refused, switch


def functions_in(file: Path) -> set[str]:
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}
