"""Complete a text with a running server (examples/serve.sh), printing as it comes.

python examples/client.py "def quicksort(items):"
python examples/client.py --base-url http://127.0.0.1:8000/v1 --max-tokens 300 < long_file.py
"""

from __future__ import annotations

import argparse
import os
import sys

import openai


def main() -> int:
    parser = argparse.ArgumentParser(description="Stream a completion from an OpenAI-compatible server.")
    parser.add_argument("prompt", nargs="?", help="default: read from standard input")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="default: the first that the server has")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.3)
    options = parser.parse_args()
    if options.prompt is None and sys.stdin.isatty():
        parser.error("give a prompt, or a text on standard input")
    prompt = sys.stdin.read() if options.prompt is None else options.prompt

    # vLLM asks for a key only if it was started with --api-key.
    client = openai.OpenAI(base_url=options.base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    try:
        stream = client.completions.create(
            model=options.model or client.models.list().data[0].id,
            prompt=prompt,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            stream=True,
            stream_options={"include_usage": True},
        )
        usage = None
        for chunk in stream:
            print("".join(choice.text for choice in chunk.choices), end="", flush=True)
            usage = chunk.usage or usage
    except openai.APIConnectionError as error:
        print(f"client: no server answers at {options.base_url} ({error})", file=sys.stderr)
        return 1
    except openai.APIError as error:
        print(f"client: {error}", file=sys.stderr)
        return 1
    print()
    if usage:
        print(f"[{usage.prompt_tokens} tokens in, {usage.completion_tokens} out]", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
