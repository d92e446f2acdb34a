"""What a token is, as far as its text tells."""

from __future__ import annotations

import keyword
import string

CLASSES = ("whitespace", "punctuation", "keyword", "number", "name")
"""Classes of tokens. A keyword is one of Python; everything that is none of the others counts as a name or word."""


def classify(text: str) -> str:
    """Return what a token is: one of :data:`CLASSES`."""
    word = text.strip()
    if not word:
        return "whitespace"
    if all(character in string.punctuation and character != "_" for character in word):
        return "punctuation"
    if keyword.iskeyword(word):
        return "keyword"
    return "number" if word.isdigit() else "name"
