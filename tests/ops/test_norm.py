"""The norms against their formulas, values and gradients; zero rows; rounding only at the end."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops_testing import assert_close, relative_error
from torch import Tensor

from gdn.ops import gated_rms_norm, l2_norm, rms_norm

EPS = 1e-5


def formula_rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / ((x**2).sum(-1, keepdim=True) / x.shape[-1] + EPS) ** 0.5 * weight


FORMULAS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[str, ...]]] = {
    "rms_norm": (lambda x, weight: rms_norm(x, weight, EPS), formula_rms, ("x", "weight")),
    "gated_rms_norm": (
        lambda x, gate, weight: gated_rms_norm(x, gate, weight, EPS),
        lambda x, gate, weight: formula_rms(x, weight) * gate / (1 + (-gate).exp()),
        ("x", "gate", "weight"),
    ),
    "l2_norm": (l2_norm, lambda x: x / ((x**2).sum(-1, keepdim=True) + 1e-6) ** 0.5, ("x",)),
}


def norm_inputs(names: tuple[str, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": (3, 5, 8), "gate": (3, 5, 8), "weight": (8,)}
    tensors = {name: torch.randn(sizes[name], generator=generator).double() for name in names}
    tensors["x"][0] *= 1e-3  # where eps counts
    return tensors


def with_gradients(function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    y = function(**leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return {"y": y} | {f"d_{name}": d for name, d in zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy))}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", FORMULAS)
def test_matches_formula(name: str, dtype: torch.dtype) -> None:
    function, formula, names = FORMULAS[name]
    inputs = norm_inputs(names)
    got = with_gradients(function, {n: x.to(dtype) for n, x in inputs.items()})
    assert all(x.dtype == dtype for x in got.values())
    assert_close(got, with_gradients(formula, inputs), dtype)


@pytest.mark.parametrize("name", FORMULAS)
def test_zero_rows_have_finite_gradients(name: str) -> None:
    function, formula, names = FORMULAS[name]
    inputs = norm_inputs(names)
    inputs["x"][1] = 0
    got = with_gradients(function, inputs)
    assert got["y"][1].abs().max() == 0 and got["d_x"][1].abs().min() > 0
    assert_close(got, with_gradients(formula, inputs), torch.float64)


@pytest.mark.parametrize("name", FORMULAS)
def test_bfloat16_is_rounded_once(name: str) -> None:
    """Within half a unit in the last place of the exact result of the rounded inputs: nothing between is in bfloat16."""
    function, formula, names = FORMULAS[name]
    inputs = {n: x.bfloat16() for n, x in norm_inputs(names).items()}
    got, wanted = function(**inputs), formula(**{n: x.double() for n, x in inputs.items()})
    assert got.dtype == torch.bfloat16
    assert ((got.double() - wanted).abs() <= 1.001 * 2**-8 * wanted.abs()).all()


def test_weight_may_be_float32_beside_bfloat16() -> None:
    x, weight = norm_inputs(("x", "weight")).values()
    y = rms_norm(x.bfloat16(), weight.float(), EPS)
    assert y.dtype == torch.bfloat16 and relative_error(y, formula_rms(x.bfloat16().double(), weight)) < 2**-8


def test_l2_norm_takes_its_eps() -> None:
    x: Any = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    assert l2_norm(x, eps=11.0)[0].tolist() == pytest.approx([0.5, 4 / 6])
