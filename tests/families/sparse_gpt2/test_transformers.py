"""GPT-2 with Dynamic Context Pruning for transformers, and the alpha-sigmoid, against their formulas."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tests.support.checkpoints import make_sparse_gpt2
from tests.support.gradients import real_tokens
from tests.support.reference_sparse_gpt2 import reference
from vllm_fox.hf import SparseGPT2Config, SparseGPT2LMHeadModel, alpha_sigmoid, compile_layers
from vllm_fox.hf.sparse_gpt2 import dropping_steps
from vllm_fox.hf.sparse_gpt2.alpha_sigmoid import LEAST, log_alpha_sigmoid, soft_step
from vllm_fox.hf.sparse_gpt2.dropping_attention import FUSED, ROWS, dropping_attention
from vllm_fox.hf.sparse_gpt2.dropping_steps import FLOOR


def tokens(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(97, (1, length), generator=torch.Generator().manual_seed(seed))


def test_a_text_that_is_refused_leaves_the_model_as_it_was() -> None:
    model = make_sparse_gpt2().train()
    with pytest.raises(ValueError, match="tokens"):
        model.visible(tokens(model.config.block_size + 1))
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("propagate", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_logits_are_the_formulas(propagate: bool, bias: bool) -> None:
    model = make_sparse_gpt2(propagate_in_depth=propagate, bias=bias).double()
    ids = tokens(48)
    want, seen = reference(model.config, dict(model.named_parameters()), ids[0].tolist())
    shares = [sum(map(len, layer)) / (48 * 47 / 2) for layer in seen]
    assert all(0.01 < share < 0.98 for share in shares), shares
    torch.testing.assert_close(model(ids).logits[0], want, rtol=0, atol=1e-13)  # float64 throughout
    if propagate:
        assert shares == sorted(shares, reverse=True)


def test_what_is_dropped_stays_dropped_and_nothing_drops_itself() -> None:
    for layer in make_sparse_gpt2().visible(tokens(40)).float():
        assert (layer[0].diagonal() == 1).all() and (layer[0].triu(1) == 0).all()
        for j in range(40):
            assert (layer[0, j:, j].diff() <= 0).all()


def softened(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_int: torch.Tensor,
    k_int: torch.Tensor,
    bias: torch.Tensor,
    before: torch.Tensor | None,
    alpha: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The formula of ``dropping_attention`` with whole [T, T] matrices; log I is 0 above the diagonal."""
    scores = q_int @ k_int.transpose(1, 2) / math.sqrt(k_int.shape[2]) + bias
    lower = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
    kept = torch.where(lower.tril(-1), alpha_sigmoid(scores, alpha), 1.0).cumprod(1)
    logs = torch.where(lower, kept.clamp(min=math.exp(FLOOR)).log() + (0.0 if before is None else before), 0.0)
    logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[3]) + logs.masked_fill(~lower, -math.inf)[:, None]
    return logits.softmax(-1) @ v, logs, kept[:, :-1].mean()


def softened_inputs(length: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(2, 3, length, 4)] * 3 + [(2, length, 5)] * 2 + [(1,), (2, length, length)]
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return [*inputs[:5], inputs[5] * 0.1 + 0.3, -inputs[6].abs()]


