"""The command line: paths in, one function a command, text out. The one place that prints; starts without heavy imports."""

import argparse
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gdn import __version__
from gdn.cli_eval import add_eval
from gdn.cli_reproduce import add_reproduce
from gdn.cli_train import add_recipe, add_train
from gdn.errors import CheckpointError, DataError, GDNError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `gdn` with `arguments` (the process's own if None); returns the exit code: 2 for what the user can mend."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("gdn").setLevel(logging.WARNING if args.quiet else logging.INFO)
    try:
        code: int = args.command(args)
        return code
    except GDNError as error:
        print(f"gdn: {error}", file=sys.stderr)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; nothing is left to say
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"gdn: {where}{error.strerror or error}", file=sys.stderr)
    except RuntimeError as error:  # torch's word for memory that a GPU, or this machine, has not
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        print(f"gdn: {str(error).splitlines()[0]}", file=sys.stderr)
    except KeyboardInterrupt:
        print("gdn: interrupted", file=sys.stderr)
        return 130
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gdn",
        description="Gated DeltaNet language models, end to end.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=16),
    )
    parser.add_argument("--version", action="version", version=f"gdn {__version__}")
    parser.add_argument("--quiet", action="store_true", help="no notes on stderr, only errors")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    add = commands.add_parser(
        "quickstart", help="train, evaluate, export and report a small model on text found on this machine"
    )
    add.add_argument("--text", default="", metavar="PATH", help="a file or folder of text (default: Python's standard library)")
    add.add_argument("--minutes", type=float, default=3.0, help="of training (default: %(default)g)")
    add.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder to work in (default: %(default)s)")
    add.set_defaults(command=_quickstart)

    add = commands.add_parser("info", help="a recipe's parameters, FLOPs, tokens, memory and time")
    add_recipe(add)
    add.add_argument("--tokens-per-second", type=float, metavar="N", help="the speed to compute the time at")
    add.set_defaults(command=_info)

    add = commands.add_parser("prepare", help="documents to token shards with a manifest; the same command goes on")
    add.add_argument(
        "source", nargs="+", help="a file, folder or glob, local or a URL, or the id of a Hub dataset: text, jsonl, parquet"
    )
    add.add_argument("--weights", metavar="A,B,...", help="parts of the mixture, one for each source (default: by size)")
    add.add_argument("--tokenizer", type=Path, metavar="PATH", help="tokenizer.json or its folder")
    add.add_argument("--train-tokenizer", type=int, metavar="SIZE", help="train a byte-level BPE of this vocabulary instead")
    add.add_argument("--out", type=Path, required=True, help="folder to create")
    add.add_argument("--max-tokens", type=int, metavar="N", help="of training text: whole documents until there are as many")
    add.add_argument(
        "--holdout",
        type=float,
        help="share of documents to hold out (default: 0.01; 0 where the source has a validation split)",
    )
    add.add_argument("--text-column", help="of jsonl and parquet rows (default: text, or found)")
    add.add_argument("--deduplicate", action="store_true", help="drop exact copies; 125 MB of memory for a billion documents")
    add.add_argument("--no-bos", action="store_true", help="no BOS before each document")
    add.add_argument("--eos", action="store_true", help="EOS after each document")
    add.add_argument(
        "--dtype", choices=("auto", "uint16", "uint32"), default="auto", help="of the shards (default: %(default)s)"
    )
    add.add_argument("--skip-bad", action="store_true", help="leave out unreadable files and rows, counted in the manifest")
    add.add_argument("--engine", choices=("tokenizers", "gigatoken"), default="tokenizers", help="(default: %(default)s)")
    add.add_argument("--workers", type=int, default=os.cpu_count(), help="tasks at a time (default: one a core)")
    add.add_argument("--executor", choices=("local", "slurm", "ray"), default="local", help="(default: %(default)s)")
    add.add_argument("--executor-option", action="append", default=[], metavar="KEY=VALUE", help="for Slurm or Ray; repeatable")
    add.set_defaults(command=_prepare)

    add = commands.add_parser("data", help="token shards: check, show, overlap")
    data = add.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add = data.add_parser("check", help="verify every checksum and count of a folder of shards")
    add.add_argument("folder", type=Path)
    add.set_defaults(command=_data_check)
    add = data.add_parser("show", help="the text of the windows that a step trains on")
    add.add_argument("folder", type=Path)
    which = add.add_mutually_exclusive_group(required=True)
    which.add_argument("--step", type=int, help="counted from 0")
    which.add_argument("--windows", metavar="A,B,...", help="as named where a loss is not finite")
    which.add_argument("--dump", type=Path, metavar="FILE", help="nonfinite-step-*.json of a run, whose recipe lies beside it")
    add.add_argument(
        "--recipe", nargs="+", default=[], metavar="RECIPE [a.b=value]", help="of the run, for its seq_len, batch and seed"
    )
    add.set_defaults(command=_data_show)
    add = data.add_parser("overlap", help="13-grams of evaluation files that occur in the training text")
    add.add_argument("folder", type=Path)
    add.add_argument("--eval", type=Path, required=True, metavar="FOLDER", help="of .jsonl, .txt or .raw files, one a task")
    add.set_defaults(command=_data_overlap)

    add_train(commands)
    add_reproduce(commands)

    add = commands.add_parser("generate", help="continue a prompt, streamed")
    add.add_argument("checkpoint", type=Path, help="a run, a checkpoint or a Hugging Face folder")
    add.add_argument("prompt")
    add.add_argument("--max-new-tokens", type=int, default=200)
    add.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)g)")
    add.add_argument("--top-k", type=int)
    add.add_argument("--top-p", type=float)
    add.add_argument("--seed", type=int, default=0)
    add.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: %(default)s)")
    add.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the weights: auto is as stored, or float32 on a CPU that is slow in that (default: %(default)s)",
    )
    add.set_defaults(command=_generate)

    add_eval(commands)

    add = commands.add_parser("export", help="a checkpoint to a Hugging Face folder, logits compared")
    add.add_argument("checkpoint", type=Path, help="a run or a checkpoint")
    add.add_argument("out", type=Path, help="folder to create")
    add.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (default: %(default)s)"
    )
    add.add_argument("--results", type=Path, metavar="JSON", help="a file of measurements to put on the model card")
    add.set_defaults(command=_export)

    add = commands.add_parser("doctor", help="what this machine is, and whether the kernels are right on it")
    add.set_defaults(command=_doctor)
    return parser


