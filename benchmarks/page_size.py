"""What a page size costs and saves: live KV after a long prompt, and time, for every page size.

python -m benchmarks.page_size [--model examples/fox-tiny] [--prompt 7936]
"""

# ruff: noqa: E402 (the environment comes before torch and vLLM)
from __future__ import annotations

import os
import time
from typing import get_args

from vllm_fox.cpu import prepare_cpu_environment

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
prepare_cpu_environment(threads=1)

from benchmarks.engines import add, engine, manager, run_to_the_end, run_until_decoding, source_tokens
from benchmarks.options import Parser, integer
from benchmarks.record import save
from vllm_fox.kernels.forgetting.pages import ForgettingPageFormat
from vllm_fox.settings import PageSize

LONGEST, ANSWER = 8192, 64
"""Tokens of the request, and of its answer."""


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="examples/fox-tiny")
    parser.add_argument("--prompt", type=integer(1, LONGEST - ANSWER), default=7936)
    parser.add_argument("--out", default="results/page_size.json")
    args = parser.parse_args()
    rows = []
    for size in get_args(PageSize):
        blocks = -(-LONGEST // size) + 2
        fox = {"page_size": size, "poison_free_pages": False}
        with engine(args.model, fox, max_model_len=LONGEST, num_gpu_blocks_override=blocks) as llm:
            spec = manager(llm).kv_cache_spec
            form = spec.page_format
            assert isinstance(form, ForgettingPageFormat)
            kv_only = 2 * form.kv_bytes
            add(llm, "r", source_tokens(llm, args.prompt, seed=1), ANSWER)
            start = time.perf_counter()
            run_until_decoding(llm)
            prefill = time.perf_counter() - start
            live = manager(llm).pool.used_total
            start = time.perf_counter()
            run_to_the_end(llm)
            decode = time.perf_counter() - start
            dense = sum(spec.streams) * args.prompt / size
            rows.append(
                {
                    "page_size": size,
                    "live_tokens": live / dense,
                    "live_bytes": live * form.page_bytes / (dense * kv_only),
                    "page_overhead": form.page_bytes / kv_only - 1,
                    "prefill_s": prefill,
                    "decode_ms": 1e3 * decode / (ANSWER - 1),
                }
            )
    print(f"{args.model}, {args.prompt} tokens; live KV as a share of a dense cache without gates")
    print(
        f"{'page':>5}{'live tokens':>13}{'live bytes':>12}{'page overhead':>15}{'prefill s':>11}{'decode ms':>11}"
    )
    for row in rows:
        print(
            f"{row['page_size']:5}{row['live_tokens']:13.1%}{row['live_bytes']:12.1%}"
            f"{row['page_overhead']:15.1%}{row['prefill_s']:11.2f}{row['decode_ms']:11.1f}"
        )
    save(args.out, rows)


if __name__ == "__main__":
    main()
