"""What callers of transformers may pass to the models of all families: it is honoured, or refused by name."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    StaticCache,
    Trainer,
    TrainingArguments,
)

from tests.support.checkpoints import make_checkpoint, make_sparse_gpt2
from vllm_fox.hf import (
    FlaForgettingTransformerModel,
    ForgettingCache,
    ForgettingTransformerModel,
    SparseGPT2LMHeadModel,
    SparseGPT2Model,
    live_shares,
)

FOX: dict[str, tuple[str, dict[str, Any]]] = {
    "pro": (
        "official",
        {"use_k_shift": True, "use_v_shift": True, "qk_norm": True},
    ),
    "rope": ("official", {"use_rope": True}),
    "fla": ("fla", {"num_kv_heads": 2, "qkv_bias": True}),
}
SPARSE: dict[str, dict[str, Any]] = {"sparse": {}, "sparse, layer by layer": {"propagate_in_depth": False}}
LENGTHS = (9, 20, 1, 13)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """In float64, where what differs by roundings differs by 1e-13."""
    found: dict[str, Any] = {}
    for name, (dialect, fields) in FOX.items():
        folder = make_checkpoint(tmp_path_factory.mktemp("fox"), dialect, hidden_size=64, num_heads=2, **fields)
        found[name] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    for name, fields in SPARSE.items():
        found[name] = make_sparse_gpt2(**fields).double()
    return found


@pytest.fixture(params=[*FOX, *SPARSE], ids=str)
def model(request: pytest.FixtureRequest, models: dict[str, Any]) -> Any:
    return models[request.param].eval()


@pytest.fixture(params=FOX, ids=str)
def fox(request: pytest.FixtureRequest, models: dict[str, Any]) -> Any:
    return models[request.param].eval()


@pytest.fixture
def sparse(models: dict[str, Any]) -> Any:
    return models["sparse"].eval()


def text(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 97, (length,), generator=torch.Generator().manual_seed(seed))


TEXTS = [text(length, seed) for seed, length in enumerate(LENGTHS)]


def padded(side: str, texts: list[torch.Tensor] = TEXTS) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts in rows, and their attention mask."""
    longest = max(map(len, texts))

    def pad(x: torch.Tensor) -> torch.Tensor:
        missing = longest - len(x)
        return F.pad(x, (missing, 0) if side == "left" else (0, missing))

    return torch.stack([pad(one) for one in texts]), torch.stack([pad(torch.ones_like(one)) for one in texts])


def bounds(lengths: tuple[int, ...] = LENGTHS) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@torch.no_grad()
def alone(model: Any, one: torch.Tensor) -> torch.Tensor:
    return model(one[None]).logits[0]


def assert_near(found: torch.Tensor, want: torch.Tensor) -> None:
    # float64, logits of some units: a few hundred roundings.
    torch.testing.assert_close(found, want, rtol=0, atol=1e-11)


PACKINGS: dict[str, Callable[[], dict[str, Any]]] = {
    "cu_seqlens": lambda: {"cu_seqlens": bounds()},
    "position_ids": lambda: {"position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]},
    "FlashAttention": lambda: {
        "cu_seq_lens_q": bounds(), "cu_seq_lens_k": bounds(), "max_length_q": 20, "max_length_k": 20
    },
    "seq_idx": lambda: {"seq_idx": torch.arange(4).repeat_interleave(torch.tensor(LENGTHS))[None].int()},
}  # fmt: skip


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_packed_texts_are_as_alone(model: Any, packing: str) -> None:
    with torch.no_grad():
        found = model(torch.cat(TEXTS)[None], **PACKINGS[packing]()).logits[0]
    assert_near(found, torch.cat([alone(model, one) for one in TEXTS]))


@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}], ids=str)
def test_transformers_own_packing(model: Any, options: dict[str, bool]) -> None:
    """Its collator's batch as it comes, and the loss that the texts have one by one."""
    batch = DataCollatorWithFlattening(**options)([{"input_ids": one.tolist()} for one in TEXTS])
    with torch.no_grad():
        found = model(**batch)
    assert_near(found.logits[0], torch.cat([alone(model, one) for one in TEXTS]))
    torch.testing.assert_close(found.loss, loss_alone(model), rtol=1e-6, atol=0)  # the loss is float32


