"""What this CPU multiplies natively, and how many cores serve: a fixed answer for a machine, never a timing."""

import math
import os
from functools import cache
from pathlib import Path

import torch

_BF16_DOTS = frozenset({"avx512_bf16", "amx_bf16", "bf16", "sve_bf16", "svebf16"})  # of x86, then of ARM
_AVX512 = frozenset({"avx512_f", "avx512f"})


def cpu_has_bf16_dots() -> bool:
    """Whether this CPU multiplies bf16 natively (avx512_bf16, amx_bf16, or ARM's bf16)."""
    return bool(_capabilities() & _BF16_DOTS)


def cpu_widens_bf16() -> bool:
    """Whether one row's product with bf16 weights takes half the time of one with float32 weights: AVX2 alone.

    With AVX-512 but without bf16 dots other kernels, oneDNN's among them, take the products over; those were not measured.
    """
    return "avx2" in _capabilities() and not _capabilities() & _AVX512


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
def _capabilities() -> frozenset[str]:
    if hasattr(torch.cpu, "get_capabilities"):  # not in every supported release
        return frozenset(name for name, value in torch.cpu.get_capabilities().items() if value is True)
    return frozenset((cpuinfo("flags") or cpuinfo("Features")).split())  # of x86, of ARM


def cpuinfo(name: str) -> str:
    """What Linux tells of the first processor under this name; "" where it tells nothing."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return ""
