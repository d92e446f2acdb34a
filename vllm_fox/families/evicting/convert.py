"""Turn published checkpoints that evict tokens into such as this family serves."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, PretrainedConfig

from vllm_fox.checkpoint_files import INDEX, Entry, read_config, read_header, read_json
from vllm_fox.config_fields import Fields, is_number

from .config import ROPE_FACTORS, EvictingDecoderConfig

BASES = ("llama", "mistral", "qwen2", "qwen3")
KVZAP_WINDOW = 128
"""The window of KVzap's authors."""
DMS_DEFAULTS: dict[str, Any] = {
    "dms_alpha_scale": 100.0,
    "dms_initial_alpha_offset": 5.0,
    "dms_window_size": 512,
    "dms_separate_alpha": False,
    "dms_alpha_per": "head",
    "dms_disable_eviction": False,
}
"""Fields that say what a checkpoint with DMS computes, and their values where they are left out, as in
Model-Optimizer."""
DMS_OTHER = frozenset(
    ["dms_chunked_prefill", "dms_compile_limit", "dms_cr", "dms_manual_inference_mode", "dms_tau"]
    + ["dms_paged_attention_block_size", "dms_preallocate_for_tokens"]
)
"""Fields of Model-Optimizer that say how it computes, or how the checkpoint was trained."""
NO_WEIGHTS = (".rotary_emb.",)
"""Parts of names of tensors that older checkpoints have, and that follow from the config."""
Shapes = dict[str, list[int]]
"""Names of tensors and their shapes."""
Files = list[tuple[Path, dict[str, Entry]]]
"""A checkpoint's files of weights, and their tensors by name."""
ONLY_FILE = "model.safetensors"
"""Holds the weights where there is no index."""
LEFT_BEHIND = (".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".py", ".safetensors")
"""Endings of files that are not copied as they are: weights, and code, of which none is needed."""
TEXT_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads") + (
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
"""Fields that mean the same in all bases and here."""
UNQUANTISED = ("F16", "BF16", "F32", "F64")
"""Dtypes of safetensors in which a model is that is not quantised."""


def convert(
    source: Path,
    out: Path,
    predictor: Path | None = None,
    threshold: float | None = None,
    window: int | None = None,
    original: Path | None = None,
) -> Iterator[str]:
    """Write ``out``, and yield sentences about what has been done.

    Args:
        source: folder of a checkpoint with DMS, or of one to go with the predictor.
        out: folder that is made; nothing is left of it after an error.
        predictor: folder of a KVzap predictor.
        threshold: of its scores: a token with a lower one is evicted.
        window: W, tokens for which an evicted one stays; :data:`KVZAP_WINDOW` unless given.
        original: folder of the model beside which the predictor was trained. A quantised source needs it.

    Raises:
        ValueError: the checkpoint is none that evicts tokens, or not one that can be served. The message says why.
        OSError: a file cannot be read or written.
    """
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists: name a folder that does not.")
    given = _fields_of(source)
    base = _base_of(source, given)
    dms = any(name.startswith("dms_") for name in given)
    if dms and predictor is not None:
        raise ValueError(f"{source} evicts tokens by DMS: leave --predictor out.")
    if not dms and predictor is None:
        raise ValueError(
            f"{source / 'config.json'} has no dms_ fields, so nothing says what is evicted: give a KVzap predictor "
            "by --predictor."
        )
    files = _weight_files(source)
    extra: dict[str, torch.Tensor] = {}
    if predictor is None:
        if threshold is not None or window is not None:
            raise ValueError("A checkpoint with DMS says its window itself: leave --threshold and --window out.")
        if original is not None:
            raise ValueError("A checkpoint with DMS was trained as it is: leave --original out.")
        eviction = _dms(source, given, base, files)
        _check_tensors(source, given, base, files, ignored=(*NO_WEIGHTS, ".dms_"))
    else:
        if not is_number(threshold):
            raise ValueError(
                f"--threshold is {threshold}: a predictor needs a number. Its authors use -4 and others."
            )
        if window is not None and window < 1:
            raise ValueError(f"--window is {window}: it must be an integer from 1 on.")
        _check_tensors(source, given, base, files, ignored=NO_WEIGHTS)
        eviction, extra = _kvzap(predictor, base)
        _check_norms(source, files, original, base.num_hidden_layers)
        eviction |= {"threshold": threshold, "window": KVZAP_WINDOW if window is None else window}
    config = _config(given, base, eviction)
    new_parents = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
            made = Path(folder, out.name)
            made.mkdir()
            _write_weights(made, files, extra)
            copied = copy_others(source, made)
            (made / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            made.rename(out)
    except (OSError, SafetensorError) as error:
        for parent in new_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
        what = str(error)
        if isinstance(error, OSError) and error.strerror:
            what = f"{error.strerror} ({error.filename2 or error.filename})"
        raise OSError(
            f"{out} could not be written, and nothing is left of it: {what}. Name a folder in another place, or "
            "change that."
        ) from None
    yield f"{out} is a {given['model_type']} that evicts tokens: {_described(eviction)}."
    yield f"Weights: {len(_shapes(files))} tensors copied, {len(extra)} of the predictor added."
    yield f"Other files copied: {', '.join(copied) or 'none'}."
    if "quantization_config" in config:
        yield "Its weights are quantised, and stay as they are."
    yield f"Serve it with: vllm serve {out}"


def config_of(source: Path, eviction: dict[str, Any]) -> EvictingDecoderConfig:
    """Return the config of a dense checkpoint that is to learn to evict.

    Args:
        source: folder of a Llama, Mistral, Qwen2 or Qwen3.
        eviction: the fields of :class:`.config.Eviction`.

    Raises:
        ValueError: it is none of these, or evicts already. The message says so.
    """
    given = _fields_of(source)
    base = _base_of(source, given)
    for name in given:
        if name.startswith("dms_"):
            raise ValueError(f"{source / 'config.json'} has {name}: this checkpoint evicts tokens already.")
    return EvictingDecoderConfig(**_config(given, base, eviction))


def _base_of(source: Path, given: dict[str, Any]) -> PretrainedConfig:
    """The config as transformers completes it."""
    kind = given.get("model_type")
    if kind not in BASES:
        raise ValueError(f"{source / 'config.json'}: model_type is {kind!r}: it must be one of {', '.join(BASES)}.")
    known = {name: value for name, value in given.items() if not name.startswith("dms_") and name != "auto_map"}
    try:
        base = AutoConfig.for_model(**known)
    except Exception as error:  # whatever transformers and its checks say to a value
        raise ValueError(f"{source / 'config.json'}: {' '.join(str(error).split())}") from None
    others = set(getattr(base, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if others:
        raise ValueError(
            f"{source / 'config.json'}: layer_types has {min(others)!r}: only 'full_attention' is supported."
        )
    sliding = "sliding_attention" in (getattr(base, "layer_types", None) or [])
    if kind == "mistral":
        sliding = base.sliding_window is not None
    if sliding:
        default = "" if "sliding_window" in given else ", its value where it is left out (null means none)"
        raise ValueError(
            f"{source / 'config.json'}: sliding_window is {base.sliding_window}{default}: layers with a sliding "
            "window are not supported."
        )
    rope = Fields(f"{source / 'config.json'}: ", base.rope_parameters or {})
    rope.with_defaults({"rope_type": "default"}).one_of("rope_type", tuple(ROPE_FACTORS))
    if base.hidden_act != "silu":
        raise ValueError(f"{source / 'config.json'}: hidden_act is {base.hidden_act!r}: only 'silu' is supported.")
    return base


def _fields_of(folder: Path) -> dict[str, Any]:
    """The fields of a folder's config.json."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: download the checkpoint, and name the folder that it is in.")
    return read_config(folder)


def _weight_files(source: Path) -> Files:
    """The checkpoint's safetensors files: those that the index names, or the only one."""
    index = source / INDEX
    if not index.exists():
        return [_with_entries(source / ONLY_FILE)]
    found = read_json(index)
    where = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{index}: weight_map is {where!r}: it must say for every tensor in which file it is.")
    for tensor, name in where.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index}: {tensor} is in {name!r}: it must be the name of a file beside it.")
    return [_with_entries(source / name) for name in sorted(set(where.values()))]


def _with_entries(path: Path) -> tuple[Path, dict[str, Entry]]:
    if not path.is_file():
        raise ValueError(f"{path} is missing{_instead(path)}.")
    return path, read_header(path)


def _shapes(files: Files) -> Shapes:
    return {name: list(entry.shape) for _, entries in files for name, entry in entries.items()}


def _instead(missing: Path) -> str:
    """What to do about a file of weights that is missing."""
    beside = sorted(path.name for path in missing.parent.iterdir())
    if missing.name == ONLY_FILE:
        for name in beside:
            if name.endswith(".safetensors"):
                return f": {name} is there, but no {INDEX} that names it: download that, too"
        for name in beside:
            if name.endswith((".bin", ".gguf", ".pt", ".pth")):
                return f", and {name} is not read: save the model as safetensors, as transformers does"
    return ": download it"


def _check_tensors(
    source: Path,
    given: dict[str, Any],
    base: PretrainedConfig,
    files: Files,
    ignored: tuple[str, ...],
) -> None:
    """Refuse weights that are not those of the config. Of quantised ones only what is never quantised is checked.

    Args:
        ignored: parts of names that are not looked at.
    """
    kind = given["model_type"]
    heads, kv_heads, hidden = base.num_attention_heads, base.num_key_value_heads, base.hidden_size
    dim, inner = _head_dim(base), base.intermediate_size
    # Outputs and inputs of each layer's linear maps, and whether they have a bias.
    attention_bias, mlp_bias = bool(getattr(base, "attention_bias", False)), bool(getattr(base, "mlp_bias", False))
    linear = {
        "self_attn.q_proj": (heads * dim, hidden, attention_bias or kind == "qwen2"),
        "self_attn.k_proj": (kv_heads * dim, hidden, attention_bias or kind == "qwen2"),
        "self_attn.v_proj": (kv_heads * dim, hidden, attention_bias or kind == "qwen2"),
        "self_attn.o_proj": (hidden, heads * dim, attention_bias),
        "mlp.gate_proj": (inner, hidden, mlp_bias),
        "mlp.up_proj": (inner, hidden, mlp_bias),
        "mlp.down_proj": (hidden, inner, mlp_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if kind == "qwen3":
        norms |= {"self_attn.q_norm": dim, "self_attn.k_norm": dim}
    expected = {"model.embed_tokens.weight": [base.vocab_size, hidden], "model.norm.weight": [hidden]}
    if not base.tie_word_embeddings:
        expected["lm_head.weight"] = [base.vocab_size, hidden]
    for layer in range(base.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        expected |= {f"{prefix}{name}.weight": [size] for name, size in norms.items()}
        for name, (rows, columns, bias) in linear.items():
            expected[f"{prefix}{name}.weight"] = [rows, columns]
            expected |= {f"{prefix}{name}.bias": [rows]} if bias else {}
    found = {name: shape for name, shape in _shapes(files).items() if not any(part in name for part in ignored)}
    if base.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    if _quantization(given):
        expected = {name: shape for name, shape in expected.items() if "norm" in name}
        found = {name: shape for name, shape in found.items() if name in expected}
    for names, what in (
        (expected.keys() - found.keys(), "is missing"),
        (found.keys() - expected.keys(), "is unknown"),
        ({name for name in found if found[name] != expected.get(name)}, "is of another shape"),
    ):
        if names:
            first = min(names)
            shapes = f", {found[first]} and not {expected[first]}" if what == "is of another shape" else ""
            more = f" (and so are {len(names) - 1} more tensors)" if len(names) > 1 else ""
            raise ValueError(
                f"{source}: {first} {what}{shapes}{more}: the weights are not those of the {kind} that config.json "
                "describes, or not all of them."
            )


def _dms(source: Path, given: dict[str, Any], base: PretrainedConfig, files: Files) -> dict[str, Any]:
    """The eviction of a checkpoint with Dynamic Memory Sparsification."""
    for name in given:
        if name.startswith("dms_") and name not in DMS_DEFAULTS and name not in DMS_OTHER:
            raise ValueError(
                f"{source / 'config.json'}: {name} (value {given[name]!r}) is unknown, so the checkpoint may evict "
                "otherwise than is known here."
            )
    value = {name: given.get(name, default) for name, default in DMS_DEFAULTS.items()}
    check = Fields(f"{source / 'config.json'}: ", value)
    check.numbers("dms_alpha_scale", "dms_initial_alpha_offset")
    check.integers("dms_window_size")
    check.flags("dms_separate_alpha", "dms_disable_eviction")
    check.one_of("dms_alpha_per", ("head", "layer"))
    found = {name: shape for name, shape in _shapes(files).items() if ".dms_" in name}
    separate, heads = value["dms_separate_alpha"], base.num_key_value_heads
    bias = bool(getattr(base, "attention_bias", False))
    if separate and (_quantization(given) or {}).get("transform_config"):
        raise ValueError(
            f"{source / 'config.json'}: transform_config may rotate the residual stream, from which the adapter "
            "decides: quantise the checkpoint without transforms."
        )
    scaled = sorted(name for name in found if not name.endswith(("dms_proj_alpha.weight", "_norm.weight", ".bias")))
    if scaled:
        raise ValueError(
            f"{source}: {scaled[0]} belongs to a quantised adapter, which is not supported: quantise the "
            "checkpoint again and leave the layers named dms_proj_alpha out (ignore, modules_to_not_convert)."
        )
    expected: Shapes = {}
    for layer in range(base.num_hidden_layers) if separate else ():
        prefix = f"model.layers.{layer}.self_attn.dms_proj_alpha"
        expected |= {f"{prefix}.weight": [heads, base.hidden_size], f"{prefix}_norm.weight": [base.hidden_size]}
        expected |= {f"{prefix}.bias": [heads]} if bias else {}
    if found.keys() != expected.keys():
        wrong = sorted(found.keys() ^ expected.keys())
        raise ValueError(
            f"{source}: dms_separate_alpha is {separate}, which does not go with the tensors: "
            f"{'unexpected' if wrong[0] in found else 'missing'} {wrong[0]} ({len(wrong)} in all)."
        )
    for name, shape in found.items():
        if shape != expected[name]:
            raise ValueError(f"{source}: {name} is {shape}: by config.json it must be {expected[name]}.")
    return {
        "method": "dms_adapter" if separate else "dms_borrowed_neuron",
        "window": value["dms_window_size"],
        "shift": 1,
        "scale": float(value["dms_alpha_scale"]),
        "offset": float(value["dms_initial_alpha_offset"]),
        **({"bias": True} if separate and bias else {}),
        "decides": value["dms_alpha_per"],
        "disabled": value["dms_disable_eviction"],
        "prefill": "masked",
    }


def _kvzap(predictor: Path, base: PretrainedConfig) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The eviction of a KVzap predictor, without its threshold and window; and its tensors under our names."""
    given = _fields_of(predictor)
    expected = {
        "model_type": "kvzap",
        "input_dim": base.hidden_size,
        "output_dim": base.num_key_value_heads,
        "n_modules": base.num_hidden_layers,
    }
    for name, wanted in expected.items():
        if given.get(name) != wanted:
            raise ValueError(
                f"{predictor / 'config.json'}: {name} is {given.get(name)!r}: this model needs {wanted!r}."
            )
    Fields(f"{predictor / 'config.json'}: ", given).integers("hidden_dim", optional=True)
    hidden = given.get("hidden_dim")
    sizes = {"": (base.hidden_size, base.num_key_value_heads)}
    if hidden is not None:
        sizes = {".0": (base.hidden_size, hidden), ".2": (hidden, base.num_key_value_heads)}
    wanted_shapes = {}
    for layer in range(base.num_hidden_layers):
        for part, (inner, outer) in sizes.items():
            wanted_shapes[f"layers.{layer}{part}.weight"] = [outer, inner]
            wanted_shapes[f"layers.{layer}{part}.bias"] = [outer]
    files = [_with_entries(predictor / ONLY_FILE)]
    path, shapes = files[0][0], _shapes(files)
    for name in sorted(wanted_shapes.keys() | shapes.keys()):
        if shapes.get(name) != wanted_shapes.get(name):
            raise ValueError(
                f"{path}: {name} is {shapes.get(name, 'missing')}: with hidden_dim {hidden} in its config.json it "
                f"must be {wanted_shapes.get(name, 'missing')}."
            )
    tensors = {}
    for name, tensor in _tensors(files, wanted_shapes).items():
        _, number, *rest = name.split(".")
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} is {tensor.dtype}: only floating-point numbers are supported.")
        tensors[f"model.layers.{number}.self_attn.kvzap.{'.'.join(rest)}"] = tensor
    eviction = {
        "method": "kvzap",
        "window": 0,
        "shift": 0,
        "threshold": 0.0,
        "hidden_dim": hidden,
        "prefill": "masked",
    }
    return eviction, tensors


def _quantization(given: dict[str, Any]) -> dict[str, Any] | None:
    """The quantisation config in a config.json; older versions of compressed-tensors have another name for it."""
    return given.get("quantization_config") or given.get("compression_config")


def _check_norms(source: Path, files: Files, original: Path | None, layers: int) -> None:
    """Check that a predictor reads in the source what it was trained to read.

    Its input is the output of a layer's first norm. AWQ and SmoothQuant move factors from there into the
    projections, and rotations change the residual stream and leave norms without weights, so that the model
    computes the same and the predictor would not. Nothing but the norms shows it.
    """
    if original is None:
        for _, entries in files:
            for name, entry in entries.items():
                if entry.dtype not in UNQUANTISED:
                    raise ValueError(
                        f"{source} is quantised ({name} is {entry.dtype}), and many ways to quantise change what a "
                        "predictor reads: name the folder of the model beside which it was trained by --original, "
                        "so that the norms can be compared."
                    )
        return
    wanted = [f"model.layers.{layer}.input_layernorm.weight" for layer in range(layers)]
    found, before = _tensors(files, wanted), _tensors(_weight_files(original), wanted)
    for name in wanted:
        for folder, tensors in ((source, found), (original, before)):
            if name not in tensors:
                raise ValueError(f"{folder}: {name} is missing.")
        if not torch.equal(found[name], before[name].to(found[name].dtype)):
            raise ValueError(
                f"{source}: {name} is not that of {original}, so the predictor would not read what it was trained "
                "to read: quantise without AWQ, SmoothQuant and rotations, or convert the original and serve it "
                "with --quantization fp8."
            )


def _tensors(files: Files, wanted: Collection[str]) -> dict[str, torch.Tensor]:
    """Those of the wanted tensors that the files have."""
    found: dict[str, torch.Tensor] = {}
    for path, entries in files:
        try:
            with safe_open(path, framework="pt") as file:
                found |= {name: file.get_tensor(name) for name in wanted if name in entries}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}. Copy it again.") from None
    return found


def _config(given: dict[str, Any], base: PretrainedConfig, eviction: dict[str, Any]) -> dict[str, Any]:
    """The config.json to write."""
    kind = given["model_type"]
    values = {name: getattr(base, name) for name in TEXT_FIELDS if getattr(base, name, None) is not None}
    bias = bool(getattr(base, "attention_bias", False))
    values |= {
        "head_dim": _head_dim(base),
        "attention_bias": bias,
        # Qwen2 has biases there always, and none behind its attention.
        "qkv_bias": bias or kind == "qwen2",
        "mlp_bias": bool(getattr(base, "mlp_bias", False)),
        "qk_norm": kind == "qwen3",
        "base_model_type": kind,
        "eviction": eviction,
    }
    quantization = _quantization(given)
    if quantization:
        values["quantization_config"] = quantization
    EvictingDecoderConfig(**values)
    dtype = given.get("dtype") or given.get("torch_dtype")
    return {
        "architectures": ["EvictingDecoderForCausalLM"],
        "model_type": EvictingDecoderConfig.model_type,
        **({"dtype": dtype} if dtype else {}),
        **values,
    }


def _head_dim(base: PretrainedConfig) -> int:
    return getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads


def _write_weights(made: Path, files: Files, extra: dict[str, torch.Tensor]) -> None:
    """Copy the weights, and write the predictor's and the index of all."""
    total, where, size = len(files) + bool(extra), dict[str, str](), 0
    for number, (path, entries) in enumerate(files, 1):
        name = f"model-{number:05}-of-{total:05}.safetensors"
        shutil.copyfile(path, made / name)
        where |= dict.fromkeys(entries, name)
        size += path.stat().st_size
    if extra:
        name = f"model-{total:05}-of-{total:05}.safetensors"
        save_file(extra, made / name, metadata={"format": "pt"})
        where |= dict.fromkeys(extra, name)
        size += (made / name).stat().st_size
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (made / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def copy_others(source: Path, made: Path) -> list[str]:
    """Copy the tokenizer and whatever else is neither weights, config nor code; return the names."""
    names = []
    for path in sorted(source.iterdir()):
        if (
            path.is_file()
            and not path.name.startswith("config.")
            and not path.name.endswith((*LEFT_BEHIND, ".index.json"))
        ):
            shutil.copyfile(path, made / path.name)
            names.append(path.name)
    return names


def _described(eviction: dict[str, Any]) -> str:
    what = {
        "dms_borrowed_neuron": "by a neuron of each KV head's first query (DMS)",
        "dms_adapter": "by an adapter (DMS)",
        "kvzap": f"where a predicted score is less than {eviction.get('threshold')} (KVzap)",
    }[eviction["method"]]
    if eviction.get("disabled"):
        return f"{what}, but its config says to evict none"
    return f"{what}, each {eviction['window']} tokens after it was read"
