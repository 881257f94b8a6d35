"""The gates' GPU kernels, under the interpreter or on a GPU: numbers, gradients, extremes, memory around them, batches."""

import os

import pytest
import torch
from ops_testing import TOLERANCE, PoisonedMemory, relative_error
from torch import Tensor

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from gdn.ops import beta_gate, decay_gate  # noqa: E402
from gdn.ops.triton_gates import gates_backward, gates_forward  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
SHAPES = [(1, 1, 1), (2, 3, 4), (3, 65, 6), (2, 700, 4), (1, 130, 16)]
P, COLUMN_A, COLUMN_B = 71, 7, 40  # of a projection whose other columns are nan


def gate_inputs(B: int, T: int, HV: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(T)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(DEVICE)

    proj = torch.full((B, T + 2, P + 3), torch.nan, device=DEVICE, dtype=dtype)[:, 1:-1, :P]
    proj[..., COLUMN_A : COLUMN_A + HV], proj[..., COLUMN_B : COLUMN_B + HV] = 4 * normal(B, T, HV), 4 * normal(B, T, HV)
    return {
        "proj": proj, "A_log": normal(HV), "dt_bias": 3 * normal(HV) - 4, "dg": normal(B, T, HV), "dbeta": normal(B, T, HV)
    }  # fmt: skip


def run(inputs: dict[str, Tensor], double: bool = False) -> dict[str, Tensor]:
    """Everything the kernels return, into poisoned memory."""
    proj, A_log, dt_bias, HV = inputs["proj"], inputs["A_log"], inputs["dt_bias"], inputs["A_log"].numel()
    dproj = torch.full_like(proj, torch.nan)
    with PoisonedMemory():
        g, beta = gates_forward(proj, COLUMN_A, COLUMN_B, A_log, dt_bias, double)
        dA_log, ddt_bias = gates_backward(
            proj, COLUMN_A, COLUMN_B, A_log, dt_bias, double, inputs["dg"], inputs["dbeta"], dproj
        )  # fmt: skip
    assert g.dtype == beta.dtype == dA_log.dtype == ddt_bias.dtype == torch.float32
    da, db = dproj[..., COLUMN_A : COLUMN_A + HV], dproj[..., COLUMN_B : COLUMN_B + HV]
    assert int(dproj.isnan().sum()) == dproj.numel() - da.numel() - db.numel()  # no other column was written
    return {"g": g, "beta": beta, "da": da, "db": db, "dA_log": dA_log, "ddt_bias": ddt_bias}


def wanted(inputs: dict[str, Tensor], double: bool) -> dict[str, Tensor]:
    """The torch path and its gradients in float64."""
    HV = inputs["A_log"].numel()
    proj, A_log, dt_bias = (inputs[name].double().requires_grad_() for name in ("proj", "A_log", "dt_bias"))
    g = decay_gate(proj[..., COLUMN_A : COLUMN_A + HV], A_log, dt_bias)
    beta = beta_gate(proj[..., COLUMN_B : COLUMN_B + HV], double)
    d, dA_log, ddt_bias = torch.autograd.grad(
        [g, beta], [proj, A_log, dt_bias], [inputs["dg"].double(), inputs["dbeta"].double()]
    )
    da, db = d[..., COLUMN_A : COLUMN_A + HV], d[..., COLUMN_B : COLUMN_B + HV]
    return {"g": g, "beta": beta, "da": da, "db": db, "dA_log": dA_log, "ddt_bias": ddt_bias}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "B{}-T{}-HV{}".format(*shape))
def test_values_and_gradients(shape: tuple[int, int, int], double: bool, dtype: torch.dtype) -> None:
    inputs = gate_inputs(*shape, dtype)
    got, exact = run(inputs, double), wanted(inputs, double)
    for name in exact:
        assert relative_error(got[name], exact[name]) <= (TOLERANCE | {torch.float16: 2e-3})[got[name].dtype], name


def test_small_values_have_all_their_digits() -> None:
    """softplus of -16 is 1e-7: log(1 + that) would have hardly any left, as 1 - sigmoid(15) would."""
    inputs = gate_inputs(1, 40, 1, torch.float32)
    inputs["proj"][0, :, COLUMN_A] = torch.linspace(-30, -3, 40)
    inputs["proj"][0, :, COLUMN_B] = torch.linspace(-15, 15, 40)
    inputs |= {"A_log": torch.zeros(1, device=DEVICE), "dt_bias": torch.zeros(1, device=DEVICE)}
    got, exact = run(inputs), wanted(inputs, False)
    for name in ("g", "beta", "da", "db"):
        assert float(((got[name] - exact[name]) / exact[name]).detach().abs().max()) < 2e-6, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finite_for_all_finite_inputs(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    extremes = torch.tensor([0.0, 1.0, -1.0, 100.0, -100.0, 6e4, -6e4, largest, -largest], device=DEVICE)
    inputs = gate_inputs(1, 9, 9, dtype)
    inputs["proj"][..., COLUMN_A : COLUMN_A + 9] = extremes
    inputs["proj"][..., COLUMN_B : COLUMN_B + 9] = extremes
    for parameter in extremes.clamp(-3e38, 3e38).tolist():
        for name in ("A_log", "dt_bias"):
            got = run(inputs | {name: torch.full((9,), parameter, device=DEVICE)})
            for result in ("g", "beta", "dA_log", "ddt_bias", *(() if dtype == torch.float16 else ("da", "db"))):
                assert got[result].isfinite().all(), (name, parameter, result)
            assert not got["da"].isnan().any() and not got["db"].isnan().any()
            assert (got["g"] <= 0).all()


def test_a_row_has_the_same_bits_in_any_batch_and_length_and_twice() -> None:
    inputs = gate_inputs(3, 300, 6, torch.float32)
    names, whole = ("g", "beta", "da", "db"), run(inputs)
    again = run(inputs)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    for row in range(3):
        part = {name: inputs[name][row : row + 1, :77] for name in ("proj", "dg", "dbeta")}
        alone = run(inputs | part)
        assert all(torch.equal(alone[name][0], whole[name][row, :77]) for name in names)
