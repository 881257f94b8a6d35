import gzip
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from train_testing import go, make_run

import gdn.train.loop as loop
import gdn.train.meter as meter_module
from gdn import config as toml
from gdn.cli import main
from gdn.errors import ConfigError
from gdn.train.guard import Guard
from gdn.train.meter import Energy, Meter, Peak, measure_peak, nominal_peak
from gdn.train.metrics import Metrics, progress_line, read_metrics

CPU = torch.device("cpu")


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(meter_module.time, "monotonic", lambda: self.now)


def test_rows_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    meter = Meter(CPU, forward_flops_per_token=1000, world_size=2, peak=Peak(6e6, 3e6))
    for _ in range(4):
        with meter.waiting():
            clock.now += 0.5
        clock.now += 1.5
        meter.step(tokens=3000)
    with meter.aside():  # a checkpoint: neither speed nor time left may feel it
        clock.now += 50.0
    row = meter.row(steps_left=10)
    assert row["tokens_per_second"] == pytest.approx(12000 / 8)
    assert row["seconds_left"] == pytest.approx(20.0)
    assert row["data_wait"] == pytest.approx(0.25)
    # Three passes of 1,000 FLOPs a token, on two devices.
    assert row["mfu"] == pytest.approx(3 * 1000 * 1500 / 2 / 6e6)
    assert row["mfu_measured"] == pytest.approx(2 * row["mfu"])
    assert row["memory_gib"] > 0.01 and "watts" not in row
    clock.now += 1.0
    meter.step(tokens=3000)
    assert meter.row(steps_left=0)["tokens_per_second"] == pytest.approx(3000.0)  # of the time since the row before alone


def test_what_is_not_known_is_not_there() -> None:
    row = Meter(CPU, 1000, 1, Peak(None, None)).row(1)
    assert not {"mfu", "mfu_measured", "watts", "energy_kwh"} & row.keys()


def test_a_peak_below_what_was_reached_gives_no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    meter = Meter(CPU, forward_flops_per_token=1000, world_size=1, peak=Peak(3e6, 2.9e6))
    clock.now += 1.0
    meter.step(tokens=1000)
    row = meter.row(steps_left=0)
    assert row["mfu"] == pytest.approx(1.0) and "mfu_measured" not in row


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 D Laptop", 165.2),
        ("Tesla V100-SXM2-32GB", None),
        ("NVIDIA L400", None),
    ],
)
def test_nominal_peaks_go_by_whole_words(name: str, tera: float | None) -> None:
    assert nominal_peak(name) == (None if tera is None else tera * 1e12)


def test_the_measured_peak_is_a_speed_of_this_machine_and_moves_no_random_state() -> None:
    before = torch.get_rng_state()
    peak = measure_peak(CPU)
    assert torch.equal(before, torch.get_rng_state())
    assert peak.nominal is None and peak.measured is not None and 1e8 < peak.measured < 1e14
    a = torch.randn(512, 512)
    started = time.perf_counter()
    for _ in range(5):
        a @ a
    assert peak.measured > 0.3 * 5 * 2 * 512**3 / (time.perf_counter() - started)  # the fastest of its products


class NVMLError(Exception):
    pass


def nvml(millijoules: list[Any]) -> ModuleType:
    """A stand-in: answers with these numbers in turn, raising those that are errors."""
    module = ModuleType("pynvml")

    def answer(handle: str) -> int:
        assert handle == "handle of GPU-abc"
        value = millijoules.pop(0)
        if isinstance(value, Exception):
            raise value
        return int(value)

    module.NVMLError = NVMLError  # type: ignore[attr-defined]
    module.nvmlInit = lambda: None  # type: ignore[attr-defined]
    module.nvmlDeviceGetHandleByUUID = lambda uuid: f"handle of {uuid}"  # type: ignore[attr-defined]
    module.nvmlDeviceGetTotalEnergyConsumption = answer  # type: ignore[attr-defined]
    return module


def test_energy_from_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 30)
    monkeypatch.setitem(sys.modules, "pynvml", nvml([0, 1_000, 3_601_000, 7_201_000, NVMLError()]))
    meter = Meter(torch.device("cuda"), 1000, 1, Peak(None, None))
    clock.now += 9.0
    row = meter.row(0)
    assert (row["watts"], row["energy_kwh"]) == (pytest.approx(400.0), pytest.approx(0.001))
    assert row["memory_gib"] == 3.0
    clock.now += 4.0
    row = meter.row(0)
    assert (row["watts"], row["energy_kwh"]) == (pytest.approx(900.0), pytest.approx(0.002))
    assert "watts" not in meter.row(0)  # it stopped answering: no number rather than a wrong one
    monkeypatch.setitem(sys.modules, "pynvml", nvml([NVMLError()]))
    assert Energy(torch.device("cuda")).joules() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Energy(torch.device("cuda")).joules() is None


def test_a_run_reports_what_it_costs(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Peaks that no machine reaches: a share above one is left out of the row.
    monkeypatch.setattr(loop, "measure_peak", lambda device: Peak(4e18, 2e18))
    run = make_run(shards, eval={"every": 3}, log={"every": 2})
    go(run, tmp_path / "run")
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 4, 6]
    forward = run.model.flops_per_token(run.data.seq_len).total
    for row in rows:
        assert row["mfu"] == pytest.approx(3 * forward * row["tokens_per_second"] / 4e18)
        assert row["mfu_measured"] == pytest.approx(2 * row["mfu"])
        assert 0 < row["data_wait"] < 1 and row["memory_gib"] > 0.01
    assert rows[-1]["seconds_left"] == 0 and rows[0]["seconds_left"] > 0


