"""Base classes of a family's attention: the formula of a layer, and the state that a worker's layers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import torch

from vllm_fox.kernels.paged import Batch, PageTable


class WorkerState:
    """State that the layers of one worker share from step to step. Families extend this class.

    Attributes:
        table: the worker's page table.
        watch: called after the last layer of every step, before :meth:`end_step`; None unless somebody watches.
            Steps that are replayed as CUDA graphs do not call it.
    """

    def __init__(self, table: PageTable) -> None:
        self.table = table
        self.watch: Callable[[Batch], None] | None = None

    def begin_step(self, batch: Batch) -> None:
        """Prepare a step. This is called before its first layer."""

    def end_step(self, batch: Batch) -> None:
        """Finish a step, after its last layer. Here a family finds the pages that no later query needs."""

    def first_live_at(self, slots: torch.Tensor, num_pages: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Return the first live pages as they were when requests had filled so many pages.

        Families whose pages are shared between requests (``Family.shares_pages``) implement this. It is called
        after a step, for boundaries that lie in it.

        Args:
            slots, num_pages: [B] int32 slots of the requests, and full pages.
            before: [B, S] int32 the slots' first live pages before the step.

        Returns:
            [B, S] int32.
        """
        raise TypeError(f"{type(self).__name__} cannot tell live ranges of the past")

    def lower_ends(self, batch: Batch, row: int, ends: torch.Tensor) -> None:
        """Note which tokens a step drops, after its last layer and before :meth:`end_step`, which may move tokens.

        Families of whose models maps can be made implement this (``Family.token_ends``).

        Args:
            row: of the batch, whose request is looked at.
            ends: [S, T] int32 on the CPU; T is at least the number of the request's tokens. Entries are lowered to
                the position of the first query that does not see the token any more.
        """
        raise TypeError(f"{type(self).__name__} cannot tell which tokens are dropped")


State = TypeVar("State", bound=WorkerState)


@dataclass
class Formula(ABC, Generic[State]):
    """One layer's attention in one step. It calls the leaf functions in order.

    Attributes:
        layer: index of the layer on this worker.
    """

    layer: int

    # vLLM reads these two names to learn whether context parallelism is supported.
    supports_pcp: ClassVar[bool] = False
    supports_dcp: ClassVar[bool] = False

    @abstractmethod
    def forward(self, inputs: Sequence[torch.Tensor], batch: Batch, state: State, out: torch.Tensor) -> None:
        """Write T new tokens (without padding) into their pages, then compute their attention.

        Args:
            inputs: the tensors [T, ...] that the family's layer was called with, in its own order.
            out: [T, heads * d]; the output is written here.
        """