def loss_alone(model: Any, texts: list[torch.Tensor] = TEXTS) -> torch.Tensor:
    """Mean over all labels of texts one by one."""
    logits, labels = (torch.cat(x) for x in zip(*[(alone(model, one)[:-1], one[1:]) for one in texts], strict=True))
    return F.cross_entropy(logits.float(), labels)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_texts_are_as_alone(model: Any, side: str) -> None:
    ids, mask = padded(side)
    counted = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    with torch.no_grad():
        for given in ({}, {"position_ids": counted}):
            for kind in (torch.long, torch.bool, torch.float32):
                found = model(ids, attention_mask=mask.to(kind), labels=ids, **given)
                for row, real, one in zip(found.logits, mask.bool(), TEXTS, strict=True):
                    assert_near(row[real], alone(model, one))
                torch.testing.assert_close(found.loss, loss_alone(model), rtol=1e-6, atol=0)


def test_packed_rows_may_be_padded(model: Any) -> None:
    rows = [torch.cat(TEXTS[:2]), torch.cat(TEXTS[2:])]
    ids, mask = padded("left", rows)
    positions = torch.zeros_like(ids)
    for row, lengths in zip(positions, (LENGTHS[:2], LENGTHS[2:]), strict=True):
        row[len(row) - sum(lengths) :] = torch.cat([torch.arange(n) for n in lengths])
    with torch.no_grad():
        found = model(ids, attention_mask=mask, position_ids=positions, labels=ids)
    assert_near(found.logits[mask.bool()], torch.cat([alone(model, one) for one in TEXTS]))
    torch.testing.assert_close(found.loss, loss_alone(model), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"use_cache": False}, {"prefill_chunk_size": 4}], ids=str
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_answer_as_alone(model: Any, side: str, options: dict[str, Any]) -> None:
    if "prefill_chunk_size" in options and isinstance(model, SparseGPT2LMHeadModel):
        pytest.skip("chunks need a cache")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    ids, mask = padded(side)
    together = model.generate(ids, attention_mask=mask, **options)
    options.pop("prefill_chunk_size", None)
    for prompt, row in zip(TEXTS, together, strict=True):
        assert torch.equal(row[ids.shape[1] :], model.generate(prompt[None], **options)[0, len(prompt) :])


def test_embeddings_stand_for_tokens(model: Any) -> None:
    ids = TEXTS[1][None]
    embeds = model.get_input_embeddings()(ids).detach()
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = model.generate(ids, **options)
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), want[:, ids.shape[1] :])
    assert torch.equal(model.generate(ids, inputs_embeds=embeds, **options), want)


def test_logits_to_keep(model: Any) -> None:
    ids = torch.stack([TEXTS[1], text(20, 9)])
    with torch.no_grad():
        whole = model(ids).logits
        assert_near(model(ids, logits_to_keep=3).logits, whole[:, -3:])
        assert_near(model(ids, logits_to_keep=torch.tensor([0, 7, 19])).logits, whole[:, [0, 7, 19]])


def test_hidden_states_and_tuples(model: Any) -> None:
    ids, mask = padded("left")
    with torch.no_grad():
        found = model(ids, attention_mask=mask, labels=ids, output_hidden_states=True)
        layers = model.config.num_hidden_layers
        assert [tuple(x.shape) for x in found.hidden_states] == [(4, 20, model.config.hidden_size)] * (layers + 1)
        assert_near(model.lm_head(found.hidden_states[-1]), found.logits)
        first = model(TEXTS[0][None], output_hidden_states=True).hidden_states
        for x, want in zip(found.hidden_states, first, strict=True):
            assert_near(x[0, -9:], want[0])
        plain = model(ids, attention_mask=mask, labels=ids, output_hidden_states=True, return_dict=False)
        assert isinstance(plain, tuple) and len(plain) == len(found.to_tuple())
        assert torch.equal(plain[0], found.loss) and torch.equal(plain[1], found.logits)
        assert model(ids).hidden_states is None
        model.config.return_dict, model.config.output_hidden_states = False, True
        try:
            assert isinstance(model(ids), tuple) and len(model(ids)[-1]) == layers + 1
        finally:
            model.config.return_dict, model.config.output_hidden_states = True, False


