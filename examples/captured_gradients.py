"""Gradients as one CUDA graph: the host starts a whole forward and backward pass at once.

Several hundred kernels of a small model take the GPU less time than they take the host to start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

WARM_UP = 3
"""Passes before the capture, in which torch.compile and libraries make what they need."""
Backward = Callable[..., torch.Tensor]
"""Adds a loss's gradients to those of the weights, given its inputs, and returns the loss without its history."""


class CapturedGradients:
    """A :data:`Backward` that is captured when it is first called, and replayed from then on.

    The captured function must not wait for the device. Its inputs have the same shapes in every call. The weights'
    gradients stay where they are, so an optimizer must set them to zero and not to None. Random numbers are those
    that the function would draw by itself, as the generator of the device is set before a call.

    Args:
        backward: what is captured.
        weights: whose gradients it computes. They are set to zero at the first call.
    """

    def __init__(self, backward: Backward, weights: Iterable[torch.nn.Parameter]) -> None:
        self._backward = backward
        self._weights = [weight for weight in weights if weight.requires_grad]
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the loss of inputs on the device, and add its gradients.

        Raises:
            ValueError: an input has another shape than in the first call.
            RuntimeError: a weight has another gradient than the one that the graph adds to.
        """
        if self._graph is None:
            self._graph = self._capture(inputs)
        for mine, given in zip(self._inputs, inputs, strict=True):
            if given.shape != mine.shape:
                raise ValueError(f"an input has shape {list(given.shape)}: {list(mine.shape)} was captured.")
            mine.copy_(given)
        if any(weight.grad is not gradient for weight, gradient in self._gradients):
            raise RuntimeError("a weight has another gradient: set it to zero with zero_grad(set_to_none=False).")
        self._graph.replay()
        return self._loss.clone()  # the next call writes to it

    def _capture(self, inputs: tuple[torch.Tensor, ...]) -> torch.cuda.CUDAGraph:
        self._inputs = [given.clone() for given in inputs]
        before, current, side = torch.cuda.get_rng_state(), torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._backward(*self._inputs)
        current.wait_stream(side)
        # A graph adds to what is there. Weights that the loss does not depend on stay without a gradient.
        self._gradients = [(w, torch.zeros_like(w)) for w in self._weights if w.grad is not None]
        for weight, gradient in self._gradients:
            weight.grad = gradient
        graph = torch.cuda.CUDAGraph()
        # The threads that watch over exchanges with other processes may go on meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._loss = self._backward(*self._inputs)
        torch.cuda.set_rng_state(before)
        return graph
