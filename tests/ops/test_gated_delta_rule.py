"""The gated delta rule: each backend against the recurrence; packing, splitting, steps; autograd, compile, dtypes, errors."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_testing import (
    TOLERANCE,
    PoisonedMemory,
    Shape,
    assert_close,
    boundaries,
    normalised,
    relative_error,
    rule_inputs,
    run_rule,
)
from safetensors.torch import load_file
from torch import Tensor

from gdn.errors import BackendError
from gdn.ops import backend as backend_module
from gdn.ops import beta_gate, chunked, decay_gate, gated_delta_rule, gated_delta_rule_step, gated_delta_rule_with_state

SHAPES = [
    Shape(2, 1, 2, 2, 8, 8),
    Shape(1, 15, 2, 2, 16, 8),
    Shape(2, 31, 1, 2, 8, 16),
    Shape(1, 32, 2, 2, 8, 8),
    Shape(1, 33, 2, 6, 8, 12),
    Shape(1, 63, 1, 1, 130, 64),
    Shape(2, 64, 1, 1, 128, 128),
    Shape(1, 65, 1, 2, 64, 128),
    Shape(2, 75, 3, 6, 64, 100),
    Shape(3, 130, 2, 2, 16, 16),
    Shape(1, 500, 2, 4, 16, 24),
]
SMALL = Shape(2, 75, 2, 4, 16, 12)
BACKENDS = ["reference", "torch"]


@pytest.fixture(params=["whole", "blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in one block, as small inputs are, and one block for each rank or two."""
    if request.param == "blocks":
        monkeypatch.setattr(chunked, "_BLOCK_FLOATS", 1 << 12)


# --- against the reference ------------------------------------------------------------------------------------------------


