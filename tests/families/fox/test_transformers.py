"""The transformers model: the formulas' logits, checkpoints as they are, a pruned cache, packing, checkpointing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.checkpoints import make_checkpoint
from tests.support.gradients import assert_near_float32, real_tokens
from tests.support.reference_model import reference_logits
from vllm_fox.families.fox.architecture import Architecture, expected_weights
from vllm_fox.hf import ForgettingCache, ForgettingTransformerForCausalLM, compile_layers, live_shares

PRO = {
    "use_output_gate": True, "use_output_norm": True, "qk_norm": True, "use_k_shift": True, "use_v_shift": True,
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "pro": ("official", {**PRO, "log_pruning_tolerance": -10.0, "tie_word_embeddings": True}),
    "pro, shared norm": ("official", {**PRO, "qk_norm_share_param_across_head": True}),
    "llama": ("official", {"log_pruning_tolerance": -10.0}),
    "rope": ("official", {"use_rope": True, "use_output_gate": True, "ogate_act": "silu"}),
    "constant gates": (
        "official",
        {"fgate_type": "fixed", "fgate_bias_init": True, "decay_time_min": 4.0, "decay_time_max": 400.0},
    ),
    "fla": ("fla", {"num_kv_heads": 2, "qkv_bias": True, "use_output_gate": True, "log_pruning_tolerance": -10.0}),
    "fla, norm": ("fla", {"qk_norm": True, "use_output_gate": True}),
}


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dialect, fields = VARIANTS[request.param]
    return make_checkpoint(tmp_path_factory.mktemp("fox"), dialect, **fields)


@pytest.fixture(scope="module")
def pro(tmp_path_factory: pytest.TempPathFactory) -> Any:
    dialect, fields = VARIANTS["pro"]
    return load(make_checkpoint(tmp_path_factory.mktemp("pro"), dialect, **fields))


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 257, shape, generator=torch.Generator().manual_seed(seed))


def test_logits_are_the_formulas_and_saving_changes_nothing(folder: Path, tmp_path: Path) -> None:
    model, ids = load(folder), tokens(1, 180)
    with torch.no_grad():
        found = model(ids).logits[0]
    want = reference_logits(folder, ids[0])
    # 17 u: two layers of ten roundings, sums of 128 products.
    assert (found - want).norm() / want.norm() < 1e-6
    model.save_pretrained(tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    shapes = {name: tuple(x.shape) for name, x in after.items()}
    assert shapes == expected_weights(Architecture.from_config(model.config))
    assert all(torch.equal(x, after[name]) for name, x in before.items() if name in after)
    assert '"ForgettingTransformerForCausalLM"' in (tmp_path / "config.json").read_text()
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(ids).logits[0], found)


def test_generation_with_the_cache_is_generation_without(folder: Path) -> None:
    """Token by token from a cache that lets go of what is forgotten, as from the whole text each time."""
    model, ids = load(folder), tokens(1, 300)
    found = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    want = ids
    with torch.no_grad():
        for _ in range(12):
            want = torch.cat((want, model(want).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(found, want)


def test_cache_lets_go_of_what_all_heads_forgot(tmp_path: Path) -> None:
    """Constant gates of known speed: what is left is what the slowest head of a layer still needs."""
    fields = {"fgate_type": "fixed", "fgate_bias_init": True, "decay_time_min": 1.0, "decay_time_max": 2.0}
    folder = make_checkpoint(tmp_path, qk_norm=True, log_pruning_tolerance=-10.0, **fields)
    model = load(folder)
    bias = torch.nn.functional.logsigmoid(torch.logspace(0, 0.30103, 4).reciprocal().expm1().log().neg())
    for block in model.model.layers:
        block.attn.fgate_bias.copy_(torch.logspace(0, 0.30103, 4).reciprocal().expm1().log().neg())
    ids = tokens(1, 1500)
    with torch.no_grad():
        out = model(ids, use_cache=True)
        cache = out.past_key_values
        assert isinstance(cache, ForgettingCache) and cache.get_seq_length() == 1500
        live = [int((block.attn.threshold(block.attn_norm.weight) / bias).max()) for block in model.model.layers]
        assert all(n < h <= n + 66 for n, h in zip(live, cache.held(), strict=True)), (live, cache.held())
        more = tokens(1, 40, seed=1)
        found = model(more, past_key_values=cache).logits
        want = model(torch.cat((ids, more), 1)).logits[:, -40:]
    # What is pruned here weighs far less than e^-10.
    assert (found - want).norm() / want.norm() < 1e-6
    assert cache.get_seq_length() == 1540


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_answer_as_alone(pro: Any, side: str) -> None:
    """From a cache that lets go of keys; beams move its rows."""
    prompts = [tokens(70, seed=1), tokens(200, seed=2), tokens(5, seed=3)]
    longest = max(map(len, prompts))
    gaps = [(longest - len(one), 0) if side == "left" else (0, longest - len(one)) for one in prompts]
    ids = torch.stack([torch.nn.functional.pad(one, gap) for one, gap in zip(prompts, gaps, strict=True)])
    mask = torch.stack(
        [torch.nn.functional.pad(torch.ones(len(p)), gap) for p, gap in zip(prompts, gaps, strict=True)]
    )
    for options in ({"do_sample": False}, {"num_beams": 3}):
        options = {"max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 0, **options}
        together = pro.generate(ids, attention_mask=mask.long(), **options)
        for prompt, row in zip(prompts, together, strict=True):
            assert torch.equal(row[longest:], pro.generate(prompt[None], **options)[0, len(prompt) :])


def test_packed_sequences_do_not_see_each_other(pro: Any) -> None:
    """Neither through attention nor through the token shift."""
    parts = [tokens(1, 60, seed=1), tokens(1, 1, seed=2), tokens(1, 130, seed=3)]
    bounds = torch.tensor([0, 60, 61, 191], dtype=torch.int32)
    with torch.no_grad():
        found = pro(torch.cat(parts, 1), cu_seqlens=bounds).logits
        want = torch.cat([pro(part).logits for part in parts], 1)
    # Other block borders, same roundings.
    assert (found - want).norm() / want.norm() < 1e-6


def test_gradient_checkpointing_gives_the_same_gradients(pro: Any) -> None:
    ids = tokens(2, 90)
    grads = []
    for checkpointing in (False, True):
        model = ForgettingTransformerForCausalLM(pro.config)
        model.load_state_dict(pro.state_dict())
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(ids, labels=ids).loss
        loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert grad is not None and grad.abs().max() > 0, name
        # The same kernels on the same numbers.
        torch.testing.assert_close(grad, grads[1][name], rtol=0, atol=0)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["autocast", "bfloat16 weights"])
@pytest.mark.parametrize("packed", [False, True], ids=["windows", "packed"])
def test_gradients_of_a_trained_model_in_bfloat16(fox_tiny: Path, packed: bool, weights: torch.dtype) -> None:
    """Its gates' gradients are small sums of large parts, in which any error that all tokens add to would drown
    them."""
    ids = real_tokens(fox_tiny, 2048)
    if packed:
        bounds = torch.tensor([0, 300, 301, 1400, 2048], dtype=torch.int32)
        assert_near_float32(fox_tiny, ids[None], weights=weights, cu_seqlens=bounds)
    else:
        assert_near_float32(fox_tiny, ids.view(2, -1), weights=weights)


def test_layers_are_compiled_once_for_all(tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path, "official", **PRO))
    ids, graphs = tokens(2, 40), []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
        compile_layers(model, backend=backend)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, want)
    assert len(model.model.layers) > 1
    # One layer's attention in one graph, which all of them ran.
    assert [sum("whole_sequence" in str(node.target) for node in graph.graph.nodes) for graph in graphs] == [1]


def test_live_shares_are_those_of_the_formula(pro: Any) -> None:
    """Counted pair by pair from the first layer's gates."""
    ids = tokens(1, 400)
    found = live_shares(pro, ids)
    assert found.shape == (2, 4)
    block = pro.model.layers[0]
    with torch.no_grad():
        x = block.attn_norm(pro.model.embeddings(ids[0]))
        c = block.attn.log_forget(x).double().cumsum(0)
    threshold = block.attn.threshold(block.attn_norm.weight)
    for head in range(4):
        alive = (c[:, None, head] - c[None, :, head] >= threshold[head]).tril()
        # Counts; their share is rounded to float32.
        assert found[0, head] == pytest.approx(alive.sum().item() / (400 * 401 / 2), rel=1e-7)
    assert found[0, 0] < 0.9 and found[0, 3] == 1  # gate biases of -1 and 14


