"""The kernels of decoding's products beside the same in PyTorch: in the interpreter, or on a GPU."""

import os

import pytest
import torch
import torch.nn.functional as F
from ops_testing import relative_error
from torch import Tensor

from gdn.ops import gated_rms_norm, rms_norm

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from gdn.ops.triton_rows import FUSED_ROWS, Residual, gated_norm_linear, norm_linear, segments, swiglu_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3}
BATCHES = (1, 3, FUSED_ROWS + 1, 130)  # normed by each program, and beforehand; more than a program's rows
EPS = 1e-6


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Every place is written: what was there is not a number."""
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("B", BATCHES)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("S", [0, 3])
def test_the_residual_normed_times_a_weight(B: int, dtype: torch.dtype, S: int) -> None:
    x, weight, norm = normal(B, 192), normal(70, 192).to(dtype), normal(192)
    parts = normal(S, B, 192) if S else None
    out, x_out = empty(B, 70, dtype=dtype), empty(B, 192)
    norm_linear(Residual(x, parts), norm, EPS, weight, out, x_out)
    total = x.double() if parts is None else x.double() + parts.double().sum(0)
    assert relative_error(x_out, total) <= 1e-6
    assert relative_error(out, rms_norm(total, norm.double(), EPS) @ weight.double().T) <= BOUND[dtype]


@pytest.mark.parametrize("B", BATCHES)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("gated", [True, False])
def test_the_gated_norm_of_heads_times_a_weight(B: int, dtype: torch.dtype, gated: bool) -> None:
    o, beside, norm = normal(B, 2, 64).to(dtype), normal(B, 140).to(dtype), normal(64)
    weight = normal(70, 128).to(dtype)
    gate = beside[:, 5:133] if gated else None  # a slice of a projection
    parts = empty(2, B, 70)
    gated_norm_linear(o, gate, norm, EPS, weight, parts)
    o = o.double()
    wanted = rms_norm(o, norm.double(), EPS)
    if gate is not None:
        wanted = gated_rms_norm(o, gate.double().view(B, 2, 64), norm.double(), EPS)
    assert relative_error(parts.double().sum(0), wanted.flatten(1) @ weight.double().T) <= BOUND[dtype]


@pytest.mark.parametrize("B", BATCHES)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_swiglu_times_a_weight(B: int, dtype: torch.dtype) -> None:
    gate_up, weight, parts = normal(B, 2 * 192).to(dtype), normal(70, 192).to(dtype), empty(3, B, 70)
    swiglu_linear(gate_up, weight, parts)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert relative_error(parts.double().sum(0), (F.silu(gate) * up) @ weight.double().T) <= BOUND[dtype]


def test_segments_are_whole_and_no_shorter_than_512() -> None:
    assert [segments(F) for F in (192, 512, 1024, 2816, 3072, 5632)] == [1, 1, 2, 4, 6, 11]
    with pytest.raises(ValueError, match="multiple of 128 columns"):
        swiglu_linear(normal(1, 384), normal(70, 192), empty(2, 1, 70))