@pytest.mark.parametrize("name", [*FOX, *SPARSE])
def test_auto_model_is_the_model_without_its_head(models: dict[str, Any], name: str, tmp_path: Path) -> None:
    model: Any = models[name]
    model.save_pretrained(tmp_path)
    body: Any = AutoModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    kinds = {"fla": FlaForgettingTransformerModel, "sparse": SparseGPT2Model, "pro": ForgettingTransformerModel}
    assert kinds.get(name) in (None, body.__class__)
    ids, mask = padded("right")
    with torch.no_grad():
        found = body(ids, attention_mask=mask, output_hidden_states=True)
        want = model(ids, attention_mask=mask, output_hidden_states=True)
    for x, y in zip(found.hidden_states, want.hidden_states, strict=True):
        assert_near(x, y)
    assert torch.equal(found.last_hidden_state, found.hidden_states[-1])
    body.save_pretrained(tmp_path / "body")
    again = AutoModel.from_pretrained(tmp_path / "body", dtype=torch.float64)
    assert all(torch.equal(x, again.state_dict()[key]) for key, x in body.state_dict().items())


def test_what_trainer_passes_to_the_loss(model: Any) -> None:
    ids = torch.stack([TEXTS[1], text(20, 9)])
    with torch.no_grad():
        mean = model(ids, labels=ids).loss
        found = model(ids, labels=ids, num_items_in_batch=torch.tensor(76)).loss
        torch.testing.assert_close(found, mean / 2, rtol=1e-6, atol=0)
        shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
        assert torch.equal(model(ids, labels=ids * 0, shift_labels=shifted).loss, mean)


def test_trainer_smooths_the_labels_of_the_next_tokens(model: Any, tmp_path: Path) -> None:
    options = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to=[], use_cpu=True)
    ids = TEXTS[1][None]
    trained: Any = type(model)(copy.deepcopy(model.config))  # Trainer writes into the config
    trained.double().eval()
    trained.load_state_dict(model.state_dict())
    with torch.no_grad():
        found = Trainer(trained, options).compute_loss(trained, {"input_ids": ids, "labels": ids.clone()})
        want = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], label_smoothing=0.1)
    torch.testing.assert_close(float(found), float(want), rtol=1e-6, atol=0)  # type: ignore[arg-type]


def test_trainer_adds_up_micro_batches(model: Any, tmp_path: Path) -> None:
    """Packed by transformers' collator, the gradients of two steps that are accumulated are those of one."""
    texts = [{"input_ids": one.tolist()} for one in (*TEXTS, *TEXTS)]
    gradients = []
    for size, steps in ((8, 1), (2, 4)):
        trained = type(model)(copy.deepcopy(model.config)).double()  # Trainer writes into the config
        trained.load_state_dict(model.state_dict())
        options = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=1,
            learning_rate=0.0, max_grad_norm=0.0, weight_decay=0.0, report_to=[], save_strategy="no", use_cpu=True,
            disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(trained, options, DataCollatorWithFlattening(return_flash_attn_kwargs=True), texts)
        seen: list[torch.Tensor] = []
        trainer.optimizer = torch.optim.SGD(trained.parameters(), lr=0.0)
        trainer.optimizer.register_step_pre_hook(
            lambda *_, seen=seen, trained=trained: seen.extend(p.grad.clone() for p in trained.parameters())
        )
        trainer.train()
        gradients.append(torch.cat([x.flatten() for x in seen]))
    # The loss is float32.
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


