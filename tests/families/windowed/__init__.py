"""A family from outside the package: decoders whose heads each see a fixed window (docs/adding_a_family.md)."""

from vllm_fox.family import Family

from .config import WindowedConfig

WINDOWED = Family(
    name="Windowed decoders",
    architectures={"WindowedForCausalLM": "tests.families.windowed.model:WindowedForCausalLM"},
    configs={WindowedConfig: None},
    stream="one head of one layer",
    streams=lambda config: config.num_hidden_layers * config.num_attention_heads,
    page_size=16,
)
