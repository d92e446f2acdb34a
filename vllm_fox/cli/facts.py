"""What a checkpoint's config and weights say about the memory of its requests, without an engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch.nn.functional import logsigmoid
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vllm_fox.checkpoint_files import Entry, read_config, read_header, weight_files
from vllm_fox.config_fields import Fields
from vllm_fox.families import all_families, family_of
from vllm_fox.families.evicting.config import EvictingDecoderConfig, Eviction
from vllm_fox.families.fox.architecture import (
    OFFICIAL,
    Architecture,
    expected_weights,
    is_derived_weight,
    may_be_quantised,
)
from vllm_fox.families.fox.bounds import projection_bound, qk_norm_bound, serving_threshold, with_rounding
from vllm_fox.families.fox.config import FlaForgettingTransformerConfig, FoxConfig
from vllm_fox.families.fox.settings import FoxSettings
from vllm_fox.families.sparse_gpt2.config import SparseGPT2Config
from vllm_fox.kernels.forgetting.pages import ForgettingPageFormat
from vllm_fox.kernels.subset.pages import SubsetPageFormat
from vllm_fox.registration import register_configs

DENSE = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
"""Models of vLLM's own whose layers each keep K and V of every token."""
OURS = (FoxConfig, FlaForgettingTransformerConfig, SparseGPT2Config, EvictingDecoderConfig)
"""Configs of the plugin's own families, whose pages are known."""
DENSE_BLOCK = 16
"""Tokens of a block of vLLM's own models."""
BITS = {"F64": 64, "F32": 32, "BF16": 16, "F16": 16}
"""Widths of the dtypes that stand for weights in a safetensors header."""
MEASURE = (
    "To measure it, serve the model, send it texts of your own, and read the pages held and given back by "
    "`vllm-fox top`."
)


class UnknownMemoryError(ValueError):
    """What a model's requests hold is not known here. vLLM may serve it all the same."""


@dataclass(frozen=True)
class Head:
    """How far one query head looks back.

    Attributes:
        layer, head: which head, from 0.
        logit_bound: U, at least ``|q . k| / sqrt(d)`` for every query and key.
        threshold: log of the weight under which keys are pruned; None if nothing is pruned.
        window_at_most: tokens after which every key is under the threshold, whatever the text; None if there is no
            such number below the longest context.
        window_at_least: tokens for which no key is under the threshold, whatever the text; the longest context if
            the head can never forget.
    """

    layer: int
    head: int
    logit_bound: float
    threshold: float | None
    window_at_most: int | None
    window_at_least: int


@dataclass(frozen=True)
class Facts:
    """A model as the plugin, or vLLM by itself, would serve it.

    Attributes:
        model_type: of config.json.
        family: name of the family of models; None for a model of vLLM's own.
        layers, query_heads, kv_heads, head_size: geometry.
        dtype: of the served model, without "torch.".
        longest_context: tokens of the longest request that the engine admits.
        promise: "bound" (a bound on the attention that is lost), "learned" (training chose what is dropped) or
            "nothing" (nothing is dropped).
        promised: the same as a sentence.
        streams: what holds pages of its own, such as a KV head of a layer.
        page_size, page_bytes: tokens and bytes of a page of one stream.
        page_bytes_on: gives the bytes of a page on each of so many tensor-parallel ranks.
        weights_bytes: of the weights in ``dtype``, and of quantised ones as they are stored; None if there are none
            in the folder.
        pruned: how much a pruned request holds, as a sentence.
        windows: of Forgetting Transformers with weights: for each stream the tokens that it holds at most, the
            longest context if it never forgets; None where the gates follow the text.
        heads: of Forgetting Transformers with weights: the query heads.
        window: tokens for which an evicted token stays; None if there is no such number.
        notes: further sentences.
    """

    model_type: str
    family: str | None
    layers: int
    query_heads: int
    kv_heads: int
    head_size: int
    dtype: str
    longest_context: int
    promise: str
    promised: str
    streams: int
    page_size: int
    page_bytes: int
    page_bytes_on: Callable[[int], int]
    weights_bytes: int | None
    pruned: str
    windows: list[int | None] = field(default_factory=list)
    heads: list[Head] = field(default_factory=list)
    window: int | None = None
    notes: list[str] = field(default_factory=list)

    def dense_pages(self, tokens: int) -> int:
        """Return the pages, over all streams, of a request that forgets nothing."""
        return self.streams * math.ceil(tokens / self.page_size)

    def pruned_pages(self, tokens: int) -> int | None:
        """Return how many pages a request holds at most once its prompt has been read; None if that is not known.

        A stream with a window holds the pages that lie in it, the one that the window's edge cuts, and one more
        that has died since the live ranges were looked at last. Windows are those of requests up to the longest
        context.
        """
        pages = self.pages_at_most(tokens)
        return None if pages is None else sum(pages)

    def pages_at_most(self, tokens: int) -> list[int] | None:
        """Return the same of each stream, layer by layer."""
        whole = math.ceil(tokens / self.page_size)
        if self.promise == "nothing":
            return [whole] * self.streams
        if tokens > self.longest_context or not any(window is not None for window in self.windows):
            return None
        return [
            whole if window is None else min(whole, math.ceil(window / self.page_size) + 2)
            for window in self.windows
        ]


