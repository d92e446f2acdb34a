"""Peers of our attention kernels, each as a call on dense tensors, and what measures them.

A peer that cannot run here (package absent, other device, shape not supported) binds to None with the reason in
one line, so a benchmark prints a gap instead of failing::

    for peer in PREFILL:
        call, reason = peer.bind(inputs)
        print(peer.label, f"{median_ms(call, graph=True):.3f} ms" if call else reason)

The official implementation (``forgetting_transformer``), flash-linear-attention, xformers and vLLM's
FlashAttention 3 are imported when they are bound and not before. All peers have as many KV heads as query heads.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from vllm_fox.kernels import acp

Call = Callable[[], torch.Tensor]

MAX_BIAS_LENGTH = 4096
"""Longest prompt for which a bias is written out as [H, T, T]."""

SYNTHETIC_SEED = 20250
"""Seed of synthetic gates."""

SYNTHETIC_MEANS = (4e-4, 2.5)
"""Slowest and fastest mean of -log f over the heads of a small trained model; heads lie evenly between in log."""

SYNTHETIC_BOUND = 11.5
"""Logit bound of synthetic gates: the median over the heads of the same model."""

STATISTICS = Path(__file__).parent / "data" / "gate_statistics.json"


class AbsentError(Exception):
    """The peer cannot run on these inputs here; the message says why."""


@dataclass(frozen=True)
class Prefill:
    """One prompt of T tokens and H heads of D.

    Attributes:
        q, k, v: [1, T, H, D], bfloat16, contiguous.
        log_forget: [1, T, H] float32, at most 0.
        logit_bound: [H] float32, U >= max |q·k| / sqrt(D).
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    log_forget: torch.Tensor
    logit_bound: torch.Tensor


@dataclass(frozen=True)
class Decode:
    """One new token of B sequences, and a dense paged cache in vLLM's layout.

    Attributes:
        q: [B, H, D], bfloat16, contiguous.
        k_cache, v_cache: [blocks, tokens a block, H, D], each contiguous.
        block_table: [B, n] int32.
        seq_lens: [B] int32, the new token included.
    """

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor


@dataclass(frozen=True)
class Peer:
    """A peer by name.

    Attributes:
        kind: which inputs it takes.
        gates: whether it applies forget gates; the others are plain softmax attention.
        build: sets up all that need not be timed, and returns the call to time. Its result has q's shape.
    """

    label: str
    kind: Literal["prefill", "decode"]
    gates: bool
    build: Callable[[Any], Call]

    def bind(self, inputs: Prefill | Decode) -> tuple[Call | None, str]:
        """The call on these inputs, compiled and run once; or None, and why."""
        try:
            call = self.build(inputs)
            out = call()
            if out.is_cuda:
                torch.cuda.synchronize()
        except Exception as error:  # whatever a peer's code raises, the others are still to be timed
            return None, _one_line(error)
        if out.shape != inputs.q.shape or not torch.isfinite(out).all():
            return None, f"gave {tuple(out.shape)}, finite: {bool(torch.isfinite(out).all())}"
        return call, ""


def _one_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return text[:200] if isinstance(error, AbsentError) else f"{type(error).__name__}: {text}"[:200]


def pruning_threshold(logit_bound: torch.Tensor, length: int) -> torch.Tensor:
    """[H]: pairs with D_ij below it are negligible, -2U - log(length) - 10."""
    return acp.pruning_threshold(logit_bound, length, acp.DEFAULT_LOG_TOLERANCE)


# ---- prefill ----


def _official(inputs: Prefill, *, prune: bool, head_first: bool) -> Call:
    """The official kernels, with or without ACP, on the inputs as they are or on head-first copies [1, H, T, D]."""
    from forgetting_transformer.ops.forgetting_attention import forgetting_attention

    tensors = [inputs.q, inputs.k, inputs.v, inputs.log_forget]
    if head_first:
        tensors = [x.transpose(1, 2).contiguous() for x in tensors]
    threshold = pruning_threshold(inputs.logit_bound.float(), inputs.q.shape[1]) if prune else None

    def call() -> torch.Tensor:
        out = forgetting_attention(*tensors, head_first=head_first, adaptive_threshold=threshold)
        return out.transpose(1, 2) if head_first else out

    return call


