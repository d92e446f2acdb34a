"""What a family of models is: the record through which the rest of the plugin knows it.

docs/adding_a_family.md shows how to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from .settings import PageSettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def _nothing_refused(vllm_config: VllmConfig) -> Iterable[tuple[object, str]]:
    return ()


def _nothing_to_do() -> None:
    return None


@dataclass(frozen=True)
class Family:
    """Models that share an attention layer and a page format.

    Attributes:
        name: of the models, plural, for errors: "NAME do not support ...".
        architectures: name in a checkpoint's ``architectures`` -> "module:class" of the vLLM model. vLLM imports it
            when a checkpoint asks for it.
        configs: config class -> "module:class" of its model for transformers, or None where there is none.
        stream: what a page belongs to, for people: "one layer".
        streams: how many of them a model has, from its config.
        page_size: tokens per page unless the setting ``page_size`` says otherwise.
        settings: class of its options.
        float8_pages: whether its pages can hold float8 (e4m3).
        refusals: of an engine's configuration: what the models cannot do besides what no family can. Pairs of
            whether it is asked for (anything true), and what it is, for "NAME do not support WHAT".
        prepare: whatever else must be known to transformers, such as a tokenizer; may be called again.
    """

    name: str
    architectures: Mapping[str, str]
    configs: Mapping[type[PretrainedConfig], str | None]
    stream: str
    streams: Callable[[Any], int]
    page_size: int
    settings: type[PageSettings] = PageSettings
    float8_pages: bool = False
    refusals: Callable[[VllmConfig], Iterable[tuple[object, str]]] = _nothing_refused
    prepare: Callable[[], None] = _nothing_to_do
