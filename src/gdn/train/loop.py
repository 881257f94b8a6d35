"""The training loop. One function to hold in mind: `train`."""

import logging
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from rich.console import Console

from gdn import config as toml
from gdn.data.loader import Batch, Loader
from gdn.data.shards import HELDOUT, TOKENIZER, TRAIN, TokenShards
from gdn.data.tokenizer import load_tokenizer
from gdn.distributed import checkpoint
from gdn.distributed.collectives import agree, clip_gradients, sum_counts, total_norm
from gdn.distributed.mesh import ALONE, Workers, make_workers, world_size
from gdn.distributed.parallelize import gather, mark_micro_batch, parallelize, reduce_gradients
from gdn.errors import CheckpointError, ConfigError, RunError
from gdn.eval.perplexity import heldout_loss
from gdn.files import lock_folder, write_text
from gdn.model.lm import GatedDeltaNetLM, init_weights
from gdn.ops.backend import float8_refusal
from gdn.ops.cross_entropy import IGNORED
from gdn.train.guard import Guard, StepResult
from gdn.train.meter import Meter, ProfilerWindow, measure_peak
from gdn.train.metrics import Display, Metrics
from gdn.train.micro_batch import MicroBatch
from gdn.train.optim import build_optimizer, learning_rate
from gdn.train.recipe import RunConfig
from gdn.train.state import RECIPE, Progress, read_state, take_snapshot, write_state

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
# Of a recipe, what a run may go on with another of: a folder of shards, whose fingerprint is compared, and what changes no bit.
_MAY_CHANGE = {("data", "shards"), ("train", "recompute"), ("train", "cuda_graph")}


class Outcome(NamedTuple):
    """How a call of `train` ended: where the run stands, its newest checkpoint, and the signal that stopped it, if one did."""

    progress: Progress
    checkpoint: Path
    stopped_by: signal.Signals | None


def train(run: RunConfig, folder: Path, device: torch.device, console: Console) -> Outcome:
    """Train `run` in `folder`, going on from its newest checkpoint; stopping anywhere and calling again changes no bit.

    Alone, or in every process of the group that `distributed.mesh.join` joined: the same steps on the same windows, whatever
    their number, which may change where a run stops. SIGINT or SIGTERM in any of them end it with a checkpoint. Raises a
    GDNError for a recipe, shards or checkpoint that do not fit, a folder in use, and a loss that stays not finite.
    """
    plan = run.check(world_size())
    workers = make_workers(device, run.parallel.dp_replicate)
    with ExitStack() as stack:
        agree(lambda: begin(run, folder, stack), workers)
        loader, heldout = open_data(run)
        recipe, fingerprint = toml.dump(run), loader.shards.manifest.fingerprint
        tokenizer = load_tokenizer(loader.shards.folder / TOKENIZER)
        model = build_model(run, device, workers)
        optimizer = build_optimizer(model, run.optim)
        progress = resume(run, folder, model, optimizer, fingerprint, workers)
        micro_batch = MicroBatch(model, run.train.cuda_graph)
        agree(lambda: write_text(folder / RECIPE, recipe), workers)

        metrics = stack.enter_context(Metrics(folder, run, progress.step)) if workers.first else None
        display = stack.enter_context(
            Display(console if workers.first else Console(quiet=True), run.train.steps, progress.step)
        )
        profiler = stack.enter_context(ProfilerWindow(folder, run.log.profile_steps if workers.first else None, device))
        stopped = stack.enter_context(stop_signals(workers))
        saver = stack.enter_context(checkpoint.Saver(folder / CHECKPOINTS, run.checkpoint.keep, workers))

        def report(row: Mapping[str, float]) -> None:
            if metrics is not None:
                metrics.write(row)

        def save() -> None:
            guard.read(progress.step)
            weights, moments = take_snapshot(model, optimizer, workers)
            now = replace(progress)

            def write(into: Path) -> None:
                assert weights is not None
                write_state(into, weights, now, recipe, fingerprint)
                tokenizer.save(into)

            saver.start(now.step, moments, write)

        guard = Guard(run.guard, progress, folder if workers.first else None, lambda at: loader.windows(at).tolist(), report)
        saved_at = progress.step if agree(lambda: bool(checkpoint.checkpoints(saver.folder)), workers) else -1
        meter = Meter(device, run.model.flops_per_token(run.data.seq_len).total, workers.world_size, measure_peak(device))
        began = time.monotonic() - progress.seconds
        while progress.step < run.train.steps:
            lr = learning_rate(progress.step, run.train.steps, run.optim)
            profiler.before(progress.step + 1)
            with meter.waiting():
                batches = list(loader.micro_batches(progress.step, workers.rank, workers.world_size))
            result = train_step(micro_batch, optimizer, batches, lr, run, workers, bool(stopped))
            progress.step += 1
            progress.tokens += plan.tokens_per_step
            guard.note(progress.step, result)
            meter.step(plan.tokens_per_step)
            progress.seconds = time.monotonic() - began
            last = progress.step == run.train.steps
            if last or progress.step % run.log.every == 0 or progress.step == 1:
                guard.read(progress.step)
                progress.seconds = time.monotonic() - began
                row = {"step": progress.step, "tokens": progress.tokens, "seconds": progress.seconds, "loss": guard.loss}
                row |= {"lr": lr, "grad_norm": guard.grad_norm} | meter.row(run.train.steps - progress.step)
                report(row)
                display.update(row)
            if guard.stopping or (workers.mesh is None and stopped):
                break
            saving, measures = last or progress.step % run.checkpoint.every == 0, due(run, heldout, progress.step)
            if saving or any(measures):
                guard.read(progress.step)  # and the device has done what is queued: steps, which are not aside
            with meter.aside():
                if saving:
                    save()
                    saved_at = progress.step
                if any(measures):
                    loader.check_unchanged()
                    scores = evaluate(run, model, heldout, loader.shards.folder / TOKENIZER, measures, workers)
                    loader.check_unchanged()
                    report({"step": progress.step} | scores)
        if saved_at != progress.step:
            save()
        saver.finish()
        stopped_by = stopped[0] if stopped else signal.SIGTERM if guard.stopping else None
        return Outcome(progress, checkpoint.checkpoints(saver.folder)[-1], stopped_by)