def test_what_is_kept_adds_up_too(sparse: Any) -> None:
    """Gradient accumulation, as by Trainer: the loss of a batch is the sum of its parts'."""
    sparse.train()
    ids = torch.stack([text(20, seed) for seed in range(4)])
    labels = ids.clone()
    labels[0, 5:] = -100
    plain = sparse(ids, labels=labels, num_items_in_batch=61).loss
    sparse.gamma = 0.7
    whole = sparse(ids, labels=labels, num_items_in_batch=61).loss
    ranges = (slice(0, 1), slice(1, 4))
    shares = (4 / 61, 57 / 61)
    kept = [sparse.transformer(ids[rows]).kept for rows in ranges]
    parts = [sparse(ids[rows], labels=labels[rows], num_items_in_batch=61).loss for rows in ranges]
    want = plain + 0.7 * sum(a * b for a, b in zip(shares, kept, strict=True))
    torch.testing.assert_close(sum(parts), want, rtol=1e-6, atol=0)  # the cross-entropy is float32
    torch.testing.assert_close(whole, plain + 0.7 * sparse.transformer(ids).kept, rtol=1e-6, atol=0)


@pytest.mark.parametrize("propagate", [True, False])
def test_gradients_of_packed_and_padded_texts_that_are_half_dropped(propagate: bool) -> None:
    """Training mode, where what is kept counts in the loss: all gradients are those of the texts one by one."""
    model = make_sparse_gpt2(propagate_in_depth=propagate).double().train()
    model.alpha = 1.5
    texts = [one for one in TEXTS if len(one) > 1]
    counts, pairs = [len(one) - 1 for one in texts], [len(one) * (len(one) - 1) for one in texts]

    def gradients(loss: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    losses = [model(one[None], labels=one[None]).loss * n / sum(counts) for one, n in zip(texts, counts)]
    kept = [model.transformer(one[None]).kept * n / sum(pairs) for one, n in zip(texts, pairs)]
    want = gradients(sum(losses) + 0.7 * sum(kept))
    model.gamma = 0.7
    line, (ids, mask) = torch.cat(texts)[None], padded("left", texts)
    positions = torch.cat([torch.arange(len(one)) for one in texts])[None]
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        packed = gradients(model(line, position_ids=positions, labels=line).loss)
        rows = gradients(model(ids, attention_mask=mask, labels=ids).loss)
        for found in (packed, rows):
            # The cross-entropy is float32.
            assert (found - want).norm() < 1e-6 * want.norm()


def test_a_cache_goes_on_with_padding_anywhere(fox: Any) -> None:
    """Three calls, each with padding of its own, and a row that has no token in one of them."""
    lengths = ((5, 0, 3), (2, 7, 4), (6, 1, 6))  # of each row's parts, by call
    parts = [
        [text(n, 10 * row + call) for call, n in enumerate(row_lengths)] for row, row_lengths in enumerate(lengths)
    ]
    cache, masks = fox.new_cache(), []
    found: list[list[torch.Tensor]] = [[], [], []]
    for call, side in enumerate(("left", "right", "left")):
        ids, mask = padded(side, [row[call] for row in parts])
        masks.append(mask)
        with torch.no_grad():
            out = fox(ids, attention_mask=torch.cat(masks, 1), past_key_values=cache)
        assert out.past_key_values is cache
        for row in range(3):
            found[row].append(out.logits[row][mask[row].bool()])
            # The last column has a row's newest token, even if that came in an earlier call.
            assert_near(out.logits[row, -1], torch.cat(found[row])[-1])
    for row in range(3):
        assert_near(torch.cat(found[row]), alone(fox, torch.cat(parts[row])))


def test_use_cache(fox: Any) -> None:
    ids = TEXTS[1][None]
    with torch.no_grad():
        assert isinstance(fox(ids).past_key_values, ForgettingCache)
        assert fox(ids, use_cache=False).past_key_values is None
        assert fox(ids, cu_seqlens=torch.tensor([0, 8, 20])).past_key_values is None
        fox.config.use_cache = False
        try:
            assert fox(ids).past_key_values is None
            assert isinstance(fox(ids, use_cache=True).past_key_values, ForgettingCache)
        finally:
            fox.config.use_cache = True
        cache = fox(ids[:, :12]).past_key_values
        where = {"position_ids": torch.arange(12, 20)[None], "cache_position": torch.arange(12, 20)}
        assert_near(fox(ids[:, 12:], past_key_values=cache, **where).logits, fox(ids).logits[:, 12:])
    fox.train()
    assert fox(ids).past_key_values is None
    assert isinstance(fox(ids, use_cache=True).past_key_values, ForgettingCache)


def test_generation_goes_on_from_a_cache(fox: Any) -> None:
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids, mask = padded("left")
    want = fox.generate(ids, attention_mask=mask, max_new_tokens=10, **options)
    first = fox.generate(ids, attention_mask=mask, max_new_tokens=4, return_dict_in_generate=True, **options)
    seen = F.pad(mask, (0, 4), value=1)
    found = fox.generate(
        first.sequences, attention_mask=seen, past_key_values=first.past_key_values, max_new_tokens=6, **options
    )
    assert torch.equal(found, want)


def test_a_cache_that_is_reset_is_new(fox: Any) -> None:
    cache, options = fox.new_cache(), {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    first = fox.generate(TEXTS[0][None], past_key_values=cache, **options)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(fox.generate(TEXTS[0][None], past_key_values=cache, **options), first)


def test_packed_sequences_go_into_no_cache(fox: Any) -> None:
    for packing in PACKINGS.values():
        with pytest.raises(ValueError, match="packed sequences cannot be continued"):
            fox(torch.cat(TEXTS)[None], past_key_values=fox.new_cache(), **packing())


@pytest.mark.parametrize(
    "name, field, value", [("sparse", "n_head", 7), ("sparse", "propagate_in_depth", "no"), ("pro", "num_heads", 7)]
)
def test_fields_that_from_pretrained_is_given_are_checked(
    models: dict[str, Any], name: str, field: str, value: Any, tmp_path: Path
) -> None:
    models[name].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=field):
        AutoModelForCausalLM.from_pretrained(tmp_path, **{field: value})


def test_rows_of_a_cache_move(fox: Any) -> None:
    ids, mask = padded("right")
    after = torch.full((4, 1), 7)
    with torch.no_grad():
        want = fox(torch.cat((ids, after), 1), attention_mask=F.pad(mask, (0, 1), value=1)).logits[:, -1]
        cache = fox(ids, attention_mask=mask).past_key_values
        cache.reorder_cache(torch.tensor([2, 2, 0, 1]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 4, 6]))
        assert_near(fox(after[:3], past_key_values=cache).logits[:, -1], want[[2, 0, 1]])
        with pytest.raises(ValueError, match="crop"):
            cache.crop(-1)
    empty = fox.new_cache()
    empty.batch_repeat_interleave(2)
    assert empty.get_seq_length() == 0


