"""`gdn reproduce`: data, run, evaluation and verdict of a recipe as one command that goes on wherever it was stopped.

Everything lies in one folder: shards/ (or another's), run/, eval/, verdict.json and report.html. Each stage knows by itself
what it has finished, and refuses to go on under other options by naming the one that differs.
"""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import logging
import math
import platform
import signal
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

import gdn
from gdn import config as toml
from gdn.data.shards import HELDOUT, MANIFEST, TOKENIZER, TRAIN, read_manifest
from gdn.data.tokenizer import load_tokenizer
from gdn.distributed.mesh import world_size
from gdn.errors import ConfigError, DataError
from gdn.eval.card import in_errors, row_of
from gdn.files import sha256_file, write_text
from gdn.generation.engine import for_decoding
from gdn.lossband import Stretch, check_logging, objection, read_band, record_band, stretches, verdict_of
from gdn.model.load import load_model
from gdn.provenance import provenance, summary
from gdn.report.page import BandPoint, Baseline, HeadMemory, RunReport, Verdicts, WriteStrengths, render
from gdn.runpage import heldout_prompts, measure_heldout, memory_figures, write_samples
from gdn.train.loop import Outcome, build_model, train
from gdn.train.metrics import read_metrics
from gdn.train.recipe import RunConfig

log = logging.getLogger(__name__)

Progress = Callable[[int, int, int], None]  # as `gdn.data.prepare` has it: tasks done, tasks in all, tokens so far
VERDICT, PAGE = "verdict.json", "report.html"
NOISE = 2.0  # standard errors: one cell in twenty lies farther off by chance alone
_ROUNDING = 0.005  # of published values that have two digits; theirs whose standard error is 0 here
_PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "lm_eval", "transformers", "datasets", "datatrove")
_PROMPT = "The capital of France is"


class Result(NamedTuple):
    """How a call ended: the signal that stopped it, if one did; outside: a loss that left its band."""

    stopped_by: signal.Signals | None
    outside: bool


@dataclass(frozen=True)
class Options:
    """What to reproduce, from what, and how it is measured."""

    source: str  # as `gdn prepare` takes it
    tokenizer: str  # tokenizer.json, its folder, or a Hub id
    shards: Path | None = None  # prepared already: source and tokenizer are not looked at
    max_tokens: int | None = None  # of training text; None: so many that no token is read twice
    workers: int = 1
    tasks: tuple[str, ...] = ("card",)  # none: no evaluation beside held-out text
    eval_workers: int | None = 1  # as `gdn.evaluate.Options` has them
    data: Path | None = None  # of the tasks' documents
    limit: int | None = None
    band: Path | None = None  # of recorded runs, which the loss is held against
    record: bool = False  # this run's loss becomes part of the band
    only_data: bool = False


def reproduce(
    run: RunConfig,
    options: Options,
    out: Path,
    device: torch.device,
    console: Console,
    progress: Callable[[int, int, int], None] | None = None,
) -> Result:
    """Go on with whatever of `run` is not done in `out`, to the verdict; a signal ends it with a checkpoint and without one.

    In every process of torchrun's group, if there is one. Raises a GDNError for sources, recipes, options and earlier results
    that do not fit.
    """
    check_options(options)
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    shards = options.shards or out / "shards"
    run = replace(run, data=replace(run.data, shards=str(shards)))
    plan = run.check(world_size())
    if options.band is not None:
        check_logging(run)
    data = _documents(options, out) if options.tasks else None
    if options.shards is None:
        _prepare(options, shards, options.max_tokens or plan.tokens + 1, progress)
    if options.only_data:
        return Result(None, False)
    if options.band is not None:
        console.print(objection(options.band, run, read_manifest(shards).fingerprint, options.record), end="", highlight=False)
    outcome = train(run, out / "run", device, console)
    if outcome.stopped_by is not None:
        return Result(outcome.stopped_by, False)
    results: dict[str, dict[str, Any]] = {}
    if options.tasks:
        from gdn.evaluate import Options as EvalOptions
        from gdn.evaluate import evaluate

        wanted = EvalOptions(data, options.tasks, limit=options.limit, workers=options.eval_workers)
        results = evaluate(outcome.checkpoint, wanted, out / "eval", device, console)
    verdict = _conclude(run, options, out, outcome, results, device, console) if first else ""
    return Result(None, verdict.startswith("Outside"))


