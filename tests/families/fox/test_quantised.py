"""Quantised weights of Forgetting Transformers, by methods that vLLM's CPU build runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from benchmarks.engines import engine
from tests.support.checkpoints import VARIANTS, make_checkpoint
from tests.support.engines import assert_all_free
from tests.support.loading import group_of_one, load_model
from tests.support.new_weights import found
from tests.support.quantised import as_int8, check_fox_weights, fox_likelihood, quantise, rms, set_amx
from vllm_fox.families.fox.bounds import projection_bound
from vllm_fox.modules.heads import HeadShare
from vllm_fox.modules.linear import HeadLinear, input_rounding, used_weight

TOKENS = torch.randint(1, 257, (301,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    (tmp_path / "store").mkdir()
    with group_of_one(tmp_path / "store"):
        yield


def made(folder: Path, variant: str, method: str, dtype: torch.dtype, **options: Any) -> tuple[Path, Path]:
    """A quantised checkpoint, and the weights that it stands for."""
    return quantise(make_checkpoint(folder / "first", **VARIANTS[variant], **options), method, dtype)


@pytest.fixture
def without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs that have it, 8-bit integers in float32 are refused."""
    set_amx(monkeypatch, False)


@pytest.mark.usefixtures("one_rank", "without_amx")
@pytest.mark.parametrize(
    "variant, options",
    [("pro", {}), ("fla_gqa_bias", {"use_output_gate": True}), ("k_shift_only", {})],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_quantised_tensors_reach_their_layers(tmp_path: Path, variant: str, options: dict[str, Any]) -> None:
    """With biases of some projections, and with gates in a layer of their own."""
    stored, plain = made(tmp_path, variant, "int8", torch.float32, **options)
    check_fox_weights(load_model(stored, finish=True), plain, rtol=1e-6)


def make_static(stored: Path, scale: float) -> None:
    """Have a checkpoint of 8-bit integers round all inputs with one scale, beyond which they are clipped."""
    config = json.loads((stored / "config.json").read_text())
    inputs = config["quantization_config"]["config_groups"]["group_0"]["input_activations"]
    inputs |= {"dynamic": False, "strategy": "tensor"}
    (stored / "config.json").write_text(json.dumps(config))
    weights = load_file(stored / "model.safetensors")
    scales = {name for name in weights if name.endswith(".weight_scale")}
    weights |= {name.replace(".weight_scale", ".input_scale"): torch.tensor([scale]) for name in scales}
    save_file(weights, stored / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.usefixtures("one_rank")
def test_weights_quantised_while_they_are_loaded(tmp_path: Path) -> None:
    """To float8 with a scale for each output, which is the only such method that vLLM's CPU build can run."""
    first = make_checkpoint(tmp_path / "first", **VARIANTS["pro"], dtype=torch.float16)
    _, plain = quantise(first, "float8", torch.float16)
    model = load_model(first, finish=True, dtype="float16", quantization="fp8_per_channel")
    check_fox_weights(model, plain, rtol=2**-10)


@pytest.mark.usefixtures("one_rank", "without_amx")
def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    stored, _ = made(tmp_path, "pro", "int8", torch.float32)
    weights = load_file(stored / "model.safetensors")
    q, scale = "model.layers.0.attn.q_proj.weight", "model.layers.1.attn.v_proj.linear.weight_scale"
    gate = "model.layers.1.attn.fgate_proj.weight"
    weights |= {q: weights[q].float(), gate: weights[gate].to(torch.int8)}
    del weights[scale]
    # Scales of keys and values in the cache, which stay as the model computes them, are no mistake.
    weights["model.layers.0.attn.k_scale"] = torch.ones(1)
    save_file(weights, stored / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError) as error:
        load_model(stored)
    assert f"tensor {q} is torch.float32, expected torch.int8" in str(error.value)
    assert f"tensor {gate} is torch.int8, expected float16, bfloat16 or float32" in str(error.value)
    assert f"missing tensor {scale}" in str(error.value) and "k_scale" not in str(error.value)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    "method, dtype, scale",
    [
        ("int8", "float32", None),
        ("int8", "float32", 0.03),
        ("int8", "bfloat16", None),
        ("int8", "bfloat16", 0.03),
        ("float8", "float16", None),
    ],
)
@pytest.mark.parametrize("variant", ["llama", "fla_gqa_bias"])
def test_bound_of_quantised_projections(
    tmp_path: Path, method: str, dtype: str, scale: float | None, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without QK-norm it holds for what the quantised layer computes, of inputs as bad as linear algebra knows.

    In bfloat16 that is by the kernels for AMX where the CPU has it. They ignore the scale.
    """
    if dtype == "float32":
        set_amx(monkeypatch, False)
    stored, meant = made(tmp_path, variant, method, getattr(torch, dtype))
    if scale is not None:
        make_static(stored, scale)
    plain = load_model(tmp_path / "first", finish=True, dtype=dtype)
    model = load_model(stored, finish=True, dtype=dtype)
    roundings = 3  # of the inputs, the products and the weights
    check_fox_weights(model, meant, rtol=(1 + torch.finfo(getattr(torch, dtype)).eps / 2) ** roundings - 1)
    for block, unquantised in zip(model.model.layers, plain.model.layers, strict=True):
        attn, hidden, dim = block.attn, model.arch.hidden_size, model.arch.head_dim
        bound, norm = attn._logit_bound().double(), block.attn_norm.weight.double()
        used = used_weight(attn.in_proj).double()
        directions = [torch.randn(2000, hidden, generator=torch.Generator().manual_seed(0)).double()]
        for name in "qk":
            heads = attn.in_proj.part(used, name).view(-1, dim, hidden) * norm
            directions.append(torch.linalg.svd(heads, full_matrices=False).Vh[:, 0])
        x = torch.cat(directions)
        x = (x / x.square().mean(-1, keepdim=True).sqrt() * norm).to(attn.in_proj.params_dtype)
        sizes = list(attn.in_proj.sizes.values())

        def reached(out: torch.Tensor, sizes: list[int] = sizes, dim: int = dim) -> torch.Tensor:
            """The longest query of a head times the longest key, for any directions that they may have."""
            q, k = (part.unflatten(1, (-1, dim)).double() for part in out.split(sizes, -1)[:2])
            longest_q, longest_k = (x.norm(dim=-1).amax(0) for x in (q, k))
            return longest_q * longest_k.repeat_interleave(len(longest_q) // len(longest_k)) / dim**0.5

        found = reached(attn.in_proj(x)[0])
        # A fixed scale clips the largest inputs, which the bound does not count on.
        bias = attn.in_proj.bias
        unclipped = reached(F.linear(x.double(), used, None if bias is None else bias.double()))
        assert ((found <= bound) & (unclipped > 0.6 * bound)).all(), (found, unclipped, bound)
        # Without biases and RoPE, the bound of weights that are not quantised knows the directions.
        before = unquantised.attn._logit_bound().double()
        assert ((bound > before) & (bound < 5 * before)).all(), (bound, before)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("scale, step", [(0.03, 1.0), (3.0, 3.0)])
def test_inputs_are_rounded_by_their_own_scale_or_a_fixed_one(tmp_path: Path, scale: float, step: float) -> None:
    """Which of them depends on the CPU, so the bound follows from the larger one."""
    stored, _ = made(tmp_path, "llama", "int8", torch.bfloat16)
    make_static(stored, scale)
    layer = load_model(stored, finish=True, dtype="bfloat16").model.layers[0].attn.in_proj
    found = input_rounding(layer, largest=127.0)
    assert found is not None
    relative, absolute = found
    assert relative == 0 and step / 2 <= absolute < 0.51 * step


def test_bound_of_weights_that_were_rounded_three_times() -> None:
    """A bound that follows from the rounded weights holds for the largest that they can have been."""
    hidden = dim = 16
    unit = torch.finfo(torch.bfloat16).eps / 2
    rounded = (torch.eye(dim)[None] * 253 / 256).bfloat16()
    meant = 253 / 256 * (1 + unit) ** 3
    bound = projection_bound(rounded, rounded, torch.ones(hidden), rounding=(0.0, 0.0))
    # q and k have the norm of the input, sqrt(hidden), times the weight. The factor is that of six more roundings.
    assert bound.item() >= meant**2 * hidden / dim**0.5 * (1 + unit) ** 6


@pytest.mark.usefixtures("one_rank", "without_amx")
def test_bound_follows_the_scales(tmp_path: Path) -> None:
    stored, _ = made(tmp_path, "llama", "int8", torch.float32)
    before = [block.attn._logit_bound() for block in load_model(stored, finish=True).model.layers]
    weights = load_file(stored / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("q_proj.weight_scale"):
            tensor.mul_(3)
    save_file(weights, stored / "model.safetensors", metadata={"format": "pt"})
    after = [block.attn._logit_bound() for block in load_model(stored, finish=True).model.layers]
    torch.testing.assert_close(torch.stack(after), 3 * torch.stack(before))


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("method", ["int4", "gptq", "awq"])
def test_methods_without_a_bound(tmp_path: Path, method: str) -> None:
    """Some round inputs in a way that is not known, which only matters without QK-norm."""
    stored, _ = made(tmp_path / "loose", "llama", method, torch.bfloat16)
    message = r"without QK-norm do not support weights that \w+ has quantised, since it is not known"
    with pytest.raises(ValueError, match=message):
        load_model(stored, dtype="bfloat16")
    stored, plain = made(tmp_path / "pro", "pro", method, torch.bfloat16)
    check = load_model(stored, finish=True, dtype="bfloat16").model.layers[0].attn.in_proj
    weights = load_file(plain / "model.safetensors")
    want = weights["model.layers.0.attn.ogate_proj.weight"].double()
    torch.testing.assert_close(check.part(used_weight(check), "output_gate").double(), want, atol=0, rtol=2**-7)


@pytest.mark.parametrize(
    "heads", [[[0, 1], [2, 3]], [[3, 0], [1, 2]], [[0], [0], [1], [1]]], ids=["in order", "dealt", "shared"]
)
def test_ranks_take_their_heads(heads: list[list[int]]) -> None:
    """In the checkpoint's order, in one that weights have chosen, and where several ranks have the same head."""
    total = max(max(each) for each in heads) + 1
    loaded = torch.arange(total * 3)[:, None]
    for rank, each in enumerate(heads):
        layer = HeadLinear.__new__(HeadLinear)
        layer.__dict__.update(shares={"k": HeadShare(total, each)}, tp_size=len(heads), tp_rank=rank)
        weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
        weight.output_dim = 0  # type: ignore[attr-defined]
        # vLLM cuts a rank's part out, as if ranks had heads of their own, in order.
        size = len(each) * 3
        cut = layer._own(weight, loaded, "k").narrow(0, rank * size, size)
        assert torch.equal(cut, torch.cat([loaded[head * 3 : head * 3 + 3] for head in each]))
        blocks = torch.ones(1, 1)  # of scales
        if each == HeadShare.split(total, len(heads), rank).heads and total >= len(heads):
            assert layer._own(weight, blocks, "k") is blocks
        else:
            layer.__dict__["prefix"] = "in_proj"
            with pytest.raises(ValueError, match="its scales are of blocks that span heads"):
                layer._own(weight, blocks, "k")


@pytest.mark.usefixtures("without_amx")
def test_an_engine(tmp_path: Path) -> None:
    """Log-probabilities are the formula's on the weights that are meant; others are refused later on."""
    stored, plain = made(tmp_path, "pro", "int8", torch.float32)
    with engine(stored, {"page_size": 16}, max_model_len=1024, max_num_batched_tokens=160) as llm:
        check_likelihood(llm, plain)
        message = "Quantised weights cannot be loaded again on a CPU, where vLLM's kernels keep to the first ones"

        def load(model: Any) -> None:
            with pytest.raises(ValueError, match=message):
                model.load_weights(load_file(stored / "model.safetensors").items())

        llm.apply_model(load)
        assert llm.reset_prefix_cache()
        check_likelihood(llm, plain)
        assert_all_free(llm)
        with pytest.raises(ValueError, match=message):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(stored)})


def check_likelihood(llm: Any, plain: Path) -> None:
    served = found(llm, TOKENS)
    want, unrounded = (fox_likelihood(plain, TOKENS, rounded) for rounded in (as_int8, None))
    # float32's roundoff, as without quantisation. An input nearly in the middle of two integers may be rounded to
    # the other one, which then changes this token, and in the next layer those that see it.
    off = (served - want).abs()
    assert (off < 2e-4).float().mean() > 0.5
    # Together these changes are few beside all that is rounded.
    assert rms(off) < 0.2 * rms(unrounded - want)
