"""What ``benchmarks.fuzz`` gives to Schemathesis, which runs it: requests are small and reach the model."""

from __future__ import annotations

import os
from typing import Any

import schemathesis

MOST = {"max_tokens": 16, "max_completion_tokens": 16, "max_output_tokens": 16, "min_tokens": 16, "n": 4}
"""The largest value of each field, also of requests that are wrong on purpose. What is no number stays as it is."""
LEFT_OUT = ("seed",)
"""On a CPU, vLLM 0.32 ends if a prompt with a seed is read in several steps."""


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Bound what a request asks for, wherever it says so, and ask the model that there is."""
    bound(case.body)
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = os.environ["FUZZ_MODEL"]


def bound(value: Any) -> None:
    """Bound the fields of an object, and of all that are in it."""
    if isinstance(value, dict):
        for name in LEFT_OUT:
            value.pop(name, None)
        for name, most in MOST.items():
            if isinstance(value.get(name), int | float) and value[name] > most:
                value[name] = most
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            bound(one)
