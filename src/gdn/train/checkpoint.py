"""Folders of checkpoints: published whole or not at all, checksummed, verified, pruned. Knows nothing of what is inside.

`distributed/` will take this over when its second module exists; see docs/architecture.md.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from gdn.errors import CheckpointError
from gdn.files import publish_folder, remove_partials, sha256_file

CHECKSUMS = "checksums.json"
_NAME = re.compile(r"step-(\d{8})")


def publish(folder: Path, step: int, write: Callable[[Path], None], keep: int) -> Path:
    """Let `write` fill a new checkpoint of `step` in `folder`, publish it with its checksums, then delete all but `keep`.

    There is none of this step yet: a run goes on from its newest.
    """
    target = folder / f"step-{step:08d}"
    with publish_folder(target) as partial:
        write(partial)
        sums = {str(path.relative_to(partial)): sha256_file(path) for path in sorted(partial.rglob("*")) if path.is_file()}
        (partial / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """The published checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def clean(folder: Path) -> None:
    """Remove what killed processes left half-written."""
    if folder.exists():
        remove_partials(folder)


def verify(checkpoint: Path) -> None:
    """CheckpointError naming the file, and the checkpoint before, unless every file has the bytes that were published."""
    older = [path for path in checkpoints(checkpoint.parent) if path < checkpoint]
    hint = f"; to go on from the one before, delete {checkpoint}" if older else ""
    try:
        sums = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{checkpoint / CHECKSUMS}: missing or broken ({error}){hint}") from None
    for name, expected in sums.items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing from its checkpoint{hint}")
        if sha256_file(path) != expected:
            raise CheckpointError(f"{path}: altered since it was saved (SHA-256 differs from {CHECKSUMS}){hint}")
