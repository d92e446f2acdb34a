"""New weights for a running engine, by every way that vLLM has: what follows from weights follows the new ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from vllm import LLM
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

import vllm_fox.hf  # noqa: F401  # transformers then knows the models
from benchmarks.engines import add, engine, generate, greedy, run_to_the_end, run_until_decoding, step
from tests.support.checkpoints import save_sparse_gpt2
from tests.support.engines import a_layer, assert_all_free, assert_gone
from tests.support.gradients import real_tokens
from tests.support.new_weights import Weights, all_others, changed, found, larger_norms, wanted

LENGTH = 700


def assert_serves(llm: LLM, folder: Path, tokens: list[int]) -> None:
    # Attention's logits of up to 300 make much of rounding. In float32 transformers computes the same sums in
    # another order, so its error says how much; the largest of 700 such errors is within a factor of 3 of another.
    exact = wanted(folder, tokens)
    rounding = (wanted(folder, tokens, torch.float32) - exact).abs().max().item()
    torch.testing.assert_close(found(llm, tokens), exact, atol=3 * rounding, rtol=0)


def in_buckets(llm: LLM, folder: Path, size: int = 3) -> Callable[[Any], None]:
    """Load a checkpoint a few tensors at a time, as vLLM's weight transfer from a trainer does."""
    model_config = llm.llm_engine.vllm_config.model_config
    weights = [item for path in sorted(folder.glob("*.safetensors")) for item in load_file(path).items()]

    def load(model: Any) -> None:
        with llm.llm_engine.vllm_config.device_config.device:
            initialize_layerwise_reload(model)
            for start in range(0, len(weights), size):
                model.load_weights(weights[start : start + size])
            finalize_layerwise_reload(model, model_config)

    return load


def bound(llm: LLM) -> list[float]:
    """Thresholds in force: the smallest of each layer."""

    def read(model: Any) -> list[float]:
        return [float(block.attn.attn._state.thresholds[n].min()) for n, block in enumerate(model.model.layers)]

    (thresholds,) = llm.apply_model(read)
    return thresholds


def assert_bounds_grew(llm: LLM, before: list[float]) -> None:
    """Thresholds are -2 U - log L + log eps, of which U is about nine times as large as before."""
    assert all(new < 4 * old < 0 for new, old in zip(bound(llm), before, strict=True))


@pytest.fixture(scope="module")
def others(fox_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return changed(fox_tiny, tmp_path_factory.mktemp("others") / "fox", all_others)


@pytest.fixture(scope="module")
def text(fox_tiny: Path) -> list[int]:
    return real_tokens(fox_tiny, LENGTH).tolist()


def test_weights_for_a_model_without_any(fox_tiny: Path, text: list[int]) -> None:
    """``--load-format dummy``: the first part already finds a model that takes parts."""
    with engine(fox_tiny, max_model_len=1024, max_num_batched_tokens=256, load_format="dummy") as llm:
        llm.apply_model(in_buckets(llm, fox_tiny))
        assert_serves(llm, fox_tiny, text)
        layer = a_layer(llm)
    del llm
    assert_gone(layer)


def test_dropping_follows_new_weights(tmp_path: Path) -> None:
    """A sparse GPT-2: after a reload and after an update in parts, interaction biases and all else are the new."""
    first = save_sparse_gpt2(tmp_path / "first", score=2.8, block_size=256)

    def other_drops(weights: Weights) -> None:
        for name, weight in weights.items():
            if name.endswith("int_bias"):
                weight.sub_(0.7)

    second = changed(first, tmp_path / "second", other_drops)
    tokens = [1 + n * 7 % 250 for n in range(200)]
    with engine(first, max_num_batched_tokens=256) as llm:
        assert_serves(llm, first, tokens)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(second)})
        assert_serves(llm, second, tokens)
        llm.apply_model(in_buckets(llm, first))
        assert_serves(llm, first, tokens)


@pytest.fixture(scope="module")
def started(fox_tiny: Path) -> Iterator[LLM]:
    with engine(fox_tiny, max_model_len=1024, max_num_batched_tokens=256) as one:
        yield one


@pytest.fixture
def llm(started: LLM, fox_tiny: Path) -> Iterator[LLM]:
    """An engine that has its first weights again after each test."""
    yield started
    started.collective_rpc("reload_weights", kwargs={"weights_path": str(fox_tiny)})
    assert started.reset_prefix_cache()  # what is cached was computed with other weights
    assert_all_free(started)


def test_reload(llm: LLM, fox_tiny: Path, others: Path, text: list[int]) -> None:
    (stored,) = llm.apply_model(lambda model: model.model.layers[0].attn.in_proj.weight.numel())
    assert not stored, "vLLM has not packed the weight, which is what could stay as it was"
    before = bound(llm)
    assert_serves(llm, fox_tiny, text)
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(others)})
    assert_bounds_grew(llm, before)
    assert_serves(llm, others, text)
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(fox_tiny)})
    assert bound(llm) == before
    assert_serves(llm, fox_tiny, text)


def test_parts_of_a_checkpoint(llm: LLM, others: Path, text: list[int]) -> None:
    before = bound(llm)
    llm.apply_model(in_buckets(llm, others))
    assert_bounds_grew(llm, before)
    assert_serves(llm, others, text)


