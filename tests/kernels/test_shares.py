"""Launches of the decode kernels."""

from __future__ import annotations

import pytest
import torch

from vllm_fox.kernels.float8 import FP8
from vllm_fox.kernels.forgetting.decode import kernel as forgetting
from vllm_fox.kernels.forgetting.pages import HEAD_DIMS
from vllm_fox.kernels.shares.plan import Launch
from vllm_fox.kernels.subset.attention import decode_kernel as subset

DTYPES = (torch.bfloat16, torch.float16, torch.float32, FP8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_a_processor_has_registers_for_all_programs(dim: int, dtype: torch.dtype) -> None:
    """65,536 on every GPU that the kernels run on, in blocks of 8 a thread."""
    launches = [forgetting.launch(dim, groups, 64, dtype) for groups in (1, 4)] + [subset.launch(dim, 32, dtype)]
    for launch in launches:
        registers = 256 if launch.registers is None else launch.registers
        assert registers % 8 == 0
        assert 32 * launch.warps * launch.programs * registers <= 65536


def test_registers_are_limited_only_where_they_must_be() -> None:
    assert Launch(64, 1, 3, 8).registers is None
    assert Launch(64, 1, 2, 12).registers == 168
    assert Launch(64, 4, 2, 4).registers == 128
