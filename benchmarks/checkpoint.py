"""Models to benchmark serving with: a FoX (Pro) with random weights and real forgetting, and a Llama of its size;
a GPT-2 that drops tokens, and one that does not.

    python -m benchmarks.checkpoint fox FOLDER [--layers 24 --hidden 1536 --heads 24] [--no-qk-norm]
    python -m benchmarks.checkpoint llama FOLDER
    python -m benchmarks.checkpoint statistics gates.safetensors
    python -m benchmarks.checkpoint sparse-gpt2 FOLDER     # GPT-2 small's sizes
    python -m benchmarks.checkpoint gpt2 FOLDER

What a Forgetting Transformer costs to serve depends on how its heads forget and on the bounds of their logits, not
on what it has learned. So the weights are random, but each head's forget gate is constant at the mean log-forget
of a head of a trained FoX (Pro), and its QK-norm has that head's logit bound (both up to bfloat16 rounding of the
weights). Without QK-norm, the bound is that of the random projections. data/gate_statistics.json holds the 48
heads; `statistics` makes it from measured gates.

The Llama is the baseline of the FoX paper (arXiv 2503.02130): as many layers and heads of the same size, and an MLP
of ratio 4 where FoX (Pro) has 3.5 and an output gate, which makes as many parameters. It is only a config.json, for
vLLM's ``load_format="dummy"``; so is the dense GPT-2.

The GPT-2 that drops tokens (DCP, arXiv 2305.15805) has random weights too. Position embeddings outweigh those of
tokens, so that what it drops does not depend on what it happens to write, and the bias of its interaction scores is
set so that it keeps :data:`KEPT` of the (query, earlier token) pairs.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from benchmarks.options import Parser, positive_int, read_record, refuse, settle_all, write_whole
from vllm_fox.families.fox.architecture import Architecture, expected_weights, resolve_intermediate_size
from vllm_fox.families.fox.config import FoxConfig

if TYPE_CHECKING:
    from transformers import LlamaConfig

STATISTICS = Path(__file__).parent / "data" / "gate_statistics.json"

STD = 0.02
"""Standard deviation of random weights."""

KEPT = 0.2
"""Share of the pairs that the GPT-2 that drops tokens keeps: the paper prunes up to four fifths."""


class Head(NamedTuple):
    """How a trained head forgets.

    Attributes:
        mean_log_forget: mean of log f over tokens, negative, natural logarithm.
        logit_bound: U >= max |q·k| / sqrt(d) from its QK-norm weights.
    """

    mean_log_forget: float
    logit_bound: float


@dataclass(frozen=True)
class Geometry:
    """Sizes of both models, and whether the FoX has QK-norm. The defaults are the published 760M models'."""

    layers: int = 24
    hidden: int = 1536
    heads: int = 24
    vocab: int = 32000
    max_positions: int = 131072
    qk_norm: bool = True

    @property
    def name(self) -> str:
        """For folder names."""
        sizes = f"{self.layers}x{self.hidden}x{self.heads}-v{self.vocab}-p{self.max_positions}"
        return sizes if self.qk_norm else f"{sizes}-no-qk-norm"


# FoX (Pro).


def fox_config(geometry: Geometry) -> FoxConfig:
    """FoX (Pro) as published, in the official dialect.

    Raises:
        ValueError: sizes that do not fit one another.
    """
    return FoxConfig(
        vocab_size=geometry.vocab,
        hidden_size=geometry.hidden,
        hidden_ratio=3.5,
        num_hidden_layers=geometry.layers,
        num_heads=geometry.heads,
        max_position_embeddings=geometry.max_positions,
        use_output_gate=True,
        use_output_norm=True,
        qk_norm=geometry.qk_norm,
        use_k_shift=True,
        use_v_shift=True,
    )


def read_statistics(path: Path = STATISTICS) -> list[Head]:
    """The heads of a trained model, layer by layer."""
    return [Head(**entry) for entry in json.loads(path.read_text())["heads"]]


def gate_bias(mean_log_forget: float) -> float:
    """b with logsigmoid(b) = mean_log_forget."""
    return mean_log_forget - math.log(-math.expm1(mean_log_forget))


def qk_norm_weight(logit_bound: float, dim: int) -> float:
    """w with w * w * sqrt(dim) = logit_bound: the bound of a head whose q and k norms both have weight w."""
    return math.sqrt(logit_bound / math.sqrt(dim))


