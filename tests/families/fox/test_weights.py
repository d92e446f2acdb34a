"""Checkpoints into the vLLM model, without an engine: what goes where, what is refused, logit bounds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.bound import load, thresholds
from tests.support.checkpoints import VARIANTS, make_checkpoint, make_config, make_weights
from tests.support.loading import group_of_one, load_model
from vllm_fox.families.fox.bounds import projection_bound, qk_norm_bound, rounded_down, with_rounding
from vllm_fox.families.fox.head_order import deal, memory_score
from vllm_fox.families.fox.model import ForgettingTransformerForCausalLM
from vllm_fox.kernels.acp import pruning_threshold
from vllm_fox.modules.heads import HeadShare


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with group_of_one(tmp_path_factory.mktemp("store")):
        yield


@pytest.fixture(scope="module")
def pro(tmp_path_factory: pytest.TempPathFactory) -> ForgettingTransformerForCausalLM:
    return load_model(make_checkpoint(tmp_path_factory.mktemp("pro"), **VARIANTS["pro"]))


@pytest.fixture(scope="module")
def fla(tmp_path_factory: pytest.TempPathFactory) -> ForgettingTransformerForCausalLM:
    return load_model(make_checkpoint(tmp_path_factory.mktemp("fla"), **VARIANTS["fla_gqa_bias"]))


def _pro_weights() -> dict[str, torch.Tensor]:
    return make_weights(make_config(**VARIANTS["pro"]))


def test_official_tensors_reach_their_modules(pro: ForgettingTransformerForCausalLM) -> None:
    w = _pro_weights()
    p = dict(pro.named_parameters())
    for n in range(2):
        layer = f"model.layers.{n}"
        in_proj = pro.model.layers[n].attn.in_proj
        sources = {"q": "q_proj", "k": "k_proj.linear", "v": "v_proj.linear", "output_gate": "ogate_proj"}
        sources |= {"forget_gate": "fgate_proj", "k_shift": "k_proj.shift_proj", "v_shift": "v_proj.shift_proj"}
        for part, source in sources.items():
            assert torch.equal(in_proj.part(in_proj.weight, part), w[f"{layer}.attn.{source}.weight"])
        assert torch.equal(in_proj.part(in_proj.bias, "forget_gate"), w[f"{layer}.attn.fgate_proj.bias"])
        assert not in_proj.part(in_proj.bias, "q").any()
        assert torch.equal(p[f"{layer}.attn.k_norm.weight"], w[f"{layer}.attn.k_norm.weight"].view(4, 32))
        assert torch.equal(p[f"{layer}.attn.output_norm.weight"], w[f"{layer}.attn.output_norm.weight"].view(4, 32))
        assert torch.equal(p[f"{layer}.mlp.gate_up_proj.weight"], w[f"{layer}.mlp.gate_proj.weight"])
    assert torch.equal(p["lm_head.weight"][:257], w["lm_head.weight"])


def test_fla_tensors_reach_their_modules(fla: ForgettingTransformerForCausalLM) -> None:
    w = make_weights(make_config(**VARIANTS["fla_gqa_bias"]))
    p, in_proj = dict(fla.named_parameters()), fla.model.layers[1].attn.in_proj
    for kind in ("weight", "bias"):
        for part, source in {"q": "q_proj", "k": "k_proj", "v": "v_proj", "forget_gate": "f_proj"}.items():
            assert torch.equal(
                in_proj.part(getattr(in_proj, kind), part), w[f"model.layers.1.attn.{source}.{kind}"]
            )
    both = torch.cat([w[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up")])
    assert torch.equal(p["model.layers.1.mlp.gate_up_proj.weight"], both)


LOADED_HERE = [
    "llama", "rope_qk_norm_shared", "bias_only", "fixed", "no_gate", "k_shift_only", "output_norm_only",
    "tied", "head_dim_128", "sharded", "fla_gqa_bias_qk_norm", "fla_gqa_gate", "fla_tied_sharded",
]  # fmt: skip


@pytest.mark.parametrize("name", LOADED_HERE)
def test_variants_load_whole_and_get_a_bound(name: str, tmp_path: Path) -> None:
    model = load_model(make_checkpoint(tmp_path, **VARIANTS[name]))
    weights = make_weights(model.config)
    assert model.load_weights(weights.items()) == {found for found, _ in model.named_parameters()}
    for layer in model.model.layers:
        threshold = layer.attn.attn.threshold
        # -2U - log 512 - 10 with some U > 0 that is no wild overestimate for weights this small
        assert torch.all((threshold < -math.log(512) - 10) & (threshold > -200)), threshold


def test_other_safetensors_beside_the_model_are_left_alone(tmp_path: Path) -> None:
    for shards in (1, 2):
        folder = make_checkpoint(tmp_path / str(shards), shards=shards, **VARIANTS["pro"])
        save_file({"logits": torch.zeros(3)}, folder / "reference.safetensors")
        model = load_model(folder)
        assert torch.equal(model.model.norm.weight, _pro_weights()["model.norm.weight"])


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(RuntimeError, match="Cannot find any model weights"):
        load_model(folder)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_no_numbers_are_named(value: float, pro: ForgettingTransformerForCausalLM) -> None:
    for name in (GATE, "model.layers.1.attn.k_norm.weight", "model.norm.weight"):
        weights = _pro_weights()
        weights[name].view(-1)[-1] = value
        with pytest.raises(ValueError, match=f"tensor {name} has values that are NaN or infinite"):
            pro.load_weights(weights.items())


def test_files_that_are_cut_short_are_named(tmp_path: Path) -> None:
    for at in (1000, 4):
        folder = make_checkpoint(tmp_path / str(at), shards=2, **VARIANTS["pro"])
        path = folder / "model-00002-of-00002.safetensors"
        path.write_bytes(path.read_bytes()[:-at] if at > 4 else b"abcd")
        with pytest.raises(ValueError, match=f"{path.name} is (cut short|damaged)"):
            load_model(folder)


def test_files_that_are_no_weights_are_named(tmp_path: Path) -> None:
    """Empty, a pointer of Git LFS, and a header that claims more memory than there is."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9504104\n"
    for number, content in enumerate((b"", pointer, b"\xff" * 7 + b"\x7f" + b"{}")):
        folder = make_checkpoint(tmp_path / str(number), **VARIANTS["pro"])
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="model.safetensors is (cut short or no safetensors file|damaged)"):
            load_model(folder)