def facts_of(folder: Path, dtype: str | None = None, max_model_len: int | None = None) -> Facts:
    """Read a checkpoint.

    Args:
        folder: of the checkpoint. Weights may be absent; then less is known.
        dtype: in which it is served; the checkpoint's, as vLLM does it, unless given.
        max_model_len: longest request that the engine admits; the config's longest context unless given.

    Raises:
        UnknownMemoryError: it is whole as far as is seen here, but what its requests hold is not known.
        ValueError: it cannot be served. The message names the field and the fix.
    """
    given = read_config(folder)
    config = _config(folder, given)
    entries: dict[str, Entry] = {}
    for path in weight_files(folder):
        entries |= read_header(path)
    served, notes = _dtype(config, entries, dtype)
    size = sum(_served_bytes(name, entry, served) for name, entry in entries.items())
    common: dict[str, Any] = {
        "model_type": given["model_type"],
        "dtype": str(served).removeprefix("torch."),
        "weights_bytes": size or None,
        "longest_context": max_model_len or config.max_position_embeddings,
    }
    if not entries:
        notes.append("The folder holds no weights, so their memory is not counted.")
    if isinstance(config, FoxConfig | FlaForgettingTransformerConfig):
        return _fox(folder, config, entries, served, notes, common)
    if isinstance(config, SparseGPT2Config):
        return _sparse_gpt2(config, served, notes, common)
    if isinstance(config, EvictingDecoderConfig):
        return _evicting(config, served, notes, common)
    return _dense(folder, given, config, served, notes, common)


def refusals(facts: Facts, folder: Path, ranks: int, stages: int) -> list[str]:
    """Return the names of what cannot be served so: tensor-parallel ranks, and pipeline stages.

    What a family refuses it says itself (:attr:`vllm_fox.family.Family.refusals`).
    """
    found = []
    if facts.query_heads % ranks or (facts.kv_heads % ranks and ranks % facts.kv_heads):
        found.append(
            f"--tensor-parallel-size {ranks} with {facts.query_heads} query heads and {facts.kv_heads} KV heads"
        )
    if stages > facts.layers:
        found.append(f"{stages} pipeline stages with {facts.layers} layers")
    if facts.family is not None:
        config = _config(folder, read_config(folder))
        engine: Any = SimpleNamespace(
            parallel_config=SimpleNamespace(tensor_parallel_size=ranks, pipeline_parallel_size=stages),
            lora_config=None,
            model_config=SimpleNamespace(
                hf_config=config, max_model_len=facts.longest_context, dtype=getattr(torch, facts.dtype)
            ),
        )
        found += [what for asked, what in family_of(config).refusals(engine) if asked]
    return found


def _config(folder: Path, given: dict[str, Any]) -> PretrainedConfig:
    """The config as transformers, or the family's class, completes it."""
    register_configs()
    path, kind = folder / "config.json", given["model_type"]
    if kind == "kvzap":
        raise ValueError(
            f"{path}: model_type is 'kvzap', a predictor: give the folder of the model that it belongs to, and run "
            f"`vllm-fox convert MODEL OUT --predictor {folder} --threshold X`."
        )
    if kind not in CONFIG_MAPPING:
        raise UnknownMemoryError(f"{path}: model_type is {kind!r}, which neither vllm-fox nor transformers knows.")
    kind_of_config = CONFIG_MAPPING[kind]
    others = [
        family.name for family in all_families() if kind_of_config in family.configs and kind_of_config not in OURS
    ]
    if others:
        raise UnknownMemoryError(f"{path}: {others[0]} are of another package, and their pages are not known here.")
    if kind not in DENSE and kind_of_config not in OURS:
        raise UnknownMemoryError(
            f"{path}: model_type is {kind!r}: how much KV it holds is not known here. vllm-fox knows its own "
            f"families and {', '.join(DENSE)}."
        )
    _check_dtype(path, given)
    known = {name: value for name, value in given.items() if not name.startswith("dms_") and name != "auto_map"}
    try:
        config: PretrainedConfig = AutoConfig.for_model(**known)
    except Exception as error:  # whatever transformers and its checks say to a value
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    return config