def fox_weights(config: FoxConfig, heads: Sequence[Head], seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint, in bfloat16.

    Args:
        config: of an official FoX with full forget gates, and with QK-norm per head or none.
        heads: head h of layer l forgets as entry ``(l * config.num_heads + h) % len(heads)``.
        seed: of the random weights.
    """
    rng = torch.Generator().manual_seed(seed)
    dim, weights = config.hidden_size // config.num_heads, {}
    for name, shape in expected_weights(Architecture.from_config(config)).items():
        leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if name.endswith("fgate_proj.weight"):
            tensor = torch.zeros(shape)
        elif name.endswith("fgate_proj.bias"):
            tensor = torch.tensor([gate_bias(head.mean_log_forget) for head in _of_layer(name, config, heads)])
        elif leaf in ("q_norm", "k_norm"):
            each = [qk_norm_weight(head.logit_bound, dim) for head in _of_layer(name, config, heads)]
            tensor = torch.tensor(each).repeat_interleave(dim)
        elif leaf.endswith("norm"):
            tensor = torch.ones(shape)
        else:
            tensor = torch.randn(shape, generator=rng) * STD
        assert tensor.shape == shape, name
        weights[name] = tensor.bfloat16()
    return weights


def _of_layer(name: str, config: FoxConfig, heads: Sequence[Head]) -> list[Head]:
    """The entries of all heads of the layer that a tensor belongs to."""
    layer = int(name.split(".layers.")[1].split(".")[0])
    first = layer * config.num_heads
    return [heads[(first + head) % len(heads)] for head in range(config.num_heads)]


def write_fox(folder: Path, geometry: Geometry) -> None:
    """config.json and model.safetensors."""
    from safetensors.torch import save_file

    config = fox_config(geometry)
    config.dtype = torch.bfloat16
    config.architectures = ["ForgettingTransformerForCausalLM"]
    config.save_pretrained(folder)
    save_file(fox_weights(config, read_statistics()), folder / "model.safetensors", {"format": "pt"})


def fox_parameters(geometry: Geometry) -> int:
    """Number of parameters of the FoX."""
    shapes = expected_weights(Architecture.from_config(fox_config(geometry))).values()
    return sum(math.prod(shape) for shape in shapes)


# Llama.


def llama_intermediate(geometry: Geometry) -> int:
    """Inner size of the MLP: FoX's rule with ratio 4."""
    return resolve_intermediate_size(
        SimpleNamespace(intermediate_size=None, hidden_size=geometry.hidden, hidden_ratio=4)
    )


def llama_config(geometry: Geometry) -> LlamaConfig:
    """Of the same sizes as the FoX."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=geometry.vocab,
        hidden_size=geometry.hidden,
        intermediate_size=llama_intermediate(geometry),
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.heads,
        max_position_embeddings=geometry.max_positions,
        tie_word_embeddings=False,
        initializer_range=STD,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )


def write_llama(folder: Path, geometry: Geometry) -> None:
    """config.json only."""
    llama_config(geometry).save_pretrained(folder)


def llama_parameters(geometry: Geometry) -> int:
    """Number of parameters of the Llama."""
    hidden = geometry.hidden
    layer = 4 * hidden**2 + 3 * hidden * llama_intermediate(geometry) + 2 * hidden
    return 2 * geometry.vocab * hidden + geometry.layers * layer + hidden


# GPT-2.

GPT2_SMALL = Geometry(layers=12, hidden=768, heads=12, vocab=50257, max_positions=1024)


def gpt2_sizes(geometry: Geometry) -> dict[str, Any]:
    """Fields of both configs."""
    sizes = {"n_layer": geometry.layers, "n_head": geometry.heads, "n_embd": geometry.hidden}
    return {"vocab_size": geometry.vocab, **sizes}


def write_gpt2(folder: Path, geometry: Geometry) -> None:
    """config.json only."""
    from transformers import GPT2Config

    config = GPT2Config(n_positions=geometry.max_positions, **gpt2_sizes(geometry))
    config.dtype = torch.bfloat16
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(folder)


def write_sparse_gpt2(folder: Path, geometry: Geometry) -> None:
    """config.json and model.safetensors."""
    from vllm_fox.families.sparse_gpt2.config import SparseGPT2Config
    from vllm_fox.hf import SparseGPT2LMHeadModel

    torch.manual_seed(0)
    config = SparseGPT2Config(block_size=geometry.max_positions, **gpt2_sizes(geometry))
    model: Any = SparseGPT2LMHeadModel(config)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    torch.nn.init.normal_(model.transformer["wpe"].weight, std=4 * STD)
    ids = torch.randint(geometry.vocab, (1, geometry.max_positions), device=model.device)
    low, high = 0.0, 6.0
    for _ in range(12):
        bias = (low + high) / 2
        for block in model.transformer["h"]:
            torch.nn.init.constant_(block.attn.int_bias, bias)
        low, high = (bias, high) if model.visible_shares(ids).mean() < KEPT else (low, bias)
    model.bfloat16().save_pretrained(folder)


# Folders.

Size = TypeVar("Size")
"""What tells a model's sizes."""


def ready(folder: str | Path, write: Callable[[Path, Size], None], geometry: Size) -> Path:
    """The folder, written if it has no config.json yet; it appears complete or not at all."""
    folder = Path(folder)
    if read_record(folder / "config.json") is not None:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        new = Path(scratch) / "model"
        new.mkdir()
        write(new, geometry)
        settle_all(new)
        if (folder / "config.json").exists() and read_record(folder / "config.json") is None:
            shutil.rmtree(folder)
        try:
            new.rename(folder)
        except OSError:  # another process was faster
            if not (folder / "config.json").is_file():
                raise
    return folder


# Statistics of measured gates.


def write_statistics(trace: Path, path: Path = STATISTICS) -> None:
    """Save the mean log-forget and the logit bound of every column of measured gates.

    Args:
        trace: safetensors with ``log_forget`` [tokens, columns] and ``logit_bound`` [columns], a column per
            (layer, head), layer by layer.
        path: the JSON to write.
    """
    from safetensors.torch import load_file

    tensors = load_file(trace)
    means = tensors["log_forget"].double().mean(0).tolist()
    bounds = tensors["logit_bound"].double().tolist()
    heads = [
        {"mean_log_forget": float(f"{mean:.6g}"), "logit_bound": float(f"{bound:.6g}")}
        for mean, bound in zip(means, bounds)
    ]
    about = (
        f"Mean log forget gate over {len(tensors['log_forget']):,} tokens of held-out Python source, and bound on "
        "|q.k| / sqrt(d) from the QK-norm weights, of every head of a FoX (Pro) of 8 layers of 6 heads of 64, "
        "trained by the official code; layer by layer."
    )
    rows = ",\n".join("  " + json.dumps(head) for head in heads)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, f'{{\n "about": {json.dumps(about)},\n "heads": [\n{rows}\n ]\n}}\n')


