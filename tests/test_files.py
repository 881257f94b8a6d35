"""Publication is all or nothing; a lock ends with its holder."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gdn.errors import RunError
from gdn.files import lock_folder, publish_file, publish_folder, remove_partials, sha256_file, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(content)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(content).hexdigest()


def test_publish_file_replaces_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    with publish_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old" and partial.parent == tmp_path
    assert path.read_text() == "new" and names(tmp_path) == ["x"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_publish_file_leaves_nothing_on_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(error), publish_file(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["x"]


def test_write_text_is_utf8_and_replaces(tmp_path: Path) -> None:
    write_text(tmp_path / "x", "old, longer")
    write_text(tmp_path / "x", "é😀\n")
    assert (tmp_path / "x").read_bytes() == "é😀\n".encode() and names(tmp_path) == ["x"]


def test_publish_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with publish_folder(target) as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "file").write_text("x")
        assert not target.exists()
    assert (target / "deep" / "file").read_text() == "x" and names(target.parent) == ["b"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_publish_folder_leaves_nothing_on_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), publish_folder(tmp_path / "b") as partial:
        (partial / "file").write_text("half")
        raise error
    assert names(tmp_path) == []


def test_publish_folder_never_touches_an_existing_one(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").write_text("x")
    with pytest.raises(FileExistsError) as error, publish_folder(tmp_path / "b"):
        raise AssertionError("entered")
    assert error.value.filename == str(tmp_path / "b")
    assert names(tmp_path) == ["b"] and names(tmp_path / "b") == ["mine"]


def test_publish_folder_starts_empty_after_a_killed_namesake(tmp_path: Path) -> None:
    left = tmp_path / f"b.partial-{os.getpid()}"
    left.mkdir()
    (left / "stale").write_text("x")
    with publish_folder(tmp_path / "b") as partial:
        (partial / "file").write_text("x")
    assert names(tmp_path / "b") == ["file"]


def test_remove_partials_takes_only_those(tmp_path: Path) -> None:
    (tmp_path / "b.partial-1").mkdir()
    (tmp_path / "b.partial-1" / "x").write_text("x")
    (tmp_path / "c.partial-22").write_text("x")
    (tmp_path / "keep").mkdir()
    (tmp_path / "partial.txt").write_text("x")
    remove_partials(tmp_path)
    assert names(tmp_path) == ["keep", "partial.txt"]


HOLD = """
import pathlib, sys, time, gdn.files
with gdn.files.lock_folder(pathlib.Path(sys.argv[1])):
    print(1, flush=True)
    time.sleep(60)
"""


def test_a_locked_folder_names_its_holder_and_is_free_when_that_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == b"1\n"
            with pytest.raises(RunError, match=rf"{folder} is in use.*\(pid {holder.pid}\)"), lock_folder(folder):
                raise AssertionError("entered")
            with pytest.raises(RunError, match=rf"pid {holder.pid}\)"), lock_folder(folder):  # the refusal wrote nothing
                raise AssertionError("entered")
        finally:
            holder.send_signal(signal.SIGKILL)
            holder.wait()
    with lock_folder(folder):
        assert (folder / ".lock").read_text() == str(os.getpid())  # the dead holder's id is gone


def test_a_lock_ends_with_its_block_whatever_ends_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError), lock_folder(tmp_path):
        raise ValueError
    with lock_folder(tmp_path), pytest.raises(RunError, match=str(os.getpid())), lock_folder(tmp_path):
        raise AssertionError("entered")
    with lock_folder(tmp_path):
        pass
