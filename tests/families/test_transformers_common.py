"""transformers' own common tests of models and of generation, over ours.

They are not in its package but in its repository. The environment variable TRANSFORMERS_SOURCE names a checkout of
the installed version, and the package ``parameterized``, which they use, has to be installed:

    TRANSFORMERS_SOURCE=~/transformers pytest tests/families/test_transformers_common.py

Many of them skip themselves, above all those that look at attention weights or need FlashAttention or several GPUs.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import sys
import unittest
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers.models.auto import modeling_auto

from tests.support.checkpoints import make_config
from vllm_fox import hf

SOURCE = os.environ.get("TRANSFORMERS_SOURCE")
if SOURCE is None:
    pytest.skip("TRANSFORMERS_SOURCE does not name a checkout of transformers", allow_module_level=True)
pytest.importorskip("parameterized", reason="transformers' tests need the package parameterized")


def load_their_tests() -> tuple[Any, Any]:
    """Import their modules under a name of their own, as their package is called ``tests``, like ours."""
    folder = Path(SOURCE or "", "tests")
    spec = importlib.util.spec_from_file_location(
        "transformers_tests", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules[spec.name] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)  # their marks are in their own settings
        models = importlib.import_module("transformers_tests.test_modeling_common")
        return models, importlib.import_module("transformers_tests.generation.test_utils")


MODELS, GENERATION = load_their_tests()

LEFT_OUT = {
    "FlaFoxTest.test_inherits_generation_mixin": "The dialect's class inherits it from the other dialect's class.",
    "SparseGPT2Test.test_load_save_without_tied_weights": "The method's checkpoints have tied weights only.",
} | {
    f"{kind}.{name}": "The layout of a batch depends on the numbers in its mask, which torch.export cannot trace."
    for kind in ("FoxTest", "FlaFoxTest", "SparseGPT2Test")
    for name in dir(MODELS.ExportTesterMixin)
    if name.startswith("test_")
}
"""Tests that do not apply, and why."""

OF_MASKS = {
    "test_left_padding_compatibility",
    "test_eager_padding_matches_padding_free_with_position_ids",
    "test_eager_padding_matches_padding_free_with_position_ids_and_fa_kwargs",
}
"""Tests that need no attention weights, and are otherwise skipped for models that return none."""


@pytest.fixture(scope="module", autouse=True)
def known_to_transformers() -> Iterator[None]:
    """Their tests look up what kind of model a class is by these tables of names."""
    names = {
        "MODEL_MAPPING_NAMES": ("ForgettingTransformerModel", "SparseGPT2Model"),
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": ("ForgettingTransformerForCausalLM", "SparseGPT2LMHeadModel"),
    }
    with pytest.MonkeyPatch.context() as patch:
        for table, classes in names.items():
            for name in classes:
                patch.setitem(getattr(modeling_auto, table), f"vllm_fox_{name}", name)
        yield


class Sizes:
    """What their tests ask for sizes, configs and inputs."""

    is_training = True
    batch_size, seq_length = 3, 7
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 64, 2, 2, 99

    def __init__(self, new_config: Any) -> None:
        self.new_config = new_config

    def get_config(self) -> Any:
        return self.new_config(vocab_size=self.vocab_size, pad_token_id=0, bos_token_id=1, eos_token_id=2)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril()}


class Common(MODELS.ModelTesterMixin, GENERATION.GenerationTesterMixin):
    """What the classes below share."""

    has_attentions = False

    def setUp(self) -> None:
        if (reason := LEFT_OUT.get(f"{type(self).__name__}.{self._testMethodName}")) is not None:
            raise unittest.SkipTest(reason)
        self.model_tester = Sizes(self.new_config)
        self.has_attentions = self._testMethodName in OF_MASKS
        if self._testMethodName.startswith("test_eager_padding"):
            # Packed sequences are supported, though not by what these attributes stand for.
            for name, value in {"_supports_attention_backend": True, "_is_stateful": False}.items():
                self._patch(self.all_model_classes[-1], name, value)
        if self._testMethodName == "test_can_init_all_missing_weights":
            # It is only for models of which the first line says that they are new enough.
            self._patch(MODELS, "open", lambda *_, **__: io.StringIO("# Copyright 2026"), create=True)

    def _patch(self, *what: Any, **options: Any) -> None:
        patch = mock.patch.object(*what, **options)
        patch.start()
        self.addCleanup(patch.stop)

    def test_eager_padding_matches_padding_free_with_position_ids_and_fa_kwargs(self) -> None:
        """As theirs for FlashAttention."""
        self.attention_mask_padding_matches_padding_free_with_position_ids("eager", fa_kwargs=True)


class FoxTest(Common, unittest.TestCase):
    all_model_classes = (hf.ForgettingTransformerModel, hf.ForgettingTransformerForCausalLM)

    def new_config(self, **fields: Any) -> Any:
        pro = {"use_k_shift": True, "use_v_shift": True, "qk_norm": True, "log_pruning_tolerance": -10.0}
        return make_config("official", hidden_size=64, num_heads=2, **pro, **fields)


class FlaFoxTest(Common, unittest.TestCase):
    all_model_classes = (hf.FlaForgettingTransformerModel, hf.FlaForgettingTransformerForCausalLM)

    def new_config(self, **fields: Any) -> Any:
        return make_config("fla", hidden_size=64, num_heads=2, num_kv_heads=1, qkv_bias=True, **fields)


class SparseGPT2Test(Common, unittest.TestCase):
    all_model_classes = (hf.SparseGPT2Model, hf.SparseGPT2LMHeadModel)

    def new_config(self, **fields: Any) -> Any:
        return hf.SparseGPT2Config(n_layer=2, n_head=2, n_embd=64, block_size=64, int_n_embd=8, **fields)
