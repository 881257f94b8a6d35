"""`gdn verify-resume`: right about a restore that is whole and about ones that are not, and about its own eyesight."""

import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from test_faults import before_step
from test_kill import write_recipe
from test_resume import forget
from train_testing import go, make_run

import gdn.train.loop as loop
import gdn.train.verify as verify
from gdn import config as toml
from gdn.cli import main
from gdn.errors import ConfigError, RunError
from gdn.train.recipe import RunConfig


class Killed(Exception):
    """In place of SIGKILL, in this process."""


def kill() -> None:
    raise Killed


def train_here(recipe: Path, out: Path, options: verify.Options, stop: signal.Signals | None, after: int = 0) -> None:
    """What `_train` does, in this process, whose parts the tests break."""
    with pytest.MonkeyPatch.context() as patch:
        if stop is not None:
            act: Callable[[], Any] = kill if stop is signal.SIGKILL else lambda: signal.raise_signal(signal.SIGTERM)
            before_step(patch, after, act)
        with suppress(Killed):
            go(toml.load(RunConfig, recipe), out)


def verified(run: RunConfig, out: Path) -> tuple[str | None, list[str]]:
    said: list[str] = []
    return verify.verify_resume(run, verify.Options(out, 6, "cpu", 0), said.append), said


@pytest.mark.parametrize("broken", ["nothing", "exp_avg_sq", "step", "order"])
def test_verdict(broken: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_train", train_here)
    if broken == "order":
        monkeypatch.setattr(loop, "read_state", shifting(loop.read_state))
    elif broken != "nothing":
        monkeypatch.setattr(loop, "read_state", forget(broken))
    parted, said = verified(make_run(shards), tmp_path / "out")
    assert "control, a restore at step 2 without " in said[-1] and "at step 4 they part in" in said[-1]
    if broken == "nothing":
        assert parted is None and not (tmp_path / "out").exists()
    else:
        assert parted is not None and parted.startswith("at step 4 they part in ")


def test_a_stop_that_came_too_late_is_made_one(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run had ended before the signal: its later checkpoints go, so that there is something to go on with."""
    begun: list[Path | None] = []

    def late(recipe: Path, out: Path, options: verify.Options, stop: signal.Signals | None, after: int = 0) -> None:
        begun.append(max((out / loop.CHECKPOINTS).glob("step-*"), default=None))
        train_here(recipe, out, options, None if stop is signal.SIGTERM else stop, after)

    monkeypatch.setattr(verify, "_train", late)
    parted, said = verified(make_run(shards), tmp_path / "out")
    assert parted is None and "killed after step 2, stopped after step 4, gone on: the same bits" in said[1]
    assert [path and path.name for path in begun] == [None, None, "step-00000002", "step-00000004", "step-00000002"]


def test_a_run_killed_from_outside_is_an_error(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -9 $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(verify.sys, "executable", str(python))
    with pytest.raises(RunError, match="gdn train was killed by signal 9 from outside: no word"):
        verified(make_run(shards), tmp_path / "out")


def shifting(read_state: Any) -> Any:
    """A read_state after which the run takes other windows than it would have."""

    def broken(*args: Any) -> Any:
        progress = read_state(*args)
        args[1].register_forward_pre_hook(lambda module, inputs: (inputs[0].flip(0), *inputs[1:]))
        return progress

    return broken


def test_control_that_is_not_caught_is_an_error(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_train", train_here)
    monkeypatch.setattr(verify, "_forget", lambda checkpoint: "nothing at all")
    with pytest.raises(RunError, match="nothing is proved"):
        verified(make_run(shards), tmp_path / "out")


def test_what_cannot_be_verified(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--steps 4; expected 3, 6, 9"):
        verify.verify_resume(make_run(shards), verify.Options(tmp_path / "out", 4, "cpu", 0), print)
    with pytest.raises(ConfigError, match="--processes -1; expected 0"):
        verify.verify_resume(make_run(shards), verify.Options(tmp_path / "out", 3, "cpu", -1), print)
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="out exists"):
        verified(make_run(shards), tmp_path / "out")


def test_command_fails_with_what_the_run_said(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(shards, data={"shards": str(tmp_path / "none")})
    recipe = write_recipe(run, tmp_path / "recipe.toml")
    assert main(["--quiet", "verify-resume", recipe, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "gdn train ended with 2: gdn: " in capsys.readouterr().err


@pytest.mark.soak
@pytest.mark.parametrize("processes", ["0", "2"])
def test_command_in_processes_of_its_own(
    processes: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(make_run(shards), tmp_path / "recipe.toml")
    assert main(["verify-resume", recipe, "--out", str(tmp_path / "out"), "--device", "cpu", "--processes", processes]) == 0
    assert "pass: resuming changes no bit" in capsys.readouterr().out
