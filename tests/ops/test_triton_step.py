"""The GPU kernel of one token, under the interpreter or on a GPU: numbers, resets, strides, batches, memory around it."""

import os

import pytest
import torch
from ops_testing import PoisonedMemory, normalised, relative_error
from torch import Tensor

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from gdn.ops import gated_delta_rule_step  # noqa: E402
from gdn.ops.triton_step import CANDIDATES, StepConfig, step  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
SHAPES = [(2, 2, 2, 64, 64), (1, 2, 4, 64, 96), (3, 1, 2, 128, 32), (1, 1, 1, 256, 256), (2, 2, 2, 128, 512)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])


def shape_id(shape: tuple[int, ...]) -> str:
    return "-".join(f"{name}{size}" for name, size in zip(("B", "H", "HV", "K", "V"), shape))


def step_inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    B, H, HV, K, V = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    tensors = {"q": normalised(normal(B, H, K)), "k": normalised(normal(B, H, K)), "v": normal(B, HV, V)}
    inputs = {name: x.to(dtype) for name, x in tensors.items()}
    inputs |= {"g": -normal(B, HV).abs(), "beta": normal(B, HV).sigmoid(), "state": normal(B, HV, K, V)}
    return {name: x.to(DEVICE) for name, x in inputs.items()}


def run(inputs: dict[str, Tensor], config: StepConfig | None = None) -> tuple[Tensor, Tensor]:
    """Output and new state; the inputs' state stays as it is."""
    state = inputs["state"].clone()
    scale = inputs["q"].shape[-1] ** -0.5
    arguments = [inputs[name] for name in ("q", "k", "v", "g", "beta")]
    with PoisonedMemory():
        o = step(*arguments, state, scale) if config is None else step(*arguments, state, scale, config)
    return o, state


def wanted(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The same in float64."""
    exact = {name: x.double() for name, x in inputs.items()}
    return gated_delta_rule_step(**exact, backend="torch"), exact["state"]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_equals_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = step_inputs(shape, dtype)
    o, state = run(inputs)
    exact_o, exact_state = wanted(inputs)
    assert o.dtype == dtype
    assert relative_error(o, exact_o) <= TOLERANCE[dtype]
    assert relative_error(state, exact_state) <= 1e-6  # float32, whatever the inputs are


@pytest.mark.parametrize("config", CANDIDATES, ids=str)
def test_every_configuration(config: StepConfig) -> None:
    inputs = step_inputs((1, 1, 1, 128, 96))
    for got, exact in zip(run(inputs, config), wanted(inputs)):
        assert relative_error(got, exact) <= 1e-5


def test_twenty_steps_equal_the_recurrence() -> None:
    shape = (2, 1, 2, 64, 32)
    state = step_inputs(shape)["state"]
    exact_state = state.double()
    for t in range(20):
        inputs = step_inputs(shape, seed=t) | {"state": state}
        o, state = run(inputs)
        exact = {name: x.double() for name, x in inputs.items()} | {"state": exact_state}
        assert relative_error(o, gated_delta_rule_step(**exact, backend="torch")) <= 1e-5
    assert relative_error(state, exact_state) <= 1e-5


def test_nothing_to_do_leaves_every_bit() -> None:
    inputs = step_inputs((2, 2, 2, 64, 96))
    inputs |= {"g": torch.zeros_like(inputs["g"]), "beta": torch.zeros_like(inputs["beta"])}
    o, state = run(inputs)
    assert torch.equal(state, inputs["state"])
    assert relative_error(o, wanted(inputs)[0]) <= 1e-5


@pytest.mark.parametrize("g", [-1000.0, -torch.inf])
def test_full_decay_forgets_exactly(g: float) -> None:
    inputs = step_inputs((2, 2, 4, 64, 32))
    inputs["g"] = torch.full_like(inputs["g"], g)
    o, state = run(inputs)
    fresh_o, fresh_state = run(inputs | {"state": torch.zeros_like(inputs["state"])})
    assert torch.equal(o, fresh_o) and torch.equal(state, fresh_state)
    k = inputs["k"].repeat_interleave(2, dim=1)
    w = inputs["beta"][..., None] * inputs["v"]
    assert torch.equal(state, k[..., None] * w[..., None, :])


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    inputs = step_inputs((5, 1, 2, 128, 64))
    o, state = run(inputs)
    for row in range(5):
        alone_o, alone_state = run({name: x[row : row + 1] for name, x in inputs.items()})
        assert torch.equal(alone_o[0], o[row]) and torch.equal(alone_state[0], state[row])


def test_strides_and_memory_around_it() -> None:
    """q, k, v as slices of one projection, gates and the state as slices of larger tensors; nan all around stays there."""
    B, H, HV, K, V = shape = (2, 2, 4, 64, 32)
    inputs = step_inputs(shape)
    projection = torch.full((B, 2 * H * K + HV * V + 8), torch.nan, device=DEVICE)
    q, k, v, _ = projection.split([H * K, H * K, HV * V, 8], dim=1)
    gates = torch.full((HV, 2, B), torch.nan, device=DEVICE)
    g, beta = gates.permute(1, 2, 0)
    states = torch.full((B + 2, 3, HV + 2, K, V), torch.nan, device=DEVICE)
    views = {
        "q": q.view(B, H, K), "k": k.view(B, H, K), "v": v.view(B, HV, V), "g": g, "beta": beta,
        "state": states[1:-1, 1, 1:-1],
    }  # fmt: skip
    for name, view in views.items():
        view.copy_(inputs[name])
    before = states.clone()
    with PoisonedMemory():
        o = step(*views.values(), scale=K**-0.5)
    plain_o, plain_state = run(inputs)
    assert torch.equal(o, plain_o) and torch.equal(views["state"], plain_state)
    before[1:-1, 1, 1:-1] = plain_state
    assert torch.equal(before.view(torch.int32), states.view(torch.int32))


@pytest.mark.gpu
def test_captured_in_a_graph() -> None:
    inputs = step_inputs((3, 2, 2, 256, 256), torch.bfloat16)
    state = inputs["state"].clone()
    arguments = [inputs[name] for name in ("q", "k", "v", "g", "beta")]
    step(*arguments, state.clone(), 0.0625)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = step(*arguments, state, 0.0625)
    graph.replay()
    wanted_o, wanted_state = run(inputs)
    assert torch.equal(o, wanted_o) and torch.equal(state, wanted_state)