def literal_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """The two formulas with matrices, for one row and head at a time: what the reference itself is held against."""
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    o, final_state = v.new_zeros(B, T, HV, V), initial_state.clone()
    for b in range(B):
        for h in range(HV):
            S = initial_state[b, h]
            for t in range(T):
                key, query = k[b, t, h * H // HV], q[b, t, h * H // HV]
                forget = torch.eye(K, dtype=q.dtype) - beta[b, t, h] * torch.outer(key, key)
                S = g[b, t, h].exp() * forget @ S + beta[b, t, h] * torch.outer(key, v[b, t, h])
                o[b, t, h] = K**-0.5 * S.T @ query
            final_state[b, h] = S
    return o, final_state


@pytest.mark.parametrize("keys", ["random", "negative_eigenvalues"])
def test_reference_is_the_formula(keys: str) -> None:
    inputs = rule_inputs(Shape(2, 9, 2, 4, 5, 3), keys=keys)
    o, final_state = gated_delta_rule_with_state(**inputs, backend="reference")
    wanted_o, wanted_state = literal_rule(**inputs)
    assert_close({"o": o, "final_state": final_state}, {"o": wanted_o, "final_state": wanted_state}, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_matches_reference(shape: Shape, dtype: torch.dtype, blocks: None) -> None:
    inputs = rule_inputs(shape)
    assert_close(run_rule(inputs, "torch", dtype), run_rule(inputs, "reference", torch.float64), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("keys", ["random", "repeated", "same_beta_2", "negative_eigenvalues", "zero_rows", "beta_0"])
@pytest.mark.parametrize("gate", ["none", "weak", "mixed", "strong", "resets"])
def test_torch_matches_reference_in_hard_cases(gate: str, keys: str, dtype: torch.dtype) -> None:
    inputs = rule_inputs(SMALL, gate=gate, keys=keys)
    assert_close(run_rule(inputs, "torch", dtype), run_rule(inputs, "reference", torch.float64), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_initial_state_is_a_zero_state(backend: Any) -> None:
    inputs = rule_inputs(SMALL)
    inputs["initial_state"] = torch.zeros_like(inputs["initial_state"])
    wanted = run_rule(inputs, "reference", torch.float64)
    del inputs["initial_state"], wanted["d_initial_state"]
    assert_close(run_rule(inputs, backend, torch.float64), wanted, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_decay_is_an_exact_reset(backend: Any) -> None:
    """Nothing from before a token with g = -inf reaches what comes after it, not even a rounding error."""
    inputs = {name: x.float() for name, x in rule_inputs(SMALL).items()}
    inputs["g"][:, 20] = -torch.inf
    other = {name: x.clone() for name, x in inputs.items()}
    for name in ("k", "v", "beta"):
        other[name][:, :20] = rule_inputs(SMALL, seed=5)[name][:, :20].float()
    (o, final_state), (other_o, other_state) = (gated_delta_rule_with_state(**x, backend=backend) for x in (inputs, other))
    assert torch.equal(o[:, 20:], other_o[:, 20:]) and torch.equal(final_state, other_state)
    assert not torch.equal(o[:, :20], other_o[:, :20])


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_tokens_leave_the_state_as_it_is(backend: Any) -> None:
    """beta = 0 and g = 0 is a token that only reads; what would be gained by writing it still shows in d_beta."""
    inputs = rule_inputs(SMALL)
    padding = slice(50, None)
    inputs["beta"][:, padding], inputs["g"][:, padding] = 0, 0
    got = run_rule(inputs, backend, torch.float64)
    kept = {name: x if name == "initial_state" else x[:, :50] for name, x in inputs.items()}
    wanted = gated_delta_rule_with_state(**kept, backend="reference")[1]
    assert relative_error(got["final_state"], wanted) <= TOLERANCE[torch.float64]
    assert got["d_v"][:, padding].abs().max() == 0
    assert got["d_beta"][:, padding].isfinite().all() and got["d_beta"][:, padding].abs().min() > 0


def test_scale_multiplies_the_output() -> None:
    inputs = rule_inputs(SMALL)
    default = gated_delta_rule(**inputs)
    for backend in BACKENDS:
        o = gated_delta_rule(**inputs, scale=2.0, backend=backend)  # type: ignore[arg-type]
        assert relative_error(o, 2 * SMALL.K**0.5 * default) <= TOLERANCE[torch.float64]


def test_the_two_public_functions_agree_and_leave_their_inputs_alone() -> None:
    inputs = {name: x.float() for name, x in rule_inputs(SMALL).items()}
    before = {name: x.clone() for name, x in inputs.items()}
    o, final_state = gated_delta_rule_with_state(**inputs)
    assert torch.equal(gated_delta_rule(**inputs), o)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)
    storages = {x.untyped_storage().data_ptr() for x in inputs.values()}
    assert not {o.untyped_storage().data_ptr(), final_state.untyped_storage().data_ptr()} & storages


# --- packed documents -----------------------------------------------------------------------------------------------------

PACKINGS = [
    [75],
    [20, 44],
    [40, 35, 64],
    [0, 33, 7],
    [20, 0, 0, 50],
    [1, 2, 3, 64, 32, 100, 31],
    [33, 40, 0, 0],
    [65, 1, 0, 130, 5, 0],
    [0, 0],
]


def documents(inputs: dict[str, Tensor], lengths: list[int]) -> list[dict[str, Tensor]]:
    """The inputs of each packed document alone."""
    bounds = boundaries(lengths).tolist()
    return [
        {name: x[n : n + 1] if name == "initial_state" else x[:, start:end] for name, x in inputs.items()}
        for n, (start, end) in enumerate(zip(bounds, bounds[1:]))
    ]


def run_packed(inputs: dict[str, Tensor], lengths: list[int], backend: Any) -> dict[str, Tensor]:
    return run_rule(inputs, backend, torch.float64, cu_seqlens=boundaries(lengths))


def run_alone(inputs: dict[str, Tensor], lengths: list[int]) -> dict[str, Tensor]:
    """As `run_packed`, from the reference on each document by itself, with the same output gradients."""
    bounds = boundaries(lengths).tolist()
    (HV, K, V), T = inputs["initial_state"].shape[1:], bounds[-1]
    generator = torch.Generator().manual_seed(1)
    do, d_final = (torch.randn(sizes, generator=generator).double() for sizes in ((1, T, HV, V), (len(lengths), HV, K, V)))
    results = []
    for n, part in enumerate(documents(inputs, lengths)):
        leaves = {name: x.detach().clone().requires_grad_() for name, x in part.items()}
        o, final_state = gated_delta_rule_with_state(**leaves, backend="reference")
        outputs, gradients = ([o, final_state], [do[:, bounds[n] : bounds[n + 1]], d_final[n : n + 1]])
        if not lengths[n]:  # nothing but the state, which is handed on
            outputs, gradients = outputs[1:], gradients[1:]
        d = torch.autograd.grad(outputs, list(leaves.values()), gradients, materialize_grads=True)
        results.append({"o": o, "final_state": final_state} | {f"d_{name}": x for name, x in zip(leaves, d)})
    return {name: torch.cat([r[name] for r in results], dim=0 if name.endswith("_state") else 1) for name in results[0]}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", PACKINGS, ids=lambda lengths: "-".join(map(str, lengths)))
def test_packed_equals_each_document_alone(lengths: list[int], backend: Any, blocks: None) -> None:
    inputs = rule_inputs(Shape(1, sum(lengths), 2, 4, 8, 6), N=len(lengths))
    if not sum(lengths):
        o, final_state = gated_delta_rule_with_state(**inputs, cu_seqlens=boundaries(lengths), backend=backend)
        assert o.shape == inputs["v"].shape and torch.equal(final_state, inputs["initial_state"])
        assert final_state.data_ptr() != inputs["initial_state"].data_ptr()
        return
    assert_close(run_packed(inputs, lengths, backend), run_alone(inputs, lengths), torch.float64)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=6).filter(any), st.integers(0, 1000))
def test_any_packing_equals_each_document_alone(lengths: list[int], seed: int) -> None:
    inputs = rule_inputs(Shape(1, sum(lengths), 1, 2, 4, 3), N=len(lengths), seed=seed)
    assert_close(run_packed(inputs, lengths, "torch"), run_alone(inputs, lengths), torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_never_see_each_other(backend: Any) -> None:
    """A neighbour full of nan changes no bit of a document's outputs, state or gradients."""
    lengths, mine = [33, 40, 0, 70, 5], (33, 73)
    inputs = {name: x.float() for name, x in rule_inputs(Shape(1, sum(lengths), 2, 2, 8, 8), N=len(lengths)).items()}
    poisoned = {name: torch.full_like(x, torch.nan) for name, x in inputs.items()}
    for name, x in inputs.items():
        part = slice(1, 2) if name == "initial_state" else (slice(None), slice(*mine))
        poisoned[name][part] = x[part]
    results = []
    for tensors in (inputs, poisoned):
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        o, final_state = gated_delta_rule_with_state(**leaves, cu_seqlens=boundaries(lengths), backend=backend)
        gradients = torch.autograd.grad(o.square().sum() + final_state.square().sum(), list(leaves.values()))
        states = [final_state[1], gradients[-1][1]]
        results.append([*states, *(x[:, slice(*mine)] for x in (o, *gradients[:-1]))])
    assert all(torch.equal(clean, beside_nan) for clean, beside_nan in zip(*results))


def test_packed_without_initial_state_starts_from_zero() -> None:
    lengths = [40, 0, 35]
    inputs = rule_inputs(Shape(1, 75, 2, 2, 8, 8), N=3)
    inputs["initial_state"].zero_()
    wanted = run_packed(inputs, lengths, "reference")
    del inputs["initial_state"], wanted["d_initial_state"]
    assert_close(run_packed(inputs, lengths, "torch"), wanted, torch.float64)


# --- split and step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20, deadline=None)
@given(split=st.integers(0, 75), again=st.integers(0, 75))
def test_split_anywhere_equals_whole(backend: Any, split: int, again: int) -> None:
    """Three parts, the state handed on, gradients through it included."""
    inputs = rule_inputs(Shape(1, 75, 1, 2, 6, 5))
    cuts = [0, *sorted((split, again)), 75]

    def in_parts(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        state, outputs = leaves["initial_state"], []
        for start, end in zip(cuts, cuts[1:]):
            part = {name: x[:, start:end] for name, x in leaves.items() if name != "initial_state"}
            o, state = gated_delta_rule_with_state(**part, initial_state=state, backend=backend)
            outputs.append(o)
        return torch.cat(outputs, dim=1), state

    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    o, final_state = in_parts(leaves)
    generator = torch.Generator().manual_seed(1)
    do, d_final = (torch.randn(x.shape, generator=generator).double() for x in (o, final_state))
    gradients = torch.autograd.grad([o, final_state], list(leaves.values()), [do, d_final])
    got = {"o": o, "final_state": final_state} | {f"d_{name}": d for name, d in zip(leaves, gradients)}
    assert_close(got, run_rule(inputs, "reference", torch.float64), torch.float64)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("keys", ["random", "same_beta_2"])
def test_step_by_step_equals_whole(keys: str, backend: Any) -> None:
    inputs = rule_inputs(SMALL, keys=keys)
    wanted_o, wanted_state = gated_delta_rule_with_state(**inputs, backend="reference")
    state = inputs.pop("initial_state").clone()
    address = state.data_ptr()
    outputs = [
        gated_delta_rule_step(**{n: x[:, t] for n, x in inputs.items()}, state=state, backend=backend) for t in range(SMALL.T)
    ]
    assert state.data_ptr() == address
    got, wanted = {"o": torch.stack(outputs, dim=1), "state": state}, {"o": wanted_o, "state": wanted_state}
    assert_close(got, wanted, torch.float64)


def test_step_takes_a_scale_and_views_of_a_larger_state() -> None:
    inputs = {name: x[:, 0] for name, x in rule_inputs(Shape(3, 1, 2, 4, 8, 6)).items()}
    states = torch.randn(4, 3, 4, 8, 6, dtype=torch.float64)
    before, inputs["initial_state"] = states.clone(), states[2].clone()
    whole = {name: x if name == "initial_state" else x.unsqueeze(1) for name, x in inputs.items()}
    wanted_o, wanted_state = gated_delta_rule_with_state(**whole, scale=0.7, backend="reference")
    del inputs["initial_state"]
    o = gated_delta_rule_step(**inputs, state=states[2], scale=0.7)
    got, wanted = {"o": o, "state": states[2]}, {"o": wanted_o[:, 0], "state": wanted_state}
    assert_close(got, wanted, torch.float64)
    assert all(torch.equal(states[i], before[i]) for i in (0, 1, 3))


def test_step_computes_in_the_states_dtype_and_returns_that_of_v() -> None:
    inputs = {name: x.bfloat16() for name, x in rule_inputs(Shape(2, 1, 2, 2, 16, 16)).items()}
    state = inputs.pop("initial_state").float()
    whole = gated_delta_rule_with_state(**{n: x.double() for n, x in inputs.items()}, initial_state=state.double())
    o = gated_delta_rule_step(**{n: x[:, 0] for n, x in inputs.items()}, state=state)
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert relative_error(o, whole[0][:, 0]) <= TOLERANCE[torch.bfloat16]
    assert relative_error(state, whole[1]) <= TOLERANCE[torch.float32]


def test_step_records_no_gradient() -> None:
    inputs = {name: x[:, 0].requires_grad_() for name, x in rule_inputs(Shape(1, 1, 1, 1, 4, 4)).items()}
    del inputs["initial_state"]
    state = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    assert not gated_delta_rule_step(**inputs, state=state).requires_grad and not state.requires_grad


# --- autograd, compile, dtypes, memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, [2, 0, 3, 1]], ids=["batch", "packed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: Any, lengths: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_chunk_size", lambda T, width: 2)
    monkeypatch.setattr(chunked, "_BLOCK_FLOATS", 16)  # several blocks, too
    shape = Shape(2, 5, 1, 2, 3, 2) if lengths is None else Shape(1, 6, 1, 2, 3, 2)
    inputs = rule_inputs(shape, N=None if lengths is None else len(lengths))
    inputs["g"][:, 3] = -30

    def rule(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        cu_seqlens = None if lengths is None else boundaries(lengths)
        return gated_delta_rule_with_state(
            *tensors[:5], initial_state=tensors[5], cu_seqlens=cu_seqlens, scale=0.9, backend=backend
        )

    assert torch.autograd.gradcheck(rule, [x.requires_grad_() for x in inputs.values()])


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    inputs = {name: x.requires_grad_() for name, x in rule_inputs(Shape(1, 5, 1, 1, 4, 4)).items()}
    (dq,) = torch.autograd.grad(gated_delta_rule(**inputs).square().sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.parametrize("wanted", ["q", "v", "g", "initial_state"])
def test_gradient_of_one_input_alone(wanted: str) -> None:
    inputs = rule_inputs(SMALL)
    results = []
    for backend in BACKENDS:
        leaf = inputs[wanted].clone().requires_grad_()
        o = gated_delta_rule(**(inputs | {wanted: leaf}), backend=backend)  # type: ignore[arg-type]
        results.append(torch.autograd.grad(o.square().sum(), leaf)[0])
    assert relative_error(results[1], results[0]) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_in_one_graph(backend: str) -> None:
    inputs = rule_inputs(Shape(1, 70, 2, 4, 8, 8))
    torch._dynamo.reset()
    compiled = torch.compile(gated_delta_rule_with_state, fullgraph=True, backend=backend)
    results = []
    for rule in (gated_delta_rule_with_state, compiled):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        o, final_state = rule(**leaves)
        gradients = torch.autograd.grad(o.square().sum() + final_state.square().sum(), list(leaves.values()))
        results.append({"o": o, "final_state": final_state} | {f"d_{name}": d for name, d in zip(leaves, gradients)})
    assert_close(results[1], results[0], torch.float64)
    with torch.no_grad():
        assert relative_error(compiled(**inputs)[0], results[0]["o"]) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_in_bfloat16_out_with_a_float32_state(backend: Any) -> None:
    """q, k, v, beta in bfloat16 as training has them, g in float32: only the results are rounded."""
    inputs = {name: x.float() if name in ("g", "initial_state") else x.bfloat16() for name, x in rule_inputs(SMALL).items()}
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    o, final_state = gated_delta_rule_with_state(**leaves, backend=backend)
    assert o.dtype == torch.bfloat16 and final_state.dtype == torch.float32
    exact = {name: x.double().requires_grad_() for name, x in inputs.items()}
    wanted_o, wanted_state = gated_delta_rule_with_state(**exact, backend="reference")
    assert relative_error(o, wanted_o) <= TOLERANCE[torch.bfloat16]
    assert relative_error(final_state, wanted_state) <= TOLERANCE[torch.float32]
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    gradients = torch.autograd.grad(o, list(leaves.values()), do)
    wanted = torch.autograd.grad(wanted_o, list(exact.values()), do.double())
    assert all(d.dtype == inputs[name].dtype for name, d in zip(inputs, gradients))
    assert_close(dict(zip(inputs, gradients)), dict(zip(inputs, wanted)), torch.bfloat16)


@pytest.mark.parametrize("lengths", [None, [40, 0, 35]], ids=["batch", "packed"])
def test_strided_inputs_and_expanded_gradients(lengths: list[int] | None) -> None:
    shape = Shape(2 if lengths is None else 1, 75, 2, 2, 8, 6)
    inputs = rule_inputs(shape, N=None if lengths is None else len(lengths))
    cu_seqlens = None if lengths is None else boundaries(lengths)
    strided = {name: x.mT.contiguous().mT for name, x in inputs.items()}
    for name in "qkv":
        strided[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(x.is_contiguous() for x in strided.values())
    results = []
    for tensors, backend in ((inputs, "reference"), (strided, "torch")):
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        o, final_state = gated_delta_rule_with_state(**leaves, cu_seqlens=cu_seqlens, backend=backend)  # type: ignore[arg-type]
        gradients = torch.autograd.grad(o.sum() + final_state.sum(), list(leaves.values()))  # gradients of stride 0
        results.append({"o": o, "final_state": final_state} | dict(zip(leaves, gradients)))
    assert_close(results[1], results[0], torch.float64)


@pytest.mark.parametrize("lengths", [None, [33, 0, 40, 2]], ids=["batch", "packed"])
def test_no_uninitialised_memory_is_read(lengths: list[int] | None, blocks: None) -> None:
    shape = Shape(2 if lengths is None else 1, 75, 2, 4, 8, 6)
    inputs = rule_inputs(shape, N=None if lengths is None else len(lengths))
    cu_seqlens = None if lengths is None else boundaries(lengths)
    with PoisonedMemory() as poison:
        got = run_rule(inputs, "torch", torch.float64, cu_seqlens=cu_seqlens)
    assert poison.filled
    assert_close(got, run_rule(inputs, "reference", torch.float64, cu_seqlens=cu_seqlens), torch.float64)


def test_gradients_accumulate_over_two_backwards() -> None:
    """The graph is kept, nothing saved is overwritten by the first backward."""
    inputs = {name: x.requires_grad_() for name, x in rule_inputs(SMALL).items()}
    loss = gated_delta_rule(**inputs).square().sum()
    first = torch.autograd.grad(loss, list(inputs.values()), retain_graph=True)
    second = torch.autograd.grad(loss, list(inputs.values()))
    assert all(torch.equal(x, y) for x, y in zip(first, second))


# --- what is refused ------------------------------------------------------------------------------------------------------


def bad_inputs() -> dict[str, tuple[dict[str, Any], str]]:
    good = rule_inputs(Shape(2, 6, 2, 4, 4, 3))
    one = {name: x[:1] for name, x in good.items()}

    def packed(bounds: list[int], dtype: torch.dtype = torch.int32) -> dict[str, Any]:
        return {name: x for name, x in one.items() if name != "initial_state"} | {
            "cu_seqlens": torch.tensor(bounds, dtype=dtype)
        }

    return {
        "q_rank": (good | {"q": good["q"][0]}, r"q \(6, 2, 4\).*expected \[B, T, H, K\]"),
        "v_rank": (good | {"v": good["v"][0]}, r"v \(6, 4, 3\).*\[B, T, HV, V\]"),
        "k_shape": (good | {"k": good["k"][..., :3]}, r"^k is \(2, 6, 2, 3\); expected \(2, 6, 2, 4\)"),
        "v_length": (good | {"v": good["v"][:, :5]}, r"^v is \(2, 5, 4, 3\); expected \(2, 6, 4, 3\)"),
        "g_heads": (good | {"g": good["g"][..., :2]}, r"^g is \(2, 6, 2\); expected \(2, 6, 4\)"),
        "beta_rank": (good | {"beta": good["beta"][0]}, r"^beta is \(6, 4\); expected \(2, 6, 4\)"),
        "state_rows": (good | {"initial_state": good["initial_state"][:1]}, r"^initial_state is \(1, 4, 4, 3\); expected \(2,"),
        "heads": (
            good | {name: good[name][:, :, :3] for name in ("v", "g", "beta")} | {"initial_state": None},
            "v has 3 heads; expected a multiple of the 2 heads",
        ),
        "packed_batch": (good | {"cu_seqlens": boundaries([2, 4])}, "cu_seqlens with a batch of 2"),
        "packed_state": (one | {"cu_seqlens": boundaries([2, 4])}, r"^initial_state is \(1, .*expected \(2, 4, 4, 3\)"),
        "packed_dtype": (packed([0, 6], torch.int64), "cu_seqlens is torch.int64.*expected int32"),
        "packed_short": (packed([0]), r"cu_seqlens is torch.int32 \(1,\).*N >= 1"),
        "packed_start": (packed([1, 6]), "cu_seqlens runs from 1 to 6; expected 0 to T = 6"),
        "packed_end": (packed([0, 5]), "cu_seqlens runs from 0 to 5; expected 0 to T = 6"),
        "packed_falls": (packed([0, 4, 3, 6]), "cu_seqlens.*without falling"),
    }


@pytest.mark.parametrize("case", bad_inputs())
def test_bad_input_is_refused_by_name(case: str) -> None:
    arguments, message = bad_inputs()[case]
    for rule in (gated_delta_rule, gated_delta_rule_with_state):
        with pytest.raises(ValueError, match=message):
            rule(**arguments)


def test_unknown_backend_is_refused_with_the_ones_there_are() -> None:
    inputs = rule_inputs(Shape(1, 1, 1, 1, 4, 4))
    with pytest.raises(BackendError, match=r"'naive'.*'auto'.*'reference'.*'torch'.*'triton'"):
        gated_delta_rule(**inputs, backend="naive")  # type: ignore[arg-type]
    state = inputs.pop("initial_state")
    with pytest.raises(BackendError, match="'naive'"):
        gated_delta_rule_step(**{n: x[:, 0] for n, x in inputs.items()}, state=state, backend="naive")  # type: ignore[arg-type]


def test_the_automatic_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    backend_module._log_choice.cache_clear()
    inputs = rule_inputs(Shape(1, 1, 1, 1, 4, 4))
    with caplog.at_level(logging.INFO, logger="gdn"):
        for _ in range(3):
            gated_delta_rule(**inputs)
    assert [record.message for record in caplog.records if "backend" in record.message] == [caplog.messages[0]]
    assert "'torch'" in caplog.messages[0] and "float64" in caplog.messages[0]


# --- recorded outputs of flash-linear-attention ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_recorded_outputs_and_gradients(backend: Any, test_data: Callable[[str], Path]) -> None:
    """From the layer's inputs before activation: the gates' and the rule's gradients in one."""
    recorded = load_file(test_data("fixtures/gated_deltanet_a.safetensors"))
    x = {name[3:]: tensor for name, tensor in recorded.items() if name.startswith("op.")}
    names = ["q", "k", "v", "a", "b", "A_log", "dt_bias", "h0"]
    leaves = {name: x[name].clone().requires_grad_() for name in names}
    o, final_state = gated_delta_rule_with_state(
        normalised(leaves["q"]),
        normalised(leaves["k"]),
        leaves["v"],
        decay_gate(leaves["a"], leaves["A_log"], leaves["dt_bias"]),
        beta_gate(leaves["b"], allow_neg_eigval=False),
        initial_state=leaves["h0"],
        backend=backend,
    )
    gradients = torch.autograd.grad([o, final_state], list(leaves.values()), [x["do"], x["dht"]])
    got = {"o": o, "ht": final_state} | {f"d{name}": d for name, d in zip(names, gradients)}
    assert_close(got, {name: x[name] for name in got}, torch.float32)
    kernel = {"o": x["o_fla_bf16"], "ht": x["ht_fla_bf16"]}
    assert_close({name: got[name] for name in kernel}, kernel, torch.bfloat16)
