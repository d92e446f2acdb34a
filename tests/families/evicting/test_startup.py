"""What is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.engines import engine
from tests.support.evicting import VARIANTS, Made, make_evicting
from vllm_fox.families import evicting


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_evicting(tmp_path_factory.mktemp("made"), VARIANTS["qwen3-borrowed"])


def refusal(model: Path, **options: int) -> str:
    with pytest.raises(ValueError) as error, engine(model, **options):
        pass
    return str(error.value)


def test_a_published_checkpoint_is_not_served_as_a_dense_model(made: Made) -> None:
    """Its ``model_type`` is qwen3, and it names no architecture."""
    found = refusal(made.published)
    assert f"{made.published} evicts tokens by DMS" in found
    assert f"run `python -m vllm_fox.convert {made.published} OUT` and serve OUT" in found


def test_a_borrowed_neuron_is_on_one_rank(made: Made) -> None:
    found = refusal(made.served, tensor_parallel_size=4)
    assert "do not support --tensor-parallel-size 4 with 2 KV heads and a borrowed neuron" in found


def test_lists_that_take_too_much_memory(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evicting, "LIST_BYTES", 2**18)
    found = refusal(made.served, max_model_len=2048, max_num_seqs=32)
    assert "--max-num-seqs 32 with --max-model-len 2048" in found and "lower one of the two" in found
