"""The record of a map, the kinds of heads, and what is said about them."""

from __future__ import annotations

import base64
import zlib

import numpy as np
import pytest

from tests.support.maps import made, random_ends, windowed
from vllm_fox.maps.classes import CLASSES, classify
from vllm_fox.maps.figures import classes, dropped_first, drops_soonest, streams, summary
from vllm_fox.maps.kinds import RULES, kinds, rules
from vllm_fox.maps.record import ForgettingMap
from vllm_fox.maps.write import pack

T = 400
SOURCE = ["def", " f", "(", "x", "):", "\n    ", "return", " x", " +", " 17"] * (T // 10)


def sees(record: ForgettingMap) -> np.ndarray:
    """[L * S, queries, tokens] whether a query sees a token, from the definition."""
    query, token = np.arange(record.tokens)[:, None], np.arange(record.tokens)
    return (token <= query) & (query < record.flat[:, None])


def test_counts_are_those_of_the_definition() -> None:
    record = made(random_ends(2, 3, 60))
    seen = sees(record)
    assert np.array_equal(record.live, seen.sum(2))
    recent = np.arange(60)[:, None] - np.arange(60) < 7
    assert np.array_equal(record.seen_within(7), (seen & recent).sum(2))
    later = np.arange(59, 0, -1)
    assert np.allclose(record.seen_share[:, :-1], (seen.sum(1) - 1)[:, :-1] / later)
    pairs = np.tril(np.ones((60, 60))).sum()
    assert record.given_back_overall == pytest.approx(1 - seen.sum() / (6 * pairs))
    assert np.allclose(record.given_back, 1 - seen.sum((0, 2)) / (6 * np.arange(1, 61)))


def light_first(ends: np.ndarray, heavy: np.ndarray) -> np.ndarray:
    """Ends with those of punctuation replaced by three tokens later."""
    light = np.array([classify(piece) == "punctuation" for piece in SOURCE])
    return np.where(light, np.minimum(np.arange(T) + 3, T), heavy)


def test_each_kind_is_what_its_rule_says() -> None:
    always = np.full(T, T)
    # Line breaks are no punctuation.
    blank = np.where(np.array(SOURCE) == "\n    ", windowed(T, 2), windowed(T, 300))
    half = np.where(np.arange(T) % 2, windowed(T, 2), always)
    heads = {
        "global": [always, windowed(T, T - 5)],
        # An eighth of 400 tokens is 50. Of a window of 52, 50 are within.
        "local": [windowed(T, 1), windowed(T, 50), windowed(T, 52)],
        "punctuation-dropper": [light_first(always, always), light_first(always, windowed(T, 300))],
        "content-dependent": [windowed(T, 60), half, blank],
    }
    wanted = [kind for kind, ends in heads.items() for _ in ends]
    record = made(np.stack([one for ends in heads.values() for one in ends])[None], SOURCE)
    assert kinds(record) == wanted and set(wanted) == set(RULES)
    for number, stream in enumerate(streams(record)):
        assert stream.head == number and stream.kind == wanted[number]
        assert stream.says.startswith(f"Layer 0, head {number} ")


def test_where_pages_are_dropped_a_local_head_may_hold_two() -> None:
    ends = np.minimum((np.arange(T) // 64 + 2) * 64, T)
    assert kinds(made(ends[None, None], page_size=64)) == ["local"]
    # Pages are dropped for their age, whatever is in them.
    assert dropped_first(made(ends[None, None], page_size=64)) == [[], []]
    assert "the text decides" not in rules(made(ends[None, None], page_size=64))["content-dependent"]


def test_which_stream_drops_soonest() -> None:
    always, one_in_three = np.full(T, T), np.where(np.arange(T) % 3, np.full(T, T), np.arange(T) + 1)
    record = made(np.stack([always, windowed(T, 9), one_in_three])[None])
    assert drops_soonest(record) == (1, 8)


def test_what_is_dropped_first_is_said_by_token_and_by_class() -> None:
    ends = np.full(T, T)
    for piece, lives in (("(", 5), (" 17", 2), (" f", 40)):
        mine = np.array([one == piece for one in SOURCE])
        ends[mine] = np.minimum(np.flatnonzero(mine) + lives, T)
    record = made(np.stack([ends, np.full(T, T)])[None], SOURCE)
    first, never, together = dropped_first(record)
    assert [(one.token, one.lives, one.times) for one in first[:3]] == [
        (" 17", 2, 30),
        ("(", 5, 30),
        (" f", 40, 30),
    ]
    assert all(one.seen == 1 for one in never)
    assert [one.token for one in together[:3]] == [" 17", "(", " f"]
    by_class = classes(record)
    assert by_class.shape == (3, len(CLASSES)) and np.nanargmin(by_class[0]) == CLASSES.index("number")
    assert np.allclose(by_class[2], by_class[:2].mean(0))


def test_rare_tokens_are_not_listed() -> None:
    pieces = ["x"] * (T - 1) + ["end"]
    pieces[7] = pieces[9] = "rare"
    (mine, _) = dropped_first(made(np.full((1, 1, T), T), pieces))
    assert [one.token for one in mine] == ["x"]


@pytest.mark.parametrize(
    "text, kind",
    [
        ("\n    ", "whitespace"),
        ("", "whitespace"),
        (" +=", "punctuation"),
        ("_", "name"),
        (" while", "keyword"),
        ("42", "number"),
        (" naïve", "name"),
    ],
)
def test_classes_of_tokens(text: str, kind: str) -> None:
    assert classify(text) == kind


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_short_texts_have_figures_too(tokens: int) -> None:
    found = summary(made(random_ends(2, 2, tokens)))
    assert found["streams"] == 4 and sum(found["kinds"].values()) == 4
    assert 0 <= found["given_back"] <= 1


@pytest.mark.parametrize(("tokens", "page_size"), [(150, 1), (150, 64), (70_000, 1)])
def test_packed_ends_are_the_ends(tokens: int, page_size: int) -> None:
    """They are unpacked here as the page's script does it."""
    ends = random_ends(1, 2, tokens)
    first = np.arange(tokens) // page_size * page_size
    record = made(ends[:, :, first], page_size=page_size)
    packed, wide = pack(record)
    lives = np.frombuffer(zlib.decompress(base64.b64decode(packed)), "<u4" if wide else "<u2").reshape(2, -1)
    unpacked = np.where(lives == 0, tokens, np.arange(0, tokens, page_size) + lives)
    assert wide == (tokens > 65535) and np.array_equal(unpacked[:, np.arange(tokens) // page_size], record.flat)
