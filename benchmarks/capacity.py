"""How many long requests fit on one GPU: the table of docs/distributed.md.

    python -m benchmarks.capacity [--gpu-gib 141 --utilization 0.9]

Live pages are counted, not guessed: each head forgets like one of the 48 heads of a trained FoX (Pro) (mean
log-forget and logit bound in data/gate_statistics.json), under the threshold of an engine that admits 131,072
tokens. Gates that vary over the text keep somewhat more or fewer pages than their mean says: for the trained model
itself 16.0 % of the KV was measured live after a 16k prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from benchmarks.checkpoint import Geometry, Head, fox_parameters, read_statistics
from benchmarks.options import Parser, fraction, non_negative_float, positive_float
from vllm_fox.kernels.acp import DEFAULT_LOG_TOLERANCE
from vllm_fox.kernels.forgetting.pages import ForgettingPageFormat

LONGEST, PAGE, CHUNK = 131_072, 64, 8_192


@dataclass(frozen=True)
class Model:
    """A geometry, and the GPUs that an engine of it has."""

    name: str
    geometry: Geometry
    kv_heads: int
    gpus: int = 1

    @property
    def head_dim(self) -> int:
        return self.geometry.hidden // self.geometry.heads

    @property
    def page_format(self) -> ForgettingPageFormat:
        groups = self.geometry.heads // self.kv_heads
        return ForgettingPageFormat(PAGE, self.head_dim, torch.bfloat16, groups, True, torch.bfloat16)


MODELS = [
    Model("760M: 24 layers of 24 heads of 64", Geometry(), 24),
    Model("7B: 32 layers of 32 heads of 128", Geometry(32, 4096, 32), 32),
    Model("7B, two GPUs (TP=2)", Geometry(32, 4096, 32), 32, 2),
]


def live_pages(head: Head, tokens: int, scale: float) -> int:
    """Pages that a head holds after ``tokens`` tokens: those whose last key is not yet under the threshold.

    Args:
        scale: head size over that of the trained heads, whose logit bound grows with its root.
    """
    bound = head.logit_bound * math.sqrt(scale)
    window = (2 * bound + math.log(LONGEST) - DEFAULT_LOG_TOLERANCE) / -head.mean_log_forget
    return min(math.ceil(tokens / PAGE), math.ceil(window / PAGE) + 1)


def live_share(tokens: int, head_dim: int = 64) -> float:
    """Live pages as a share of all pages, over the trained heads."""
    heads = read_statistics()
    live = sum(live_pages(head, tokens, head_dim / 64) for head in heads)
    return live / (len(heads) * math.ceil(tokens / PAGE))


def requests_that_fit(model: Model, tokens: int, kv_bytes: float, share: float) -> int:
    """Requests of ``tokens`` tokens in ``kv_bytes`` on each GPU, besides the pages of one chunk under way."""
    streams = model.geometry.layers * model.kv_heads / model.gpus
    page_index = streams * model.page_format.page_bytes  # a page in every stream
    pages = math.ceil(tokens / PAGE)
    return max(0, int((kv_bytes / page_index - CHUNK / PAGE) // math.ceil(pages * share)))


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu-gib", type=positive_float, default=141e9 / 2**30)
    parser.add_argument("--utilization", type=fraction, default=0.9, help="--gpu-memory-utilization")
    parser.add_argument("--reserve-gib", type=non_negative_float, default=3.0, help="activations and CUDA graphs")
    args = parser.parse_args()
    if args.reserve_gib >= args.gpu_gib * args.utilization:
        parser.error(
            f"--reserve-gib is {args.reserve_gib:g}: it must be less than --utilization {args.utilization:g} of "
            f"--gpu-gib {args.gpu_gib:g}."
        )
    print(f"{args.utilization:.0%} of {args.gpu_gib:.0f} GiB a GPU, {args.reserve_gib:g} GiB of it for activations")
    print(f"{'':36}{'tokens':>8}{'live':>8}{'KV a request':>14}{'fit':>6}{'all live':>10}")
    for model in MODELS:
        weights = 2 * fox_parameters(model.geometry) / model.gpus
        memory = args.gpu_gib * args.utilization * 2**30 - weights - args.reserve_gib * 2**30
        for tokens in (16_384, LONGEST):
            share = live_share(tokens, model.head_dim)
            streams = model.geometry.layers * model.kv_heads
            held = math.ceil(tokens / PAGE) * share * streams * model.page_format.page_bytes
            fit, dense = (requests_that_fit(model, tokens, memory, part) for part in (share, 1.0))
            print(f"{model.name:36}{tokens:8,}{share:8.1%}{held / 2**30:10.2f} GiB{fit:6}{dense:10}")


if __name__ == "__main__":
    main()
