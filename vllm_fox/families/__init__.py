"""The families of models, each in its own folder. To add one, add its folder and its line here."""

from __future__ import annotations

from importlib.metadata import entry_points

from transformers import PretrainedConfig

from vllm_fox.family import Family

from .evicting import EVICTING
from .fox import FOX
from .sparse_gpt2 import SPARSE_GPT2

FAMILIES: tuple[Family, ...] = (FOX, SPARSE_GPT2, EVICTING)

ENTRY_POINT = "vllm_fox.families"
"""Group of entry points through which other packages add families: each names a :class:`Family`."""


def all_families() -> tuple[Family, ...]:
    """Return the plugin's own families and those of other packages.

    Raises:
        TypeError: an entry point names something that is not a Family.
    """
    others = []
    for entry in entry_points(group=ENTRY_POINT):
        family = entry.load()
        if not isinstance(family, Family):
            raise TypeError(f"Entry point {entry.value} of {ENTRY_POINT} is {family!r}: it must be a Family.")
        others.append(family)
    return (*FAMILIES, *others)


def family_of(config: PretrainedConfig) -> Family:
    """Return the family to which a checkpoint's config belongs.

    Raises:
        ValueError: it belongs to none.
    """
    for family in all_families():
        if type(config) in family.configs:
            return family
    raise ValueError(
        f"model_type is {config.model_type}: no family of vllm-fox has such models. Give a "
        "checkpoint of one, or install the package of its family."
    )