def _prepare(options: Options, shards: Path, tokens: int, progress: Progress | None) -> None:
    if world_size() > 1:
        # It takes hours, and processes that wait for a collective give up after ten minutes.
        if not (shards / MANIFEST).exists():
            raise DataError(f"{shards}: no shards yet; prepare them first: the same command without torchrun, with --only-data")
        return
    # Not at the top: with shards that are there already, a machine needs no datatrove.
    from gdn.data.prepare import Options as PrepareOptions
    from gdn.data.prepare import prepare
    from gdn.data.sources import Source

    tokenizer = load_tokenizer(_tokenizer_folder(options.tokenizer))
    wanted = PrepareOptions(max_tokens=tokens, workers=options.workers)
    prepare([Source(options.source)], tokenizer, shards, wanted, progress)


def _documents(options: Options, out: Path) -> Path:
    """The folder of the tasks' documents, made here if none was named: before the run, which takes longer than any download."""
    folder = options.data or out / "documents"
    if options.data is None and world_size() == 1:
        from gdn.eval.download import download

        for there in download(folder):
            log.info("%s", there)
    if not (folder / "eval").is_dir():
        raise DataError(f"{folder}: no folder of documents with eval/ in it; gdn eval --download DIR makes one")
    from gdn.evaluate import check_documents

    check_documents(options.tasks, folder)
    return folder


