"""Collect a map from a model for transformers, or from the pages of an engine."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from vllm_fox.families import family_of
from vllm_fox.family import Family
from vllm_fox.registration import register_configs

from .record import ForgettingMap

Progress = Callable[[int, int], None]
"""It is called with the number of tokens that have been read, and the number of all."""


def collect(
    folder: Path,
    text: str,
    *,
    name: str | None = None,
    source: str = "transformers",
    max_tokens: int | None = None,
    page_size: int | None = None,
    dtype: str | None = None,
    progress: Progress = lambda done, total: None,
) -> ForgettingMap:
    """Read a text with a model and record which queries see which tokens.

    Args:
        folder: of the checkpoint.
        text: as the model's tokenizer takes it.
        name: what the model is called in the map; the folder's unless given.
        source: "transformers" or "engine", which give the same. The engine runs in this process, so
            VLLM_ENABLE_V1_MULTIPROCESSING must have been 0 when vLLM was imported.
        max_tokens: read no more than so many; the longest prompt that the model takes unless given.
        page_size: tokens of a page; the family's own unless given.
        dtype: of the model, without "torch."; the checkpoint's unless given.

    Raises:
        ValueError: the model belongs to no family, or to one of which this source makes no maps; or the text has no
            token, or the checkpoint not all tensors.
    """
    register_configs()
    config = AutoConfig.from_pretrained(folder)
    family = family_of(config)
    pieces, ids = tokenize(folder, text)
    if not ids:
        raise ValueError("TEXT is empty: give a text of at least one token.")
    # The engine needs room for the token that it writes.
    count = min(len(ids), config.max_position_embeddings - 1, max_tokens or len(ids))
    size = page_size or family.page_size
    found = dtype or str(getattr(config, "dtype", None) or torch.float32).removeprefix("torch.")
    read = from_engine if source == "engine" else from_transformers
    ends = read(folder, config, family, ids[:count], size, found, progress)
    assert ends.shape == (config.num_hidden_layers, family.streams(config) // config.num_hidden_layers, count)
    return ForgettingMap(
        model=name or str(folder),
        family=family.name,
        source=source,
        stream=family.stream,
        pieces=pieces[:count],
        ends=ends,
        page_size=size if family.whole_pages else 1,
        text_tokens=len(ids),
    )


def tokenize(folder: Path, text: str) -> tuple[list[str], list[int]]:
    """Return the text of each token, and its id. Together the texts are ``text`` if the tokenizer says where its
    tokens stand; a token that ends within a character has none of it."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.is_fast:
        ids = tokenizer(text, verbose=False)["input_ids"]
        return [tokenizer.decode([one]) for one in ids], ids
    found = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    pieces, ids, at = [], found["input_ids"], 0
    for one, (_, stop), special in zip(ids, found["offset_mapping"], found["special_tokens_mask"], strict=True):
        if special:
            pieces.append(tokenizer.decode([one]))
            continue
        pieces.append(text[at:stop])
        at = max(at, stop)
    return pieces, ids


@torch.no_grad()
def from_transformers(
    folder: Path,
    config: PretrainedConfig,
    family: Family,
    ids: list[int],
    page_size: int,
    dtype: str,
    progress: Progress,
) -> np.ndarray:
    """Return the ends [L, S, T] int32 of :class:`.record.ForgettingMap`, by the model for transformers."""
    path = family.configs[type(config)]
    if path is None or family.token_ends is None:
        raise ValueError(_refusal(family, "transformers"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, loaded = _named(path).from_pretrained(folder, dtype=getattr(torch, dtype), output_loading_info=True)
    # transformers would draw them at random.
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise ValueError(f"{folder} has no tensor {missing[0]}: copy the checkpoint again.")
    model = model.eval().to(device)
    ends: torch.Tensor = _named(family.token_ends)(model, torch.tensor([ids], device=device), page_size)
    progress(len(ids), len(ids))
    return ends.cpu().numpy()


def from_engine(
    folder: Path,
    config: PretrainedConfig,
    family: Family,
    ids: list[int],
    page_size: int,
    dtype: str,
    progress: Progress,
) -> np.ndarray:
    """Return the same, by the pages of an engine that reads the text as a prompt."""
    from vllm import LLM, SamplingParams, TokensPrompt

    from vllm_fox.attention.layer import PagedAttention
    from vllm_fox.attention.step import WorkerState

    # CUDA graphs would replay steps without anybody watching.
    options: dict[str, Any] = {"dtype": dtype}
    llm = LLM(
        model=str(folder),
        **options,
        enforce_eager=True,
        max_num_seqs=1,
        max_num_batched_tokens=CHUNK,
        additional_config={"fox": {"page_size": page_size}},
    )
    try:
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        state = next(layer for layer in layers.values() if isinstance(layer, PagedAttention)).state
        if type(state).lower_ends is WorkerState.lower_ends:
            raise ValueError(_refusal(family, "an engine"))
        ends = torch.full((family.streams(config), len(ids) + 1), len(ids), dtype=torch.int32)

        def watch(batch: Any) -> None:
            state.lower_ends(batch, 0, ends)
            progress(min(int(batch.seq_lens[0]), len(ids)), len(ids))

        state.watch = watch
        prompt = TokensPrompt(prompt_token_ids=ids)
        llm.generate([prompt], SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
    finally:
        _shut_down(llm)
    return ends[:, : len(ids)].reshape(config.num_hidden_layers, -1, len(ids)).numpy()


CHUNK = 512
"""Tokens of a prompt that the engine reads in a step."""


def _refusal(family: Family, source: str) -> str:
    return f"No map can be made of {family.name} from {source}: their family does not say there what is dropped."


def _shut_down(llm: Any) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def _named(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