def _quickstart(args: argparse.Namespace) -> int:
    _need("transformers", "quickstart", "hf")
    _need("datatrove", "quickstart", "data")
    from rich.console import Console

    from gdn.quickstart import Options, quickstart

    text = str(Path(args.text).resolve()) if args.text else ""
    return quickstart(Options(text, args.minutes), args.out, Console())


def _info(args: argparse.Namespace) -> int:
    from rich.console import Console

    from gdn.config import load
    from gdn.info import describe
    from gdn.train.recipe import RunConfig

    console = Console()
    for table in describe(load(RunConfig, args.recipe, args.overrides), args.tokens_per_second):
        console.print(table)
    return 0


def _prepare(args: argparse.Namespace) -> int:
    _need("datatrove", "prepare", "data")
    if args.engine == "gigatoken":
        _need("gigatoken", "prepare --engine gigatoken", "fast")
    from gdn.data.prepare import Options, prepare, training_texts
    from gdn.data.sources import Source
    from gdn.data.tokenizer import load_tokenizer, train_bpe

    if (args.tokenizer is None) == (args.train_tokenizer is None):
        raise DataError("prepare: expected one of --tokenizer PATH and --train-tokenizer SIZE")
    weights = _numbers(args.weights, float, "--weights") if args.weights else [None] * len(args.source)
    if len(weights) != len(args.source):
        raise DataError(
            f"--weights {args.weights}: {len(weights)} numbers; expected one for each of {len(args.source)} sources"
        )
    sources = [Source(spec, weight) for spec, weight in zip(args.source, weights)]
    settings = {}
    for item in args.executor_option:
        key, separator, value = item.partition("=")
        if not separator:
            raise DataError(f"--executor-option {item!r}: expected KEY=VALUE")
        settings[key] = value
    same = ("text_column", "holdout", "max_tokens", "deduplicate", "eos", "dtype", "skip_bad", "engine", "executor", "workers")
    options = Options(bos=not args.no_bos, executor_options=settings, **{name: getattr(args, name) for name in same})
    if args.tokenizer is not None:
        tokenizer = load_tokenizer(args.tokenizer)
    else:
        tokenizer = train_bpe(training_texts(sources, options), args.train_tokenizer)
    progress = show_progress if sys.stderr.isatty() and not args.quiet else None
    manifest = prepare(sources, tokenizer, args.out, options, progress)
    for split in manifest.splits:
        print(
            f"{split}: {manifest.num_documents(split):,} documents, {manifest.num_bytes(split):,} bytes, "
            f"{manifest.num_tokens(split):,} tokens"
        )
    if manifest.duplicates:
        print(f"left out: {manifest.duplicates} exact copies")
    if manifest.options.get("blank"):
        print(f"left out: {manifest.options['blank']} files or rows without text, the first: {manifest.options['first_blank']}")
    if manifest.skipped:
        first = manifest.options["first_skipped"]
        print(f"left out: {manifest.skipped} bad files or rows, {manifest.skipped_share:.2%} of all, the first: {first}")
    return 0


