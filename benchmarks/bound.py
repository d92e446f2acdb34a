"""What pruning loses: the true attention weight of the pages that a Forgetting Transformer drops.

python -m benchmarks.bound [MODEL] [--text FOLDER] [--context 16384] [--pages float32 bfloat16 float8]
python -m benchmarks.bound --raise-by 25       # with thresholds that are too high on purpose, which must be found

The promise (docs/acp.md) is that the attention weights which pruning takes from a query sum to at most e^-10 for
each query and head, or e^TOLERANCE where the checkpoint says otherwise (``log_pruning_tolerance``). MODEL reads
texts, each as one prompt. Its attention layers run over pages, with the leaf functions that an engine calls: they
write the pages, compute the attention and find the live ranges, by the thresholds that an engine computes from the
weights. On a CPU these are the functions in plain PyTorch, on a GPU those in Triton.

For every query this program asks which pages are dead once its token has been read (``live_range``). A server drops
them for later queries, and at the earliest for this one, where a block of prefill begins with it. Query heads that
share a KV head have pages of their own here: prefill on a GPU drops pages for each of them alone, whereas a page is
given back when it is dead for all. So no order of steps takes more from the query than is counted here. The weight
of these pages is computed in float64: the softmax over all keys up to the query, of q and the stored K as they are,
and of the sums of log f as the model has it.

- largest, mean: the weight that a query and head lose, over all of them.
- pruned: the share of the (query, key) pairs that lie in dead pages, of each head.
- nats a token: the mean negative log-likelihood with pruning and without it, both computed over pages; and the mean
  difference of a token's, with its standard error. In short dtypes a sum in another order may round otherwise, and
  what later layers make of that is noise, which does not come from what is pruned.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch.nn.functional import cross_entropy, pad
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.one_layer import DEVICE, OneLayer, batch_of
from benchmarks.options import Parser, find_texts, integer, non_negative_float, positive_int, refuse
from benchmarks.record import save
from benchmarks.texts import standard_library, token_windows
from vllm_fox.families.fox.bounds import serving_threshold, with_rounding
from vllm_fox.families.fox.settings import FoxSettings
from vllm_fox.hf import ForgettingTransformerForCausalLM
from vllm_fox.hf.fox.cache import ForgettingCache, ForgettingLayer
from vllm_fox.kernels.float8 import FP8
from vllm_fox.kernels.forgetting.live_range import live_range
from vllm_fox.kernels.paged import PageTable
from vllm_fox.settings import PageSize

PAGES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float8": (torch.bfloat16, FP8),
}
"""Dtypes of the model, and of K and V in its pages."""
QUERIES = 256
"""The weights of so many queries of one head are in memory at once."""


class Lost(NamedTuple):
    """What the T queries of one layer's H heads lose of one text.

    Attributes:
        weight: [H, T] float64: the attention weight of all keys in pages that are dead for the query.
        share: [H] float64: the share of the (query, key) pairs that lie in such pages.
    """

    weight: torch.Tensor
    share: torch.Tensor


# One layer.


class PagedLayer(ForgettingLayer):
    """A layer's cache of one text, in pages as a server has them, but of each query head.

    Args:
        threshold: [H] float32 of a server.
        page_size: tokens of a page.
        kv_dtype: of K and V in the pages.
        weigh: whether to compute what the queries lose.
    """

    lost: Lost

    def __init__(self, threshold: torch.Tensor, page_size: int, kv_dtype: torch.dtype, weigh: bool) -> None:
        super().__init__(threshold)
        self.page_size, self.kv_dtype, self.weigh = page_size, kv_dtype, weigh
        # A cache that is initialized is asked for the attention. Before a text's first token there are zeros.
        self.is_initialized, zero = True, torch.zeros(1, 1, 1, device=DEVICE)
        self.last = (zero, zero)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        log_forget: torch.Tensor,
        real: torch.Tensor | None,
        last: tuple[torch.Tensor, torch.Tensor],
        scale: float,
    ) -> torch.Tensor:
        """Write one text's tokens into pages, and map their q [1, T, H, d] to the attention output [1, T, H, d]."""
        _, length, heads, dim = q.shape
        pages = -(-length // self.page_size)
        layer = OneLayer(
            heads=heads,
            dim=dim,
            page_size=self.page_size,
            dtype=q.dtype,
            kv_dtype=self.kv_dtype,
            threshold=self.threshold[:, None],
            num_slots=1,
            num_pages=heads * (pages + 2),
            max_pages=pages,
        )
        slot = layer.open()
        k, v = (x[0].repeat_interleave(heads // x.shape[2], dim=1) for x in (k, v))
        inputs = {"q": q[0, :, :, None], "k": k, "v": v, "log_f": log_forget[0, :, :, None]}
        (out,) = layer.step([(slot, inputs)], release=False)
        if self.weigh:
            self.lost = lost(layer, slot, q[0], log_forget[0], scale)
        return out[None, :, :, 0].to(q.device)


def lost(layer: OneLayer, slot: int, q: torch.Tensor, log_forget: torch.Tensor, scale: float) -> Lost:
    """What the queries of one text lose by the pages that are dead for them.

    Args:
        layer: whose pages the text's tokens are in.
        slot: of the text.
        q: [T, H, d] as attention reads them.
        log_forget: [T, H] log f.
        scale: factor of the logits.
    """
    (length, heads, _), size, device = q.shape, layer.page_size, q.device
    page = torch.arange(-(-length // size), device=device)
    ids = layer.table.page_ids(torch.tensor(slot, device=device), page, torch.arange(heads, device=device)[:, None])
    keys = layer.pages.keys(ids).flatten(1, 2)[:, :length].double()  # [H, T, d]
    queries, c = q.double().transpose(0, 1), log_forget.double().cumsum(0).T
    weight = torch.zeros(heads, length, dtype=torch.float64, device=device)
    dead = torch.zeros(heads, dtype=torch.int64, device=device)
    for start in range(0, length, QUERIES):
        at = slice(start, min(start + QUERIES, length))
        first = first_live(layer, slot, at)
        dead += (first * size).sum(0)
        future = torch.arange(at.stop, device=device) > torch.arange(at.start, at.stop, device=device)[:, None]
        for head in range(heads):
            logits = scale * (queries[head, at] @ keys[head, : at.stop].T)
            logits += c[head, at, None] - c[head, : at.stop]
            weights = logits.masked_fill_(future, -math.inf).softmax(-1)
            by_page = pad(weights, (0, -at.stop % size)).unflatten(-1, (-1, size)).sum(-1)
            gone = page[: by_page.shape[-1]] < first[:, head, None]
            weight[head, at] = torch.where(gone, by_page, 0.0).sum(-1)
    return Lost(weight.cpu(), dead.cpu().double() / (length * (length + 1) / 2))


def first_live(layer: OneLayer, slot: int, queries: slice) -> torch.Tensor:
    """Return the first live page for each of n queries of a text, [n, H].

    Each query is the last token of a request of its own, which has read the text up to there in one step, and has
    the text's pages.
    """
    lengths = list(range(queries.start + 1, queries.stop + 1))
    rows = list(range(1, len(lengths) + 1))
    table = PageTable(
        chunk_of=layer.table.chunk_of[slot].repeat(len(rows) + 1, 1),
        entries=layer.table.entries,
        first_live=layer.table.first_live.new_zeros(len(rows) + 1, layer.heads),
    )
    batch = batch_of(lengths, lengths, rows, layer.page_size)
    live_range(layer.pages, table, batch, layer.state.thresholds.flatten(0, 1), 0)
    return table.first_live[1:]


# A model.


def thresholds(model: Any, kv_dtype: torch.dtype, longest: int) -> list[torch.Tensor]:
    """Return the thresholds [H] of each layer, as a server has them that admits so many tokens."""
    limits = []
    for block in model.model.layers:
        attn, norm = block.attn, block.attn_norm.weight
        bound = with_rounding(attn.logit_bound(norm, norm.dtype), norm.dtype, kv_dtype)
        limits.append(serving_threshold(bound, longest, tolerance_of(model)).to(DEVICE))
    return limits


def tolerance_of(model: Any) -> float:
    """The tolerance log eps that a server takes from the checkpoint, or else by default."""
    found = FoxSettings.from_options({}).tolerance(model.config.log_pruning_tolerance)
    assert found is not None
    return found


@torch.no_grad()
def read(model: Any, ids: torch.Tensor, cache: list[PagedLayer]) -> torch.Tensor:
    """Let a model read a text [T] through pages; returns the negative log-likelihoods [T - 1] float64, in nats."""
    past = ForgettingCache([])
    past.layers = list(cache)
    hidden = model.model(input_ids=ids[None], past_key_values=past).last_hidden_state[0, :-1]
    losses = [
        cross_entropy(model.lm_head(some).float(), wanted, reduction="none").double()
        for some, wanted in zip(hidden.split(2048), ids[1:].split(2048), strict=True)
    ]
    return torch.cat(losses)


def measure(
    model: Any, texts: list[torch.Tensor], page_size: int, kv_dtype: torch.dtype, raise_by: float = 0.0
) -> dict[str, Any]:
    """All figures of a model with one kind of page.

    Args:
        model: a FoX for transformers.
        texts: of T tokens each. A server that admits as many and no more prunes most.
        page_size: tokens of a page.
        kv_dtype: of K and V in the pages.
        raise_by: is added to the thresholds, which must break the promise if it is large.
    """
    limits = [(one + raise_by).clamp(max=0.0) for one in thresholds(model, kv_dtype, len(texts[0]))]
    nothing = [torch.full_like(one, -math.inf) for one in limits]
    pruned, unpruned, weights, shares = [], [], [], []
    for ids in texts:
        cache = [PagedLayer(one, page_size, kv_dtype, weigh=True) for one in limits]
        pruned.append(read(model, ids, cache))
        unpruned.append(read(model, ids, [PagedLayer(one, page_size, kv_dtype, weigh=False) for one in nothing]))
        weights.append(torch.stack([layer.lost.weight for layer in cache]))
        shares.append(torch.stack([layer.lost.share for layer in cache]))
    weight, share = torch.stack(weights), torch.stack(shares).mean(0)  # [texts, layers, H, T], [layers, H]
    promise = math.exp(tolerance_of(model))
    loss, plain = torch.cat(pruned), torch.cat(unpruned)
    text, layer, head, query = (int(one) for one in torch.unravel_index(weight.argmax(), weight.shape))
    whole = summary(weight, share, promise)
    return {
        "promise": promise,
        "kept": whole["largest"] <= promise,
        **whole,
        "where": {"text": text, "layer": layer, "head": head, "query": query},
        "layers": [summary(weight[:, n], share[n], promise) for n in range(len(share))],
        "share_by_head": share.tolist(),
        "loss": loss.mean().item(),
        "loss_unpruned": plain.mean().item(),
        "difference": (loss - plain).mean().item(),
        "difference_error": (loss - plain).std().item() / len(loss) ** 0.5,
    }


def summary(weight: torch.Tensor, share: torch.Tensor, promise: float) -> dict[str, float]:
    """Figures of some heads, from what queries lose and from the heads' pruned shares."""
    largest = weight.max().item()
    return {
        "largest": largest,
        "of_the_promise": largest / promise,
        "mean": weight.mean().item(),
        "pruned_least": share.min().item(),
        "pruned_median": share.median().item(),
        "pruned_most": share.max().item(),
    }


def load(folder: Path, dtype: torch.dtype) -> Any:
    """The model on the device. Ends the program if it is no Forgetting Transformer."""
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        model = model.to(DEVICE).eval()
    except (OSError, ValueError, RuntimeError) as error:
        refuse(f"MODEL {folder} cannot be read: {error}")
    if not isinstance(model, ForgettingTransformerForCausalLM):
        refuse(f"MODEL {folder} is a {type(model).__name__}: it must be a Forgetting Transformer.")
    return model


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer. Ends the program if there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError):
        refuse(f"{folder} has no tokenizer: give --tokenizer a folder that has one.")


# What is said.


def heading(model: Any, args: argparse.Namespace, texts: str) -> str:
    """Model, texts and promise."""
    tolerance, longest = tolerance_of(model), model.config.max_position_embeddings
    said = (
        f"{args.model}: {texts} of {args.context:,} tokens from {args.text or 'the standard library'}; "
        f"a query and head may lose e^{tolerance:g} = {math.exp(tolerance):.2e}"
    )
    if args.context > longest:
        said += f"\nThe texts are longer than the {longest:,} tokens that its config.json names."
    if args.raise_by:
        said += f"\nThresholds are {args.raise_by:g} too high."
    return said


def table(name: str, figures: dict[str, Any], page_size: int) -> str:
    """A line for each layer, one for all of them, and the likelihoods."""
    lines = [
        f"{name} pages of {page_size} tokens",
        f"  {'layer':>5}{'largest':>11}{'of promise':>12}{'mean':>11}{'pruned, least':>15}{'median':>9}{'most':>9}",
    ]
    for layer, row in [*enumerate(figures["layers"]), ("all", figures)]:
        lines.append(
            f"  {layer:>5}{row['largest']:>11.2e}{row['of_the_promise']:>12.2e}{row['mean']:>11.2e}"
            f"{row['pruned_least']:>15.1%}{row['pruned_median']:>9.1%}{row['pruned_most']:>9.1%}"
        )
    lines.append(
        f"  nats a token: {figures['loss']:.6f} pruned, {figures['loss_unpruned']:.6f} unpruned, "
        f"difference {figures['difference']:+.1e} +- {figures['difference_error']:.0e}"
    )
    lines.append(f"  the promise is {'kept' if figures['kept'] else 'BROKEN'}")
    return "\n".join(lines)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", default=Path("examples/fox-tiny"), metavar="MODEL")
    parser.add_argument(
        "--text", type=Path, help="folder of text files; the standard library's modules unless given"
    )
    parser.add_argument("--tokenizer", type=Path, help="folder of another tokenizer than MODEL's")
    parser.add_argument("--context", type=integer(2), default=16384, help="tokens of a text")
    parser.add_argument("--windows", type=positive_int, default=2, help="texts, at most")
    parser.add_argument("--pages", nargs="+", choices=PAGES, default=list(PAGES), help="dtypes of K and V")
    parser.add_argument(
        "--page-size", type=positive_int, choices=get_args(PageSize), default=64, help="tokens of a page"
    )
    parser.add_argument("--raise-by", type=non_negative_float, default=0.0, help="make thresholds wrong on purpose")
    parser.add_argument("--json", default="results/bound.json")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer or args.model)
    files = find_texts(args.text) if args.text else standard_library()
    source = f"--text {args.text}" if args.text else "The standard library"
    texts = [ids.to(DEVICE) for ids in token_windows(tokenizer, files, args.windows, args.context, source)]
    found: dict[str, Any] = {}
    for name in args.pages:
        dtype, kv_dtype = PAGES[name]
        model = load(args.model, dtype)
        if not found:
            print(heading(model, args, f"{len(texts)} text{'s' * (len(texts) > 1)}"))
        found[name] = measure(model, texts, args.page_size, kv_dtype, args.raise_by)
        print(table(name, found[name], args.page_size), flush=True)
    options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    save(args.json, {"options": options, "texts": len(texts), "pages": found})
    if not all(one["kept"] for one in found.values()):
        raise SystemExit("The promise is broken: some query lost more attention than it may.")


if __name__ == "__main__":
    main()
