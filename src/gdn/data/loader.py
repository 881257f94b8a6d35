"""Token shards to batches of tensors: training in the order of `order`, evaluation in the order of the text."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gdn.data.order import Mixture
from gdn.data.shards import TokenShards
from gdn.errors import ConfigError, DataError
from gdn.ops.cross_entropy import IGNORED


class Batch(NamedTuple):
    """What one forward-backward computes on; all tensors on the CPU."""

    input_ids: Tensor  # [B, T] int64
    labels: Tensor  # [B, T] int64: the token after each input, or -100 where there is none to predict
    cu_seqlens: Tensor | None  # [N+1] int32, then B == 1: where sequences begin, padded with the length
    window_ids: Tensor  # [windows] int64: which windows of the split these are


class Loader:
    """The micro batches of any step, as a pure function of (shards, seed, step); the step after it is read in the background.

    A window is seq_len + 1 tokens at a stride of seq_len, so that it has seq_len targets. With `reset_at_documents` the
    windows of a micro batch are laid end to end, [1, micro_batch_size * seq_len], and `cu_seqlens` begins a sequence at
    every window and document; its length is always micro_batch_size * (1 + most documents in a window) + 1, the unused
    end filled with the total length, and the step from one document into the next is no target.
    """

    def __init__(
        self,
        shards: TokenShards,
        seq_len: int,
        micro_batch_size: int,
        global_batch_size: int,
        seed: int,
        reset_at_documents: bool = False,
    ) -> None:
        """Raises ConfigError for sizes that do not divide and DataError for a split shorter than one window."""
        for name, size in (("seq_len", seq_len), ("micro_batch_size", micro_batch_size)):
            if size < 1:
                raise ConfigError(f"{name} = {size}; expected at least 1")
        if global_batch_size < 1 or global_batch_size % micro_batch_size:
            raise ConfigError(
                f"global_batch_size = {global_batch_size}; expected a multiple of micro_batch_size = {micro_batch_size}"
            )
        for part in shards.parts:
            if part.num_tokens <= seq_len:
                of = f" of {part.name}" if len(shards.parts) > 1 else ""
                raise DataError(
                    f"{shards.folder}: split {shards.split!r} has {part.num_tokens} tokens{of}; "
                    f"expected at least {seq_len + 1} for seq_len = {seq_len}"
                )
        self.shards = shards
        self.seq_len = seq_len
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        counts = [part.num_windows(seq_len) for part in shards.parts]
        self.order = Mixture(counts, [part.weight for part in shards.parts], seed)
        # Windows are numbered through the parts, and a part begins where the one before ends, not a window later.
        self._first_windows = np.cumsum([0, *counts[:-1]])
        self._offsets = np.array([part.first for part in shards.parts]) - self._first_windows * seq_len
        self._num_boundaries = 0  # length of cu_seqlens
        if reset_at_documents:
            most = max(shards.max_documents(part.first, seq_len) for part in shards.parts)
            self._num_boundaries = micro_batch_size * (1 + most) + 1
        self._stamps: dict[Path, tuple[int, int, int]] = {}
        self.watch(shards.paths)
        self._ahead: tuple[tuple[int, int, int], Future[list[Batch]]] | None = None
        self._reader = ThreadPoolExecutor(1, "loader")

    def micro_batches(self, step: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """The micro batches of optimizer step `step` (from 0) that fall to `rank`: its slice of the global batch.

        Raises ConfigError where micro_batch_size * world_size does not divide global_batch_size.
        """
        if self.global_batch_size % (self.micro_batch_size * world_size):
            raise ConfigError(
                f"global_batch_size = {self.global_batch_size}; expected a multiple of micro_batch_size = "
                f"{self.micro_batch_size} times world_size = {world_size}"
            )
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == (step, rank, world_size):
            batches = ahead[1].result()
        else:
            batches = self._load_step(step, rank, world_size)
        after = (step + 1, rank, world_size)
        self._ahead = (after, self._reader.submit(self._load_step, *after))
        return iter(batches)

    def windows(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Which windows step `step` trains on at `rank`: int64 [global_batch_size / world_size]."""
        share = self.global_batch_size // world_size
        return self.order.batch(step, self.global_batch_size)[rank * share : (rank + 1) * share]

    def starts(self, windows: np.ndarray) -> np.ndarray:
        """Where in the split's stream of tokens the given windows begin: int64, of the same shape."""
        part = np.searchsorted(self._first_windows, windows, side="right") - 1
        return windows * self.seq_len + self._offsets[part]

    def load(self, windows: np.ndarray) -> Batch:
        """The batch of the given windows, int64 [micro_batch_size]."""
        T = self.seq_len
        starts = self.starts(windows).tolist()
        tokens = np.empty((len(starts), T + 1), dtype=np.int64)
        for row, start in enumerate(starts):
            self.shards.read_into(start, tokens[row])
        inputs, labels = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        ids = torch.from_numpy(windows)
        if not self._num_boundaries:
            return Batch(torch.from_numpy(inputs), torch.from_numpy(labels), None, ids)
        total = len(windows) * T
        boundaries = np.full(self._num_boundaries, total, dtype=np.int32)
        used = 0
        for row, start in enumerate(starts):
            begins = self.shards.document_starts(start, T + 1)
            labels[row, begins[begins > 0] - 1] = IGNORED
            inside = begins[(begins > 0) & (begins < T)]
            boundaries[used] = row * T
            boundaries[used + 1 : used + 1 + len(inside)] = row * T + inside
            used += 1 + len(inside)
        packed_inputs, packed_labels = torch.from_numpy(inputs.reshape(1, -1)), torch.from_numpy(labels.reshape(1, -1))
        return Batch(packed_inputs, packed_labels, torch.from_numpy(boundaries), ids)

    def _load_step(self, step: int, rank: int, world_size: int) -> list[Batch]:
        windows = self.windows(step, rank, world_size)
        self.check_unchanged()  # before too: reading a mapped file that was cut short kills the process
        batches = [self.load(part) for part in np.split(windows, len(windows) // self.micro_batch_size)]
        self.check_unchanged()
        return batches

    def watch(self, paths: Iterable[Path]) -> None:
        """Hold these files, whose checksums were verified, to what they are now."""
        self._stamps |= {path: _stamp(path) for path in paths}

    def check_unchanged(self) -> None:
        """DataError naming a file that is no longer the one whose checksum was verified: tokens of another are no step's."""
        for path, stamp in self._stamps.items():
            if _stamp(path) != stamp:
                raise DataError(f"{path}: changed since the run began reading it; restore it, and the run goes on where it was")


def _stamp(path: Path) -> tuple[int, int, int]:
    """What changes with a file's bytes or with the file: its inode, size and time of change. DataError where there is none."""
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; the run reads it until its end") from None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def sequential_windows(shards: TokenShards, seq_len: int, micro_batch_size: int) -> Iterator[Batch]:
    """The whole split in order, every token but its first the target exactly once, to evaluate it.

    Windows begin with an empty context, wherever in a document they fall; the last is filled with id 0 and labels -100,
    and the last batch may have fewer rows. For a score by document, read `shards.document_starts` instead.
    """
    T = seq_len
    count = -(-max(shards.num_tokens - 1, 0) // T)
    for first in range(0, count, micro_batch_size):
        windows = np.arange(first, min(first + micro_batch_size, count), dtype=np.int64)
        inputs = np.zeros((len(windows), T), dtype=np.int64)
        labels = np.full((len(windows), T), IGNORED, dtype=np.int64)
        for row, window in enumerate(windows):
            start = int(window) * T
            tokens = shards.read(start, min(T + 1, shards.num_tokens - start))
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            labels[row, : len(tokens) - 1] = tokens[1:]
        yield Batch(torch.from_numpy(inputs), torch.from_numpy(labels), None, torch.from_numpy(windows))