@pytest.mark.parametrize("gate", ["fixed", "bias_only"])
def test_constant_gates_stay_float32(gate: str, tmp_path: Path) -> None:
    """bfloat16 would change every token's log f by the same up to 3 %, and all decay with it."""
    fields = {"fgate_bias_init": True, "decay_time_min": 2.0, "decay_time_max": 4096.0}
    folder = make_checkpoint(tmp_path / "first", fgate_type=gate, **fields)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    saved = load_file(folder / "model.safetensors")
    assert model.model.embeddings.weight.dtype == torch.bfloat16
    for n, block in enumerate(model.model.layers):
        found = block.attn.log_forget(torch.zeros(3, 128, dtype=torch.bfloat16)).double()
        want = torch.nn.functional.logsigmoid(saved[f"model.layers.{n}.attn.fgate_bias"].double())
        # An exponential and a logarithm in float32.
        torch.testing.assert_close(found, want.expand(3, -1), rtol=5e-7, atol=0)
    with torch.no_grad():
        assert model(tokens(1, 40)).logits.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "second")
    again = load_file(tmp_path / "second" / "model.safetensors")
    biases = [name for name in saved if name.endswith("fgate_bias")]
    assert len(biases) == 2 and all(torch.equal(again[name], saved[name]) for name in biases)


@pytest.mark.parametrize("variant, roundings", [("pro", 4), ("llama", 10)])
def test_thresholds_leave_room_for_what_autocast_rounds(variant: str, roundings: int, tmp_path: Path) -> None:
    dialect, fields = VARIANTS[variant]
    model = load(make_checkpoint(tmp_path, dialect, **fields))
    block = model.model.layers[0]

    def bound() -> torch.Tensor:
        delta = block.attn.threshold(block.attn_norm.weight)
        return (delta + math.log(4096) + 10) / -2

    plain = bound()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = bound()
    want = ((1 + 2**-8) / (1 + 2**-24)) ** roundings
    # Autocast also rounds the weights of projections, which moves their bound by less than u.
    torch.testing.assert_close(found / plain, torch.full_like(plain, want), rtol=2**-8, atol=0)
    if variant == "pro":
        torch.testing.assert_close(found / plain, torch.full_like(plain, want), rtol=1e-12, atol=0)


def test_wrong_arguments_are_named(pro: Any) -> None:
    from transformers import DynamicCache

    with pytest.raises(ValueError, match="past_key_values is a DynamicCache: it must be a ForgettingCache"):
        pro(tokens(1, 4), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        pro()
