"""Generate text in batch, without a server, and see how much of the KV cache was given back on the way.

python examples/offline.py --prompt "def quicksort(items):" --prompt "import os"
python examples/offline.py --prompts-file prompts.txt --max-tokens 200       # one prompt a line
python examples/offline.py --model PATH_OR_NAME --fox '{"page_size": 128}'
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from command_line import Parser, json_object, non_negative_float, number, positive_int, utf8
from whole_files import Unreadable, lines_of, read_text

from vllm_fox.cpu import prepare_cpu_environment

gib = number(lambda value: 0 < value <= 2**20, "a number above 0 and at most 1048576")

PROMPTS = [
    'def read_lines(path, encoding="utf-8"):\n    """Return the lines of a file."""\n',
    "import argparse\nimport sys\n\n\ndef main(argv=None):\n    parser = argparse.ArgumentParser(",
]


def arguments() -> argparse.Namespace:
    parser = Parser(description="Batch generation with a Forgetting Transformer.")
    parser.add_argument("--model", default=str(Path(__file__).resolve().parent / "fox-tiny"))
    parser.add_argument("--prompt", type=utf8, action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts-file", type=Path, help="a text file with one prompt a line")
    parser.add_argument("--max-tokens", type=positive_int, default=128)
    parser.add_argument("--temperature", type=non_negative_float, default=0.0, help="0: always the likeliest token")
    parser.add_argument("--max-model-len", type=positive_int, help="default: the checkpoint's")
    parser.add_argument("--kv-cache-gib", type=gib, help="default: 1 on a CPU, what is free on a GPU")
    parser.add_argument("--tensor-parallel-size", type=positive_int, default=1)
    parser.add_argument("--enforce-eager", action="store_true", help="starts faster, runs slower")
    parser.add_argument("--fox", type=json_object, default={}, help="the plugin's settings, a JSON object")
    options = parser.parse_args()
    if options.prompts_file:
        try:
            found = [line for line in lines_of(read_text(options.prompts_file)) if line.strip()]
        except Unreadable as error:
            parser.error(f"--prompts-file: {error}")
        if not found:
            parser.error(f"--prompts-file {options.prompts_file} has no prompts: it has nothing but empty lines.")
        options.prompt += found
    return options


def main() -> int:
    options = arguments()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    prepare_cpu_environment(kv_cache_space=False)  # --kv-cache-gib says that
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    if options.kv_cache_gib is None and current_platform.is_cpu():
        options.kv_cache_gib = 1.0
    engine: dict[str, Any] = {}
    if options.kv_cache_gib is not None:
        engine["kv_cache_memory_bytes"] = int(options.kv_cache_gib * 2**30)
    try:
        llm = LLM(
            model=options.model,
            max_model_len=options.max_model_len,
            tensor_parallel_size=options.tensor_parallel_size,
            enforce_eager=options.enforce_eager,
            additional_config={"fox": options.fox},
            disable_log_stats=False,  # get_metrics() below needs them
            **engine,
        )
        sampling = SamplingParams(temperature=options.temperature, max_tokens=options.max_tokens)
        outputs = llm.generate(options.prompt or PROMPTS, sampling)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"offline: {error}", file=sys.stderr)
        return 1

    for output in outputs:
        print(f"\n--- {len(output.prompt_token_ids)} tokens in, {len(output.outputs[0].token_ids)} out")
        print(f"{output.prompt}>>>{output.outputs[0].text}")
    # A counter's total, by name; several engines of one process would each have one.
    counts: dict[str, float] = {}
    for metric in llm.get_metrics():
        if metric.name.startswith("vllm:fox_kv_pages_"):
            name = metric.name.removeprefix("vllm:fox_kv_pages_")
            counts[name] = counts.get(name, 0) + metric.value
    pages = ", ".join(f"{value:,.0f} {name}" for name, value in counts.items())
    print(f"\nKV pages (released: while their request was running): {pages}")
    return 0


if __name__ == "__main__":  # vLLM starts processes that import this file
    sys.exit(main())
