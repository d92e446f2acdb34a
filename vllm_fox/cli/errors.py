"""How a command ends, and the one sentence that says why."""

from __future__ import annotations

FINE, WRONG, USAGE = 0, 1, 2
"""Exit codes: all is well; the command has found something wrong or could not do its work; the command line is
wrong."""


class CommandError(Exception):
    """A command cannot go on.

    Args:
        sentence: names what was given, its value and the fix.
        code: exit code of the program, :data:`USAGE` unless given.
    """

    def __init__(self, sentence: str, code: int = USAGE) -> None:
        super().__init__(sentence)
        self.code = code
