"""vLLM's switches for KV cache, scheduling and compilation that our models accept: answers stay what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from vllm import LLM, TokensPrompt
from vllm.config import KVEventsConfig
from vllm.v1.core.sched.scheduler import Scheduler

from benchmarks.engines import engine, generate, greedy, manager, num_blocks, scheduler, source_tokens, step
from tests.support.checkpoints import PRO, make_checkpoint, save_sparse_gpt2
from tests.support.engines import a_layer, assert_all_free, assert_gone
from tests.support.reference_model import reference_logits
from tests.support.reference_sparse_gpt2 import reference_logits as sparse_gpt2_logits
from tests.support.startup import refused
from vllm_fox.families import family_of

PAGE, LENGTHS, ANSWER = 16, (5, 100, 230, 400), 24
OUTPUT_EMBEDDINGS = {"fox": "lm_head.weight", "sparse": "transformer.wte.weight"}
INPUT_EMBEDDINGS = {"fox": "model.embeddings.weight", "sparse": "transformer.wte.weight"}


@pytest.fixture(scope="module", params=["fox", "sparse"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(family)
    return make_checkpoint(folder, **PRO) if family == "fox" else save_sparse_gpt2(folder, block_size=4096)


def answers(llm: LLM) -> list[list[int]]:
    """Greedy answers to some prompts that are sent together. All pages are free afterwards."""
    prompts = [source_tokens(llm, length, seed=length) for length in LENGTHS]
    outs = generate(llm, prompts, greedy(ANSWER))
    assert manager(llm).pool.released_total > 0
    assert_all_free(llm)
    return [list(out.outputs[0].token_ids) for out in outs]


class Usual(NamedTuple):
    """What an engine does that nothing was switched at.

    Attributes:
        answers: its answers.
        block_bytes: bytes of one of its blocks.
    """

    answers: list[list[int]]
    block_bytes: int


@pytest.fixture(scope="module")
def usual(model: Path) -> Usual:
    with engine(model, {"page_size": PAGE}, max_model_len=512) as llm:
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        return Usual(answers(llm), manager(llm).kv_cache_spec.page_size_bytes * len(layers))


WAYS: dict[str, dict[str, Any]] = {
    "whole_prompts": {"enable_chunked_prefill": False, "max_num_batched_tokens": 1024},
    "no_compilation": {"enforce_eager": False, "compilation_config": {"mode": 0}},
    "stock_compilation": {"enforce_eager": False, "compilation_config": {"mode": 1, "backend": "eager"}},
    "one_graph": {"enforce_eager": False, "compilation_config": {"backend": "eager", "splitting_ops": []}},
    "level_1": {
        "enforce_eager": False,
        "optimization_level": 1,
        "performance_mode": "throughput",
        "compilation_config": {"backend": "eager"},
    },
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_ways_to_run_a_model(model: Path, options: dict[str, Any], usual: Usual) -> None:
    with engine(model, {"page_size": PAGE}, max_model_len=512, **options) as llm:
        assert answers(llm) == usual.answers
        layer = a_layer(llm)
    del llm
    assert_gone(layer)


def test_priorities(model: Path) -> None:
    """Where memory is short, the least urgent request gives way, and an urgent one overtakes those that wait."""
    with engine(model, {"page_size": PAGE}, max_model_len=512, scheduling_policy="priority", max_num_seqs=3) as llm:
        prompts = {f"r{n}": source_tokens(llm, 150, seed=n) for n in range(5)}
        alone = {name: list(generate(llm, [p], greedy(80))[0].outputs[0].token_ids) for name, p in prompts.items()}

        def ask(name: str, priority: int) -> None:
            prompt = TokensPrompt(prompt_token_ids=prompts[name])
            llm.llm_engine.add_request(name, prompt, greedy(80), priority=priority)

        for n in range(4):
            ask(f"r{n}", priority=10 + n)
        for _ in range(20):
            step(llm)
        ask("r4", priority=0)
        blocks, preempted = scheduler(llm).kv_cache_manager.block_pool, set[str]()
        aside = blocks.get_new_blocks(blocks.get_num_free_blocks())
        finished: dict[str, list[int]] = {}
        while llm.llm_engine.has_unfinished_requests():
            if finished and aside:
                blocks.free_blocks(aside)
                aside = []
            for out in step(llm):
                if out.finished:
                    finished[out.request_id] = list(out.outputs[0].token_ids)
            # vLLM appends something random to a request's name.
            preempted |= {name[:2] for name, one in scheduler(llm).requests.items() if one.num_preemptions}
        print(list(finished), preempted)
        assert "r2" in preempted and not {"r0", "r4"} & preempted
        assert list(finished).index("r4") < list(finished).index("r3")
        assert finished == alone
        assert_all_free(llm)


def hidden_states(family: str, model: Path, tokens: list[int]) -> torch.Tensor:
    """The float64 reference's final hidden states [T, hidden]: there are fewer of them than logits."""
    formula: Callable[..., torch.Tensor] = reference_logits if family == "fox" else sparse_gpt2_logits
    head = load_file(model / "model.safetensors")[OUTPUT_EMBEDDINGS[family]].double()
    return torch.linalg.lstsq(head, formula(model, tokens).T).solution.T


