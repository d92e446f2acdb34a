"""What the config class refuses."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_fox.families.evicting.config import EvictingDecoderConfig

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}


def rope(**fields: Any) -> dict[str, Any]:
    return {"rope_parameters": fields}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_size": "64"}, "hidden_size is '64': it must be an integer from 1 on."),
        ({"head_dim": 0}, "head_dim is 0: it must be an integer from 1 on."),
        ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x': it must be a positive number."),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1: it must be a positive number."),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan: it must be a positive number."),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
        ({"qk_norm": "yes"}, "qk_norm is 'yes': it must be true or false."),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no': it must be true or false."),
        ({"rope_parameters": "x"}, "rope_parameters is 'x': it must be an object."),
        ({"rope_parameters": []}, "rope_parameters is []: it must be an object."),
        (rope(rope_type="spiral"), "rope_parameters.rope_type is 'spiral': it must be 'default', 'dynamic', "),
        (rope(type="spiral"), "rope_parameters.rope_type is 'spiral': it must be 'default', 'dynamic', "),
        (rope(rope_type=["yarn"]), "rope_parameters.rope_type is ['yarn']: it must be "),
        (
            rope(rope_type="yarn"),
            "rope_parameters.factor is missing: it must be a positive number with rope_type 'yarn'.",
        ),
        (rope(rope_type="linear", factor="2"), "rope_parameters.factor is '2': it must be a positive number"),
        (rope(**LLAMA3 | {"low_freq_factor": None}), "rope_parameters.low_freq_factor is None: it must be "),
        (
            rope(rope_type="longrope", short_factor=[1.0], long_factor=[1.0]),
            "rope_parameters.short_factor is [1.0]: it must be a list of 64 positive numbers",
        ),
        (rope(rope_theta=None), "rope_parameters.rope_theta is None: it must be a positive number."),
        (
            rope(**YARN, original_max_position_embeddings=0),
            "rope_parameters.original_max_position_embeddings is 0: it must be an integer from 1 on.",
        ),
        ({"eviction": []}, "eviction is []: it must be an object."),
        ({"eviction": {}}, "eviction.method is missing"),
    ],
)
def test_mistakes_name_the_field_and_the_fix(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        EvictingDecoderConfig(**fields)
    assert str(caught.value).startswith(f"evicting_decoder config: {message}")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"type": "linear", "factor": 2},
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e5},
        LLAMA3 | {"original_max_position_embeddings": 512},
        {"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2] * 64, "factor": None},
        YARN,
    ],
)
def test_every_rope_type_is_read(given: dict[str, Any]) -> None:
    config = EvictingDecoderConfig(rope_parameters=dict(given))
    found = config.rope_parameters
    assert found["rope_type"] == given.get("rope_type", given.get("type", "default"))
    assert given.items() <= found.items() and found["rope_theta"] == given.get("rope_theta", 10000.0)
    config.check()
