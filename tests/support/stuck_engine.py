"""A plugin for vLLM: one engine answers some requests, and then stands still while it holds others.

Which process that is, is written to the file that the environment variable STUCK_ENGINE names. Once the file is
there, no other engine stands still.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

ANSWERED = 6
"""Requests that are answered before. Of batches of two, four at once, the first is then complete."""


def register() -> None:
    """Look at the requests of an engine after every step, when its outputs are on their way."""
    from vllm.v1.engine.core import EngineCore

    core: Any = EngineCore
    step_ended = core.post_step
    seen = set[str]()

    def post_step(self: Any, model_executed: bool) -> None:
        step_ended(self, model_executed)
        held = self.scheduler.requests
        seen.update(held)
        if held and len(seen) - len(held) >= ANSWERED:
            stand_still(Path(os.environ["STUCK_ENGINE"]))

    core.post_step = post_step


def stand_still(path: Path) -> None:
    """Write this process's number to the file and wait for ever, unless the file is there."""
    mine = path.with_name(f"{path.name}-{os.getpid()}")
    mine.write_text(str(os.getpid()))
    try:
        os.link(mine, path)  # so that the file is never there without the number
    except FileExistsError:
        return
    threading.Event().wait()