def show_progress(done: int, total: int, tokens: int) -> None:
    print(f"\r{done:,} of {total:,} tasks, {tokens / 1e6:,.1f}M tokens", end="", file=sys.stderr, flush=True)


def _numbers(text: str, kind: type, option: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise DataError(f"{option} {text!r}: expected numbers separated by commas") from None


def _data_check(args: argparse.Namespace) -> int:
    from gdn.data.check import check_folder

    def progress(name: str) -> None:
        print(f"\r{name}\033[K", end="", file=sys.stderr, flush=True)

    manifest = check_folder(args.folder, progress if sys.stderr.isatty() and not args.quiet else None)
    files = sum(len(files) for files in manifest.splits.values())
    tokens = sum(manifest.num_tokens(split) for split in manifest.splits)
    print(f"{args.folder}: {files} shards, {tokens:,} tokens, all checksums and counts right")
    return 0


def _data_show(args: argparse.Namespace) -> int:
    from gdn.config import load
    from gdn.data.inspect import dumped_windows, windows_of
    from gdn.data.loader import Loader
    from gdn.data.shards import TOKENIZER, TRAIN, TokenShards
    from gdn.data.tokenizer import load_tokenizer
    from gdn.train.recipe import RunConfig

    windows = dumped_windows(args.dump) if args.dump is not None else []
    recipe = args.recipe or ([args.dump.parent / "recipe.toml"] if args.dump else [])
    run = load(RunConfig, Path(recipe[0]), recipe[1:]) if recipe else None
    sizes = (run.data.seq_len, 1, run.data.global_batch_size, run.train.seed) if run else (2048, 1, 256, 42)
    if args.step is not None and args.step < 0:
        raise DataError(f"--step {args.step}; expected 0 or more")
    if run is None and not args.quiet:
        print("no --recipe: taken for the published run's: seq_len 2048, global_batch_size 256, seed 42", file=sys.stderr)
    loader = Loader(TokenShards.open(args.folder, TRAIN), *sizes)
    if args.dump is None:
        windows = loader.windows(args.step).tolist() if args.step is not None else _numbers(args.windows, int, "--windows")
    for window in windows_of(loader, load_tokenizer(args.folder / TOKENIZER), windows):
        print(f"=== window {window.window}: tokens {window.start} to {window.start + loader.seq_len}")
        print("\n--- document\n".join(window.documents))
    return 0


def _data_overlap(args: argparse.Namespace) -> int:
    from gdn.data.inspect import NGRAM, overlaps
    from gdn.data.shards import TOKENIZER, TRAIN, TokenShards
    from gdn.data.tokenizer import load_tokenizer

    def progress(done: int, total: int) -> None:
        print(f"\r{done:,} of {total:,} documents", end="", file=sys.stderr, flush=True)

    shards = TokenShards.open(args.folder, TRAIN)
    found = overlaps(shards, load_tokenizer(args.folder / TOKENIZER), args.eval, progress if sys.stderr.isatty() else None)
    for task in found:
        print(
            f"{task.task}: {task.rows_hit:,} of {task.rows:,} rows, {task.ngrams_hit:,} of {task.ngrams:,} {NGRAM}-grams "
            "are in the training text"
        )
    return 0


def _generate(args: argparse.Namespace) -> int:
    import torch

    from gdn.data.tokenizer import load_tokenizer
    from gdn.generation.engine import for_decoding, generate
    from gdn.generation.sampling import Sampling
    from gdn.model.load import load_model
    from gdn.ops.cpu import usable_cores

    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed)
    folder = find_checkpoint(args.checkpoint)
    tokenizer = load_tokenizer(folder)
    device, dtype = find_device(args.device), None if args.dtype == "auto" else getattr(torch, args.dtype)
    if device.type == "cpu":
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    model = for_decoding(load_model(folder, dtype=dtype), device)
    prompt = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(args.prompt)
    eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    # Decoded behind the token before, because some tokenizers drop the space in front of a text's first word.
    ids = prompt[-1:]
    shown = tokenizer.decode(ids)
    for i, token in enumerate(generate(model, prompt, max_new_tokens=args.max_new_tokens, sampling=sampling, eos_ids=eos)):
        if i == 0:  # not before: notes on the machine come with the first forward pass, and go first
            print(args.prompt, end="", flush=True)
        ids.append(token)
        text = tokenizer.decode(ids)
        # A character may be spread over several tokens: half of one decodes to U+FFFD, and is not shown before its end.
        if not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
            if len(ids) > 64:  # start anew, so that the cost of decoding does not grow with the text
                ids = ids[-1:]
                shown = tokenizer.decode(ids)
    print(tokenizer.decode(ids)[len(shown) :])
    return 0


