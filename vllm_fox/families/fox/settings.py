"""The options of Forgetting Transformers."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Literal

from pydantic import Field

from vllm_fox.kernels.acp import DEFAULT_LOG_TOLERANCE
from vllm_fox.settings import PageSettings


class Default(Enum):
    """A default that no value in JSON can equal."""

    FROM_CHECKPOINT = "from the checkpoint"


class FoxSettings(PageSettings):
    """Options of Forgetting Transformers.

    Attributes:
        log_pruning_tolerance: log eps, where a query's pruned attention weights sum to at most eps (ACP, arXiv
            2504.06949). None turns pruning off. The default is the checkpoint's value, or -10 if it has none.
    """

    log_pruning_tolerance: (
        Annotated[float, Field(lt=0, allow_inf_nan=False)] | Literal[Default.FROM_CHECKPOINT] | None
    ) = Field(
        Default.FROM_CHECKPOINT,
        description="a negative number (the natural logarithm of the largest total weight that may be pruned, "
        "such as -10) or null (no pruning)",
    )

    def tolerance(self, checkpoint: float | None) -> float | None:
        """Return the tolerance in force, given the checkpoint's own (None if it has none)."""
        if self.log_pruning_tolerance is Default.FROM_CHECKPOINT:
            return DEFAULT_LOG_TOLERANCE if checkpoint is None else checkpoint
        return self.log_pruning_tolerance
