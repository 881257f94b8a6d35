"""A layer's middle in one launch is the convolution, the gates and the rule's step one after another."""

import os

import pytest
import torch
from ops_testing import relative_error
from torch import Tensor

from gdn.ops import beta_gate, decay_gate, gated_delta_rule_step, short_conv_step
from gdn.ops.norm import l2_norm

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from gdn.ops.triton_layer_step import layer_step
from gdn.ops.triton_rows import Sum, Window

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("W", [1, 2, 4])
@pytest.mark.parametrize(("H", "HV", "V"), [(1, 1, 64), (1, 2, 96)])
@pytest.mark.parametrize(("bias", "double"), [(False, False), (True, True)])
def test_the_middle_of_a_layer(parts: int, W: int, H: int, HV: int, V: int, bias: bool, double: bool) -> None:
    B, K, D = 2, 64, 2 * H * 64 + HV * V
    projected, inputs = normal(parts, B, D + 2 * HV + 7), normal(B, W - 1, D)
    conv, offset, state = normal(W, D), normal(D) if bias else None, normal(B, HV, K, V)
    A_log, dt_bias = normal(HV), normal(HV, seed=1)
    before, window = inputs.clone(), Window(inputs, Sum(projected, 1))
    wanted_state, x = state.double(), projected.double().sum(0)
    got = layer_step(window, conv, offset, A_log, dt_bias, state, H, double, K**-0.5)

    y = short_conv_step(x[:, :D], conv.T.double(), None if offset is None else offset.double(), inputs.double())
    q, k, v = (part.unflatten(1, (-1, size)) for part, size in zip(y.split([H * K, H * K, HV * V], 1), (K, K, V)))
    g = decay_gate(x[:, D : D + HV], A_log.double(), dt_bias.double())
    beta = beta_gate(x[:, D + HV : D + 2 * HV], double)
    wanted = gated_delta_rule_step(l2_norm(q), l2_norm(k), v, g, beta, wanted_state, backend="torch")
    assert relative_error(got, wanted) <= 1e-5 and relative_error(state, wanted_state) <= 1e-5
    assert torch.equal(inputs, before)  # other programs may still read it


def test_a_state_in_pieces_is_refused() -> None:
    window = Window(normal(1, 3, 192), Sum(normal(1, 1, 194), 1))
    arguments = (window, normal(4, 192), None, normal(1), normal(1))
    with pytest.raises(ValueError, match="state has strides"):
        layer_step(*arguments, normal(1, 1, 64, 128)[..., ::2], 1, False, 1.0)
