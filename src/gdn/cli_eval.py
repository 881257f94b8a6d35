"""`gdn eval` on the command line, apart from `cli` for its size: its arguments, and what they come to. No heavy imports."""

import argparse
import importlib.util
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdn.errors import GDNError

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.table import Table

    from gdn.eval.results import Comparison


def add_eval(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the command to `gdn`'s."""
    add = commands.add_parser("eval", help="the published table on a model, or any task of lm-evaluation-harness")
    add.add_argument(
        "checkpoint", nargs="*", metavar="CKPT", help="a run, a checkpoint, a Hugging Face folder or hub id; or: compare A B"
    )
    add.add_argument("--data", type=Path, metavar="DIR", help="folder of the tasks' documents: nothing is downloaded")
    add.add_argument("--download", type=Path, metavar="DIR", help="make such a folder, from the network, and stop")
    add.add_argument("--tasks", default="card", help="names with commas; card is the published table (default: %(default)s)")
    add.add_argument("--limit", type=int, metavar="N", help="the first N documents of each task")
    add.add_argument("--num-fewshot", type=int, metavar="N", help="examples in front of each document")
    add.add_argument(
        "--ruler-lengths", default="", metavar="N,N", help="RULER filled to these tokens instead of the card's 2,048"
    )
    add.add_argument("--stream", action="store_true", help="also WikiText with the state carried across windows")
    add.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on CUDA, else float32"
    )
    add.add_argument("--max-length", type=int, metavar="N", help="tokens of context (default: the model configuration's)")
    add.add_argument("--token-budget", type=int, metavar="N", help="tokens of one forward pass (default: by device)")
    add.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that share the tasks, beside the one with the model (default: on CUDA by cores, at most 8; else 1)",
    )
    add.add_argument("--out", type=Path, help="folder of results (default: CKPT/eval, or eval/NAME of a hub id)")
    add.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: %(default)s)")
    add.set_defaults(command=_eval)


def _eval(args: argparse.Namespace) -> int:

    if args.checkpoint[:1] == ["compare"]:
        return _compare(args.checkpoint[1:])
    if args.download is not None and not args.checkpoint and args.data is None:
        return _download(args.download)
    if args.download is not None:
        raise GDNError("eval --download DIR stands alone: it fetches the data and evaluates nothing")
    if len(args.checkpoint) != 1:
        raise GDNError(f"eval takes one checkpoint, or compare and two results; got {' '.join(args.checkpoint) or 'none'}")
    need_harness()
    if args.data is not None:
        os.environ["HF_HUB_OFFLINE"] = "1"
    from gdn.cli import find_checkpoint, find_device
    from gdn.eval import forkserver

    device = find_device(args.device)
    names = tuple(name.strip() for name in args.tasks.split(",") if name.strip())
    if _expects_workers(args, names, device):
        forkserver.begin()  # it imports the harness while we do
    from gdn.distributed.mesh import join
    from gdn.eval.harness import open_folder
    from gdn.evaluate import Options, evaluate

    console = _console()
    folder = find_checkpoint(open_folder(args.checkpoint[0]))
    local = Path(args.checkpoint[0])
    options = Options(
        data=args.data,
        tasks=names,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        ruler_lengths=_integers("--ruler-lengths", args.ruler_lengths),
        stream=args.stream,
        dtype=args.dtype,
        max_length=args.max_length,
        token_budget=args.token_budget,
        workers=args.workers,
    )
    out = args.out or (local / "eval" if local.exists() else Path("eval") / local.name)
    with join(device) as own:
        evaluate(folder, options, out, own, console)
    console.print(f"{out}: results.json, report.html", highlight=False)
    return 0


def _expects_workers(args: argparse.Namespace, names: Sequence[str], device: "torch.device") -> bool:
    """Whether workers will measure these tasks, by what can be told without the harness: of folders, not of the Hub's ids."""
    local = Path(args.checkpoint[0])
    if "LOCAL_RANK" in os.environ or not local.exists():
        return False
    from gdn.cli import find_checkpoint
    from gdn.eval.workers import choose_workers
    from gdn.model.load import is_ours

    tasks = 99 if "card" in names else len(names)
    return choose_workers(args.workers, tasks, device, is_ours(find_checkpoint(local))) > 1


def _console() -> "Console":
    """Wide enough for the tables where nothing says how wide: in a log."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=140)


def need_harness() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise GDNError('eval takes its tasks from lm-evaluation-harness: pip install "gdn[eval]"')
    os.environ["TQDM_DISABLE"] = "1"  # the harness's bars, which tqdm asks about when it is imported
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _download(folder: Path) -> int:
    from rich.console import Console

    need_harness()
    from gdn.eval.download import download

    console = Console()
    for there in download(folder):
        console.print(there, highlight=False)
    return 0


def _compare(folders: Sequence[str]) -> int:

    from gdn.eval.results import compare

    if len(folders) != 2:
        raise GDNError(f"eval compare takes two folders of results; got {len(folders)}")
    found, changed = compare(*map(Path, folders))
    console = _console()
    console.print(comparison_table(found))
    console.print("not the same in both: " + ("; ".join(changed) or "nothing that is locked"), highlight=False)
    return 0


def comparison_table(found: Sequence["Comparison"]) -> "Table":
    """One line a task: both values, the difference on the same documents, and whether noise does as much."""
    from rich.table import Table

    from gdn.eval.results import SIGNIFICANT

    table = Table(title="B against A, on the documents that both scored")
    for name in ("task", "metric", "A", "B", "B - A", "std. error", "p", "verdict", "locked items that differ"):
        table.add_column(name, justify="right" if name in ("A", "B", "B - A", "std. error", "p") else "left")
    for row in found:
        verdict = "noise" if row.noise else "differs"
        numbers = (f"{row.a:.4g}", f"{row.b:.4g}", f"{row.difference:+.4f}", f"{row.stderr:.4f}", f"{row.p:.3g}")
        table.add_row(row.task, row.metric, *numbers, verdict, "; ".join(row.changed) or "-")
    expected = SIGNIFICANT * len(found)
    table.caption = f"differs: p < {SIGNIFICANT:g}; of {len(found)} tasks, noise alone makes {expected:.1f} look so"
    return table


def _integers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise GDNError(f"{option} {text}: expected numbers with commas, such as 4096,8192") from None
