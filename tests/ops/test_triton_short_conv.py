"""The GPU kernels between projection and rule, under the interpreter or on a GPU: numbers, all gradients, packing, steps."""

import os
from typing import Any, NamedTuple

import pytest
import torch
from ops_testing import TOLERANCE, PoisonedMemory, boundaries, relative_error
from torch import Tensor

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from gdn.ops import l2_norm, short_conv_with_state, triton_short_conv, triton_short_conv_backward  # noqa: E402
from gdn.ops.triton_gates import gates_forward  # noqa: E402
from gdn.ops.triton_short_conv import conv_final_state, conv_forward, conv_step  # noqa: E402
from gdn.ops.triton_short_conv_backward import conv_backward  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
LIMIT = TOLERANCE | {torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def short_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter walks whole strips however few tokens there are, and takes as long for one strip as for many."""
    if INTERPRETED:
        for module, way in (triton_short_conv, "FORWARD"), (triton_short_conv_backward, "BACKWARD"):
            monkeypatch.setattr(module, f"{way}_TOKENS", 8)
            monkeypatch.setattr(module, f"{way}_WARPS", 4)  # strips beside each other, in one program


class Case(NamedTuple):
    B: int = 1
    T: int = 65
    H: int = 1
    HV: int = 2
    K: int = 64
    V: int = 32
    W: int = 4
    bias: bool = False
    state: bool = False
    lengths: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32

    @property
    def D(self) -> int:
        return 2 * self.H * self.K + self.HV * self.V

    @property
    def N(self) -> int:
        return self.B if self.lengths is None else len(self.lengths)

    @property
    def heads(self) -> tuple[int, int, int, int]:
        return self.H, self.K, self.HV, self.V

    def __str__(self) -> str:
        changed = [f"{name}={value}" for name, value in self._asdict().items() if value != self._field_defaults[name]]
        return ",".join(changed).replace("torch.", "").replace(" ", "") or "plain"


def strided(values: Tensor) -> Tensor:
    """The same values [B, T, P] between nan: rows before and after, and columns beyond."""
    B, T, P = values.shape
    view = torch.full((B, T + 9, P + 7), torch.nan, device=values.device, dtype=values.dtype)[:, 4:-5, :P]
    return view.copy_(values)


def make(case: Case, seed: int = 0) -> dict[str, Any]:
    """proj with 2 HV + 3 columns beyond D, parameters, state, boundaries and gradients of q, k, v."""
    B, T, H, HV, K, V, W, *_ = case
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(DEVICE)

    proj = normal(B, T, case.D + 2 * HV + 3)
    proj[..., case.D :] = torch.nan
    return {
        "proj": strided(proj.to(case.dtype)),
        "weight": normal(case.D, W),
        "bias": normal(case.D) if case.bias else None,
        "initial_state": normal(case.N, W - 1, case.D).to(case.dtype) if case.state else None,
        "cu_seqlens": None if case.lengths is None else boundaries(case.lengths).to(DEVICE),
        "d": [normal(*sizes).to(case.dtype) for sizes in ((B, T, H, K), (B, T, H, K), (B, T, HV, V))],
    }


def run(case: Case, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """All that forward and backward give, in poisoned memory; checks what must not be written."""
    proj, weight, bias, initial_state, cu_seqlens, d = inputs.values()
    buffer = strided(torch.full_like(proj, torch.nan))
    with PoisonedMemory():
        q, k, v = conv_forward(proj, weight, bias, *case.heads, initial_state, cu_seqlens)
        state = conv_final_state(proj, initial_state, cu_seqlens, case.W, case.D)
        d_weight, d_bias, d_state = conv_backward(proj, weight, bias, initial_state, cu_seqlens, *d, buffer)
    assert q.dtype == k.dtype == v.dtype == state.dtype == proj.dtype and d_weight.dtype == torch.float32
    assert all(x.is_contiguous() for x in (q, k, v))
    written = int(buffer._base.isfinite().sum()) if buffer._base is not None else 0
    assert written == buffer[..., : case.D].numel()  # nothing around the gradient was
    got = {"q": q, "k": k, "v": v, "state": state, "d_proj": buffer[..., : case.D], "d_weight": d_weight}
    assert (d_bias is None) == (bias is None) and (d_state is None) == (initial_state is None)
    return got | {name: x for name, x in (("d_bias", d_bias), ("d_state", d_state)) if x is not None}


def wanted(case: Case, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The torch path in float64 and its gradients."""
    x, weight, bias, initial_state = (
        None if value is None else value.double().requires_grad_()
        for value in (inputs["proj"][..., : case.D], *list(inputs.values())[1:4])
    )
    y, state = short_conv_with_state(x, weight, bias, initial_state=initial_state, cu_seqlens=inputs["cu_seqlens"])
    parts = y.split([case.H * case.K, case.H * case.K, case.HV * case.V], dim=-1)
    q, k, v = (part.unflatten(-1, d.shape[2:]) for part, d in zip(parts, inputs["d"]))
    q, k = l2_norm(q), l2_norm(k)
    leaves = {"d_proj": x, "d_weight": weight, "d_bias": bias, "d_state": initial_state}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    d = torch.autograd.grad([q, k, v], list(leaves.values()), [d.double() for d in inputs["d"]], materialize_grads=True)
    return {"q": q, "k": k, "v": v, "state": state} | dict(zip(leaves, d))


CASES = [
    Case(T=1, V=96, bias=True, state=True),
    Case(B=2, T=3),
    Case(B=3, T=63, HV=1, V=64),
    Case(T=64, W=2, H=2, HV=4, bias=True),
    Case(B=2, T=65, state=True, bias=True),
    Case(T=130, V=96),
    Case(T=40, K=128, V=96, W=2),
    Case(T=18, K=256, HV=1, V=256),
    Case(B=2, T=7, W=1, bias=True),
    Case(B=2, T=40, W=3, state=True),
    Case(B=2, T=21, W=8, HV=1, state=True, bias=True),
    Case(T=131, lengths=(64, 1, 0, 2, 63, 1, 0, 0)),
    Case(T=36, lengths=(16, 1, 0, 2, 15, 2, 0, 0), state=True, bias=True),
    Case(T=25, W=8, HV=1, lengths=(3, 9, 1, 12, 0), state=True),
    Case(T=40, W=1, HV=1, lengths=(3, 9, 1, 27, 0)),
    Case(B=2, T=20, state=True, bias=True, dtype=torch.float16),
    Case(T=20, lengths=(5, 15), dtype=torch.float16),
]
if not INTERPRETED:
    CASES += [case._replace(dtype=torch.bfloat16) for case in CASES if case.dtype == torch.float32]
    CASES += [Case(B=2, T=2048, H=4, HV=4, K=256, V=256, dtype=torch.bfloat16), Case(T=300, H=2, HV=4, K=64, V=512)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case) -> None:
    inputs = make(case)
    got, exact = run(case, inputs), wanted(case, inputs)
    assert got.keys() == exact.keys()
    errors = {name: relative_error(got[name], exact[name]) for name in exact}
    assert all(error <= LIMIT[case.dtype] for error in errors.values()), errors
    assert torch.equal(got["state"].double(), exact["state"])


def test_a_weight_of_the_projections_dtype() -> None:
    case = Case(T=20, dtype=torch.float16, bias=True)
    inputs = make(case)
    narrow = inputs | {"weight": inputs["weight"].half(), "bias": inputs["bias"].half()}
    same = inputs | {"weight": narrow["weight"].float(), "bias": narrow["bias"].float()}
    got, exact = run(case, narrow), run(case, same)
    assert all(torch.equal(got[name], exact[name]) for name in exact)


def test_packed_sequences_have_the_bits_of_each_alone() -> None:
    lengths = (17, 1, 3, 0, 26, 0)
    case = Case(T=sum(lengths), HV=1, V=64, bias=True, state=True, lengths=lengths)
    inputs = make(case)
    packed = run(case, inputs)
    bounds = inputs["cu_seqlens"].tolist()
    for n, (start, end) in enumerate(zip(bounds, bounds[1:])):
        own = {
            **inputs,
            "proj": inputs["proj"][:, start:end],
            "initial_state": inputs["initial_state"][n : n + 1],
            "cu_seqlens": None,
            "d": [d[:, start:end] for d in inputs["d"]],
        }
        alone = run(case._replace(T=end - start, lengths=None), own)
        for name in ("q", "k", "v", "d_proj"):
            assert torch.equal(alone[name][0], packed[name][0, start:end]), (name, n)
        for name in ("state", "d_state"):
            assert torch.equal(alone[name][0], packed[name][n]), (name, n)


def test_a_row_has_the_same_bits_in_any_batch_and_a_token_before_any_others() -> None:
    case = Case(B=2, T=21, HV=1, V=64, bias=True, state=True)
    inputs = make(case)
    whole = run(case, inputs)
    for row in range(2):
        own = {name: x[row : row + 1] if name in ("proj", "initial_state") else x for name, x in inputs.items()}
        own["d"] = [d[row : row + 1] for d in inputs["d"]]
        alone = run(case._replace(B=1), own)
        for name in ("q", "k", "v", "state", "d_proj", "d_state"):
            assert torch.equal(alone[name][0], whole[name][row]), (name, row)
    shorter = run(case._replace(T=12), inputs | {"proj": inputs["proj"][:, :12], "d": [d[:, :12] for d in inputs["d"]]})
    for name in ("q", "k", "v"):
        assert torch.equal(shorter[name], whole[name][:, :12]), name
    assert torch.equal(shorter["d_proj"][:, :9], whole["d_proj"][:, :9])  # later ones see tokens that are gone


@pytest.mark.parametrize("case", [Case(B=2, T=27), Case(T=27, lengths=(10, 17))], ids=str)
def test_strips_change_no_bit_but_those_of_sums_over_tokens(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(case)
    short, again = run(case, inputs), run(case, inputs)
    assert all(torch.equal(short[name], again[name]) for name in short)
    monkeypatch.setattr(triton_short_conv, "FORWARD_TOKENS", 16)
    monkeypatch.setattr(triton_short_conv_backward, "BACKWARD_TOKENS", 20)
    usual = run(case, inputs)
    for name in ("q", "k", "v", "d_proj"):
        assert torch.equal(short[name], usual[name]), name
    assert relative_error(short["d_weight"], usual["d_weight"]) < 1e-6


def test_finite_for_large_and_zero_inputs() -> None:
    case = Case(B=1, T=24, HV=1, V=64, bias=True)
    inputs = make(case)
    sizes = torch.tensor([0, 1e-38, 1e-20, 1, 1e4, 1e18, 1e19, 1e30], device=DEVICE).repeat_interleave(3)
    inputs["proj"].mul_(sizes[:, None])
    inputs["bias"].zero_()
    inputs["d"][0].mul_(1e10)  # of q; v's gradients would be beyond float32
    for name, x in run(case, inputs).items():
        assert x.isfinite().all(), name


def test_an_empty_sequence() -> None:
    case = Case(B=2, T=0, HV=1, V=64, bias=True, state=True)
    inputs = make(case)
    got = run(case, inputs)
    assert torch.equal(got["state"], inputs["initial_state"])
    assert not got["d_weight"].any() and not got["d_bias"].any() and not got["d_state"].any()


@pytest.mark.parametrize(
    "case, state_dtype",
    [
        (Case(B=2, T=6, V=96), torch.float32),
        (Case(B=3, T=4, W=2, H=2, HV=4, K=128, bias=True), torch.float16),
        (Case(T=3, W=1), torch.float32),
    ],
    ids=str,
)
def test_step_by_step_is_the_whole(case: Case, state_dtype: torch.dtype) -> None:
    B, T, HV, W, D = case.B, case.T, case.HV, case.W, case.D
    case = case._replace(state=True, dtype=torch.float16)
    inputs = make(case)
    proj, weight, bias, initial_state = list(inputs.values())[:4]
    proj[..., D : D + 2 * HV] = torch.randn(B, T, 2 * HV, generator=torch.Generator().manual_seed(5)).to(proj)
    A_log, dt_bias = torch.linspace(0, 2, HV, device=DEVICE), torch.linspace(-4, 0, HV, device=DEVICE)
    q, k, v = conv_forward(proj, weight, bias, *case.heads, initial_state, None)
    g, beta = gates_forward(proj, D, D + HV, A_log, dt_bias, True)
    states = torch.full((B + 2, W + 1, D + 5), torch.nan, device=DEVICE, dtype=state_dtype)
    state = states[1:-1, 1:W, :D]
    state.copy_(initial_state)
    for t in range(T):
        with PoisonedMemory():
            got = conv_step(proj[:, t], weight, bias, state, A_log, dt_bias, True, *case.heads)
        for name, x, whole in zip(("q", "k", "v", "g", "beta"), got, (q, k, v, g, beta)):
            assert x.dtype == whole.dtype and x.is_contiguous()
            # The same arithmetic, but for the order of the norm's sum: in float16 a last bit at times.
            assert relative_error(x, whole[:, t]) < 1e-3, (name, t)
    assert torch.equal(state, conv_final_state(proj, initial_state, None, W, D).to(state_dtype))
    assert int(states.isfinite().sum()) == state.numel()


def test_a_step_has_the_same_bits_in_any_batch() -> None:
    case = Case(B=4, T=1, state=True, bias=True)
    inputs = make(case)
    proj, weight, bias, initial_state = list(inputs.values())[:4]
    proj[..., case.D : case.D + 4] = 0.5
    gates = torch.zeros(2, device=DEVICE), torch.zeros(2, device=DEVICE), False

    def step(rows: slice) -> tuple[Tensor, ...]:
        state = initial_state[rows].clone()
        return *conv_step(proj[rows, 0], weight, bias, state, *gates, *case.heads), state

    whole = step(slice(None))
    for row in range(4):
        for x, y in zip(step(slice(row, row + 1)), whole):
            assert torch.equal(x[0], y[row])


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
def test_beyond_two_to_the_31_elements() -> None:
    case = Case(B=2, T=9, HV=1, V=64, dtype=torch.bfloat16)
    inputs = make(case)
    P = inputs["proj"].shape[-1]
    far = torch.empty(2**31 + 16 * P, device=DEVICE, dtype=torch.bfloat16).as_strided((2, 9, P), (2**31, P, 1))
    far.copy_(inputs["proj"])
    for name, x in conv_results(case, inputs | {"proj": far}).items():
        assert torch.equal(x, conv_results(case, inputs)[name]), name


def conv_results(case: Case, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """q, k, v and the gradient of proj, written into memory of proj's own strides."""
    proj, weight, bias, initial_state, cu_seqlens, d = inputs.values()
    q, k, v = conv_forward(proj, weight, bias, *case.heads, initial_state, cu_seqlens)
    dproj = torch.empty_strided(proj.shape, proj.stride(), device=proj.device, dtype=proj.dtype)
    conv_backward(proj, weight, bias, initial_state, cu_seqlens, *d, dproj)
    return {"q": q, "k": k, "v": v, "d_proj": dproj[..., : case.D].clone()}


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
def test_neither_waits_for_the_device_and_a_step_is_captured() -> None:
    case = Case(T=36, lengths=(16, 1, 0, 2, 15, 2, 0, 0), state=True, bias=True)
    inputs = make(case)
    proj, weight, bias, initial_state, cu_seqlens, d = inputs.values()
    dproj = torch.empty_like(proj)

    def everything() -> Tensor:
        q, _, _ = conv_forward(proj, weight, bias, *case.heads, initial_state, cu_seqlens)
        conv_final_state(proj, initial_state, cu_seqlens, case.W, case.D)
        conv_backward(proj, weight, bias, initial_state, cu_seqlens, *d, dproj)
        return q

    everything()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    row, state = torch.zeros_like(proj[0, :2]).nan_to_num(), initial_state[:2].clone()
    parameters = torch.zeros(2, device=DEVICE), torch.zeros(2, device=DEVICE), False
    conv_step(row, weight, bias, state.clone(), *parameters, *case.heads)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = everything()
        conv_step(row, weight, bias, state, *parameters, *case.heads)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(q, expected) and torch.equal(state[:, -1], row[:, : case.D].to(state.dtype))
