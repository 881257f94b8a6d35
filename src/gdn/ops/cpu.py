"""What this CPU multiplies natively, as PyTorch or Linux tell it: a fixed answer for a machine, never a timing."""

import platform
from functools import cache
from pathlib import Path

import torch

_BF16_DOTS = frozenset({"avx512_bf16", "amx_bf16", "bf16", "sve_bf16", "svebf16"})  # of x86, then of ARM
_AVX512 = frozenset({"avx512_f", "avx512f"})


def cpu_has_bf16_dots() -> bool:
    """Whether this CPU multiplies bf16 natively (avx512_bf16, amx_bf16, or ARM's bf16)."""
    return bool(_capabilities() & _BF16_DOTS)


def cpu_widens_bf16() -> bool:
    """Whether PyTorch's one-row bf16 product widens on the fly and so reads weights at the memory's speed: AVX2 alone.

    With AVX-512 but without bf16 dots another library, oneDNN, takes the product over; that was not measured.
    """
    return "avx2" in _capabilities() and not _capabilities() & _AVX512


@cache
def _capabilities() -> frozenset[str]:
    if hasattr(torch.cpu, "get_capabilities"):  # not in every supported release
        return frozenset(name for name, value in torch.cpu.get_capabilities().items() if value is True)
    cpuinfo = Path("/proc/cpuinfo")
    if platform.system() != "Linux" or not cpuinfo.exists():
        return frozenset()
    for line in cpuinfo.read_text(encoding="utf-8").splitlines():
        name, _, names = line.partition(":")
        if name.strip() in ("flags", "Features"):  # x86, ARM
            return frozenset(names.split())
    return frozenset()
