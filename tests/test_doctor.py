"""The doctor passes what is right here, and finds an operator, a kernel, a gradient and a dtype rule broken on purpose."""

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest
import torch
from rich.console import Console

from gdn import doctor, doctor_kernels
from gdn.doctor_kernels import Check
from gdn.generation import cpu_token as token_of_model
from gdn.ops import cpu_token
from gdn.ops.backend import pair_refusal

RULE = ("rule, cpu, K = V = 32", "rule, cpu, K = V = 64", "rule, cpu, K = V = 128", "rule, cpu, K = V = 256")
STEPS = "rule, cpu, single steps"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def by_name(checks: Iterable[Check]) -> dict[str, Check]:
    checks = list(checks)
    named = {check.name: check for check in checks}
    assert len(named) == len(checks)
    return named


def break_rule(monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any]) -> None:
    right = doctor_kernels.gated_delta_rule_with_state

    def broken(*tensors: Any, **rest: Any) -> Any:
        return change(*right(*tensors, **rest))

    monkeypatch.setattr(doctor_kernels, "gated_delta_rule_with_state", broken)
    monkeypatch.setattr(doctor_kernels, "KEY_DIMS", (32,))


def test_everything_is_examined_and_right_here() -> None:
    checks = by_name(doctor.examine())
    wanted = {"python", "torch", "cpu", "threads", "memory", "transformers", "zstandard", "pyarrow", "tensorboard"}
    assert checks.keys() >= wanted | {*RULE, STEPS, "backend on cpu", "decode dtype", "matrix product, float32"}
    assert [check for check in checks.values() if check.ok is False and check.name != "decode dtype"] == []
    assert all(checks[name].ok for name in (*RULE, STEPS))
    assert checks["backend on cpu"].detail.startswith("'auto' takes 'torch'; not 'triton': ")


def test_the_examined_process_keeps_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_kernels, "KEY_DIMS", (32,))
    torch.set_num_threads(2)
    assert all(check.ok for check in doctor_kernels.rule("cpu"))
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("where", [0, 1], ids=["o", "final_state"])
def test_a_wrong_forward_fails(where: int, monkeypatch: pytest.MonkeyPatch) -> None:
    break_rule(monkeypatch, lambda *out: tuple(x * (1 + 1e-4 * (i == where)) for i, x in enumerate(out)))
    check = by_name(doctor_kernels.rule("cpu"))[RULE[0]]
    assert check.ok is False
    assert (
        f"{('o', 'final_state')[where]} 1.0e-04" in check.detail and ("o", "final_state")[1 - where] + " " not in check.detail
    )


def test_nan_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    break_rule(monkeypatch, lambda o, final: (o * torch.nan, final))
    check = by_name(doctor_kernels.rule("cpu"))[RULE[0]]
    assert check.ok is False and "o nan" in check.detail


@pytest.mark.parametrize("which", range(6), ids=["q", "k", "v", "g", "beta", "initial_state"])
def test_a_wrong_gradient_fails_where_the_forward_is_right(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = doctor_kernels.gated_delta_rule_with_state

    def broken(*tensors: torch.Tensor, initial_state: torch.Tensor, **rest: Any) -> Any:
        inputs = [*tensors, initial_state]
        bent = inputs[which].clone()
        bent.register_hook(lambda gradient: gradient * 1.001)
        inputs[which] = bent
        return right(*inputs[:5], initial_state=inputs[5], **rest)

    monkeypatch.setattr(doctor_kernels, "gated_delta_rule_with_state", broken)
    monkeypatch.setattr(doctor_kernels, "KEY_DIMS", (32,))
    check = by_name(doctor_kernels.rule("cpu"))[RULE[0]]
    name = ("q", "k", "v", "g", "beta", "initial_state")[which]
    assert check.ok is False and check.detail == f"float32 above 1e-05: d_{name} 1.0e-03"


def test_an_operator_that_raises_fails_and_the_rest_is_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: Any) -> Any:
        raise RuntimeError("no kernel image")

    break_rule(monkeypatch, raises)
    checks = by_name(doctor_kernels.rule("cpu"))
    assert checks[RULE[0]] == Check(RULE[0], False, "float32 RuntimeError: no kernel image")
    assert checks[STEPS].ok is True


