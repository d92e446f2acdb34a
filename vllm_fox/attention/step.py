"""What a family's attention is made of: a formula for each layer, and what a worker's layers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import torch

from vllm_fox.kernels.paged import Batch, PageTable


class WorkerState:
    """What the layers of one worker share from step to step. Families extend it.

    Attributes:
        table: the worker's page table.
    """

    def __init__(self, table: PageTable) -> None:
        self.table = table

    def begin_step(self, batch: Batch) -> None:
        """Called before the first layer of a step."""

    def end_step(self, batch: Batch) -> None:
        """Called after the last layer of a step. Here a family finds pages that no later query needs."""


State = TypeVar("State", bound=WorkerState)


@dataclass
class Formula(ABC, Generic[State]):
    """One layer's attention in one step: the leaf functions in order.

    Attributes:
        layer: index of the layer on this worker.
    """

    layer: int

    # vLLM asks whether context parallelism is supported by these names.
    supports_pcp: ClassVar[bool] = False
    supports_dcp: ClassVar[bool] = False

    @abstractmethod
    def forward(self, inputs: Sequence[torch.Tensor], batch: Batch, state: State, out: torch.Tensor) -> None:
        """Write the new tokens into their pages, then attend (T tokens, without padding).

        Args:
            inputs: the tensors [T, ...] that the family's layer was called with, in its own order.
            out: [T, heads * d], written.
        """
