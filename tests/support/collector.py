"""Python's garbage collector beside large packages."""

from __future__ import annotations

import gc

_FREEZING = {"freeze": gc.freeze, "unfreeze": gc.unfreeze}


def keep_imports_from_the_collector() -> None:
    """Let collections pass over all objects that there are now, which imports have made and which stay.

    An engine asks for nine full collections from its start to its end. With torch, vLLM and transformers imported
    each takes half a second, which was most of the time of tests with engines. vLLM freezes and thaws objects as
    well: thawing would undo this, and freezing would keep engines that have ended, so neither has an effect.
    """
    gc.collect()
    gc.freeze()
    for name in _FREEZING:
        setattr(gc, name, lambda: None)


def give_imports_back() -> None:
    """Undo it, as modules complain at the interpreter's end about objects that are never freed."""
    for name, function in _FREEZING.items():
        setattr(gc, name, function)
    gc.unfreeze()