def test_the_device_is_waited_for_before_what_does_not_count(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else steps that are still queued would be taken for a part of the checkpoint, and their row for a faster one."""
    read_at: list[int] = []
    begun: list[bool] = []
    read = Guard.read

    def reads(guard: Guard, step: int) -> None:
        read_at.append(step)
        read(guard, step)

    @contextmanager
    def aside(meter: Meter) -> Iterator[None]:
        before = len(read_at)
        yield
        if len(read_at) > before:  # a checkpoint was made
            begun.append(read_at[before - 2 : before] == 2 * [read_at[before]])  # as it was noted, and before this block

    monkeypatch.setattr(Guard, "read", reads)
    monkeypatch.setattr(Meter, "aside", aside)
    go(make_run(shards, log={"every": 100}, checkpoint={"every": 2, "keep": 2}), tmp_path / "run")
    assert begun == [True, True, True]


def test_the_profilers_window(shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(shards, log={"every": 1, "profile_steps": [2, 3]})
    go(run, tmp_path / "run")
    folder = tmp_path / "run" / "profile"
    assert "aten::mm" in (folder / "kernels.txt").read_text()
    events = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    steps = sum(event.get("name", "").startswith("Optimizer.step") and event.get("ph") == "X" for event in events)
    assert steps == 2
    go(make_run(shards, log={"every": 1, "profile_steps": [98, 99]}), tmp_path / "never")
    assert "no step from 98 to 99 was among those that ran" in caplog.text and caplog.text.count("nothing was profiled") == 1
    # Open at the run's end, and asked for from the command line.
    go(make_run(shards, log={"every": 1, "profile_steps": [5, 99]}), tmp_path / "late")
    assert (tmp_path / "late" / "profile" / "kernels.txt").exists()
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(toml.dump(make_run(shards, train={"steps": 11})), encoding="utf-8")
    assert main(["--quiet", "train", str(recipe), "--out", str(tmp_path / "flag"), "--device", "cpu", "--profile"]) == 0
    assert (tmp_path / "flag" / "profile" / "trace.json.gz").exists()


@pytest.mark.parametrize("window", [[0, 3], [4, 3]])
def test_a_window_that_cannot_be(window: list[int], shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"log\.profile_steps = \[\d, 3\]; expected a first step"):
        make_run(shards, log={"profile_steps": window}).check(1)


class FakeWandb(ModuleType):
    """Records what it is told, as wandb would keep it."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.metrics: list[tuple[str, str]] = []
        self.ended: list[int] = []

    def init(self, **settings: Any) -> "FakeWandb":
        self.calls.append(settings)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self.ended.append(exit_code)


def test_weights_and_biases(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = make_run(shards, log={"every": 3, "wandb": True, "wandb_project": "small"})
    go(run, tmp_path / "run")
    go(run, tmp_path / "run")
    first, second = fake.calls
    assert first["project"] == "small" and first["name"] == "tiny" and first["config"]["train"]["steps"] == 6
    assert first["id"] == second["id"] and first["resume"] == "allow" and Path(first["dir"]) == tmp_path / "run"
    assert fake.metrics[0] == ("*", "step")
    assert [row["step"] for row in fake.rows] == [1, 3, 6] and fake.rows[-1]["loss"] > 0
    assert fake.ended == [0, 0]
    with pytest.raises(ZeroDivisionError), Metrics(tmp_path / "run", run):
        raise ZeroDivisionError
    assert fake.ended[-1] == 1


def test_a_run_that_goes_on_is_one_line_in_tensorboard(shards: Path, tmp_path: Path) -> None:
    """Killed after step 9, gone on with from the checkpoint of step 5."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = make_run(shards, log={"tensorboard": True})
    for begun, steps in ((0, range(1, 10)), (5, range(6, 9))):
        with Metrics(tmp_path, run, begun) as metrics:
            for step in steps:
                metrics.write({"step": step, "loss": begun + step})
        time.sleep(1.1)  # files are read in the order of their names, which hold seconds
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        *((step, float(step)) for step in range(1, 6)),
        *((step, 5.0 + step) for step in range(6, 9)),
    ]


def test_a_tracker_that_is_not_installed_is_one_line(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r'log\.wandb = true needs wandb: pip install "gdn\[wandb\]"'):
        go(make_run(shards, log={"wandb": True}), tmp_path / "run")


def test_the_line_of_a_row() -> None:
    row = {"step": 10, "loss": 2.5, "tokens_per_second": 230123.4, "lr": 4e-4, "memory_gib": 31.06, "data_wait": 0.001}
    assert progress_line(row | {"mfu": 0.4567, "mfu_measured": 0.6, "seconds_left": 3725.4}, 1000) == (
        "step 10/1,000  loss 2.500  230,123 tok/s  MFU 45.7%  1:02:05 left  lr 4.0e-04  31.1 GiB"
    )
    assert progress_line(row | {"mfu_measured": 0.6, "seconds_left": 59.6, "data_wait": 0.25}, 1000) == (
        "step 10/1,000  loss 2.500  230,123 tok/s  MFU 60.0%  1:00 left  waiting for data 25%  lr 4.0e-04  31.1 GiB"
    )
