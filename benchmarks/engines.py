"""Real vLLM engines in this process, for benchmarks and tests: started, looked into, and shut down."""

from __future__ import annotations

import contextlib
import gc
import inspect
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from vllm import LLM, RequestOutput, SamplingParams, TokensPrompt
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

from vllm_fox.pages.manager import StreamPageManager

GPU_DEFAULTS: dict[str, Any] = {
    "enforce_eager": False,
    "max_num_batched_tokens": 8192,
    # What vLLM wants to find free, and what the cache takes: several engines, in one process or in several, find
    # room on a card. Without the second, vLLM measures free memory, and fails if a neighbour frees some meanwhile.
    "gpu_memory_utilization": 0.25,
    "kv_cache_memory_bytes": 8 * 2**30,
    "num_gpu_blocks_override": 2000,
}
"""vLLM's default flags on a GPU, as far as they matter here."""


def processes_under(pid: int, name: str) -> list[psutil.Process]:
    """Processes that ``pid`` has started, and those that these have, with ``name`` in their command line."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        # Some end while they are looked at.
        with contextlib.suppress(psutil.NoSuchProcess):
            if name in "".join(process.cmdline()):
                found.append(process)
    return found


@contextlib.contextmanager
def engine(model: str | Path, fox: dict[str, Any] | None = None, **options: Any) -> Iterator[LLM]:
    """A real engine in this process; float32, eager, and with NaN in free pages, unless told otherwise."""
    options = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 32,
        "disable_log_stats": False,
        "seed": 0,
        **options,
    }
    options["additional_config"] = {"fox": {"poison_free_pages": True, **(fox or {})}}
    gc.collect()  # an engine that ended earlier may be garbage only now, and sleep mode allows one in a process
    llm = LLM(model=str(model), **options)
    try:
        yield llm
    finally:
        unhook(llm)
        llm.llm_engine.engine_core.shutdown()
        del llm
        LAYERWISE_INFO.clear()  # what it says of weights that come later would keep their model for good
        cleanup_dist_env_and_memory()
        gc.collect()
        # A worker on a CPU looks through all modules when it starts, and fails at one that vLLM's n-gram
        # drafter has imported. Nobody looks this module up again.
        sys.modules.pop("llvmlite.binding.ffi", None)


def unhook(llm: LLM) -> None:
    """Take a compiled model's hooks out of PyTorch, which would keep it, and its KV cache, for good.

    vLLM does so when an engine is collected, if its model is still there. After a shutdown it no longer is.
    """
    executor: Any = getattr(llm.llm_engine, "model_executor", None)  # of an engine in this process
    worker = getattr(executor, "driver_worker", None)  # of a model in this process
    if worker is not None:
        for module in worker.model_runner.model.modules():
            if isinstance(module, TorchCompileWithNoGuardsWrapper):
                module.cleanup()


def scheduler(llm: LLM) -> Any:
    """vLLM's scheduler of an in-process engine."""
    client: Any = llm.llm_engine.engine_core
    return client.engine_core.scheduler


def step(llm: LLM) -> list[RequestOutput]:
    """One step of the engine; what it has to say of each request."""
    return [out for out in llm.llm_engine.step() if isinstance(out, RequestOutput)]


def manager(llm: LLM) -> StreamPageManager:
    """Our page manager inside it."""
    (found,) = scheduler(llm).kv_cache_manager.coordinator.single_type_managers
    assert isinstance(found, StreamPageManager)
    return found


def usage(llm: LLM) -> float:
    """vLLM's own KV-cache gauge, 0 to 1."""
    return scheduler(llm).kv_cache_manager.usage


def num_blocks(llm: LLM) -> int:
    """Blocks that requests can have (all but the null block)."""
    return scheduler(llm).kv_cache_manager.block_pool.num_gpu_blocks - 1


def source_tokens(llm: LLM, count: int, seed: int = 0) -> list[int]:
    """``count`` tokens of real Python source (the standard library), another piece for every seed."""
    import argparse
    import asyncio.base_events
    import collections
    import difflib
    import doctest
    import inspect as inspect_module
    import pdb
    import statistics
    import tarfile
    import typing
    import zipfile

    modules = [argparse, tarfile, typing, zipfile, doctest, difflib, inspect_module, pdb, statistics]
    modules += [collections, asyncio.base_events]
    tokenizer = llm.get_tokenizer()
    tokens: list[int] = []
    order = random.Random(seed)
    while len(tokens) < count:
        text = inspect.getsource(order.choice(modules))
        tokens += tokenizer.encode(text[order.randrange(len(text) // 2) :])
    return tokens[:count]


def generate(llm: LLM, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]) -> list[Any]:
    """RequestOutputs in the order of the prompts."""
    return llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], params, use_tqdm=False)


def greedy(max_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **options)


def add(llm: LLM, name: str, tokens: list[int], max_tokens: int) -> None:
    """Hand the engine a greedy request without running it."""
    llm.llm_engine.add_request(name, {"prompt_token_ids": tokens}, greedy(max_tokens))


def run_until_decoding(llm: LLM, count: int = 1, tokens: int = 1) -> None:
    """Step the engine until ``count`` requests have answered ``tokens`` tokens."""
    answered: set[str] = set()
    while len(answered) < count:
        for out in step(llm):
            if len(out.outputs[0].token_ids) >= tokens:
                answered.add(out.request_id)


def run_to_the_end(llm: LLM) -> dict[str, list[int]]:
    """Step until nothing is left; token ids of every finished request."""
    finished = {}
    while llm.llm_engine.has_unfinished_requests():
        for out in step(llm):
            if out.finished:
                finished[out.request_id] = list(out.outputs[0].token_ids)
    return finished
