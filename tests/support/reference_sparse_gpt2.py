"""GPT-2 with Dynamic Context Pruning in float64, a token at a time, with sets of dropped tokens (arXiv 2305.15805).

Written from the formulas and tensor names alone; it shares no code with the models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file


def reference(
    config: Any, tensors: Mapping[str, torch.Tensor], token_ids: Sequence[int]
) -> tuple[torch.Tensor, list[list[list[int]]]]:
    """Next-token logits [T, vocab] float64, and by layer and token the earlier tokens that it still sees."""
    w = {name.removeprefix("transformer."): tensor.double() for name, tensor in tensors.items()}
    layers, size = config.n_layer, config.n_embd // config.n_head
    cache: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in range(layers)]
    dropped: list[set[int]] = [set() for _ in range(layers)]
    seen: list[list[list[int]]] = [[] for _ in range(layers)]
    logits = []
    for t, token in enumerate(token_ids):
        x = w["wte.weight"][token] + w["wpe.weight"][t]
        for n in range(layers):
            h = {name.removeprefix(f"h.{n}."): tensor for name, tensor in w.items() if name.startswith(f"h.{n}.")}
            normed = _norm(x, h, "ln_1")
            q, k, v = _linear(normed, h, "attn.c_attn").chunk(3)
            q_int, k_int = h["attn.q_int.weight"] @ normed, h["attn.k_int.weight"] @ normed
            for j, (_, _, other) in enumerate(cache[n]):
                if q_int @ other / math.sqrt(len(other)) + h["attn.int_bias"] <= 0:
                    dropped[n].add(j)
            cache[n].append((k, v, k_int))
            gone = set().union(*dropped[: n + 1]) if config.propagate_in_depth else dropped[n]
            live = [j for j in range(t + 1) if j not in gone]
            seen[n].append(live[:-1])
            keys, values = (torch.stack([cache[n][j][i] for j in live]).unflatten(1, (-1, size)) for i in (0, 1))
            weights = (torch.einsum("hd,jhd->hj", q.view(-1, size), keys) / math.sqrt(size)).softmax(1)
            x = x + _linear(torch.einsum("hj,jhd->hd", weights, values).flatten(), h, "attn.c_proj")
            inner = F.gelu(_linear(_norm(x, h, "ln_2"), h, "mlp.c_fc"), approximate="tanh")
            x = x + _linear(inner, h, "mlp.c_proj")
        logits.append(_norm(x, w, "ln_f") @ w["wte.weight"].T)
    return torch.stack(logits), seen


def reference_logits(folder: str | Path, token_ids: Sequence[int]) -> torch.Tensor:
    """The logits of a checkpoint."""
    config = SimpleNamespace(**json.loads(Path(folder, "config.json").read_text()))
    return reference(config, load_file(Path(folder, "model.safetensors")), token_ids)[0]


def _linear(x: torch.Tensor, w: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def _norm(x: torch.Tensor, w: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    return F.layer_norm(x, x.shape, w[f"{name}.weight"], w.get(f"{name}.bias"), 1e-5)
