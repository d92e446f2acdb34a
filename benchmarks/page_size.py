"""What a page size costs and saves: live KV after a long prompt, and time, for every page size.

python -m benchmarks.page_size [--model examples/fox-tiny] [--prompt 7936]
"""

from __future__ import annotations

import argparse
import os
import time
from typing import get_args

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.engines import add, engine, manager, run_to_the_end, run_until_decoding, source_tokens
from benchmarks.record import save
from vllm_fox.settings import PageSize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="examples/fox-tiny")
    parser.add_argument("--prompt", type=int, default=7936)
    parser.add_argument("--out", default="results/page_size.json")
    args = parser.parse_args()
    rows = []
    for size in get_args(PageSize):
        blocks = -(-8192 // size) + 2
        with engine(args.model, {"page_size": size}, max_model_len=8192, num_gpu_blocks_override=blocks) as llm:
            spec = manager(llm).kv_cache_spec
            kv_only = 2 * spec.page_format.kv_bytes
            add(llm, "r", source_tokens(llm, args.prompt, seed=1), 64)
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
                    "live_bytes": live * spec.page_format.page_bytes / (dense * kv_only),
                    "page_overhead": spec.page_format.page_bytes / kv_only - 1,
                    "prefill_s": prefill,
                    "decode_ms": 1e3 * decode / 63,
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
