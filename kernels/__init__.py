"""Leaf functions, a folder for each operation: ``GROUP/NAME``, and ``NAME`` for those of no group.

``reference.py`` is the plain PyTorch form and reads like the formula; faster implementations stand beside
it with the same signature, in Triton for a GPU and in C++ for a CPU, and ``__init__.py`` picks one. Nothing here
knows vLLM.

All but ``forgetting.training``, ``subset.training``, ``gated_mlp`` and ``rms_norm`` work on the pages of a server's
KV cache. Those four are for training, and the first two take whole sequences.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .forgetting.training import forgetting_attention

__all__ = ["forgetting_attention"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: with a checkout as the working directory, transformers takes this folder for the
    # distribution "kernels" and imports it as that to read its version. Were operators registered by it, PyTorch
    # would tear down those of vllm_fox.kernels, which have the same names, while they are in use.
    if name == "forgetting_attention":
        from .forgetting.training import forgetting_attention

        return forgetting_attention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