def _check_dtype(path: Path, given: dict[str, Any]) -> None:
    """Check the field that says it. transformers takes whatever torch has of that name, such as a module."""
    field = "torch_dtype" if given.get("dtype") is None else "dtype"
    value = given.get(field)
    if value is None:
        return
    found = getattr(torch, value, None) if isinstance(value, str) else None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        Fields(f"{path}: ", given).refuse(field, "a floating-point dtype of torch, such as 'bfloat16'")


def _served_bytes(name: str, entry: Entry, dtype: torch.dtype) -> int:
    """Bytes that a checkpoint's tensor takes in an engine: quantised weights and their scales stay as they are."""
    return entry.size * dtype.itemsize if entry.dtype in BITS and "scale" not in name else entry.bytes


def _dtype(config: PretrainedConfig, entries: dict[str, Entry], asked: str | None) -> tuple[torch.dtype, list[str]]:
    """The dtype in which the model is served, and what is to be said about it."""
    if asked is not None:
        return getattr(torch, asked), []
    found = getattr(config, "dtype", None)
    if found is None:
        names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
        found = next((names[one.dtype] for one in entries.values() if one.dtype in names), torch.float32)
    if found == torch.float32:
        sentence = "vLLM serves a float32 checkpoint in bfloat16 unless it is told --dtype float32."
        return torch.bfloat16, [sentence]
    return found, []