def test_weights_in_the_engines_own_format(llm: LLM, fox_tiny: Path, text: list[int], tmp_path: Path) -> None:
    """vLLM writes into parameters by their names in the model, and calls nothing of the model."""
    (shapes,) = llm.apply_model(lambda model: {name: p.shape for name, p in model.named_parameters()})
    other = changed(fox_tiny, tmp_path / "other", larger_norms)
    weights = load_file(other / "model.safetensors")
    norms = [name for name in weights if "q_norm" in name or "k_norm" in name]
    mine = [(name, weights[name].view(-1, shapes[name][-1]).expand(shapes[name])) for name in norms]
    assert any("q_norm" in name for name, _ in mine)
    before = bound(llm)
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": mine, "is_checkpoint_format": False})
    assert_serves(llm, other, text)
    assert_bounds_grew(llm, before)


def test_requests_go_on_with_the_pages_they_have(llm: LLM, others: Path, text: list[int]) -> None:
    """As with vLLM's own models: keys of the old weights stay, and nothing is lost."""
    add(llm, "running", text, 60)
    for _ in range(8):
        llm.llm_engine.step()
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(others)})
    run_to_the_end(llm)
    assert_serves(llm, others, text)


def test_a_training_loop(llm: LLM, fox_tiny: Path, text: list[int]) -> None:
    """Train a step, push the weights, generate: the engine has the trained model's text."""
    model: Any = AutoModelForCausalLM.from_pretrained(fox_tiny, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = torch.tensor([text[:256]])
    for _ in range(2):
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        weights = [(name, weight.detach().clone()) for name, weight in model.named_parameters()]
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        # As with vLLM's own models, what is cached is of the weights that computed it until it is forgotten.
        assert llm.reset_prefix_cache()
        (out,) = generate(llm, [text[:300]], greedy(20))
        answer = list(out.outputs[0].token_ids)
        with torch.no_grad():
            alone = model.generate(torch.tensor([text[:300]]), max_new_tokens=20, do_sample=False)
        assert answer == alone[0, 300:].tolist()


def test_wrong_parts_are_refused(llm: LLM, fox_tiny: Path) -> None:
    weights = load_file(fox_tiny / "model.safetensors")
    name = "model.layers.0.attn.fgate_proj.bias"
    broken = weights[name].clone()
    broken[0] = math.nan

    def refusal(tensors: list[tuple[str, torch.Tensor]]) -> str:
        def load(model: Any) -> str:
            with pytest.raises(ValueError) as error:
                model.load_weights(tensors)
            return str(error.value)

        (message,) = llm.apply_model(load)
        return message

    assert f"tensor {name} has values that are NaN or infinite" in refusal([(name, broken)])
    assert f"tensor {name} is [3], expected [{len(broken)}]" in refusal([(name, broken[:3])])
    assert "unexpected tensor model.layers.0.attn.gate" in refusal([("model.layers.0.attn.gate", broken)])


@pytest.mark.parametrize("mode, clear", [("keep", True), ("keep", False), ("abort", True)])
def test_a_pause_in_the_middle_of_answers(llm: LLM, text: list[int], mode: Any, clear: bool) -> None:
    """What was running goes on after it, with its pages or, where caches are cleared, from its prompt on; or it is
    gone with all its pages."""
    prompts = {"long": text[:600], "short": text[100:300]}
    alone = {
        name: list(generate(llm, [prompt], greedy(40))[0].outputs[0].token_ids) for name, prompt in prompts.items()
    }
    for name, prompt in prompts.items():
        add(llm, name, prompt, 40)
    run_until_decoding(llm, len(prompts), tokens=5)
    client: Any = llm.llm_engine.engine_core
    core = client.engine_core
    running = list(core.scheduler.running)
    core.pause_scheduler(mode, clear)
    assert core.is_scheduler_paused()
    if mode == "abort":
        assert_all_free(llm)
        llm.llm_engine.abort_request(list(prompts))
    assert not step(llm)
    core.resume_scheduler()
    assert run_to_the_end(llm) == (alone if mode == "keep" else {})
    assert [request.num_preemptions for request in running] == [int(mode == "keep" and clear)] * len(prompts)


def test_an_adapter_that_is_merged(llm: LLM, fox_tiny: Path, text: list[int], tmp_path: Path) -> None:
    """Of all linear layers, gates and shifts too: vLLM answers as transformers does with the adapter unmerged."""
    peft = pytest.importorskip("peft", reason="PEFT, of the extra train, is not installed")
    torch.manual_seed(0)
    base: Any = AutoModelForCausalLM.from_pretrained(fox_tiny, dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    prompt = torch.tensor([text[:300]])
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = model.eval().generate(input_ids=prompt, **options)[0, 300:].tolist()
    with model.disable_adapter():
        assert model.generate(input_ids=prompt, **options)[0, 300:].tolist() != want
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tmp_path / "merged")})
    assert llm.reset_prefix_cache()
    (out,) = generate(llm, [text[:300]], greedy(20))
    assert list(out.outputs[0].token_ids) == want
    assert_serves(llm, tmp_path / "merged", text)
