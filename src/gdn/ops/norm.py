"""RMSNorm, its gated form and the L2 norm of queries and keys, computed in float32 (float64 for float64 input)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn.ops.backend import backend_for

_LARGEST_ROW = 8192  # of the GPU kernel


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis. Source: Zhang and Sennrich 2019 (arXiv:1910.07467)."""
    if x.shape[-1] <= _LARGEST_ROW and backend_for(x) == "triton":
        from gdn.ops import triton_norm

        fused: Tensor = triton_norm.rms_norm(x.contiguous(), weight, eps)
        return fused
    wide = _widen(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)).to(x.dtype)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rms_norm(x) * silu(gate), x and gate of equal shape: the layer's output gate (arXiv:2412.06464, section 3.4)."""
    wide = _widen(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
    return (normed * F.silu(_widen(gate))).to(x.dtype)


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x * rsqrt(sum(x^2) + eps) over the last axis: finite, with finite gradients, at x = 0 (unlike x / norm(x))."""
    wide = _widen(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
