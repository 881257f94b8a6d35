"""The training loop. One function to hold in mind: `train`."""

import logging
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from gdn import config as toml
from gdn.data.loader import Batch, Loader
from gdn.data.shards import HELDOUT, TOKENIZER, TRAIN, TokenShards
from gdn.data.tokenizer import load_tokenizer
from gdn.errors import CheckpointError, RunError
from gdn.eval.perplexity import heldout_loss
from gdn.files import lock_folder, write_text
from gdn.model.lm import GatedDeltaNetLM, init_weights
from gdn.ops.cross_entropy import IGNORED
from gdn.train import checkpoint
from gdn.train.metrics import Display, Metrics
from gdn.train.optim import build_optimizer, learning_rate
from gdn.train.recipe import RunConfig
from gdn.train.state import RECIPE, Progress, read_state, write_state

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"


class Outcome(NamedTuple):
    """How a call of `train` ended: where the run stands, its newest checkpoint, and the signal that stopped it, if one did."""

    progress: Progress
    checkpoint: Path
    stopped_by: signal.Signals | None


def train(run: RunConfig, folder: Path, device: torch.device, console: Console) -> Outcome:
    """Train `run` in `folder`, going on from its newest checkpoint; stopping anywhere and calling again changes no bit.

    SIGINT or SIGTERM end it with a checkpoint after the step in hand. Raises a GDNError for a recipe, shards or checkpoint
    that do not fit, a folder in use, and a loss or gradient that is not finite.
    """
    run.check(world_size=1)
    with lock_folder(folder):
        checkpoint.clean(folder)
        loader, heldout = open_data(run)
        recipe, saves, fingerprint = toml.dump(run), folder / CHECKPOINTS, loader.shards.manifest.fingerprint
        model = build_model(run, device)
        optimizer = build_optimizer(model, run.optim)
        progress = resume(run, folder, model, optimizer, fingerprint)
        write_text(folder / RECIPE, recipe)
        tokenizer = load_tokenizer(loader.shards.folder / TOKENIZER)

        def save(into: Path) -> None:
            write_state(into, model, optimizer, progress, recipe, fingerprint)
            tokenizer.save(into)

        saved_at, began = progress.step, time.monotonic() - progress.seconds
        with (
            Metrics(folder, run.log.tensorboard) as metrics,
            Display(console, run.train.steps, progress.step) as display,
            stop_signals() as stopped,
        ):
            while progress.step < run.train.steps and not stopped:
                started = time.monotonic()
                lr = learning_rate(progress.step, run.train.steps, run.optim)
                loss, grad_norm, tokens = train_step(model, optimizer, list(loader.micro_batches(progress.step)), lr, run)
                progress.step += 1
                progress.tokens += tokens
                progress.seconds = time.monotonic() - began
                last = progress.step == run.train.steps
                if last or progress.step % run.log.every == 0 or progress.step == 1:
                    speed = tokens / (time.monotonic() - started)
                    row = {"step": progress.step, "tokens": progress.tokens, "seconds": progress.seconds, "loss": loss}
                    row |= {"lr": lr, "grad_norm": grad_norm, "tokens_per_second": speed}
                    metrics.write(row)
                    display.update(row, progress.seconds / progress.step * (run.train.steps - progress.step))
                if run.eval.every and heldout is not None and (last or progress.step % run.eval.every == 0):
                    nats = heldout_loss(model, heldout, run.data.seq_len, run.data.micro_batch_size, run.eval.windows)
                    metrics.write({"step": progress.step} | nats)
                if run.eval.tasks_every and (last or progress.step % run.eval.tasks_every == 0):
                    metrics.write({"step": progress.step} | task_scores(model, run, loader.shards.folder / TOKENIZER))
                if last or progress.step % run.checkpoint.every == 0 or stopped:
                    checkpoint.publish(saves, progress.step, save, run.checkpoint.keep)
                    saved_at = progress.step
        if saved_at != progress.step or not checkpoint.checkpoints(saves):
            checkpoint.publish(saves, progress.step, save, run.checkpoint.keep)
        return Outcome(progress, checkpoint.checkpoints(saves)[-1], stopped[0] if stopped else None)


