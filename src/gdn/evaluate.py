"""`gdn eval` below the command line: a model folder to a live table, results on disk and a page."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from gdn import __version__
from gdn.errors import CheckpointError, ConfigError
from gdn.eval import harness, local, workers
from gdn.eval.card import MEAN, in_errors, row_of, ruler_mean
from gdn.eval.results import Results, read_samples
from gdn.eval.scoring import TOKEN_BUDGET, Scorer, without_collector
from gdn.files import sha256_file, write_text
from gdn.model.load import CONFIG, is_ours, load_model, read_config, read_json
from gdn.ops.backend import choose_backend
from gdn.report.evaluation import EvaluationReport, Example, Measured, render_evaluation
from gdn.report.figures import Cell

PAGE = "report.html"


@dataclass(frozen=True)
class Options:
    """What of `gdn eval` decides its numbers, and by how many processes they are computed, which changes none of them.

    workers: 1 unless asked for, because each imports the caller's main module anew; None for
    `gdn.eval.workers.choose_workers` to choose.
    """

    data: Path | None
    tasks: tuple[str, ...] = ("card",)
    limit: int | None = None
    num_fewshot: int | None = None
    ruler_lengths: tuple[int, ...] = ()
    stream: bool = False
    dtype: str = "auto"  # float32 or bfloat16; auto: bfloat16 on CUDA, else float32
    max_length: int | None = None
    token_budget: int | None = None  # tokens of one forward pass; None: by device
    workers: int | None = 1


def evaluate(folder: Path, options: Options, out: Path, device: torch.device, console: Console) -> dict[str, dict[str, Any]]:
    """Run the tasks on the model in `folder`, showing the table as it grows; results under `out`, finished tasks reused.

    Returns each task's numbers by name, in the order asked for. Under torchrun, processes share the work and the first one
    writes and shows. Raises GDNError for whatever of model, data, task or earlier results cannot be used; what was finished
    before is kept.
    """
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit = {options.limit}; expected at least 1")
    tasks = options.tasks if options.data is not None else harness.expand(options.tasks)
    works = harness.plan(tasks, stream=options.stream, ruler_lengths=options.ruler_lengths)
    tokenizer = harness.load_tokenizer(folder)
    dtype = _dtype(options.dtype, device)
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    lock = _lock(folder, options, tokenizer, device, dtype)
    order = [work.name for work in works]
    table = _Table(console if first else Console(quiet=True), order)
    results = Results(out, lock, str(folder), order)
    found = {work.name: results.finished(work.name, _data_sha256(work, options)) for work in works}
    missing = [work for work in works if found[work.name] is None]
    ours = is_ours(folder)
    number = workers.choose_workers(options.workers, len(missing), device, ours)
    early = missing if number > 1 else []  # the model is there before the first ask of it
    opener = partial(_open, folder, options, device, dtype, early)
    prepare = partial(_prepare, folder, options)
    config = read_config(folder) if ours else None
    with table, closing(workers.measure(missing, number, opener, prepare, table.progress, config)) as measured:
        for name, result in found.items():
            if result is not None:
                table.add(name, result)
        for work, result in measured:
            table.add(work.name, results.add(work.name, result) if first else result)
        numbers = {work.name: results.tasks[work.name] for work in works if work.name in results.tasks}
        if mean := ruler_mean(numbers):
            table.add(MEAN.task, mean)
    if first:
        samples = {name: read_samples(out, name, task["samples_sha256"]) for name, task in numbers.items()}
        write_text(out / PAGE, render_evaluation(_report(folder, lock, numbers, samples)))
    return numbers


def check_documents(tasks: Sequence[str], data: Path) -> None:
    """Raise, before there is a model, what `evaluate` would raise of the tasks' names and of their documents in `data`."""
    for work in harness.plan(tasks):
        if work.length is None:
            harness.local_documents(work, data)


def _report(
    folder: Path, lock: dict[str, Any], tasks: dict[str, dict[str, Any]], samples: dict[str, list[dict[str, Any]]]
) -> EvaluationReport:
    rows, needles, examples = [], [], []
    for name, task in tasks.items():
        rows.append(_measured(name, task))
        row = row_of(name, task["metric"])
        depths: dict[int, list[float]] = {}
        for sample in samples[name]:
            if "depth" in sample:
                depths.setdefault(min(4, int(5 * sample["depth"])), []).append(sample["metrics"][str(task["length"])])
            if "prompt_end" in sample:
                said = [f"{answer[0]:.2f}" if isinstance(answer, list) else f"{answer:.6}" for answer in sample["responses"]]
                if isinstance(sample["responses"][0], str):  # a text that was written, not a choice that was scored
                    answers = [(sample["responses"][0], "")]
                else:
                    answers = list(zip(sample["endings"], said))
                examples.append(Example(row.title, sample["prompt_end"], tuple(answers), str(sample["target"])))
        label = f"{name.split('@')[0]}, {task['length']:,}" if task["length"] else name
        needles += [Cell(label, f"{depth / 5:.1f}", sum(hits) / len(hits)) for depth, hits in sorted(depths.items())]
    if mean := ruler_mean(tasks):
        rows.append(_measured(MEAN.task, mean))
    needles.sort(key=lambda cell: cell.column)
    verdict = f"{len(tasks)} measurements on {sum(task['documents'] for task in tasks.values()):,} documents."
    facts = [("checkpoint", str(folder)), *((name, str(value)) for name, value in lock.items())]
    return EvaluationReport(folder.name, verdict, rows, needles, examples, facts)


