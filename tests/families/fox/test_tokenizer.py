"""The published tokenizer class: both directions, streaming, and the ways in which vLLM copies tokenizers."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

from tests.support.checkpoints import make_checkpoint, make_config
from vllm_fox.families.fox.tokenizer import JSONGPT2Tokenizer, escape, register_tokenizer, unescape
from vllm_fox.registration import register_configs

END = "<|endoftext|>"
TEXT = 'say "hi"\n\ttab \\ back \\n literal, é 你好 😀 \x00 \x7f / http://a\r\n' + END + "next"


def _bpe() -> Tokenizer:
    """A small GPT-2 style BPE over escaped text; some of its tokens are escapes, or parts of one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [escape(Path(json.__file__).read_text()), escape('é 你好 😀 \\ "q" \n\t' * 20)]
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


@pytest.fixture(scope="module", params=["tokenizer.json", "vocab.json"])
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tokenizer]:
    """A checkpoint folder as the official code publishes it, and the bare BPE in it."""
    folder = tmp_path_factory.mktemp("published")
    tokenizer = _bpe()
    make_config(vocab_size=420).save_pretrained(folder)
    if request.param == "tokenizer.json":
        tokenizer.save(str(folder / "tokenizer.json"))
    else:
        tokenizer.model.save(str(folder))
    settings_file = {
        "tokenizer_class": "JSONGPT2Tokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
    }
    settings_file |= {"bos_token": END, "eos_token": END, "unk_token": END, "errors": "replace"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_file))
    return folder, tokenizer


def _load(folder: Path) -> JSONGPT2Tokenizer:
    register_configs()
    register_tokenizer()
    register_tokenizer()
    loaded = AutoTokenizer.from_pretrained(folder)
    assert type(loaded) is JSONGPT2Tokenizer
    return loaded


def test_encodes_the_json_literal_and_decodes_back(published: tuple[Path, Tokenizer]) -> None:
    folder, bare = published
    tokenizer = _load(folder)
    ids = tokenizer.encode(TEXT)
    assert ids == bare.encode(json.dumps(TEXT)[1:-1]).ids
    assert tokenizer(TEXT)["input_ids"] == ids
    assert tokenizer(["a\nb", TEXT])["input_ids"] == [tokenizer.encode("a\nb"), ids]
    assert tokenizer.tokenize(TEXT) == tokenizer.convert_ids_to_tokens(ids)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.batch_decode([ids, ids[:3]])[0] == TEXT
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT.replace(END, "")
    assert tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids)) == TEXT
    assert tokenizer.eos_token_id == 0 and len(tokenizer) == 420


@pytest.mark.parametrize("skip_special", [True, False])
def test_streamed_text_is_the_decoded_text(published: tuple[Path, Tokenizer], skip_special: bool) -> None:
    tokenizer = _load(published[0])
    ids = tokenizer.encode(TEXT)
    for start in range(len(ids)):
        prompt = tokenizer.decode(ids[:start], skip_special_tokens=skip_special)
        if prompt.endswith("\ufffd"):  # the prompt ends within a character
            continue
        stream = DecodeStream(ids=ids[:start], skip_special_tokens=skip_special)
        pieces = [stream.step(tokenizer._tokenizer, token) or "" for token in ids[start:]]
        assert prompt + "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip_special)


def test_copies_and_saves_behave_the_same(published: tuple[Path, Tokenizer], tmp_path: Path) -> None:
    from vllm.tokenizers.hf import get_cached_tokenizer, maybe_make_thread_pool

    tokenizer = _load(published[0])
    ids = tokenizer.encode(TEXT)
    tokenizer.save_pretrained(tmp_path)
    make_config(vocab_size=420).save_pretrained(tmp_path)
    copies = [copy.copy(tokenizer), copy.deepcopy(tokenizer), _load(tmp_path)]
    copies += [maybe_make_thread_pool(get_cached_tokenizer(copy.deepcopy(tokenizer)), 2)]
    for other in copies:
        assert other.encode(TEXT) == ids and other.decode(ids) == TEXT and len(other) == len(tokenizer)
        assert DecodeStream().step(other._tokenizer, ids[0]) == tokenizer.decode(ids[:1])
    serialised = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # what grammar backends do
    assert serialised.get_vocab() == tokenizer.get_vocab()


def test_other_tokenizers_stay_as_they_are(tmp_path: Path) -> None:
    register_tokenizer()
    tokenizer = AutoTokenizer.from_pretrained(make_checkpoint(tmp_path))
    assert not isinstance(tokenizer, JSONGPT2Tokenizer)
    assert tokenizer.decode(tokenizer.encode("a\nb\\n é")) == "a\nb\\n é"


@given(st.text())
def test_unescape_inverts_escape(text: str) -> None:
    assert unescape(escape(text)) == text


@given(st.text(alphabet='\\\\\\uUxndD8390aAcCeEfF"/ é', max_size=30), st.integers(0, 30))
def test_unescape_of_a_prefix_is_a_prefix(text: str, length: int) -> None:
    """What a streaming decoder relies on, also for text that is not valid JSON."""
    assert unescape(text).startswith(unescape(text[:length]).rstrip("\ufffd"))


@given(st.text(alphabet='\\\\\\unrt"/bf0019aAeE é', max_size=24))
def test_unescape_agrees_with_json_wherever_it_is_json(text: str) -> None:
    try:
        expected = json.loads(f'"{text}"')
    except json.JSONDecodeError:
        return
    assert unescape(text) == expected


@pytest.mark.parametrize(
    "escaped, text",
    [
        (r"a\x41b", "aAb"),
        (r"\q stays", r"\q stays"),
        ('raw "quotes" and é', 'raw "quotes" and é'),
        (r"cut \u00", "cut \ufffd"),
        (r"cut \ud83d", "cut \ufffd"),
        (r"half \ud83d pair", "half \ufffd pair"),
        (r"\ud83d\ude00", "😀"),
        (r"\\\\n", r"\\n"),
    ],
)
def test_unescape_text_that_is_not_quite_json(escaped: str, text: str) -> None:
    assert unescape(escaped) == text
