"""Our attention against xformers', which others have written: gates as a bias, split-K decode, and joining parts.

Every comparison has the same tolerance. ``tests/support/rounding.py`` bounds number by number how far attention may
be from the formula that keeps its sums in float32 and rounds weights and outputs to the inputs' dtype. Ours does so
and so does xformers', so the two are at most twice that bound apart.

    pytest -m gpu tests/gpu/test_xformers.py -rs                       # on a GPU; -rs says what is skipped, and why
    TRITON_INTERPRET=1 pytest -m gpu tests/gpu/test_xformers.py -rs    # without one: float16 and short sequences
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from benchmarks import peers
from benchmarks.one_layer import DEVICE, OneLayer
from tests.support.harness import cut, random_inputs
from tests.support.rounding import last_outputs_and_bounds
from vllm_fox.kernels import forgetting_attention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and not INTERPRETED, reason="needs a CUDA GPU, or Triton's interpreter"
    ),
]
HEADS, DIM, PAGE = 4, 64, 64
HALVES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
"""The dtypes that split-K takes. Triton's interpreter has no bfloat16 dot product."""
PROMPT = 200 if INTERPRETED else 2048
LENGTHS = [1, 65, 300] if INTERPRETED else [1, 65, 2000, 20000]
"""Tokens of the rows that decode together: on a GPU more pages than programs, and a head of many programs."""


@pytest.fixture(scope="module")
def fmha() -> Any:
    """xformers' attention."""
    if INTERPRETED:
        os.environ.setdefault("XFORMERS_ENABLE_TRITON", "1")
    pytest.importorskip(
        "xformers", exc_type=ImportError, reason="xformers is not installed (pip install 'vllm-fox[bench]')"
    )
    return peers.xformers_fmha()


@pytest.fixture(scope="module")
def split_k(fmha: Any) -> Any:
    """Its split-K operator. It is written in Triton with block pointers, which later releases of Triton lack."""
    import triton
    import xformers
    from xformers.ops.fmha import triton_splitk

    x = torch.zeros(1, PAGE, 1, DIM, dtype=torch.float16, device=DEVICE)
    try:
        triton_splitk.FwOp.apply(fmha.Inputs(query=x[:, :1], key=x, value=x), needs_gradient=False)
    except Exception as error:  # of Triton's compiler, or of its interpreter
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        pytest.skip(f"xformers {xformers.__version__} does not run with Triton {triton.__version__}: {why}")
    return triton_splitk.FwOp


@pytest.fixture(scope="module")
def cutlass(fmha: Any) -> peers.Peer:
    """How benchmarks call its CUTLASS attention, with gates as a bias."""
    (peer,) = [peer for peer in peers.PREFILL if peer.label == "xformers, gates as bias"]
    x = torch.ones(1, PAGE, HEADS, DIM, dtype=torch.float16, device=DEVICE)
    call, why = peer.bind(peers.Prefill(x, x, x, torch.zeros(1, PAGE, HEADS, device=DEVICE), x[0, 0, :, 0].float()))
    if call is None:
        pytest.skip(f"xformers' CUTLASS attention: {why}")
    return peer


