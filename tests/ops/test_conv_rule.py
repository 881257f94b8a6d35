"""Projection to the rule's output: the GPU kernels (in the interpreter, or on a GPU) beside the composition in PyTorch."""

from typing import Any

import pytest
import torch
from ops_testing import TOLERANCE, boundaries, relative_error
from torch import Tensor

from gdn.ops import (
    beta_gate,
    conv_gated_delta_rule,
    conv_gated_delta_rule_step,
    conv_gated_delta_rule_with_state,
    decay_gate,
    gated_delta_rule_with_state,
    l2_norm,
    short_conv_with_state,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXTRA = 3  # columns of the projection that are not the operator's


def sizes(H: int, K: int, HV: int, V: int) -> dict[str, Any]:
    return {"num_heads": H, "head_dim": K, "num_v_heads": HV, "head_v_dim": V}


def layer_inputs(B: int, T: int, H: int, K: int, HV: int, V: int, W: int, N: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(T)
    D = 2 * H * K + HV * V

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "proj": normal(B, T, D + 2 * HV + EXTRA),
        "conv_weight": normal(D, W) / 2,
        "conv_bias": normal(D),
        "A_log": normal(HV).sigmoid().log(),
        "dt_bias": normal(HV) - 2,
        "conv_state": normal(N, W - 1, D),
        "initial_state": normal(N, HV, K, V),
    }


def run(inputs: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """Results, and all gradients for seeded gradients of them."""
    leaves = {name: x.to(DEVICE, dtype).requires_grad_() for name, x in inputs.items()}
    tensors = {"conv_bias": None} | leaves
    if "conv_state" in leaves:
        results = conv_gated_delta_rule_with_state(**tensors, **options)  # type: ignore[arg-type]
    else:
        results = (conv_gated_delta_rule(**tensors, **options),)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in results]
    gradients = torch.autograd.grad(results, list(leaves.values()), upstream)
    named = dict(zip(("o", "conv", "state"), (x.detach() for x in results)))
    return named | {f"d_{name}": d for name, d in zip(leaves, gradients)}


CASES: dict[str, dict[str, Any]] = {
    "plain": {"shape": (2, 70, 1, 64, 1, 32, 4), "without": ("conv_bias", "conv_state", "initial_state")},
    "grouped": {"shape": (1, 66, 1, 64, 2, 32, 2), "without": ("conv_state", "initial_state")},
    "states": {"shape": (2, 20, 1, 64, 1, 96, 3), "without": ()},
    "packed": {"shape": (1, 90, 1, 64, 2, 32, 4), "without": ("conv_bias",), "lengths": [20, 0, 69, 1, 0]},
    "wide": {"shape": (1, 10, 1, 128, 1, 64, 4), "without": ("conv_state", "initial_state"), "allow_neg_eigval": True},
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_the_composition_in_pytorch(name: str) -> None:
    pytest.importorskip("triton")
    case = CASES[name]
    shape, lengths = case["shape"], case.get("lengths")
    inputs = layer_inputs(*shape, N=shape[0] if lengths is None else len(lengths))
    inputs = {key: x for key, x in inputs.items() if key not in case["without"]}
    options: dict[str, Any] = sizes(*shape[2:6]) | {"allow_neg_eigval": case.get("allow_neg_eigval", False)}
    options["cu_seqlens"] = None if lengths is None else boundaries(lengths).to(DEVICE)
    got = run(inputs, torch.float32, backend="triton", **options)
    wanted = run(inputs, torch.float64, backend="torch", **options)
    wrong = {key: e for key in wanted if not (e := relative_error(got[key], wanted[key])) <= TOLERANCE[torch.float32]}
    assert not wrong
    assert not got["d_proj"][..., -EXTRA:].any()


def test_pytorch_is_the_composition_of_the_public_pieces() -> None:
    H, K, HV, V, W = 1, 8, 2, 6, 4
    x = {name: tensor.double() for name, tensor in layer_inputs(2, 9, H, K, HV, V, W, N=2).items()}
    o, conv, state = conv_gated_delta_rule_with_state(**x, **sizes(H, K, HV, V), allow_neg_eigval=True)
    D = 2 * H * K + HV * V
    y, wanted_conv = short_conv_with_state(x["proj"][..., :D], x["conv_weight"], x["conv_bias"], initial_state=x["conv_state"])
    q, k, v = (part.unflatten(-1, (-1, size)) for part, size in zip(y.split([H * K, H * K, HV * V], dim=-1), (K, K, V)))
    a, b = x["proj"][..., D : D + HV], x["proj"][..., D + HV : D + 2 * HV]
    g, beta = decay_gate(a, x["A_log"], x["dt_bias"]), beta_gate(b, allow_neg_eigval=True)
    wanted_o, wanted_state = gated_delta_rule_with_state(l2_norm(q), l2_norm(k), v, g, beta, initial_state=x["initial_state"])
    assert torch.equal(o, wanted_o) and torch.equal(conv, wanted_conv) and torch.equal(state, wanted_state)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_token_by_token_is_the_whole(backend: Any) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    H, K, HV, V, W, T = 1, 64, 2, 32, 4, 6
    x = {name: tensor.to(DEVICE) for name, tensor in layer_inputs(3, T, H, K, HV, V, W, N=3).items()}
    options = sizes(H, K, HV, V) | {"backend": backend}
    o, conv, state = conv_gated_delta_rule_with_state(**x, **options)
    proj, conv_state, running = x.pop("proj"), x.pop("conv_state"), x.pop("initial_state")
    tokens = [conv_gated_delta_rule_step(proj[:, t], **x, conv_state=conv_state, state=running, **options) for t in range(T)]
    for got, wanted in ((torch.stack(tokens, dim=1), o), (conv_state, conv), (running, state)):
        assert relative_error(got, wanted) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"proj": torch.zeros(1, 5, 40)}, r"proj is \(1, 5, 40\).*P >= 164"),
        ({"proj": torch.zeros(5, 170)}, r"proj is \(5, 170\); expected \[B, T, P\]"),
        ({"conv_weight": torch.zeros(100, 4)}, r"conv_weight is \(100, 4\); expected \[160, W\]"),
        ({"A_log": torch.zeros(3)}, r"A_log is \(3,\); expected \(2,\)"),
        ({"dt_bias": torch.zeros(1)}, r"dt_bias is \(1,\); expected \(2,\)"),
        ({"num_v_heads": 3, "num_heads": 2}, "proj is"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens is torch.int64"),
    ],
    ids=str,
)
def test_bad_input_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    inputs = layer_inputs(1, 5, 1, 64, 2, 16, 4, N=1)
    arguments = {key: inputs[key] for key in ("proj", "conv_weight", "conv_bias", "A_log", "dt_bias")} | sizes(1, 64, 2, 16)
    with pytest.raises(ValueError, match=message):
        conv_gated_delta_rule(**arguments | change)