def _tokenizer_folder(name: str) -> Path:
    """A path, or a Hub id whose tokenizer files alone are fetched."""
    path = Path(name)
    if path.exists():
        return path
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise DataError(f"{name}: no such tokenizer, and no id of the Hub (owner/name)")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=["tokenizer*", "special_tokens_map.json"]))
    except (OSError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise DataError(f"{name}: not to be had from the Hub: {str(error).splitlines()[0]}; --tokenizer PATH") from None


def table_cells(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry a measured task: its value, the published one, their difference in standard errors, and the verdict."""
    cells = []
    for name, result in results.items():
        row = row_of(name, result["metric"])
        apart = in_errors(result["value"], result["stderr"], row.published)
        verdict = None
        if row.published is not None:
            difference = result["value"] - row.published
            inside = abs(difference) <= _ROUNDING if apart is None else abs(apart) <= NOISE
            better = (difference > 0) != math.isnan(row.chance)  # of a perplexity, which no chance is known of, less is better
            verdict = "inside" if inside else "outside, better" if better else "outside, worse"
        cells.append(
            {
                "task": name,
                "title": row.title,
                "metric": result["metric"],
                "documents": result["documents"],
                "value": result["value"],
                "stderr": result["stderr"],
                "published": row.published,
                "apart_in_stderr": apart,
                "verdict": verdict,
            }
        )
    return cells


def package_hashes() -> dict[str, dict[str, str]]:
    """Version and SHA-256 of gdn's own source files, and of other packages' lists of files, where they are installed."""
    root = Path(gdn.__file__).parent
    files = {str(path.relative_to(root)): sha256_file(path) for path in sorted(root.rglob("*.py"))}
    found = {"gdn": {"version": gdn.__version__, "sha256": _sha256(files)}}
    for name in _PACKAGES:
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        # A wheel's RECORD has a hash for each of its files; what an installer adds (scripts, its own notes) is left out.
        record = (line.rsplit(",", 2) for line in (package.read_text("RECORD") or "").splitlines())
        own = {path: value for path, value, _ in record if value and not path.startswith("..") and not _made_here(path)}
        found[name] = {"version": package.version, "sha256": _sha256(own)}
    return found


def _made_here(path: str) -> bool:
    return path.endswith((".pyc", "/INSTALLER", "/REQUESTED", "/direct_url.json"))


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _conclude(
    run: RunConfig,
    options: Options,
    out: Path,
    outcome: Outcome,
    results: Mapping[str, Mapping[str, Any]],
    device: torch.device,
    console: Console,
) -> str:
    """Write verdict and page; the verdict's sentence."""
    rows = read_metrics(out / "run")
    told = provenance(outcome.checkpoint)
    packages = package_hashes()
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {platform.machine()}"
    curve: list[Stretch] = []
    if options.band is not None:
        curve = stretches(rows, run.train.steps)
        if options.record:
            record_band(options.band, run, curve, told.data["fingerprint"], _origin(machine, packages))
            console.print(f"{options.band}: this run's loss is recorded", highlight=False)
    band, missing = (None, "") if options.band is None else read_band(options.band, run, told.data["fingerprint"])
    cells = table_cells(results)
    compared = [cell for cell in cells if cell["verdict"]]
    inside = sum(cell["verdict"] == "inside" for cell in compared)
    points = [] if band is None else [BandPoint(s.tokens, s.loss, low, high) for s, (low, high) in zip(curve, band)]
    if options.band is not None:
        verdict = missing or verdict_of(points)
    elif compared:
        part = f" on the first {options.limit:,} documents of each task" if options.limit else ""
        verdict = (
            f"{inside} of {len(compared)} cells lie within {NOISE:g} standard errors of the published value{part}; "
            f"of as many, noise alone puts {0.0455 * len(compared):.1f} outside."
        )
    else:
        verdict = "Nothing published was measured: no verdict."
    content = {
        "verdict": verdict,
        "cells": cells,
        "band": [point.__dict__ for point in points],
        "published_final_loss": 2.509,
        "final_loss": _final_loss(rows, run.train.steps),
        "measured": told.results,
        "recipe": told.recipe,
        "recipe_sha256": recipe_hash(told.recipe),
        "data": told.data,
        "checkpoint": {path.name: sha256_file(path) for path in sorted(outcome.checkpoint.glob("*.safetensors"))},
        "packages": packages,
        "machine": {"device": machine, "python": platform.python_version(), "system": platform.platform()},
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }
    page = _page(run, options, out, outcome, device, content, points)
    content["bits_per_byte"] = page.bits_per_byte if math.isfinite(page.bits_per_byte) else None
    content["baselines"] = {baseline.name: baseline.bits_per_byte for baseline in page.baselines}
    content["samples"] = [dataclasses.asdict(sample) for sample in page.samples]
    write_text(out / PAGE, render(page))
    write_text(out / VERDICT, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    _print(console, cells, verdict, out)
    return verdict


def _final_loss(rows: Sequence[Mapping[str, Any]], steps: int) -> float:
    """Mean of the losses logged in the last hundredth of the run; the last step always is."""
    return statistics.fmean(row["loss"] for row in rows if row.get("loss") is not None and row["step"] >= steps - steps // 100)


def recipe_hash(recipe: Mapping[str, Any]) -> str:
    """SHA-256 of what a recipe says, but for where the shards lie and what is logged."""
    data = {key: value for key, value in recipe["data"].items() if key != "shards"}
    return _sha256({key: value for key, value in recipe.items() if key != "log"} | {"data": data})


def _origin(machine: str, packages: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    return {"machine": machine, "date": date, "versions": {name: package["version"] for name, package in packages.items()}}


def _page(
    run: RunConfig,
    options: Options,
    out: Path,
    outcome: Outcome,
    device: torch.device,
    content: Mapping[str, Any],
    points: list[BandPoint],
) -> RunReport:
    shards = Path(run.data.shards)
    manifest, tokenizer = read_manifest(shards), load_tokenizer(shards / TOKENIZER)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_model(outcome.checkpoint, dtype=dtype, device=device)
    bits, prompts = math.nan, [_PROMPT]
    baselines: list[Baseline] = []
    heads: list[HeadMemory] = []
    strengths: list[WriteStrengths] = []
    if HELDOUT in manifest.splits:
        bits, baselines, texts = measure_heldout(model, tokenizer, shards, "with back-off, the same vocabulary")
        heads, strengths = memory_figures(model, shards)
        prompts += heldout_prompts(texts)
    untrained = build_model(replace(run, train=replace(run.train, dtype="float32")), torch.device("cpu"))
    samples = write_samples(for_decoding(untrained, device), for_decoding(model, device), tokenizer, prompts)
    progress, data = outcome.progress, summary(manifest)
    facts = [
        ("model", f"{run.model.num_parameters():,} parameters, {run.model.num_hidden_layers} layers"),
        ("text", f"{data['sources']}; {manifest.num_tokens(TRAIN):,} tokens"),
        ("data", manifest.fingerprint),
        ("trained on", f"{progress.tokens:,} tokens in {progress.step:,} steps, {progress.seconds / 60:.1f} minutes"),
        ("machine", content["machine"]["device"]),
        ("recipe", content["recipe_sha256"]),
        ("weights", content["checkpoint"].get("model.safetensors", "")),
        *((name, f"{package['version']}, {package['sha256']}") for name, package in content["packages"].items()),
        ("date", content["date"]),
    ]
    return RunReport(
        title=run.name,
        verdict=content["verdict"],
        facts=facts,
        metrics=read_metrics(out / "run"),
        bits_per_byte=bits,
        baselines=baselines,
        explanation=[],
        heads=heads,
        write_strengths=strengths,
        samples=samples,
        recipe=toml.dump(run),
        verdicts=_table(content["cells"], options.limit) if content["cells"] else None,
        band=points,
    )


_COLUMNS = ("task", "metric", "documents", "value", "std. error", "published", "apart, in std. errors", "verdict")


def _table(cells: Sequence[Mapping[str, Any]], limit: int | None) -> Verdicts:
    caption = (
        f"Inside: within {NOISE:g} standard errors of the published value. The standard error is that of the documents; what "
        "another seed would change is not in it."
    )
    if limit is not None:
        caption += f" Only the first {limit:,} documents of each task were read."
    return Verdicts("The published table", caption, _COLUMNS, [_row(cell) for cell in cells])


def _row(cell: Mapping[str, Any]) -> tuple[str, ...]:
    def text(key: str, form: str) -> str:
        return "–" if cell[key] is None else format(cell[key], form)

    form = ".4f" if cell["value"] < 10 else ",.2f"
    numbers = (text("value", form), text("stderr", form), text("published", form), text("apart_in_stderr", "+.1f"))
    return (cell["title"], cell["metric"], f"{cell['documents']:,}", *numbers, cell["verdict"] or "–")


def _print(console: Console, cells: Sequence[Mapping[str, Any]], verdict: str, out: Path) -> None:
    if cells:
        table = Table()
        for i, name in enumerate(_COLUMNS):
            table.add_column(name, justify="right" if 1 < i < 7 else "left")
        for cell in cells:
            table.add_row(*_row(cell))
        console.print(table)
    console.print(verdict, style="bold", highlight=False)
    console.print(f"{out}: {VERDICT}, {PAGE}", highlight=False)


def default_options(scaled: bool) -> tuple[Path, Path | None, int | None]:
    """(recipe, band, tokens of text) of the published run or of the small one that stands for it."""
    if not scaled:
        return Path("recipes/gdn_360m_15b.toml"), None, None
    return Path("recipes/gdn_360m_scaled.toml"), Path("recipes/gdn_360m_scaled.band.json"), SCALED_TOKENS


SCALED_TOKENS = 26_000_000  # read twice: 50M tokens of training from half as many to download


def check_options(options: Options) -> None:
    """ConfigError for options that contradict each other, before any work."""
    if options.record and options.band is None:
        raise ConfigError("--record-band records into a band; expected --scaled or --band FILE beside it")
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit = {options.limit}; expected at least 1")
    if options.max_tokens is not None and options.max_tokens < 1:
        raise ConfigError(f"--max-tokens = {options.max_tokens}; expected at least 1")
