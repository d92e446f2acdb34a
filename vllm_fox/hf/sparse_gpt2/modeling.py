"""GPT-2 with Dynamic Context Pruning (DCP, adaptively sparse attention, arXiv 2305.15805) as a transformers model.

Every layer scores each earlier token by two small projections. A token that a query scores at 0 or less is dropped
for that query and all later ones. For training this step is softened to an alpha-sigmoid.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, GPT2LMHeadModel, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from vllm_fox.families.sparse_gpt2.config import SparseGPT2Config

from .alpha_sigmoid import SoftStep, soft_step
from .dropping_attention import dropping_attention

INITIAL_BIAS = 5.0
"""Bias of a fresh model's interaction scores, at which nothing is dropped."""
INITIAL_STD = 0.02
"""Standard deviation of fresh weights, as in GPT-2."""


class _Projection(nn.Linear):
    """A projection that stores the standard deviation of its fresh weights.

    transformers does not call ``_init_weights`` for modules without tensors of their own, such as our layers, so a
    layer cannot initialise its projections.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, std: float = INITIAL_STD) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.init_std = std


class SparseSelfAttention(nn.Module):
    """Attention over the tokens that no query so far has dropped."""

    def __init__(self, config: SparseGPT2Config) -> None:
        super().__init__()
        size, bias = config.n_embd, config.bias
        self.heads, self.hands_on = config.n_head, config.propagate_in_depth
        self.c_attn = _Projection(size, 3 * size, bias)
        self.c_proj = _Projection(size, size, bias, INITIAL_STD / math.sqrt(2 * config.n_layer))
        self.q_int = _Projection(size, config.int_n_embd, False, size**-0.5)
        self.k_int = _Projection(size, config.int_n_embd, False, size**-0.5)
        self.int_bias = nn.Parameter(torch.full((1,), INITIAL_BIAS))

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        """Map normed x [B, T, hidden] to I [B, T, T]: 1 where this layer has kept key j for query k, else 0."""
        q, k = self.interaction(x)
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + self.int_bias.to(q.dtype)
        earlier = torch.ones_like(scores[0], dtype=torch.bool).tril(-1)
        return torch.where(earlier, scores > 0, True).to(q.dtype).cumprod(1)

    def interaction(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the queries and keys [B, T, r] that decide what is dropped, in float32 or wider."""
        q, k = (y.to(torch.promote_types(y.dtype, torch.float32)) for y in (self.q_int(x), self.k_int(x)))
        return q, k

    def forward(
        self, x: torch.Tensor, alpha: float | SoftStep, before: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Compute attention of normed x [B, T, hidden].

        Returns:
            The output [B, T, hidden]; the layer's log I plus ``before``, or None if layers above do not need it;
            and the mean of I (see :func:`.dropping_attention.dropping_attention`).
        """
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.c_attn(x).chunk(3, -1))
        out, logs, kept = dropping_attention(
            q, k, v, *self.interaction(x), self.int_bias, before, alpha, hand_on=self.hands_on
        )
        return self.c_proj(out.transpose(1, 2).flatten(2)), logs, kept


class MLP(nn.Module):
    """The MLP of GPT-2, with the tanh form of GELU."""

    def __init__(self, config: SparseGPT2Config) -> None:
        super().__init__()
        size, inner = config.n_embd, 4 * config.n_embd
        self.c_fc = _Projection(size, inner, config.bias)
        self.c_proj = _Projection(inner, size, config.bias, INITIAL_STD / math.sqrt(2 * config.n_layer))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., hidden] to the output [..., hidden]."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """One layer: normed attention and normed MLP, each added to the residual stream."""

    def __init__(self, config: SparseGPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = SparseSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(
        self, x: torch.Tensor, alpha: float | SoftStep, before: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Return the output [B, T, hidden], and what else :meth:`SparseSelfAttention.forward` returns."""
        y, logs, kept = self.attn(self.ln_1(x), alpha, before)
        x = x + y
        return x + self.mlp(self.ln_2(x)), logs, kept


class SparseGPT2LMHeadModel(PreTrainedModel, GenerationMixin):
    """A GPT-2 that learns which tokens to drop. It can be trained, and computes the logits that a server will.

    Attributes:
        alpha: alpha of the alpha-sigmoid in training mode. In evaluation mode a token is either kept or dropped.
    """

    config_class = SparseGPT2Config
    base_model_prefix = "transformer"
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012 (as transformers declares them)

    def __init__(self, config: SparseGPT2Config) -> None:
        super().__init__(config)
        self.alpha = 1.0
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_gpt2(
        cls, source: str | Path | GPT2LMHeadModel, int_bias: float = INITIAL_BIAS, **config: Any
    ) -> SparseGPT2LMHeadModel:
        """Make a model from a GPT-2 of transformers, with fresh interaction weights, which drop nothing yet.

        Args:
            source: a GPT-2 checkpoint, or the model.
            int_bias: bias of the interaction scores. At first, a query in training keeps about
                ``1 - exp(-int_bias)`` of a token in each layer: the paper's 5 leaves 3 % of a token that is 500
                tokens back.
            config: ``int_n_embd`` and ``propagate_in_depth``, if they differ from the defaults.
        """
        dense = source if isinstance(source, GPT2LMHeadModel) else GPT2LMHeadModel.from_pretrained(source)
        given = dense.config
        if given.n_inner not in (None, 4 * given.n_embd) or given.activation_function != "gelu_new":
            raise ValueError(
                f"from_gpt2: n_inner is {given.n_inner} and activation_function {given.activation_function}: they "
                f"must be {4 * given.n_embd} (or null) and gelu_new."
            )
        model = cls(
            SparseGPT2Config(
                n_layer=given.n_layer,
                n_head=given.n_head,
                n_embd=given.n_embd,
                block_size=given.n_positions,
                vocab_size=given.vocab_size,
                bos_token_id=given.bos_token_id,
                eos_token_id=given.eos_token_id,
                **config,
            )
        )
        own = model.state_dict()
        for name, tensor in dense.state_dict().items():
            if name in own:
                # transformers keeps GPT-2's matrices as [in, out].
                matrix = tensor.dim() == 2 and ".h." in name
                own[name].copy_(tensor.T if matrix else tensor)
        blocks: Any = model.transformer["h"]
        for block in blocks:
            nn.init.constant_(block.attn.int_bias, int_bias)
        return model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=getattr(module, "init_std", INITIAL_STD))
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, SparseSelfAttention):
            nn.init.constant_(module.int_bias, INITIAL_BIAS)

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer["wte"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer["wte"] = value

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return all tokens: ``generate`` computes them anew for each new token, as only a server has a cache."""
        return {"input_ids": input_ids}

    @torch.no_grad()
    def visible_shares(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the share [layers], 0 to 1, of (query, earlier token) pairs of texts [B, T] that a layer keeps."""
        seen = self.visible(input_ids)
        earlier = torch.ones_like(seen[0, 0]).tril(-1)
        return seen[..., earlier].float().mean((1, 2))

    @torch.no_grad()
    def visible(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return which earlier tokens of texts [B, T] each layer has kept for a query: [layers, B, T, T] bool."""
        training, inputs = self.training, []
        blocks: Any = self.transformer["h"]
        watching = [
            block.attn.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for block in blocks
        ]
        self.eval()
        self._run(input_ids)
        self.train(training)
        for watch in watching:
            watch.remove()
        kept = torch.stack([block.attn.kept(x) for block, x in zip(blocks, inputs, strict=True)])
        return (kept.cumprod(0) if self.config.propagate_in_depth else kept).bool().tril()

    def _run(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the final hidden states, and the mean of I over layers."""
        length = input_ids.shape[1]
        if length > self.config.block_size:
            raise ValueError(f"input_ids has {length} tokens: the model's block_size is {self.config.block_size}.")
        alpha: float | SoftStep = self.alpha if self.training else math.inf
        if alpha != math.inf and self.dtype != torch.float64:
            alpha = soft_step(self.alpha, input_ids.device)
        wte, wpe, blocks, ln_f = (self.transformer[name] for name in ("wte", "wpe", "h", "ln_f"))
        x = wte(input_ids) + wpe(torch.arange(length, device=input_ids.device))
        kept, before = [], None
        assert isinstance(blocks, nn.ModuleList)
        for block in blocks:
            x, before, mine = block(x, alpha, before)
            kept.append(mine)
        return ln_f(x), torch.stack(kept).mean()

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        gamma: float = 0.0,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Compute next-token logits, and the loss if labels are given.

        If the config's ``propagate_in_depth`` is set, memory in training grows with B * layers * T^2 floats: in 12
        layers a text of 1,024 tokens takes 50 MB, and one of 4,096 tokens 800 MB.

        Args:
            input_ids: [B, T], T up to ``block_size``; no padding.
            labels: [B, T]; each is compared with the logits of the token before it. -100 stands for no label.
            gamma: weight in the loss of what is kept. The loss grows by gamma times the mean of I over layers, all
                queries but the last, and all T keys. Keys that a query cannot see count as 1, as in the paper's
                code.
            logits_to_keep: number of tokens at the end whose logits are computed; 0 stands for all.
        """
        hidden, kept = self._run(input_ids)
        logits: Any = self.lm_head(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if gamma:
                loss = loss + gamma * kept
        return CausalLMOutput(loss=loss, logits=logits)
