"""Files and folders that are either complete or absent: atomic publication, checksums, locks. Knows nothing of their contents.

Sits at layer 0 because data, checkpoints, exports and reports all publish, and siblings may not import each other.
"""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gdn.errors import RunError

_PARTIAL = ".partial-"


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of the file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def publish_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit it is synced and renamed to `path`, else removed."""
    partial = path.with_name(f"{path.name}{_PARTIAL}{os.getpid()}")
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8 so that a reader sees the old or the new file, never a part."""
    with publish_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def publish_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; on a clean exit it is synced and renamed to `target`, else removed.

    `target` must not exist: a published folder is never changed in place.
    """
    if target.exists():
        raise FileExistsError(errno.EEXIST, "folder exists already", str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}{_PARTIAL}{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        partial.rename(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def remove_folder(path: Path) -> None:
    """Delete a published folder so that a kill leaves it whole or under a name that `remove_partials` knows."""
    partial = path.with_name(f"{path.name}{_PARTIAL}{os.getpid()}")
    path.rename(partial)
    shutil.rmtree(partial)


def remove_partials(folder: Path) -> None:
    """Delete what killed processes left half-written in `folder`; call it only while holding the folder's lock."""
    for path in folder.glob(f"*{_PARTIAL}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold `folder/.lock` for the block; RunError naming the holder's process id if another process has it.

    The lock is the kernel's (flock), so that it ends with its process however that dies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            holder = stream.read().strip() or "unknown"
            raise RunError(
                f"{folder} is in use by another process (pid {holder}); wait for it or choose another folder"
            ) from None
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
