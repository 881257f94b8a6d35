"""A layer's middle in one launch is L2 norm, gates, the rule's step and the gated norm one after another."""

import os

import pytest
import torch
from ops_testing import relative_error
from torch import Tensor

from gdn.ops import beta_gate, decay_gate, gated_delta_rule_step
from gdn.ops.norm import l2_norm

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from gdn.ops.triton_layer_step import layer_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


@pytest.mark.parametrize(("H", "HV", "K", "V"), [(1, 1, 64, 64), (1, 2, 64, 96), (2, 4, 128, 64)])
@pytest.mark.parametrize(("gated", "double"), [(False, True), (True, False), (True, True)])
def test_the_middle_of_a_layer(H: int, HV: int, K: int, V: int, gated: bool, double: bool) -> None:
    B, D = 2, 2 * H * K + HV * V
    projected, state = normal(B, D + 2 * HV + (HV * V if gated else 0)), normal(B, HV, K, V)
    A_log, dt_bias, norm = normal(HV), normal(HV, seed=1), normal(V)
    wanted_state, x = state.double(), projected.double()
    got = layer_step(projected, A_log, dt_bias, norm, state, H, gated, double, torch.float32)

    q, k, v = (part.unflatten(1, (-1, size)) for part, size in zip(x[:, :D].split([H * K, H * K, HV * V], 1), (K, K, V)))
    g = decay_gate(x[:, D : D + HV], A_log.double(), dt_bias.double())
    beta = beta_gate(x[:, D + HV : D + 2 * HV], double)
    o = gated_delta_rule_step(l2_norm(q), l2_norm(k), v, g, beta, wanted_state, backend="torch")
    gate = torch.nn.functional.silu(x[:, D + 2 * HV :].unflatten(1, (HV, V))) if gated else 1.0
    assert relative_error(got.h, (o * norm.double() * gate).flatten(1)) <= 1e-5
    assert relative_error(got.squares.sum(2), o.square().sum(2)) <= 1e-5
    assert relative_error(state, wanted_state) <= 1e-5


def test_a_state_in_pieces_is_refused() -> None:
    arguments = (normal(1, 258), normal(1), normal(1), normal(64))
    with pytest.raises(ValueError, match="state has strides"):
        layer_step(*arguments, normal(1, 1, 64, 128)[..., ::2], 1, False, False, torch.float32)
