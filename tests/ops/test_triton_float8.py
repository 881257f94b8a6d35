"""Float8 rows, their products and a block whose FFN computes in them: in the interpreter, or on a GPU if there is one.

Casts beside what they round; the block beside the same in the dtype of everything else, within what three binary digits allow.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from ops_testing import relative_error
from test_triton_block import CASES, DEVICE, GPU, problem, small_programs
from torch import Tensor, nn

from gdn.errors import BackendError
from gdn.model.lm import Block
from gdn.ops.backend import FLOAT8_CAPABILITIES
from gdn.ops.norm import rms_norm

pytest.importorskip("triton")

from gdn.ops import backend, triton_float8, triton_norm, triton_swiglu
from gdn.ops.triton_float8 import Float8Rows, cast_rows, product

__all__ = ["small_programs"]  # a fixture
E4M3 = torch.float8_e4m3fn
DTYPE = torch.bfloat16 if GPU else torch.float32  # of what is not float8: a product by rows gives bfloat16 alone there
STEP = 2.0**-3  # between two neighbours, of the smaller
ROUNDING = 0.04  # relative 2-norm of rounding to the nearest: a normal draw's is 0.027
pytestmark = pytest.mark.skipif(GPU and torch.cuda.get_device_capability() not in FLOAT8_CAPABILITIES, reason="no float8")


@pytest.fixture(autouse=True)
def nearest(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton 3.6's interpreter rounds up without carrying into the exponent: PyTorch's cast in its place."""
    if not GPU:
        from triton.runtime import interpreter

        convert = interpreter._convert_float

        def converted(data: Any, source: Any, target: Any, mode: Any) -> Any:
            if str(target) != "fp8e4nv":
                return convert(data, source, target, mode)
            flat = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
            return flat.to(E4M3).view(torch.uint8).numpy().reshape(data.shape)

        monkeypatch.setattr(interpreter, "_convert_float", converted)
    yield


def wide(rows: Float8Rows) -> Tensor:
    return rows.values.double() * rows.scales.double().view(*rows.values.shape[:-1], 1)


def check_rows(got: Float8Rows, exact: Tensor) -> None:
    """Each element is the nearest float8 by its row's scale, or as near as float32 can tell; the largest of a row is 448."""
    assert got.values.dtype == E4M3 and got.values.shape == exact.shape and got.scales.dtype == torch.float32
    largest = exact.double().flatten(0, -2).abs().amax(-1)
    torch.testing.assert_close(got.scales.double(), largest / 448, rtol=1e-5, atol=1e-30)
    largest = largest.view(*exact.shape[:-1], 1)
    error, smallest = (wide(got) - exact.double()).abs(), largest / 448 * 2.0**-9
    assert (error <= torch.maximum(STEP / 2 * exact.double().abs(), smallest / 2) * 1.001 + 1e-6 * largest).all()
    assert (got.values.float().flatten(0, -2).abs().amax(-1) == 448).all()


@pytest.mark.parametrize("shape", [(3, 5, 48), (2, 1024), (4, 2816), (1, 16)], ids=str)
def test_rows_are_rounded_to_the_nearest(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator) * torch.logspace(-9, 3, shape[-2])[:, None]  # rows of every size
    x = x.to(DEVICE, DTYPE)
    check_rows(cast_rows(x), x)


def test_zeros_stay_and_what_is_not_finite_shows() -> None:
    x = torch.zeros(4, 32, device=DEVICE, dtype=DTYPE)
    x[1, 3], x[2, 3], x[3, 3], x[3, 4] = torch.nan, torch.inf, 1e-38, -1e-38
    got = wide(cast_rows(x))
    assert (got[0] == 0).all() and got[1].isnan().any() and got[2].isnan().any() and got[3].isfinite().all()