def test_a_wrong_step_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = doctor_kernels.gated_delta_rule_step

    def broken(*tensors: torch.Tensor, **rest: Any) -> torch.Tensor:
        o = right(*tensors, **rest)
        tensors[-1].mul_(1.001)
        return o

    monkeypatch.setattr(doctor_kernels, "gated_delta_rule_step", broken)
    assert by_name(doctor_kernels.rule("cpu"))[STEPS].ok is False


@pytest.mark.parametrize(
    ("version", "capability", "refused"),
    [
        ("3.6.0", (9, 0), None),
        ("3.7.0", (9, 0), None),  # transposes a tensor-core result wrongly; no kernel does that
        ("3.7.1", (9, 0), None),
        ("3.10.0+git12ab", (9, 0), None),
        ("4.0.0", (10, 3), "compute capability 10.3 has too little tensor memory"),
        ("4.0.0", (12, 1), None),
        ("3.5.1", (9, 0), "lacks the Gluon"),
        ("3.4.0", (9, 0), "pip install 'triton>=3.6'"),
        ("3.4.0", (8, 0), None),
        ("3.5.1", (8, 9), None),
        ("3.5.0", (12, 0), None),
        ("3.3.1", (8, 0), "Triton 3.3.1 is too old"),
        ("3.3.1", (9, 0), "pip install 'triton>=3.6'"),
        ("2.9.0", (8, 6), "too old"),
        ("3.6.0", (7, 5), "compute capability 7.5 is below 8.0"),
        ("3.6.0", (6, 1), "use backend 'torch'"),
        ("main", (9, 0), "expected a version like 3.6.0"),
    ],
)
def test_pairs_of_triton_and_gpu(version: str, capability: tuple[int, int], refused: str | None) -> None:
    refusal = pair_refusal(version, capability)
    assert refusal is None if refused is None else refusal is not None and refused in refusal and "\n" not in refusal


def on_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], version: str | None, backend: str | None = None
) -> list[Check]:
    """The kernels' examination with a GPU, a Triton and a backend's refusal made up; the kernels themselves are one line."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"triton": ["triton"]} if version else {})
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(doctor_kernels, "triton_refusal", lambda *_: backend)
    for layout in ("batches", "packed", "long_sequence"):
        one = lambda device, K, V, dtype, layout=layout: [Check(layout, True, f"{device} {K} {V} {dtype}")]  # noqa: E731
        monkeypatch.setattr(doctor_kernels, layout, one)
    monkeypatch.setattr(doctor_kernels, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers))
    return list(doctor_kernels.kernels_on_gpu())


def test_a_refused_pair_fails_and_no_kernel_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    failed, skipped = on_gpu(monkeypatch, (9, 0), "3.5.1")
    assert failed == Check("triton", False, pair_refusal("3.5.1", (9, 0)) or "")
    assert skipped.ok is None and skipped.detail.startswith("not run: Triton 3.5.1")


def test_kernels_are_run_where_nothing_refuses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, parts, *checks = on_gpu(monkeypatch, (9, 0), "3.6.0")
    assert pair == Check("triton", True, "3.6.0 on compute capability 9.0")
    wanted = [
        Check(layout, True, f"cuda {K} {V} {dtype}")
        for dtype in doctor_kernels.TOLERANCE
        for K, V in doctor_kernels.SIZES
        for layout in ("batches", "packed")
    ]
    wanted += [Check("long_sequence", True, f"cuda 64 64 {dtype}") for dtype in doctor_kernels.TOLERANCE]
    assert sorted(checks) == sorted(wanted) and parts.detail.startswith(f"{len(wanted)} parts in ")


def test_what_compiles_longest_begins_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_kernels, "as_completed", list)  # in the order they were submitted
    _, _, first, second, *_ = on_gpu(monkeypatch, (9, 0), "3.6.0")
    assert [first, second] == [Check(layout, True, "cuda 256 256 torch.float32") for layout in ("batches", "packed")]


def test_a_process_that_dies_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: Any) -> Any:
        raise BrokenProcessPool

    monkeypatch.setattr(ThreadPoolExecutor, "submit", dies)
    _, _, died = on_gpu(monkeypatch, (9, 0), "3.6.0")
    assert died.ok is False and "died" in died.detail


def test_no_triton_and_a_refusing_backend_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    (missing,) = on_gpu(monkeypatch, (9, 0), None)
    assert missing.ok is None and "pip install" in missing.detail
    pair, skipped = on_gpu(monkeypatch, (9, 0), "3.6.0", "the interpreter is on")
    assert pair.ok and skipped == Check("triton, kernels", None, "not run: the interpreter is on")


# Everything right; then results of single kernels a thousandth too large; then other bits at each call.
INTERPRETED = """
import json
from functools import partial
from unittest import mock
import torch
torch.set_num_threads(1)
from gdn import doctor_kernels
from gdn.ops import triton_conv_rule, triton_rule, triton_short_conv, triton_short_conv_backward, triton_step

