import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from train_testing import differences, go, make_run, partials, saved

from gdn import config as toml
from gdn.train.recipe import RunConfig

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
GDN = [sys.executable, "-m", "gdn", "--quiet", "train"]


def write_recipe(run: RunConfig, path: Path) -> str:
    path.write_text(toml.dump(run), encoding="utf-8")
    return str(path)


def kill_and_compare(shards: Path, tmp_path: Path, steps: int, kills: int, seed: int, processes: int = 0) -> dict[str, int]:
    run = make_run(shards, train={"steps": steps}, checkpoint={"every": 2, "keep": 2})
    recipe, out = write_recipe(run, tmp_path / "recipe.toml"), tmp_path / "run"
    go_on = {"recipe": recipe, "phases": [{"processes": processes}]}
    fleet = [sys.executable, str(Path(__file__).with_name("fleet.py"))]
    driver = [
        sys.executable,
        str(Path(__file__).with_name("killer.py")),
        recipe,
        str(out),
        str(seed),
        str(kills),
        str(processes),
    ]
    result = subprocess.run(driver, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    jobs = json.dumps([go_on | {"out": str(tmp_path / "whole")}, go_on | {"out": str(out)}])
    assert subprocess.run([*fleet, jobs], env=ENVIRONMENT).returncode == 0
    counts: dict[str, int] = json.loads(result.stdout)
    for folder in [out, *tmp_path.glob("run-done-*")]:
        assert differences(saved(tmp_path / "whole", steps), saved(folder, steps)) == []
        assert partials(folder) == []
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
            f"step-{steps - 2:08d}",
            f"step-{steps:08d}",
        ]
    return counts


@pytest.mark.parametrize(("processes", "kills"), [(0, 3), (2, 2)])
def test_killed_a_few_times_ends_bit_identical(processes: int, kills: int, shards: Path, tmp_path: Path) -> None:
    counts = kill_and_compare(shards, tmp_path, 12, kills=kills, seed=1, processes=processes)
    assert counts["killed"] == kills and counts["inside"] >= 1


@pytest.mark.soak
@pytest.mark.parametrize(("processes", "seed"), [(0, 2), (0, 3), (0, 4), (2, 5), (2, 6)])
def test_killed_two_hundred_times_ends_bit_identical(processes: int, seed: int, shards: Path, tmp_path: Path) -> None:
    """A thousand kills in all, of a plain process or of one of two."""
    counts = kill_and_compare(shards, tmp_path, 40, kills=200, seed=seed, processes=processes)
    assert counts["killed"] == 200 and counts["inside"] >= 20


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signal_from_outside_leaves_a_checkpoint_to_go_on_from(
    number: signal.Signals, code: int, shards: Path, tmp_path: Path
) -> None:
    """Stopped at an unknown step k of a run too long to end; the state there is that of a straight run to k."""
    changes: dict[str, dict[str, Any]] = {"checkpoint": {"every": 1_000_000, "keep": 2}}
    run = make_run(shards, train={"steps": 1_000_000}, **changes)
    recipe, out = write_recipe(run, tmp_path / "recipe.toml"), tmp_path / "run"
    process = subprocess.Popen(
        [*GDN, recipe, "--out", str(out), "--device", "cpu"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 30
        while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < 3:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == code, stderr
    assert "stopped; the same command goes on from there" in stdout
    assert "Traceback" not in stderr
    (found,) = (out / "checkpoints").iterdir()
    step = json.loads((found / "progress.json").read_text())["step"]
    assert step >= 3
    straight = make_run(shards, train={"steps": 1_000_000}, checkpoint={"every": step, "keep": 2})
    straight_until(straight, tmp_path / "whole", step)
    assert differences(saved(tmp_path / "whole", step), found) == []


def straight_until(run: RunConfig, folder: Path, step: int) -> None:
    """Run to `step` of a longer schedule, in one go."""
    import gdn.train.loop as loop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "learning_rate", stop_in(step, loop.learning_rate))
        assert go(run, folder).progress.step == step


def stop_in(step: int, original: Any) -> Any:
    def learning_rate(now: int, *rest: Any) -> float:
        if now == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        value: float = original(now, *rest)
        return value

    return learning_rate
