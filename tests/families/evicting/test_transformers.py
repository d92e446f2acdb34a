"""The models for transformers: the formula, gradients, layouts, saving and loading."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoModelForCausalLM

from tests.support.evicting import THRESHOLD, VARIANTS, Made, make_evicting
from tests.support.reference_evicting import reference_logits
from vllm_fox.families.evicting.config import EvictingDecoderConfig
from vllm_fox.hf import EvictingDecoderForCausalLM, EvictingDecoderModel


@pytest.fixture(scope="module", params=VARIANTS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_evicting(tmp_path_factory.mktemp(request.param), VARIANTS[request.param])


def tokens(length: int, seed: int = 0, rows: int = 1) -> torch.Tensor:
    return torch.randint(1, 257, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_logits_and_decisions_are_the_formulas(made: Made) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(made.served, dtype=torch.float32)
    assert isinstance(model, EvictingDecoderForCausalLM)
    ids = tokens(300)
    want, evicted = reference_logits(made.published, ids[0].tolist(), made.predictor, THRESHOLD, made.window)
    with torch.no_grad():
        outputs = model.model(ids)
        found = model(ids).logits[0]
    # float32's roundoff on logits of at most some ten, through two layers.
    torch.testing.assert_close(found.double(), want, atol=2e-4, rtol=1e-4)
    assert torch.equal(model.evicted(ids)[:, 0], evicted)
    torch.testing.assert_close(outputs.evicted, evicted.float().mean((1, 2)))


def config(method: str, **eviction: Any) -> EvictingDecoderConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
    dms = {"scale": 100.0, "offset": 5.0} if method != "kvzap" else {"threshold": 0.0}
    return EvictingDecoderConfig(
        vocab_size=257,
        num_attention_heads=4,
        num_key_value_heads=2,
        eviction={"method": method, "window": 20, "shift": int(method != "kvzap"), **dms, **eviction},
        **sizes,
    )


def test_a_text_that_is_refused_leaves_the_model_as_it_was() -> None:
    model = EvictingDecoderForCausalLM(config("dms_adapter")).train()
    with pytest.raises(ValueError, match="input_ids is"):
        model.decisions(tokens(5)[0])
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_an_untrained_adapter_evicts_nothing() -> None:
    """It is the dense model, from which it can learn."""
    model = EvictingDecoderForCausalLM(config("dms_adapter"))
    ids = tokens(100)
    with torch.no_grad():
        evicting = model.eval()(ids).logits
        assert not model.evicted(ids).any()
        model.set_evicts(False)
        torch.testing.assert_close(model(ids).logits, evicting)


@pytest.mark.parametrize("method", ["dms_adapter", "dms_borrowed_neuron", "kvzap"])
def test_decisions_learn(method: str) -> None:
    """In training the share that is evicted, and the loss, have gradients in what decides."""
    torch.manual_seed(0)
    model = EvictingDecoderForCausalLM(config(method, **({} if method == "kvzap" else {"offset": 0.0})))
    names = {"dms_adapter": "dms_proj_alpha.weight", "dms_borrowed_neuron": "q_proj", "kvzap": "kvzap.weight"}
    deciding = [weight for name, weight in model.named_parameters() if names[method] in name]
    outputs = model.train().model(tokens(120, rows=2))
    assert (outputs.evicted > 0).all() and (outputs.evicted < 1).all()
    assert all(grad.norm() > 0 for grad in torch.autograd.grad(outputs.evicted.sum(), deciding, retain_graph=True))
    loss = model.lm_head(outputs.last_hidden_state).logsumexp(-1).mean()
    assert all(grad.norm() > 0 for grad in torch.autograd.grad(loss, deciding))


def test_a_soft_decision_that_is_sure_is_a_hard_one() -> None:
    """With logits far from 0, training computes what evaluation does."""
    torch.manual_seed(0)
    model = EvictingDecoderForCausalLM(config("kvzap"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "kvzap" in name:
                weight.mul_(1e6)
        ids = tokens(100)
        torch.testing.assert_close(model.train()(ids).logits, model.eval()(ids).logits, atol=1e-5, rtol=1e-5)


def test_packed_and_padded_rows_are_rows_of_their_own(made: Made) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(made.served, dtype=torch.float32)
    one, two = tokens(90, 1), tokens(70, 2)
    positions = torch.cat((torch.arange(90), torch.arange(70)))[None]
    padded = torch.cat((one, torch.cat((two, torch.zeros(1, 20, dtype=torch.long)), 1)))
    mask = torch.ones(2, 90, dtype=torch.long)
    mask[1, 70:] = 0
    with torch.no_grad():
        alone = [model(ids).logits[0] for ids in (one, two)]
        packed = model(torch.cat((one, two), 1), position_ids=positions).logits[0]
        rows = model(padded, attention_mask=mask).logits
    torch.testing.assert_close(packed[:90], alone[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[90:], alone[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rows[1, :70], alone[1], atol=1e-5, rtol=1e-5)


def test_loss_and_checkpointed_gradients() -> None:
    """Gradient checkpointing draws the same noise again."""
    ids, found = tokens(80, rows=2), []
    torch.manual_seed(0)
    model = EvictingDecoderForCausalLM(config("dms_adapter", offset=0.0)).train()
    for checkpointed in (False, True):
        one = copy.deepcopy(model)
        if checkpointed:
            one.gradient_checkpointing_enable()
        torch.manual_seed(1)
        outputs = one(ids, labels=ids)
        outputs.loss.backward()
        found.append({name: weight.grad for name, weight in one.named_parameters() if weight.grad is not None})
        torch.manual_seed(1)
        with torch.no_grad():
            logits = one(ids).logits
        torch.testing.assert_close(outputs.loss, cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = EvictingDecoderForCausalLM(config("dms_adapter")).eval()
    model.save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    body: Any = AutoModel.from_pretrained(tmp_path)
    assert isinstance(body, EvictingDecoderModel)
    ids = tokens(60)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert torch.equal(body(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_generates_what_its_logits_say() -> None:
    torch.manual_seed(0)
    model = EvictingDecoderForCausalLM(config("dms_adapter")).eval()
    ids = tokens(50)
    written = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        best = model(written).logits.argmax(-1)
    assert torch.equal(written[:, 50:], best[:, 49:-1])


def test_a_cache_is_refused() -> None:
    model = EvictingDecoderForCausalLM(config("dms_adapter"))
    with pytest.raises(ValueError, match="use_cache is true: leave it out, because only a server has a cache"):
        model(tokens(5), use_cache=True)
