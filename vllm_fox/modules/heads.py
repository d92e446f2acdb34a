"""Parameters and projections by head, split over tensor-parallel ranks by head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform


@dataclass
class HeadShare:
    """The heads of this tensor-parallel rank.

    Attributes:
        total: number of heads of the model.
        heads: indices of the rank's heads. With fewer heads than ranks (KV heads only) several ranks have the same.
    """

    total: int
    heads: list[int]

    @property
    def count(self) -> int:
        return len(self.heads)

    @classmethod
    def of_rank(cls, total: int) -> HeadShare:
        """Return this process's share of ``total`` heads, in the model's order."""
        return cls.split(total, get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank())

    @classmethod
    def split(cls, total: int, ranks: int, rank: int) -> HeadShare:
        """Return a rank's share. The config hook has checked that one of heads and ranks divides the other."""
        if total >= ranks:
            count = total // ranks
            return cls(total, list(range(rank * count, (rank + 1) * count)))
        return cls(total, [rank // (ranks // total)])

    def take(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Return this rank's part of a tensor whose given dimension is heads, or heads times something."""
        heads = torch.tensor(self.heads, device=tensor.device)
        return tensor.unflatten(dim, (self.total, -1)).index_select(dim, heads).flatten(dim, dim + 1)

    def parameter(self, *shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
        """Make a parameter [count, \\*shape] that loads its part of a checkpoint's tensor.

        Its dtype is PyTorch's default, which is the model's while a model is built, unless another is given.
        """
        value = nn.Parameter(torch.empty(self.count, *shape, dtype=dtype), requires_grad=False)
        set_weight_attrs(value, {"weight_loader": self._load})
        return value

    def _load(self, param: nn.Parameter, loaded: torch.Tensor) -> None:
        if loaded.ndim == 1 and param.ndim == 2 and len(loaded) == param.shape[1]:
            param.data.copy_(loaded.expand_as(param))  # one weight shared by all heads
        else:
            param.data.copy_(self.take(loaded).view(param.shape))


class HeadProjection(nn.Module):
    """Several projections of one input, each split by head, computed as one matrix product.

    Decode spends its time on reading weights and on waiting for kernels. One large product instead of many small
    ones saves time on both. On a CPU vLLM packs the weight for its products once it is loaded, and empties
    ``weight``.

    Args:
        hidden_size: n, the size of the input.
        parts: maps a name to (the rank's share of heads, width of a head, whether it has a bias), in order.
        weight_is_read: whether others read ``weight`` once it is loaded, so that it is not packed.
    """

    ALIGNMENT = 16
    """Rows are padded to a multiple of this: kernels then know that every token's outputs are aligned."""

    def __init__(
        self, hidden_size: int, parts: dict[str, tuple[HeadShare, int, bool]], *, weight_is_read: bool = False
    ) -> None:
        super().__init__()
        packs = current_platform.is_cpu() and not weight_is_read
        # By this name vLLM finds what is to be done with weights that have been loaded.
        self.quant_method = UnquantizedLinearMethod() if packs else None
        self.shares = {name: share for name, (share, _, _) in parts.items()}
        self.sizes = {name: share.count * width for name, (share, width, _) in parts.items()}
        rows = sum(self.sizes.values())
        self.padding = -rows % self.ALIGNMENT
        self.weight = self._parameter(rows, hidden_size)
        self.biased = [name for name, (_, _, bias) in parts.items() if bias]
        biased = sum(self.sizes[name] for name in self.biased)
        self.bias = self._parameter(biased) if biased else None

    def _parameter(self, loaded: int, *shape: int) -> nn.Parameter:
        """Make a parameter [rows with padding, \\*shape], of which a checkpoint fills ``loaded`` rows."""
        rows = sum(self.sizes.values()) + self.padding
        value = nn.Parameter(torch.zeros(rows, *shape), requires_grad=False)
        # By the second, vLLM knows when all of it has been loaded again.
        set_weight_attrs(value, {"weight_loader": self._load, "weight_loader_numel": loaded * math.prod(shape)})
        return value

    def _load(self, param: nn.Parameter, loaded: torch.Tensor, part: str) -> None:
        self.part(param.data, part).copy_(self.shares[part].take(loaded))
        # Memory that is loaded into again, or was filled with dummy weights, has anything in the rows left out.
        param.data[param.shape[0] - self.padding :].zero_()
        if param.ndim == 1:
            for name in self.sizes.keys() - self.biased:
                self.part(param.data, name).zero_()

    def part(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Return the rows of ``weight`` or ``bias`` that belong to one projection."""
        pieces = tensor.split([*self.sizes.values(), self.padding])
        return pieces[list(self.sizes).index(name)]

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Map x [T, n] to a [T, share's heads * width] for every part. These are slices of one tensor."""
        if self.quant_method is None:
            out = nn.functional.linear(x, self.weight, self.bias)
        else:
            out = self.quant_method.apply(self, x, self.bias)
        pieces = out.split([*self.sizes.values(), self.padding], -1)
        return dict(zip(self.sizes, pieces))


class HeadNorm(nn.Module):
    """RMS norm over each head separately.

    Args:
        heads: the rank's share of heads.
        head_dim: d, the size of a head.
        eps: added to the mean square.
    """

    def __init__(self, heads: HeadShare, head_dim: int, eps: float) -> None:
        super().__init__()
        self.weight = heads.parameter(head_dim)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [T, count * d] to float32 [T, count, d]."""
        wide = x.reshape(x.shape[0], *self.weight.shape).float()
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()
