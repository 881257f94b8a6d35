"""The rule's Triton kernels: in the interpreter on a CPU in float32 and float16, on a GPU if there is one.

On a Hopper GPU, 16-bit inputs with V a multiple of 128 take that GPU's own kernels: `test_triton_gpu.py`.
"""

from typing import Any

import pytest
import torch
from ops_testing import (
    GATES,
    TOLERANCE,
    PoisonedMemory,
    Shape,
    assert_close,
    boundaries,
    relative_error,
    rule_inputs,
    run_rule,
)
from torch import Tensor

from gdn.errors import BackendError
from gdn.ops import gated_delta_rule, gated_delta_rule_with_state

pytest.importorskip("triton")

from triton._C.libtriton.ir import INPUT_PRECISION
from triton.language import float32 as float32_type
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

if torch.cuda.is_available():
    pytest.skip("test_triton_gpu.py has these on a GPU", allow_module_level=True)

from gdn.ops import triton_backward, triton_forward, triton_segments
from gdn.ops.triton_rule import _rule_inference, _rule_training

HALF = 2e-3  # relative 2-norm of float16 results
SMALL = Shape(1, 75, 1, 2, 64, 32)
NAMES = ("q", "k", "v", "g", "beta", "initial_state")


def half_inputs(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """q, k, v in float16, the rest in float32, as training has them."""
    return {name: x.half() if name in "qkv" else x.float() for name, x in inputs.items()}


def run_mixed(inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """As `run_rule`, each tensor in the dtype it has."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    o, final_state = gated_delta_rule_with_state(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (o, final_state)]
    gradients = torch.autograd.grad([o, final_state], list(leaves.values()), upstream)
    assert all(d.dtype == x.dtype for d, x in zip(gradients, leaves.values()))
    return {"o": o.detach(), "final_state": final_state.detach()} | {f"d_{n}": d for n, d in zip(leaves, gradients)}


def float32(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.float() for name, x in inputs.items()}


def alone(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: x[row : row + 1] for name, x in inputs.items()}


# --- against the reference ------------------------------------------------------------------------------------------------

SHAPES = [
    Shape(2, 1, 1, 1, 64, 32),
    Shape(1, 15, 1, 2, 64, 64),
    Shape(2, 63, 1, 1, 64, 96),
    Shape(1, 64, 2, 2, 64, 32),
    Shape(1, 65, 1, 1, 128, 128),
    Shape(1, 130, 1, 2, 128, 32),
    Shape(1, 70, 1, 1, 256, 64),
    Shape(1, 66, 1, 1, 64, 320),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_matches_reference(shape: Shape) -> None:
    inputs = rule_inputs(shape)
    assert_close(run_rule(inputs, "triton", torch.float32), run_rule(inputs, "reference", torch.float64), torch.float32)


@pytest.mark.parametrize("keys", ["random", "repeated", "same_beta_2", "negative_eigenvalues", "zero_rows", "beta_0"])
@pytest.mark.parametrize("gate", GATES)
def test_float32_matches_reference_in_hard_cases(gate: str, keys: str) -> None:
    inputs = rule_inputs(Shape(1, 75, 1, 1, 64, 32), gate=gate, keys=keys)
    got, wanted = run_rule(inputs, "triton", torch.float32), run_rule(inputs, "reference", torch.float64)
    # Reflections by one key (beta = 2) with hardly any decay: the absolute values in a row of the inverse of 64 tokens add up
    # to 128, and rounding is amplified by as much; the PyTorch form with K = 128, in chunks of 64 too, has errors of 2e-5.
    bound = TOLERANCE[torch.float32] * (10 if keys == "same_beta_2" else 1)
    wrong = {name: error for name in wanted if not (error := relative_error(got[name], wanted[name])) <= bound}
    assert not wrong


@pytest.mark.parametrize("shape", [SMALL, Shape(1, 66, 1, 1, 128, 64)], ids=str)
def test_float16_matches_reference_of_the_rounded_inputs(shape: Shape) -> None:
    inputs = half_inputs(rule_inputs(shape))
    got = run_mixed(inputs, backend="triton")
    wanted = run_mixed({name: x.double() for name, x in inputs.items()}, backend="reference")
    wrong = {name: error for name in wanted if not (error := relative_error(got[name], wanted[name])) <= HALF}
    assert not wrong


@pytest.mark.parametrize(("g", "beta"), [(-5.0, 0.001), (-20.0, 0.5)])
def test_float16_keeps_the_digits_of_what_decay_and_small_beta_leave(g: float, beta: float) -> None:
    """Both make numbers that float16 has few digits for, or none: q . k scale beta; what the first token read of the state."""
    inputs = half_inputs(rule_inputs(SMALL))
    inputs |= {"g": torch.full_like(inputs["g"], g), "beta": torch.full_like(inputs["beta"], beta)}
    got = run_mixed(inputs, backend="triton")
    wanted = run_mixed({name: x.double() for name, x in inputs.items()}, backend="reference")
    assert relative_error(got["d_initial_state"], wanted["d_initial_state"]) <= 5e-4
    assert relative_error(got["o"], wanted["o"]) <= 6e-4


def test_float16_keeps_what_rounding_takes_from_the_writes() -> None:
    """Mild decay and every token a write: before it is multiplied by A, a write is rounded, which d_beta and the state show."""
    inputs = half_inputs(rule_inputs(Shape(1, 128, 4, 4, 64, 64), seed=3))
    inputs["g"] = torch.full_like(inputs["g"], -0.1)
    got = run_mixed(inputs, backend="triton")
    wanted = run_mixed({name: x.double() for name, x in inputs.items()}, backend="torch")
    assert relative_error(got["d_beta"], wanted["d_beta"]) <= 3.2e-4
    assert relative_error(got["final_state"], wanted["final_state"]) <= 2.5e-4


def test_the_initial_states_gradient_rounds_to_nearest_what_tensor_cores_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies tf32 as float32; here it takes of each operand what tensor cores take."""
    dot, cut = InterpreterBuilder.create_dot, []

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, most: int) -> Any:
        if precision == INPUT_PRECISION.TF32 and a.dtype == b.dtype == float32_type:
            a, b = (TensorHandle((x.data.view("int32") & -0x2000).view("float32"), x.dtype) for x in (a, b))
            cut.append(a)
        return dot(self, a, b, d, precision, most)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    inputs = half_inputs(rule_inputs(Shape(16, 1, 1, 2, 64, 64)))
    got = run_mixed(inputs, backend="triton")
    wanted = run_mixed({name: x.double() for name, x in inputs.items()}, backend="reference")
    assert cut and relative_error(got["d_initial_state"], wanted["d_initial_state"]) <= 4e-5


def test_a_nan_of_all_ones_is_not_rounded_to_a_number() -> None:
    inputs = half_inputs(rule_inputs(Shape(1, 1, 1, 1, 64, 32)))
    leaf = inputs.pop("initial_state").requires_grad_()
    _, final_state = gated_delta_rule_with_state(**inputs, initial_state=leaf, backend="triton")
    nan = torch.full(final_state.shape, 2**31 - 1, dtype=torch.int32).view(torch.float32)
    nan[:, :, 1:] = 0
    (d,) = torch.autograd.grad(final_state, leaf, nan)
    assert d.isnan().all()  # every key takes of the first key's


def test_no_initial_state_is_a_zero_state() -> None:
    inputs = rule_inputs(SMALL)
    inputs["initial_state"] = torch.zeros_like(inputs["initial_state"])
    wanted = run_rule(inputs, "reference", torch.float64)
    del inputs["initial_state"], wanted["d_initial_state"]
    assert_close(run_rule(inputs, "triton", torch.float32), wanted, torch.float32)


@pytest.mark.parametrize("of", ["o", "final_state"])
def test_gradients_of_one_result_alone(of: str) -> None:
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = {name: x.to(dtype).requires_grad_() for name, x in rule_inputs(SMALL).items()}
        o, final_state = gated_delta_rule_with_state(**leaves, backend=backend)  # type: ignore[arg-type]
        loss = (o if of == "o" else final_state).square().sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        results.append({name: torch.zeros_like(x) if d is None else d for (name, x), d in zip(leaves.items(), gradients)})
    assert_close(results[0], results[1], torch.float32)


def test_the_function_without_a_state_gives_the_same_bits() -> None:
    inputs = float32(rule_inputs(SMALL))
    o, _ = gated_delta_rule_with_state(**inputs, backend="triton")
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    assert torch.equal(gated_delta_rule(**leaves, backend="triton"), o)  # this one saves what the backward needs


# --- packed, split, batched: the same bits --------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[75], [20, 44], [0, 33, 7], [65, 1, 0, 64, 5, 0, 0]], ids=str)
def test_packed_documents_have_the_bits_they_have_alone(lengths: list[int]) -> None:
    bounds = boundaries(lengths).tolist()
    inputs = float32(rule_inputs(Shape(1, bounds[-1], 1, 2, 64, 32), N=len(lengths)))
    got = run_packed(inputs, lengths, inputs)
    for n, (start, end) in enumerate(zip(bounds, bounds[1:])):
        part = {name: x[n : n + 1] if name == "initial_state" else x[:, start:end] for name, x in inputs.items()}
        if start == end:
            assert torch.equal(got["final_state"][n], inputs["initial_state"][n])
            assert torch.equal(got["d_initial_state"][n], got["upstream_state"][n])
            continue
        leaves = {name: x.clone().requires_grad_() for name, x in part.items()}
        o, final_state = gated_delta_rule_with_state(**leaves, backend="triton")
        upstream = [got["upstream"][:, start:end], got["upstream_state"][n : n + 1]]
        gradients = torch.autograd.grad([o, final_state], list(leaves.values()), upstream)
        assert torch.equal(o, got["o"][:, start:end]) and torch.equal(final_state[0], got["final_state"][n])
        for name, d in zip(leaves, gradients):
            whole = got[f"d_{name}"]
            assert torch.equal(d, whole[n : n + 1] if name == "initial_state" else whole[:, start:end]), (n, name)


def run_packed(inputs: dict[str, Tensor], lengths: list[int], upstream_like: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    o, final_state = gated_delta_rule_with_state(**leaves, cu_seqlens=boundaries(lengths), backend="triton")
    generator = torch.Generator().manual_seed(3)
    do, d_state = (torch.randn(x.shape, generator=generator) for x in (o, final_state))
    gradients = torch.autograd.grad([o, final_state], list(leaves.values()), [do, d_state])
    results = {"o": o, "final_state": final_state, "upstream": do, "upstream_state": d_state}
    return {name: x.detach() for name, x in results.items()} | {f"d_{name}": d for name, d in zip(leaves, gradients)}


def test_packed_documents_never_see_each_other() -> None:
    """A neighbour full of nan changes no bit of a document's outputs, state or gradients."""
    lengths, mine = [33, 40, 0, 70, 5], (33, 73)
    inputs = float32(rule_inputs(Shape(1, sum(lengths), 1, 1, 64, 32), N=len(lengths)))
    poisoned = {name: torch.full_like(x, torch.nan) for name, x in inputs.items()}
    for name, x in inputs.items():
        part = slice(1, 2) if name == "initial_state" else (slice(None), slice(*mine))
        poisoned[name][part] = x[part]
    clean, beside = (run_packed(tensors, lengths, inputs) for tensors in (inputs, poisoned))
    for name in ("final_state", "d_initial_state"):
        assert torch.equal(clean[name][1], beside[name][1])
    for name in ("o", "d_q", "d_k", "d_v", "d_g", "d_beta"):
        assert torch.equal(clean[name][:, slice(*mine)], beside[name][:, slice(*mine)]), name


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    inputs = float32(rule_inputs(Shape(3, 70, 1, 1, 64, 32)))
    whole = run_mixed(inputs, backend="triton")
    for row in range(3):
        leaves = {name: x.clone().requires_grad_() for name, x in alone(inputs, row).items()}
        o, final_state = gated_delta_rule_with_state(**leaves, backend="triton")
        generator = torch.Generator().manual_seed(1)
        do, d_state = (torch.randn(x.shape, generator=generator) for x in (whole["o"], whole["final_state"]))
        upstream = [do[row : row + 1], d_state[row : row + 1]]
        gradients = torch.autograd.grad([o, final_state], list(leaves.values()), upstream)
        got = {"o": o, "final_state": final_state} | {f"d_{n}": d for n, d in zip(leaves, gradients)}
        assert all(torch.equal(got[name][0], whole[name][row]) for name in whole)


def test_padding_behind_a_row_changes_none_of_its_bits() -> None:
    inputs = float32(rule_inputs(Shape(1, 140, 1, 1, 64, 32)))
    o = gated_delta_rule(**inputs, backend="triton")
    short = {name: x if name == "initial_state" else x[:, :75] for name, x in inputs.items()}
    assert torch.equal(gated_delta_rule(**short, backend="triton"), o[:, :75])


@pytest.mark.parametrize("cuts", [[64], [128], [64, 128], [192]], ids=str)
def test_a_prefill_split_on_the_grid_has_the_same_bits(cuts: list[int]) -> None:
    inputs = float32(rule_inputs(Shape(1, 200, 1, 1, 64, 32)))
    o, final_state = gated_delta_rule_with_state(**inputs, backend="triton")
    state, outputs = inputs["initial_state"], []
    for start, end in zip([0, *cuts], [*cuts, 200]):
        part = {name: x[:, start:end] for name, x in inputs.items() if name != "initial_state"}
        piece, state = gated_delta_rule_with_state(**part, initial_state=state, backend="triton")
        outputs.append(piece)
    assert torch.equal(torch.cat(outputs, dim=1), o) and torch.equal(state, final_state)


@pytest.mark.parametrize("lengths", [None, [33, 0, 40, 2]], ids=["batch", "packed"])
def test_two_runs_have_the_same_bits(lengths: list[int] | None) -> None:
    inputs = half_inputs(rule_inputs(Shape(1, 75, 1, 2, 64, 32), N=len(lengths or [0])))
    cu_seqlens = None if lengths is None else boundaries(lengths)
    first, second = (run_mixed(inputs, cu_seqlens=cu_seqlens, backend="triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_long_sequence_is_cut_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = rule_inputs(Shape(2, 256, 1, 2, 64, 32), gate="weak")
    whole = run_rule(inputs, "triton", torch.float32)
    monkeypatch.setattr(triton_segments, "SEGMENT", 64)
    monkeypatch.setattr(triton_segments, "LONG", 256)
    cuts: list[int] = []
    chain = triton_segments.chain
    for module in ("triton_forward", "triton_backward"):
        monkeypatch.setattr(f"gdn.ops.{module}.chain", lambda *a, **k: cuts.append(a[3].parts) or chain(*a, **k))
    cut = run_rule(inputs, "triton", torch.float32)
    assert cuts == [4, 4] and any(not torch.equal(cut[name], whole[name]) for name in cut)
    assert_close(cut, run_rule(inputs, "reference", torch.float64), torch.float32)
    del inputs["initial_state"]
    assert_close(run_rule(inputs, "triton", torch.float32), run_rule(inputs, "reference", torch.float64), torch.float32)


# --- memory, layout, compilation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, [33, 0, 40, 2]], ids=["batch", "packed"])
def test_no_uninitialised_memory_is_read(lengths: list[int] | None) -> None:
    inputs = rule_inputs(Shape(1, 75, 1, 2, 64, 32), N=len(lengths or [0]))
    cu_seqlens = None if lengths is None else boundaries(lengths)
    wanted = run_rule(inputs, "reference", torch.float64, cu_seqlens=cu_seqlens)
    generator = torch.Generator().manual_seed(1)
    do, d_state = (torch.randn(wanted[name].shape, generator=generator) for name in ("o", "final_state"))
    x, chunks = float32(inputs), triton_forward.chunks_of(1, 75, cu_seqlens)
    with PoisonedMemory() as poison:  # a mode does not see into an operator: the launchers themselves
        forward = triton_forward.forward(
            *(x[name] for name in NAMES[:5]), 0.125, x["initial_state"], chunks, with_final_state=True, for_backward=True
        )
        assert forward.X is not None and forward.states is not None
        gradients = triton_backward.backward(
            x["q"], x["k"], 0.125, forward.intra, forward.X, forward.states, do, d_state, chunks, with_initial_state=True
        )
    assert poison.filled
    got = {"o": forward.o, "final_state": forward.final_state} | {f"d_{n}": d for n, d in zip(NAMES, gradients)}
    assert_close(got, wanted, torch.float32)  # type: ignore[arg-type]


def test_nothing_beside_the_inputs_is_read() -> None:
    """Each input lies between blocks of nan; a read outside it would reach the outputs."""
    inputs = float32(rule_inputs(Shape(1, 70, 1, 1, 64, 32)))
    guarded = {}
    for name, x in inputs.items():
        block = torch.full((3 * 8192 + x.numel(),), torch.nan)
        guarded[name] = block[8192 : 8192 + x.numel()].view(x.shape).copy_(x)
    chunks = triton_forward.chunks_of(1, 70, None)
    results = [
        triton_forward.forward(
            x["q"],
            x["k"],
            x["v"],
            x["g"],
            x["beta"],
            0.125,
            x["initial_state"],
            chunks,
            with_final_state=True,
            for_backward=True,
        )
        for x in (inputs, guarded)
    ]
    for plain, between in zip((*results[0][:4], *results[0].intra), (*results[1][:4], *results[1].intra)):
        assert torch.equal(plain, between) and between.isfinite().all()


@pytest.mark.parametrize("lengths", [None, [40, 0, 35]], ids=["batch", "packed"])
def test_strided_inputs_and_expanded_gradients(lengths: list[int] | None) -> None:
    inputs = rule_inputs(Shape(1, 75, 2, 2, 64, 32), N=len(lengths or [0]))
    cu_seqlens = None if lengths is None else boundaries(lengths)
    results = []
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        leaves = {name: x.to(dtype).mT.contiguous().mT.requires_grad_() for name, x in inputs.items()}
        o, final_state = gated_delta_rule_with_state(**leaves, cu_seqlens=cu_seqlens, backend=backend)  # type: ignore[arg-type]
        gradients = torch.autograd.grad(o.sum() + final_state.sum(), list(leaves.values()))  # gradients of stride 0
        results.append({"o": o, "final_state": final_state} | dict(zip(leaves, gradients)))
    assert_close(results[1], results[0], torch.float32)


def test_inputs_stay_as_they_are_and_graphs_can_be_kept() -> None:
    inputs = float32(rule_inputs(SMALL))
    before = {name: x.clone() for name, x in inputs.items()}
    loss = gated_delta_rule(**{n: x.requires_grad_() for n, x in inputs.items()}, backend="triton").square().sum()
    first, second = (torch.autograd.grad(loss, list(inputs.values()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second))
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


@pytest.mark.parametrize("lengths", [None, [1, 1, 1]], ids=["batch", "packed"])
def test_operators_keep_their_contract_with_pytorch(lengths: list[int] | None) -> None:
    """Packed so that every chunk there is room for is one: of the others nothing is written."""
    inputs = float32(rule_inputs(Shape(1, 3, 1, 1, 64, 32), N=len(lengths or [0])))
    cu_seqlens = None if lengths is None else boundaries(lengths)
    tensors = [inputs[name] for name in NAMES]
    plain = (*tensors[:5], 0.125, tensors[5], cu_seqlens, True)
    torch.library.opcheck(_rule_inference, plain)
    leaves = [x.clone().requires_grad_() for x in tensors]
    torch.library.opcheck(_rule_training, (*leaves[:5], 0.125, leaves[5], cu_seqlens, True))
    torch.library.opcheck(_rule_training, (*leaves[:5], 0.125, None, cu_seqlens, False))


@pytest.mark.parametrize("lengths", [None, [33, 0, 42]], ids=["batch", "packed"])
def test_compiled_as_one_graph(lengths: list[int] | None) -> None:
    inputs = float32(rule_inputs(SMALL, N=len(lengths or [0])))
    cu_seqlens = None if lengths is None else boundaries(lengths)

    def loss(*tensors: Tensor) -> Tensor:
        o, state = gated_delta_rule_with_state(*tensors[:5], initial_state=tensors[5], cu_seqlens=cu_seqlens, backend="triton")
        return o.square().sum() + state.square().sum()

    leaves = [x.requires_grad_() for x in inputs.values()]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    wanted, got = (torch.autograd.grad(f(*leaves), leaves) for f in (loss, compiled))
    assert all(torch.equal(x, y) for x, y in zip(got, wanted))


# --- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("K", "V", "dtype", "message"),
    [
        (32, 64, torch.float32, r"K = 32, V = 64; expected K in \{64, 128, 256\} and V a multiple of 32 up to 512"),
        (64, 48, torch.float32, "K = 64, V = 48"),
        (64, 544, torch.float32, "K = 64, V = 544"),
        (64, 64, torch.float64, "float64; expected bfloat16, float16 or float32"),
    ],
    ids=str,
)
def test_what_the_kernels_cannot_do_is_refused_and_auto_takes_pytorch(K: int, V: int, dtype: torch.dtype, message: str) -> None:
    inputs = {name: x.to(dtype) for name, x in rule_inputs(Shape(1, 2, 1, 1, K, V)).items()}
    with pytest.raises(BackendError, match=message):
        gated_delta_rule(**inputs, backend="triton")
    assert torch.equal(gated_delta_rule(**inputs), gated_delta_rule(**inputs, backend="torch"))


def test_on_a_cpu_without_the_interpreter_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    inputs = float32(rule_inputs(Shape(1, 2, 1, 1, 64, 32)))
    with pytest.raises(BackendError, match="tensors lie on cpu; expected cuda"):
        gated_delta_rule(**inputs, backend="triton")


@pytest.mark.parametrize("shape", [Shape(2, 0, 1, 1, 64, 32), Shape(0, 5, 1, 1, 64, 32)], ids=str)
def test_nothing_to_do_is_done(shape: Shape) -> None:
    inputs = float32(rule_inputs(shape))
    o, final_state = gated_delta_rule_with_state(**inputs, backend="triton")
    assert o.shape == inputs["v"].shape and torch.equal(final_state, inputs["initial_state"])