triton_short_conv.FORWARD_TOKENS = triton_short_conv_backward.BACKWARD_TOKENS = 8
case = doctor_kernels.Case("cpu", 64, 32)

def scaled(x, fields):
    if isinstance(x, torch.Tensor):
        return x * 1.001
    if hasattr(x, "_fields"):
        return x._replace(**{name: getattr(x, name) * 1.001 for name in fields})
    return tuple(y * 1.001 if i in fields else y for i, y in enumerate(x))

def broken(module, name, *fields):
    right = getattr(module, name)
    return mock.patch.object(module, name, lambda *a, **k: scaled(right(*a, **k), fields))

def verdict(errors):
    return doctor_kernels._verdict("broken", errors, (torch.float32,))

found = {"right": [*doctor_kernels.batches("cpu", 64, 32, torch.float32), *doctor_kernels.packed("cpu", 64, 32, torch.float32)]}
found["broken"] = []
for name, field in [("forward", "o"), ("forward", "final_state")] + [
    ("backward", field) for field in ("dq", "dk", "dv", "dg", "dbeta", "d_initial_state")
]:
    with broken(triton_rule, name, field):
        found["broken"].append(verdict(partial(doctor_kernels._rule_errors, case, "triton")))
with broken(triton_conv_rule, "gates_backward", 0, 1), broken(triton_conv_rule, "conv_backward", 0):
    found["broken"].append(verdict(partial(doctor_kernels._conv_errors, case)))
with broken(triton_step, "step"):
    found["broken"].append(verdict(partial(doctor_kernels._both_step_errors, case)))

calls, forward = [], triton_rule.forward
def restless(*arguments, **rest):
    calls.append(0)
    result = forward(*arguments, **rest)
    return result._replace(o=result.o + 1e-6 * len(calls))
with mock.patch.object(triton_rule, "forward", restless):
    for results, rows in ((doctor_kernels._repeated, 1), (doctor_kernels._rows, 2)):
        found.setdefault("bits", []).append(
            doctor_kernels._same_bits("bits", partial(results, case._replace(B=rows), torch.float32))
        )
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def interpreted() -> dict[str, list[Check]]:
    """What the doctor says of the kernels under Triton's interpreter, which must be on before they are imported."""
    pytest.importorskip("triton")
    command = [sys.executable, "-c", INTERPRETED]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return {key: [Check(*check) for check in checks] for key, checks in json.loads(run.stdout).items()}


def test_the_kernels_pass(interpreted: dict[str, list[Check]]) -> None:
    checks = by_name(interpreted["right"])
    kinds = ("rule", "convolution and rule", "steps", "packed, rule", "packed, convolution and rule")
    bits = ("same bits twice", "rows of a batch = alone")
    assert checks.keys() == {f"triton, cpu, float32, K = 64, V = 32, {kind}" for kind in kinds + bits}
    assert [check for check in checks.values() if check.ok is not True] == []
    assert checks["triton, cpu, float32, K = 64, V = 32, rule"].detail.startswith("relative error at most float32 ")