@pytest.mark.parametrize("alpha", [1.0, 1.2, 1.5, 2.0, 5.0])
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("rows", [12, 5])
def test_training_in_blocks_is_the_formula(
    alpha: float, stacked: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and all gradients, with blocks of queries that do not divide the text, in chunks and without."""
    monkeypatch.setattr(dropping_steps, "CHUNK", 4)
    inputs = softened_inputs(23)
    given = inputs if stacked else inputs[:6]
    results = []
    for function in (softened, lambda *args: dropping_attention(*args, rows=rows)):
        leaves = [x.clone().requires_grad_() for x in given]
        out, logs, kept = function(*leaves, *[None] * (7 - len(leaves)), alpha)
        logs = logs.tril()
        (out.cos().sum() + logs.sin().sum() + 100 * kept).backward()
        gradients = [x.grad for x in leaves]
        if stacked:
            gradients[6] = gradients[6].tril()
        results.append([out, logs, kept, *gradients])
    for want, found in zip(*results, strict=True):
        # float64 on both sides; the alpha-sigmoid solves its equation to some 1e-12.
        torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("alpha", [1.0, 1.003, 1.3, 1.5, 2.0, 3.7, 8.0])
def test_the_logarithm_in_float32(alpha: float) -> None:
    """From a table: p and its slope, against formula or bisection in float64."""
    s = torch.linspace(-3, 8, 3001)
    logs, slope = log_alpha_sigmoid(s, soft_step(alpha, s.device))
    exact = s.double().requires_grad_()
    p = alpha_sigmoid(exact, alpha)
    p.sum().backward()
    assert exact.grad is not None
    # Interpolation in the table, and two or three roundings of numbers up to 1.
    torch.testing.assert_close(logs.double().exp(), p.detach(), atol=2e-7, rtol=0)
    # p's slope has a corner where p reaches 0 or 1; elsewhere it is off as p is, times alpha.
    apart = (logs.double().exp() * slope - exact.grad).abs()
    assert apart.quantile(0.99) < 1e-6 and apart.mean() < 1e-7


Gradients = dict[str, torch.Tensor]
NAMES = ("q", "k", "v", "q_int", "k_int", "bias", "before")


def gradients_of(
    inputs: tuple[Any, ...], grads: list[torch.Tensor], wide: bool, **options: Any
) -> tuple[Gradients, Gradients]:
    """Gradients of ``dropping_attention``'s inputs as they are, or in float64; the first with what went in."""
    *tensors, alpha = inputs
    leaves = [x if x is None else (x.double() if wide else x).detach().clone().requires_grad_() for x in tensors]
    results = dropping_attention(*leaves, alpha, **options)
    torch.autograd.backward(results, [g.to(x.dtype) for g, x in zip(grads, results, strict=True)])
    given = {name: x for name, x in zip(NAMES, leaves, strict=True) if x is not None}
    found = {name: x.grad.tril() if name == "before" else x.grad for name, x in given.items()}
    return found, given


def relative_errors(inputs: tuple[Any, ...], grads: list[torch.Tensor], **options: Any) -> dict[str, float]:
    """Of each gradient, to the one in float64."""
    found, given = gradients_of(inputs, grads, wide=False, **options)
    want, _ = gradients_of(inputs, grads, wide=True)
    assert all(found[name].dtype == x.dtype for name, x in given.items())
    return {name: ((found[name].double() - x).norm() / x.norm()).item() for name, x in want.items()}


def test_gradients_in_bfloat16_on_real_text(dcp_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a trained model, with the gradients that come to it. Only what enters products of matrices is
    bfloat16: what decides on dropping is a sum over many queries, in which errors would add up."""
    model: Any = SparseGPT2LMHeadModel.from_pretrained(dcp_tiny, dtype=torch.float32).train()
    model.alpha = 1.5
    calls: list[tuple[tuple[Any, ...], list[torch.Tensor]]] = []

    def watched(*args: Any, hand_on: bool) -> Any:
        results = dropping_attention(*args, hand_on=True)
        for x in results:
            x.retain_grad()
        calls.append((args, list(results)))
        return results

    monkeypatch.setattr("vllm_fox.hf.sparse_gpt2.modeling.dropping_attention", watched)
    ids = real_tokens(dcp_tiny, model.config.block_size)[None]
    model.gamma = 0.5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids, labels=ids).loss.backward()
    worst: dict[str, float] = {}
    for inputs, results in calls:
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in results]
        assert inputs[0].dtype == torch.bfloat16 and inputs[3].dtype == torch.float32
        for name, error in relative_errors(inputs, grads).items():
            worst[name] = max(worst.get(name, 0.0), error)
    print({name: f"{error:.1e}" for name, error in worst.items()})
    assert len(calls) == model.config.n_layer
    for name, error in worst.items():
        # Root of a few independent roundings of at most u = 3.9e-3; the others are float32's.
        assert error <= (7e-3 if name in ("q", "k", "v") else 1e-4), (name, error)


def test_gradients_of_many_blocks_do_not_get_lost() -> None:
    """Keys whose gradients are sums over 512 blocks, to each of which a block adds little."""
    length = 1024
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, length, 8).mul(0.01).bfloat16() for _ in range(2))
    v = torch.randn(1, 1, length, 8).bfloat16()
    q_int, k_int = torch.randn(2, 1, length, 4).mul(0.1)
    bias = torch.full((1,), 20.0)
    inputs = (q, k, v, q_int, k_int, bias, None, soft_step(1.0, torch.device("cpu")))
    grads = [torch.randn(1, 1, length, 8).add(1.0).bfloat16(), torch.zeros(1, length, length), torch.zeros(())]
    errors = relative_errors(inputs, grads, rows=2)
    print({name: f"{error:.1e}" for name, error in errors.items()})
    # As with few blocks: root of a few independent roundings of at most u = 3.9e-3.
    assert max(errors[name] for name in ("q", "k", "v")) <= 7e-3


def test_a_large_alpha_is_the_step() -> None:
    """What is kept approaches what will be served as alpha grows."""
    inputs = [x.float() for x in softened_inputs(40)[:6]]
    want = dropping_attention(*inputs, None, math.inf)[1].tril().exp()
    assert set(want.unique().tolist()) == {0.0, 1.0}
    apart = []
    for alpha in (1.0, 2.0, 8.0, 400.0):
        apart.append((dropping_attention(*inputs, None, alpha)[1].tril().exp() - want).abs().mean().item())
    assert apart == sorted(apart, reverse=True) and apart[-1] < 0.005


def test_loss_counts_what_is_kept_and_all_weights_learn() -> None:
    model, ids = make_sparse_gpt2().train(), tokens(40)
    plain = model(ids, labels=ids).loss
    model.gamma = 0.5
    weighted = model(ids, labels=ids).loss
    assert 0 < (weighted - plain).item() < 0.5
    weighted.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    # In evaluation the loss is that of the labels alone.
    model.eval()
    evaluated = model(ids, labels=ids).loss
    model.gamma = 0.0
    assert evaluated == model(ids, labels=ids).loss


@pytest.mark.parametrize("propagate", [True, False])
def test_compiled_layers_serve_every_alpha(propagate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """While alpha rises nothing is compiled anew, and the gradients are those without compiling."""
    monkeypatch.setitem(ROWS, "cpu", 16)
    model, ids, graphs = make_sparse_gpt2(propagate_in_depth=propagate).train(), tokens(24), []
    compiled = copy.deepcopy(model)

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_layers(compiled, backend=backend)
    counts = []
    for alpha in (1.0, 1.3, 1.5, 8.0):
        for one in (model, compiled):
            one.zero_grad()
            one.alpha, one.gamma = alpha, 0.5
            one(ids, labels=ids).loss.backward()
        for want, found in zip(model.parameters(), compiled.parameters(), strict=True):
            # The same operators on the same numbers.
            torch.testing.assert_close(found.grad, want.grad, rtol=0, atol=0)
        counts.append(len(graphs))
    # What stands around attention, which is a piece of its own; the first layer has none below it to hear from.
    assert counts == [4 + 2 * propagate] * 4 and model.config.n_layer > 2


@pytest.mark.parametrize("stacked", [True, False])
def test_fused_steps_are_the_same(stacked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients of what a GPU compiles, as far as PyTorch's tracing; its code for CPUs takes long."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    dropping_steps.fused.cache_clear()
    inputs = [x.float() for x in softened_inputs(90)[: 7 if stacked else 6]]
    results = []
    for fused in (False, True):
        monkeypatch.setitem(FUSED, "cpu", fused)
        leaves = [x.clone().requires_grad_() for x in inputs]
        given = [*leaves, *[None] * (7 - len(leaves))]
        out, logs, kept = dropping_attention(*given, soft_step(1.7, torch.device("cpu")), rows=16, hand_on=stacked)
        assert (logs is None) != stacked
        loss = out.cos().sum() + 100 * kept + (logs.tril().sin().sum() if stacked else 0.0)
        loss.backward()
        results.append([out, kept, *(x.grad for x in leaves)])
    dropping_steps.fused.cache_clear()
    # Each of the seven, for the first block and for others, not for every block.
    assert 7 <= len(graphs) <= 20
    for want, found in zip(*results, strict=True):
        # The same operators on the same numbers, but for what tracing rewrites.
        torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-7)


def test_gradients_of_the_softened_model() -> None:
    """Against finite differences in float64, where tokens are half dropped and half not."""
    model, ids = make_sparse_gpt2(block_size=16, n_layer=2).double().train(), tokens(12)
    model.alpha = 1.7
    names = [
        "transformer.h.0.attn.int_bias",
        "transformer.h.0.attn.q_int.weight",
        "transformer.h.1.attn.k_int.weight",
    ]
    leaves = dict(model.named_parameters())

    def loss(*values: torch.Tensor) -> torch.Tensor:
        # transformers' cross-entropy is float32: too coarse for differences.
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(model, given, args=(ids,)).logits.cos().mean()

    assert torch.autograd.gradcheck(loss, [leaves[name] for name in names], atol=1e-7)


def test_fresh_scores_differ_from_pair_to_pair() -> None:
    torch.manual_seed(0)
    model = SparseGPT2LMHeadModel(SparseGPT2Config(n_layer=2, n_head=2, n_embd=128, block_size=64, vocab_size=50))
    attention = model.transformer["h"][1].attn
    q, k = attention.interaction(torch.randn(1, 64, 128))
    assert 0.8 < (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).std() < 1.2
    assert attention.int_bias.item() == 5.0
    assert 0.009 < attention.c_proj.weight.std() < 0.011  # 0.02 / sqrt(2 * 2 layers)


def test_gpt2_is_the_starting_point(tmp_path: Path) -> None:
    """A dense checkpoint of transformers gives the same logits until something learns to drop."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    dense = GPT2LMHeadModel(config).eval()
    dense.save_pretrained(tmp_path)
    model = SparseGPT2LMHeadModel.from_gpt2(tmp_path, int_n_embd=4, propagate_in_depth=False).eval()
    assert (model.config.int_n_embd, model.config.propagate_in_depth) == (4, False)
    # The same weights in float32, summed in another order: logits are below 1.
    torch.testing.assert_close(model(tokens(30)).logits, dense(tokens(30)).logits, rtol=0, atol=1e-6)
    # In training everything fades with distance, by how much the first scores say.
    fading = [SparseGPT2LMHeadModel.from_gpt2(dense, int_bias=bias).train() for bias in (5.0, 15.0)]
    apart = [(model(tokens(30)).logits - dense(tokens(30)).logits).abs().max() for model in fading]
    assert apart[1] < 1e-3 * apart[0]
    with pytest.raises(ValueError, match="n_inner is 64 .* must be 128"):
        SparseGPT2LMHeadModel.from_gpt2(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_inner=64)))