def train_step(
    model: GatedDeltaNetLM, optimizer: torch.optim.AdamW, batches: Sequence[Batch], lr: float, run: RunConfig
) -> tuple[float, float, int]:
    """One optimizer step: mean loss over the step's valid tokens, gradient norm before clipping, and tokens read.

    The sum of losses is divided by the number of valid tokens of all micro batches, so that accumulation changes nothing.
    """
    device = model.model.embeddings.weight.device
    valid = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
    loss = torch.zeros((), device=device)
    for batch in batches:
        cu_seqlens = None if batch.cu_seqlens is None else batch.cu_seqlens.to(device)
        out = model(batch.input_ids.to(device), batch.labels.to(device), cu_seqlens=cu_seqlens)
        part: Tensor = out.loss_sum / valid
        part.backward()
        loss += part.detach()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.train.max_grad_norm).item()
    if not math.isfinite(grad_norm) or not math.isfinite(loss.item()):
        windows = torch.cat([batch.window_ids for batch in batches]).tolist()
        raise RunError(f"loss {loss.item()} or gradient norm {grad_norm} is not finite; windows of the step: {windows}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item(), grad_norm, sum(batch.input_ids.numel() for batch in batches)


def task_scores(model: GatedDeltaNetLM, run: RunConfig, tokenizer: Path) -> dict[str, float]:
    """The recipe's tasks on the weights as they are, "task/metric" to value: `gdn eval`'s own code and documents."""
    try:
        from gdn.eval import harness
    except ImportError:
        raise RunError('eval.tasks_every needs lm-evaluation-harness: pip install "gdn[eval]"') from None
    return harness.scores(model, tokenizer, run.eval.tasks, Path(run.eval.tasks_data), run.eval.tasks_limit)


def open_data(run: RunConfig) -> tuple[Loader, TokenShards | None]:
    """The training loader and, if it will be evaluated, the held-out split; all files verified against their checksums."""
    folder = Path(run.data.shards)
    shards = TokenShards.open(folder, TRAIN)
    run.check_shards(shards.manifest, folder)
    shards.verify()
    data = run.data
    sizes = (data.seq_len, data.micro_batch_size, data.global_batch_size)
    loader = Loader(shards, *sizes, run.train.seed, data.reset_at_documents)
    if not run.eval.every or HELDOUT not in shards.manifest.splits:
        return loader, None
    heldout = TokenShards.open(folder, HELDOUT)
    heldout.verify()
    return loader, heldout


def build_model(run: RunConfig, device: torch.device) -> GatedDeltaNetLM:
    """The recipe's model with its initial weights, float32, on `device`."""
    compute = torch.bfloat16 if run.train.dtype == "bfloat16" else torch.float32
    model = GatedDeltaNetLM(run.model, compute)
    init_weights(model, run.train.init, run.train.seed)
    return model.to(device)


def resume(run: RunConfig, folder: Path, model: GatedDeltaNetLM, optimizer: torch.optim.AdamW, fingerprint: str) -> Progress:
    """Load the newest checkpoint of the run in `folder`, after verifying it; a fresh Progress if there is none."""
    saves = folder / CHECKPOINTS
    checkpoint.clean(saves)
    found = checkpoint.checkpoints(saves)
    if not found:
        return Progress()
    checkpoint.verify(found[-1])
    before = toml.load(RunConfig, found[-1] / RECIPE)
    for section in ("data", "train", "optim"):
        ours, theirs = toml.to_dict(getattr(run, section)), toml.to_dict(getattr(before, section))
        for key in sorted(ours.keys() | theirs.keys()):
            # The folder of the shards may move: their fingerprint is compared instead.
            if ours.get(key) != theirs.get(key) and (section, key) != ("data", "shards"):
                raise CheckpointError(
                    f"{found[-1]}: {section}.{key} = {theirs.get(key)!r} there, {ours.get(key)!r} in the recipe; "
                    "a run goes on only as it began"
                )
    progress = read_state(found[-1], model, optimizer, fingerprint)
    log.info("going on from %s", found[-1])
    return progress


@contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """Collect the first SIGINT or SIGTERM in the yielded list; a second one acts as it did before."""
    received: list[signal.Signals] = []
    previous: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        restore()