def test_norm_and_swiglu_write_rows() -> None:
    """What they write in float8 is what they write without, rounded once more at most."""
    generator = torch.Generator().manual_seed(0)
    x, branch, w = (torch.randn(*shape, generator=generator).to(DEVICE, DTYPE) for shape in ((3, 4, 48), (3, 4, 48), (48,)))
    normed, total = triton_norm.norm_forward_float8(x, branch, w, 1e-6)
    assert torch.equal(total, x + branch)
    check_rows(normed, rms_norm(total.double(), w.double(), 1e-6))
    joined, d = (torch.randn(3, 4, size, generator=generator).to(DEVICE, DTYPE) for size in (2 * 80, 80))
    leaf = joined.double().requires_grad_()
    gate, up = leaf.chunk(2, -1)
    out = nn.functional.silu(gate) * up
    check_rows(triton_swiglu.swiglu_forward_float8(joined), out.detach())
    again, plain = d.clone(), d.clone()
    d_joined, narrow = triton_swiglu.swiglu_backward_float8(again, joined)
    check_rows(narrow, torch.autograd.grad(out, leaf, d.double())[0])
    bound = 4e-3 if GPU else 0.0  # where one program has a row, the compiler may round a sum and product once or twice
    assert relative_error(d_joined, triton_swiglu.swiglu_backward(plain, joined)) <= bound
    assert relative_error(again, plain) <= bound


def test_product_of_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (cast_rows(torch.randn(*s, generator=generator).to(DEVICE, DTYPE)) for s in ((2, 24, 64), (48, 64)))
    got = product(a, b, DTYPE)
    assert got.dtype == DTYPE and relative_error(got, wide(a) @ wide(b).T) < (5e-3 if GPU else 1e-6)
    empty = product(cast_rows(torch.empty(0, 7, 64, device=DEVICE, dtype=DTYPE)), b, DTYPE)
    assert empty.shape == (0, 7, 48)


NAMES = ["plain", "packed", *(["hopper"] if GPU else [])]


def results(block: Block, x: Tensor, d: Tensor, cu_seqlens: Tensor | None) -> dict[str, Tensor]:
    x = x.to(DEVICE, DTYPE).requires_grad_()
    y = block(x, None, cu_seqlens)
    found = torch.autograd.grad(y, [x, *block.parameters()], d.to(DEVICE, DTYPE))
    assert all(g.dtype == p.dtype for g, p in zip(found, [x, *block.parameters()]))
    return {"y": y.detach()} | dict(zip(["x", *dict(block.named_parameters())], found))


def both(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Block, list[dict[str, Tensor]], tuple[Any, ...]]:
    """A block, its results with the FFN in DTYPE and in float8, and what it was given."""
    monkeypatch.setattr(Block, "_fused_backend", lambda *_: "triton")
    monkeypatch.setitem(CASES, name, CASES[name] | {"intermediate_size": 80})
    block, *given = problem(name, DTYPE)
    for weight in block.mlp.parameters():  # so that the residual in bfloat16 does not round the FFN's part away
        nn.init.normal_(weight, std=0.3)
    block.to(DEVICE)
    found = []
    for block.float8_ffn in (False, True):
        found.append(results(block, *given))
    return block, found, tuple(given)