def test_it_saves_loads_and_generates(tmp_path: Path) -> None:
    model = make_sparse_gpt2()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, SparseGPT2LMHeadModel)
    assert AutoConfig.from_pretrained(tmp_path).architectures == ["SparseGPT2LMHeadModel"]
    ids = tokens(10)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    out = loaded.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    for length in range(10, 18):
        assert out[0, length] == model(out[:, :length]).logits[0, -1].argmax()
    with pytest.raises(ValueError, match="65 tokens: the model's block_size is 64"):
        model(tokens(65))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"n_layer": 0}, "n_layer is 0: it must be an integer from 1 on"),
        ({"n_head": 5}, r"n_head is 5: it must be a divisor of n_embd \(768\)"),
        ({"bias": 1}, "bias is 1: it must be true or false"),
        ({"int_n_emb": 32}, "unknown field int_n_emb .*: did you mean int_n_embd"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False: it must be true"),
        ({"tie_word_embeddings": "x"}, "tie_word_embeddings is 'x': it must be true"),
    ],
)
def test_mistakes_in_a_config_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseGPT2Config(**fields)


@settings(max_examples=60)
@given(
    s=st.lists(st.floats(-30, 30), min_size=1, max_size=20),
    alpha=st.one_of(st.sampled_from([1.0, 1.001, 1.5, 2.0, 8.0]), st.floats(1.0, 20.0)),
)
def test_alpha_sigmoid_solves_its_equation(s: list[float], alpha: float) -> None:
    """Entmax's optimality condition, symmetry, and order."""
    x = torch.tensor(s, dtype=torch.float64)
    p, a = alpha_sigmoid(x, alpha), alpha - 1
    assert ((p >= 0) & (p <= 1)).all()
    inside = (a * x).abs() < 1
    if a > 0.01:
        # On the side where p is small: float64 has no digits left for a 1 - p of 1e-13. Down to the least p.
        low, small = -x.abs(), alpha_sigmoid(-x.abs(), alpha)
        found = small > 2 * math.exp(LEAST)
        # Bisection ends where float64 has no number between; a power of a small a makes its error larger.
        torch.testing.assert_close((small**a - (1 - small) ** a)[found], (a * low)[found], atol=1e-9, rtol=1e-9)
        assert (a * low[inside & ~found] < 2 * math.exp(a * LEAST) - 1).all()
        assert (p[~inside] == (x[~inside] > 0)).all()
    else:
        torch.testing.assert_close(p, torch.sigmoid(x), atol=0.5 * a + 1e-9, rtol=0.0)
    # One minus a small p leaves float64's 1e-16 of p.
    torch.testing.assert_close(p, 1 - alpha_sigmoid(-x, alpha), atol=1e-10, rtol=0)
    assert (p[x.argsort()].diff() >= 0).all()


@pytest.mark.parametrize("alpha", [1.0, 1.2, 1.5, 2.0, 3.0, 8.0])
def test_alpha_sigmoid_gradient(alpha: float) -> None:
    inside = 0.95 / max(alpha - 1, 0.2)
    x = torch.linspace(-inside, inside, 20, dtype=torch.float64, requires_grad=True)
    # Differences over 1e-6 in float64, of a curve whose third derivative is large near its ends.
    assert torch.autograd.gradcheck(lambda s: alpha_sigmoid(s, alpha), x, atol=2e-5)
    far = torch.tensor([-9.0, 9.0], requires_grad=True)
    alpha_sigmoid(far, alpha).sum().backward()
    assert far.grad is not None and (far.grad.abs() < 1e-3).all()


def test_alpha_sigmoid_ends() -> None:
    """Step at infinity; a clear error under 1."""
    x = torch.tensor([-1.0, 0.0, 1e-6])
    assert alpha_sigmoid(x, math.inf).tolist() == [0.0, 0.0, 1.0]
    with pytest.raises(ValueError, match=r"alpha is 0.5: it must be at least 1"):
        alpha_sigmoid(x, 0.5)
