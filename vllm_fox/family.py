"""The record that describes a family of models to the rest of the plugin.

docs/adding_a_family.md shows how to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from .settings import PageSettings

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


def _nothing_refused(vllm_config: VllmConfig) -> Iterable[tuple[object, str]]:
    return ()


def _nothing_to_do() -> None:
    return None


@dataclass(frozen=True)
class Family:
    """Models that share an attention layer and a page format.

    Attributes:
        name: plural name of the models, for errors: "NAME do not support ...".
        architectures: maps a name in a checkpoint's ``architectures`` to "module:class" of the vLLM model. vLLM
            imports the model when a checkpoint asks for it.
        configs: maps a config class to "module:class" of its model for transformers, or to None if there is none.
        stream: description of a stream for people, such as "one layer".
        streams: function that returns the number of a model's streams, given its config.
        page_size: tokens per page unless the setting ``page_size`` says otherwise.
        settings: class of the family's options.
        shares_pages: whether requests that begin alike may share full pages (prefix caching). Pages must not change
            once they are full, and the state must tell live ranges of the past
            (:meth:`vllm_fox.attention.step.WorkerState.first_live_at`).
        float8_pages: whether the family's pages can hold float8 (e4m3).
        quantized_weights: whether weights may be quantised. The models must then leave that to vLLM's linear
            layers, whose names must be those of the checkpoint, as quantisation configs name layers.
        adapters: whether requests may use LoRA adapters. The models must then be of vLLM's interface SupportsLoRA,
            and leave every projection that an adapter may change to vLLM's linear layers.
        speculation: whether rejected drafts of speculative decoding can be taken back: a token that is written anew
            replaces all that pages and states know of the earlier one, and what a request's newest
            :func:`~vllm_fox.pages.spec.unsettled_tokens` do to live ranges is not acted upon.
        refusals: function that returns what the models cannot do besides what no family can, given an engine's
            configuration. It returns pairs: whether the feature is asked for (any true value), and the name of the
            feature, for the error "NAME do not support WHAT".
        lookalikes: maps the name of an architecture of vLLM's own to a function that is given an engine's model
            configuration. It returns None, or a sentence that refuses a checkpoint: one of this family's that vLLM
            would take for its own model and serve wrong.
        token_ends: "module:function" of what maps of a text are made from by the models for transformers, or None
            if they make no maps. The function is given a model in evaluation mode, input_ids [1, T] and the tokens
            of a page, and returns [layers, streams of a layer, T] int32: the position of the first query that does
            not see the token any more, or T if all queries see it. It must be what
            :meth:`vllm_fox.attention.step.WorkerState.lower_ends` finds in an engine.
        whole_pages: whether a stream drops its oldest page as a whole, so that all tokens of a page have one end.
        prepare: function that registers whatever else transformers must know, such as a tokenizer; safe to call
            again.
    """

    name: str
    architectures: Mapping[str, str]
    configs: Mapping[type[PretrainedConfig], str | None]
    stream: str
    streams: Callable[[Any], int]
    page_size: int
    settings: type[PageSettings] = PageSettings
    shares_pages: bool = False
    float8_pages: bool = False
    quantized_weights: bool = False
    adapters: bool = False
    speculation: bool = False
    refusals: Callable[[VllmConfig], Iterable[tuple[object, str]]] = _nothing_refused
    lookalikes: Mapping[str, Callable[[ModelConfig], str | None]] = field(default_factory=dict)
    token_ends: str | None = None
    whole_pages: bool = False
    prepare: Callable[[], None] = _nothing_to_do
