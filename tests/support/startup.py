"""What vLLM does before it loads a model: the whole configuration of an engine, or the error that it ends in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm import EngineArgs
from vllm.config import VllmConfig
from vllm.plugins import load_general_plugins


def configure(model: Path, fox: Any = None, **options: Any) -> VllmConfig:
    """All that happens at start-up before a model is loaded."""
    load_general_plugins()
    additional = {} if fox is None else {"additional_config": {"fox": fox}}
    options = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, **additional, **options}
    return EngineArgs(model=str(model), **options).create_engine_config()


def refused(model: Path, fox: Any = None, **options: Any) -> str:
    """The message of the ValueError that starting must end in."""
    with pytest.raises(ValueError) as caught:
        configure(model, fox, **options)
    return str(caught.value)
