"""A training step of the models for transformers: what it casts, waits for, holds in memory and compiles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments

from tests.support.checkpoints import make_config, make_sparse_gpt2
from vllm_fox.hf import (
    EvictingDecoderConfig,
    EvictingDecoderForCausalLM,
    FlaForgettingTransformerForCausalLM,
    ForgettingTransformerForCausalLM,
    compile_layers,
)
from vllm_fox.hf.loss import MIN_ROWS, linear_cross_entropy

SMALL = {"hidden_size": 64, "num_heads": 2, "vocab_size": 97, "log_pruning_tolerance": -10.0}
PRO = {
    "qk_norm": True, "use_k_shift": True, "use_v_shift": True, "use_output_gate": True, "use_output_norm": True,
}  # fmt: skip


def fox(**fields: Any) -> Any:
    torch.manual_seed(0)
    return ForgettingTransformerForCausalLM(make_config(**{**SMALL, **PRO, **fields})).train()


def fla() -> Any:
    torch.manual_seed(0)
    config = make_config("fla", **{**SMALL, "qkv_bias": True, "use_output_gate": True})
    return FlaForgettingTransformerForCausalLM(config).train()


def evicting() -> Any:
    torch.manual_seed(0)
    config = EvictingDecoderConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, tie_word_embeddings=True,
        eviction={"method": "dms_adapter", "window": 8, "shift": 1, "scale": 100.0, "offset": 5.0},
    )  # fmt: skip
    return EvictingDecoderForCausalLM(config).train()


def sparse() -> Any:
    return make_sparse_gpt2().train()


MODELS: dict[str, Callable[[], Any]] = {"fox": fox, "fla": fla, "evicting": evicting, "sparse": sparse}


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(seed))


BOUNDS = torch.tensor([0, 9, 30, 60], dtype=torch.int32)
LAYOUTS: dict[str, dict[str, Any]] = {
    "windows": {},
    "bounds": {"cu_seqlens": BOUNDS},
    "as FlashAttention has them": {
        "cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS, "max_length_q": 30, "max_length_k": 30,
        "position_ids": torch.cat([torch.arange(n) for n in (9, 21, 30)])[None],
        "seq_idx": torch.arange(3).repeat_interleave(torch.tensor([9, 21, 30]))[None].int(),
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["fox", "fla", "evicting"])
def test_a_step_reads_nothing_from_the_device(name: str, layout: str) -> None:
    """On the device "meta" no tensor has values, so a step that reads one fails.

    A sparse GPT-2 goes through packed texts one by one, so it has to know how long they are.
    """
    model, ids = MODELS[name](), tokens(1, 60)
    loss = model(input_ids=ids, labels=ids, **LAYOUTS[layout]).loss
    assert loss.isfinite()
    model.to("meta")
    given = {key: x.to("meta") if isinstance(x, torch.Tensor) else x for key, x in LAYOUTS[layout].items()}
    model(input_ids=ids.to("meta"), labels=ids.to("meta"), **given).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())
    # What does read: a mask, whose tokens have to be counted.
    with pytest.raises(RuntimeError, match="no data"):
        model(input_ids=ids.to("meta"), attention_mask=ids.to("meta"))


@pytest.mark.parametrize("name", MODELS)
def test_autocast_casts_what_several_projections_read_once(name: str) -> None:
    model, ids, given = MODELS[name](), tokens(1, 60), dict[str, torch.Tensor]()
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and path != "lm_head" and "dms" not in path:
            module.register_forward_pre_hook(lambda _, x, path=path: given.update({path: x[0]}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=ids, labels=ids).loss.backward()
    assert all(x.dtype == torch.bfloat16 for path, x in given.items() if not path.endswith("mlp.c_fc"))
    # Of a layer: for attention, for its output, and twice for the MLP.
    assert len({x.data_ptr() for x in given.values()}) == 4 * model.config.num_hidden_layers


@pytest.mark.parametrize("trained", ["both", "hidden", "weight"])
def test_the_loss_and_its_gradients_are_those_of_all_logits(trained: str) -> None:
    draw = torch.Generator().manual_seed(0)
    count, size, vocab = 2 * MIN_ROWS + 77, 8, 50
    hidden, weight = (torch.randn(*n, generator=draw).double() for n in ((1, count, size), (vocab, size)))
    labels = torch.randint(0, vocab, (1, count), generator=draw)
    labels[0, ::5] = -100
    found = []
    for own in (True, False):
        leaves = [hidden.clone(), weight.clone()]
        for leaf, kind in zip(leaves, ("hidden", "weight"), strict=True):
            leaf.requires_grad_(trained in ("both", kind))
        if own:
            loss = linear_cross_entropy(leaves[0], leaves[1], labels)
        else:
            loss = F.cross_entropy((leaves[0] @ leaves[1].T)[0], labels[0], reduction="sum")
        (loss / 7).backward()
        found.append([loss.detach(), *(x.grad for x in leaves if x.requires_grad)])
    for one, want in zip(*found, strict=True):
        # Some thousand roundings of float64.
        torch.testing.assert_close(one, want, rtol=1e-12, atol=1e-12)


def test_a_label_that_is_no_token_is_an_error() -> None:
    """-100 alone stands for no label, as in transformers."""
    model, labels = fox(num_hidden_layers=1), tokens(1, 20)
    for wrong in (-1, 97):
        labels[0, 5] = wrong
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            model(input_ids=tokens(1, 20), labels=labels)


def test_the_loss_is_differentiable_once() -> None:
    """A gradient of gradients would lack a part; it is an error."""
    model, ids = fox(num_hidden_layers=1), tokens(1, 20)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(model(input_ids=ids, labels=ids).loss, model.lm_head.weight, create_graph=True)


def test_a_factor_of_the_loss_is_not_rounded() -> None:
    """In bfloat16 1/1540 would be wrong by 0.16 %, and so would all gradients."""
    hidden = torch.randn(1, 40, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.randn(11, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    sums = []
    for factor in (1.0, 1 / 1540):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        (linear_cross_entropy(leaves[0], leaves[1], tokens(1, 40) % 11) * factor).backward()
        sums.append([float((leaf.grad.double() / factor).abs().sum()) for leaf in leaves if leaf.grad is not None])
    for whole, part in zip(*sums, strict=True):
        # Each of 88 numbers or more is rounded by at most 2**-9 of it, up as often as down.
        assert abs(part / whole - 1) < 3 * 2**-9 / 88**0.5


def with_bias(model: Any) -> None:
    head = torch.nn.Linear(64, 97, dtype=torch.float64)
    head.bias.data.fill_(0.0)[:40] = 3.0
    model.set_output_embeddings(head)


def with_hook(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda layer, given, y: 2 * y)


def with_other_forward(model: Any) -> None:
    model.lm_head.forward = lambda x: 2 * F.linear(x, model.lm_head.weight)


@pytest.mark.parametrize("change", [with_bias, with_hook, with_other_forward])
def test_a_head_that_computes_something_else_is_called(change: Callable[[Any], None]) -> None:
    model, ids = fox(num_hidden_layers=1).double(), tokens(2, 20)
    change(model)
    in_training = model(input_ids=ids, labels=ids)
    assert in_training.logits is not None
    torch.testing.assert_close(in_training.loss, model.eval()(input_ids=ids, labels=ids, use_cache=False).loss)


def test_hooks_are_called_where_layers_are_compiled() -> None:
    model, ids, seen = fox(num_hidden_layers=3).double(), tokens(1, 20), []
    model.model.layers[1].attn.o_proj.register_forward_hook(lambda *_: seen.append(1))
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):  # torch's default
        compile_layers(model, backend="eager")
        model(input_ids=ids, labels=ids)
        model.model.layers[2].attn.o_proj.register_forward_hook(lambda *_: seen.append(2))
        model(input_ids=ids, labels=ids)
    assert seen == [1, 1, 2]


def test_hooks_are_called_where_layers_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where training fuses them unasked: hooks of any layer, and those that come after a step."""

    def can_fuse(x: torch.Tensor) -> bool:
        return not torch.compiler.is_compiling()

    model, ids = fox(num_hidden_layers=3).double(), tokens(1, 20)
    plain = model(input_ids=ids, labels=ids).loss
    monkeypatch.setattr("vllm_fox.hf.fused.can_fuse", can_fuse)
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, plain)
    counted = torch._dynamo.utils.counters["stats"]
    graphs = counted["unique_graphs"]
    model(input_ids=ids, labels=ids)
    assert counted["unique_graphs"] == graphs, "compiled anew without a reason"
    seen = []
    model.model.layers[1].attn.o_proj.register_forward_hook(lambda layer, given, y: (seen.append(1), 2 * y)[1])
    hooked = model(input_ids=ids, labels=ids).loss
    assert seen
    monkeypatch.undo()
    torch.testing.assert_close(hooked, model(input_ids=ids, labels=ids).loss)
    assert abs(hooked - plain) > 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_training_has_the_loss_and_gradients_of_logits(name: str) -> None:
    """In float64, where both differ by roundings alone."""
    model, ids = MODELS[name]().double(), tokens(2, 40)
    labels = ids.masked_fill(tokens(2, 40, seed=1) < 20, -100)
    mask = torch.ones_like(ids)
    mask[1, 25:] = 0
    options: list[dict[str, Any]] = [
        {}, {"attention_mask": mask}, {"num_items_in_batch": torch.tensor(11)}, {"shift_labels": labels}
    ]  # fmt: skip
    for given in options:
        next_ = labels if "shift_labels" in given else F.pad(labels[:, 1:], (0, 1), value=-100)
        layout = {key: x for key, x in given.items() if key == "attention_mask"}
        if layout:
            next_ = next_.masked_fill(F.pad(mask[:, 1:], (0, 1)) == 0, -100)

        def own(given: dict[str, Any] = given) -> torch.Tensor:
            out = model(input_ids=ids, **{"labels": labels, **given})
            assert out.logits is None
            return out.loss

        def of_logits(given: dict[str, Any] = given, layout: Any = layout, next_: Any = next_) -> torch.Tensor:
            logits = model(input_ids=ids, **layout).logits.flatten(0, 1)
            count = given.get("num_items_in_batch", (next_ != -100).sum())
            return F.cross_entropy(logits, next_.flatten(), reduction="sum") / count

        found = []
        for loss_of in (own, of_logits):
            model.zero_grad()
            torch.manual_seed(0)  # decisions are noisy in training
            loss = loss_of()
            loss.backward()
            found.append(torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters())]))
        assert (found[0] - found[1]).norm() < 1e-12 * found[1].norm(), list(given)