def _fox(
    folder: Path,
    config: FoxConfig | FlaForgettingTransformerConfig,
    entries: dict[str, Entry],
    dtype: torch.dtype,
    notes: list[str],
    common: dict[str, Any],
) -> Facts:
    arch, family = Architecture.from_config(config), family_of(config)
    groups = arch.num_heads // arch.num_kv_heads
    shifts = arch.k_shift or arch.v_shift

    def form(ranks: int) -> ForgettingPageFormat:
        # With more ranks than KV heads, some ranks share a KV head, and each has a part of its query heads.
        gates = max(1, groups // max(1, ranks // arch.num_kv_heads))
        return ForgettingPageFormat(family.page_size, arch.head_dim, dtype, gates, shifts, dtype)

    tolerance, longest = (
        FoxSettings.from_options({}).tolerance(arch.log_pruning_tolerance),
        common["longest_context"],
    )
    assert tolerance is not None
    quantised = getattr(config, "quantization_config", None) is not None
    for problem in _wrong_tensors(arch, entries, quantised) if entries else ():
        raise ValueError(f"{folder}: {problem}")
    unknown = quantised and arch.qk_norm == "none"
    if unknown:
        notes.append("What bounds the logits is known once an engine has loaded the quantised projections.")
    heads = list(_heads(arch, entries, dtype, longest, tolerance)) if entries and not unknown else []
    # A page is dead once every query head that shares it has forgotten it.
    shared = [heads[start : start + groups] for start in range(0, len(heads), groups)]
    limits = [
        [longest if one.window_at_least >= longest else one.window_at_most for one in group] for group in shared
    ]
    windows = [None if None in group else max(one for one in group if one is not None) for group in limits]
    known = sum(window is not None for window in windows)
    if arch.gate == "none":
        pruned = "The model has no forget gates, so nothing is ever pruned."
    elif heads and all(one.window_at_least >= longest for one in heads):
        pruned = f"The gates stay so far open that nothing is ever pruned within {longest:,} tokens of any text."
    elif not entries or unknown:
        pruned = f"How much is pruned follows from the weights, and from the text where gates read it. {MEASURE}"
    elif known == len(windows):
        pruned = "Pruned is what the windows of the heads allow, whatever the text: their weights prove it."
    elif known:
        pruned = (
            f"Pruned is an upper limit for any text: the weights prove a window of {known} of {len(windows)} KV "
            f"heads, and the others count as dense, since their gates follow the text. {MEASURE}"
        )
    else:
        pruned = f"How much is pruned depends on the text, which the gates of every KV head follow. {MEASURE}"
    return Facts(
        family=family.name,
        layers=arch.num_layers,
        query_heads=arch.num_heads,
        kv_heads=arch.num_kv_heads,
        head_size=arch.head_dim,
        promise="bound",
        promised=(
            f"The attention weights that a query loses sum to at most e^{tolerance:g}, for every head, query "
            f"and text of up to {longest:,} tokens (log_pruning_tolerance {tolerance:g})."
        ),
        streams=family.streams(config),
        page_size=family.page_size,
        page_bytes=form(1).page_bytes,
        page_bytes_on=lambda ranks: form(ranks).page_bytes,
        pruned=pruned,
        windows=windows,
        heads=heads,
        notes=notes,
        **common,
    )


def _wrong_tensors(arch: Architecture, entries: Mapping[str, Entry], quantised: bool) -> Iterator[str]:
    """A sentence for each tensor that is missing, left over, or of a wrong shape.

    Of projections that may be quantised there has to be something; how it is stored is left to vLLM.
    """
    wanted = expected_weights(arch)
    if quantised:
        layers = {name.rpartition(".")[0] for name in wanted if may_be_quantised(name)}
        stored = {name: name.rpartition(".")[0] for name in entries}
        there = layers & {layer for name, layer in stored.items() if not name.endswith(".bias")}
        entries = {name: entry for name, entry in entries.items() if stored[name] not in layers}
        wanted = {name: shape for name, shape in wanted.items() if name.rpartition(".")[0] not in there}
    for name in sorted(wanted.keys() | entries.keys()):
        if name not in entries:
            yield f"tensor {name} is missing, and config.json asks for it: copy the checkpoint again."
        elif name not in wanted and not is_derived_weight(arch, name):
            yield f"tensor {name} is none of config.json's: copy the config.json that belongs to the weights."
        elif name in wanted and entries[name].shape != wanted[name]:
            yield (
                f"tensor {name} is {list(entries[name].shape)}, and config.json asks for {list(wanted[name])}: "
                "copy the config.json that belongs to the weights."
            )


def _heads(
    arch: Architecture, entries: dict[str, Entry], dtype: torch.dtype, longest: int, tolerance: float
) -> Iterator[Head]:
    """Every head's bound of logits, threshold, and the window that its gate's weights prove."""

    def read(layer: int, name: str) -> torch.Tensor:
        whole = (
            f"model.layers.{layer}.attn.{name}" if name != "attn_norm.weight" else f"model.layers.{layer}.{name}"
        )
        with safe_open(entries[whole].file, framework="pt") as file:
            found: torch.Tensor = file.get_tensor(whole)
        # A constant gate stays as it is stored.
        return found if name == "fgate_bias" else found.to(dtype)

    for layer in range(arch.num_layers):
        bound = with_rounding(_logit_bound(arch, layer, read), dtype, dtype)
        limit = serving_threshold(bound, longest, tolerance)
        slowest, fastest = _log_gates(arch, layer, read)
        each = zip(bound.tolist(), limit.tolist(), slowest.tolist(), fastest.tolist(), strict=True)
        for head, (one, under, slow, fast) in enumerate(each):
            # log f lies between ``fast`` and ``slow``, so its sum over n tokens does between n times each.
            most, least = (math.floor(min(under / gate, longest)) if gate < 0 else longest for gate in (slow, fast))
            yield Head(layer, head, one, under, most if most < longest else None, least)


def _logit_bound(arch: Architecture, layer: int, read: Any) -> torch.Tensor:
    """U of every query head of a layer, as the served model has it."""
    dim = arch.head_dim
    if arch.qk_norm != "none":
        w_q, w_k = read(layer, "q_norm.weight").view(-1, dim), read(layer, "k_norm.weight").view(-1, dim)
        return qk_norm_bound(w_q.expand(arch.num_heads, -1), w_k.expand(arch.num_kv_heads, -1))
    k_name = "k_proj.linear.weight" if arch.k_shift else "k_proj.weight"
    w_q, w_k = (read(layer, name).view(-1, dim, arch.hidden_size) for name in ("q_proj.weight", k_name))
    b_q = b_k = None
    if arch.qkv_bias:
        b_q, b_k = (read(layer, f"{name}_proj.bias").view(-1, dim) for name in "qk")
    norm = read(layer, "attn_norm.weight")
    return projection_bound(w_q, w_k, norm, b_q, b_k, rotated=arch.rope_base is not None)


def _log_gates(arch: Architecture, layer: int, read: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest and the smallest log f that each head's gate can have, whatever the text: [H] float64 each.

    The gate's logit is ``w . x + b`` where x has an RMS of 1 before its norm's weight, so that ``|w . x|`` is at
    most ``||w * norm|| sqrt(n)``. A gate without a projection has just its bias.
    """
    if arch.gate == "none":
        never = torch.zeros(arch.num_heads, dtype=torch.float64)
        return never, never
    if arch.gate != "full":
        always = logsigmoid(read(layer, "fgate_bias").double())
        return always, always
    name = "fgate_proj" if arch.dialect == OFFICIAL else "f_proj"
    weight, bias = read(layer, f"{name}.weight"), read(layer, f"{name}.bias").double()
    norm = read(layer, "attn_norm.weight").double()
    radius = (weight.double() * norm).norm(dim=-1) * arch.hidden_size**0.5
    # Each rounding to the dtype makes a number larger by at most this factor; there are at most six. Without a
    # projection's weights nothing is rounded.
    growth = (1 + torch.finfo(weight.dtype).eps / 2) ** 6
    radius = torch.where(radius > 0, radius + (radius + bias.abs()) * (growth - 1), 0.0)
    return logsigmoid(bias + radius), logsigmoid(bias - radius)


def _sparse_gpt2(config: SparseGPT2Config, dtype: torch.dtype, notes: list[str], common: dict[str, Any]) -> Facts:
    family = family_of(config)
    head_size = config.n_embd // config.n_head

    def form(ranks: int) -> SubsetPageFormat:
        return SubsetPageFormat(
            family.page_size, config.n_head // ranks, head_size, config.int_n_embd, dtype, dtype
        )

    return Facts(
        family=family.name,
        layers=config.n_layer,
        query_heads=config.n_head,
        kv_heads=config.n_head,
        head_size=head_size,
        promise="learned",
        promised="Each layer drops for good what it has learned to drop; quality is as fine-tuning left it.",
        streams=family.streams(config),
        page_size=family.page_size,
        page_bytes=form(1).page_bytes,
        page_bytes_on=lambda ranks: form(ranks).page_bytes,
        pruned=f"How much is pruned depends on what the layers drop of a text. {MEASURE}",
        notes=[
            *notes,
            f"Requests of more than {config.block_size} tokens are refused: the table of positions ends.",
        ],
        **common,
    )


def _evicting(config: EvictingDecoderConfig, dtype: torch.dtype, notes: list[str], common: dict[str, Any]) -> Facts:
    family, eviction = family_of(config), Eviction.from_dict(config.eviction)
    form = SubsetPageFormat(family.page_size, 1, config.head_dim, 0, dtype, dtype)
    zap = eviction.method == "kvzap"
    promised = (
        f"Tokens with a predicted score under {eviction.threshold:g} are evicted {eviction.window} tokens after "
        "they were read (KVzap); the model itself has not been trained for it."
        if zap
        else f"Each KV head evicts the tokens that it has learned to evict, {eviction.window} tokens after "
        "they were read (DMS); quality is as training left it."
    )
    pruned = (
        f"How much is evicted depends on the text. A KV head keeps its last {eviction.window} tokens, what it does "
        f"not evict, and up to three pages more. {MEASURE}"
    )
    if eviction.disabled:
        promised = "The checkpoint can evict tokens, and its config.json says to evict none."
        pruned = "Nothing is evicted, so a request holds what is dense."
    return Facts(
        family=family.name,
        layers=config.num_hidden_layers,
        query_heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=config.head_dim,
        promise="nothing" if eviction.disabled else "learned",
        promised=promised,
        streams=family.streams(config),
        page_size=form.page_size,
        page_bytes=form.page_bytes,
        page_bytes_on=lambda ranks: form.page_bytes,
        pruned=pruned,
        window=None if eviction.disabled else eviction.window,
        notes=notes,
        **common,
    )


def _dense(
    folder: Path,
    given: dict[str, Any],
    config: Any,
    dtype: torch.dtype,
    notes: list[str],
    common: dict[str, Any],
) -> Facts:
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or [])
    if sliding or (config.model_type == "mistral" and config.sliding_window is not None):
        raise UnknownMemoryError(
            f"{folder / 'config.json'}: sliding_window is {config.sliding_window}: how much KV layers with a "
            "sliding window hold is not known here. vllm-fox serves none of them."
        )

    def block(ranks: int) -> int:
        return DENSE_BLOCK * 2 * max(1, kv_heads // ranks) * head_size * dtype.itemsize

    dms = sorted(name for name in given if name.startswith("dms_"))
    pruned = "This is a model of vLLM's own, which drops nothing: a request holds what is dense."
    promised = "Nothing is dropped."
    if dms:
        promised = f"It evicts tokens by DMS ({dms[0]} and other fields), and cannot be served as it was published."
        pruned = f"Convert it before it is served, and measure the result: `vllm-fox convert {folder} OUT`."
    return Facts(
        family=None,
        layers=config.num_hidden_layers,
        query_heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        promise="learned" if dms else "nothing",
        promised=promised,
        streams=config.num_hidden_layers,
        page_size=DENSE_BLOCK,
        page_bytes=block(1),
        page_bytes_on=block,
        pruned=pruned,
        notes=notes,
        **common,
    )
