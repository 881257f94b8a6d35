"""The kernels of decoding's products beside the same in PyTorch: in the interpreter, or on a GPU."""

import os
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ops_testing import relative_error
from torch import Tensor

from gdn.ops import rms_norm, short_conv_step

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from gdn.ops import triton_chain
from gdn.ops import triton_linear as linear
from gdn.ops.triton_linear import Tile
from gdn.ops.triton_rows import Normed, Residual, embed, operand_dtype

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DESCRIBE = linear.TensorDescriptor.from_tensor
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3}
EPS = 1e-3
FEW, STEPS = Tile(16, 16, 0, 1, 4), Tile(16, 32, 64, 2, 4)
COPIED, HALVES = STEPS._replace(copied=True), STEPS._replace(columns=32)  # halves of a segment
TILES = {"table": None, "few": FEW, "steps": STEPS, "copied": COPIED, "halves": HALVES._replace(copied=True)}
ALL = TILES | {f"{name}, split": tile._replace(split=True) for name, tile in TILES.items() if tile}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


def normed(B: int, K: int, dtype: torch.dtype, heads: int = 1, size: float = 3.0) -> tuple[Normed, Tensor]:
    """Rows whose norm is yet to be done, in four parts a head, and those normed in float64."""
    x, weight = size * normal(B, heads, K // heads), normal(K // heads)
    squares = x.square().unflatten(2, (-1, K // heads // 4)).sum(3)
    h = (x * weight).flatten(1).to(torch.float32 if dtype == torch.float16 else dtype)
    return Normed(h, squares), rms_norm(x.double(), weight.double(), EPS).flatten(1)


def residual(B: int, N: int, dtype: torch.dtype) -> Residual:
    """Every place is written: what was there is not a number."""
    h = torch.full((B, N), torch.nan, dtype=operand_dtype(torch.empty(0, dtype=dtype)), device=DEVICE)
    squares, parts = torch.full((B, 1, N // 16), torch.nan), torch.full((4, B, N), torch.nan)
    arrived = torch.zeros(B, N // 16, dtype=torch.int32, device=DEVICE)
    return Residual(normal(B, N), Normed(h, squares.to(DEVICE)), parts.to(DEVICE), arrived)


def check_residual(given: Residual, before: Tensor, added: Tensor, norm: Tensor, bound: float) -> None:
    total = before.double() + added
    assert relative_error(given.x, total) <= bound and not given.arrived.any()
    assert relative_error(given.normed.h, total * norm.double()) <= bound
    assert relative_error(given.normed.squares[:, 0], total.square().unflatten(1, (-1, 16)).sum(2)) <= 2 * bound


@pytest.mark.parametrize("B", [1, 20])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("tile", ALL.values(), ids=ALL)
@pytest.mark.parametrize("heads", [1, 3, 6])
def test_heads_normed_and_added(B: int, dtype: torch.dtype, tile: Tile | None, heads: int) -> None:
    given, wanted = normed(B, 64 * heads, dtype, heads)
    weight, norm, to = normal(80, 64 * heads).to(dtype), normal(80), residual(B, 80, dtype)
    before = to.x.clone()
    linear.add_output(to, given, weight, EPS, norm, tile)
    check_residual(to, before, wanted @ weight.double().T, norm, BOUND[dtype])


@pytest.mark.parametrize("B", [1, 20])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("tile", ALL.values(), ids=ALL)
def test_down_and_added(B: int, dtype: torch.dtype, tile: Tile | None) -> None:
    fed, weight, norm, to = normal(B, 320).to(dtype), normal(80, 320).to(dtype), normal(80), residual(B, 80, dtype)
    before = to.x.clone()
    linear.add_down(to, fed, weight, norm, tile)
    check_residual(to, before, fed.double() @ weight.double().T, norm, BOUND[dtype])


@pytest.mark.parametrize("B", [1, 20])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_normed_rows_fed(B: int, dtype: torch.dtype, tile: Tile | None) -> None:
    (given, wanted), weight = normed(B, 320, dtype), normal(2 * 88, 320).to(dtype) / 8
    gate, up = (wanted @ weight.double().T).chunk(2, dim=-1)
    assert relative_error(linear.feed(given, weight, EPS, tile), F.silu(gate) * up) <= BOUND[dtype]


@pytest.mark.parametrize("B", [1, 20])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("tile", [None, STEPS, COPIED], ids=str)
def test_logits(B: int, dtype: torch.dtype, tile: Tile | None) -> None:
    (given, wanted), weight = normed(B, 192, dtype), normal(70, 192).to(dtype)
    assert relative_error(linear.logits(given, weight, EPS, tile), wanted @ weight.double().T) <= BOUND[dtype]


@pytest.mark.parametrize("B", [1, 20])
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize(("W", "bias"), [(1, False), (2, True), (4, False)])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_a_projection_and_its_convolution(B: int, tile: Tile | None, W: int, bias: bool, dtype: torch.dtype) -> None:
    """Of the first 40 of 70 columns."""
    (given, wanted), weight = normed(B, 128, dtype), normal(70, 128).to(dtype)
    window, conv, offset = normal(B, W - 1, 40).to(dtype), normal(W, 40).to(dtype), normal(40) if bias else None
    newest = wanted @ weight.double().T
    moved = torch.cat([window, newest[:, None, :40].to(dtype)], dim=1)[:, 1:]
    inputs = torch.cat([window.double(), newest[:, None, :40]], dim=1)
    y = (inputs * conv.double()).sum(1) + (0 if offset is None else offset.double())
    given_window = window.double()
    assert relative_error(y := F.silu(y), short_conv_step(newest[:, :40], conv.double().T, offset, given_window)) < 1e-6
    got = linear.project(given, weight, EPS, window, conv, offset, tile)
    assert relative_error(got[:, :40], y) <= BOUND[dtype] and relative_error(got[:, 40:], newest[:, 40:]) <= BOUND[dtype]
    assert W == 1 or relative_error(window, moved) <= BOUND[dtype]
    assert W < 3 or torch.equal(window[:, :-1], moved[:, :-1])


def test_blocks_are_asked_for_where_they_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    monkeypatch.setattr(linear.TensorDescriptor, "from_tensor", lambda x, block: asked.append(block) or DESCRIBE(x, block))
    (given, _), weight = normed(20, 128, torch.float16), normal(64, 128).half()
    for tile in (STEPS, COPIED):
        linear.logits(given, weight, EPS, tile)
        linear.feed(given, weight, EPS, tile)
    on_old_gpus = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] < 9
    assert asked == ([] if on_old_gpus else [[16, 64], [1, 32, 64], [16, 64], [2, 16, 64]])


def test_who_begins_early_at_how_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 64, the states' kernel up to 16; nothing before Hopper."""
    monkeypatch.setattr(triton_chain, "hopper", lambda device: device.type == "cuda")
    cuda, early = torch.device("cuda"), {"CHAINED": True, "launch_pdl": True}
    for rows, some, states in ((1, True, True), (16, True, True), (17, True, False), (64, True, False), (65, False, False)):
        assert triton_chain.link(cuda, rows=rows) == (early if some else {"CHAINED": False})
        assert triton_chain.link(cuda, rows=rows, states=True) == (early if states else {"CHAINED": False})
        assert triton_chain.link(torch.device("cpu"), rows=rows) == {"CHAINED": False}
    assert triton_chain.link(cuda, start=True) == {"CHAINED": True}


def test_rows_that_float16_cannot_hold() -> None:
    """Before they are scaled, that is: the norm's output is small."""
    (given, wanted), weight = normed(2, 128, torch.float16, size=1e6), normal(70, 128).half()
    assert given.h.abs().max() > 65504
    assert relative_error(linear.logits(given, weight, EPS), wanted @ weight.double().T) <= 2e-3


def in_order(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
    """A product summed one by one from the accumulator on, as the tensor cores do by 16: NumPy's order hangs on the shape."""
    total = d.data.copy()
    for k in range(a.data.shape[-1]):
        total += (a.data[..., :, k, None].astype(total.dtype) * b.data[..., None, k, :]).astype(total.dtype)
    return type(d)(total, d.dtype.scalar)


@pytest.fixture
def ordered(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        from triton.runtime.interpreter import InterpreterBuilder

        monkeypatch.setattr(InterpreterBuilder, "create_dot", in_order)


@pytest.mark.usefixtures("ordered")
def test_no_bits_hang_on_the_tile() -> None:
    """Each product's, at each kind of tile; of heads also one alone."""
    dtype, wide = torch.float16 if DEVICE == "cuda" else torch.float32, Tile(64, 64, 64, 2, 4)
    found: dict[str, list[Tensor]] = {"heads": [], "head alone": [], "down": [], "ffn": [], "logits": [], "projections": []}
    tiles = (FEW, STEPS, HALVES, wide, COPIED, HALVES._replace(copied=True), wide._replace(copied=True))
    for tile in (*tiles, *(tile._replace(split=True) for tile in tiles)):
        (rows, _), (heads, _) = normed(20, 320, dtype), normed(20, 384, dtype, 6)
        to, then, alone = (residual(20, 80, dtype) for _ in range(3))
        linear.add_output(alone, normed(20, 64, dtype)[0], normal(80, 64).to(dtype), EPS, normal(80), tile)
        linear.add_output(to, heads, normal(80, 384).to(dtype), EPS, normal(80), tile)
        linear.add_down(then, normal(20, 320).to(dtype), normal(80, 320).to(dtype), normal(80), tile)
        for name, given in (("heads", to), ("head alone", alone), ("down", then)):
            found[name].append(torch.cat([given.x, given.normed.h, given.normed.squares[:, 0]], 1))
        if not tile.split:
            found["ffn"].append(linear.feed(rows, normal(192, 320).to(dtype), EPS, tile))
            found["logits"].append(linear.logits(rows, normal(80, 320).to(dtype), EPS, tile if tile.columns else STEPS))
            window, conv = normal(20, 3, 40).to(dtype), normal(4, 40).to(dtype)
            found["projections"].append(linear.project(rows, normal(80, 320).to(dtype), EPS, window, conv, None, tile))
    for name, results in found.items():
        assert all(torch.equal(result, results[0]) for result in results), name


@pytest.mark.usefixtures("ordered")
def test_another_order_of_sums_has_other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above."""
    first, other = residual(20, 80, torch.float32), residual(20, 80, torch.float32)
    given = (normal(20, 320), normal(80, 320), normal(80))
    linear.add_down(first, *given, STEPS)
    monkeypatch.setattr(linear, "group", lambda segments: segments)
    linear.add_down(other, *given, STEPS)
    assert not torch.equal(first.x, other.x) and relative_error(first.x, other.x) < 1e-6


def test_a_token_s_vectors_and_its_position() -> None:
    table, ids, position = normal(9, 96).to(torch.float16), torch.tensor([8, 0, 8], device=DEVICE), torch.tensor([4, 0, 7])
    position, norm = position.to(DEVICE), normal(96)
    given = embed(ids, table, position, norm)
    assert torch.equal(given.x, table[ids].float()) and position.tolist() == [5, 1, 8]
    assert torch.equal(given.normed.h, table[ids].float() * norm) and not given.arrived.any()
    assert relative_error(given.normed.squares[:, 0], table[ids].double().square().unflatten(1, (-1, 16)).sum(2)) <= 1e-6
    with pytest.raises(ValueError, match="3 ids of 96 columns at 1 positions; expected as many"):  # it would write beyond them
        embed(ids, table, position[:1], norm)


def test_sizes_of_segments_and_groups() -> None:
    assert [linear.segment(K) for K in (64, 192, 512, 1024, 2816, 2944)] == [64, 64, 256, 256, 256, 128]
    assert [linear.group(count) for count in (1, 4, 5, 8, 11)] == [1, 1, 2, 2, 3]
    for given, weight in (
        (normal(2, 128), normal(80, 256)[:, ::2]),
        (normal(2, 100), normal(80, 100)),
        (normal(2, 64), normal(80, 128)),
    ):
        with pytest.raises(ValueError, match="expected whole ones"):
            linear.add_down(residual(2, 80, torch.float32), given, weight, normal(80), STEPS)
    with pytest.raises(ValueError, match=r"a residual stream \(2, 96\) for \(2, 80\)"):
        linear.add_down(residual(2, 96, torch.float32), normal(2, 128), normal(80, 128), normal(80))
    with pytest.raises(ValueError, match="the window has strides"):
        linear.project(normed(1, 64, torch.float32)[0], normal(70, 64), EPS, normal(1, 3, 80)[..., ::2], normal(4, 40), None)


@pytest.mark.parametrize("product", linear.TILES)
def test_tiles_by_rows_and_what_of_them_fits(product: str) -> None:
    """That a tile fits where it is said to, tests/ops/compile_kernels.py asserts of what the compiler took."""
    for count, most in ((1, 16), (16, 16), (33, 64), (64, 64), (1000, 256)):
        assert linear.tile_for(product, count, 4, 256, 2, 2, 227 * 1024) == linear.TILES[product][most]
    for count in (16, 64, 256):
        for segments, size, itemsize, given in ((4, 256, 2, 4), (11, 256, 4, 4), (6, 512, 2, 4)):
            tile = linear.tile_for(product, count, segments, size, itemsize, given, 99 * 1024)
            assert tile.bytes(segments, size, itemsize, given) <= 99 * 1024
    assert np.all(np.diff(list(linear.TILES[product])) > 0)
