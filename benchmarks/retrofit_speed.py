"""How fast a decoder is taught to evict, beside plain fine-tuning of the same decoder, on one GPU.

python -m benchmarks.retrofit_speed [--layers 12 --hidden 640 --heads 10 --kv-heads 5] [--context 8192]

Random weights. Fine-tuning is a training step of transformers' Llama with all weights and PyTorch's FlashAttention,
in bfloat16 by autocast. A step of examples/retrofit.py computes the frozen model twice, with and without eviction,
and gradients of the adapters. It is timed at several ratios, which a retrofit passes one after the other, and what
is evicted takes less time. Both are compiled layer by layer, a retrofit's step is captured in a CUDA graph as the
script does it, and neither counts the optimizer. The rows take turns; the median counts. The peak of memory is that
of the first steps, before a graph is replayed, which uses memory of its own.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.options import Parser, integer, positive_int, refuse  # it makes examples/ importable
from benchmarks.record import save
from vllm_fox.hf import compile_layers

REPEATS = 5
RATIOS = 1, 2, 4, 8
SPREAD = 5.0
"""Standard deviation of the decisions' logits. Half of a retrofitted model's are beyond 4.7 on either side."""
Step = Callable[[], None]


def fine_tuning(config: LlamaConfig, ids: torch.Tensor) -> Step:
    """Forward and backward of all weights on windows [B, T]."""
    model: Any = LlamaForCausalLM(config)
    model.cuda().train()
    compile_layers(model)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    return step


def retrofitting(folder: Path, ids: torch.Tensor, ratio: int) -> Step:
    """The same of a retrofit whose adapters evict at a ratio."""
    from adapter_distillation import Distillation
    from captured_gradients import CapturedGradients
    from retrofit import load, parse

    args = parse([str(folder), str(folder), f"--output={folder}", f"--context={ids.shape[1]}"])
    share = torch.full((), 1 - 1 / ratio, device="cuda")
    distillation: Any = Distillation(load(args), 1.0, compiled=True).cuda().train()
    if ratio > 1:
        scatter(distillation.model, ids, ratio)
    compile_layers(distillation)

    def backward(ids: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss: torch.Tensor = distillation(ids, share)
        loss.backward()
        return loss.detach()

    gradients = CapturedGradients(backward, distillation.parameters())

    def step() -> None:
        gradients(ids, share)
        distillation.zero_grad(set_to_none=False)

    return step


def scatter(model: Any, ids: torch.Tensor, ratio: int) -> None:
    """Give a model random adapters whose decisions about windows [B, T] are sure, and evict all but 1 / ratio."""

    def decided() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            found: torch.Tensor = model.decisions(ids)
        return found[found.isfinite()].float()

    adapters = [weight for name, weight in model.named_parameters() if name.endswith("dms_proj_alpha.weight")]
    for weight in adapters:
        torch.nn.init.normal_(weight)
    wide = decided().std()
    with torch.no_grad():
        for weight in adapters:
            weight *= SPREAD / wide
    ordered = decided().sort().values
    model.move_threshold(float(ordered[len(ordered) // ratio]))


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=positive_int, default=12)
    parser.add_argument("--hidden", type=positive_int, default=640)
    parser.add_argument("--heads", type=positive_int, default=10)
    parser.add_argument("--kv-heads", type=positive_int, default=5)
    parser.add_argument("--vocab", type=integer(257), default=16384)
    parser.add_argument("--context", type=integer(512), default=8192)
    parser.add_argument("--windows", type=positive_int, default=2, help="in a step")
    parser.add_argument("--json", default="results/retrofit_speed.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        refuse("No CUDA GPU was found, and on a CPU the figures would mean nothing.")
    from train_llama import make_config

    config = make_config(args)
    ids = torch.randint(args.vocab, (args.windows, args.context), device="cuda")
    # The layers of every row are compiled with what their adapters decide by as constants.
    torch._dynamo.config.recompile_limit = 64
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
        steps = {"fine-tuning": fine_tuning(config, ids)}
        for ratio in RATIOS:
            steps[f"retrofit, ratio {ratio}"] = retrofitting(Path(folder), ids, ratio)
    times: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, float] = {}
    for name, step in steps.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(3):  # compiles
            step()
        peaks[name] = torch.cuda.max_memory_allocated() - before
    for _ in range(REPEATS):
        for name, step in steps.items():
            torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            step()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end))
    own = {name: ids.numel() / statistics.median(found) * 1e3 for name, found in times.items()}
    for name in steps:
        print(
            f"{name:<17} {own[name]:>12,.0f} tokens/s ({own[name] / own['fine-tuning']:.2f}x), "
            f"{peaks[name] / 2**30:.2f} GiB beside all weights ({peaks[name] / peaks['fine-tuning']:.2f}x)"
        )
    save(args.json, {"options": vars(args), "ms": times, "peak_bytes": peaks, "tokens_per_second": own})


if __name__ == "__main__":
    main()