class Sequence:
    """Random tokens of one sequence, and what ACP may prune of them.

    Args:
        gates: a pattern of :func:`random_inputs`; or "quarters", of which every number is 0 or -1/4.

    Attributes:
        inputs: of a layer.
        q, k, v: [T, query or KV heads, d] in the dtype; log_f: [T, query heads] float32.
        logit_bound: larger than all logits; threshold: [query heads].
    """

    def __init__(
        self, length: int, dtype: torch.dtype, groups: int = 1, gates: str = "mixed", seed: int = 0
    ) -> None:
        quarters = gates == "quarters"
        inputs = random_inputs(length, HEADS, groups, DIM, gates="never" if quarters else gates, seed=seed)
        if quarters:
            often = torch.logspace(-3, 0, HEADS)[:, None]
            drawn = torch.rand(length, HEADS, groups, generator=torch.Generator().manual_seed(seed))
            inputs["log_f"] = -0.25 * (drawn < often).float()
        self.inputs = {name: x.to(dtype) if name in "qkv" else x for name, x in inputs.items()}
        self.length = length
        self.q, self.k, self.v = self.inputs["q"].flatten(1, 2), self.inputs["k"], self.inputs["v"]
        self.log_f = self.inputs["log_f"].flatten(1)
        largest = [x.float().norm(dim=-1).max().item() for x in (self.q, self.k)]
        self.logit_bound = 1.01 * largest[0] * largest[1] / DIM**0.5
        self.threshold = peers.pruning_threshold(torch.full((HEADS * groups,), self.logit_bound), length)

    def bias(self, first: int) -> torch.Tensor:
        """[1, query heads, queries, T] float32: D_ij of the queries from ``first`` on, and -inf for later keys."""
        c = self.log_f.double().cumsum(0).T
        decay = c[:, first:, None] - c[:, None]
        later = torch.ones(decay.shape[1:], dtype=torch.bool).triu(first + 1)
        return decay.masked_fill(later, float("-inf")).float()[None].to(DEVICE)

    def bound(self, first: int) -> torch.Tensor:
        """How far the outputs of the tokens from ``first`` on may be from the formula: [tokens, query heads, d]."""
        return last_outputs_and_bounds(self.q[first:], self.k, self.v, self.log_f, self.threshold)[1]


