"""The main job in small: real text to a trained, evaluated, exported and reported model, in minutes, on any machine."""

import json
import logging
import os
import platform
import shutil
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import gdn
from gdn import config as toml
from gdn.data.documents import Document
from gdn.data.holdout import choose_holdout, cut_document
from gdn.data.prepare import Options as PrepareOptions
from gdn.data.prepare import prepare
from gdn.data.readers import ReadStats, is_row_file, read_documents
from gdn.data.shards import HELDOUT, MANIFEST, TOKENIZER, TRAIN, read_manifest
from gdn.data.sources import SUFFIXES, TEXT_SUFFIXES, Source
from gdn.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from gdn.errors import CheckpointError, ConfigError, DataError
from gdn.files import lock_folder, remove_partials, write_text
from gdn.generation.sampling import Sampling
from gdn.hf.export import export, greedy_text, write_card
from gdn.model.config import ModelConfig
from gdn.model.lm import GatedDeltaNetLM
from gdn.model.load import load_model
from gdn.provenance import summary
from gdn.report.page import Baseline, RunReport, Sample, render
from gdn.runpage import SAMPLE_TOKENS, complete, heldout_prompts, measure_heldout, memory_figures, write_samples
from gdn.train.loop import Outcome, build_model, open_data, train, train_step
from gdn.train.metrics import read_metrics
from gdn.train.micro_batch import MicroBatch
from gdn.train.optim import build_optimizer
from gdn.train.recipe import CheckpointConfig, DataConfig, EvalConfig, LogConfig, OptimConfig, RunConfig, TrainConfig

log = logging.getLogger(__name__)

MERGES = 2048
VOCAB_SIZE = 256 + 1 + MERGES  # bytes, <|endoftext|>, merges
HELDOUT_FRACTION = 0.03
MAX_BYTES = 64 << 20  # of --text that are read: more than minutes on two cores can use
_CALIBRATION_STEPS, _CALIBRATION_SECONDS = 12, 4.0  # at least

WHY_XZ = (
    "xz is no predictor of the next token: it may copy any string that occurred earlier in the held-out text itself, "
    "however long and however far back, and source code repeats itself in exactly this way (licence headers, test "
    "boilerplate, tables). The model's weights are frozen when it reads this text; what it can copy must pass through a "
    "memory of constant size. On prose, where little is repeated verbatim, the order is the other way round.",
)


@dataclass(frozen=True)
class Options:
    """What decides a quickstart; a folder is only gone on with under the same options."""

    text: str  # folder or file; empty: the standard library of the running Python
    minutes: float


