"""GPT-2 that drops tokens for good, layer by layer (Dynamic Context Pruning, arXiv 2305.15805)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm_fox.family import Family

from .config import SparseGPT2Config

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def _refusals(vllm_config: VllmConfig) -> Iterable[tuple[object, str]]:
    stages = vllm_config.parallel_config.pipeline_parallel_size
    # A layer needs to know what the layers below it drop.
    yield stages > 1, f"pipeline stages (--pipeline-parallel-size {stages})"
    length, table = vllm_config.model_config.max_model_len, vllm_config.model_config.hf_config.block_size
    yield length > table, f"--max-model-len {length} (but up to {table}, the length of their table of positions)"


SPARSE_GPT2 = Family(
    name="Sparse GPT-2 models",
    architectures={"SparseGPT2LMHeadModel": "vllm_fox.families.sparse_gpt2.model:SparseGPT2LMHeadModel"},
    configs={SparseGPT2Config: "vllm_fox.hf.sparse_gpt2.modeling:SparseGPT2LMHeadModel"},
    stream="one layer",
    streams=lambda config: config.n_layer,
    # A request holds up to two pages per layer beyond its live tokens, so small pages save memory.
    page_size=16,
    refusals=_refusals,
    token_ends="vllm_fox.hf.sparse_gpt2.token_ends:token_ends",
)
