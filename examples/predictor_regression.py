"""How predictors learn what attention the tokens of a frozen model get: KVzap (arXiv 2601.07891).

A text is followed by a request to repeat it and by its repetition, as in KVzip (arXiv 2505.23416). What the
repetition attends to is what the model needs to know of the text. A predictor sees a token of the text when it is
first read, and is to say how much the repetition will attend to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from command_line import refuse
from jinja2 import TemplateError
from torch import nn
from torch.nn.functional import mse_loss

from vllm_fox.hf import EvictingDecoderForCausalLM

REQUEST = "\n\nRepeat the previous context exactly."  # of KVzip and KVzap
QUERIES_AT_ONCE = 128  # whose attention is in memory together
STAND_IN = "THE TEXT"  # is replaced by a text's tokens


def repetition(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the token ids that stand before a text, and those between it and its repetition.

    The user asks and the assistant repeats, if the tokenizer has a chat template. Otherwise the request alone
    stands between the two.

    Raises:
        SystemExit: the chat template does not give the text once for the user and once for the assistant.
    """
    before, between = "", f"{REQUEST}\n"
    if tokenizer.chat_template is not None:
        asked = {"role": "user", "content": STAND_IN + REQUEST}
        try:
            chat = tokenizer.apply_chat_template(
                [asked, {"role": "assistant", "content": STAND_IN}], tokenize=False
            )
            before, between, _ = chat.split(STAND_IN)
        except (TemplateError, ValueError) as error:
            refuse(
                f"CHECKPOINT's chat template cannot say a text and its repetition ({error}): give a copy of the "
                "checkpoint without its chat template."
            )
    first, second = (tokenizer(text, add_special_tokens=False).input_ids for text in (before, between))
    return first, second


def kvzip_plus_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    x: torch.Tensor,
    out_weight: torch.Tensor,
    text: slice,
    repeated: slice,
) -> torch.Tensor:
    """Return the logarithm of KVzip+'s scores of a text's tokens, as KVzap learns to predict it.

    The score of token j and a KV head is the greatest ``A_ij * |W_o v_j| / |x_i|`` over the queries i of the
    repetition and the query heads of the KV head's group. A is the model's causal attention, W_o the query head's
    part of the output projection. Memory grows with N and not with its square.

    Args:
        q: [N, KV heads, G, d] queries, turned by RoPE.
        k, v: [N, KV heads, d] keys, turned by RoPE, and values.
        x: [N, hidden] the attention's input, which is normed.
        out_weight: [hidden, KV heads * G * d] weight of the output projection.
        text, repeated: where the text and its repetition stand among the N tokens.

    Returns:
        [T, KV heads] float32, or float64 if the inputs are.
    """
    q, k, v, x, out_weight = (y.to(torch.promote_types(y.dtype, torch.float32)) for y in (q, k, v, x, out_weight))
    out = out_weight.unflatten(1, q.shape[1:])
    # |W v|^2 is v' (W' W) v, which takes no [T, heads, hidden].
    squares = torch.einsum("jhgc,jhc->hgj", torch.einsum("jhd,hgdc->jhgc", v[text], _gram(out)), v[text])
    log_values = squares.clamp(min=torch.finfo(squares.dtype).tiny).log() / 2
    log_norms = x.norm(dim=-1).log()
    position = torch.arange(len(q), device=q.device)
    best = torch.full_like(log_values, float("-inf"))
    for start in range(repeated.start, repeated.stop, QUERIES_AT_ONCE):
        block = slice(start, min(start + QUERIES_AT_ONCE, repeated.stop))
        logits = torch.einsum("ihgd,jhd->hgij", q[block] * q.shape[-1] ** -0.5, k[: block.stop])
        logits = logits.masked_fill(position[: block.stop] > position[block, None], float("-inf"))
        # In logarithms, so that no weight is too small to be told from 0.
        weights = logits[..., text] - logits.logsumexp(-1, keepdim=True) - log_norms[block, None]
        best = torch.maximum(best, weights.amax(2))
    return (best + log_values).amax(1).T


def _gram(out: torch.Tensor) -> torch.Tensor:
    """Return W' W of each query head's part W of the output projection [hidden, KV heads, G, d]."""
    return torch.einsum("ehgd,ehgc->hgdc", out, out)


class Regression(nn.Module):
    """A frozen model and its predictors, which learn its scores.

    Its output in training is the loss: the mean squared error of the predicted logarithms of scores.
    """

    before: torch.Tensor
    between: torch.Tensor

    def __init__(self, model: EvictingDecoderForCausalLM, before: list[int], between: list[int]) -> None:
        super().__init__()
        self.model: Any = model
        model.set_evicts(False)
        for name, ids in (("before", before), ("between", between)):
            self.register_buffer(name, torch.tensor(ids, dtype=torch.long), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the loss of windows [B, T]."""
        errors = [mse_loss(predicted, scores) for predicted, scores in self.predictions(ids)]
        return torch.stack(errors).mean()

    def predictions(self, ids: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield what is predicted of windows [B, T], and their scores, layer by layer.

        Both are [B * T, KV heads] float32. The model reads the windows and their repetitions once.
        """
        before, between = (part.expand(len(ids), -1) for part in (self.before, self.between))
        read = torch.cat((before, ids, between, ids), dim=1)
        text = slice(before.shape[1], before.shape[1] + ids.shape[1])
        repeated = slice(read.shape[1] - ids.shape[1], read.shape[1])
        with torch.no_grad():
            *states, _ = self.model.model(read, output_hidden_states=True).hidden_states
            positions = torch.arange(read.shape[1], device=ids.device)[None]
            rope = self.model.model.rotary_emb(states[0], positions)
        for layer, state in zip(self.model.model.layers, states, strict=True):
            attention = layer.self_attn
            with torch.no_grad():
                x = layer.input_layernorm(state)
                projected = [attention.project(row) for row in x]
            # What is learned is computed in float32, also where the model is in bfloat16.
            with torch.autocast(ids.device.type, enabled=False):
                with torch.no_grad():
                    weight = attention.o_proj.weight
                    scores = []
                    for row, (q, k, v) in zip(x, projected, strict=True):
                        q, k = attention.rotate(q, k, rope)
                        scores.append(kvzip_plus_scores(q, k, v, row, weight, text, repeated))
                predicted = attention.kvzap(x[:, text].flatten(0, 1).float())
            yield predicted, torch.cat(scores)

    @torch.no_grad()
    def start_at_mean(self, ids: torch.Tensor) -> None:
        """Let all predictors begin with the mean scores of windows [B, T], from which steps are shorter."""
        for layer, (_, scores) in zip(self.model.model.layers, self.predictions(ids), strict=True):
            predictor = layer.self_attn.kvzap
            last: Any = predictor[-1] if isinstance(predictor, nn.Sequential) else predictor
            last.bias.copy_(scores.mean(0))

    def figures(self, windows: Iterable[torch.Tensor]) -> dict[str, float]:
        """How well windows [1, T] are predicted: the mean squared error, and the share of the scores' variance that
        the predictors explain (R squared), as the mean over layers and KV heads."""
        found = [torch.stack([torch.stack(pair) for pair in self.predictions(ids)]) for ids in windows]
        predicted, scores = torch.cat(found, dim=2).unbind(1)  # [layers, tokens, KV heads]
        errors = (predicted - scores).square().mean(1)
        return {
            "squared_error": errors.mean().item(),
            "r_squared": (1 - errors / scores.var(1, correction=0)).mean().item(),
        }