def test_a_tensor_in_two_files_is_named(tmp_path: Path, pro: ForgettingTransformerForCausalLM) -> None:
    folder = make_checkpoint(tmp_path, shards=2, **VARIANTS["pro"])
    (folder / "model.safetensors.index.json").write_text("{}")
    save_file({GATE: _pro_weights()[GATE]}, folder / "model-00003-of-00003.safetensors")
    with pytest.raises(ValueError, match=f"tensor {GATE} is there twice"):
        load_model(folder)
    # A trainer that sends a tensor again means the last.
    pro.load_weights(_pro_weights().items())
    pro.load_weights([(GATE, _pro_weights()[GATE] * 2), (GATE, _pro_weights()[GATE])])


def test_a_head_that_came_with_tied_embeddings_follows_them(tmp_path: Path) -> None:
    """vLLM builds such a model untied; later weights bring the embeddings alone."""
    name = "model.embeddings.weight"
    weights = _pro_weights()
    model = load_model(
        make_checkpoint(tmp_path, extra={"lm_head.weight": weights[name].clone()}, **VARIANTS["pro"])
    )
    new = weights[name] * 2

    def found(which: str) -> torch.Tensor:
        return dict(model.named_parameters(remove_duplicate=False))[which][: len(new)]  # vLLM pads vocabularies

    model.load_weights([(name, new)])
    assert torch.equal(found(name), new) and torch.equal(found("lm_head.weight"), new)
    # A head of its own stays what it is.
    model.load_weights([("lm_head.weight", new * 3), (name, new)])
    assert torch.equal(found("lm_head.weight"), new * 3)


def _without(name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in _pro_weights().items() if key != name}


