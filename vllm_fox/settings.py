"""The plugin's own options: ``--additional-config '{"fox": {...}}'``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PageSize = Literal[16, 32, 64, 128, 256]


class PageSettings(BaseModel):
    """Options that every family has. A family that has more options extends this class.

    A field's description completes the sentence "fox.NAME is VALUE: it must be ...".

    Attributes:
        release: whether dead pages are given back while their request runs.
        page_size: tokens per page; None stands for the family's own page size.
        poison_free_pages: whether pages are filled with NaN while they are free, for debugging.
        host_cache_gib: host memory in GiB of an engine, all its ranks together, for cached pages that GPU memory
            has no room for. 0 keeps none there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    release: bool = Field(True, description="true or false")
    page_size: PageSize | None = Field(
        None, description="one of " + ", ".join(map(str, get_args(PageSize))) + ", or null"
    )
    poison_free_pages: bool = Field(False, description="true or false")
    host_cache_gib: float = Field(0.0, ge=0, allow_inf_nan=False, description="0 or a positive number")

    @classmethod
    def from_options(cls, options: Any) -> Self:
        """Read the options from the value of the key ``fox``.

        Raises:
            ValueError: a key is unknown or a value is not allowed. The message names it.
        """
        if not isinstance(options, Mapping):
            raise ValueError(f'"fox" in additional_config is {options!r}: it must be an object of options.')
        try:
            return cls(**options)
        except ValidationError as error:
            name = str(error.errors()[0]["loc"][0])
            if name not in cls.model_fields:
                known = ", ".join(cls.model_fields)
                raise ValueError(f"fox.{name} is not an option; the options are {known}.") from None
            allowed = cls.model_fields[name].description
            raise ValueError(f"fox.{name} is {options[name]!r}: it must be {allowed}.") from None

    @classmethod
    def from_vllm_config(cls, vllm_config: VllmConfig) -> Self:
        """Read the options from an engine's ``additional_config`` (see :meth:`from_options`)."""
        return cls.from_options(_options(vllm_config))


def poisons_free_pages(vllm_config: VllmConfig) -> bool:
    """Return :attr:`PageSettings.poison_free_pages` of an engine whose options have been checked."""
    return bool(_options(vllm_config).get("poison_free_pages", False))


def host_cache_gib(vllm_config: VllmConfig) -> float:
    """Return :attr:`PageSettings.host_cache_gib` of an engine whose options have been checked."""
    return float(_options(vllm_config).get("host_cache_gib", 0.0))


def _options(vllm_config: VllmConfig) -> Any:
    additional = vllm_config.additional_config
    return additional.get("fox", {}) if isinstance(additional, Mapping) else {}
