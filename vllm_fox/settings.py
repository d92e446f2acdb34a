"""The plugin's own options: ``--additional-config '{"fox": {...}}'``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

DEFAULT_LOG_PRUNING_TOLERANCE = -10.0
PAGE_SIZES = (16, 32, 64, 128, 256)
_CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class FoxSettings:
    """Options of one engine.

    Attributes:
        log_pruning_tolerance: of Forgetting Transformers, log eps: pruned weights of a query sum to at most eps.
            None turns pruning off; the default is the checkpoint's value, else -10.
        release: give dead pages back while their request runs.
        page_size: tokens per page; None: what suits the model, 64 for Forgetting Transformers, else 16.
    """

    log_pruning_tolerance: float | None | str = _CHECKPOINT
    release: bool = True
    page_size: int | None = None

    def __post_init__(self) -> None:
        tolerance = self.log_pruning_tolerance
        if tolerance is not None and tolerance != _CHECKPOINT:
            number = isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool)
            if not number or not float(tolerance) < 0 or float(tolerance) == float("-inf"):
                raise ValueError(
                    f"fox.log_pruning_tolerance is {tolerance!r}: it must be a negative number (the natural "
                    "logarithm of the largest total weight that may be pruned, such as -10) or null (no pruning)."
                )
        if not isinstance(self.release, bool):
            raise ValueError(f"fox.release is {self.release!r}: it must be true or false.")
        if isinstance(self.page_size, bool) or self.page_size not in (None, *PAGE_SIZES):
            sizes = ", ".join(map(str, PAGE_SIZES))
            raise ValueError(f"fox.page_size is {self.page_size!r}: it must be one of {sizes}.")

    @classmethod
    def from_dict(cls, options: Any) -> FoxSettings:
        """Read the value of the key ``fox``; unknown keys and bad values are errors."""
        if not isinstance(options, Mapping):
            raise ValueError(f'"fox" in additional_config is {options!r}: it must be an object of options.')
        known = [field.name for field in fields(cls)]
        for key in options:
            if key not in known:
                raise ValueError(f"fox.{key} is not an option; the options are {', '.join(known)}.")
        return cls(**options)

    @classmethod
    def from_vllm_config(cls, vllm_config: VllmConfig) -> FoxSettings:
        additional = vllm_config.additional_config
        return cls.from_dict(additional.get("fox", {}) if isinstance(additional, Mapping) else {})

    def tolerance(self, checkpoint: float | None) -> float | None:
        """The tolerance in force, given the checkpoint's own (None: it has none)."""
        if self.log_pruning_tolerance is None:
            return None
        if self.log_pruning_tolerance == _CHECKPOINT:
            return DEFAULT_LOG_PRUNING_TOLERANCE if checkpoint is None else checkpoint
        return float(self.log_pruning_tolerance)
