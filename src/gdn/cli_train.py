"""`gdn train` and `verify-resume` on the command line, apart from `cli` for its size. No heavy imports."""

import argparse
import os
from pathlib import Path
from typing import Any


def add_train(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the command to `gdn`'s."""
    add = commands.add_parser(
        "train", help="train a recipe, alone or under torchrun; the same command goes on where it stopped"
    )
    add_recipe(add)
    add.add_argument("--out", type=Path, help="run folder (default: runs/NAME)")
    add.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: %(default)s)")
    add.add_argument("--profile", action="store_true", help="watch steps 10 to 13 (log.profile_steps): OUT/profile")
    add.set_defaults(command=_train)

    add = commands.add_parser("verify-resume", help="whether a run that is killed and goes on ends in the same bits, here")
    add_recipe(add)
    add.add_argument("--steps", type=int, default=6, help="of each run, a multiple of three (default: %(default)s)")
    add.add_argument("--processes", type=int, default=0, metavar="N", help="under torchrun (default: one plain process)")
    add.add_argument("--out", type=Path, help="folder to create, removed on success (default: runs/NAME-verify-resume)")
    add.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: %(default)s)")
    add.set_defaults(command=_verify_resume)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a recipe and change it."""
    parser.add_argument("recipe", type=Path, help="a TOML file, see recipes/")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings that replace the recipe's")


def _train(args: argparse.Namespace) -> int:
    import signal

    from rich.console import Console

    from gdn.cli import find_device
    from gdn.config import load
    from gdn.distributed.mesh import join
    from gdn.train.loop import train
    from gdn.train.recipe import RunConfig

    run = load(RunConfig, args.recipe, [*(["log.profile_steps=[10, 13]"] if args.profile else []), *args.overrides])
    console = Console()
    with join(find_device(args.device)) as device:
        outcome = train(run, args.out or Path("runs") / run.name, device, console)
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes the first one speaks
        console.out(f"step {outcome.progress.step:,}: {outcome.checkpoint}", highlight=False)
        if outcome.stopped_by is not None:
            console.out("stopped; the same command goes on from there")
    return 130 if outcome.stopped_by is signal.SIGINT else 0


def _verify_resume(args: argparse.Namespace) -> int:
    from rich.console import Console

    from gdn.cli import find_device
    from gdn.config import load
    from gdn.train.recipe import RunConfig
    from gdn.train.verify import Options, verify_resume

    run = load(RunConfig, args.recipe, args.overrides)
    out = args.out or Path("runs") / f"{run.name}-verify-resume"
    console = Console()
    with console.status("gdn verify-resume"):
        options = Options(out, args.steps, find_device(args.device).type, args.processes)
        parted = verify_resume(run, options, console.out)
    console.out("pass: resuming changes no bit" if parted is None else f"FAILED: {parted}; the recipe and log are in {out}")
    return 0 if parted is None else 1
