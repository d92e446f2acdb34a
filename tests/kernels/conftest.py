"""Triton's interpreter, a little faster."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def speed_up(interpreter: Any, language: Any) -> None:
    """Replace functions of the language once a kernel instead of in every call."""
    patch_language: Callable[[Any], Any] = interpreter._patch_lang

    def patch_language_once(function: Any) -> Any:
        """Leave out what is done already.

        The interpreter replaces functions of ``triton.language`` when a kernel starts, and again in every call of a
        function that the kernel calls, which was a third of the time of these tests. What has been replaced is no
        builtin of the language any more.
        """
        seen = [x for x in function.__globals__.values() if x is language or x is language.core]
        if seen and not any(language.core.is_builtin(module.load) for module in seen):
            return interpreter._LangPatchScope()
        return patch_language(function)

    interpreter._patch_lang = patch_language_once


if os.environ.get("TRITON_INTERPRET") == "1":
    from triton import language
    from triton.runtime import interpreter

    # Another Triton may do without these: then its interpreter stays as it is.
    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        speed_up(interpreter, language)