IDS = torch.stack([TEXTS[1], text(20, 9)])
ROW = IDS[:1]
COUNTED = torch.arange(20)[None]
TWO = torch.tensor([0, 8, 20])
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no tokens": ({"input_ids": None}, "either input_ids or inputs_embeds"),
    "flat tokens": ({"input_ids": ROW[0]}, r"input_ids is \[20\]"),
    "flat embeddings": ({"input_ids": None, "inputs_embeds": torch.zeros(20, 32)}, r"inputs_embeds is \[20, 32\]"),
    "backwards": ({"position_ids": COUNTED.flip(1)}, "position_ids has 19 at a token whose number is 0"),
    "from 3": ({"position_ids": COUNTED + 3}, "position_ids has 3"),
    "in steps of two": ({"position_ids": COUNTED * 2}, "position_ids has 2"),
    "a gap": ({"position_ids": COUNTED + (COUNTED > 9)}, "position_ids has 11"),
    "another length": ({"position_ids": COUNTED[:, :-1]}, r"position_ids is \[1, 19\]"),
    "without rows": ({"position_ids": COUNTED[0]}, r"position_ids is \[20\]"),
    "padding counted": (
        {"attention_mask": (COUNTED > 4).long(), "position_ids": COUNTED}, "position_ids has 5 at .* number is 0",
    ),
    "mask of pairs": ({"attention_mask": torch.ones(1, 1, 20, 20)}, r"attention_mask is \[1, 1, 20, 20\]"),
    "short mask": ({"attention_mask": torch.ones(1, 19)}, r"attention_mask is \[1, 19\]"),
    "additive mask": ({"attention_mask": -1e9 * (COUNTED < 2)}, "attention_mask has values other than 0"),
    "nothing left": ({"attention_mask": torch.zeros(1, 20)}, "attention_mask is 0 everywhere"),
    "two packings": (
        {"cu_seqlens": TWO, "cu_seq_lens_q": torch.tensor([0, 9, 20])},
        "cu_seqlens and cu_seq_lens_q disagree",
    ),
    "queries and keys": (
        {"cu_seq_lens_q": TWO, "cu_seq_lens_k": torch.tensor([0, 9, 20])},
        "cu_seq_lens_q and cu_seq_lens_k disagree",
    ),
    "bounds and positions": ({"cu_seqlens": TWO, "position_ids": COUNTED}, "position_ids has 8"),
    "seq_idx and bounds": ({"cu_seqlens": TWO, "seq_idx": (COUNTED > 8).int()}, "cu_seqlens and seq_idx disagree"),
    "short bounds": ({"cu_seqlens": torch.tensor([0, 8, 19])}, "cu_seqlens is .* it must rise from 0 to .* 20"),
    "falling bounds": ({"cu_seq_lens_k": torch.tensor([0, 9, 8, 20])}, "cu_seq_lens_k is .* it must rise"),
    "bounds of two rows": ({"input_ids": IDS, "cu_seqlens": TWO}, "cu_seqlens is given for 2 rows"),
    "bounds as floats": ({"cu_seq_lens_q": torch.tensor([0.0, 20.0])}, "cu_seq_lens_q is torch.float32"),
    "longest": ({"cu_seq_lens_q": TWO, "max_length_q": 8}, "max_length_q is 8.* 12"),
    "columns": ({"cache_position": torch.arange(1, 21)}, "cache_position must be .* 0 to 19"),
    "labels": ({"labels": IDS.T}, r"labels is \[20, 2\]: it must be \[1, 20\]"),
    "attentions": ({"output_attentions": True}, "output_attentions is true"),
    "tuple": ({"past_key_values": ((torch.zeros(1),),)}, "past_key_values is a tuple"),
    "dynamic cache": ({"past_key_values": DynamicCache()}, "past_key_values is a DynamicCache"),
    "static cache": (
        {"past_key_values": StaticCache(GPT2Config(), max_cache_len=4)}, "past_key_values is a StaticCache",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD, ids=str)
