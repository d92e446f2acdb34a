"""A map from an engine's pages is the map from transformers."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path

import numpy as np
import pytest

from tests.families.windowed.config import WindowedConfig
from tests.support.checkpoints import make_checkpoint, save_tokenizer
from tests.support.evicting import VARIANTS, make_evicting
from vllm_fox.maps.collect import collect, tokenize
from vllm_fox.maps.figures import summary

TEXT = inspect.getsource(textwrap)
TOKENS = 1100


@pytest.fixture(scope="module")
def evicting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder whose tokens each decide about the one before, KV head by KV head."""
    return make_evicting(tmp_path_factory.mktemp("evicting"), VARIANTS["qwen3-borrowed"]).served


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Forgetting Transformer with two query heads for each KV head, whose config names no tolerance."""
    folder = tmp_path_factory.mktemp("grouped")
    return make_checkpoint(folder, "fla", num_kv_heads=2, qk_norm=True, log_pruning_tolerance=None)


@pytest.mark.parametrize(
    ("model", "shape", "page_size"),
    [
        ("fox_tiny", (4, 8), 16),
        ("grouped", (2, 2), 16),
        ("dcp_tiny", (4, 1), None),
        ("evicting", (2, 2), None),
    ],
)
def test_both_sources_are_the_same(
    model: str, shape: tuple[int, int], page_size: int | None, request: pytest.FixtureRequest
) -> None:
    """Decisions are bit for bit the same in float32 as long as no score is within rounding of its threshold, which
    none is here."""
    folder = request.getfixturevalue(model)
    heard: list[tuple[int, int]] = []
    one, other = (
        collect(
            folder,
            TEXT,
            source=source,
            max_tokens=TOKENS,
            page_size=page_size,
            dtype="float32",
            progress=lambda done, total: heard.append((done, total)),
        )
        for source in ("transformers", "engine")
    )
    assert one.ends.shape == other.ends.shape == (*shape, TOKENS)
    assert np.array_equal(one.ends, other.ends)
    assert one.pieces == other.pieces and TEXT.startswith("".join(one.pieces))
    assert (one.source, other.source) == ("transformers", "engine")
    assert heard == [(TOKENS, TOKENS), *[(n, TOKENS) for n in (512, 1024, TOKENS)]]
    # Each stream has something to tell, and tokens are seen by their own queries.
    assert 0.2 < summary(one)["given_back"] < 0.99
    assert (one.flat > np.arange(TOKENS)).all() and (one.flat <= TOKENS).all()


def test_a_forgetting_transformer_drops_whole_pages(fox_tiny: Path) -> None:
    record = collect(fox_tiny, TEXT, max_tokens=TOKENS)
    assert record.page_size == 64
    assert (
        record.flat[:, : TOKENS // 64 * 64].reshape(32, -1, 64) == record.flat[:, : TOKENS // 64 * 64 : 64, None]
    ).all()
    assert ((record.flat % 64 == 0) | (record.flat == TOKENS)).all()


def test_no_more_is_read_than_the_model_can(dcp_tiny: Path) -> None:
    record = collect(dcp_tiny, TEXT)
    assert record.tokens == 2047 and record.text_tokens > 3000


def test_pieces_are_the_text(fox_tiny: Path, dcp_tiny: Path) -> None:
    text = "naïve = '日本語 🦊'\n\tprint(naïve)  # ½\n"
    for folder in (fox_tiny, dcp_tiny):
        pieces, ids = tokenize(folder, text)
        assert "".join(pieces) == text and len(pieces) == len(ids)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, drop=("model.norm.weight",))
    with pytest.raises(ValueError, match=r"has no tensor model\.norm\.weight: copy the checkpoint again"):
        collect(tmp_path, TEXT)


def test_an_empty_text_is_refused(fox_tiny: Path) -> None:
    with pytest.raises(ValueError, match="TEXT is empty: give a text of at least one token"):
        collect(fox_tiny, "")


def test_a_family_that_has_no_maps_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The family of the guide, from another package."""
    installed = tmp_path_factory.mktemp("site")
    (installed / "windowed-1.0.dist-info").mkdir()
    (installed / "windowed-1.0.dist-info" / "METADATA").write_text("Name: windowed\nVersion: 1.0\n")
    (installed / "windowed-1.0.dist-info" / "entry_points.txt").write_text(
        "[vllm_fox.families]\nwindowed = tests.families.windowed:WINDOWED\n"
    )
    monkeypatch.syspath_prepend(installed)
    WindowedConfig().save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(
        ValueError, match="No map can be made of Windowed decoders from transformers: their family does"
    ):
        collect(tmp_path, TEXT)


def test_a_model_of_no_family_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="model_type is gpt2: no family of vllm-fox has such models"):
        collect(tmp_path, TEXT)