@pytest.mark.parametrize("pooling", ["LAST", "MEAN"])
def test_embeddings_of_texts(family: str, model: Path, pooling: str) -> None:
    options = {"runner": "pooling", "convert": "embed", "pooler_config": {"pooling_type": pooling}}
    with engine(model, {"page_size": PAGE}, max_model_len=512, **options) as llm:
        prompts = [source_tokens(llm, length, seed=length) for length in (5, 200)]
        outs = llm.embed([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], use_tqdm=False)
        assert_all_free(llm)
    for prompt, out in zip(prompts, outs, strict=True):
        states = hidden_states(family, model, prompt)
        state = states[-1] if pooling == "LAST" else states.mean(0)
        # Unit vectors in float32, whose u is 6e-8, after the roundings of all layers.
        torch.testing.assert_close(
            torch.tensor(out.outputs.embedding).double(), state / state.norm(), atol=1e-5, rtol=0
        )


class OwnScheduler(Scheduler):
    """A scheduler as users extend it."""


SWITCHES: dict[str, Any] = {
    # KV cache and memory
    "enable_prefix_caching": True,
    "prefix_caching_hash_algo": "sha256_cbor",
    "disable_hybrid_kv_cache_manager": True,
    "disable_sliding_window": True,
    "kv_sharing_fast_prefill": True,
    "kv_cache_dtype_skip_layers": ["0"],
    "kv_events_config": KVEventsConfig(),
    "swa_bounded_replay": False,
    "gpu_memory_utilization": 0.3,
    "max_model_len": -1,
    # scheduling
    "scheduler_cls": OwnScheduler,
    "scheduling_policy": "priority",
    "scheduler_reserve_full_isl": False,
    "watermark": 0.1,
    "max_num_batched_tokens": 256,
    "max_num_scheduled_tokens": 200,
    "max_num_active_seqs": 3,
    "long_prefill_token_threshold": 64,
    "long_prefill_token_threshold_adaptive": True,
    "prefill_schedule_interval": 2,
    "stream_interval": 4,
    # what comes in and goes out
    "enable_prompt_embeds": True,
    "use_fp64_gumbel": True,
    "cudagraph_metrics": True,
}


@pytest.fixture(scope="module")
def switched(model: Path, usual: Usual) -> Iterator[LLM]:
    """An engine that everything harmless was switched at, with memory for 1000 tokens that nobody forgets.

    It lives until the last test of its family, and vLLM has one connector in a process, so no other may start then.
    """
    memory = 64 * usual.block_bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLLM_CPU_KVCACHE_SPACE")  # on a CPU it wins over kv_cache_memory_bytes
        with engine(model, {"page_size": PAGE}, kv_cache_memory_bytes=memory, **SWITCHES) as llm:
            assert num_blocks(llm) == 63
            yield llm


def test_harmless_switches_change_nothing(switched: LLM, usual: Usual) -> None:
    config = switched.llm_engine.vllm_config
    assert config.cache_config.enable_prefix_caching is family_of(config.model_config.hf_config).shares_pages
    assert config.scheduler_config.disable_hybrid_kv_cache_manager
    assert isinstance(scheduler(switched), OwnScheduler)
    assert scheduler(switched).kv_cache_manager.watermark_blocks > 0
    assert answers(switched) == usual.answers


def test_length_that_fits_into_memory(switched: LLM) -> None:
    """``--max-model-len -1``: a request of the length that vLLM finds can be served."""
    spec = manager(switched).kv_cache_spec
    length = switched.llm_engine.vllm_config.model_config.max_model_len
    assert length == num_blocks(switched) * spec.block_size < spec.max_model_len
    (out,) = generate(switched, [source_tokens(switched, length - ANSWER)], greedy(ANSWER))
    assert len(out.outputs[0].token_ids) == ANSWER
    assert_all_free(switched)


def test_embeddings_as_a_prompt(switched: LLM, family: str, model: Path, usual: Usual) -> None:
    table = load_file(model / "model.safetensors")[INPUT_EMBEDDINGS[family]]
    prompts = [table[torch.tensor(source_tokens(switched, length, seed=length))] for length in LENGTHS]
    outs = switched.generate([{"prompt_embeds": prompt} for prompt in prompts], greedy(ANSWER), use_tqdm=False)
    assert [list(out.outputs[0].token_ids) for out in outs] == usual.answers


def test_a_second_engine_in_the_process(switched: LLM, model: Path) -> None:
    what = "a second engine in one process (VLLM_ENABLE_V1_MULTIPROCESSING=0)"
    assert f"do not support {what}: leave it out." in refused(model)
