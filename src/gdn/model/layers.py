"""The standard pieces of a block: linear layer, norms, SwiGLU. Parameter names are the wire format and must not change."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdn.ops import gated_rms_norm, rms_norm
from gdn.ops.cpu import cpu_has_bf16_dots

_FEW_ROWS = 8  # up to so many, PyTorch's bf16 products without bf16 dots take less time than widening the weight does


class Linear(nn.Linear):
    """A bias-free linear layer computing in the dtype of its input: float32 weights serve bf16 activations without autocast.

    On CPUs without bf16 dot products many rows of bf16 are multiplied in float32, weight by weight: a seventh of the time
    (512 rows, 1024 x 2816, AVX2, 2 cores: 21 ms against 144), and the sums are float32 either way.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.numel() > _FEW_ROWS * x.shape[-1] and not _bf16_dots():
            return F.linear(x.float(), weight.float()).to(x.dtype)
        return F.linear(x, weight)


def joined(linears: Sequence[Linear]) -> Tensor:
    """Their weights as one matrix, without gradients: a view where they lie one behind another in one storage, else a copy."""
    found = adjacent(linears)
    return torch.cat([linear.weight.detach() for linear in linears]) if found is None else found


def adjacent(linears: Sequence[Linear]) -> Tensor | None:
    """As `joined`, None where that would be a copy, and while a graph is traced, which knows no addresses."""
    if torch.compiler.is_compiling():
        return None
    first = linears[0].weight
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for weight in (linear.weight for linear in linears):
        if weight.untyped_storage().data_ptr() != storage or weight.data_ptr() != end or not weight.is_contiguous():
            return None
        end += weight.nbytes
    rows = sum(len(linear.weight) for linear in linears)
    return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1))


def _bf16_dots() -> bool:
    return torch.compiler.is_compiling() or cpu_has_bf16_dots()  # what asks the processor would break a graph


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class GatedRMSNorm(RMSNorm):
    """RMSNorm over the last axis, times silu of a gate of the same shape."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return gated_rms_norm(x, gate, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)). Source: Shazeer 2020 (arXiv:2002.05202)."""

    def __init__(self, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, ffn_size)
        self.up_proj = Linear(hidden_size, ffn_size)
        self.down_proj = Linear(ffn_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out
