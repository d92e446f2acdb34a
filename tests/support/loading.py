"""Models as vLLM's own loader builds and fills them, without an engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.utils.torch_utils import set_default_torch_dtype

import plugin_setup
from vllm_fox.families.fox.model import ForgettingTransformerForCausalLM


@contextlib.contextmanager
def group_of_one(folder: Path) -> Iterator[None]:
    """A tensor-parallel group of this process alone, which needs an empty folder."""
    plugin_setup.register()
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder / 'file'}", 0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
    yield
    cleanup_dist_env_and_memory()


def load_model(folder: Path, finish: bool = False, **options: Any) -> ForgettingTransformerForCausalLM:
    """A Forgetting Transformer, all but its talk to an accelerator.

    Args:
        folder: the checkpoint's.
        finish: whether weights are then brought into the form that kernels want, as in an engine.
        options: arguments of the engine.
    """
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, **options}
    vllm_config = EngineArgs(model=str(folder), **options).create_engine_config()
    dtype: Any = vllm_config.model_config.dtype
    with set_current_vllm_config(vllm_config), set_default_torch_dtype(dtype):
        model = initialize_model(vllm_config)
        get_model_loader(vllm_config.load_config).load_weights(model, vllm_config.model_config)
        if finish:
            process_weights_after_loading(model, vllm_config.model_config, torch.device("cpu"))
    assert isinstance(model, ForgettingTransformerForCausalLM)
    return model