def test_each_broken_kernel_fails(interpreted: dict[str, list[Check]]) -> None:
    tensors = ("o", "final_state", *(f"d_{name}" for name in ("q", "k", "v", "g", "beta", "initial_state")))
    *rule, convolution, steps = interpreted["broken"]
    assert not any(check.ok for check in interpreted["broken"])
    assert [check.detail for check in rule] == [f"float32 above 1e-05: {tensor} 1.0e-03" for tensor in tensors]
    assert convolution.detail == "float32 above 1e-05: d_conv_weight 1.0e-03, d_A_log 1.0e-03, d_dt_bias 1.0e-03"
    assert steps.detail == "float32 above 1e-05: o 1.0e-03, convolution's o 1.0e-03"


def test_different_bits_fail(interpreted: dict[str, list[Check]]) -> None:
    repeated, rows = interpreted["bits"]
    assert repeated.ok is False and repeated.detail.startswith("different: o, ")  # and the gradients, which are of o's square
    assert rows == Check("bits", False, "different: o")


@pytest.mark.parametrize(
    ("chosen", "bf16_ms", "ok"),
    [(torch.float32, 12.0, True), (torch.bfloat16, 12.0, False), (torch.bfloat16, 0.5, True), (torch.float32, 0.2, False)],
)
def test_a_dtype_rule_that_the_measurement_contradicts_fails(
    chosen: torch.dtype, bf16_ms: float, ok: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "decode_dtype", lambda device, stored, compiled: (chosen, "as told"))
    monkeypatch.setattr(doctor, "library", lambda: None)
    checks = by_name(doctor._decode_checks({torch.float32: 1e-3, torch.bfloat16: bf16_ms * 1e-3}))
    assert checks["decode dtype"].ok is ok
    assert checks["one-row linear, float32"].detail.startswith("11.5 GB/s")
    assert checks["one-row linear, bfloat16"].detail.startswith(f"{1024 * 2816 * 2 / bf16_ms / 1e6:.1f} GB/s")


def test_products_that_compiled_tokens_do_not_use_are_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "library", lambda: object())
    assert by_name(doctor._decode_checks({torch.float32: 1e-3, torch.bfloat16: 1.0}))["decode dtype"].ok is None


@pytest.mark.skipif(cpu_token.library() is None, reason=cpu_token.build()[1])
@pytest.mark.parametrize("wrong", ["nothing", "a gate", "a refusal"])
def test_a_compiled_token_is_checked(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if wrong == "a gate":
        layer = token_of_model.layer_weights
        monkeypatch.setattr(token_of_model, "layer_weights", lambda block: layer(block)._replace(rate=layer(block).rate * 1.01))
    elif wrong == "a refusal":
        monkeypatch.setattr(token_of_model, "layer_weights", lambda block: 1 / 0)
    check = doctor.token_on_cpu()
    assert check.ok is (wrong == "nothing") and check.detail.startswith("compiled by ")
    assert ("ZeroDivisionError" in check.detail) == (wrong == "a refusal")


def test_without_a_compiled_token_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "build", lambda: (None, "no C compiler was found"))
    assert doctor.token_on_cpu() == Check("single tokens on cpu", None, "by PyTorch's operators: no C compiler was found")


def test_a_missing_package_is_told_with_its_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "pyarrow":
            raise importlib.metadata.PackageNotFoundError(name)
        return "9.9"

    monkeypatch.setattr(importlib.metadata, "version", version)
    checks = by_name(doctor.packages())
    assert checks["pyarrow"] == Check("pyarrow", None, "not installed; needed for .parquet sources")
    assert checks["transformers"].detail == "9.9"


def test_the_table_shows_text_as_it_is() -> None:
    console = Console(width=100, no_color=True)
    with console.capture() as shown:
        console.print(doctor.table([Check("a", True, "[log] x"), Check("b", False, "bad"), Check("c", None, "just so")]))
    rows = {line.split("│")[1].strip(): line.split("│")[2:4] for line in shown.get().splitlines() if line.startswith("│")}
    assert {name: tuple(cell.strip() for cell in cells) for name, cells in rows.items()} == {
        "a": ("ok", "[log] x"),
        "b": ("FAILED", "bad"),
        "c": ("", "just so"),
    }