def train_step(
    micro_batch: MicroBatch,
    optimizer: torch.optim.AdamW,
    batches: Sequence[Batch],
    lr: float,
    run: RunConfig,
    workers: Workers = ALONE,
    stop: bool = False,
) -> StepResult:
    """One optimizer step on this process's micro batches; `stop`: it was asked to stop. The host waits for nothing.

    The sum of losses is divided by the number of valid tokens of all micro batches of all processes, so that neither changes
    anything. A loss or gradient norm that is not finite leaves weights, moments and their step count as they were, by a flag
    that the optimizer's kernel reads on the device.
    """
    parameters = list(micro_batch.model.parameters())
    device = parameters[0].device
    counts = sum(int((batch.labels != IGNORED).sum()) for batch in batches), int(stop)
    loss = torch.zeros((), device=device)
    # A divisor on the device: CUDA multiplies by the inverse of one on the host, and a graph would keep the first.
    valid, stopping = (torch.full((), count, device=device) for count in counts)
    if workers.mesh is not None:
        valid, stopping = sum_counts(counts, device)
    for i, batch in enumerate(batches):
        mark_micro_batch(micro_batch.model, last=i == len(batches) - 1)
        loss += micro_batch(batch, valid)
    if workers.mesh is not None:
        loss = reduce_gradients(parameters, loss)
    grad_norm = total_norm([p.grad for p in parameters if p.grad is not None], workers)
    clip_gradients(parameters, run.train.max_grad_norm, grad_norm)
    optimizer.found_inf = (~(loss.isfinite() & grad_norm.isfinite())).float()  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, grad_norm, stopping)


class Due(NamedTuple):
    """What is to be measured after a step."""

    loss: bool  # on held-out text
    tasks: bool


def due(run: RunConfig, heldout: TokenShards | None, step: int) -> Due:
    """What the recipe wants measured after `step`: at every so many steps, and at the last."""
    at = [bool(every) and (step == run.train.steps or step % every == 0) for every in (run.eval.every, run.eval.tasks_every)]
    return Due(at[0] and heldout is not None, at[1])


