"""The tokenizer of the published FoX checkpoints: GPT-2 BPE over JSON-escaped text.

Their training text (LongCrawl64) was stored JSON-escaped and never unescaped, so these models read and write
``\\n`` for a line break and ``\\u00e9`` for é. This tokenizer translates in both directions: it escapes when it
encodes, and the decoder of the Rust tokenizer unescapes. Streamed text goes through that decoder, so it equals
text that is decoded all at once.

The result differs from Python's ``json.loads`` on the whole text in three cases. A text that is not valid JSON is
decoded piece by piece (JSON's escapes and Python's ``\\x41``, ``\\'``, ``\\a``, ``\\v``; everything else stays as
it is) instead of by ``unicode_escape`` as a whole, which a stream could not do. Half a surrogate pair becomes
U+FFFD, because it has no UTF-8 form. So does an escape that the end of the text cuts off.

Grammars of structured output constrain the escaped text, because that is what the model writes.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import Tokenizer, decoders
from transformers import AutoTokenizer, GPT2Tokenizer, PretrainedConfig

_REPLACEMENT = "\ufffd"
_SHORT = {
    '"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t",
    "'": "'", "a": "\a", "v": "\v",
}  # fmt: skip
_ESCAPE = re.compile(
    r"""
    \\ (?:
        u (?P<high> [dD][89abAB][0-9a-fA-F]{2} ) \\u (?P<low> [dD][c-fC-F][0-9a-fA-F]{2} )
      | u (?P<code> [0-9a-fA-F]{4} )
      | x (?P<byte> [0-9a-fA-F]{2} )
      | (?P<short> ["\\/bfnrt'av] )
      | (?P<cut> (?: u[0-9a-fA-F]{0,3} | x[0-9a-fA-F]? )? ) \Z
    )
    """,
    re.VERBOSE,
)


def escape(text: str) -> str:
    """Return what the model reads for ``text``: its JSON string literal, in ASCII and without the quotes."""
    return json.dumps(text)[1:-1]


def unescape(text: str) -> str:
    """Return the text that the model meant by ``text``. This is the inverse of :func:`escape`.

    A longer input never changes what was returned for its beginning, except for U+FFFD at the end. That character
    says that more input is needed, and streaming decoders wait until it is gone.
    """
    return _ESCAPE.sub(_unescape_one, text)


def _unescape_one(match: re.Match[str]) -> str:
    kind, value = match.lastgroup, match.group(match.lastgroup or 0)
    if kind == "short":
        return _SHORT[value]
    if kind == "low":
        return chr(0x10000 + (int(match["high"], 16) - 0xD800) * 0x400 + int(value, 16) - 0xDC00)
    if kind in ("code", "byte"):
        point = int(value, 16)
        return _REPLACEMENT if 0xD800 <= point < 0xE000 else chr(point)
    return _REPLACEMENT


class _Unescaping:
    """A decoder for the Rust tokenizer. It turns byte-level pieces into text and unescapes it."""

    def __init__(self) -> None:
        self._bytes = decoders.ByteLevel()

    def decode_chain(self, tokens: list[str]) -> list[str]:
        return [unescape(self._bytes.decode(tokens))]


class _EscapingGPT2Tokenizer(GPT2Tokenizer):
    # A class of its own, because transformers loads a tokenizer.json whole, with its added tokens, only into
    # classes that define no __init__ themselves.

    _tokenizer: Tokenizer  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._attach_decoder()

    def _attach_decoder(self) -> None:
        self._tokenizer.decoder = decoders.Decoder.custom(_Unescaping())

    def _encode_plus(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> Any:
        return super()._encode_plus(_escape_all(text), _escape_all(text_pair), *args, **kwargs)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the unescaped text of token pieces."""
        return self._tokenizer.decoder.decode(tokens)

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """A copy of the Rust tokenizer that does not unescape: a decoder written in Python cannot be saved."""
        return _with_plain_decoder(self._tokenizer)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokenizer": _with_plain_decoder(self._tokenizer)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._attach_decoder()


class JSONGPT2Tokenizer(_EscapingGPT2Tokenizer):
    """GPT-2 BPE over ``json.dumps(text)[1:-1]``; text goes in and comes out unescaped.

    Offsets that it returns on request are offsets into the escaped text.
    """


class _PublishedTokenizerConfig(PretrainedConfig):
    """The config of no model. AutoTokenizer registers a tokenizer class by name only with a config class."""

    model_type = "vllm-fox-json-gpt2"


def register_tokenizer() -> None:
    """Let AutoTokenizer find ``"tokenizer_class": "JSONGPT2Tokenizer"``; safe to call again."""
    AutoTokenizer.register(_PublishedTokenizerConfig, JSONGPT2Tokenizer, exist_ok=True)


def _escape_all(text: Any) -> Any:
    if isinstance(text, str):
        return escape(text)
    if isinstance(text, (list, tuple)):
        return type(text)(_escape_all(part) for part in text)
    return text


def _with_plain_decoder(tokenizer: Tokenizer) -> Tokenizer:
    plain = Tokenizer(tokenizer.model)
    if tokenizer.normalizer is not None:
        plain.normalizer = tokenizer.normalizer
    if tokenizer.pre_tokenizer is not None:
        plain.pre_tokenizer = tokenizer.pre_tokenizer
    if tokenizer.post_processor is not None:
        plain.post_processor = tokenizer.post_processor
    plain.decoder = decoders.ByteLevel()
    for _, token in sorted(tokenizer.get_added_tokens_decoder().items()):
        (plain.add_special_tokens if token.special else plain.add_tokens)([token])
    if tokenizer.truncation is not None:
        plain.enable_truncation(**tokenizer.truncation)
    if tokenizer.padding is not None:
        plain.enable_padding(**tokenizer.padding)
    plain.encode_special_tokens = tokenizer.encode_special_tokens
    return plain
