"""``vllm-fox plan``: its numbers are those of ``inspect``, of the page formats and of any sharing out of heads."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.distributed.utils import get_pp_indices
from vllm.v1.kv_cache_interface import FullAttentionSpec

from tests.support.checkpoints import make_checkpoint
from tests.support.evicting import VARIANTS, make_evicting
from vllm_fox.cli.capacity import Capacity, Limit
from vllm_fox.cli.facts import facts_of
from vllm_fox.kernels.subset.pages import SubsetPageFormat
from vllm_fox.pages.geometry import PageGeometry

from .conftest import Run, documented
from .test_inspect import LLAMA


def rows(run: Run, *words: str | Path) -> dict[tuple[int, int], dict[str, Any]]:
    """By tokens and tensor-parallel size."""
    return {(row["tokens"], row["tp"]): row for row in run("plan", *words, "--json").json()["rows"]}


def test_one_gpu_is_what_inspect_says(run: Run, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, fgate_type="bias_only", qk_norm=True)
    words = ["--tokens", "300", "4096", "--memory", "3.5"]
    found = rows(run, folder, *words, "--tp", "1", "--max-num-seqs", "900")
    for row in run("inspect", folder, *words, "--json").json()["requests"]:
        mine = found[row["tokens"], 1]
        assert mine["dense_fit"] == row["dense_fit"] > 0 and mine["dense_limit"] == "KV memory"
        assert mine["pruned_fit"] == row["pruned_fit_at_least"] and mine["pruned_from"] == "proved"


def test_heads_and_layers_are_shared_out(tmp_path: Path) -> None:
    """However heads come to two ranks and layers to two stages, no rank holds more than was planned for."""
    facts = facts_of(make_checkpoint(tmp_path, fgate_type="bias_only", qk_norm=True, num_heads=4, num_kv_heads=4))
    pages, width = facts.pages_at_most(4096), facts.kv_heads
    assert pages is not None and len(set(pages)) > 1
    one = Capacity(facts, 3.5, ranks=2, stages=2)
    assert one.kv_bytes > Capacity(facts, 3.5).kv_bytes
    planned = one.pruned_at_least(4096)
    assert planned is not None and planned.limit is Limit.MEMORY
    order = random.Random(0)
    for _ in range(20):
        heads = [order.sample(pages[at : at + width], width) for at in range(0, len(pages), width)]
        for stage in range(2):
            first, end = get_pp_indices(facts.layers, stage, 2)
            held = sum(sum(layer[: width // 2]) for layer in heads[first:end])
            assert one._fit(4096, held).requests >= planned.requests


def test_bytes_of_a_page_on_a_rank(tmp_path: Path, dcp_tiny: Path, fox_tiny: Path) -> None:
    """DCP's pages and vLLM's blocks hold all heads of a rank; others hold one KV head wherever it is."""
    dcp = facts_of(dcp_tiny)
    assert dcp.page_bytes_on(5) == SubsetPageFormat(16, 1, 32, 32, torch.bfloat16, torch.bfloat16).page_bytes
    fox = facts_of(fox_tiny)
    assert fox.page_bytes_on(8) == fox.page_bytes_on(1) == fox.page_bytes
    evicting = facts_of(make_evicting(tmp_path, VARIANTS["qwen3-borrowed"]).served)
    assert evicting.page_bytes_on(2) == evicting.page_bytes
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    llama = facts_of(tmp_path)
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=32, dtype=torch.bfloat16)
    assert llama.page_bytes_on(2) == llama.page_bytes_on(8) == spec.page_size_bytes == llama.page_bytes // 2


def test_more_gpus_and_shorter_requests_fit_more(run: Run, fox_tiny: Path) -> None:
    found = rows(
        run, fox_tiny, "--memory", "3.5", "--tokens", "2048", "8192", "--tp", "1", "2", "--max-num-seqs", "9999"
    )
    assert found[8192, 2]["dense_fit"] == pytest.approx(2 * found[8192, 1]["dense_fit"], rel=0.1)
    assert found[2048, 1]["dense_fit"] == pytest.approx(4 * found[8192, 1]["dense_fit"], rel=0.05)
    assert all(row["pruned_fit"] is None and row["pruned_from"] is None for row in found.values())
    measured = rows(run, fox_tiny, "--memory", "3.5", "--tokens", "8192", "--tp", "1", "--live-share", "0.25")
    fit = measured[8192, 1]["pruned_fit"]
    # Besides, the chunk of a prompt that is being read is held.
    assert measured[8192, 1]["pruned_from"] == "measured" and 0 <= fit - 4 * (found[8192, 1]["dense_fit"] - 1) < 4


def test_what_limits(run: Run, fox_tiny: Path) -> None:
    """A number of requests, memory, weights, and the page table where little of long requests lives."""
    assert rows(run, fox_tiny, "--gpu", "H100", "--tp", "1")[2048, 1]["dense_limit"] == "--max-num-seqs"
    few = rows(run, fox_tiny, "--gpu", "L4", "--tp", "1", "--max-num-seqs", "7")[8192, 1]
    assert few["dense_fit"] == 7 and few["dense_limit"] == "--max-num-seqs"
    none = rows(run, fox_tiny, "--memory", "3", "--tp", "1")[2048, 1]
    assert none["dense_fit"] == none["kv_bytes"] == 0 and none["dense_limit"] == "weights"
    words = ["--memory", "3.5", "--max-num-seqs", "9999", "--tp", "1", "--live-share", "0.002"]
    sparse = rows(run, fox_tiny, *words)[8192, 1]
    assert sparse["pruned_limit"] == "page table"
    facts = facts_of(fox_tiny)
    blocks = sparse["kv_bytes"] // (facts.streams * facts.page_bytes)
    table = PageGeometry.sized([facts.streams], facts.page_bytes, 64, 9999, 8192, blocks)
    assert sparse["pruned_fit"] == (table.num_chunks - 1) // table.max_chunks


def test_text(run: Run, fox_tiny: Path, tmp_path: Path) -> None:
    done = run("plan", fox_tiny, "--gpu", "A100-80GB", "--pp", "2")
    assert done.code == 0 and "on GPUs with 80 GiB (A100-80GB), in 2 pipeline stages:" in done.out
    assert "not known" in done.out and "256" in done.out and "`vllm-fox top`" in done.out
    done = run("plan", fox_tiny, "--memory", "80", "--live-share", "0.3", "--tokens", "9000")
    assert "about 1,024" in done.out and "30.0% of what is dense" in done.out
    assert "9,000 tokens are more than the longest context" in done.out
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"max_position_embeddings": 10**7}))
    done = run("plan", tmp_path, "--memory", "4", "--tp", "1", "2")
    assert "vLLM starts only if a request" in done.out and "at least" in done.out


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--memory", "80", "--gpu", "H100"], ["--gpu is H100", "give one"]),
        (["--gpu", "H1000"], ["--gpu is H1000", "H100, H200"]),
        (["--memory", "80", "--tp", "3"], ["--tp is 3", "8 KV heads"]),
        (["--memory", "80", "--pp", "5"], ["--pp is 5", "4 layers"]),
        (["--memory", "80", "--live-share", "30"], ["--live-share is 30", "such as 0.3"]),
    ],
)
def test_mistakes(run: Run, fox_tiny: Path, words: list[str], parts: list[str]) -> None:
    done = run("plan", fox_tiny, *words)
    assert done.code == 2 and not done.out and done.err.count("\n") == 1
    assert all(part in done.err for part in parts), done.err


def test_what_a_family_refuses(run: Run, dcp_tiny: Path, tmp_path: Path) -> None:
    """By the words in which the engine refuses it."""
    done = run("plan", dcp_tiny, "--memory", "8", "--pp", "2")
    assert done.code == 2 and "pipeline stages (--pipeline-parallel-size 2)" in done.err
    made = make_evicting(tmp_path, VARIANTS["qwen3-layer"])
    done = run("plan", made.served, "--memory", "8", "--tp", "2")
    assert done.code == 2 and "the first KV head decides for its layer" in done.err
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    done = run("plan", tmp_path, "--memory", "8", "--live-share", "0.5")
    assert done.code == 2 and "drops nothing: leave it out" in done.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_to_look_at(run: Run, fox_tiny: Path) -> None:
    done = run("plan", fox_tiny)
    assert done.code == 2 and "give --gpu" in done.err and "--memory" in done.err


def test_json_has_the_documented_keys(run: Run, fox_tiny: Path) -> None:
    found = run("plan", fox_tiny, "--memory", "80", "--json").json()
    assert {*found, *found["rows"][0]} == documented("plan")
