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

from gdn.ops import triton_linear as linear
from gdn.ops import triton_rows as rows
from gdn.ops.triton_linear import Tile
from gdn.ops.triton_rows import Residual, Sum, Window

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3}
FEW = (1, 3)
EPS = 1e-6
N = 70  # no whole tile
SMALL = Tile(64, 16, 64, 2, 4)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Every place is written: what was there is not a number."""
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def whole(more: Sum) -> Tensor:
    """In float64."""
    return more.parts.double().sum(0)


def residual(B: int, K: int, parts: int) -> tuple[Residual, Tensor]:
    """And its sum in float64."""
    x = normal(B, K)
    if not parts:
        return Residual(x), x.double()
    more = Sum(normal(parts, B, K), 3)
    return Residual(x, more), x.double() + whole(more)


@pytest.mark.parametrize("B", [1, 9])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_few_rows_times_a_weight(B: int, dtype: torch.dtype) -> None:
    x, weight = normal(B, 320).to(dtype), normal(N, 320).to(dtype)
    out, mixed = linear.few_linear(x, weight, 64, False), linear.few_linear(x, weight, 64, True)
    assert relative_error(whole(out), x.double() @ weight.double().T) <= BOUND[dtype]
    assert torch.equal(out.parts, mixed.parts) and len(out.parts) == 5 and (out.group, mixed.group) == (1, 2)


@pytest.mark.parametrize("B", [*FEW, 9])
@pytest.mark.parametrize("parts", [0, 4])
def test_rows_of_the_residual_normed(B: int, parts: int) -> None:
    (given, total), norm = residual(B, 192, parts), normal(192)
    h, x = rows.norm_rows(given, norm, EPS, torch.float32)
    assert relative_error(x, total) <= 1e-6 and relative_error(h, rms_norm(total, norm.double(), EPS)) <= 1e-6


def heads(B: int, dtype: torch.dtype, gated: bool) -> tuple[Tensor, Sum, Tensor, Tensor, Tensor]:
    """o, a projection in two parts whose gate begins at column 5, a norm, a weight, and the normed o in float64."""
    o, projection, norm = normal(B, 2, 64).to(dtype), Sum(normal(2, B, 140), 1), normal(64)
    weight = normal(N, 128).to(dtype)
    gate = whole(projection)[:, 5:133].view(B, 2, 64).to(dtype).double()
    o_, norm_ = o.double(), norm.double()
    return o, projection, norm, weight, gated_rms_norm(o_, gate, norm_, EPS) if gated else rms_norm(o_, norm_, EPS)


@pytest.mark.parametrize("B", FEW)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("gated", [True, False])
def test_few_rows_of_the_gated_norm_of_heads_times_a_weight(B: int, dtype: torch.dtype, gated: bool) -> None:
    o, projection, norm, weight, wanted = heads(B, dtype, gated)
    window = Window(normal(B, 3, 40).to(dtype), projection)
    moved = torch.cat([window.window[:, 1:], whole(projection)[:, None, :40].to(dtype)], dim=1)
    out = linear.gated_norm_linear(o, projection if gated else None, 5, norm, EPS, weight, window)
    assert relative_error(whole(out), wanted.flatten(1) @ weight.double().T) <= BOUND[dtype]
    assert relative_error(window.window, moved) <= BOUND[dtype] and torch.equal(window.window[:, :2], moved[:, :2])


@pytest.mark.parametrize("B", [1, 9])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("W", [1, 2, 4])
def test_rows_of_the_gated_norm_of_heads(B: int, gated: bool, W: int) -> None:
    o, projection, norm, _, wanted = heads(B, torch.float32, gated)
    window = Window(normal(B, W - 1, 130), projection)
    moved = torch.cat([window.window, projection.parts.sum(0)[:, None, :130]], dim=1)[:, 1:]
    h = rows.gated_norm_rows(o, projection if gated else None, 5, norm, EPS, window)
    assert relative_error(h, wanted.flatten(1)) <= 1e-6
    assert W == 1 or relative_error(window.window, moved) <= 1e-6


@pytest.mark.parametrize("B", FEW)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_few_rows_of_swiglu_times_a_weight(B: int, dtype: torch.dtype) -> None:
    gate_up, weight = Sum(normal(3, B, 2 * 320), 1), normal(N, 320).to(dtype)
    out, fed = linear.swiglu_linear(gate_up, weight), rows.swiglu_rows(gate_up, torch.float32)
    gate, up = whole(gate_up).chunk(2, dim=-1)
    assert out.group == 2 and len(out.parts) == 5 and relative_error(fed, F.silu(gate) * up) <= 1e-6
    assert relative_error(whole(out), (F.silu(gate) * up) @ weight.double().T) <= BOUND[dtype]


@pytest.mark.parametrize("B", [1, 20])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("tile", [None, SMALL], ids=str)
def test_more_rows_times_a_weight(B: int, dtype: torch.dtype, tile: Tile | None) -> None:
    x, weight = normal(B, 320).to(dtype), normal(N, 320).to(dtype)
    wanted = x.double() @ weight.double().T
    out, parts = empty(B, N, dtype=dtype), rows.sum_like(normal(B, N), 320, 64).parts
    linear.many_linear(x, weight, out, 64, tiles=tile)
    linear.many_linear(x, weight, parts.fill_(torch.nan), 64, tiles=tile)
    assert relative_error(out, wanted) <= BOUND[dtype] and len(parts) == 3
    columns = [slice(0, 128), slice(128, 256), slice(256, 320)]
    for part, own in zip(parts, columns):
        assert relative_error(part, x[:, own].double() @ weight[:, own].double().T) <= BOUND[dtype]


@pytest.mark.parametrize("B", [1, 20])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_more_rows_through_gate_and_up(B: int, dtype: torch.dtype) -> None:
    x, weight = normal(B, 128).to(dtype), normal(2 * 96, 128).to(dtype) / 8
    out = empty(B, 96, dtype=dtype)
    linear.many_linear(x, weight, out, 64, swiglu=True)
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=-1)
    assert relative_error(out, F.silu(gate) * up) <= BOUND[dtype]


def test_a_token_s_vectors_and_its_position() -> None:
    table, ids, position = normal(9, 96).to(torch.float16), torch.tensor([8, 0, 8], device=DEVICE), torch.tensor([4, 0, 7])
    position = position.to(DEVICE)
    x = rows.embed(ids, table, position)
    assert torch.equal(x, table[ids].float()) and position.tolist() == [5, 1, 8]


def test_sizes_of_segments_and_groups() -> None:
    assert [rows.segment(K) for K in (64, 192, 512, 1024, 2816, 2944)] == [64, 64, 256, 256, 256, 128]
    assert [rows.group(count) for count in (1, 4, 5, 8, 11)] == [1, 1, 2, 2, 3]
    with pytest.raises(ValueError, match="at most 4 rows"):
        linear.swiglu_linear(Sum(normal(1, 5, 128), 1), normal(N, 64))
    with pytest.raises(ValueError, match="whole segments and no empty group"):
        linear.many_linear(normal(5, 192), normal(N, 192), empty(4, 5, N), 64)


def test_the_tiles_fit_the_shared_memory() -> None:
    for count in (1, 16, 17, 64, 65, 1000):
        for hopper, most in ((True, 227), (False, 99)):
            tile = linear.tile_for(count, hopper)
            assert (tile.weight_rows + tile.rows) * tile.columns * 2 * tile.stages <= most * 1024
            assert tile.rows >= min(count, 128)
