"""lm-evaluation-harness measures the same on a server's engine as on transformers.

It is not among the packages for development: ``pip install lm_eval`` into .venv, or into an environment that sees
.venv's packages.

The harness knows nothing of our models. Its ``vllm`` backend finds them by the plugin. Its ``hf`` backend needs the
import that README.md names, which the harness's own command line has no place for: :data:`HF` runs the same
command line after that import.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.support import patience

pytest.importorskip("lm_eval", reason="the evaluation harness is not installed: pip install lm_eval")

LIMIT_S = 300
VLLM = ["-m", "lm_eval"]
HF = ["-c", "import vllm_fox.hf; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"]

WINDOW = 512
"""Tokens that a backend reads at once. The ``vllm`` backend leaves two of its engine's context free, so with a
context of two more both cut long texts at the same places."""
ANSWER = 20
"""Tokens of a generated answer."""

TOKEN = 5e-5
"""How far one token's log-likelihood may be off: as in tests/engine/test_serving.py, roundings to float32 in all
layers, of logits of 20."""
U = 2.0**-24
"""Unit roundoff of float32."""

TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": ANSWER, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(params=["fox_tiny", "dcp_tiny"])
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def tasks(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tasks and what they are made from: Python source."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = (text / "argparse.py").read_text().splitlines(keepends=True)
    source = "".join(lines)
    choices = [
        {
            "text": "".join(lines[start : start + length]),
            "choices": ["".join(lines[at : at + 2]) for at in (start + length, 900, 950)],
            "label": 0,
        }
        for start, length in zip(range(100, 1300, 100), (1, 2, 5, 10, 20, 40) * 2)
    ]
    # Likely continuations; and a text whose beginning is cut off, since it does not fit.
    for beginning, options in (
        ("x = [1, 2, 3, 4, 5, 6", [",", " +"]),
        ("for i in range", ["(", "."]),
        ("import os\n" * 300 + "import", [" os\n", " re\n"]),
    ):
        choices.append({"text": beginning, "choices": options, "label": 0})
    pieces = ((0, 300), (2000, 1500), (5000, 8000))
    documents = {
        "choices": choices,
        "rolling": [{"text": source[start : start + size]} for start, size in pieces],
        "answers": [{"text": one["text"]} for one in choices[:5]],
    }
    for name, task in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(one) + "\n" for one in documents[name]))
        source_of = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        # JSON is YAML.
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test", **source_of, **task}))
    return folder


def evaluate(program: list[str], backend: str, arguments: str, tasks: Path, output: Path) -> dict[str, list[Any]]:
    """The samples of each task, in the order of its documents, of a run of the harness's command line."""
    command = [sys.executable, "-P", *program, "run", "--model", backend, "--model_args", arguments]
    command += ["--device", "cpu", "--batch_size", "4", "--tasks", ",".join(TASKS), "--include_path", str(tasks)]
    command += ["--output_path", str(output), "--log_samples"]
    caches = {"HF_HOME": str(output / "cache"), "HF_DATASETS_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run(
        command,
        cwd=tasks,
        env={**os.environ, **caches},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=patience(LIMIT_S),
    )
    assert done.returncode == 0, done.stdout[-6000:]
    samples = {}
    for name in TASKS:
        (file,) = output.glob(f"*/samples_{name}_*.jsonl")
        samples[name] = sorted(map(json.loads, file.read_text().splitlines()), key=lambda one: one["doc_id"])
    return samples


def apart(tokens: int, total: float) -> float:
    """How far the log-likelihood of so many tokens may be off.

    The tokens' errors come from many roundings, and their means are zero, so they add up as their root. The ``hf``
    backend adds the tokens up in float32, in pairs: each number passes through log2 of their count sums.
    """
    return TOKEN * math.sqrt(tokens) + U * math.log2(tokens + 1) * abs(total)


def test_both_backends_measure_the_same(model: Path, tasks: Path, tmp_path: Path) -> None:
    served = evaluate(
        VLLM,
        "vllm",
        f"pretrained={model},dtype=float32,max_model_len={WINDOW + 2},enforce_eager=True",
        tasks,
        tmp_path / "vllm",
    )
    plain = evaluate(HF, "hf", f"pretrained={model},dtype=float32,max_length={WINDOW}", tasks, tmp_path / "hf")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))

    def length(text: str) -> int:
        return len(tokenizer.encode(text).ids)

    flags, farthest = set(), 0.0
    for found, want in zip(served["choices"], plain["choices"], strict=True):
        assert len(found["resps"]) == len(want["resps"]) == len(found["doc"]["choices"])
        for choice, ((one, flag),), ((other, other_flag),) in zip(
            found["doc"]["choices"], found["resps"], want["resps"]
        ):
            # The harness moves white space from the end of a text to its continuations.
            tokens = length(found["doc"]["text"] + choice) - length(found["doc"]["text"].rstrip())
            off, bound = abs(float(one) - float(other)), apart(tokens, float(other))
            assert off < bound, (found["doc_id"], choice, one, other)
            assert flag == other_flag
            flags.add(flag)
            farthest = max(farthest, off / bound)
        assert found["acc"] == want["acc"]
    assert flags == {"True", "False"}  # the harness writes them as text

    windows = []
    for found, want in zip(served["rolling"], plain["rolling"], strict=True):
        ((one,),), ((other,),) = found["resps"], want["resps"]
        tokens = length(found["doc"]["text"])
        off, bound = abs(float(one) - float(other)), apart(tokens, float(other))
        assert off < bound, (tokens, one, other)
        windows.append(tokens / WINDOW)
        farthest = max(farthest, off / bound)
    assert min(windows) < 1 and max(windows) > 3

    texts = [one["resps"] for one in served["answers"]]
    assert texts == [one["resps"] for one in plain["answers"]]
    assert len({str(one) for one in texts}) > len(texts) // 2
    print(f"{farthest:.3f} of what is allowed")
