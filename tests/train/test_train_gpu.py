"""Training on GPUs: no waiting between rows, skipped steps, the same bits after a stop, two GPUs as one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_faults import before_step
from test_fleet import curve
from test_kill import write_recipe
from train_testing import differences, make_run, saved

import gdn.train.loop as loop
from gdn.cli import main
from gdn.train.micro_batch import MicroBatch
from gdn.train.optim import build_optimizer
from gdn.train.recipe import RunConfig

pytestmark = pytest.mark.gpu


def on_gpu(run: RunConfig, folder: Path) -> loop.Outcome:
    return loop.train(run, folder, torch.device("cuda", 0), Console(quiet=True))


def run_of(shards: Path, **changes: Any) -> RunConfig:
    return make_run(shards, train={"dtype": "bfloat16"} | changes.pop("train", {}), **changes)


def test_host_waits_for_nothing_in_a_step(shards: Path) -> None:
    run, device = run_of(shards), torch.device("cuda", 0)
    loader, _ = loop.open_data(run)
    model = loop.build_model(run, device)
    micro_batch, optimizer = MicroBatch(model, run.train.cuda_graph), build_optimizer(model, run.optim)
    progress = loop.Progress()
    guard = loop.Guard(run.guard, progress, None, lambda step: [], lambda row: None)
    for step in range(6):
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            guard.note(step, loop.train_step(micro_batch, optimizer, list(loader.micro_batches(step)), 1e-3, run))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    guard.read(5)
    assert progress.skipped == 0 and 0 < guard.loss < 6


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_step_leaves_weights_and_moments(where: str, shards: Path) -> None:
    run, device = run_of(shards), torch.device("cuda", 0)
    loader, _ = loop.open_data(run)
    model = loop.build_model(run, device)
    micro_batch, optimizer = MicroBatch(model, run.train.cuda_graph), build_optimizer(model, run.optim)

    def step(number: int) -> loop.StepResult:
        return loop.train_step(micro_batch, optimizer, list(loader.micro_batches(number)), 1e-3, run)

    def state() -> list[torch.Tensor]:
        moments = [value for each in optimizer.state.values() for value in each.values()]
        return [tensor.detach().clone() for tensor in (*model.parameters(), *moments)]

    step(0)
    before = state()

    def spoil(module: torch.nn.Module, inputs: Any, out: Any) -> Any:
        if where == "loss":
            return out._replace(loss_sum=out.loss_sum * float("nan"))
        out.loss_sum.register_hook(lambda gradient: gradient * float("inf"))
        return out

    handle = model.register_forward_hook(spoil)
    result = step(1)
    handle.remove()
    assert not bool(result.loss.isfinite() & result.grad_norm.isfinite())
    assert all(torch.equal(a, b) for a, b in zip(before, state()))
    step(2)
    assert not any(torch.equal(a, b) for a, b in zip(before, state()))


def test_stop_and_go_on_changes_no_bit(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(shards, checkpoint={"every": 2, "keep": 9}, train={"steps": 8})
    on_gpu(run, tmp_path / "whole")
    with monkeypatch.context() as patch:
        before_step(patch, 4, lambda: loop.signal.raise_signal(loop.signal.SIGTERM))
        assert on_gpu(run, tmp_path / "run").progress.step == 5
    on_gpu(run, tmp_path / "run")
    assert differences(saved(tmp_path / "whole", 8), saved(tmp_path / "run", 8)) == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs")
def test_two_gpus_train_what_one_does_and_resume_in_the_same_bits(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import subprocess
    import sys

    run = run_of(shards, train={"steps": 12})
    on_gpu(run, tmp_path / "one")
    recipe = write_recipe(run, tmp_path / "recipe.toml")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    for name, more in (("shards", []), ("replicas", ["parallel.dp_replicate=2"])):
        command = [*torchrun, "gdn", "--quiet", "train", recipe, *more, "--out", str(tmp_path / name)]
        subprocess.run(command, check=True)
        assert curve(tmp_path / name) == pytest.approx(curve(tmp_path / "one"), abs=0.02)
    assert main(["verify-resume", recipe, "--processes", "2", "--device", "cuda", "--out", str(tmp_path / "verify")]) == 0
    assert "pass" in capfd.readouterr().out