GATE = "model.layers.0.attn.fgate_proj.weight"
BAD: dict[str, tuple[dict[str, torch.Tensor], list[str]]] = {
    "missing": (_without(GATE), [f"missing tensor {GATE}, expected [4, 128]"]),
    "missing part of a fused one": (
        _without("model.layers.1.attn.v_proj.linear.weight"),
        ["missing tensor model.layers.1.attn.v_proj.linear.weight, expected [128, 128]"],
    ),
    "missing head": (_without("lm_head.weight"), ["missing tensor lm_head.weight, expected [257, 128]"]),
    "shape": (
        _pro_weights() | {GATE: torch.zeros(8, 128)},
        [f"tensor {GATE} is [8, 128], expected [4, 128]"],
    ),
    "a shape that would broadcast": (
        _pro_weights() | {"model.layers.0.attn.q_norm.weight": torch.ones(32)},
        ["tensor model.layers.0.attn.q_norm.weight is [32], expected [128]"],
    ),
    "unexpected": (
        _pro_weights() | {"model.layers.0.attn.q_proj.bias": torch.zeros(128)},
        ["unexpected tensor model.layers.0.attn.q_proj.bias [128]"],
    ),
    "quantised": (
        _pro_weights() | {GATE: torch.zeros(4, 128, dtype=torch.int8)},
        [f"tensor {GATE} is torch.int8, expected float16, bfloat16 or float32"],
    ),
    "several": (
        _without(GATE) | {"model.extra": torch.zeros(2)},
        ["unexpected tensor model.extra [2]; missing tensor " + GATE],
    ),
    "the other dialect": (
        make_weights(make_config("fla")),
        ["(official dialect)", "unexpected tensor model.layers.0.mlp.up_proj.weight", "more."],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_weights_that_do_not_fit_are_named_in_one_error(
    case: str, pro: ForgettingTransformerForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, expected = BAD[case]
    # As before the first load: later ones may bring a part.
    monkeypatch.setattr(pro.loader, "has_weights", False)
    with pytest.raises(ValueError) as caught:
        pro.load_weights(weights.items())
    for part in expected:
        assert part in str(caught.value)


def test_derived_tensors_are_no_mistake(tmp_path: Path) -> None:
    model = load_model(make_checkpoint(tmp_path, **VARIANTS["tied"]))
    weights = make_weights(model.config)
    weights["lm_head.weight"] = weights["model.embeddings.weight"] + 1
    weights["model.layers.0.attn.rotary.inv_freq"] = torch.zeros(16)
    model.load_weights(weights.items())
    assert torch.equal(model.lm_head.weight[:257], weights["model.embeddings.weight"])


@pytest.mark.parametrize(
    "total, ranks, shares", [(4, 2, [(0, 2), (2, 2)]), (2, 4, [(0, 1), (0, 1), (1, 1), (1, 1)])]
)
def test_heads_are_split_over_ranks(total: int, ranks: int, shares: list[tuple[int, int]]) -> None:
    whole = torch.arange(total * 3.0)
    for rank, (start, count) in enumerate(shares):
        share = HeadShare.split(total, ranks, rank)
        assert share.heads == list(range(start, start + count))
        assert torch.equal(share.take(whole), whole[start * 3 : (start + count) * 3])


def test_a_rank_takes_the_heads_it_was_given() -> None:
    share = HeadShare(4, [2, 0])
    assert share.take(torch.arange(12)).tolist() == [6, 7, 8, 0, 1, 2]


def test_ranks_get_fast_and_slow_heads_alike() -> None:
    score = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 0.0])
    assert deal(score, 2, layer=0) == [0, 1, 3, 2, 4, 5]  # 5, 2 and 1 against 4, 3 and 0
    assert deal(score, 2, layer=1) == [2, 4, 5, 0, 1, 3]
    assert deal(score, 3, layer=0) == [0, 5, 1, 2, 3, 4]
    assert deal(torch.zeros(4), 1, layer=3) == [0, 1, 2, 3]


def test_memory_score() -> None:
    """Higher for a larger bias and for larger weights; a KV head counts as its most remembering query head."""
    weight, norm = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]), torch.tensor([1.0, 2.0])
    bias = torch.tensor([0.0, 0.0, 0.25, -0.5])
    assert memory_score(weight, bias, norm, groups=1).tolist() == [1.0, 4.0, 2.0, -4.0]
    assert memory_score(weight, bias, norm, groups=2).tolist() == [4.0, 2.0]
    assert memory_score(None, bias, None, groups=2).tolist() == [0.0, 2.0]


