"""The windowed decoder as a vLLM model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import maybe_prefix

from vllm_fox.attention.layer import PagedAttention
from vllm_fox.kernels.paged import PageTable
from vllm_fox.modules.heads import HeadProjection, HeadShare
from vllm_fox.modules.weights import CheckpointLoader, Destination
from vllm_fox.settings import PageSettings

from .attention import WindowedFormula, WindowedState
from .config import WindowedConfig
from .pages import WindowedPageFormat


class WindowedAttention(PagedAttention[WindowedState]):
    """The attention layer: its pages, its formula, and the state that a worker's layers share."""

    impl: WindowedFormula
    page_format: WindowedPageFormat

    def __init__(self, vllm_config: VllmConfig, prefix: str, windows: list[int], head_dim: int) -> None:
        dtype = vllm_config.model_config.dtype
        assert isinstance(dtype, torch.dtype)
        super().__init__(
            vllm_config,
            prefix,
            page_format=WindowedPageFormat(vllm_config.cache_config.block_size, head_dim, dtype),
            streams=len(windows),
            head_size=head_dim,
            release=PageSettings.from_vllm_config(vllm_config).release,
            report_period=16,
        )
        self.impl = WindowedFormula(self.index, head_dim**-0.5, windows)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """[T, H * d] each, to the same."""
        return self.run([q, k, v])

    @classmethod
    def make_state(cls, layers: list[WindowedAttention], table: PageTable, max_rows: int) -> WindowedState:
        k, v = layers[0].page_format.view(layers[0].pool())
        return WindowedState(table, k, v, torch.tensor([n for layer in layers for n in layer.impl.windows]))

    def dry_inputs(self, tokens: int, device: torch.device) -> list[torch.Tensor]:
        width = len(self.impl.windows) * self.page_format.head_dim
        return [torch.zeros(tokens, width, dtype=self.page_format.dtype, device=device) for _ in range(3)]


class Layer(nn.Module):
    """Attention over the windows of this rank's heads, added to the residual stream."""

    def __init__(self, vllm_config: VllmConfig, config: WindowedConfig, prefix: str) -> None:
        super().__init__()
        heads, size = HeadShare.of_rank(config.num_attention_heads), config.hidden_size
        dim = size // config.num_attention_heads
        self.in_proj = HeadProjection(size, {name: (heads, dim, False) for name in "qkv"})
        self.attn = WindowedAttention(
            vllm_config, f"{prefix}.attn", [config.windows[head] for head in heads.heads], dim
        )
        self.o_proj = RowParallelLinear(size, size, bias=False, prefix=f"{prefix}.o_proj")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] to the same."""
        parts = self.in_proj(x)
        out, _ = self.o_proj(self.attn(parts["q"], parts["k"], parts["v"]))
        return x + out


@support_torch_compile(dynamic_arg_dims={"input_ids": {0: "b"}, "positions": {0: "b"}, "inputs_embeds": {0: "b"}})
class WindowedModel(nn.Module):
    """Embeddings and layers."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        assert isinstance(config, WindowedConfig)
        self.embed = VocabParallelEmbedding(config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed")
        self.layers = nn.ModuleList(
            Layer(vllm_config, config, f"{prefix}.layers.{n}") for n in range(config.num_hidden_layers)
        )

    def forward(
        self, input_ids: torch.Tensor | None, positions: torch.Tensor, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[T] token ids, or [T, hidden] embeddings, to [T, hidden]."""
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            x = layer(x)
        return x


class WindowedForCausalLM(nn.Module):
    """A windowed decoder as vLLM loads and runs it."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        assert isinstance(config, WindowedConfig)
        self.config = config
        self.model = WindowedModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head"))
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.loader = CheckpointLoader(vllm_config, weight_shapes(config), "windowed")

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[T] to [T, hidden]."""
        return self.model.embed(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As :meth:`WindowedModel.forward`."""
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """[N, hidden] to [N, vocab]; None on ranks that do not sample."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint; raises ValueError that names tensors which do not fit."""
        return self.loader.fill(self, weights, _destinations)


def weight_shapes(config: WindowedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a checkpoint."""
    size = config.hidden_size
    shapes = {name: (config.vocab_size, size) for name in ("model.embed.weight", "lm_head.weight")}
    for layer in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{part}_proj.weight": (size, size) for part in "qkvo"}
    return shapes


def _destinations(name: str, tensor: torch.Tensor) -> Iterator[Destination]:
    """Parameters that one checkpoint tensor fills: q, k and v are parts of one projection."""
    found = re.fullmatch(r"(.*)\.([qkv])_proj\.weight", name)
    yield (f"{found[1]}.in_proj.weight", found[2], tensor) if found else (name, None, tensor)
