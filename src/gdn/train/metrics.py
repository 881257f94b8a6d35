"""What a run reports: rows of metrics.jsonl, TensorBoard on request, and a live display. The only module with a tracker."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from gdn.errors import ConfigError

METRICS = "metrics.jsonl"


class Metrics:
    """Appends rows to `folder`/metrics.jsonl, each flushed, and to TensorBoard if asked."""

    def __init__(self, folder: Path, tensorboard: bool) -> None:
        self._stream = (folder / METRICS).open("a+", encoding="utf-8")
        self._end_torn_row()
        self._board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ConfigError('log.tensorboard = true needs tensorboard: pip install "gdn[tensorboard]"') from None
            self._board = SummaryWriter(str(folder / "tensorboard"))

    def _end_torn_row(self) -> None:
        """End a last row that a kill cut off, so that the next one is not lost with it."""
        if self._stream.tell():
            self._stream.seek(0)
            if not self._stream.read().endswith("\n"):
                self._stream.write("\n")

    def write(self, row: Mapping[str, float]) -> None:
        """Write one row; it has a "step". Values that JSON cannot hold (nan, inf) become null."""
        clean = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self._stream.write(json.dumps(clean) + "\n")
        self._stream.flush()
        if self._board is not None:
            for key, value in row.items():
                if key != "step":
                    self._board.add_scalar(key, value, int(row["step"]))

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stream.close()
        if self._board is not None:
            self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; a last row cut off by a kill is left out."""
    rows = []
    for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


class Display:
    """Loss, tokens/s, learning rate and time left on one line that renews itself; plain lines where there is no terminal."""

    def __init__(self, console: Console, steps: int, done: int) -> None:
        self._console, self._steps = console, steps
        self._last_line = -math.inf
        columns = (
            TextColumn("[bold]training"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task("", total=steps, completed=done)

    def update(self, row: Mapping[str, float], seconds_left: float) -> None:
        text = (
            f"step {row['step']:,.0f}/{self._steps:,}  loss {row['loss']:.3f}  "
            f"{row['tokens_per_second']:,.0f} tok/s  lr {row['lr']:.1e}"
        )
        if self._console.is_terminal:
            self._progress.update(self._task, completed=row["step"], description=text)
        elif time.monotonic() - self._last_line > 10 or row["step"] == self._steps:
            self._last_line = time.monotonic()
            self._console.print(f"{text}  {seconds_left:,.0f} s left", highlight=False)

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()