def _export(args: argparse.Namespace) -> int:
    _need("transformers", "export", "hf")
    import torch

    from gdn.data.tokenizer import load_tokenizer
    from gdn.hf.export import export, write_card
    from gdn.model.load import load_model
    from gdn.provenance import provenance

    folder = find_checkpoint(args.checkpoint)
    card = write_card(*provenance(folder, args.results))
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer's ids reach {tokenizer.vocab_size - 1}; expected at most {model.config.vocab_size - 1}, "
            "the model's vocabulary"
        )
    export(model, args.out, tokenizer_files=tokenizer.save, card=card, dtype=getattr(torch, args.dtype))
    print(f"{args.out}: written, loaded back through transformers with gdn and without: the same logits")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from rich.console import Console

    from gdn.doctor import examine, table

    checks, console = [], Console()
    with console.status("gdn doctor") as status:
        for check in examine():
            checks.append(check)
            status.update(f"{len(checks)} checks done; the last: {check.name}")
            if not console.is_terminal:  # a log: nothing is lost if it is cut off
                verdict = {True: "ok", False: "FAILED", None: "-"}[check.ok]
                print(f"{verdict:6} {check.name}: {check.detail}", flush=True)
    if console.is_terminal:
        console.print(table(checks))
    return 1 if any(check.ok is False for check in checks) else 0


def _need(package: str, command: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise GDNError(f'{command} needs {package}: pip install "gdn[{extra}]"')


def find_checkpoint(path: Path) -> Path:
    """A model folder as it is; of a run folder its newest checkpoint."""
    from gdn.distributed.checkpoint import checkpoints
    from gdn.model.load import CONFIG
    from gdn.train.loop import CHECKPOINTS

    if (path / CONFIG).exists():
        return path
    found = checkpoints(path / CHECKPOINTS)
    if not found:
        raise CheckpointError(f"{path}: neither a model folder ({CONFIG}) nor a run with checkpoints")
    return found[-1]


def find_device(name: str) -> "torch.device":  # type: ignore[name-defined]  # noqa: F821  torch is imported late
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise GDNError(f"--device {name}: not usable here ({reason}); expected auto, cpu, cuda or mps") from None
    return device
