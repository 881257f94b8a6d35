"""What a processor is said to multiply natively, from PyTorch's words and from Linux's."""

from pathlib import Path

import pytest
import torch

from gdn.ops import cpu


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_capabilities", cpu._capabilities.__wrapped__)


@pytest.mark.parametrize(
    ("capabilities", "dots", "widens"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, True, False),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, True, False),
        ({"architecture": "x86_64", "avx2": True, "avx512_f": False, "avx512_bf16": False}, False, True),
        ({"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": False}, False, False),
        ({"architecture": "x86_64", "avx2": False, "num_physical_cores": 2}, False, False),
        ({"architecture": "arm64", "bf16": True}, True, False),
        ({"architecture": "arm64", "neon": True, "bf16": False}, False, False),
    ],
)
def test_as_torch_tells_them(
    capabilities: dict[str, object], dots: bool, widens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert (cpu.cpu_has_bf16_dots(), cpu.cpu_widens_bf16()) == (dots, widens)


@pytest.mark.parametrize(
    ("cpuinfo", "dots", "widens"),
    [
        ("processor\t: 0\nmodel name\t: X bf16\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile\n", True, False),
        ("processor\t: 0\nmodel name\t: X bf16\nflags\t\t: fpu avx2 avx512f\n", False, False),
        ("processor\t: 0\nmodel name\t: X bf16\nflags\t\t: fpu avx2\n", False, True),
        ("processor\t: 0\nFeatures\t: fp asimd svebf16\n", True, False),
    ],
)
def test_as_linux_tells_them_to_an_older_torch(cpuinfo: str, dots: bool, widens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: cpuinfo)
    assert (cpu.cpu_has_bf16_dots(), cpu.cpu_widens_bf16()) == (dots, widens)


@pytest.mark.parametrize(
    ("cpus", "physical", "affinity", "quota", "wanted"),
    [
        (16, 8, 16, "max 100000\n", 8),
        (16, 16, 4, "max 100000\n", 4),
        (64, 32, 64, "250000 100000\n", 3),
        (64, 32, 64, "10000 100000\n", 1),
        (4, 0, 4, None, 4),
    ],
)
def test_usable_cores(
    cpus: int, physical: int, affinity: int, quota: str | None, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu.os, "cpu_count", lambda: cpus)
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"num_physical_cores": physical}, raising=False)
    monkeypatch.setattr(Path, "exists", lambda self: quota is not None)
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: quota)
    assert cpu.usable_cores() == wanted
