"""The gates against their closed forms, and that they are computed in float32 whatever the activations are."""

import pytest
import torch
from ops_testing import TOLERANCE, relative_error

from gdn.ops import beta_gate, decay_gate


def gate_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = 4 * torch.randn(2, 50, 3, generator=generator, dtype=torch.float64)
    A_log, dt_bias = torch.rand(3, generator=generator).double() * 2.7, torch.randn(3, generator=generator).double() - 3
    return a, A_log, dt_bias


def test_decay_gate_closed_form_and_derivatives() -> None:
    a, A_log, dt_bias = (x.requires_grad_() for x in gate_inputs())
    g = decay_gate(a, A_log, dt_bias)
    dt = (1 + (a + dt_bias).exp()).log()
    assert g.dtype == torch.float64 and g.max() < 0
    assert relative_error(g, -A_log.exp() * dt) <= TOLERANCE[torch.float64]
    da, dA_log, d_bias = torch.autograd.grad(g.sum(), [a, A_log, dt_bias])
    slope = -A_log.exp() * (a + dt_bias).sigmoid()
    for got, wanted in ((da, slope), (dA_log, g.sum((0, 1))), (d_bias, slope.sum((0, 1)))):
        assert relative_error(got, wanted) <= TOLERANCE[torch.float64]


def test_decay_gate_is_float32_from_bfloat16() -> None:
    a, A_log, dt_bias = gate_inputs()
    a = a.bfloat16()
    g = decay_gate(a, A_log.float(), dt_bias.float())
    assert g.dtype == torch.float32
    assert relative_error(g, decay_gate(a.double(), A_log, dt_bias)) <= TOLERANCE[torch.float32]


def test_decay_gate_at_the_ends() -> None:
    """Large activations: the decay is linear in them, not infinite; small ones: it vanishes, and is never positive."""
    one = torch.ones(1)
    assert decay_gate(torch.tensor([500.0]), 0 * one, 0 * one).item() == -500
    assert -1e-30 < decay_gate(torch.tensor([-100.0]), one, one).item() <= 0


@pytest.mark.parametrize("negative", [False, True])
def test_beta_gate_closed_form_and_derivative(negative: bool) -> None:
    b, size = gate_inputs()[0].requires_grad_(), 2 if negative else 1
    beta = beta_gate(b, allow_neg_eigval=negative)
    assert relative_error(beta, size / (1 + (-b).exp())) <= TOLERANCE[torch.float64]
    (db,) = torch.autograd.grad(beta.sum(), b)
    assert relative_error(db, beta * (1 - beta / size)) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("negative", [False, True])
def test_beta_gate_is_float32_from_bfloat16(negative: bool) -> None:
    b = gate_inputs()[0].bfloat16()
    beta = beta_gate(b, allow_neg_eigval=negative)
    assert beta.dtype == torch.float32
    assert relative_error(beta, beta_gate(b.double(), allow_neg_eigval=negative)) <= TOLERANCE[torch.float32]
