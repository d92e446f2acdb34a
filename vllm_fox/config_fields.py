"""Checks of a config.json's fields. Each raises one ValueError that names the field, its value and what it must be.

Nothing here imports torch, transformers or vLLM.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn


@dataclass(frozen=True)
class Fields:
    """The fields of a config, or of an object in it.

    A message is "FIELD is VALUE: it must be ...". The argument ``why`` of a check ends it: a clause such as "where
    qk_norm is true".

    Attributes:
        prefix: what a message has in front of a field's name.
        values: by the field's name. One that is not there counts as null.
    """

    prefix: str
    values: Mapping[str, Any]

    @classmethod
    def of(cls, config: Any) -> Fields:
        """Return the fields of a config, which is an object with attributes."""
        return cls(f"{config.model_type} config: ", vars(config))

    def inside(self, field: str) -> Fields:
        """Return the fields of the object that a field is; refuse anything else."""
        value = self.values.get(field)
        if not isinstance(value, Mapping):
            self.refuse(field, "an object")
        return Fields(f"{self.prefix}{field}.", value)

    def with_defaults(self, defaults: Mapping[str, Any]) -> Fields:
        """Return these fields, and others that are not there."""
        return Fields(self.prefix, {**defaults, **self.values})

    def refuse(self, field: str, allowed: str, why: str = "") -> NoReturn:
        """Say what a field must be."""
        found = f"is {self.values[field]!r}" if field in self.values else "is missing"
        raise ValueError(f"{self.prefix}{field} {found}: it must be {allowed}{why and f' {why}'}.")

    def known(self, names: Iterable[str]) -> None:
        """Check that there are no fields but these."""
        for field in self.values:
            if field not in names:
                self.refuse(field, "left out", f"because it is unknown; the fields are {', '.join(names)}")

    def integers(self, *fields: str, optional: bool = False) -> None:
        """Check that these are integers from 1 on, or null if they are optional."""
        for field in fields:
            value = self.values.get(field)
            fits = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not fits and not (optional and value is None):
                self.refuse(field, _or_null("an integer from 1 on", optional))

    def numbers(self, *fields: str, why: str = "") -> None:
        """Check that these are numbers."""
        for field in fields:
            if not is_number(self.values.get(field)):
                self.refuse(field, "a number", why)

    def positive(self, *fields: str, optional: bool = False, why: str = "") -> None:
        """Check that these are positive numbers, or null if they are optional."""
        for field in fields:
            value = self.values.get(field)
            if not is_positive(value) and not (optional and value is None):
                self.refuse(field, _or_null("a positive number", optional), why)

    def flags(self, *fields: str) -> None:
        """Check that these are true or false."""
        for field in fields:
            self.one_of(field, (True, False))

    def one_of(self, field: str, allowed: tuple[Any, ...], why: str = "") -> None:
        """Check that a field has one of these values, of the same type."""
        value = self.values.get(field)
        if not any(type(value) is type(one) and value == one for one in allowed):
            self.refuse(field, listed(allowed), why)

    def divides(self, field: str, multiple: str) -> None:
        """Check that a field divides another. Both are integers; the first may be null."""
        value, whole = self.values.get(field), self.values[multiple]
        if value is not None and whole % value:
            self.refuse(field, f"a divisor of {multiple} ({whole})")


def is_number(value: Any) -> bool:
    """Return whether a value of a config.json is a number: no bool, NaN, or beyond what a float can be."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_positive(value: Any) -> bool:
    """Return whether a value of a config.json is a positive number."""
    return is_number(value) and value > 0


def listed(values: Iterable[Any]) -> str:
    """Return values in words: "'a', 'b' or null"."""
    in_json = {True: "true", False: "false", None: "null"}
    *most, last = (in_json[one] if one is None or isinstance(one, bool) else repr(one) for one in values)
    return f"{', '.join(most)} or {last}" if most else last


def _or_null(allowed: str, optional: bool) -> str:
    return f"null or {allowed}" if optional else allowed
