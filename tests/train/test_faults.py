"""What may befall a run, and what it must come to. Kills are in `test_kill`, bad numbers in `test_guard`."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_kill import ENVIRONMENT, write_recipe
from train_testing import differences, go, make_run, make_shards, saved

import gdn.train.loop as loop
from gdn.errors import DataError
from gdn.train.metrics import read_metrics


def before_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Any) -> None:
    """Have `act` called in `step`, from 0, the first time it is reached."""
    learning_rate, waiting = loop.learning_rate, [act]

    def acting(now: int, *rest: Any) -> float:
        if now == step and waiting:
            waiting.pop()()
        return learning_rate(now, *rest)

    monkeypatch.setattr(loop, "learning_rate", acting)


@pytest.mark.parametrize("how", ["vanishes", "truncated", "altered", "replaced"])
def test_shard_that_changes_while_training_is_named_and_no_step_made_of_it(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = make_shards(tmp_path / "data")
    path, run = shards / "train-00000.bin", make_run(shards)
    data = path.read_bytes()
    go(run, tmp_path / "whole")

    def spoil() -> None:
        if how == "vanishes":
            path.unlink()
        elif how == "truncated":
            os.truncate(path, 100)
        elif how == "altered":
            with path.open("r+b") as stream:
                stream.write(b"\x05" * 1000)
        else:
            other = path.with_suffix(".new")
            other.write_bytes(bytes(len(data)))
            other.replace(path)

    with monkeypatch.context() as patch:
        before_step(patch, 2, spoil)
        with pytest.raises(DataError, match=r"train-00000\.bin: (changed since the run began|No such file)"):
            go(run, tmp_path / "run")
    newest = loop.checkpoint.checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert newest in (saved(tmp_path / "run", 2), saved(tmp_path / "run", 3))
    assert differences(newest, saved(tmp_path / "whole", int(newest.name[-8:]))) == []
    path.write_bytes(data)
    go(run, tmp_path / "run")
    assert differences(saved(tmp_path / "run", 6), saved(tmp_path / "whole", 6)) == []


@pytest.mark.parametrize("how", ["truncated", "altered"])
def test_heldout_text_that_changes_is_named_and_not_measured(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = make_shards(tmp_path / "data")
    path, run = shards / "heldout-00000.bin", make_run(shards, eval={"every": 1, "windows": 1})
    data = path.read_bytes()

    def spoil() -> None:
        path.write_bytes(b"" if how == "truncated" else bytes(len(data)))

    with monkeypatch.context() as patch:
        before_step(patch, 2, spoil)
        with pytest.raises(DataError, match=r"heldout-00000\.bin: changed since the run began"):
            go(run, tmp_path / "run")
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows if "heldout_loss" in row] == [1, 2]
    path.write_bytes(data)
    go(run, tmp_path / "run")


@pytest.mark.soak
def test_torchrun_restarts_a_job_that_lost_a_process(shards: Path, tmp_path: Path) -> None:
    """Killed in two steps; what torchrun starts again goes on from the newest checkpoint, to the same weights."""
    run = make_run(shards, checkpoint={"every": 2, "keep": 100}, train={"steps": 9})
    recipe = write_recipe(run, tmp_path / "recipe.toml")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    script = str(Path(__file__).with_name("lost_rank.py"))
    for name, lost in (("whole", ("-1", "-1")), ("run", ("3", "6"))):
        arguments = [script, *lost, "--quiet", "train", recipe, "--out", str(tmp_path / name), "--device", "cpu"]
        result = subprocess.run([*torchrun, *arguments], env=ENVIRONMENT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    assert differences(saved(tmp_path / "run", 9), saved(tmp_path / "whole", 9)) == []
    steps = [row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert steps[-1] == 9 and len(steps) > 9 and set(steps) == set(range(1, 10))  # some were made again
