"""Products of rows with a weight on a CPU, float32 in and out, at the speed of reading the weight.

PyTorch's own products of a few rows read weights at half of the memory's speed (docs/log.md). Two libraries within PyTorch do
better: oneDNN on the float32 weight itself, and FBGEMM on a copy of a bf16 weight in float16, which is float32's product of the
same numbers. Which one serves follows from dtype and processor, never from a timing.
"""

import platform
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

Product = Callable[[Tensor], Tensor]  # x [..., K] float32, contiguous -> [..., N] float32

_FEW_ROWS = 64  # up to so many oneDNN is the faster one in float32: 18.6 ms against 27.6; 512 rows take 117 against 109
_FLOAT16_MAX = 65504.0


def product_with(weight: Tensor) -> Product:
    """The product with weight [N, K] on a CPU, float32 or bf16. A bf16 weight may be copied: it must not change afterwards."""
    if weight.dtype == torch.float32:
        return _in_float32(weight)
    return _packed(weight) if packs(weight) else _widened(weight)


def has_fbgemm() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines


def packs(weight: Tensor) -> bool:
    """Whether FBGEMM is there and float16 holds the bf16 weight: exactly, or to 3e-8 where it is below 6e-5."""
    return has_fbgemm() and float(weight.abs().max()) <= _FLOAT16_MAX


def _in_float32(weight: Tensor) -> Product:
    # The operator is PyTorch's own compiler's and may go; on other processors PyTorch's product was not found slow.
    if platform.machine() not in ("x86_64", "AMD64") or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return lambda x: F.linear(x, weight)
    multiply, width = torch.ops.mkldnn._linear_pointwise.default, weight.shape[1]

    def product(x: Tensor) -> Tensor:
        if x.numel() > _FEW_ROWS * width:
            return F.linear(x, weight)
        out: Tensor = multiply(x, weight, None, "none", [], "")
        return out

    return product


def _packed(weight: Tensor) -> Product:
    packed = torch.ops.quantized.linear_prepack_fp16(weight.detach().float(), None)
    return partial(_fbgemm(), packed)


@cache
def _fbgemm() -> Callable[[object, Tensor], Tensor]:
    """FBGEMM's product, the weight first, called by a graph of PyTorch's own.

    Called from Python the operator throws a C++ exception within, and catches it, to tell whether the packed weight is a
    tracer's stand-in: 10 us in all where the graph takes 5, and more where the caches hold weights (docs/log.md).
    """
    if not hasattr(torch._C, "_create_function_from_graph"):
        return lambda packed, x: torch.ops.quantized.linear_dynamic_fp16.default(x, packed)
    graph = """graph(%packed : __torch__.torch.classes.quantized.LinearPackedParamsBase, %x : Tensor):
        %out : Tensor = quantized::linear_dynamic_fp16(%x, %packed)
        return (%out)"""
    return torch._C._create_function_from_graph("product", torch._C.parse_ir(graph))


def _widened(weight: Tensor) -> Product:
    """One row is rounded to the weight's dtype, as is its product; for more the weight is widened."""

    def product(x: Tensor) -> Tensor:
        if x.numel() == weight.shape[1]:
            return F.linear(x.to(weight.dtype), weight).float()
        return F.linear(x, weight.float())

    return product