def test_no_step_holds_all_logits_in_float32() -> None:
    """Counted are the sizes of all that PyTorch allocates, inside of operators too."""
    count, vocab = 4 * MIN_ROWS, 12000
    model, ids = fox(vocab_size=vocab, num_hidden_layers=1, max_position_embeddings=count), tokens(1, count)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    largest = max(event.nbytes() for event in events if event.name() == "[memory]")
    # A block of logits in float32, which is therefore seen. A CPU without bfloat16 in hardware multiplies in as
    # much memory and some bytes more.
    assert largest // (vocab * 4) == MIN_ROWS


class Compilations(TrainerCallback):
    """Counts after each step how many graphs have been compiled so far."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def rows(texts: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([(one["input_ids"] * 9)[: max(len(one["input_ids"]) for one in texts)] for one in texts])
    return {"input_ids": ids, "labels": ids}


def padded(texts: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    lengths = torch.tensor([len(one["input_ids"]) for one in texts])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return {**rows(texts), "attention_mask": mask}


@pytest.mark.parametrize(
    "collate",
    [rows, padded, DataCollatorWithFlattening(return_flash_attn_kwargs=True)],
    ids=["windows", "padded", "packed"],
)
def test_torch_compile_of_trainer_compiles_twice_for_all_lengths(collate: Any, tmp_path: Path) -> None:
    """Once for the first length, and once for all others."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    seen = Compilations()
    texts = [{"input_ids": tokens(n, seed=n).tolist()} for n in (33, 40, 20, 57, 13, 64, 77, 90)]
    options = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, max_steps=4, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, torch_compile=True, torch_compile_backend="eager", train_sampling_strategy="sequential",
    )  # fmt: skip
    Trainer(fox(num_hidden_layers=1), options, collate, texts, callbacks=[seen]).train()
    torch._dynamo.reset()
    # In two parts, where the host counts tokens or sequences before.
    first, *others = seen.counts
    assert first in (1, 2) and others == [2 * first] * 3


def test_layers_are_not_compiled_anew_from_the_third_length_on() -> None:
    """The code of one layer serves all."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, counts = fox(num_hidden_layers=3), list[int]()
    compile_layers(model, backend="eager")
    for n in (33, 40, 20, 64):
        ids = tokens(2, n)
        model(input_ids=ids, labels=ids).loss.backward()
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert counts[0] == 1 and counts[1:] == [counts[1]] * 3
