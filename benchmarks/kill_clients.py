"""What asks a server for answers while one of its processes is killed."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from typing import Any

import openai

RECENT_S = 10.0
"""Who has had something from a server within so many seconds is served by it."""


def connect(url: str, timeout: float) -> openai.OpenAI:
    """A client that asks once, on this machine."""
    return openai.OpenAI(
        base_url=f"{url}/v1",
        api_key="none",
        max_retries=0,
        timeout=timeout,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    )


def described(error: Exception) -> str:
    """An error's type and the beginning of what it says, without the ids of requests."""
    said = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "ID", str(error))
    return f"{type(error).__name__}: {said[:160]}"


class Client(threading.Thread):
    """Streams one answer after the other, until one breaks off."""

    def __init__(self, url: str, model: str, tokens: int, timeout: float) -> None:
        super().__init__(daemon=True)
        self.answering, self.error = threading.Event(), ""
        self.ended_at: float | None = None
        self._heard_at, self._stopping = time.monotonic(), False
        self._model, self._tokens = model, tokens
        self._client = connect(url, timeout)

    def run(self) -> None:
        try:
            while not self._stopping:
                stream = self._client.completions.create(
                    model=self._model,
                    prompt="import os\n",
                    max_tokens=self._tokens,
                    temperature=0,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
                finished = False
                for chunk in stream:
                    self._heard_at = time.monotonic()
                    self.answering.set()
                    finished = finished or any(choice.finish_reason for choice in chunk.choices)
                    if self._stopping:
                        stream.close()
                        return
                if not finished:
                    raise ConnectionError("the stream ended in the middle of an answer")
        except Exception as error:  # which one it is, is what is asked
            self.error = described(error)
        self.ended_at = time.monotonic()

    @property
    def waits(self) -> bool:
        """Whether it has had neither an error nor a part of an answer for a while."""
        return self.ended_at is None and time.monotonic() - self._heard_at > RECENT_S

    def stop(self) -> None:
        """Let it break off at the next part of its answer."""
        self._stopping = True


class Newcomers(threading.Thread):
    """Asks for a short answer again and again, as clients do that arrive after a kill."""

    def __init__(self, url: str, model: str, timeout: float) -> None:
        super().__init__(daemon=True)
        self._client, self._model = connect(url, timeout), model
        self._answered_at: list[float] = []
        self.errors: Counter[str] = Counter()
        self._stopping, self._begin = threading.Event(), time.monotonic()

    def run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._client.completions.create(
                    model=self._model, prompt="import os\n", max_tokens=4, temperature=0
                )
                self._answered_at.append(time.monotonic())
            except Exception as error:  # which one it is, is what is asked
                self.errors[described(error)] += 1
            self._stopping.wait(0.2)

    @property
    def served(self) -> bool:
        """Whether one was answered of late."""
        return bool(self._answered_at) and time.monotonic() - self._answered_at[-1] < RECENT_S

    def stop(self) -> dict[str, Any]:
        """How many were answered, when (seconds after the start of this), and what the others were told."""
        self._stopping.set()
        self.join()
        answered = [at - self._begin for at in self._answered_at]
        gaps = [later - earlier for earlier, later in zip([0.0, *answered], answered, strict=False)]
        return {
            "answered": len(answered),
            "last_answer_s": answered[-1] if answered else None,
            "longest_gap_s": max(gaps, default=None),
            "errors": dict(self.errors),
        }
