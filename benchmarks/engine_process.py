"""Engines in processes of their own, so that several stay until all are measured and are measured in turn."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
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
        self._process = context.Process(target=_serve_alone, args=(serve, name, theirs, *args))
        self._process.start()
        theirs.close()

    def wait(self) -> None:
        """Until it can be measured."""
        self._answer()

    def measure(self, *job: Any) -> dict[str, Any]:
        """What the process answers to a job."""
        with self._ends_with_the_engine():
            self._pipe.send(job)
        row: dict[str, Any] = self._answer()
        return row

    def close(self) -> None:
        """End the process, which may have ended by itself."""
        # An engine that ends closes its pipe a moment before it counts as ended.
        with contextlib.suppress(ConnectionError):
            self._pipe.send(None)
        self._process.join()

    def _answer(self) -> Any:
        with self._ends_with_the_engine():
            return self._pipe.recv()

    @contextlib.contextmanager
    def _ends_with_the_engine(self) -> Iterator[None]:
        # Which of the errors it is depends on when the engine ended: before a job was sent, before it was read, or
        # before it was answered.
        try:
            yield
        except (EOFError, ConnectionError):
            raise SystemExit(f"The engine of {self.name} has ended; what it said is above.") from None


def _serve_alone(serve: Callable[..., None], name: str, pipe: Connection, *args: Any) -> None:
    # A forked process inherits locks of threads that do not exist in it.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    serve(name, pipe, *args)


@contextlib.contextmanager
def engine_processes(serve: Callable[..., None], each: Iterable[tuple[Any, ...]]) -> Iterator[list[EngineProcess]]:
    """Engines that can be measured; their processes end with the block.

    Args:
        serve: what runs in each process, as :class:`EngineProcess` calls it.
        each: of each engine, its name and ``args``. An engine starts before the next one is asked for, so what
            the next one needs can be made meanwhile.
    """
    engines: list[EngineProcess] = []
    try:
        for name, *args in each:
            engines.append(EngineProcess(name, serve, *args))
        for engine in engines:
            engine.wait()
        yield engines
    finally:
        for engine in engines:
            engine.close()