def layer_of(sequences: list[Sequence], groups: int = 1) -> OneLayer:
    """An empty layer with pages for all of them."""
    pages = [-(-one.length // PAGE) for one in sequences]
    return OneLayer(
        heads=HEADS,
        groups=groups,
        dim=DIM,
        page_size=PAGE,
        dtype=sequences[0].q.dtype,
        threshold=torch.stack([one.threshold for one in sequences]).amin(0).view(HEADS, groups),
        logit_bound=max(one.logit_bound for one in sequences),
        num_slots=len(sequences),
        num_pages=(sum(pages) + 1) * HEADS,
        max_pages=max(pages),
    )


def decode_last(layer: OneLayer, sequences: list[Sequence]) -> list[torch.Tensor]:
    """Read all but the last token of each, then decode the last of all together: [query heads, d] of each."""
    slots = [layer.open() for _ in sequences]
    for slot, one in zip(slots, sequences):
        if one.length > 1:
            layer.step([(slot, cut(one.inputs, 0, one.length - 1))])
    last = [(slot, cut(one.inputs, one.length - 1, one.length)) for slot, one in zip(slots, sequences)]
    return [out[0].flatten(0, 1) for out in layer.step(last)]


def assert_alike(ours: torch.Tensor, theirs: torch.Tensor, bound: torch.Tensor) -> None:
    """Each within ``bound`` of the formula, so within twice that of the other."""
    apart = ((ours.double().cpu() - theirs.double().cpu()).abs() / (2 * bound)).max().item()
    print(f"{tuple(ours.shape)}: {apart:.2f} of the tolerance apart")
    assert apart <= 1


def assert_prompt_is_alike(one: Sequence, theirs: torch.Tensor) -> None:
    """The whole sequence as a prompt in two chunks, and in one piece for training: [T, query heads, d]."""
    layer = layer_of([one])
    slot, middle = layer.open(), one.length * 3 // 5
    parts = [cut(one.inputs, 0, middle), cut(one.inputs, middle, one.length)]
    served = torch.cat([out for part in parts for out in layer.step([(slot, part)])]).flatten(1, 2)
    leaves = [x[None].to(DEVICE) for x in (one.q, one.k, one.v, one.log_f)]
    trained = forgetting_attention(*leaves, threshold=one.threshold.to(DEVICE))[0]
    bound = one.bound(0)
    assert_alike(served, theirs, bound)
    assert_alike(trained, theirs, bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_prompt_equals_cutlass_with_gates_as_a_bias(cutlass: peers.Peer, dtype: torch.dtype) -> None:
    # The bias has q's dtype. In half precision it holds multiples of 1/4 exactly, down to where no weight is left.
    one = Sequence(PROMPT, dtype, gates="mixed" if dtype == torch.float32 else "quarters")
    q, k, v, log_f = (x[None].to(DEVICE) for x in (one.q, one.k, one.v, one.log_f))
    inputs = peers.Prefill(q, k, v, log_f, torch.full((HEADS,), one.logit_bound, device=DEVICE))
    try:
        call = cutlass.build(inputs)
    except peers.AbsentError as why:
        pytest.skip(f"xformers' CUTLASS attention: {why}")
    assert_prompt_is_alike(one, call()[0])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_prompt_equals_split_k_with_gates_as_a_bias(fmha: Any, split_k: Any, dtype: torch.dtype) -> None:
    one = Sequence(PROMPT, dtype)
    q, k, v = (x[None].to(DEVICE) for x in (one.q, one.k, one.v))
    theirs, _ = split_k.apply(fmha.Inputs(query=q, key=k, value=v, attn_bias=one.bias(0)), needs_gradient=False)
    assert_prompt_is_alike(one, theirs[0])


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("joined", [False, True], ids=["at once", "in parts"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_decode_equals_split_k_with_gates_as_a_bias(
    fmha: Any, split_k: Any, dtype: torch.dtype, joined: bool, groups: int
) -> None:
    """Over all keys at once, or over the first key, some more, and all others, which xformers then joins."""
    rows = [Sequence(length, dtype, groups, seed=length) for length in LENGTHS]
    for one, ours in zip(rows, decode_last(layer_of(rows, groups), rows)):
        last, bias = one.length - 1, one.bias(one.length - 1)
        q = one.q[None, last:].to(DEVICE)
        k, v = (x.repeat_interleave(groups, 1)[None].to(DEVICE) for x in (one.k, one.v))
        ends = sorted({1, one.length // 3, one.length} - {0}) if joined else [one.length]
        outs, sums = [], []
        for start, end in zip([0, *ends], ends):
            at = slice(start, end)
            part = fmha.Inputs(
                query=q, key=k[:, at], value=v[:, at], attn_bias=bias[..., at].contiguous(), is_partial=True
            )
            out, context = split_k.apply(part, needs_gradient=True)
            outs.append(out)
            sums.append(context.lse)
        theirs = outs[0] if len(outs) == 1 else fmha.merge_attentions(torch.stack(outs), torch.stack(sums))[0]
        assert_alike(ours, theirs[0, 0], one.bound(last)[0])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_decode_equals_split_k_on_the_same_pages(split_k: Any, dtype: torch.dtype) -> None:
    """With gates that forget nothing our decode is plain attention. xformers reads a copy of our pool by our page
    table, a (row, head) pair as a sequence of its own."""
    rows = [Sequence(length, dtype, gates="never", seed=length) for length in LENGTHS]
    layer = layer_of(rows)
    ours = decode_last(layer, rows)
    slots = torch.tensor(list(layer.lengths), device=DEVICE)
    page, head = torch.arange(-(-max(LENGTHS) // PAGE), device=DEVICE), torch.arange(HEADS, device=DEVICE)
    table = layer.table.page_ids(slots[:, None, None], page, head[:, None])
    # Places that nothing is written to are NaN. xformers masks its loads there without saying what they give.
    k, v = (x.contiguous().nan_to_num()[:, :, None] for x in (layer.pages.k, layer.pages.v))
    given = peers.Decode(
        q=torch.cat([one.q[-1:] for one in rows]).flatten(0, 1)[:, None].to(DEVICE),
        k_cache=k,
        v_cache=v,
        block_table=table.flatten(0, 1).int(),
        seq_lens=torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE).repeat_interleave(HEADS),
    )
    (peer,) = [peer for peer in peers.DECODE if peer.label == "xformers split-K"]
    theirs = peer.build(given)()
    for one, mine, other in zip(rows, ours, theirs[:, 0].view(len(rows), HEADS, DIM)):
        assert_alike(mine, other, one.bound(one.length - 1)[0])
