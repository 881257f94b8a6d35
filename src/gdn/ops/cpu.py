"""What this CPU multiplies natively, and how many cores serve: a fixed answer for a machine, never a timing."""

import math
import os
import platform
from functools import cache
from pathlib import Path

import torch

_BF16_DOTS = frozenset({"avx512_bf16", "amx_bf16", "bf16", "sve_bf16", "svebf16"})  # of x86, then of ARM
_AVX512 = frozenset({"avx512_f", "avx512f"})


def cpu_has_bf16_dots() -> bool:
    """Whether this CPU multiplies bf16 natively (avx512_bf16, amx_bf16, or ARM's bf16)."""
    return bool(capabilities() & _BF16_DOTS)


def cpu_widens_bf16() -> bool:
    """Whether one row's product with bf16 weights takes half the time of one with float32 weights: AVX2 alone.

    With AVX-512 but without bf16 dots other kernels, oneDNN's among them, take the products over; those were not measured.
    """
    return "avx2" in capabilities() and not capabilities() & _AVX512


def usable_cores(*, physical: bool = True) -> int:
    """Cores that this process may keep busy: by its affinity, and by the quota of its container (cgroup v2).

    Physical ones for products: a second thread on a core reads memory no faster, and threads beyond the quota wait for each
    other at every product. Not physical: as many as the system counts.
    """
    limits: list[float] = [os.cpu_count() or 1]
    if physical and hasattr(torch.cpu, "get_capabilities"):
        limits.append(int(torch.cpu.get_capabilities().get("num_physical_cores", 0)) or math.inf)
    if hasattr(os, "sched_getaffinity"):
        limits.append(len(os.sched_getaffinity(0)))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists():
        allowed, period = quota.read_text(encoding="utf-8").split()
        limits.append(math.inf if allowed == "max" else math.ceil(int(allowed) / int(period)))
    return max(1, int(min(limits)))


@cache
def capabilities() -> frozenset[str]:
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
