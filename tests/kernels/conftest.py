"""A faster interpreter of Triton, which computes the same without some of the work that changes nothing."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any


def speed_up(interpreter: Any, language: Any) -> None:
    """Make an interpreter compute the same in less time."""
    for step in (leave_out_unheard_checks, patch_language_once, find_dtypes_once):
        # Another Triton may do without these: then its interpreter stays as it is.
        with suppress(AttributeError):
            step(interpreter, language)


def leave_out_unheard_checks(interpreter: Any, language: Any) -> None:
    """Do not compute sums of integers a second time in 64 bits.

    The interpreter compares both for an assertion that it makes in debug mode only. The second sums took two fifths
    of the time of these tests.
    """
    builder = interpreter.interpreter_builder
    if builder.options.sanitize_overflow and not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def patch_language_once(interpreter: Any, language: Any) -> None:
    """Replace functions of the language once a kernel instead of in every call.

    The interpreter replaces functions of ``triton.language`` when a kernel starts, and again in every call of a
    function that the kernel calls. What has been replaced is no builtin of the language any more.
    """
    patch_language: Callable[[Any], Any] = interpreter._patch_lang
    nothing_to_restore = interpreter._LangPatchScope

    modules: dict[int, list[Any]] = {}  # by the names of a file

    def once(function: Any) -> Any:
        names = function.__globals__
        seen = modules.get(id(names))
        if seen is None:
            seen = modules[id(names)] = [x for x in names.values() if x is language or x is language.core]
        if seen and not any(language.core.is_builtin(module.load) for module in seen):
            return nothing_to_restore()
        return patch_language(function)

    interpreter._patch_lang = once


def find_dtypes_once(interpreter: Any, language: Any) -> None:
    """Remember the dtypes that were looked up. The interpreter makes a table of all dtypes to find one."""
    look_up: Callable[[Any], Any] = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def once(dtype: Any) -> Any:
        found = known.get(dtype.name)
        if found is None:
            found = known[dtype.name] = look_up(dtype)
        return found

    interpreter._get_np_dtype = once


if os.environ.get("TRITON_INTERPRET") == "1":
    from triton import language
    from triton.runtime import interpreter

    speed_up(interpreter, language)
