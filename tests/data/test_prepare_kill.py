"""Killed at any moment, the whole group or the parent alone, `prepare` ends in the bytes of a run that nothing disturbed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shards_testing import write_rows

from gdn.data.tokenizer import train_bpe

DRIVER = str(Path(__file__).with_name("prepare_driver.py"))
TASKS = 24


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    rng = random.Random(0)
    words = [f"word{i}" for i in range(3000)]
    for number in range(TASKS):
        texts = [" ".join(rng.choices(words, k=rng.randrange(1, 120))) for _ in range(300)]
        texts[5] = "the same text in every file"
        write_rows(folder / "source" / f"{number:02d}.jsonl", texts)
    train_bpe(words, 400).save(folder / "tokenizer")
    run(folder, folder / "whole").wait()
    return folder


def run(inputs: Path, out: Path) -> "subprocess.Popen[bytes]":
    arguments = [str(inputs / "source"), str(inputs / "tokenizer"), str(out), str(150_000), "2"]
    return subprocess.Popen([sys.executable, DRIVER, *arguments], start_new_session=True, stderr=subprocess.PIPE)


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def of_session(leader: int) -> list[int]:
    """Processes that belong to the session of a process that may be gone, zombies apart."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(entry))
    return found


def kill_and_compare(inputs: Path, out: Path, kills: int, seed: int) -> None:
    rng, killed, before, published = random.Random(seed), 0, 0, {}
    done = out.with_name(out.name + ".work") / "tasks"
    while not out.exists():
        process = run(inputs, out)
        goal = min(before + rng.randrange(0, 2 * TASKS // (kills + 1)), TASKS - 1)
        try:
            while process.poll() is None and (killed == kills or len(list(done.glob("*/task.json"))) < goal):
                time.sleep(0.005)
            if process.poll() is not None:
                assert process.returncode == 0, process.stderr and process.stderr.read().decode()
                break
            time.sleep(rng.uniform(0, 0.1))
            alone = killed % 2 == 0
            os.kill(process.pid, signal.SIGKILL) if alone else os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
            deadline = time.monotonic() + 20
            while of_session(process.pid):  # workers must not go on writing without their parent
                assert time.monotonic() < deadline, "workers outlived their parent"
                time.sleep(0.02)
        finally:
            for left in of_session(process.pid):
                os.kill(left, signal.SIGKILL)
        published |= {path: path.stat().st_ino for path in done.glob("*/train.bin") if ".partial-" not in str(path)}
        for path, inode in published.items():
            assert path.stat().st_ino == inode, "a task that was done has been done again"
        before = len(published)
    assert killed == kills and before
    assert contents(out) == contents(inputs / "whole")
    assert sorted(path.name for path in out.parent.glob(f"{out.name}*")) == [out.name]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_in_the_middle_of_a_task_die_with_their_parent(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREPARE_DRIVER_HANGS", "1")
    process = run(inputs, tmp_path / "out")
    try:
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "out.work" / "tasks").glob("*.partial-*"))) < 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        assert len(of_session(process.pid)) >= 3
        process.kill()
        process.wait()
        deadline = time.monotonic() + 20
        while of_session(process.pid):
            assert time.monotonic() < deadline, "workers outlived their parent"
            time.sleep(0.05)
    finally:
        for left in of_session(process.pid):
            os.kill(left, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killed_three_times(inputs: Path, tmp_path: Path) -> None:
    assert len(list((inputs / "whole").glob("train-*.bin"))) > 8
    kill_and_compare(inputs, tmp_path / "out", kills=3, seed=1)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
def test_killed_twenty_times(inputs: Path, tmp_path: Path, seed: int) -> None:
    kill_and_compare(inputs, tmp_path / "out", kills=20, seed=seed)
