"""`gdn reproduce` on the command line, apart from `cli` for its size: its arguments and what they come to. No heavy imports."""

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from gdn.errors import GDNError


def add_reproduce(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the command to `gdn`'s."""
    add = commands.add_parser(
        "reproduce", help="data, run, evaluation and a verdict per cell of the published table; the same command goes on"
    )
    add.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings that replace the recipe's")
    add.add_argument("--scaled", action="store_true", help="50M tokens instead, the loss held against a recorded band")
    add.add_argument("--recipe", type=Path, metavar="TOML", help="(default: recipes/gdn_360m_15b.toml, or _scaled)")
    add.add_argument(
        "--source", default="cerebras/SlimPajama-627B", help="of the text, as gdn prepare takes it (default: %(default)s)"
    )
    add.add_argument(
        "--tokenizer", default="fla-hub/gla-1.3B-100B", help="tokenizer.json, its folder or a Hub id (default: %(default)s)"
    )
    add.add_argument("--shards", type=Path, metavar="DIR", help="of an earlier gdn prepare, in place of a source")
    add.add_argument("--max-tokens", type=int, metavar="N", help="of text (default: no token is read twice; 26M if scaled)")
    add.add_argument("--workers", type=int, default=os.cpu_count(), help="of the preparation (default: one a core)")
    add.add_argument("--tasks", help="names with commas, or none (default: card, the published table; none if scaled)")
    add.add_argument("--data", type=Path, metavar="DIR", help="folder of the tasks' documents (default: downloaded to OUT)")
    add.add_argument("--limit", type=int, metavar="N", help="the first N documents of each task")
    add.add_argument("--band", type=Path, metavar="JSON", help="recorded losses to hold the run against")
    add.add_argument("--record-band", action="store_true", help="add this run to the band")
    add.add_argument("--only-data", action="store_true", help="stop when the shards are there")
    add.add_argument("--out", type=Path, help="folder to work in (default: runs/reproduce, or runs/reproduce-scaled)")
    add.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: %(default)s)")
    add.set_defaults(command=_reproduce)


def _reproduce(args: argparse.Namespace) -> int:
    if args.shards is None and importlib.util.find_spec("datatrove") is None:
        raise GDNError('reproduce prepares text with datatrove: pip install "gdn[data]", or --shards DIR')
    tasks = ("none" if args.scaled else "card") if args.tasks is None else args.tasks
    names = () if tasks == "none" else tuple(name.strip() for name in tasks.split(",") if name.strip())
    if names:
        from gdn.cli_eval import need_harness

        need_harness()
        if args.data is not None:
            os.environ["HF_HUB_OFFLINE"] = "1"
    import signal

    from rich.console import Console

    from gdn.cli import find_device, show_progress
    from gdn.config import load
    from gdn.distributed.mesh import join
    from gdn.reproduce import Options, default_options, reproduce
    from gdn.train.recipe import RunConfig

    recipe, band, tokens = default_options(args.scaled)
    run = load(RunConfig, args.recipe or recipe, args.overrides)
    options = Options(
        source=args.source,
        tokenizer=args.tokenizer,
        shards=args.shards,
        max_tokens=tokens if args.max_tokens is None else args.max_tokens,
        workers=args.workers,
        tasks=names,
        eval_workers=None,
        data=args.data,
        limit=args.limit,
        band=args.band or band,
        record=args.record_band,
        only_data=args.only_data,
    )
    out = args.out or Path("runs") / ("reproduce-scaled" if args.scaled else "reproduce")
    first = os.environ.get("RANK", "0") == "0"
    console = Console(quiet=not first)
    if not console.is_terminal:  # a log: the table needs room
        console = Console(quiet=not first, width=140)
    with join(find_device(args.device)) as device:
        progress = show_progress if sys.stderr.isatty() and not args.quiet else None
        result = reproduce(run, options, out, device, console, progress)
    if result.stopped_by is not None:
        console.out("stopped; the same command goes on from there")
    if result.stopped_by is signal.SIGINT:
        return 130
    return int(result.outside and "LOCAL_RANK" not in os.environ)  # torchrun would take it for a crash, and repeat it
