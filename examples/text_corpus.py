"""A folder of text files as token ids on disk: what the training scripts read."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from whole_files import Unreadable, files_under, pass_over, publish, read_record, read_text, refusal_said

END = "<|endoftext|>"
ENDS = (END, "<|end_of_text|>", "</s>")  # of tokenizers of other people, the first one that is known counts
HELD_OUT = 50  # one file in so many, by a hash of its name, is for validation
TOKENIZER_SAMPLE = 50_000_000  # characters that the tokenizer is trained on at most
NAMED = 5  # files that are not read, of which each is named


@dataclass
class Corpus:
    """Token ids, memory-mapped: every text behind one end-of-text token.

    Attributes:
        folder: where tokenizer.json, train.npy and held_out.npy lie.
        train, held_out: [tokens] uint16 or uint32.
        facts: files, characters and the like.
    """

    folder: Path
    train: np.ndarray
    held_out: np.ndarray
    facts: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Corpus:
        """What :func:`prepare` wrote."""
        train, held_out = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("train", "held_out"))
        return cls(folder, train, held_out, json.loads((folder / "facts.json").read_text()))

    def window(self, index: int, length: int) -> np.ndarray:
        """[length] int64: one of the training windows, which do not overlap."""
        return self.train[index * length : (index + 1) * length].astype(np.int64)


@lru_cache(maxsize=2)
def window_order(windows: int, epoch: int, seed: int) -> np.ndarray:
    """[windows] the order in which an epoch reads them: it follows from the seed, so nothing need be saved."""
    return np.random.default_rng([seed, epoch]).permutation(windows)


def prepare(
    text: Path,
    folder: Path,
    vocab_size: int,
    seed: int,
    tokenizer_file: Path | None = None,
    check: Callable[[int, int], None] = lambda train, held_out: None,
) -> None:
    """Read, split and tokenize all text files under ``text`` into ``folder``, unless that was done before.

    The folder that ``folder`` is in is not read, should it be under ``text``.

    Args:
        tokenizer_file: a tokenizer.json with one of :data:`ENDS`; one of ``vocab_size`` is trained unless given.
        check: is called with the numbers of tokens to train on and held out, before anything is written.

    Raises:
        SystemExit: there is no such folder or tokenizer, or no text, or the disk is full.
    """
    wanted = {"text": str(text.resolve()), "vocab_size": vocab_size, "seed": seed, "tokenizer": str(tokenizer_file)}
    if (facts := _prepared(folder, wanted)) is not None:
        check(facts["train_tokens"], facts["held_out_tokens"])
        return
    files = find_texts(text, folder.parent)
    is_held_out = [_is_held_out(path.relative_to(text)) for path in files]
    if not any(is_held_out) or all(is_held_out):
        is_held_out = [n == len(files) - 1 and n > 0 for n in range(len(files))]
    if tokenizer_file is None:
        tokenizer = train_tokenizer(_sample(files, seed), vocab_size)
    else:
        tokenizer = load_tokenizer(tokenizer_file)
    end = end_of_text(tokenizer)
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    parts: dict[bool, list[np.ndarray]] = {False: [], True: []}
    for start in range(0, len(files), 256):
        texts = [_read(path) for path in files[start : start + 256]]
        for held, item in zip(is_held_out[start : start + 256], tokenizer.encode_batch_fast(texts)):
            parts[held].append(np.array([end, *item.ids], dtype=dtype))
    train, held_out = (np.concatenate(parts[held] or [np.empty(0, dtype)]) for held in (False, True))
    if not len(held_out):  # a single file: its end
        cut = max(1, len(train) // HELD_OUT)
        train, held_out = train[:-cut], train[-cut:]
    check(len(train), len(held_out))
    facts = wanted | {"files": len(files), "train_tokens": len(train), "held_out_tokens": len(held_out)}
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    with refusal_said(folder, "the token ids were not written. Free some space and run the same command again."):
        new.mkdir(parents=True)
        tokenizer.save(str(new / "tokenizer.json"))
        np.save(new / "train.npy", train)
        np.save(new / "held_out.npy", held_out)
        (new / "facts.json").write_text(json.dumps(facts, indent=1))
        publish(new, folder)


def _prepared(folder: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The facts of what :func:`prepare` wrote, if it is there, whole and as ``wanted``."""
    facts = read_record(folder / "facts.json")
    if facts is None or any(facts.get(name) != value for name, value in wanted.items()):
        return None
    try:
        corpus = Corpus.open(folder)
        if (len(corpus.train), len(corpus.held_out)) != (facts["train_tokens"], facts["held_out_tokens"]):
            raise ValueError("not as many tokens as it should hold")
        if read_record(folder / "tokenizer.json") is None:
            raise ValueError("no tokenizer")
    except (OSError, ValueError, EOFError) as error:
        pass_over(str(folder), f"it is torn ({error})")
        return None
    return facts


