"""What a run reports: rows of metrics.jsonl, TensorBoard and W&B on request, a live display. The only module with trackers."""

import json
import math
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from gdn import config as toml
from gdn.errors import ConfigError
from gdn.files import write_text
from gdn.train.recipe import RunConfig

METRICS = "metrics.jsonl"
_WANDB_ID = "wandb-id"


class Metrics:
    """Appends rows to `folder`/metrics.jsonl, each flushed, and to the trackers that the recipe asks for."""

    def __init__(self, folder: Path, run: RunConfig, step: int = 0) -> None:
        """Of a run that stands at `step`. Raises ConfigError for a tracker that is not installed."""
        self._board: Any = None
        self._wandb: Any = None
        if run.log.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ConfigError('log.tensorboard = true needs tensorboard: pip install "gdn[tensorboard]"') from None
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if run.log.wandb:
            try:
                import wandb
            except ImportError:
                raise ConfigError('log.wandb = true needs wandb: pip install "gdn[wandb]"') from None
            identity = {"project": run.log.wandb_project, "name": run.name, "id": _wandb_id(folder), "resume": "allow"}
            self._wandb = wandb.init(**identity, dir=str(folder), config=toml.to_dict(run))
            # By the row's own step: a run that goes on from a checkpoint logs some steps a second time.
            self._wandb.define_metric("*", step_metric="step")
        self._stream = (folder / METRICS).open("a+", encoding="utf-8")
        self._end_torn_row()

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
        if self._wandb is not None:
            self._wandb.log(dict(row))

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stream.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)


def _wandb_id(folder: Path) -> str:
    """One id for all calls of a run: what goes on is drawn as one line there too."""
    path = folder / _WANDB_ID
    if not path.exists():
        write_text(path, uuid.uuid4().hex + "\n")
    return path.read_text(encoding="utf-8").strip()


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
    """Loss, speed, share of the peak, memory and time left on one line that renews itself; plain lines without a terminal."""

    def __init__(self, console: Console, steps: int, done: int) -> None:
        self._console, self._steps = console, steps
        self._last_line = -math.inf
        text = "{task.description}"
        columns = (BarColumn(bar_width=10), TextColumn(text))  # what a narrow window needs fits in it
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task("", total=steps, completed=done)

    def update(self, row: Mapping[str, float]) -> None:
        text = progress_line(row, self._steps)
        if self._console.is_terminal:
            self._progress.update(self._task, completed=row["step"], description=text)
        elif time.monotonic() - self._last_line > 10 or row["step"] == self._steps:
            self._last_line = time.monotonic()
            self._console.print(text, highlight=False, soft_wrap=True)

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()


def progress_line(row: Mapping[str, float], steps: int) -> str:
    """One line of a row of metrics; what the row does not know is left out."""
    parts = [f"step {row['step']:,.0f}/{steps:,}", f"loss {row['loss']:.3f}", f"{row['tokens_per_second']:,.0f} tok/s"]
    if "mfu" in row or "mfu_measured" in row:
        parts.append(f"MFU {row.get('mfu', row.get('mfu_measured', 0.0)):.1%}")
    minutes, seconds = divmod(round(row["seconds_left"]), 60)
    parts.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left" if minutes >= 60 else f"{minutes}:{seconds:02} left")
    if row["data_wait"] >= 0.01:
        parts.append(f"waiting for data {row['data_wait']:.0%}")
    parts += [f"lr {row['lr']:.1e}", f"{row['memory_gib']:.1f} GiB"]
    return "  ".join(parts)
