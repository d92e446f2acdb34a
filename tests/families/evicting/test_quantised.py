"""Quantised weights, by methods that vLLM's CPU build runs, against the formula on the weights they stand for."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import LLM

from benchmarks.engines import engine, generate, greedy
from tests.support.engines import assert_all_free
from tests.support.evicting import THRESHOLD, VARIANTS, Made, make_evicting
from tests.support.quantised import as_float8, as_int8, quantise, rms, set_amx
from tests.support.reference_evicting import reference_logits
from tests.support.startup import configure, refused
from vllm_fox.families.evicting.attention import EvictingFormula
from vllm_fox.families.evicting.convert import convert

OPTIONS = {"max_model_len": 1024, "max_num_batched_tokens": 160, "max_num_seqs": 6, "num_gpu_blocks_override": 80}
CACHE_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


@dataclass(frozen=True)
class Quantised:
    """A quantised checkpoint.

    Attributes:
        made: what it was before.
        stored: the checkpoint, not converted yet.
        plain: folder of the weights that it stands for, in float64.
        served: folder that the conversion has made.
    """

    made: Made
    stored: Path
    plain: Path
    served: Path


def make(folder: Path, variant: str, method: str, dtype: torch.dtype) -> Quantised:
    made = make_evicting(folder, VARIANTS[variant])
    stored, plain = quantise(made.published, method, dtype)
    list(convert(stored, folder / "quantised", **options(made)))
    return Quantised(made, stored, plain, folder / "quantised")


def options(made: Made) -> dict[str, Any]:
    """Arguments of the conversion."""
    if made.predictor is None:
        return {}
    return {
        "predictor": made.predictor,
        "threshold": THRESHOLD,
        "window": made.window,
        "original": made.published,
    }


def served(
    checkpoint: Quantised,
    tokens: list[int],
    monkeypatch: pytest.MonkeyPatch,
    then: Callable[[LLM], None] = lambda llm: None,
    **arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [T - 1] of the tokens as the engine computes them, and which tokens it evicts.

    ``then`` is called with the engine before it ends.
    """
    decided: dict[int, list[torch.Tensor]] = {}
    forward = EvictingFormula.forward

    def recorded(self: EvictingFormula, inputs: Any, *args: Any) -> None:
        decided.setdefault(self.layer, []).append(inputs[3].clone())
        forward(self, inputs, *args)

    with engine(checkpoint.served, {"page_size": 16}, **OPTIONS, **arguments) as llm:
        monkeypatch.setattr(EvictingFormula, "forward", recorded)
        (out,) = generate(llm, [tokens], greedy(1, prompt_logprobs=0))
        assert_all_free(llm)
        then(llm)
    found = torch.tensor([at[token].logprob for at, token in zip(out.prompt_logprobs[1:], tokens[1:], strict=True)])
    evicted = torch.stack([torch.cat(parts)[: len(tokens)].T for _, parts in sorted(decided.items())])
    if checkpoint.made.predictor is None:  # DMS: a token decides about the one before it
        evicted = torch.cat([evicted[..., 1:], torch.zeros_like(evicted[..., :1])], -1)
    return found.double(), evicted


def exact(x: torch.Tensor) -> torch.Tensor:
    return x