@pytest.mark.parametrize("name", ["pro", "sparse"])
def test_what_cannot_be_is_refused_in_one_sentence(models: dict[str, Any], name: str, case: str) -> None:
    given, message = BAD[case]
    with pytest.raises(ValueError, match=message) as caught:
        models[name](**{"input_ids": ROW, **given})
    assert str(caught.value).count(". ") == 0


@pytest.mark.parametrize(
    "wrong", ["postion_ids", "atention_mask", "token_type_ids", "label", "use_cach", "head_mask"]
)
def test_unknown_names_are_type_errors(model: Any, wrong: str) -> None:
    body = getattr(model, model.base_model_prefix)
    for one in (model, body):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{wrong}'"):
            one(ROW, **{wrong: COUNTED})
        kinds = {parameter.kind for parameter in inspect.signature(one.forward).parameters.values()}
        assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    with pytest.raises(ValueError, match=wrong):
        model.generate(ROW, max_new_tokens=1, **{wrong: COUNTED})


def test_what_a_cache_cannot_be_is_refused(fox: Any) -> None:
    with torch.no_grad():
        cache = fox(IDS).past_key_values
        one = IDS[:, :1]
        for given, message in (
            ({"input_ids": one[:1]}, "past_key_values holds 2 rows: the input has 1"),
            ({"position_ids": torch.zeros(2, 1).long()}, "position_ids has 0 at a token whose number is 20"),
            ({"attention_mask": torch.ones(2, 1)}, r"attention_mask is \[2, 1\]: it must be \[2, 21\]"),
            (
                {"attention_mask": F.pad(torch.ones(2, 20), (1, 0))},
                "attention_mask has other padding than the calls",
            ),
            ({"cache_position": torch.arange(1)}, "cache_position must be the columns 20 to 20"),
            ({"seq_idx": torch.zeros(2, 2).int()}, r"seq_idx is \[2, 2\]"),
        ):
            with pytest.raises(ValueError, match=message):
                fox(**{"input_ids": one, "past_key_values": cache, **given})
        with pytest.raises(ValueError, match="seq_idx: packed sequences cannot go on from past_key_values"):
            fox(IDS[:, :2], past_key_values=cache, seq_idx=torch.tensor([[0, 1], [0, 0]]))
        with pytest.raises(ValueError, match="past_key_values has 1 layers: the model has 2"):
            fox(one, past_key_values=ForgettingCache([torch.zeros(2)]))
        with pytest.raises(ValueError, match="use_cache is true: packed"):
            fox(ROW, cu_seqlens=TWO, use_cache=True)
    fox.gradient_checkpointing_enable()
    try:
        with pytest.raises(ValueError, match="past_key_values is given: gradient checkpointing"):
            fox.train()(one, past_key_values=fox.new_cache())
        assert fox(one, use_cache=True).past_key_values is None
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        found = fox.generate(ROW, **options)
    finally:
        fox.gradient_checkpointing_disable()
    assert torch.equal(found, fox.eval().generate(ROW, **options))


