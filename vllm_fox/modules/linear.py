"""Projections by head as a linear layer of vLLM's own: its weights may be quantised and have adapters."""

from __future__ import annotations

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsW8A8Int8
from vllm.model_executor.parameter import BasevLLMParameter
from vllm.model_executor.utils import set_weight_attrs

from .heads import HeadShare


class HeadLinear(MergedColumnParallelLinear):
    """Several projections of one input, each split by head, as one of vLLM's linear layers.

    Args:
        hidden_size: n, the size of the input.
        parts: maps a name to (the rank's share of heads, width of a head, whether it has a bias), in order.
        quant_config: how vLLM quantises the weights; None if it does not.
        prefix: the layer's name.
    """

    def __init__(
        self,
        hidden_size: int,
        parts: dict[str, tuple[HeadShare, int, bool]],
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        self.shares = {name: share for name, (share, _, _) in parts.items()}
        self.sizes = {name: share.count * width for name, (share, width, _) in parts.items()}
        self.unbiased = [name for name, (_, _, bias) in parts.items() if not bias]
        ranks = get_tensor_model_parallel_world_size()
        super().__init__(
            hidden_size,
            # vLLM divides by the number of ranks, of which several may have the same KV head.
            [size * ranks for size in self.sizes.values()],
            bias=len(self.unbiased) < len(parts),
            quant_config=quant_config,
            prefix=prefix,
        )
        if self.bias is not None:
            loaded = sum(size for name, size in self.sizes.items() if name not in self.unbiased)
            # By this, vLLM knows when all of it has been loaded again.
            set_weight_attrs(self.bias, {"weight_loader_numel": loaded})

    def weight_loader(self, param: nn.Parameter, loaded_weight: torch.Tensor, loaded_shard_id: str) -> None:  # type: ignore[override]
        """Fill the part of a parameter that belongs to one projection."""
        own = self._own(param, loaded_weight, loaded_shard_id)
        super().weight_loader(param, own, list(self.sizes).index(loaded_shard_id))
        if not isinstance(param, BasevLLMParameter):  # a bias
            for name in self.unbiased:
                self.part(param.data, name).zero_()

    def weight_loader_v2(  # type: ignore[override]
        self, param: BasevLLMParameter, loaded_weight: torch.Tensor, loaded_shard_id: str
    ) -> None:
        """Do the same for methods whose parameters know how they are split."""
        own = self._own(param, loaded_weight, loaded_shard_id)
        super().weight_loader_v2(param, own, list(self.sizes).index(loaded_shard_id))

    def _own(self, param: nn.Parameter, loaded: torch.Tensor, part: str) -> torch.Tensor:
        """Return a checkpoint's tensor such that vLLM finds this rank's heads where it looks for them."""
        share, dim = self.shares[part], getattr(param, "output_dim", None)
        in_order = share.total >= self.tp_size and share == HeadShare.split(share.total, self.tp_size, self.tp_rank)
        if dim is None or dim >= loaded.ndim or in_order:
            return loaded
        if loaded.shape[dim] % share.total:
            raise ValueError(
                f"{self.prefix} cannot be split over {self.tp_size} ranks, as several have the same KV head and "
                "its scales are of blocks that span heads: choose a smaller --tensor-parallel-size."
            )
        return torch.cat([share.take(loaded, dim)] * self.tp_size, dim)

    def part(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Return the rows of a tensor with one row for each output that belong to one projection."""
        return tensor.split(list(self.sizes.values()))[list(self.sizes).index(name)]


def is_quantised(layer: nn.Module) -> bool:
    """Return whether a module is a linear layer of vLLM's whose weights are quantised."""
    return isinstance(layer, LinearBase) and not isinstance(layer.quant_method, UnquantizedLinearMethod)


def used_weight(layer: ColumnParallelLinear | RowParallelLinear) -> torch.Tensor:
    """Return the weight [outputs, inputs] with which a layer multiplies.

    Methods store weights in many ways, so it is read off the products of single numbers. No method rounds these but
    to the model's dtype: the number, the product, and what is left when the product is divided by the number.
    """
    scale = getattr(layer, "input_scale", None)
    # Where inputs have one scale for all, larger ones are clipped, and that scale itself is not rounded.
    one = 1.0 if scale is None else scale.max().item()
    device = next(layer.parameters()).device
    inputs = torch.eye(layer.input_size_per_partition, dtype=layer.params_dtype, device=device) * one
    product = layer.quant_method.apply(layer, inputs, None)
    return product.T if one == 1.0 else (product.double() / one).to(product.dtype).T


def input_rounding(layer: LinearBase, largest: float) -> tuple[float, float] | None:
    """Return how a layer rounds its inputs before it multiplies them.

    Args:
        layer: the layer, which is quantised.
        largest: absolute value of the largest input that there can be.

    Returns:
        (relative, absolute): x becomes a number between 0 and (1 + relative) x, which is then off by at most the
        second. None if it is not known how the method rounds.
    """
    scheme = getattr(layer, "scheme", None) or layer.quant_method
    scale = getattr(layer, "input_scale", None)
    key = getattr(scheme, "activation_quant_key", None)
    if key is not None and key.dtype == torch.float8_e4m3fn:
        # Three bits behind the first; below 2^-6 numbers are 2^-9 apart, in units of the scale. Some kernels round
        # the scale up to a power of two.
        step = 2 * largest / 448 if scale is None else scale.max().item()
        return 2.0**-4, step * 2**-10
    if isinstance(scheme, CompressedTensorsW8A8Int8) and scheme.input_symmetric:
        # vLLM's kernels for CPUs with AMX give each token a scale of its own, whatever the checkpoint says.
        step = max(largest / 127, 0.0 if scale is None else scale.max().item())
        # Half a step, and some more for the roundings of the scale itself.
        return 0.0, step * (0.5 + 2**-10)
    return None
