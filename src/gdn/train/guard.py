"""Eyes on a run's numbers: what is not finite, what jumps, and when all processes stop. The host never waits for the device."""

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gdn.errors import RunError
from gdn.files import write_text
from gdn.train.recipe import GuardConfig
from gdn.train.state import Progress

_LAG = 2  # steps that a GPU may be behind when its numbers are read: by then they are there, on every process
_HISTORY, _ENOUGH = 64, 32  # losses that a spike is measured against; fewer say nothing yet


class StepResult(NamedTuple):
    """What one optimizer step came to, over all processes: scalars on the device."""

    loss: Tensor
    grad_norm: Tensor  # before clipping
    stopping: Tensor  # how many processes have been asked to stop


class Guard:
    """Reads each step's result as soon as the device has surely made it: at once on a CPU, two steps later on a GPU.

    The step itself has already been skipped on the device where it was not finite (`train_step`); here it is counted and its
    windows are written to `nonfinite-step-XXXXXXXX.json` in `folder` (None: in another process). Steps count from 1, as in
    the metrics.
    """

    def __init__(
        self,
        config: GuardConfig,
        progress: Progress,
        folder: Path | None,
        windows: Callable[[int], list[int]],
        report: Callable[[Mapping[str, float]], None],
    ) -> None:
        self._config, self._progress, self._folder = config, progress, folder
        self._windows, self._report = windows, report
        self._waiting: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self._losses: deque[float] = deque(maxlen=_HISTORY)
        self.loss, self.grad_norm = math.nan, math.nan  # of the newest step that was read
        self.stopping = False  # a process was asked to stop; all learn it at the same step

    def note(self, step: int, result: StepResult) -> None:
        """Take the result of `step`, and read what is old enough. Raises RunError after too many bad steps in a row."""
        values, event = torch.stack([value.detach().float() for value in result]), None
        if values.is_cuda:
            values = torch.empty(3, pin_memory=True).copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((step, values, event))
        self.read(step - _LAG if event is not None else step)

    def read(self, until: int) -> None:
        """Read the results of all steps up to `until`, waiting for the device if it must. Raises as `note` does."""
        while self._waiting and self._waiting[0][0] <= until:
            step, values, event = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            self.loss, self.grad_norm, stopping = values.tolist()
            self.stopping |= stopping > 0
            if math.isfinite(self.loss) and math.isfinite(self.grad_norm):
                self._progress.skipped_in_a_row = 0
                self._look_for_spike(step)
            else:
                self._count_skipped(step)

    def _count_skipped(self, step: int) -> None:
        self._progress.skipped += 1
        self._progress.skipped_in_a_row += 1
        windows = self._windows(step - 1)
        if self._folder is not None:
            numbers = {"loss": self.loss, "grad_norm": self.grad_norm}
            dump = {key: value if math.isfinite(value) else repr(value) for key, value in numbers.items()}
            text = json.dumps({"step": step, "windows": windows} | dump)
            write_text(self._folder / f"nonfinite-step-{step:08d}.json", text + "\n")
            self._report({"step": step, "skipped": self._progress.skipped})
        if self._progress.skipped_in_a_row >= self._config.max_in_a_row:
            raise RunError(
                f"step {step}: loss {self.loss} or gradient norm {self.grad_norm} is not finite, for the "
                f"{self._progress.skipped_in_a_row}. time in a row (guard.max_in_a_row); windows of the step: {windows}"
            )

    def _look_for_spike(self, step: int) -> None:
        """A loss so many deviations above the median of those before; both are medians, which earlier spikes do not move."""
        if len(self._losses) >= _ENOUGH:
            median = statistics.median(self._losses)
            deviation = 1.4826 * statistics.median(abs(loss - median) for loss in self._losses)
            if self.loss > median + self._config.spike_deviations * deviation:
                self._report({"step": step, "loss_spike": self.loss, "loss_median": median})
        self._losses.append(self.loss)
