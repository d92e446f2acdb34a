"""Quantised copies of checkpoints, made by the formulas of the published formats alone."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import vllm_fox.hf  # noqa: F401  # transformers then knows the models
from vllm_fox.modules.heads import HeadProjection
from vllm_fox.modules.linear import used_weight

GROUP = 32
"""Inputs of a row that share a scale."""
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Which of eight outputs stands where in a number of AWQ, from the lowest bits on."""
PROJECTIONS = re.compile(
    r"model\.layers\.\d+\.((self_)?attn\.([qkvog]|ogate)_proj(\.linear)?|mlp\.(gate|up|down)_proj)\.weight"
)

Tensors = dict[str, torch.Tensor]


def _grouped(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers -8 to 7 [N, K] and scales [N, K / GROUP] whose product is about the weight [N, K]."""
    groups = weight.unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(-1) / 7).to(dtype)
    return (groups / scale.float()[..., None]).round().clamp(-8, 7).int().flatten(1), scale


def _packed(values: torch.Tensor) -> torch.Tensor:
    """Eight numbers 0 to 15 of the last dimension in one int32, the first in the lowest bits."""
    shifts = torch.arange(0, 32, 4)
    return (values.long().unflatten(-1, (-1, 8)) << shifts).sum(-1).to(torch.uint32).view(torch.int32)


def _gptq(weight: torch.Tensor, dtype: torch.dtype) -> tuple[Tensors, torch.Tensor]:
    values, scale = _grouped(weight, dtype)
    stored = {
        "qweight": _packed(values + 8).T.contiguous(),
        # One less than the zero 8 of a symmetric code.
        "qzeros": _packed(torch.full_like(scale.T, 7)),
        "scales": scale.T.contiguous(),
        "g_idx": (torch.arange(weight.shape[1]) // GROUP).int(),
    }
    return stored, values * scale.double().repeat_interleave(GROUP, 1)


def _awq(weight: torch.Tensor, dtype: torch.dtype) -> tuple[Tensors, torch.Tensor]:
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).to(dtype)
    zero = (-low / scale.float()).round().clamp(0, 15)
    values = ((groups / scale.float()[..., None]).round() + zero[..., None]).clamp(0, 15)

    def in_order(x: torch.Tensor) -> torch.Tensor:
        return _packed(x.T.unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1))

    stored = {
        "qweight": in_order(values.flatten(1)),
        "qzeros": in_order(zero),
        "scales": scale.T.contiguous(),
    }
    return stored, ((values - zero[..., None]) * scale.double()[..., None]).flatten(1)


def _packed_int4(weight: torch.Tensor, dtype: torch.dtype) -> tuple[Tensors, torch.Tensor]:
    values, scale = _grouped(weight, dtype)
    stored = {
        "weight_packed": _packed(values + 8),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    return stored, values * scale.double().repeat_interleave(GROUP, 1)


def _int8(weight: torch.Tensor, dtype: torch.dtype) -> tuple[Tensors, torch.Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 127).to(dtype)
    values = (weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {"weight": values, "weight_scale": scale}, values * scale.double()


def _float8(weight: torch.Tensor, dtype: torch.dtype) -> tuple[Tensors, torch.Tensor]:
    # vLLM quantises what it has rounded to the model's dtype.
    weight = weight.to(dtype).float()
    scale = weight.abs().amax(1, keepdim=True) / 448
    values = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": scale}, values.double() * scale.double()


def _compressed_tensors(format: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": {"type": "int", "symmetric": True, "dynamic": False, **weights},
        "input_activations": inputs,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


METHODS: dict[str, tuple[Callable[[torch.Tensor, torch.dtype], tuple[Tensors, torch.Tensor]], dict[str, Any]]] = {
    "gptq": (
        _gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False, "lm_head": False},
    ),
    "awq": (
        _awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    ),
    "int4": (
        _packed_int4,
        _compressed_tensors("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP}, None),
    ),
    "int8": (
        _int8,
        _compressed_tensors(
            "int-quantized",
            {"num_bits": 8, "strategy": "channel"},
            {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
        ),
    ),
    "float8": (
        _float8,
        _compressed_tensors(
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "channel"},
            {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True},
        ),
    ),
}
"""How a method stores a weight [N, K] with scales of a dtype and what that then is in float64; and its config.

The last three are formats of compressed-tensors: "int8" and "float8" round a layer's inputs too, token by token."""


def as_int8(x: torch.Tensor) -> torch.Tensor:
    """Token by token: the largest number becomes 127."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def as_float8(x: torch.Tensor) -> torch.Tensor:
    """Token by token: the largest number becomes 448."""
    scale = x.abs().amax(-1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).double() * scale


def set_amx(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    """Let vLLM choose the kernels of CPUs that have AMX, or lack it.

    The former multiply 8-bit integers in bfloat16 alone, and can only be run where AMX is.
    """
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: there)
    known = torch.cpu.get_capabilities()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {**known, "amx_tile": there})


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def quantise(folder: Path, method: str, dtype: torch.dtype) -> tuple[Path, Path]:
    """Write a checkpoint with quantised projections beside ``folder``, and one with the same weights in float64.

    Args:
        folder: a checkpoint in one file.
        method: one of :data:`METHODS`.
        dtype: of scales and of all that is not quantised, in both.
    """
    store, config = METHODS[method]
    quantised, plain = (
        folder.with_name(f"{folder.name}-{method}"),
        folder.with_name(f"{folder.name}-{method}-plain"),
    )
    tensors: Tensors = {}
    weights: Tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if PROJECTIONS.fullmatch(name):
            stored, weights[name] = store(tensor.float(), dtype)
            tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in stored.items()}
        else:
            tensors[name] = tensor.to(dtype)
            weights[name] = tensors[name].double()
    for out, kept, added in ((quantised, tensors, {"quantization_config": config}), (plain, weights, {})):
        shutil.copytree(folder, out)
        save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
        given = json.loads((out / "config.json").read_text()) | added | {"dtype": str(dtype).removeprefix("torch.")}
        (out / "config.json").write_text(json.dumps(given))
    return quantised, plain


FUSED = re.compile(r"(.*\.)(?:attn\.([qkvg]|ogate)_proj(?:\.linear)?|mlp\.(?:gate|up)_proj)\.weight")


def quantised_at_load(folder: Path) -> Path:
    """Write the weights, in float64, that a Forgetting Transformer has under ``--quantization fp8``.

    What vLLM computes as one product has one scale.
    """
    plain = folder.with_name(f"{folder.name}-fp8-plain")
    weights = load_file(folder / "model.safetensors")
    largest: dict[str, float] = {}

    def product(name: str) -> str:
        found = FUSED.fullmatch(name)
        return name if found is None else f"{found[1]}{'attn' if found[2] else 'mlp'}"

    quantised = {name: tensor.float() for name, tensor in weights.items() if PROJECTIONS.fullmatch(name)}
    for name, tensor in quantised.items():
        largest[product(name)] = max(largest.get(product(name), 0.0), tensor.abs().max().item())
    for name, tensor in quantised.items():
        scale = torch.tensor(largest[product(name)]) / 448
        # vLLM multiplies by the reciprocal, which decides where a number lies in the middle of two.
        weights[name] = (tensor * (1 / scale)).to(torch.float8_e4m3fn).double() * scale.double()
    shutil.copytree(folder, plain)
    save_file(
        {name: tensor.double() for name, tensor in weights.items()}, plain / "model.safetensors", {"format": "pt"}
    )
    return plain


def fox_likelihood(
    plain: Path, tokens: list[int], rounded: Callable[[torch.Tensor], torch.Tensor] | None
) -> torch.Tensor:
    """Log-probabilities [T - 1] of a text's tokens by the transformers model, in float64.

    Args:
        plain: the weights that are meant, as :func:`quantise` writes them.
        tokens: the text.
        rounded: how quantised projections round their inputs; None if they do not.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float64).eval()
    for name, module in model.named_modules():
        if rounded is not None and PROJECTIONS.fullmatch(f"{name}.weight"):
            module.register_forward_pre_hook(lambda _, inputs: rounded(inputs[0]))
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, :-1].double().log_softmax(-1)
    return logits.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