def find_texts(folder: Path, without: Path | None = None) -> list[Path]:
    """All files under a folder that are UTF-8 text, sorted; of exact copies the first, so that none is held out of
    training and trained on. Of the others the first few are named on standard error.

    Args:
        without: a folder that is left out, such as the one that the program writes to.

    Raises:
        SystemExit: there are none, or no folder.
    """
    if not folder.is_dir():
        raise SystemExit(f"{folder} is not a folder: name one that holds text files.")
    if without is not None and folder.resolve() == without.resolve():
        raise SystemExit(f"{folder} holds the texts, and is to be written to as well: choose another --output.")
    left_out: list[Unreadable] = []
    files = files_under(folder, without, left_out.append)
    texts: dict[bytes, Path] = {}
    for path in files:
        try:
            if text := _read(path):
                texts.setdefault(hashlib.sha1(text.encode()).digest(), path)
        except Unreadable as error:
            left_out.append(error)
    for unread in left_out[:NAMED]:
        print(f"Passed over: {unread}", file=sys.stderr)
    if len(left_out) > NAMED:
        print(f"Passed over: {len(left_out) - NAMED} more files of {folder}.", file=sys.stderr)
    if not texts:
        what = f"none of its {len(files)} files is UTF-8 text" if files else "it is empty"
        raise SystemExit(f"{folder} holds no text to train on: {what}.")
    return list(texts.values())


def train_tokenizer(sample: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE in which the end-of-text token has id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def load_tokenizer(file: Path) -> Tokenizer:
    """A tokenizer.json that knows the end of text. Raises SystemExit if it is none."""
    if not file.is_file():
        raise SystemExit(f"{file} is not there: the checkpoint needs its tokenizer as tokenizer.json.")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # of no narrower type
        raise SystemExit(f"{file} is no tokenizer: {error}.") from None
    if end_of_text(tokenizer) is None:
        raise SystemExit(f"{file} has none of the tokens {', '.join(ENDS)}: one has to stand between texts.")
    return tokenizer


def end_of_text(tokenizer: Tokenizer) -> int | None:
    """The id of the token that stands between texts."""
    found = (tokenizer.token_to_id(name) for name in ENDS)
    return next((number for number in found if number is not None), None)


def _sample(files: list[Path], seed: int) -> list[str]:
    sample: list[str] = []
    size = 0
    for path in random.Random(seed).sample(files, len(files)):
        sample.append(_read(path))
        size += len(sample[-1])
        if size >= TOKENIZER_SAMPLE:
            break
    return sample


def _read(path: Path) -> str:
    """The file's text; empty if there is nothing but space in it. Raises Unreadable if it is not text."""
    text = read_text(path)
    if "\0" in text:
        raise Unreadable(f"{path} is not text: it has a character of code 0.")
    if END in text:
        raise Unreadable(f"{path} has {END} in it, which stands between texts.")
    return text if text.strip() else ""


def _is_held_out(name: Path) -> bool:
    return int.from_bytes(hashlib.sha1(os.fsencode(name)).digest()[:4], "big") % HELD_OUT == 0