@pytest.mark.parametrize("name", NAMES)
def test_block_within_what_float8_rounds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output's error of the FFN's part alone, which the residual would hide."""
    block, (plain, narrow), (x, d, cu_seqlens) = both(name, monkeypatch)
    nn.init.zeros_(block.mlp.down_proj.weight)
    past = results(block, x, d, cu_seqlens)["y"]
    part = relative_error(narrow["y"] - past, plain["y"] - past)
    assert 1e-3 < part < 3 * ROUNDING, part
    errors = {key: relative_error(narrow[key], plain[key]) for key in plain}
    # Sums over all tokens that may come out near 0, with none of their digits.
    assert max(e for key, e in errors.items() if key not in ("attn.A_log", "attn.dt_bias")) < 4 * ROUNDING, errors
    assert errors["mlp.gate_proj.weight"] > 1e-3 and errors["x"] > 1e-4, errors


def test_block_has_the_same_bits_twice_and_where_it_computes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    block, (_, wanted), given = both("plain", monkeypatch)
    for block.recompute in ("nothing", "keys", "blocks"):
        got = results(block, *given)
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_rows_of_a_batch_have_the_bits_of_each_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    joined, d = (torch.randn(6, size, generator=generator).to(DEVICE, DTYPE) for size in (96, 48))
    w = torch.rand(48, generator=generator).to(DEVICE)

    def every(rows: slice) -> list[Tensor]:
        narrow = [cast_rows(d[rows]), triton_norm.norm_forward_float8(d[rows], d[rows], w, 1e-6)[0]]
        narrow += [triton_swiglu.swiglu_forward_float8(joined[rows])]
        narrow += [triton_swiglu.swiglu_backward_float8(d[rows].clone(), joined[rows])[1]]
        return [part.view(torch.uint8) if part.dtype == E4M3 else part for each in narrow for part in each]

    whole = every(slice(0, 6))
    for i in range(6):
        assert all(torch.equal(alone, x[i : i + 1]) for alone, x in zip(every(slice(i, i + 1)), whole))


def test_block_in_float8_compiles_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    block, (_, wanted), given = both("plain", monkeypatch)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    got = {key.removeprefix("_orig_mod."): value for key, value in results(compiled, *given).items()}  # type: ignore[arg-type]
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_a_block_that_cannot_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where modules compute, the switch would be ignored."""
    block, x, _, _ = problem("plain", torch.float32)
    block.float8_ffn = True
    monkeypatch.setattr("gdn.model.lm.choose_backend", lambda *_: "triton")
    x = x.bfloat16().requires_grad_()
    assert block._fused_backend(x, None, None) == "triton"
    handle = block.attn.q_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(BackendError, match=r"train\.float8_ffn.*hooks"):
        block._fused_backend(x, None, None)
    with torch.no_grad():
        assert block._fused_backend(x, None, None) == "torch"  # evaluations look inside, in bfloat16
    handle.remove()
    with pytest.raises(BackendError, match=r"torch\.float32"):
        block._fused_backend(x.float(), None, None)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    assert "on cpu" in str(backend.float8_refusal(torch.device("cpu"), 64, 64, (1024,)))
    monkeypatch.setattr(backend, "triton_refusal", lambda *_: None)
    for capability in ((8, 6), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert "{}.{} does not".format(*capability) in str(backend.float8_refusal(cuda, 64, 64, (1024,)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    assert backend.float8_refusal(cuda, 64, 64, (1024, 2816)) is None
    assert "2820" in str(backend.float8_refusal(cuda, 64, 64, (1024, 2820)))


PUBLISHED = pytest.mark.parametrize(("N", "K"), [(5632, 1024), (1024, 2816), (2816, 1024), (1024, 5632)])


def published(N: int, K: int) -> tuple[Tensor, Tensor]:
    if not GPU:
        pytest.skip("no GPU")
    generator = torch.Generator("cuda").manual_seed(0)
    a, b = (torch.randn(rows, K, generator=generator, device="cuda").bfloat16() for rows in (32768, N))
    return a, b


@pytest.mark.gpu
@PUBLISHED
def test_products_of_the_published_size(N: int, K: int) -> None:
    """Beside float64's of the same float8, and of what was cast; the same bits twice."""
    a, b = published(N, K)
    left, right = cast_rows(a), cast_rows(b)
    got = product(left, right, torch.bfloat16)
    exact = wide(Float8Rows(left.values[:256], left.scales[:256])) @ wide(right).T
    assert relative_error(got[:256], exact) < 5e-3
    assert relative_error(got[:256], a[:256].double() @ b.double().T) < 2 * ROUNDING
    assert torch.equal(product(left, right, torch.bfloat16), got)


@pytest.mark.gpu
@PUBLISHED
def test_a_row_of_a_product_among_any_number(N: int, K: int) -> None:
    a, b = published(N, K)
    right = cast_rows(b)
    whole = product(cast_rows(a), right, torch.bfloat16)
    for rows in (2048, 8192):
        assert torch.equal(product(cast_rows(a[:rows]), right, torch.bfloat16), whole[:rows]), rows


def test_warps_grow_with_the_row() -> None:
    assert [triton_float8.warps(D) for D in (48, 1024, 2816, 5632)] == [2, 2, 8, 16]
