"""What a run costs while it runs: speed, share of the machine's peak, memory, waiting for data, energy; a profiler's window.

Nothing here waits for the device. A row covers the time since the row before, and where the loop asks for one it has just read
the loss. The profiler's window alone waits, at its two ends.
"""

import importlib
import logging
import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

log = logging.getLogger(__name__)

# Dense bfloat16 with float32 sums, TFLOP/s of one card, from NVIDIA's data sheets (H200, H200 NVL, H100, A100, L40S, L4: the
# figure with sparsity halved) and architecture white papers (GeForce). The first row whose words are all in the name counts.
_NOMINAL: tuple[tuple[frozenset[str], float], ...] = (
    (frozenset({"B200"}), 2250.0),
    (frozenset({"H200", "NVL"}), 835.5),
    (frozenset({"H200"}), 989.5),
    (frozenset({"GH200"}), 989.5),
    (frozenset({"H100", "PCIe"}), 756.5),
    (frozenset({"H100", "NVL"}), 835.5),
    (frozenset({"H100"}), 989.5),
    (frozenset({"A100"}), 312.0),
    (frozenset({"L40S"}), 362.0),
    (frozenset({"L4"}), 121.0),
    (frozenset({"RTX", "5090"}), 209.5),
    (frozenset({"RTX", "4090"}), 165.2),
    (frozenset({"RTX", "3090"}), 71.0),
)
_TRAINING_PASSES = 3  # the backward costs two forwards; what activation checkpointing computes again is not work done


class Peak(NamedTuple):
    """FLOP/s of one device, None where it is not known: by its maker, and as a matrix product here reaches it."""

    nominal: float | None
    measured: float | None


def nominal_peak(name: str) -> float | None:
    """Dense bfloat16 FLOP/s of the GPU that calls itself `name`; None for one that is not in the table."""
    words = set(re.split(r"[\s-]+", name))
    return next((1e12 * tera for needed, tera in _NOMINAL if needed <= words), None)


def measure_peak(device: torch.device) -> Peak:
    """Nominal and measured peak of `device`: products of bfloat16 matrices on CUDA, 0.1 s; of float32 ones on a CPU, 0.05 s.

    No random state but its own is read or moved, and torch's peak of allocated memory starts anew.
    """
    if device.type == "cpu":
        return Peak(None, _measure(device, 512, torch.float32, 5))
    if device.type != "cuda":
        return Peak(None, None)
    properties = torch.cuda.get_device_properties(device)
    measured = None
    if properties.major >= 8:  # before, bfloat16 products are emulated
        measured = _measure(device, 8192, torch.bfloat16, 24)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return Peak(nominal_peak(properties.name), measured)


def _measure(device: torch.device, size: int, dtype: torch.dtype, times: int) -> float:
    """FLOP/s of the fastest of `times` products: what is measured is the device, not what else runs on it."""
    generator = torch.Generator(device).manual_seed(0)
    # Numbers, not zeros: a GPU fed zeros draws less power and runs at a higher clock.
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    out = a @ b
    fastest = float("inf")
    for _ in range(times):
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - started)
    return 2.0 * size**3 / fastest


class Energy:
    """The energy that one GPU has drawn, from NVML; `joules()` is None where it does not answer."""

    def __init__(self, device: torch.device) -> None:
        self._nvml: Any = None
        if device.type != "cuda":
            return
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return
        try:
            nvml.nvmlInit()
            # By its id: CUDA_VISIBLE_DEVICES renumbers the devices for torch, not for NVML.
            self._handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except nvml.NVMLError:  # a virtual or partitioned GPU, or one of before Volta
            return
        self._nvml = nvml

    def joules(self) -> float | None:
        """Since the driver was loaded; the counter steps by some 0.02 to 0.1 s of power."""
        if self._nvml is None:
            return None
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000.0
        except self._nvml.NVMLError:
            return None


class Meter:
    """Counts between two rows; everything a row says is of that time, but for peak memory and energy, which are of this call.

    Figures are of all processes together (speed, mfu) or of the one that asks (waiting, memory, energy).
    """

    def __init__(self, device: torch.device, forward_flops_per_token: int, world_size: int, peak: Peak) -> None:
        self._device, self._world_size, self._peak = device, world_size, peak
        self._flops_per_token = _TRAINING_PASSES * forward_flops_per_token
        self._energy = Energy(device)
        self._joules_at_start = self._joules = self._energy.joules()
        self._clear()

    def _clear(self) -> None:
        self._since, self._aside, self._waited = time.monotonic(), 0.0, 0.0
        self._steps = self._tokens = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For the block, the step waits for its data."""
        started = time.monotonic()
        yield
        self._waited += time.monotonic() - started

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The block is no training (a checkpoint, an evaluation) and does not count as its time."""
        started = time.monotonic()
        yield
        self._aside += time.monotonic() - started

    def step(self, tokens: int) -> None:
        """One optimizer step on `tokens` tokens of all processes was done, or handed to the device."""
        self._steps += 1
        self._tokens += tokens

    def row(self, steps_left: int) -> dict[str, float]:
        """What the steps since the last row came to, and what they promise for those left. Call it when the device is idle.

        tokens_per_second; seconds_left; data_wait, a share of the time; mfu (of the nominal peak) and mfu_measured (of the
        measured one); memory_gib, the peak that torch allocated on CUDA, else of the process; watts and energy_kwh of this
        process's GPU. What is not known, or cannot be, is not there.
        """
        wall = max(time.monotonic() - self._since, 1e-9)
        seconds = max(wall - self._aside, 1e-9)
        speed = self._tokens / seconds
        row = {
            "tokens_per_second": speed,
            "seconds_left": seconds / max(self._steps, 1) * steps_left,
            "data_wait": self._waited / seconds,
            "memory_gib": self._peak_memory() / 2**30,
        }
        used = self._flops_per_token * speed / self._world_size
        for name, peak in (("mfu", self._peak.nominal), ("mfu_measured", self._peak.measured)):
            if peak is not None and used <= peak:  # more than a measured peak: something else ran while it was measured
                row[name] = used / peak
        joules = self._energy.joules()
        if joules is not None and self._joules is not None and self._joules_at_start is not None:
            row["watts"] = (joules - self._joules) / wall
            row["energy_kwh"] = (joules - self._joules_at_start) / 3.6e6
        self._joules = joules
        self._clear()
        return row

    def _peak_memory(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class ProfilerWindow:
    """PyTorch's profiler over a first to a last step: a trace for a browser and a table by kernel, in folder/profile."""

    def __init__(self, folder: Path, window: tuple[int, int] | None, device: torch.device) -> None:
        self._folder, self._window, self._device = folder / "profile", window, device
        self._profiler: Any = None
        self._opened = False

    def before(self, step: int) -> None:
        """`step` (from 1) is about to begin."""
        if self._window is None:
            return
        if self._profiler is None and self._window[0] <= step <= self._window[1]:
            self._wait()
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities, record_shapes=True)
            self._profiler.start()
            self._opened = True
        elif self._profiler is not None and step > self._window[1]:
            self._write()

    def _write(self) -> None:
        self._wait()
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self._folder / "trace.json.gz"))
        key = "self_device_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=key, row_limit=100, max_name_column_width=80)
        (self._folder / "kernels.txt").write_text(table + "\n", encoding="utf-8")

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def __enter__(self) -> "ProfilerWindow":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """The window may be open still: it ends with the run's last step, or where the run is stopped."""
        if self._profiler is not None:
            self._write()
        elif self._window is not None and not self._opened:
            log.warning("nothing was profiled: no step from %d to %d was among those that ran", *self._window)
