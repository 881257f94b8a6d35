"""The short convolution against conv1d; its state across splits, packed documents and single tokens."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_testing import TOLERANCE, PoisonedMemory, assert_close, boundaries, relative_error
from torch import Tensor

from gdn.ops import short_conv, short_conv_step, short_conv_with_state

D = 6
WIDTHS = [1, 2, 3, 4, 5]


def conv_inputs(
    B: int, T: int, W: int, *, N: int | None = None, bias: bool = True, state: bool = True
) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(100 * T + W)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    tensors = {"x": normal(B, T, D), "weight": normal(D, W), "bias": normal(D), "initial_state": normal(N or B, W - 1, D)}
    return {name: tensors[name] if keep else None for name, keep in zip(tensors, (True, True, bias, state))}


def conv1d_silu(x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """PyTorch's depthwise conv1d over the state and x, then SiLU; and the last W - 1 inputs."""
    W = weight.shape[1]
    state = x.new_zeros(x.shape[0], W - 1, D) if initial_state is None else initial_state
    extended = torch.cat([state, x], dim=1)
    if not x.shape[1]:  # which conv1d does not take
        return x, state
    y = F.silu(F.conv1d(extended.mT, weight.unsqueeze(1), bias, groups=D).mT)
    return y, extended[:, extended.shape[1] - (W - 1) :]


def packed_alone(inputs: dict[str, Any], lengths: list[int]) -> tuple[Tensor, Tensor]:
    bounds, results = boundaries(lengths).tolist(), []
    for n, (start, end) in enumerate(zip(bounds, bounds[1:])):
        state = inputs["initial_state"]
        own = None if state is None else state[n : n + 1]
        results.append(conv1d_silu(inputs["x"][:, start:end], inputs["weight"], inputs["bias"], own))
    return torch.cat([y for y, _ in results], dim=1), torch.cat([state for _, state in results])


def with_gradients(function: Any, inputs: dict[str, Tensor | None], *arguments: Any) -> dict[str, Tensor]:
    """Outputs, states and all gradients for seeded output gradients."""
    leaves = {name: None if x is None else x.clone().requires_grad_() for name, x in inputs.items()}
    given = {name: x for name, x in leaves.items() if x is not None}
    y, state = function(leaves, *arguments)
    generator = torch.Generator().manual_seed(1)
    d = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (y, state)]
    gradients = torch.autograd.grad([y, state], list(given.values()), d, materialize_grads=True)
    return {"y": y, "state": state} | {f"d_{name}": x for name, x in zip(given, gradients)}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("state", [True, False], ids=["state", "no_state"])
@pytest.mark.parametrize("T", [1, 2, 9])
@pytest.mark.parametrize("W", WIDTHS)
def test_matches_conv1d(W: int, T: int, state: bool, bias: bool) -> None:
    inputs = conv_inputs(2, T, W, bias=bias, state=state)
    got = with_gradients(lambda leaves: short_conv_with_state(**leaves), inputs)
    wanted = with_gradients(lambda leaves: conv1d_silu(**leaves), inputs)
    assert_close(got, wanted, torch.float64)
    assert torch.equal(short_conv(**inputs), got["y"])  # type: ignore[arg-type]


