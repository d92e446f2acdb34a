"""Look inside a model while it reads a text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from torch import nn
from torch.utils.hooks import RemovableHandle


@contextlib.contextmanager
def evaluating(model: nn.Module, hooks: Iterable[RemovableHandle] = ()) -> Iterator[None]:
    """Put a model into evaluation mode; at the end, or on an error, take hooks away and restore its mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