# The bounds. Queries and keys here are made from inputs x = D x_hat with ||x_hat|| = sqrt(n), random ones
# and the worst that linear algebra knows.


def _normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / x.square().mean(-1, keepdim=True).sqrt() * weight


def test_qk_norm_bound_holds_and_is_reached() -> None:
    rng = torch.Generator().manual_seed(0)
    heads, kv_heads, dim = 4, 2, 32
    w_q, w_k = torch.randn(heads, dim, generator=rng), torch.randn(kv_heads, dim, generator=rng)
    bound = qk_norm_bound(w_q, w_k).double()
    for h in range(heads):
        q = _normed(torch.randn(2000, dim, generator=rng).double(), w_q[h])
        k = _normed(torch.randn(2000, dim, generator=rng).double(), w_k[h // 2])
        assert (q @ k.T).abs().max() / dim**0.5 < bound[h]
    # All weights alike: reached by q and k of one direction.
    even = qk_norm_bound(torch.full((1, dim), 0.5), torch.full((1, dim), -2.0))
    # The bound is the next float32 or the one after it.
    assert even.item() == pytest.approx(dim**0.5, rel=2e-7) and even.item() >= dim**0.5


@pytest.mark.parametrize("rotated, biased", [(False, False), (True, False), (False, True), (True, True)])
def test_projection_bound_holds_for_the_worst_inputs(rotated: bool, biased: bool) -> None:
    rng = torch.Generator().manual_seed(1)
    heads, kv_heads, dim, hidden = 4, 2, 32, 96
    w_q = torch.randn(heads, dim, hidden, generator=rng) * 0.1
    w_k = torch.randn(kv_heads, dim, hidden, generator=rng) * 0.1
    norm = torch.rand(hidden, generator=rng) + 0.5
    b_q = torch.randn(heads, dim, generator=rng) if biased else None
    b_k = torch.randn(kv_heads, dim, generator=rng) if biased else None
    bound = projection_bound(w_q, w_k, norm, b_q, b_k, rotated).double()

    for h in range(heads):
        a, b = (w_q[h] * norm).double(), (w_k[h // 2] * norm).double()
        shift_q = b_q[h].double() if b_q is not None else 0
        shift_k = b_k[h // 2].double() if b_k is not None else 0
        u, _, vt = torch.linalg.svd(a.T @ b)  # the inputs that align q and k best
        x = hidden**0.5 * torch.cat((u[:, :1].T, torch.linalg.svd(a).Vh[:1]))
        y = hidden**0.5 * torch.cat((vt[:1], torch.linalg.svd(b).Vh[:1]))
        q, k = x @ a.T + shift_q, y @ b.T + shift_k
        if rotated:  # the angle between q and k is free: only their lengths count
            worst = (q.norm(dim=-1).max() * k.norm(dim=-1).max() / dim**0.5).item()
        else:
            worst = ((q @ k.T).abs().max() / dim**0.5).item()
        assert worst <= bound[h]
        if not biased:
            # And no better bound exists: what is left are six roundings and those of the bound itself.
            assert bound[h] <= worst * (1 + 1e-6)


def test_bounds_leave_room_for_rounding_in_short_dtypes() -> None:
    w = torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(2))
    exact = projection_bound(w.bfloat16().float(), w.bfloat16().float(), torch.ones(64))
    short = projection_bound(w.bfloat16(), w.bfloat16(), torch.ones(64))
    # Both bounds are float32, rounded up, and the exact one leaves room for six roundings to float32.
    assert short.item() == pytest.approx(exact.item() * (1 + 2**-8) ** 6, rel=8e-7)
    twice_each = with_rounding(torch.ones(1), torch.bfloat16, torch.float16)
    assert twice_each.item() == pytest.approx((1 + 2**-8) ** 2 * (1 + 2**-11) ** 2, rel=1e-15)


def test_the_layer_prunes_by_the_bound_of_its_own_weights(pro: ForgettingTransformerForCausalLM) -> None:
    weights = _pro_weights()
    pro.load_weights(weights.items())
    q = weights["model.layers.1.attn.q_norm.weight"].view(4, 32).abs().amax(-1).double()
    k = weights["model.layers.1.attn.k_norm.weight"].view(4, 32).abs().amax(-1).double()
    delta = -2 * q * k * 32**0.5 - math.log(512) - 10  # the paper's threshold
    found = pro.model.layers[1].attn.attn.threshold.flatten().double()
    # Never above it; below it by four roundings of q and k to float32, and by that of the bound and its own.
    assert ((delta - found >= 0) & (delta - found <= 1e-6 * delta.abs())).all(), delta - found


@pytest.mark.parametrize("name", ["pro", "llama", "fla_gqa_bias"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_pruning_loses_is_measured_by_the_thresholds_of_the_layers(
    name: str, dtype: str, tmp_path: Path
) -> None:
    """benchmarks.bound takes the weights from the model for transformers, where an engine has vLLM's."""
    folder = make_checkpoint(tmp_path, log_pruning_tolerance=-7.0, **VARIANTS[name])
    served, measured = load_model(folder, dtype=dtype), load(folder, getattr(torch, dtype))
    for layer, threshold in zip(served.model.layers, thresholds(measured, measured.dtype, 512), strict=True):
        layer.attn.attn.follow_weights()
        assert torch.equal(layer.attn.attn.threshold.flatten(), threshold.cpu())


def test_thresholds_are_never_rounded_up(
    pro: ForgettingTransformerForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = torch.linspace(-100, -20, 1001, dtype=torch.float64)
    down = rounded_down(exact)
    above = torch.nextafter(down, torch.zeros(()))
    assert (down.double() <= exact).all() and (above.double() > exact).all()
    assert rounded_down(torch.tensor([-torch.inf, -16.0])).tolist() == [-math.inf, -16.0]
    layer = pro.model.layers[0].attn.attn
    for bound in torch.linspace(1, 40, 100):
        monkeypatch.setattr(layer, "_bound_of_weights", partial(bound.expand, 4))
        layer.follow_weights()
        wide = with_rounding(bound, torch.float32, torch.float32)
        assert (layer.threshold.double() <= pruning_threshold(wide, 512, -10.0)).all()
    monkeypatch.undo()
    layer.follow_weights()


@pytest.mark.parametrize("name", ["fixed", "bias_only"])
def test_constant_gates_stay_float32(name: str, tmp_path: Path) -> None:
    """bfloat16 would change every token's log f by the same up to 3 %, and all decay with it."""
    model = load_model(make_checkpoint(tmp_path, **VARIANTS[name]), dtype="bfloat16")
    weights = make_weights(model.config)
    for n, block in enumerate(model.model.layers):
        gate = block.attn._gate_logits({"q": torch.zeros(3, 128, dtype=torch.bfloat16)})
        bias = weights[f"model.layers.{n}.attn.fgate_bias"].double()
        want = torch.nn.functional.logsigmoid(bias).expand(3, -1)
        # As cache_write computes it: an exponential and a logarithm in float32.
        found = torch.nn.functional.logsigmoid(gate.float()).double()
        torch.testing.assert_close(found, want, rtol=5e-7, atol=0)
        # Kernels are compiled ahead for the dtype that they will get.
        dry = block.attn.attn.dry_inputs(1, torch.device("cpu"))
        assert dry[3].dtype == gate.dtype == torch.float32 and dry[0].dtype == torch.bfloat16


def test_thresholds_are_float32_in_a_model_of_bfloat16(tmp_path: Path) -> None:
    """Rounded to bfloat16, half of them would be higher than the bound allows."""
    model = load_model(make_checkpoint(tmp_path, **VARIANTS["pro"]), dtype="bfloat16")
    for block in model.model.layers:
        layer = block.attn.attn
        layer.follow_weights()
        wide = with_rounding(layer._bound_of_weights(), torch.bfloat16, torch.bfloat16)
        off = pruning_threshold(wide, 512, -10.0) - layer.threshold.flatten().double()
        assert ((off >= 0) & (off < 1e-5)).all(), off
