"""examples/predictor_regression.py: the scores that predictors learn, beside their formula and kvpress's code."""

from __future__ import annotations

from typing import Any

import predictor_regression
import pytest
import torch
from predictor_regression import Regression, kvzip_plus_scores, repetition
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.evicting import VARIANTS, Made, make_evicting
from vllm_fox.hf import EvictingDecoderForCausalLM

BEFORE, BETWEEN = [3, 4], [9, 8, 7]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_evicting(tmp_path_factory.mktemp("made"), VARIANTS["qwen2-linear"])


@pytest.fixture(scope="module")
def regression(made: Made) -> Regression:
    model: Any = EvictingDecoderForCausalLM.from_pretrained(made.served, dtype=torch.float32)
    return Regression(model.eval(), BEFORE, BETWEEN)


def texts(rows: int, length: int) -> torch.Tensor:
    return torch.randint(1, 257, (rows, length), generator=torch.Generator().manual_seed(0))


def formula(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    x: torch.Tensor,
    out_weight: torch.Tensor,
    text: slice,
    repeated: slice,
) -> torch.Tensor:
    """KVzip+'s scores with all pairs of tokens in memory, as they are written: see ``kvzip_plus_scores``."""
    tokens, kv_heads, group, dim = q.shape
    scores = torch.zeros(text.stop - text.start, kv_heads, dtype=q.dtype)
    for head in range(kv_heads):
        for member in range(group):
            weights = q[:, head, member] @ k[:, head].T / dim**0.5
            later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
            weights = weights.masked_fill(later, float("-inf")).softmax(-1)
            first = (head * group + member) * dim
            written = v[:, head] @ out_weight[:, first : first + dim].T
            normed = weights * written.norm(dim=-1) / x.norm(dim=-1)[:, None]
            scores[:, head] = torch.maximum(scores[:, head], normed[repeated, text].amax(0))
    return scores.log()


@pytest.mark.parametrize("at_once", [1, 7, 128])
def test_scores_are_those_of_the_formula(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor_regression, "QUERIES_AT_ONCE", at_once)
    make = torch.Generator().manual_seed(0)
    shapes = ((53, 2, 3, 16), (53, 2, 16), (53, 2, 16), (53, 24), (24, 96))
    given = [torch.randn(shape, generator=make, dtype=torch.float64) for shape in shapes]
    places = slice(4, 25), slice(30, 51)
    found = kvzip_plus_scores(*given, *places)
    assert found.shape == (21, 2) and found.std() > 0.1
    torch.testing.assert_close(found, formula(*given, *places))


def test_scores_of_improbable_tokens_stay_finite() -> None:
    """A weight of exp(-900) is 0 in float32, and a loss with its logarithm would be infinite."""
    q, k = torch.ones(4, 1, 1, 1) * 30, torch.tensor([-30.0, 0.0, 0.0, 0.0])[:, None, None]
    found = kvzip_plus_scores(
        q, k, torch.ones(4, 1, 1), torch.ones(4, 1), torch.ones(1, 1), slice(0, 1), slice(1, 4)
    )
    assert found.item() == pytest.approx(-900, abs=1)


def test_scores_are_kvpress_own(made: Made, regression: Regression) -> None:
    """Beside the code that made KVzap's published predictors: in kvpress's repository, not its package."""
    data = pytest.importorskip("kvzap.data", reason="no checkout of kvpress is on the path")
    dense = AutoModelForCausalLM.from_pretrained(made.published, attn_implementation="eager", dtype=torch.float32)
    ids = texts(1, 150)
    collector = data.KVzapDataCollector(dense.eval(), None)
    bounds = {"_start_prompt": 2, "_end_prompt": 152, "_start_repeated_prompt": 155, "_end_repeated_prompt": 305}
    for name, value in bounds.items():
        setattr(collector, name, value)
    collector._register_hooks()
    with torch.no_grad():
        dense.model(torch.tensor([[*BEFORE, *ids[0], *BETWEEN, *ids[0]]]))
        found = [scores for _, scores in regression.predictions(ids)]
    for mine, (_, theirs) in zip(found, collector._data, strict=True):
        # Some roundings to float32, of logarithms of up to 5.
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def test_windows_of_a_batch_are_scored_one_by_one(regression: Regression) -> None:
    ids = texts(3, 40)
    with torch.no_grad():
        together = list(regression.predictions(ids))
        for n, row in enumerate(ids):
            for layer, alone in enumerate(regression.predictions(row[None])):
                for whole, part in zip(together[layer], alone, strict=True):
                    torch.testing.assert_close(whole[n * 40 : n * 40 + 40], part, atol=1e-4, rtol=1e-4)


def test_gradients_reach_predictors_alone(regression: Regression) -> None:
    learned = {name for name, weight in regression.named_parameters() if ".kvzap." in name}
    for name, weight in regression.named_parameters():
        weight.requires_grad_(name in learned)
    regression(texts(1, 40)).backward()
    assert {name for name, weight in regression.named_parameters() if weight.grad is not None} == learned


def test_predictors_start_at_the_mean(regression: Regression) -> None:
    """What is explained of the variance by the mean is nothing, and an exact prediction explains all."""
    ids = texts(1, 60)
    for layer in regression.model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.kvzap.weight)
    regression.start_at_mean(ids)
    with torch.no_grad():
        assert regression.figures([ids, ids])["r_squared"] == pytest.approx(0, abs=1e-5)


def test_a_text_is_repeated_as_the_tokenizer_says(made: Made) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made.published)
    first, second = repetition(tokenizer)
    assert first == [] and tokenizer.decode(second) == "\n\nRepeat the previous context exactly.\n"
    tokenizer.chat_template = "{% for one in messages %}<{{ one.role }}>{{ one.content }}</>{% endfor %}"
    first, second = repetition(tokenizer)
    assert tokenizer.decode(first) == "<user>"
    assert tokenizer.decode(second) == "\n\nRepeat the previous context exactly.</><assistant>"
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(SystemExit, match="chat template cannot say a text and its repetition"):
        repetition(tokenizer)
