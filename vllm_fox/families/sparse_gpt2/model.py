"""GPT-2 with Dynamic Context Pruning (DCP, arXiv 2305.15805) as a vLLM model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import ClassVar

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import maybe_prefix

from vllm_fox.checkpoint_files import CHECKPOINT_FILES
from vllm_fox.modules.heads import HeadProjection, HeadShare
from vllm_fox.modules.weights import TIED_HEAD, CheckpointLoader, Destination, heads_compared

from .config import SparseGPT2Config
from .layer import SubsetAttention


class SparseSelfAttention(nn.Module):
    """Projections around attention that drops tokens."""

    def __init__(self, vllm_config: VllmConfig, config: SparseGPT2Config, prefix: str) -> None:
        super().__init__()
        size = config.n_embd
        heads, shared = HeadShare.of_rank(config.n_head), HeadShare(1, [0])
        dim = size // config.n_head
        parts = {name: (heads, dim, config.bias) for name in "qkv"}
        # Every rank has the whole interaction projections, so that all ranks drop the same tokens.
        parts |= {name: (shared, config.int_n_embd, False) for name in ("int_q", "int_k")}
        self.in_proj = HeadProjection(size, parts)
        self.c_proj = RowParallelLinear(size, size, bias=config.bias, prefix=f"{prefix}.c_proj")
        self.int_bias = nn.Parameter(torch.empty(1), requires_grad=False)
        self.attn = SubsetAttention(
            vllm_config=vllm_config,
            prefix=f"{prefix}.attn",
            num_heads=heads.count,
            head_dim=dim,
            int_dim=config.int_n_embd,
            bias=self.int_bias,
            propagate=config.propagate_in_depth,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map normed x [T, hidden] to the attention output [T, hidden]."""
        parts = self.in_proj(x)
        out, _ = self.c_proj(self.attn(*(parts[name] for name in ("q", "k", "v", "int_q", "int_k"))))
        return out


class MLP(nn.Module):
    """The MLP of GPT-2, with the tanh form of GELU."""

    def __init__(self, config: SparseGPT2Config, prefix: str) -> None:
        super().__init__()
        size, inner, bias = config.n_embd, 4 * config.n_embd, config.bias
        self.c_fc = ColumnParallelLinear(size, inner, bias=bias, prefix=f"{prefix}.c_fc")
        self.c_proj = RowParallelLinear(inner, size, bias=bias, prefix=f"{prefix}.c_proj")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [T, hidden] to the output [T, hidden]."""
        inner, _ = self.c_fc(x)
        out, _ = self.c_proj(nn.functional.gelu(inner, approximate="tanh"))
        return out


class Block(nn.Module):
    """One layer: normed attention and normed MLP, each added to the residual stream."""

    def __init__(self, vllm_config: VllmConfig, config: SparseGPT2Config, prefix: str) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = SparseSelfAttention(vllm_config, config, prefix=f"{prefix}.attn")
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config, prefix=f"{prefix}.mlp")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [T, hidden] to the output [T, hidden]."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


@support_torch_compile(dynamic_arg_dims={"input_ids": {0: "b"}, "positions": {0: "b"}, "inputs_embeds": {0: "b"}})
class SparseGPT2Model(nn.Module):
    """Embeddings, layers and final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        assert isinstance(config, SparseGPT2Config)
        self.wte = VocabParallelEmbedding(config.vocab_size, config.n_embd, prefix=f"{prefix}.wte")
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(vllm_config, config, prefix=f"{prefix}.h.{n}") for n in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map token ids [T] (or embeddings [T, hidden]) and positions [T] to hidden states [T, hidden]."""
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        x = x + self.wpe(positions)
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


class SparseGPT2LMHeadModel(nn.Module):
    """A GPT-2 that drops tokens for good, as vLLM loads and runs it."""

    # Load only safetensors, which hold no code, and ignore other .safetensors files beside the model.
    fall_back_to_pt_during_load: ClassVar[bool] = False
    allow_patterns_overrides: ClassVar[list[str]] = CHECKPOINT_FILES

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        assert isinstance(config, SparseGPT2Config)
        self.config = config
        self.transformer = SparseGPT2Model(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "transformer"))
        head = ParallelLMHead(self.config.vocab_size, self.config.n_embd, prefix=maybe_prefix(prefix, "lm_head"))
        self.lm_head = head.tie_weights(self.transformer.wte)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.loader = CheckpointLoader(vllm_config, weight_shapes(config), config.model_type)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Map token ids [T] to embeddings [T, hidden]."""
        return self.transformer.wte(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute hidden states (see :meth:`SparseGPT2Model.forward`). There are no pipeline stages."""
        return self.transformer(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Map hidden states [N, hidden] to logits [N, vocab], or to None on ranks that do not sample."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint, or a part of one later.

        Raises:
            ValueError: tensors are missing, unexpected or of a wrong shape, or the output head differs from the
                embeddings. The message names them.
        """

        def compared(equal: bool) -> None:
            if not equal:
                raise ValueError(
                    "lm_head.weight differs from transformer.wte.weight, but these models have one for both: "
                    "leave lm_head.weight out."
                )

        weights = heads_compared(weights, "transformer.wte.weight", "lm_head.weight", compared)
        given = (item for item in weights if item[0] != "lm_head.weight")
        return self.loader.fill(self, given, _destinations)


def weight_shapes(config: SparseGPT2Config) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a checkpoint's tensors."""
    size, inner = config.n_embd, 4 * config.n_embd
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (config.vocab_size, size),
        "transformer.wpe.weight": (config.block_size, size),
    }

    def both(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"] = shape
        if config.bias:
            shapes[f"{name}.bias"] = shape[:1]

    for n in range(config.n_layer):
        block = f"transformer.h.{n}"
        both(f"{block}.ln_1", size)
        both(f"{block}.attn.c_attn", 3 * size, size)
        both(f"{block}.attn.c_proj", size, size)
        shapes[f"{block}.attn.q_int.weight"] = shapes[f"{block}.attn.k_int.weight"] = (config.int_n_embd, size)
        shapes[f"{block}.attn.int_bias"] = (1,)
        both(f"{block}.ln_2", size)
        both(f"{block}.mlp.c_fc", inner, size)
        both(f"{block}.mlp.c_proj", size, inner)
    both("transformer.ln_f", size)
    return shapes


def _destinations(name: str, tensor: torch.Tensor) -> Iterator[Destination]:
    """Yield the parameters that one checkpoint tensor fills."""
    fused = re.sub(r"\.attn\.(c_attn|q_int|k_int)\.", ".attn.in_proj.", name)
    if ".c_attn." in name:
        for part, piece in zip("qkv", tensor.chunk(3)):
            yield fused, part, piece
    elif fused != name:
        yield fused, "int_q" if ".q_int." in name else "int_k", tensor
    else:
        yield name, None, tensor
        if name == "transformer.wte.weight":
            yield TIED_HEAD, None, tensor
