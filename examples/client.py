"""Complete a text with a running server (examples/serve.sh), printing as it comes.

python examples/client.py "def quicksort(items):"
python examples/client.py --base-url http://127.0.0.1:8000/v1 --max-tokens 300 < long_file.py
"""

from __future__ import annotations

import os
import sys

import openai
from command_line import Parser, non_negative_float, positive_int, utf8
from whole_files import text_of

BASE_URL = "http://127.0.0.1:8000/v1"


def main() -> int:
    parser = Parser(description="Stream a completion from an OpenAI-compatible server.")
    parser.add_argument("prompt", nargs="?", type=utf8, help="default: read from standard input")
    parser.add_argument("--base-url", default=BASE_URL)
    parser.add_argument("--model", help="default: the first that the server has")
    parser.add_argument("--max-tokens", type=positive_int, default=128)
    parser.add_argument("--temperature", type=non_negative_float, default=0.3)
    options = parser.parse_args()
    if options.prompt is None and sys.stdin.isatty():
        parser.error("give a prompt, or a text on standard input")
    prompt = options.prompt
    if prompt is None:
        prompt = text_of(sys.stdin.buffer.read(), "The text on standard input")

    # vLLM asks for a key only if it was started with --api-key.
    key = os.environ.get("OPENAI_API_KEY") or "none"
    if not key.isascii():
        parser.error("OPENAI_API_KEY has characters that no HTTP header can have: use ASCII.")
    wanted = f"--base-url is {options.base_url!r}: it must be an address such as {BASE_URL}"
    try:
        client = openai.OpenAI(base_url=options.base_url, api_key=key)
    except Exception as error:  # that of the HTTP library, whichever openai has, and it has no other base class
        parser.error(f"{wanted} ({error}).")
    try:
        model = options.model or next((one.id for one in client.models.list()), None)
        if model is None:
            print(f"client: the server at {options.base_url} has no model", file=sys.stderr)
            return 1
        stream = client.completions.create(
            model=model,
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
    except UnicodeError as error:  # a name that the system cannot look up is found out only when it is asked for
        parser.error(f"{wanted} ({error}).")
    print()
    if usage:
        print(f"[{usage.prompt_tokens} tokens in, {usage.completion_tokens} out]", file=sys.stderr)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nclient: interrupted.", file=sys.stderr)
        sys.exit(130)
