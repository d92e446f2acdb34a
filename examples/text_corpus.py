"""A folder of text files as token ids on disk: what train_fox.py reads."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
HELD_OUT = 50  # one file in so many, by a hash of its name, is for validation
TOKENIZER_SAMPLE = 50_000_000  # characters that the tokenizer is trained on at most


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


def prepare(text: Path, folder: Path, vocab_size: int, seed: int, tokenizer_file: Path | None = None) -> None:
    """Read, split and tokenize all text files under ``text`` into ``folder``, unless that was done before.

    Args:
        tokenizer_file: a tokenizer.json with ``<|endoftext|>``; one of ``vocab_size`` is trained unless given.

    Raises:
        SystemExit: there is no such folder or tokenizer, or no text.
    """
    wanted = {"text": str(text.resolve()), "vocab_size": vocab_size, "seed": seed, "tokenizer": str(tokenizer_file)}
    if (folder / "facts.json").exists():
        facts = json.loads((folder / "facts.json").read_text())
        if all(facts[name] == value for name, value in wanted.items()):
            return
    files = find_texts(text)
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    is_held_out = [_is_held_out(str(path.relative_to(text))) for path in files]
    if not any(is_held_out) or all(is_held_out):
        is_held_out = [n == len(files) - 1 and n > 0 for n in range(len(files))]
    if tokenizer_file is None:
        tokenizer = train_tokenizer(_sample(files, seed), vocab_size)
    else:
        tokenizer = _load_tokenizer(tokenizer_file)
    end = tokenizer.token_to_id(END)
    tokenizer.save(str(new / "tokenizer.json"))
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    parts: dict[bool, list[np.ndarray]] = {False: [], True: []}
    for start in range(0, len(files), 256):
        texts = [_read(path) or "" for path in files[start : start + 256]]
        for held, item in zip(is_held_out[start : start + 256], tokenizer.encode_batch_fast(texts)):
            parts[held].append(np.array([end, *item.ids], dtype=dtype))
    train, held_out = (np.concatenate(parts[held] or [np.empty(0, dtype)]) for held in (False, True))
    if not len(held_out):  # a single file: its end
        cut = max(1, len(train) // HELD_OUT)
        train, held_out = train[:-cut], train[-cut:]
    np.save(new / "train.npy", train)
    np.save(new / "held_out.npy", held_out)
    facts = wanted | {"files": len(files), "train_tokens": len(train), "held_out_tokens": len(held_out)}
    (new / "facts.json").write_text(json.dumps(facts, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def find_texts(folder: Path) -> list[Path]:
    """All files under a folder that are UTF-8 text, sorted; of exact copies the first, so that none is held out of
    training and trained on.

    Raises:
        SystemExit: there are none, or no folder.
    """
    if not folder.is_dir():
        raise SystemExit(f"{folder} is not a folder: name one that holds text files.")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    texts: dict[bytes, Path] = {}
    for path in files:
        if text := _read(path):
            texts.setdefault(hashlib.sha1(text.encode()).digest(), path)
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


def _load_tokenizer(file: Path) -> Tokenizer:
    if not file.is_file():
        raise SystemExit(f"{file} is not there: the checkpoint needs its tokenizer as tokenizer.json.")
    tokenizer = Tokenizer.from_file(str(file))
    if tokenizer.token_to_id(END) is None:
        raise SystemExit(f"{file} has no token {END}, which stands between texts.")
    return tokenizer


def _sample(files: list[Path], seed: int) -> list[str]:
    sample: list[str] = []
    size = 0
    for path in random.Random(seed).sample(files, len(files)):
        sample.append(_read(path) or "")
        size += len(sample[-1])
        if size >= TOKENIZER_SAMPLE:
            break
    return sample


def _read(path: Path) -> str | None:
    """The file's text; None if it is empty, unreadable or not text."""
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return None
    return None if not text.strip() or "\0" in text or END in text else text


def _is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha1(name.encode()).digest()[:4], "big") % HELD_OUT == 0
