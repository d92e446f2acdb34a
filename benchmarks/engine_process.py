"""An engine in a process of its own, so that several stay until all are measured and are measured in turn."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any


class EngineProcess:
    """A model that is served by another process. It starts at once: engines need not wait for each other.

    Args:
        name: for messages.
        serve: what runs in the process, as ``serve(name, pipe, *args)``. It sends None when it can be measured;
            then it answers each job it receives, until that is None.
        args: for ``serve``.
    """

    def __init__(self, name: str, serve: Callable[..., None], *args: Any) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(name, theirs, *args))
        self._process.start()
        theirs.close()

    def wait(self) -> None:
        """Until it can be measured."""
        self._answer()

    def measure(self, *job: Any) -> dict[str, Any]:
        """What the process answers to a job."""
        self._pipe.send(job)
        row: dict[str, Any] = self._answer()
        return row

    def close(self) -> None:
        """End the process."""
        if self._process.is_alive():
            self._pipe.send(None)
        self._process.join()

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise SystemExit(f"The engine of {self.name} has ended; what it said is above.") from None