def formula(
    folder: Path,
    made: Made,
    tokens: list[int],
    evicted: torch.Tensor,
    rounded: Callable[[torch.Tensor], torch.Tensor] = exact,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What :func:`served` should find if it evicts what is given, and what the checkpoint itself decides."""
    logits, decided = reference_logits(
        folder, tokens, made.predictor, THRESHOLD, made.window, evictions=evicted, rounded=rounded
    )
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0], decided


TOKENS = torch.randint(1, 257, (301,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize(
    "variant, method",
    [("qwen3-borrowed", "gptq"), ("llama-adapter", "awq"), ("mistral-mlp", "int4"), ("qwen2-linear", "int8")],
)
def test_quantised_weights(tmp_path: Path, variant: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, which is all that vLLM's CPU build takes for weights of four bits.

    Measured against what bfloat16 loses where the same engine serves the same weights without quantisation, and
    against what is lost where inputs are rounded to eight bits, which vLLM does where the CPU has AMX.
    """
    checkpoint = make(tmp_path, variant, method, torch.bfloat16)
    found, evicted = served(checkpoint, TOKENS, monkeypatch, dtype="bfloat16")
    want, decided = formula(checkpoint.plain, checkpoint.made, TOKENS, evicted)
    plain = in_bfloat16(checkpoint)
    found_plain, evicted_plain = served(plain, TOKENS, monkeypatch, dtype="bfloat16")
    want_plain, decided_plain = formula(plain.plain, checkpoint.made, TOKENS, evicted_plain)
    lost = rms(found_plain - want_plain)
    if method == "int8" or torch.cpu.get_capabilities().get("amx_tile"):
        rounded, _ = formula(checkpoint.plain, checkpoint.made, TOKENS, evicted, as_int8)
        lost = math.hypot(lost, rms(rounded - want))
    # Both round the same intermediate results, so that the errors of 300 tokens have nearly the same size; the
    # kernels of quantised weights add up in another order.
    assert rms(found - want) < 1.5 * lost
    # The formula evicts what the engine has evicted: rounding turns decisions near their threshold, as many in
    # either engine but for their small numbers.
    turned, turned_plain = (
        (one != other).sum() for one, other in ((decided, evicted), (decided_plain, evicted_plain))
    )
    assert turned <= 2 * turned_plain + 5
    if method != "int8":
        # Weights that are not quantised are something else. Eight bits change them little more than the inputs.
        other, _ = formula(checkpoint.made.published, checkpoint.made, TOKENS, evicted)
        assert rms(found - other) > 5 * rms(found - want)


def in_bfloat16(checkpoint: Quantised) -> Quantised:
    """The weights for which the quantised ones stand, in bfloat16."""
    folder = checkpoint.plain.with_name("bfloat16")
    shutil.copytree(checkpoint.plain, folder)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    out = folder.with_name("bfloat16-served")
    list(convert(folder, out, **options(checkpoint.made)))
    return Quantised(checkpoint.made, folder, folder, out)


@pytest.mark.parametrize(
    "variant, method, rounded", [("qwen2-linear", "int8", as_int8), ("qwen3-borrowed", "float8", as_float8)]
)
def test_quantised_inputs(
    tmp_path: Path, variant: str, method: str, rounded: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of compressed-tensors with eight bits, which round the inputs of a projection token by token."""
    set_amx(monkeypatch, False)
    checkpoint = make(tmp_path, variant, method, torch.float32)

    def refused_later(llm: LLM) -> None:
        with pytest.raises(ValueError, match="Quantised weights cannot be loaded again on a CPU"):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(checkpoint.served)})

    found, evicted = served(checkpoint, TOKENS, monkeypatch, refused_later)
    want, decided = formula(checkpoint.plain, checkpoint.made, TOKENS, evicted, rounded)
    assert torch.equal(decided, evicted)
    # float32's roundoff, as without quantisation. An input nearly in the middle of two integers may be rounded to
    # the other one, which then changes this token, and in the next layer those that see it.
    off = (found - want).abs()
    assert (off < 2e-4).float().mean() > 0.5
    # Together these changes are few beside all that is rounded.
    unrounded, _ = formula(checkpoint.plain, checkpoint.made, TOKENS, evicted)
    assert rms(off) < 0.2 * rms(unrounded - want)


def test_inputs_that_a_cpu_with_amx_does_not_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make(tmp_path, "qwen2-linear", "int8", torch.float32)
    set_amx(monkeypatch, True)
    for dtype in ("float32", "float16"):
        found = refused(checkpoint.served, dtype=dtype)
        assert f"do not support quantised inputs in {dtype} on a CPU with AMX" in found
        assert "asks for symmetric 8-bit integers: set --dtype bfloat16." in found
    configure(checkpoint.served, dtype="bfloat16")
    set_amx(monkeypatch, False)
    configure(checkpoint.served, dtype="float32")
    set_amx(monkeypatch, True)
    config = json.loads((checkpoint.served / "config.json").read_text())["quantization_config"]
    config["config_groups"]["group_0"]["input_activations"]["symmetric"] = False
    change(checkpoint.served, only=config)
    configure(checkpoint.served, dtype="float32")


def test_weights_quantised_while_they_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To float8 with a scale for each output, which is the only such method that vLLM's CPU build can run."""
    checkpoint = make(tmp_path, "llama-adapter", "float8", torch.float16)
    unquantised = Quantised(checkpoint.made, checkpoint.stored, checkpoint.plain, checkpoint.made.served)
    found, evicted = served(unquantised, TOKENS, monkeypatch, dtype="float16", quantization="fp8_per_channel")
    want, decided = formula(checkpoint.plain, checkpoint.made, TOKENS, evicted, as_float8)
    unrounded, _ = formula(checkpoint.plain, checkpoint.made, TOKENS, evicted)
    other, _ = formula(checkpoint.made.published, checkpoint.made, TOKENS, evicted)
    # An input that float16 has moved over the middle of two float8 numbers is off by a whole step of float8, whose
    # steps leave a twelfth of their square otherwise: a share p of such inputs leaves sqrt(12 p) of the difference
    # that rounding makes. float16 has 128 values in a step of float8, so p is about a hundredth for every time that
    # a result is rounded before, which happens a few times in a layer.
    assert rms(found - want) < rms(unrounded - want)
    assert rms(found - want) < rms(found - other)
    # The number of decisions that this turns has no such bound, but they are few.
    assert (decided != evicted).float().mean() < 0.02


def test_a_checkpoint_that_asks_for_a_quantised_kv_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused, unless the user asks for keys and values of the model's dtype: then its scales are ignored."""
    checkpoint = make(tmp_path, "mistral-mlp", "int4", torch.bfloat16)
    want, _ = served(checkpoint, TOKENS, monkeypatch, dtype="bfloat16")
    change(checkpoint.served, kv_cache_scheme=CACHE_SCHEME)
    scales = {
        f"model.layers.{layer}.self_attn.{name}_scale": torch.tensor([0.25], dtype=torch.bfloat16)
        for layer in range(2)
        for name in "qkv"
    }
    save_file(scales, checkpoint.served / "model-00003-of-00003.safetensors", metadata={"format": "pt"})
    index = checkpoint.served / "model.safetensors.index.json"
    given = json.loads(index.read_text())
    given["weight_map"] |= dict.fromkeys(scales, "model-00003-of-00003.safetensors")
    index.write_text(json.dumps(given))
    found = refused(checkpoint.served, dtype="bfloat16")
    assert "do not support a quantised KV cache" in found and "asks for one (kv_cache_scheme {" in found
    assert "set --kv-cache-dtype bfloat16 to keep keys and values as the model computes them" in found
    assert "set --dtype bfloat16 --kv-cache-dtype bfloat16 to" in refused(checkpoint.served, dtype="float32")
    found_with, _ = served(checkpoint, TOKENS, monkeypatch, dtype="bfloat16", kv_cache_dtype="bfloat16")
    assert torch.equal(found_with, want)


def test_a_checkpoint_of_modelopt_with_a_quantised_kv_cache(tmp_path: Path) -> None:
    """vLLM has written it into the engine's arguments by then, where the user has not."""
    checkpoint = make(tmp_path, "qwen3-borrowed", "int8", torch.bfloat16)
    given = {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    change(checkpoint.served, only=given)
    assert "asks for one (kv_cache_quant_algo FP8): set --kv-cache-dtype" in refused(
        checkpoint.served, dtype="bfloat16"
    )
    configure(checkpoint.served, dtype="bfloat16", kv_cache_dtype="bfloat16")


def change(folder: Path, only: dict[str, Any] | None = None, **fields: Any) -> None:
    """Write fields into a checkpoint's quantisation config, or another one."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = only if only is not None else config["quantization_config"] | fields
    (folder / "config.json").write_text(json.dumps(config))


def test_decisions_are_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM looks for missing tensors only where no weights are quantised."""
    set_amx(monkeypatch, False)
    checkpoint = make(tmp_path, "llama-adapter", "int8", torch.float32)
    (file,) = checkpoint.served.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.dms_proj_alpha.bias"]
    save_file(tensors, file, metadata={"format": "pt"})
    message = "lacks model.layers.1.self_attn.dms_proj_alpha.bias, which decides"
    with pytest.raises(ValueError, match=message), engine(checkpoint.served, **OPTIONS):
        pass


def test_the_conversion_of_quantised_weights(tmp_path: Path) -> None:
    """All tensors and the quantisation config are carried over, by its newer name."""
    checkpoint = make(tmp_path, "qwen3-borrowed", "gptq", torch.bfloat16)
    before = load_file(checkpoint.stored / "model.safetensors")
    (file,) = checkpoint.served.glob("*.safetensors")
    after = load_file(file)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((checkpoint.stored / "config.json").read_text())
    kept = json.loads((checkpoint.served / "config.json").read_text())["quantization_config"]
    assert kept == config["quantization_config"]
    config["compression_config"] = config.pop("quantization_config")
    (checkpoint.stored / "config.json").write_text(json.dumps(config))
    said = list(convert(checkpoint.stored, tmp_path / "again"))
    assert "Its weights are quantised, and stay as they are." in said
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"] == kept


def test_predictors_of_quantised_models(tmp_path: Path) -> None:
    """AWQ and others move factors out of the norms, whose outputs a predictor reads."""
    checkpoint = make(tmp_path, "qwen2-linear", "awq", torch.bfloat16)
    published, stored, out = checkpoint.made.published, checkpoint.stored, tmp_path / "out"
    chosen = options(checkpoint.made)
    with pytest.raises(ValueError, match=r"is quantised \(.* is I32\).* by --original"):
        list(convert(stored, out, **chosen | {"original": None}))
    tensors = load_file(stored / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"] /= 2
    save_file(tensors, stored / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.layers.1.input_layernorm.weight is not that of .*published"):
        list(convert(stored, out, **chosen))
    # The original may be in a wider dtype.
    list(convert(published, out, **chosen))
    assert out.exists()


def test_adapters_that_quantisation_has_changed(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, "llama-adapter", "int8", torch.float32)
    stored, out = checkpoint.stored, tmp_path / "out"
    with pytest.raises(ValueError, match="was trained as it is: leave --original out"):
        list(convert(stored, out, original=checkpoint.made.published))
    change(stored, transform_config={"config_groups": {"R1": {}}})
    with pytest.raises(ValueError, match="transform_config may rotate the residual stream"):
        list(convert(stored, out))
    change(stored, transform_config=None)
    tensors = load_file(stored / "model.safetensors")
    tensors["model.layers.0.self_attn.dms_proj_alpha.weight_scale"] = torch.ones(2, 1)
    save_file(tensors, stored / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="dms_proj_alpha.weight_scale belongs to a quantised adapter"):
        list(convert(stored, out))
