"""The formula of forgetting attention in float64, and inputs for it."""

from __future__ import annotations

import torch

from vllm_fox.kernels.rope import rotate


def formula(
    inputs: dict[str, torch.Tensor], k_norm: torch.Tensor | None = None, rope_base: float | None = None
) -> torch.Tensor:
    """Forgetting attention of one sequence in float64 with full [T, T] matrices: [T, H, G, d]."""
    data = {name: value.double() for name, value in inputs.items()}
    q, k, v, log_f = data["q"], data["k"], data["v"], data["log_f"]
    length, dim = k.shape[0], k.shape[-1]

    def shifted(x: torch.Tensor, name: str) -> torch.Tensor:
        if name not in data:
            return x
        a = data[name][..., None]
        return a * torch.cat((torch.zeros_like(x[:1]), x[:-1])) + (1 - a) * x

    k, v = shifted(k, "shift_k"), shifted(v, "shift_v")
    if k_norm is not None:
        k = k * torch.rsqrt(k.square().mean(-1, keepdim=True) + 1e-5) * k_norm.double()
    if rope_base is not None:
        k = rotate(k, torch.arange(length, device=k.device), rope_base)
    c = log_f.cumsum(0)
    logits = torch.einsum("ihgd,jhd->hgij", q, k) / dim**0.5
    logits = logits + (c[:, None] - c[None]).permute(2, 3, 0, 1)
    logits = logits.masked_fill(
        torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1), float("-inf")
    )
    return torch.einsum("hgij,jhd->ihgd", logits.softmax(-1), v)


def random_inputs(
    length: int,
    heads: int = 2,
    groups: int = 1,
    dim: int = 32,
    *,
    gates: str = "mixed",
    shift: bool = False,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Inputs of one sequence; ``gates`` names a pattern of forgetting."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    log_f = -torch.rand(length, heads, groups, generator=rng)
    if gates == "never":
        log_f = log_f * 0
    elif gates == "all":
        log_f = log_f - 30.0
    elif gates == "alternating":
        log_f[::2] = 0.0
        log_f[1::2] -= 3.0
    elif gates == "floor":
        log_f[length // 3] = -1e6
    elif gates == "mixed":  # from never to quickly
        rate = torch.linspace(0, 1, heads * groups).square().view(heads, groups)
        log_f = log_f * rate
    else:
        raise ValueError(gates)
    inputs = {
        "q": normal(length, heads, groups, dim),
        "k": normal(length, heads, dim),
        "v": normal(length, heads, dim),
        "log_f": log_f,
    }
    if shift:
        inputs["shift_k"] = torch.rand(length, heads, generator=rng)
        inputs["shift_v"] = torch.rand(length, heads, generator=rng)
    return inputs


def cut(inputs: dict[str, torch.Tensor], start: int, end: int) -> dict[str, torch.Tensor]:
    """Tokens ``start:end`` of a sequence's inputs."""
    return {name: value[start:end] for name, value in inputs.items()}
