import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from train_testing import differences, go, make_run, saved, tensors, with_model

import gdn.train.loop as loop
from gdn.data.loader import Batch, Loader
from gdn.distributed.mesh import Workers
from gdn.train.optim import learning_rate
from gdn.train.recipe import RunConfig
from gdn.train.state import Progress, read_state

STEPS = 6


def runs(shards: Path) -> dict[str, RunConfig]:
    float32 = make_run(shards)
    return {
        "float32": float32,
        "bfloat16": make_run(shards, train={"dtype": "bfloat16"}),
        "no-accumulation": make_run(shards, data={"micro_batch_size": 4}),
        "reset-no-decay": make_run(shards, data={"reset_at_documents": True}, optim={"no_decay": ["*norm.weight"]}),
        "tied": with_model(float32, tie_word_embeddings=True),
    }


def stopped_after(step: int, whole: Path, folder: Path) -> Path:
    """A run as it stood after `step`: a copy of the whole run without its later checkpoints."""
    shutil.copytree(whole, folder)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(saved(folder, later))
    return folder


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "no-accumulation", "reset-no-decay", "tied"])
def test_stop_after_any_step_changes_no_bit(kind: str, shards: Path, tmp_path: Path) -> None:
    run = runs(shards)[kind]
    whole = tmp_path / "whole"
    assert go(run, whole).progress.step == STEPS
    assert differences(saved(whole, STEPS), saved(whole, STEPS - 1))  # the comparison sees a step
    names = tensors(saved(whole, STEPS))
    assert {name.partition(":")[2] for name in names} == {"", "step", "exp_avg", "exp_avg_sq"}
    for step in range(1, STEPS):
        folder = stopped_after(step, whole, tmp_path / str(step))
        outcome = go(run, folder)
        assert (outcome.progress.step, outcome.progress.tokens) == (STEPS, STEPS * 4 * 32)
        assert differences(saved(whole, STEPS), saved(folder, STEPS)) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_signal_in_any_step_stops_with_a_checkpoint(
    number: signal.Signals, dtype: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(shards, checkpoint={"every": 100}, train={"dtype": dtype})
    go(run, tmp_path / "whole")
    stop_in = set(range(STEPS - 1))  # each step of the run is the one in hand when the signal comes, once

    def interrupt(step: int, *rest: Any) -> float:
        if step in stop_in:
            stop_in.remove(step)
            os.kill(os.getpid(), number)
        return learning_rate(step, *rest)

    monkeypatch.setattr(loop, "learning_rate", interrupt)
    before = signal.getsignal(number)
    for step in range(1, STEPS):
        outcome = go(run, tmp_path / "stopped")
        assert (outcome.progress.step, outcome.stopped_by) == (step, number)
        assert outcome.checkpoint == saved(tmp_path / "stopped", step)
        assert signal.getsignal(number) is before
    assert go(run, tmp_path / "stopped").stopped_by is None
    assert differences(saved(tmp_path / "whole", STEPS), saved(tmp_path / "stopped", STEPS)) == []


def test_finished_run_is_left_as_it_is(shards: Path, tmp_path: Path) -> None:
    run = make_run(shards)
    first = go(run, tmp_path / "run")
    stat = (first.checkpoint / "model.safetensors").stat()
    assert go(run, tmp_path / "run").progress.step == STEPS
    assert (first.checkpoint / "model.safetensors").stat() == stat


def forget(key: str) -> Callable[..., Progress]:
    """A read_state that leaves one part of the optimizer's state at zero."""

    def broken(folder: Path, model: nn.Module, optimizer: torch.optim.AdamW, shards: str, workers: Workers) -> Progress:
        progress = read_state(folder, model, optimizer, shards, workers)  # type: ignore[arg-type]
        for state in optimizer.state.values():
            state[key].zero_()
        return progress

    return broken


def forget_weight(folder: Path, model: nn.Module, optimizer: torch.optim.AdamW, shards: str, workers: Workers) -> Progress:
    kept = model.get_parameter("model.layers.1.attn.A_log")
    before = kept.detach().clone()
    progress = read_state(folder, model, optimizer, shards, workers)  # type: ignore[arg-type]
    with torch.no_grad():
        kept.copy_(before)
    return progress


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("part", ["exp_avg", "exp_avg_sq", "step", "weight", "order"])
def test_control_restore_without_one_part_is_caught(
    part: str, dtype: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(shards, train={"dtype": dtype})
    go(run, tmp_path / "whole")
    folder = stopped_after(3, tmp_path / "whole", tmp_path / "run")
    if part == "order":
        original = Loader.micro_batches

        def from_the_start(self: Loader, step: int, rank: int, world_size: int) -> Iterator[Batch]:
            return original(self, step - 3)

        monkeypatch.setattr(Loader, "micro_batches", from_the_start)
    else:
        monkeypatch.setattr(loop, "read_state", forget_weight if part == "weight" else forget(part))
    go(run, folder)
    assert differences(saved(tmp_path / "whole", STEPS), saved(folder, STEPS))
