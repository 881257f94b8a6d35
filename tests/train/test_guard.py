"""Steps that are not finite: skipped before the optimizer, dumped, counted; and losses that jump."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_testing import differences, go, make_run, saved, tensors

import gdn.train.loop as loop
from gdn.errors import RunError
from gdn.train.guard import Guard, StepResult
from gdn.train.metrics import read_metrics
from gdn.train.recipe import GuardConfig
from gdn.train.state import Progress

MICRO_BATCHES = 2


def break_steps(monkeypatch: pytest.MonkeyPatch, steps: set[int], what: str) -> None:
    """Make loss or gradient of the second micro batch of the given steps, from 1, not finite; steps count in this process."""
    forward, calls = loop.GatedDeltaNetLM.forward, [0]

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        step, micro_batch = divmod(calls[0], MICRO_BATCHES)
        calls[0] += 1
        if micro_batch != MICRO_BATCHES - 1 or step + 1 not in steps:
            return out
        loss: Tensor = out.loss_sum
        if what == "loss":
            return out._replace(loss_sum=loss * float("nan"))
        loss.register_hook(lambda grad: grad * float("inf"))
        return out

    monkeypatch.setattr(loop.GatedDeltaNetLM, "forward", broken)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_non_finite_step_is_skipped_dumped_and_counted(
    what: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(shards)
    go(run, tmp_path / "whole")
    windows = loop.open_data(run)[0].windows(3).tolist()
    break_steps(monkeypatch, {4}, what)
    outcome = go(run, tmp_path / "run")
    assert (outcome.progress.step, outcome.progress.skipped, outcome.progress.skipped_in_a_row) == (6, 1, 0)
    assert differences(saved(tmp_path / "run", 3), saved(tmp_path / "whole", 3)) == []
    assert differences(saved(tmp_path / "run", 3), saved(tmp_path / "run", 4)) == []  # moments and their step count too
    after = differences(saved(tmp_path / "run", 4), saved(tmp_path / "run", 5))
    assert set(after) == tensors(saved(tmp_path / "run", 5)).keys()  # and training went on
    (dump,) = (tmp_path / "run").glob("nonfinite-*")
    assert dump.name == "nonfinite-step-00000004.json"
    written = json.loads(dump.read_text())
    assert (written["step"], written["windows"]) == (4, windows)
    assert written["loss" if what == "loss" else "grad_norm"] in ("nan", "inf")
    assert [row["skipped"] for row in read_metrics(tmp_path / "run") if "skipped" in row] == [1]


def test_run_ends_after_so_many_in_a_row_over_a_restart(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three in a row are allowed, two before a stop and one after it among them; the fourth ends the run."""
    run = make_run(shards, train={"steps": 9}, guard={"max_in_a_row": 4})
    with monkeypatch.context() as patch:
        break_steps(patch, {2, 4, 5}, "gradient")
        patch.setattr(loop, "learning_rate", stopping_in(5, loop.learning_rate))
        assert go(run, tmp_path / "run").progress.skipped_in_a_row == 2
    break_steps(monkeypatch, {1, 2}, "gradient")
    with pytest.raises(RunError, match=r"step 7: .* is not finite, for the 4\. time in a row \(guard\.max_in_a_row\)"):
        go(run, tmp_path / "run")
    newest = loop.checkpoint.checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert newest == saved(tmp_path / "run", 6)
    assert all(bool(value.isfinite().all()) for value in tensors(newest).values())


def stopping_in(step: int, original: Any) -> Any:
    def learning_rate(now: int, *rest: Any) -> float:
        if now == step - 1:
            loop.signal.raise_signal(loop.signal.SIGTERM)
        value: float = original(now, *rest)
        return value

    return learning_rate


def test_weight_that_is_not_finite_reaches_no_checkpoint(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loop.train_step

    def spoil(micro_batch: Any, *args: Any) -> StepResult:
        result = original(micro_batch, *args)
        if calls.pop() == 3:
            micro_batch.model.model.norm.weight.data[0] = math.inf
        return result

    calls = [6, 5, 4, 3, 2, 1]
    monkeypatch.setattr(loop, "train_step", spoil)
    with pytest.raises(RunError, match="a weight is no longer finite"):
        go(make_run(shards), tmp_path / "run")
    assert loop.checkpoint.checkpoints(tmp_path / "run" / "checkpoints")[-1] == saved(tmp_path / "run", 2)


def test_loss_spike_is_recorded_and_slow_change_is_not(tmp_path: Path) -> None:
    rows: list[Any] = []
    guard = Guard(GuardConfig(), Progress(), None, lambda step: [], rows.append)
    for step in range(1, 101):
        loss = 5 - step / 500 + 0.05 * ((step * 7919) % 11 - 5) / 5 + (1.0 if step in (20, 60, 61) else 0)
        guard.note(step, StepResult(torch.tensor(loss), torch.tensor(1.0), torch.tensor(0)))
    assert [row["step"] for row in rows] == [60, 61]  # at 20 there is too little to compare with
    assert rows[0]["loss_spike"] == pytest.approx(guard_loss(60)) and rows[0]["loss_median"] < 5


def guard_loss(step: int) -> float:
    return 5 - step / 500 + 0.05 * ((step * 7919) % 11 - 5) / 5 + 1.0
