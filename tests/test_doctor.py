"""The doctor passes what is right here, and finds an operator, a gradient and a dtype rule that were broken on purpose."""

import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from rich.console import Console

from gdn import doctor
from gdn.doctor import Check

RULE = ("rule, cpu, K = V = 32", "rule, cpu, K = V = 64", "rule, cpu, K = V = 128", "rule, cpu, K = V = 256")
STEPS = "rule, cpu, single steps"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def by_name(checks: list[Check]) -> dict[str, Check]:
    named = {check.name: check for check in checks}
    assert len(named) == len(checks)
    return named


def break_rule(monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any]) -> None:
    right = doctor.gated_delta_rule_with_state

    def broken(*tensors: Any, **rest: Any) -> Any:
        return change(*right(*tensors, **rest))

    monkeypatch.setattr(doctor, "gated_delta_rule_with_state", broken)
    monkeypatch.setattr(doctor, "KEY_DIMS", (32,))


def test_everything_is_examined_and_right_here() -> None:
    checks = by_name(doctor.examine())
    wanted = {"python", "torch", "cpu", "threads", "memory", "transformers", "zstandard", "pyarrow", "tensorboard"}
    assert checks.keys() >= wanted | {*RULE, STEPS, "rule on cpu", "decode dtype", "matrix product, float32"}
    assert [check for check in checks.values() if check.ok is False and check.name != "decode dtype"] == []
    assert all(checks[name].ok for name in (*RULE, STEPS))
    for name in ("o", "final_state", "d_q", "d_k", "d_v", "d_g", "d_beta", "d_initial_state"):
        assert f"{name}," in checks[RULE[0]].detail or f"{name}:" in checks[RULE[0]].detail
    assert "'torch'" in checks["rule on cpu"].detail


def test_the_examined_process_keeps_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "KEY_DIMS", (32,))
    torch.set_num_threads(2)
    doctor.rule("cpu")
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("where", [0, 1], ids=["o", "final_state"])
def test_a_wrong_forward_fails(where: int, monkeypatch: pytest.MonkeyPatch) -> None:
    break_rule(monkeypatch, lambda *out: tuple(x * (1 + 1e-4 * (i == where)) for i, x in enumerate(out)))
    check = by_name(doctor.rule("cpu"))[RULE[0]]
    assert check.ok is False
    assert (
        f"{('o', 'final_state')[where]} 1.0e-04" in check.detail and ("o", "final_state")[1 - where] + " " not in check.detail
    )


def test_nan_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    break_rule(monkeypatch, lambda o, final: (o * torch.nan, final))
    check = by_name(doctor.rule("cpu"))[RULE[0]]
    assert check.ok is False and "o nan" in check.detail


@pytest.mark.parametrize("which", range(6), ids=["q", "k", "v", "g", "beta", "initial_state"])
def test_a_wrong_gradient_fails_where_the_forward_is_right(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = doctor.gated_delta_rule_with_state

    def broken(*tensors: torch.Tensor, initial_state: torch.Tensor) -> Any:
        inputs = [*tensors, initial_state]
        bent = inputs[which].clone()
        bent.register_hook(lambda gradient: gradient * 1.001)
        inputs[which] = bent
        return right(*inputs[:5], initial_state=inputs[5])

    monkeypatch.setattr(doctor, "gated_delta_rule_with_state", broken)
    monkeypatch.setattr(doctor, "KEY_DIMS", (32,))
    check = by_name(doctor.rule("cpu"))[RULE[0]]
    name = ("q", "k", "v", "g", "beta", "initial_state")[which]
    assert check.ok is False and check.detail == f"relative error above 1e-05: d_{name} 1.0e-03"


def test_an_operator_that_raises_fails_and_the_rest_is_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: Any) -> Any:
        raise RuntimeError("no kernel image")

    break_rule(monkeypatch, raises)
    checks = by_name(doctor.rule("cpu"))
    assert checks[RULE[0]] == Check(RULE[0], False, "RuntimeError: no kernel image")
    assert checks[STEPS].ok is True


def test_a_wrong_step_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = doctor.gated_delta_rule_step

    def broken(*tensors: torch.Tensor) -> torch.Tensor:
        o = right(*tensors)
        tensors[-1].mul_(1.001)
        return o

    monkeypatch.setattr(doctor, "gated_delta_rule_step", broken)
    assert by_name(doctor.rule("cpu"))[STEPS].ok is False


@pytest.mark.parametrize(
    ("chosen", "bf16_ms", "ok"),
    [(torch.float32, 12.0, True), (torch.bfloat16, 12.0, False), (torch.bfloat16, 0.5, True), (torch.float32, 0.2, False)],
)
def test_a_dtype_rule_that_the_measurement_contradicts_fails(
    chosen: torch.dtype, bf16_ms: float, ok: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "decode_dtype", lambda device, stored: (chosen, "as told"))
    checks = by_name(doctor._decode_checks({torch.float32: 1e-3, torch.bfloat16: bf16_ms * 1e-3}))
    assert checks["decode dtype"].ok is ok
    assert checks["one-row linear, float32"].detail.startswith("11.5 GB/s")
    assert checks["one-row linear, bfloat16"].detail.startswith(f"{1024 * 2816 * 2 / bf16_ms / 1e6:.1f} GB/s")


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