# Command line.


def add_geometry_options(parser: argparse.ArgumentParser) -> None:
    """--layers, --hidden, --heads."""
    default = Geometry()
    parser.add_argument("--layers", type=positive_int, default=default.layers)
    parser.add_argument("--hidden", type=positive_int, default=default.hidden, help="hidden size")
    parser.add_argument("--heads", type=positive_int, default=default.heads, help="query heads, and KV heads")


def geometry_of(args: argparse.Namespace) -> Geometry:
    """The sizes that were asked for; ends the program with a sentence if they do not fit one another."""
    geometry = Geometry(args.layers, args.hidden, args.heads)
    try:
        fox_config(geometry)
    except ValueError as error:
        refuse(f"--hidden {args.hidden} and --heads {args.heads} do not go together: {error}")
    return geometry


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
    for name, text in (("fox", "FoX (Pro) with random weights"), ("llama", "config.json of the Llama")):
        command = commands.add_parser(name, help=text)
        command.add_argument("folder", type=Path)
        add_geometry_options(command)
    commands.choices["fox"].add_argument("--no-qk-norm", dest="qk_norm", action="store_false")
    for name, text in (("sparse-gpt2", "a GPT-2 that drops tokens"), ("gpt2", "config.json of GPT-2")):
        commands.add_parser(name, help=text).add_argument("folder", type=Path)
    statistics = commands.add_parser("statistics", help=f"write {STATISTICS.name} from measured gates")
    statistics.add_argument("trace", type=Path, help="safetensors with log_forget and logit_bound")
    args = parser.parse_args()
    if args.what == "statistics":
        if not args.trace.is_file():
            raise SystemExit(f"{args.trace} is not a file: give safetensors with log_forget and logit_bound.")
        write_statistics(args.trace)
        print(f"saved {STATISTICS}")
        return
    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        raise SystemExit(f"{args.folder} is not an empty folder: choose a new one.")
    if args.what in ("sparse-gpt2", "gpt2"):
        ready(args.folder, write_gpt2 if args.what == "gpt2" else write_sparse_gpt2, GPT2_SMALL)
        print(f"saved {args.folder}")
        return
    geometry = geometry_of(args)
    if args.what == "fox":
        geometry = replace(geometry, qk_norm=args.qk_norm)
    ready(args.folder, write_fox if args.what == "fox" else write_llama, geometry)
    count = (fox_parameters if args.what == "fox" else llama_parameters)(geometry)
    print(f"saved {args.folder}: {count / 1e6:.1f}M parameters")


if __name__ == "__main__":
    main()