def official_model(config: Any, weights: dict[str, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The official implementation's model, as loss of token windows [B, T].

    Raises:
        ImportError: its package is not installed.
    """
    from forgetting_transformer.model.forgetting_transformer.configuration_forgetting_transformer import (
        ForgettingTransformerConfig,
    )
    from forgetting_transformer.model.forgetting_transformer.modeling_forgetting_transformer import (
        ForgettingTransformerForCausalLM,
    )

    class Model(ForgettingTransformerForCausalLM):  # type: ignore[misc, valid-type]
        _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012 (as transformers 5 wants them)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            after = torch.cat((input_ids[:, 1:], torch.full_like(input_ids[:, :1], -100)), 1)
            out = super().forward(input_ids=input_ids, labels=after, use_cache=False, return_dict=True)
            return out.loss.sum() / (input_ids.shape[0] * (input_ids.shape[1] - 1))

    names = set(inspect.signature(ForgettingTransformerConfig.__init__).parameters)
    given = {name: value for name, value in config.to_dict().items() if name in names}
    model = Model(ForgettingTransformerConfig(**given))
    model.load_state_dict(weights)
    return model


def _fla(inputs: Prefill) -> Call:
    """flash-linear-attention's forgetting attention; it has no pruning."""
    from fla.ops.forgetting_attn import parallel_forgetting_attn

    return lambda: parallel_forgetting_attn(inputs.q, inputs.k, inputs.v, inputs.log_forget)


def _sdpa_cudnn(inputs: Prefill) -> Call:
    """PyTorch's causal attention by cuDNN."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))

    def call() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return call


def flash_attention_3() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """vLLM's FlashAttention: (attention, scheduler metadata)."""
    from vllm.vllm_flash_attn import (
        fa_version_unsupported_reason,
        flash_attn_varlen_func,
        get_scheduler_metadata,
        is_fa_version_supported,
    )

    if not is_fa_version_supported(3):
        raise AbsentError(fa_version_unsupported_reason(3) or "no FlashAttention 3")
    return flash_attn_varlen_func, get_scheduler_metadata


def _flash_prefill(inputs: Prefill) -> Call:
    """FlashAttention 3, causal, one sequence of a varlen batch."""
    attention, _ = flash_attention_3()
    length = inputs.q.shape[1]
    bounds = torch.tensor([0, length], dtype=torch.int32, device=inputs.q.device)

    def call() -> torch.Tensor:
        return attention(
            inputs.q[0],
            inputs.k[0],
            inputs.v[0],
            max_seqlen_q=length,
            cu_seqlens_q=bounds,
            max_seqlen_k=length,
            cu_seqlens_k=bounds,
            causal=True,
            fa_version=3,
        )[None]

    return call


NOT_COMPILED = "xFormers wasn't build with CUDA support"
"""A reason that xformers gives where its compiled extension does not load. Nothing here needs that: split-K is
written in Triton, and the CUTLASS attention that xformers calls is PyTorch's own."""


def xformers_fmha() -> Any:
    """xformers.ops.fmha, without its warning that compiled extensions do not load."""
    logging.getLogger("xformers").setLevel(logging.ERROR)
    from xformers.ops import fmha

    return fmha


def _xformers_call(fmha: Any, operator: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Any) -> Call:
    """One of xformers' operators on [1, T, H, D], or why it does not take these inputs."""
    given = fmha.Inputs(query=q, key=k, value=v, attn_bias=bias)
    given.validate_inputs()
    # What is written in Triton runs wherever Triton does, whatever xformers says of the device.
    if not operator.NAME.startswith("triton"):
        if not operator.is_available():
            raise AbsentError(f"{operator.NAME} is not available with torch {torch.__version__}")
        if reasons := [reason for reason in operator.not_supported_reasons(given) if reason != NOT_COMPILED]:
            raise AbsentError("; ".join(reasons))
    return lambda: operator.apply(given, needs_gradient=False)[0].reshape(q.shape)


def _xformers_bias(inputs: Prefill) -> Call:
    """xformers' CUTLASS attention, causal, with the gates written out as a bias [1, H, T, T]."""
    length = inputs.q.shape[1]
    if length > MAX_BIAS_LENGTH:
        raise AbsentError(f"a bias [H, T, T] only up to T = {MAX_BIAS_LENGTH}")
    fmha = xformers_fmha()
    decay = inputs.log_forget[0].double().cumsum(0).T.contiguous()
    bias = inputs.q.new_empty(1, decay.shape[0], length, length)
    for head, c in enumerate(decay):
        bias[0, head] = (c[:, None] - c).clamp(max=0)
    masked = fmha.attn_bias.LowerTriangularMaskWithTensorBias(bias)
    return _xformers_call(fmha, fmha.cutlass.FwOp, inputs.q, inputs.k, inputs.v, masked)


# ---- decode ----


def _flash_decode(inputs: Decode, *, splits: int, ahead: bool) -> Call:
    """FlashAttention 3 on the paged cache.

    Args:
        splits: 0 leaves the number of splits to the kernel; n allows up to n, as vLLM does in CUDA graphs.
        ahead: schedule outside of the call, as vLLM does once a step for all layers.
    """
    attention, scheduler_metadata = flash_attention_3()
    (batch, heads, head_dim), (page, kv_heads) = inputs.q.shape, inputs.k_cache.shape[1:3]
    bounds = torch.arange(batch + 1, dtype=torch.int32, device=inputs.q.device)
    longest = int(inputs.seq_lens.max())
    out = torch.empty_like(inputs.q)
    metadata = None
    if ahead:
        metadata = scheduler_metadata(
            batch_size=batch,
            max_seqlen_q=1,
            max_seqlen_k=longest,
            num_heads_q=heads,
            num_heads_kv=kv_heads,
            headdim=head_dim,
            cache_seqlens=inputs.seq_lens,
            qkv_dtype=inputs.q.dtype,
            cu_seqlens_q=bounds,
            page_size=page,
            causal=True,
            num_splits=splits,
        )

    def call() -> torch.Tensor:
        return attention(
            inputs.q,
            inputs.k_cache,
            inputs.v_cache,
            out=out,
            max_seqlen_q=1,
            cu_seqlens_q=bounds,
            max_seqlen_k=longest,
            seqused_k=inputs.seq_lens,
            causal=True,
            block_table=inputs.block_table,
            scheduler_metadata=metadata,
            num_splits=splits,
            fa_version=3,
        )

    return call


def _xformers_paged(inputs: Decode) -> Call:
    """xformers' split-K decode in Triton on the paged cache; blocks of a multiple of 64 tokens."""
    fmha = xformers_fmha()
    from xformers.ops.fmha import triton_splitk

    lens, page = inputs.seq_lens.tolist(), inputs.k_cache.shape[1]
    bias = fmha.attn_bias.PagedBlockDiagonalPaddedKeysMask.from_seqlens(
        q_seqlen=[1] * len(lens),
        kv_seqlen=lens,
        block_tables=inputs.block_table,
        page_size=page,
        device=inputs.q.device,
    )
    k, v = (x.view(1, -1, *x.shape[2:]) for x in (inputs.k_cache, inputs.v_cache))
    call = _xformers_call(fmha, triton_splitk.FwOp, inputs.q[None], k, v, bias)
    return lambda: call()[0]


def _sdpa_decode(inputs: Decode) -> Call:
    """PyTorch's attention, whichever backend it picks, on contiguous copies [B, H, T, D] of the cache."""
    lens = set(inputs.seq_lens.tolist())
    if len(lens) != 1:
        raise AbsentError("needs sequences of one length")
    (batch, heads, head_dim), length = inputs.q.shape, lens.pop()
    needed = 2 * batch * heads * length * head_dim * inputs.q.element_size()
    if inputs.q.is_cuda and needed > 0.9 * torch.cuda.mem_get_info(inputs.q.device)[0]:
        raise AbsentError(f"contiguous copies would take {needed / 2**30:.0f} GiB")
    copies = inputs.q.new_empty(2, batch, heads, length, head_dim)
    for copy, cache in zip(copies, (inputs.k_cache, inputs.v_cache)):
        for row, pages in zip(copy, inputs.block_table):
            row.copy_(cache[pages.long()].flatten(0, 1)[:length].transpose(0, 1))
    q, (k, v) = inputs.q[:, :, None], copies
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)[:, :, 0]


def _peer(
    label: str, kind: Literal["prefill", "decode"], gates: bool, build: Callable[..., Call], **how: Any
) -> Peer:
    return Peer(label, kind, gates, functools.partial(build, **how))


PREFILL = (
    _peer("official FoX", "prefill", True, _official, prune=False, head_first=False),
    _peer("official FoX, head first", "prefill", True, _official, prune=False, head_first=True),
    _peer("official FoX, ACP", "prefill", True, _official, prune=True, head_first=False),
    _peer("official FoX, ACP, head first", "prefill", True, _official, prune=True, head_first=True),
    _peer("fla", "prefill", True, _fla),
    _peer("xformers, gates as bias", "prefill", True, _xformers_bias),
    _peer("SDPA (cuDNN)", "prefill", False, _sdpa_cudnn),
    _peer("FlashAttention 3", "prefill", False, _flash_prefill),
)
"""Peers on a Prefill."""

DECODE = (
    _peer("FlashAttention 3", "decode", False, _flash_decode, splits=0, ahead=True),
    _peer("FlashAttention 3, up to 32 splits", "decode", False, _flash_decode, splits=32, ahead=True),
    _peer("FlashAttention 3, scheduled in the call", "decode", False, _flash_decode, splits=0, ahead=False),
    _peer("xformers split-K", "decode", False, _xformers_paged),
    _peer("SDPA, contiguous", "decode", False, _sdpa_decode),
)
"""Peers on a Decode."""


# ---- measuring ----


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """The call as one CUDA graph's replay. Keep what the call refers to alive as long as the replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def median_ms(call: Callable[[], Any], *, graph: bool = False, rep_ms: int = 300) -> float:
    """Median milliseconds of a call on the device, with a cold L2 cache.

    Args:
        graph: time replays of a CUDA graph, so that small launches are not timed by their host code.
        rep_ms: how long to repeat.
    """
    from triton.testing import do_bench

    timed = captured(call) if graph else call
    return do_bench(timed, warmup=50, rep=rep_ms, return_mode="median")


def copy_bandwidth(size: int = 4 << 30) -> float:
    """Bytes read and written per second by a device-to-device copy of ``size`` bytes."""
    source = torch.zeros(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / (1e-3 * median_ms(lambda: target.copy_(source)))


class LivePairs(NamedTuple):
    """What pruning leaves, as means over heads.

    Attributes:
        share: of the T(T+1)/2 causal (query, key) pairs, 0 to 1.
        live_tokens: keys that the last query reads, the dead ones of its first live page included.
    """

    share: float
    live_tokens: float


def live_pairs(log_forget: torch.Tensor, threshold: torch.Tensor, block: int, query_block: int = 128) -> LivePairs:
    """Pairs that survive pruning in whole pages of keys.

    D_ij = c_i - c_j rises with j, so query i reads from the first page whose last key has D >= threshold. The
    queries of a block share the start of its first.

    Args:
        log_forget: [T, H] or [1, T, H].
        threshold: [H], at most 0; -inf prunes nothing.
        block: keys a page.
        query_block: queries that share a start; 1 gives each query its own.
    """
    gates = log_forget.reshape(-1, log_forget.shape[-1])
    decay = -gates.cpu().double().cumsum(0).T.contiguous().numpy()  # [H, T], ascending
    length = decay.shape[1]
    last_keys = np.minimum(np.arange(block - 1, length + block - 1, block), length - 1)
    firsts = np.append(np.arange(0, length, query_block), length - 1)  # of every query block, and the last query
    ends = np.minimum(firsts[:-1] + query_block, length)
    causal = (ends * (ends + 1) - firsts[:-1] * (firsts[:-1] + 1)) // 2
    pairs, tokens = 0, 0
    for c, bound in zip(decay, threshold.cpu().double().numpy()):
        start = block * np.searchsorted(c[last_keys], c[firsts] + bound)
        pairs += int((causal - start[:-1] * (ends - firsts[:-1])).sum())
        tokens += int(length - start[-1])
    heads = decay.shape[0]
    return LivePairs(pairs / (heads * length * (length + 1) // 2), tokens / heads)


# ---- gates ----


class Gates(NamedTuple):
    """Gates to time with.

    Attributes:
        log_forget: [T, H] float32.
        logit_bound: [H] float32.
        source: in words, for the record.
    """

    log_forget: torch.Tensor
    logit_bound: torch.Tensor
    source: str


def load_gates(path: str | Path | None, heads: int, length: int, statistics: str | Path = STATISTICS) -> Gates:
    """Measured gates from a safetensors file, or synthetic ones where there is none.

    Args:
        path: holds ``log_forget`` [tokens, columns] and ``logit_bound`` [columns], a column per (layer, head).
            Every (columns // heads)-th column is taken; past the end the tokens start over.
        statistics: JSON with ``mean_log_forget`` and ``logit_bound`` of each of some heads, for synthetic gates.
    """
    if path is None or not Path(path).is_file():
        return _synthetic_gates(heads, length, Path(statistics))
    from safetensors.torch import load_file

    tensors = load_file(path)
    log_forget, logit_bound = tensors["log_forget"].float(), tensors["logit_bound"].float()
    tokens, columns = log_forget.shape
    step = max(1, columns // heads)
    pick = torch.arange(heads) * step % columns
    log_forget = log_forget[torch.arange(length) % tokens][:, pick].contiguous()
    tiled = f", tiled from {tokens} tokens" if length > tokens else ""
    return Gates(log_forget, logit_bound[pick], f"measured ({Path(path).name}, every {step}. column{tiled})")


def _synthetic_gates(heads: int, length: int, statistics: Path) -> Gates:
    """Exponentially distributed -log f, independent from token to token, with each head's mean."""
    known = _gate_statistics(statistics)
    if known:
        means, bounds = map(list, zip(*(known[head * len(known) // heads] for head in range(heads))))
        source = f"means per head from {statistics.name}"
    else:
        means = np.geomspace(*SYNTHETIC_MEANS, heads).tolist()
        bounds = [SYNTHETIC_BOUND] * heads
        source = f"means from {SYNTHETIC_MEANS[0]} to {SYNTHETIC_MEANS[1]}, logit bound {SYNTHETIC_BOUND}"
    draw = torch.empty(length, heads).exponential_(generator=torch.Generator().manual_seed(SYNTHETIC_SEED))
    log_forget = -draw * torch.as_tensor(means, dtype=torch.float32)
    bound = torch.as_tensor(bounds, dtype=torch.float32)
    return Gates(log_forget, bound, f"synthetic, seed {SYNTHETIC_SEED}, {source}")


def _gate_statistics(path: Path) -> list[tuple[float, float]]:
    """(mean of -log f, logit bound) of every head that the file tells of; none if it cannot be read.

    Any nesting will do, with one entry a head or with lists of equal length.
    """
    rows: list[tuple[float, float]] = []
    try:
        stack = [json.loads(path.read_text())]
        while stack:
            item = stack.pop()
            if isinstance(item, dict) and "mean_log_forget" in item:
                means = np.abs(np.atleast_1d(np.asarray(item["mean_log_forget"], float))).ravel()
                bounds = np.asarray(item.get("logit_bound", SYNTHETIC_BOUND), float).ravel()
                rows.extend(zip(means.tolist(), np.broadcast_to(bounds, means.shape).tolist()))
            elif isinstance(item, dict | list):
                stack.extend(reversed(list(item.values() if isinstance(item, dict) else item)))
    except (OSError, ValueError, TypeError):
        return []
    return [row for row in rows if np.isfinite(row).all()]