SOURCES = {
    "q": ("q_proj",), "k": ("k_proj.linear", "k_proj"), "v": ("v_proj.linear", "v_proj"),
    "output_gate": ("ogate_proj", "g_proj"), "forget_gate": ("fgate_proj", "f_proj"),
    "k_shift": ("k_proj.shift_proj",), "v_shift": ("v_proj.shift_proj",),
}  # fmt: skip
"""Where parts of a layer's products come from."""


def weight_of(layer: HeadProjection, inputs: int) -> torch.Tensor:
    """The weight [outputs, inputs] with which a layer multiplies, which vLLM may have packed: products of ones."""
    if layer.quant_method is None:
        return layer.weight
    ones = torch.eye(inputs, dtype=layer.weight.dtype, device=layer.weight.device)
    return layer.quant_method.apply(layer, ones, None).T


def check_fox_weights(model: Any, plain: Path, rtol: float) -> None:
    """Check that every layer multiplies with what a checkpoint stands for, and that gates are as they were.

    Args:
        model: the vLLM model, of one rank.
        plain: the weights that are meant, as :func:`quantise` writes them.
        rtol: by how much a number may be off. One in a thousand may be off by more: where a weight is nearly in the
            middle of two numbers of a code, it may have become either.
    """
    weights = load_file(plain / "model.safetensors")

    def want(layer: str, kind: str, *names: str) -> torch.Tensor:
        (one,) = [weights[f"{layer}.{name}.{kind}"] for name in names if f"{layer}.{name}.{kind}" in weights]
        return one.double()

    def compare(found: torch.Tensor, meant: torch.Tensor) -> None:
        assert found.shape == meant.shape
        # float16 has no finer numbers near zero.
        off = (found.double().cpu() - meant).abs() - rtol * meant.abs() - 2**-24
        assert (off > 0).float().mean() < 1e-3

    for n, block in enumerate(model.model.layers):
        attn, layer = block.attn, f"model.layers.{n}"
        used = used_weight(attn.in_proj)
        for part in attn.in_proj.sizes:
            compare(attn.in_proj.part(used, part), want(f"{layer}.attn", "weight", *SOURCES[part]))
        if attn.gate_proj is not None:
            gates = weight_of(attn.gate_proj, attn.arch.hidden_size)
            for part in attn.gate_proj.sizes:
                stored = attn.gate_proj.part(gates, part).double().cpu()
                assert torch.equal(stored, want(f"{layer}.attn", "weight", *SOURCES[part]))
        if attn.in_proj.bias is not None:
            for part in "qkv":
                bias = attn.in_proj.part(attn.in_proj.bias, part).double().cpu()
                assert torch.equal(bias, want(f"{layer}.attn", "bias", f"{part}_proj"))
            if "output_gate" in attn.in_proj.sizes:
                assert not attn.in_proj.part(attn.in_proj.bias, "output_gate").any()
        both = ("gate_proj", "up_proj") if f"{layer}.mlp.up_proj.weight" in weights else ("gate_proj",)
        together = torch.cat([want(f"{layer}.mlp", "weight", name) for name in both])
        compare(used_weight(block.mlp.gate_up_proj), together)
        compare(used_weight(attn.o_proj), want(layer, "weight", "attn.o_proj"))
        compare(used_weight(block.mlp.down_proj), want(layer, "weight", "mlp.down_proj"))