def evaluate(
    run: RunConfig, model: GatedDeltaNetLM, heldout: TokenShards | None, tokenizer: Path, wanted: Due, workers: Workers
) -> dict[str, float]:
    """Held-out loss and the scores of the recipe's tasks, "task/metric" to value, as far as they are wanted."""
    scores: dict[str, float] = {}
    # Whole in every process: the harness shares documents out, and a sharded model would wait for processes that have none.
    plain = model if workers.mesh is None else gather(model, next(model.parameters()).device)
    assert plain is not None
    if wanted.loss:
        assert heldout is not None
        scores |= heldout_loss(plain, heldout, run.data.seq_len, run.data.micro_batch_size, run.eval.windows)
    if wanted.tasks:
        scores |= task_scores(plain, run, tokenizer)
    return scores


def task_scores(model: GatedDeltaNetLM, run: RunConfig, tokenizer: Path) -> dict[str, float]:
    """The recipe's tasks on the weights as they are, "task/metric" to value: `gdn eval`'s own code and documents."""
    try:
        from gdn.eval import harness
    except ImportError:
        raise RunError('eval.tasks_every needs lm-evaluation-harness: pip install "gdn[eval]"') from None
    return harness.scores(model, tokenizer, run.eval.tasks, Path(run.eval.tasks_data), run.eval.tasks_limit)


def begin(run: RunConfig, folder: Path, stack: ExitStack) -> None:
    """What one process does for all: hold the folder until `stack` ends, clear it of half-written files, verify the data."""
    stack.enter_context(lock_folder(folder))
    checkpoint.clean(folder)
    checkpoint.clean(folder / CHECKPOINTS)
    open_data(run)


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
    loader.watch(heldout.paths)
    return loader, heldout


def build_model(run: RunConfig, device: torch.device, workers: Workers = ALONE) -> GatedDeltaNetLM:
    """The recipe's model with its initial weights, float32, on `device`; among several processes, sharded over them."""
    compute = torch.bfloat16 if run.train.dtype == "bfloat16" else torch.float32
    if run.train.float8_ffn and (refusal := _float8_refusal(run, device)):
        raise ConfigError(f"train.float8_ffn = true: {refusal}")
    model = GatedDeltaNetLM(run.model, compute, run.train.recompute, run.train.float8_ffn)
    init_weights(model, run.train.init, run.train.seed)
    model = model.to(device)
    if workers.mesh is not None:
        parallelize(model, workers, run.parallel.cast_gates)
    elif run.parallel.cast_gates:
        raise ConfigError("parallel.cast_gates = true; expected processes of torchrun, whose FSDP2 does the cast")
    return model


def _float8_refusal(run: RunConfig, device: torch.device) -> str | None:
    config = run.model
    if not (config.use_gate and config.use_short_conv):
        return "model.use_gate or model.use_short_conv is false; expected both true, for blocks that are one operator"
    return float8_refusal(device, config.head_dim, config.head_v_dim, (config.hidden_size, config.ffn_size))


def resume(
    run: RunConfig, folder: Path, model: GatedDeltaNetLM, optimizer: torch.optim.AdamW, fingerprint: str, workers: Workers
) -> Progress:
    """Load the newest checkpoint of the run in `folder`, after verifying it; a fresh Progress if there is none."""
    newest = agree(lambda: _newest(run, folder / CHECKPOINTS), workers)
    if newest is None:
        return Progress()
    progress = read_state(newest, model, optimizer, fingerprint, workers)
    if workers.first:
        log.info("going on from %s", newest)
    return progress


def _newest(run: RunConfig, saves: Path) -> Path | None:
    found = checkpoint.checkpoints(saves)
    if not found:
        return None
    checkpoint.verify(found[-1])
    before = toml.load(RunConfig, found[-1] / RECIPE)
    for section in ("data", "train", "optim"):
        ours, theirs = toml.to_dict(getattr(run, section)), toml.to_dict(getattr(before, section))
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key) and (section, key) not in _MAY_CHANGE:
                raise CheckpointError(
                    f"{found[-1]}: {section}.{key} = {theirs.get(key)!r} there, {ours.get(key)!r} in the recipe; "
                    "a run goes on only as it began"
                )
    return found[-1]


@contextmanager
def stop_signals(workers: Workers) -> Iterator[list[signal.Signals]]:
    """Collect the first SIGINT or SIGTERM in the yielded list; a second one acts as it did before.

    Not so among several processes: torchrun passes on what a scheduler or terminal has sent to each of them already.
    """
    received: list[signal.Signals] = []
    previous: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        if workers.mesh is None:
            restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        restore()