@pytest.mark.parametrize("state", [True, False], ids=["state", "no_state"])
@pytest.mark.parametrize("lengths", [[9], [1, 2, 0, 7, 3], [0, 2, 1], [5, 0, 0], [1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("W", WIDTHS)
def test_packed_equals_each_document_alone(W: int, lengths: list[int], state: bool) -> None:
    inputs = conv_inputs(1, sum(lengths), W, N=len(lengths), state=state)
    got = with_gradients(lambda leaves: short_conv_with_state(**leaves, cu_seqlens=boundaries(lengths)), inputs)
    assert_close(got, with_gradients(packed_alone, inputs, lengths), torch.float64)
    assert torch.equal(short_conv(**inputs, cu_seqlens=boundaries(lengths)), got["y"])  # type: ignore[arg-type]


def test_packed_documents_never_see_each_other() -> None:
    lengths = [3, 4, 2]
    inputs = conv_inputs(1, 9, 4, N=3)
    poisoned = dict(inputs)
    for name, mine in (("x", (slice(None), slice(3, 7))), ("initial_state", slice(1, 2))):
        poisoned[name] = torch.full_like(inputs[name], torch.nan)  # type: ignore[arg-type]
        poisoned[name][mine] = inputs[name][mine]  # type: ignore[index]
    (y, state), (y_beside, state_beside) = (
        short_conv_with_state(**x, cu_seqlens=boundaries(lengths)) for x in (inputs, poisoned)
    )
    assert torch.equal(y[:, 3:7], y_beside[:, 3:7]) and torch.equal(state[1], state_beside[1])


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(WIDTHS), st.lists(st.integers(0, 12), min_size=1, max_size=4))
def test_state_carries_across_any_split(W: int, cuts: list[int]) -> None:
    inputs = conv_inputs(2, 12, W)
    x, state, outputs = inputs.pop("x"), inputs.pop("initial_state"), []
    wanted = conv1d_silu(x, inputs["weight"], inputs["bias"], state)  # type: ignore[arg-type]
    bounds = [0, *sorted(cuts), 12]
    for start, end in zip(bounds, bounds[1:]):
        y, state = short_conv_with_state(x[:, start:end], **inputs, initial_state=state)  # type: ignore[arg-type, index]
        outputs.append(y)
    got = {"y": torch.cat(outputs, dim=1), "state": state}
    assert_close(got, dict(zip(got, wanted)), torch.float64)  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("W", WIDTHS)
def test_step_by_step_equals_whole(W: int, bias: bool) -> None:
    inputs: dict[str, Any] = conv_inputs(3, 11, W, bias=bias)
    wanted = conv1d_silu(**inputs)
    state = inputs["initial_state"].clone()
    address = state.data_ptr()
    steps = [short_conv_step(inputs["x"][:, t], inputs["weight"], inputs["bias"], state) for t in range(11)]
    assert state.data_ptr() == address
    got = {"y": torch.stack(steps, dim=1), "state": state}
    assert_close(got, dict(zip(got, wanted)), torch.float64)


def test_the_returned_state_is_no_view_of_the_input() -> None:
    """It outlives a prompt of any length, and steps write into it."""
    inputs: dict[str, Any] = conv_inputs(1, 9, 4)
    for cu_seqlens in (None, boundaries([9])):
        _, state = short_conv_with_state(**inputs, cu_seqlens=cu_seqlens)
        assert state.untyped_storage().nbytes() == state.numel() * state.element_size()


def test_bfloat16_in_bfloat16_out_whatever_the_weights() -> None:
    inputs: dict[str, Any] = conv_inputs(2, 40, 4)
    narrow = inputs | {"x": inputs["x"].bfloat16()}
    y, state = short_conv_with_state(**narrow)
    wanted, _ = conv1d_silu(**inputs)
    assert y.dtype == state.dtype == torch.bfloat16
    assert relative_error(y, wanted) <= TOLERANCE[torch.bfloat16]


def test_gradients_are_right_on_poisoned_memory() -> None:
    lengths = [4, 0, 5]
    inputs = conv_inputs(1, 9, 4, N=3)
    with PoisonedMemory():
        got = with_gradients(lambda leaves: short_conv_with_state(**leaves, cu_seqlens=boundaries(lengths)), inputs)
    assert_close(got, with_gradients(packed_alone, inputs, lengths), torch.float64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(5, 4)}, r"weight is \(5, 4\); expected \[6, W\]"),
        ({"initial_state": torch.ones(2, 4, D)}, r"initial_state is \(2, 4, 6\); expected \(2, 3, 6\)"),
        ({"cu_seqlens": boundaries([4, 5])}, "cu_seqlens with a batch of 2"),
        ({"x": torch.ones(1, 9, D), "cu_seqlens": boundaries([4, 4])}, "runs from 0 to 8; expected 0 to T = 9"),
        ({"x": torch.ones(1, 9, D), "cu_seqlens": boundaries([4, 5]).long()}, "cu_seqlens is torch.int64"),
    ],
    ids=["weight", "initial_state", "packed_batch", "packed_end", "packed_dtype"],
)
def test_bad_input_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = conv_inputs(2, 9, 4, state=False) | change
    for conv in (short_conv, short_conv_with_state):
        with pytest.raises(ValueError, match=message):
            conv(**arguments)
