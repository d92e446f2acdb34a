"""Models that are not ours are served as if the plugin were not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams, TokensPrompt

from tests.support import ROOT, patience

LIMIT_S = 180
VOCAB_SIZE = 257


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with the tests' byte tokenizer."""
    # Not at the top, because the process without the plugin must not import it by way of the tests.
    from tests.support.checkpoints import make_checkpoint

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    other = make_checkpoint(tmp_path_factory.mktemp("fox"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((other / name).read_bytes())
    return folder


def serve(model: str) -> dict[str, Any]:
    """Greedy answers, and what vLLM chose for the model."""
    llm = LLM(
        model=model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        num_gpu_blocks_override=64,
        seed=0,
    )
    config = llm.llm_engine.vllm_config
    prompts = [[1 + (7 * i * i + seed) % (VOCAB_SIZE - 1) for i in range(200)] for seed in range(3)]
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    cold, warm = (
        [
            (list(out.outputs[0].token_ids), out.num_cached_tokens)
            for out in llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], params, use_tqdm=False)
        ]
        for _ in range(2)
    )
    layers = config.compilation_config.static_forward_context
    kv = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    chosen = {
        "answers": cold,
        "answers with a warm prefix cache": warm,
        "backends": {name: layer.get_attn_backend().get_name() for name, layer in layers.items()},
        "specs": [repr(group.kv_cache_spec) for group in kv.kv_cache_config.kv_cache_groups],
        "managers": [type(m).__name__ for m in kv.coordinator.single_type_managers],
        "block size": config.cache_config.block_size,
        "prefix caching": config.cache_config.enable_prefix_caching,
        "connector": repr(config.kv_transfer_config),
        "splitting ops": config.compilation_config.splitting_ops,
        "ours": sorted(name for name in sys.modules if name.split(".")[0] == "vllm_fox"),
    }
    llm.llm_engine.engine_core.shutdown()
    return chosen


def serve_with(plugins: str | None, model: Path, result: Path) -> dict[str, Any]:
    """:func:`serve` in a fresh process with ``VLLM_PLUGINS`` set so; None: unset, so that all are loaded."""
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
    if plugins is not None:
        environment["VLLM_PLUGINS"] = plugins
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.test_other_models", str(model), str(result)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=patience(LIMIT_S),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(result.read_text())


def test_a_llama_does_not_notice_the_plugin(llama: Path, tmp_path: Path) -> None:
    plain = serve_with("", llama, tmp_path / "plain.json")
    loaded = serve_with(None, llama, tmp_path / "loaded.json")
    # The comparison means something: one process had our plugin, the other nothing of it, and answers differ.
    assert "vllm_fox.registration" in loaded.pop("ours")
    assert plain.pop("ours") == []
    assert len({tuple(tokens) for tokens, _ in plain["answers"]}) == 3
    assert loaded == plain
    assert loaded["connector"] == "None" and loaded["prefix caching"] is True
    assert loaded["backends"] and "VLLM_FOX" not in loaded["backends"].values()
    assert all(cached > 0 for _, cached in loaded["answers with a warm prefix cache"])


if __name__ == "__main__":
    model_path, result_path = sys.argv[1:]
    Path(result_path).write_text(json.dumps(serve(model_path)))