def test_what_generation_cannot_do_is_refused(model: Any) -> None:
    for given, message in (
        ({"cache_implementation": "static"}, "cache_implementation is 'static'"),
        ({"prompt_lookup_num_tokens": 2}, "assisted generation is not supported"),
        ({"past_key_values": DynamicCache()}, "past_key_values is a DynamicCache"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions is true"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(ROW, max_new_tokens=3, **given)


def test_only_a_server_has_a_cache_of_a_sparse_gpt2(sparse: Any) -> None:
    with pytest.raises(ValueError, match="use_cache is true: leave it out"):
        sparse(ROW, use_cache=True)
    assert sparse(ROW, use_cache=False).logits.shape == (1, 20, 97)


def test_the_longest_sequence_counts(sparse: Any) -> None:
    """A row may be longer than the model's context, if its sequences are not."""
    ids = torch.cat([text(60, 1), text(60, 2)])[None]
    with torch.no_grad():
        found = sparse(ids, cu_seqlens=torch.tensor([0, 60, 120])).logits[0]
        assert_near(found, torch.cat([alone(sparse, one) for one in ids[0].split(60)]))
    with pytest.raises(ValueError, match="65 tokens: the model's block_size is 64"):
        sparse(ids, cu_seqlens=torch.tensor([0, 65, 120]))


@pytest.mark.parametrize(
    "field, value",
    [
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("tie_word_embeddings", False),
        ("activation_function", "relu"),
        ("add_cross_attention", True),
    ],
)
def test_a_gpt2_that_computes_otherwise_is_no_starting_point(field: str, value: Any) -> None:
    config = GPT2Config(
        n_embd=8, n_layer=1, n_head=2, vocab_size=9, bos_token_id=0, eos_token_id=0, **{field: value}
    )
    with pytest.raises(ValueError, match=f"from_gpt2: {field} is {value!r}: it must be"):
        SparseGPT2LMHeadModel.from_gpt2(GPT2LMHeadModel(config))


def test_the_padding_token_of_a_gpt2_stays() -> None:
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9, bos_token_id=0, eos_token_id=0, pad_token_id=3)
    assert SparseGPT2LMHeadModel.from_gpt2(GPT2LMHeadModel(config)).config.pad_token_id == 3


def test_live_shares_are_of_one_text(models: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"live_shares: input_ids is \[2, 20\]: it must be \[1, T\]"):
        live_shares(models["pro"], IDS)