def _measured(name: str, task: dict[str, Any]) -> Measured:
    row, metric, value, stderr = row_of(name, task["metric"]), task["metric"], task["value"], task["stderr"]
    return Measured(row.title, metric, value, stderr, row.published, row.chance, task["documents"], task["left_out"])


class _Table:
    """The live table: a line for each finished task, those of `order` in that order, and one for each that is running."""

    def __init__(self, console: Console, order: Sequence[str] = ()) -> None:
        self.console = console
        self.order = list(order)
        self.rows: dict[str, tuple[str, ...]] = {}
        self.notes: dict[str, str] = {}
        self.running: dict[str, str] = {}
        self.live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=not console.is_terminal)

    def __enter__(self) -> "_Table":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.running.clear()
        if self.console.is_terminal:
            self.live.stop()
        elif self.rows:
            self.console.print(self._render())

    def progress(self, name: str, done: int, total: int) -> None:
        self.running[name] = f"{name}: {done:,} of {total:,} requests" if total else name

    def add(self, name: str, result: dict[str, Any]) -> None:
        row = row_of(name, result["metric"])
        stderr, apart = result["stderr"], in_errors(result["value"], result["stderr"], row.published)
        cells = [_number(value) for value in (result["value"], stderr, row.published)]
        cells.append("-" if apart is None else f"{apart:+.1f}")
        self.running.pop(name, None)
        self.rows[name] = (row.title, result["metric"], f"{result['documents']:,}", *cells)
        if result["left_out"]:
            self.notes[name] = f"{name}: {result['left_out']} rows of the file cannot be scored and are left out"
        if result["repeated"]:
            self.notes[name] = f"{name}: the essays are shorter than this and are repeated"
        if not self.console.is_terminal:  # a log: nothing is lost if it is cut off
            self.console.print("  ".join(self.rows[name]), highlight=False)

    def _render(self) -> Table:
        names = [name for name in self.order if name in self.rows]
        names += [name for name in self.rows if name not in self.order]
        notes = [self.notes[name] for name in names if name in self.notes]
        table = Table(caption="\n".join([*notes, *self.running.values()]) or None)
        for name in ("task", "metric", "documents", "value", "std. error", "published", "difference in std. errors"):
            table.add_column(name, justify="left" if name in ("task", "metric") else "right")
        for name in names:
            table.add_row(*self.rows[name])
        return table


def _open(folder: Path, options: Options, device: torch.device, dtype: torch.dtype, early: Sequence[harness.Work]) -> Any:
    """The model in `folder`: a Scorer, or of another architecture the harness's own. early: what it may warm up for."""
    if is_ours(folder):
        model = load_model(folder, dtype=dtype, device=device).requires_grad_(False)  # else texts are not captured steps'
        scorer = Scorer(model, token_budget=options.token_budget)
        if early:
            scorer.warm_up(texts=any(work.length for work in early))
        return scorer
    return harness.other_model(folder, harness.load_tokenizer(folder), device, dtype, options.max_length)


def _prepare(folder: Path, options: Options, model: Any, progress: Callable[[int, int], None] | None) -> workers.Measure:
    """What measures a task with that model, or with ours in another process."""
    tokenizer, ours = harness.load_tokenizer(folder), is_ours(folder)
    lm = harness.adapt(model, tokenizer, options.max_length, progress) if ours else model

    def measure(work: harness.Work) -> dict[str, Any]:
        return harness.run_task(lm, work, tokenizer, data=options.data, limit=options.limit, num_fewshot=options.num_fewshot)

    return without_collector()(measure) if ours else measure  # of tensors in cycles elsewhere we know nothing


def _lock(folder: Path, options: Options, tokenizer: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Everything that a number may depend on, but for the tasks' own text and data, which each result holds."""
    config = read_json(folder / CONFIG)
    ours = is_ours(folder)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise CheckpointError(f"{folder}: no safetensors; expected the model's weights")
    size = (int(config.get("head_dim", 256)), int(config.get("head_dim", 256) * config.get("expand_v", 1)))
    adds = tokenizer("")["input_ids"]
    return {
        "gdn": __version__,
        **{name: version(name) for name in ("lm_eval", "torch", "transformers", "tokenizers", "datasets")},
        "model": [sha256_file(path) for path in weights],
        "tokenizer": sha256_file(folder / "tokenizer.json") if (folder / "tokenizer.json").exists() else repr(tokenizer),
        "dtype": str(dtype).removeprefix("torch."),
        "backend": choose_backend("auto", device, dtype, *size) if ours else "transformers",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "bos": f"in front of every text: {adds}; rolling rows: one, or with the harness's own ({tokenizer.bos_token_id})",
        "max_length": options.max_length or config.get("max_position_embeddings"),
        "token_budget": options.token_budget or TOKEN_BUDGET.get(device.type),
        "num_fewshot": options.num_fewshot or 0,
        "limit": options.limit,
        "seeds": {"few_shot": harness.SEED, "ruler": "task, length and number of each sample"},
    }


def _data_sha256(work: harness.Work, options: Options) -> str | None:
    if options.data is None or work.length is not None:
        return None
    path = local.path_of(work.task, options.data)
    return sha256_file(path) if path is not None and path.exists() else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if value < 10 else f"{value:,.2f}"


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype
