"""``vllm run-batch`` answers a file of requests as the transformers model does, and refuses some line by line."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import vllm_fox.hf  # noqa: F401 (makes AutoModelForCausalLM know the models)
from tests.support import patience

from .serving import TEMPLATE, VLLM

LIMIT_S = 180
LENGTH = 256
"""The engine's context."""
ANSWER = 12
"""Tokens of an answer."""

PROMPTS = ["def add(a, b):\n    ", "import os\nimport sys\n\n\ndef main():\n" * 4, "class Point:\n"]
TOO_LONG = "x = 1\n" * LENGTH


def run_batch(model: Path, folder: Path, lines: dict[str, tuple[str, Any]], *options: str) -> dict[str, Any]:
    """The records of the output file, by their requests' names.

    Args:
        lines: path and body of each request, by its name. The model is added to bodies without one.
    """
    records = [
        {"custom_id": name, "method": "POST", "url": path, "body": {"model": "tiny", **body}}
        for name, (path, body) in lines.items()
    ]
    (folder / "in.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    command = [*VLLM, "run-batch", "-i", "in.jsonl", "-o", "out.jsonl", "--model", str(model)]
    command += ["--served-model-name", "tiny", "--max-model-len", str(LENGTH)]
    command += ["--dtype", "float32", "--enforce-eager", *options]
    limit = patience(LIMIT_S)
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit
    )
    assert done.returncode == 0, done.stdout[-6000:]
    found = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [one["custom_id"] for one in found] == list(lines)
    return {one["custom_id"]: one for one in found}


def test_chats(fox_tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    common = {"temperature": 0, "max_tokens": ANSWER, "ignore_eos": True, "logprobs": True}

    def chat(content: str, **body: Any) -> tuple[str, Any]:
        messages = [{"role": "user", "content": content}]
        return "/v1/chat/completions", {"messages": messages, **common, **body}

    lines = {prompt: chat(prompt) for prompt in PROMPTS}
    lines["too long"] = chat(TOO_LONG)
    lines["other model"] = chat("import os\n", model="other")
    lines["no such use"] = "/v1/embeddings", {"input": "import os\n"}
    found = run_batch(fox_tiny, tmp_path, lines, "--chat-template", "chat.jinja")

    model = AutoModelForCausalLM.from_pretrained(fox_tiny, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(fox_tiny)
    for prompt in PROMPTS:
        one = found[prompt]
        assert one["response"]["status_code"] == 200 and one["error"] is None
        body = one["response"]["body"]
        (choice,) = body["choices"]
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (ids.shape[1], ANSWER)
        want = model.generate(ids, max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False, pad_token_id=0)
        assert choice["message"]["content"] == tokenizer.decode(want[0, ids.shape[1] :])
        with torch.no_grad():
            logits = model(want).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
        likelihoods = [token["logprob"] for token in choice["logprobs"]["content"]]
        # As in tests/engine/test_serving.py: roundings to float32 in all layers, of logits of 20.
        torch.testing.assert_close(
            torch.tensor(likelihoods), logits.gather(1, want[0, ids.shape[1] :, None])[:, 0], atol=5e-5, rtol=0
        )
    for name, code, said in (
        ("too long", 400, f"This model's maximum context length is {LENGTH} tokens."),
        ("other model", 404, "The model `other` does not exist."),
        ("no such use", 400, "Model does not support endpoint: /v1/embeddings"),
    ):
        one = found[name]
        assert one["response"]["status_code"] == code and one["response"]["body"] is None
        error = one["error"]
        assert said in (error if isinstance(error, str) else error["error"]["message"])


def test_embeddings(dcp_tiny: Path, tmp_path: Path) -> None:
    lines = {text: ("/v1/embeddings", {"input": text}) for text in PROMPTS}
    lines["too long"] = "/v1/embeddings", {"input": TOO_LONG}
    found = run_batch(dcp_tiny, tmp_path, lines, "--runner", "pooling")
    model = AutoModel.from_pretrained(dcp_tiny, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(dcp_tiny)
    for text in PROMPTS:
        (data,) = found[text]["response"]["body"]["data"]
        with torch.no_grad():
            state = model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0, -1]
        # Unit vectors in float32, whose u is 6e-8, after the roundings of all layers, as in tests/engine.
        torch.testing.assert_close(torch.tensor(data["embedding"]), state / state.norm(), atol=1e-5, rtol=0)
    assert found["too long"]["response"]["status_code"] == 400
    assert "maximum context length" in found["too long"]["error"]["error"]["message"]