def recipe(shards: str, steps: int, vocab_size: int = VOCAB_SIZE) -> RunConfig:
    """The quickstart's run: 1.3M parameters, 2,048 tokens a step. How its settings were chosen: docs/log.md."""
    model = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        num_hidden_layers=3,
        num_heads=2,
        head_dim=64,
        expand_v=1.0,
        intermediate_size=384,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
    )
    return RunConfig(
        name="quickstart",
        model=model,
        data=DataConfig(shards=shards, seq_len=128, micro_batch_size=16, global_batch_size=16),
        train=TrainConfig(steps=steps, seed=0, dtype="float32"),
        optim=OptimConfig(lr=4e-3, min_lr=2e-4, warmup_steps=max(1, steps // 20)),
        eval=EvalConfig(every=max(1, steps // 8), windows=64),
        checkpoint=CheckpointConfig(every=max(1, steps // 4), keep=1),
        log=LogConfig(every=5),
    )


def quickstart(options: Options, out: Path, console: Console) -> int:
    """Run it all in `out`, or go on where an earlier call was stopped; returns the exit code, 130 after Ctrl-C.

    Leaves shards/, run/, model/ (a Hugging Face folder), results.json and report.html. Raises a GDNError for text that
    cannot be used, a folder of other options or in use, and an exported model that does not write the same text.
    """
    if not 0 < options.minutes < 60 * 24:
        raise ConfigError(f"--minutes = {options.minutes}; expected more than 0 and less than a day")
    with lock_folder(out):
        remove_partials(out)
        _check_options(options, out)
        shards = out / "shards"
        with _stage(console, "text to token shards"):
            if not (shards / MANIFEST).exists():
                _prepare(options, shards)
        manifest = read_manifest(shards)
        console.print(
            f"  {manifest.num_documents(TRAIN):,} documents, {manifest.num_bytes(TRAIN) / 1e6:.1f} MB to train on; "
            f"{manifest.num_documents(HELDOUT):,} documents, {manifest.num_bytes(HELDOUT) / 1e6:.2f} MB held out "
            f"(whole folders); {manifest.duplicates} duplicates dropped, "
            f"{manifest.options['record']['unreadable']} unreadable files left out",
            highlight=False,
        )
        run = _recipe_for(options, out, shards, manifest.vocab_size, console)
        console.print(
            f"  {run.model.num_parameters() / 1e6:.2f}M parameters, {run.train.steps:,} steps of "
            f"{run.data.global_batch_size} x {run.data.seq_len} tokens, about {options.minutes:g} minutes; "
            "Ctrl-C stops with a checkpoint",
            highlight=False,
        )
        outcome = train(run, out / "run", torch.device("cpu"), console)
        if outcome.stopped_by is not None:
            console.print(f"stopped at step {outcome.progress.step:,}; the same command goes on from there")
            return 130
        _finish(run, out, outcome, console)
        return 0


def _check_options(options: Options, out: Path) -> None:
    path, ours = out / "options.json", {"text": options.text, "minutes": options.minutes}
    if path.exists() and (out / "shards" / MANIFEST).exists():  # before that, of text that was refused, nothing is left
        theirs = json.loads(path.read_text(encoding="utf-8"))
        if theirs != ours:
            raise ConfigError(f"{out} holds a quickstart with {theirs}, not {ours}; choose another --out or delete it")
    write_text(path, json.dumps(ours) + "\n")


def _prepare(options: Options, shards: Path) -> None:
    source = Path(options.text) if options.text else Path(sysconfig.get_paths()["stdlib"])
    stats = ReadStats()
    # The standard library's tests hold files that are broken on purpose; a user's own broken file is an error.
    documents = read_documents(
        str(source),
        suffixes=SUFFIXES if options.text else TEXT_SUFFIXES,
        exclude=() if options.text else ("site-packages", "dist-packages"),
        skip_bad=not options.text,
        stats=stats,
    )
    read: list[Document] = []
    size = 0
    for document in documents:
        read.append(document)
        size += len(document.text)
        if size > MAX_BYTES:
            log.info("reading the first %d MB of %s: more than this run can use", MAX_BYTES >> 20, source)
            break
    if len(read) == 1 and not is_row_file(read[0].path):
        read = cut_document(read[0], 100)
    unique = list({document.text: document for document in reversed(read)}.values())[::-1]
    if len(unique) < 2:
        raise DataError(f"{source}: {len(unique)} document(s) of text; expected at least 2, one of them to hold out")
    holdout = choose_holdout(unique, HELDOUT_FRACTION, seed=0)
    tokenizer = train_bpe((document.text for document in unique if holdout.split_of(document) == TRAIN), VOCAB_SIZE)
    name = "standard library of Python " + platform.python_version() if not options.text else str(source)
    # Laid out like any source that has its own splits, so that `prepare` is the one way to shards.
    text = shards.with_name("text")
    for split, folder in ((TRAIN, "train"), (HELDOUT, "validation")):
        path = text / folder / "documents.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = (json.dumps({"text": document.text}) + "\n" for document in read if holdout.split_of(document) == split)
        path.write_text("".join(rows), encoding="utf-8")
    record = {"heldout_fraction": HELDOUT_FRACTION, "heldout_by": holdout.by, "merges": MERGES, "unreadable": stats.bad}
    prepare([Source(str(text), name=name)], tokenizer, shards, PrepareOptions(deduplicate=True, record=record))
    shutil.rmtree(text)


def _recipe_for(options: Options, out: Path, shards: Path, vocab_size: int, console: Console) -> RunConfig:
    """The recipe, its number of steps from the speed of the first few; written once, so that a resumed run keeps it."""
    path = out / "recipe.toml"
    if path.exists():
        run = toml.load(RunConfig, path)
        return replace(run, data=replace(run.data, shards=str(shards)))
    run = recipe(str(shards), 1000, vocab_size)
    with _stage(console, "measuring the speed of this machine"):
        loader, _ = open_data(run)
        model = build_model(run, torch.device("cpu"))
        micro_batch, optimizer = MicroBatch(model, run.train.cuda_graph), build_optimizer(model, run.optim)
        times: list[float] = []
        # The fastest step, because another program's burst in these seconds must not cut the whole run short.
        while len(times) < _CALIBRATION_STEPS or sum(times) < _CALIBRATION_SECONDS * min(1.0, options.minutes):
            step, started = len(times), time.monotonic()
            train_step(micro_batch, optimizer, list(loader.micro_batches(step)), 0.0, run)
            times.append(time.monotonic() - started)
    steps = max(10, round(60 * options.minutes / min(times)))
    run = recipe(str(shards), steps, vocab_size)
    write_text(path, toml.dump(run))
    return run


def _finish(run: RunConfig, out: Path, outcome: Outcome, console: Console) -> None:
    model = load_model(outcome.checkpoint)
    tokenizer = load_tokenizer(out / "shards" / TOKENIZER)
    with _stage(console, "held-out bits per byte, and baselines on the same bytes"):
        note = f"with back-off, {MERGES:,} merges: the same vocabulary"
        bits, baselines, heldout = measure_heldout(model, tokenizer, out / "shards", note)
    with _stage(console, "samples before and after"):
        samples = write_samples(build_model(run, torch.device("cpu")), model, tokenizer, heldout_prompts(heldout))
    results: dict[str, Any] = {
        "bits_per_byte": bits,
        "baselines": {baseline.name: baseline.bits_per_byte for baseline in baselines},
        "heldout_bytes": read_manifest(out / "shards").num_bytes(HELDOUT),
        "steps": outcome.progress.step,
        "tokens": outcome.progress.tokens,
        "training_seconds": round(outcome.progress.seconds, 1),
    }
    with _stage(console, "Hugging Face folder, loaded back: the same greedy text"):
        _export(run, out, model, tokenizer, results)
    write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    with _stage(console, "report"):
        page = _report(run, out, outcome, model, bits, baselines, samples)
        write_text(out / "report.html", render(page))
    _print_results(bits, baselines, samples, out, console)


def _export(run: RunConfig, out: Path, model: GatedDeltaNetLM, tokenizer: Tokenizer, results: dict[str, Any]) -> None:
    target = out / "model"
    if target.exists():
        shutil.rmtree(target)
    card = write_card(toml.to_dict(run), summary(read_manifest(out / "shards")), results)
    export(model, target, tokenizer_files=tokenizer.save, card=card)

    assert tokenizer.bos_id is not None
    prompt = "def main("
    ours = complete(model, tokenizer, prompt, Sampling(temperature=0.0))
    text = greedy_text(target, prompt, tokenizer.bos_id, SAMPLE_TOKENS)
    if text != ours:
        raise CheckpointError(f"{target}: greedy text through transformers is {text!r}; expected {ours!r} as from the run")


def _report(
    run: RunConfig,
    out: Path,
    outcome: Outcome,
    model: GatedDeltaNetLM,
    bits: float,
    baselines: list[Baseline],
    samples: list[Sample],
) -> RunReport:
    heads, strengths = memory_figures(model, out / "shards")
    manifest, minutes = read_manifest(out / "shards"), outcome.progress.seconds / 60
    facts = [
        ("model", f"{run.model.num_parameters():,} parameters, {run.model.num_hidden_layers} layers"),
        ("text", f"{', '.join(source.name for source in manifest.sources)}; {manifest.num_bytes(TRAIN):,} bytes to train on"),
        ("held out", f"{manifest.num_bytes(HELDOUT):,} bytes in {manifest.num_documents(HELDOUT)} documents, whole folders"),
        ("trained on", f"{outcome.progress.tokens:,} tokens in {minutes:.1f} minutes"),
        ("machine", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"),
        ("versions", f"gdn {gdn.__version__}, torch {torch.__version__}, Python {platform.python_version()}"),
        ("command", "gdn quickstart"),
    ]
    return RunReport(
        title="gdn quickstart",
        verdict=_verdict(bits, baselines),
        facts=facts,
        metrics=read_metrics(out / "run"),
        bits_per_byte=bits,
        baselines=baselines,
        explanation=list(WHY_XZ) if _named(baselines, "xz -9e") < bits else [],
        heads=heads,
        write_strengths=strengths,
        samples=samples,
        recipe=toml.dump(run),
    )


def _verdict(bits: float, baselines: list[Baseline]) -> str:
    bigram = _named(baselines, "bigram")
    relation = "better" if bits < bigram else "worse"
    return (
        f"{bits:.3f} bits per byte on held-out text, {abs(bigram - bits):.3f} {relation} than the bigram's {bigram:.3f} "
        "on the same bytes."
    )


def _named(baselines: list[Baseline], name: str) -> float:
    return next(baseline.bits_per_byte for baseline in baselines if baseline.name == name)


def _print_results(bits: float, baselines: list[Baseline], samples: list[Sample], out: Path, console: Console) -> None:
    table = Table(title="bits per byte, held-out text (lower is better)", title_justify="left")
    table.add_column("")
    table.add_column("bits/byte", justify="right")
    table.add_column("")
    rows = [
        ("[bold]this model", bits, "reads the text in order, state carried on"),
        *((b.name, b.bits_per_byte, b.note) for b in baselines),
    ]
    for name, value, note in sorted(rows, key=lambda row: row[1]):
        table.add_row(name, f"{value:.3f}", note)
    console.print(table)
    console.print(_verdict(bits, baselines), style="bold", highlight=False)
    if _named(baselines, "xz -9e") < bits:
        console.print(WHY_XZ[0], highlight=False)
    console.print(f"\nsample, after {samples[0].prompt[-40:]!r}:", highlight=False)
    console.print(samples[0].after, style="dim", markup=False, highlight=False)
    console.print(f"\nreport: {out / 'report.html'}\nmodel:  {out / 'model'}  (Hugging Face folder)", highlight=False)
    console.print(f'next:   gdn generate {out / "model"} "def main("', highlight=False)


@contextmanager
def _stage(console: Console, name: str) -> Iterator[None]:
    started = time.monotonic()
    with console.status(name):
        yield
    console.print(f"{name}: {time.monotonic() - started:.1f} s", highlight=False)
