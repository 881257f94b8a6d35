"""Folders of checkpoints: published whole or not at all, checksummed, verified, pruned; written in the background.

What is sharded goes through torch.distributed.checkpoint, as safetensors: it is read back on any number of processes, and
nothing here is a pickle. The first process writes the rest. What the tensors mean is not known here.
"""

import json
import logging
import re
import threading
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from gdn.distributed.collectives import agree
from gdn.distributed.mesh import Workers
from gdn.errors import CheckpointError
from gdn.files import publish_folder, remove_folder, remove_partials, sha256_file

logger = logging.getLogger(__name__)

CHECKSUMS, SHARDED = "checksums.json", "optimizer"
_NAME = re.compile(r"step-(\d{8})")
_FILE_BYTES = 1 << 26  # DCP makes the bytes of a file holding Python's lock: a large one would stop the training thread


class Saver:
    """Publishes the checkpoints of a run one after another, each in a thread of its own while training goes on.

    A save that the disk refuses is a warning, the checkpoints before it stay, and the next one is tried as ever; the last
    save of a run must succeed (`finish`). All processes of the run call the same methods in the same order.
    """

    def __init__(self, folder: Path, keep: int, workers: Workers) -> None:
        self.folder = folder
        self._keep, self._workers = keep, workers
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def start(self, step: int, sharded: dict[str, Tensor], write: Callable[[Path], None]) -> None:
        """Begin to publish the checkpoint of `step`, after the one before: tensors on the CPU, and what `write` puts into it.

        Neither may change any more. Raises whatever ended the save before and was not the disk's refusal.
        """
        self._join()
        self._thread = threading.Thread(target=self._run, args=(step, sharded, write), name="save", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the save under way. Raises what ended it."""
        self._join()
        if self._error is not None:
            raise self._error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._thread is not None:  # an error ends the run: what was being saved is still good
            self._thread.join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._error is not None and not isinstance(self._error, OSError):
                raise self._error

    def _run(self, step: int, sharded: dict[str, Tensor], write: Callable[[Path], None]) -> None:
        self._error = None
        if self._device is not None:
            torch.cuda.set_device(self._device)  # a thread begins with the first GPU, where another process may be
        try:
            publish(self.folder, step, sharded, write, self._keep, self._workers)
        except OSError as error:
            self._error = error
            if self._workers.first:
                logger.warning("checkpoint of step %d was not saved: %s; the one before stays", step, error)
        except BaseException as error:  # whatever it is, the thread that trains raises it
            self._error = error


def publish(
    folder: Path, step: int, sharded: dict[str, Tensor], write: Callable[[Path], None], keep: int, workers: Workers
) -> None:
    """Make a new checkpoint of `step` in `folder`, publish it with its checksums, then delete all but `keep`.

    The first process calls `write` with the new folder; every process adds its part of `sharded`. There is none of this step
    yet: a run goes on from its newest. Raises OSError where the disk does not take it; nothing is left of it then.
    """
    with ExitStack() as stack:

        def begin() -> Path:
            partial = stack.enter_context(publish_folder(folder / f"step-{step:08d}"))
            write(partial)
            return partial

        partial = agree(begin, workers, workers.saving)
        _write_sharded(partial / SHARDED, sharded, workers)

        def end() -> None:
            sums = {str(path.relative_to(partial)): sha256_file(path) for path in sorted(partial.rglob("*")) if path.is_file()}
            (partial / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
            stack.close()
            try:
                for old in checkpoints(folder)[:-keep]:
                    remove_folder(old)
            except OSError as error:
                logger.warning("a checkpoint that is no longer kept could not be deleted: %s", error)

        agree(end, workers, workers.saving)


def _write_sharded(folder: Path, tensors: dict[str, Tensor], workers: Workers) -> None:
    size, files = 0, {}
    for name, tensor in tensors.items():
        size += tensor.nbytes
        files[name] = 1 + size // (_FILE_BYTES * workers.world_size)
    # One plain process is what is meant, and nothing to be warned of.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer, process_group=workers.saving, no_dist=workers.mesh is None)
    except CheckpointException as error:
        raise _first_failure(error, folder) from None
    except SafetensorError as error:
        raise OSError(f"{folder}: cannot be written: {error}") from None


def read_sharded(checkpoint: Path, into: dict[str, Tensor], workers: Workers) -> None:
    """Fill the tensors of `into`, of any sharding, with those of the same names in a verified checkpoint.

    Raises CheckpointError where it lacks one of them.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
    reader = HuggingFaceStorageReader(str(checkpoint / SHARDED))
    try:
        dcp.load(into, storage_reader=reader, process_group=workers.saving, no_dist=workers.mesh is None)
    except CheckpointException as error:
        raise CheckpointError(str(_first_failure(error, checkpoint / SHARDED))) from None


def _first_failure(error: CheckpointException, folder: Path) -> OSError:
    rank, (cause, _) = next(iter(sorted(error.failures.items())))
    if not isinstance(cause, OSError | SafetensorError | RuntimeError):
        raise cause
    return OSError(f"{folder}: process {rank}: {cause}")


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
    weights = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*.safetensors")}
    try:
        sums = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))
        if not isinstance(sums, dict):
            raise ValueError("no JSON object")
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / CHECKSUMS}: missing or broken ({error}){hint}") from None
    if strange := sorted(weights - sums.keys()):
        raise CheckpointError(f"{checkpoint / strange[0]}: not in {CHECKSUMS}{hint}")
    for name, expected in sums.items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing from its checkpoint{hint}")
        if sha256_file(path) != expected:
            raise CheckpointError(f"{path}: altered since it was saved (SHA-256 differs from {CHECKSUMS}){hint}")
