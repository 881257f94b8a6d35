"""What may befall a run, and what it must come to. Kills are in `test_kill`, bad numbers in `test_guard`."""

import os
from pathlib import Path
from typing import Any

import pytest
from train_testing import differences, go, make_run, make_shards, saved

import gdn.train.loop as loop
from gdn.errors import DataError


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
