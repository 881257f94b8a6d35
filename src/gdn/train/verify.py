"""`gdn verify-resume`: whether, on this machine, a run that was killed and stopped ends in the bits of one that was not.

Every phase is `gdn train` in processes of its own, as a user starts it. A control shows that the comparison sees a restore
which lost something.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gdn import config as toml
from gdn.distributed.checkpoint import CHECKSUMS, SHARDED, checkpoints
from gdn.errors import ConfigError, RunError
from gdn.files import sha256_file
from gdn.train.loop import CHECKPOINTS
from gdn.train.recipe import RunConfig

Digests = dict[str, str]  # "file: tensor" to the SHA-256 of its bytes


class Options(NamedTuple):
    """Where and how the runs are made."""

    out: Path  # must not exist; removed again when all is well
    steps: int  # a multiple of three: killed after a third, stopped after two
    device: str
    processes: int  # under torchrun; 0: one plain process


def verify_resume(run: RunConfig, options: Options, say: Callable[[str], None]) -> str | None:
    """None if all is well, else what parted first and where. `say` is told what has been done.

    Raises a GDNError for a recipe that does not run, and for a control that was not caught.
    """
    if options.steps < 3 or options.steps % 3:
        raise ConfigError(f"--steps {options.steps}; expected 3, 6, 9, ...")
    if options.processes < 0:
        raise ConfigError(f"--processes {options.processes}; expected 0 (no torchrun) or more")
    if options.out.exists():
        raise ConfigError(f"{options.out} exists; delete it or choose another --out")
    third = options.steps // 3
    train = replace(run.train, steps=options.steps)
    optim = replace(run.optim, warmup_steps=min(run.optim.warmup_steps, options.steps))
    kept = replace(run.checkpoint, every=third, keep=options.steps)
    evaluation = replace(run.eval, every=0, tasks_every=0)
    options.out.mkdir(parents=True)
    recipe = options.out / "recipe.toml"
    short = replace(run, train=train, optim=optim, checkpoint=kept, eval=evaluation, log=replace(run.log, every=1))
    recipe.write_text(toml.dump(short), encoding="utf-8")

    straight = options.out / "straight"
    _train(recipe, straight, options, None)
    expected = _digests(straight)
    shutil.rmtree(straight)
    say(f"{options.steps} steps straight: {len(expected[options.steps])} tensors at each of steps {sorted(expected)}")

    stopped = options.out / "stopped"
    _train(recipe, stopped, options, signal.SIGKILL, third)
    _drop_after(third, stopped)  # what was published before the kill: as if it had come in time
    control = options.out / "control"
    shutil.copytree(stopped, control)
    _train(recipe, stopped, options, signal.SIGTERM, 2 * third)
    if _newest(stopped) == options.steps:  # the signal came too late
        _drop_after(2 * third, stopped)
    stop = _newest(stopped)
    _train(recipe, stopped, options, None)
    parted = _first_difference(expected, _digests(stopped))
    shutil.rmtree(stopped)
    say(f"killed after step {third}, stopped after step {stop}, gone on: {parted or 'the same bits at all of them'}")

    lost = _forget(checkpoints(control / CHECKPOINTS)[0])
    _train(recipe, control, options, None)
    expected.pop(third)  # what was taken away is not what is to be seen, but what came of it
    seen = _first_difference(expected, _digests(control))
    if seen is None:
        raise RunError(f"control: a restore without {lost} was not told apart from a whole one; nothing is proved")
    say(f"control, a restore at step {third} without {lost}: {seen}, as it must")
    if parted is None:
        shutil.rmtree(options.out)
    return parted


def _train(recipe: Path, out: Path, options: Options, stop: signal.Signals | None, after: int = 0) -> None:
    """`gdn train`, to its end or until `stop` is sent when the checkpoint of step `after` is there. RunError if it fails."""
    command = [sys.executable, "-m"]
    if options.processes:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}", "-m"]
    command += ["gdn", "--quiet", "train", str(recipe), "--out", str(out), "--device", options.device]
    with (options.out / "log.txt").open("a", encoding="utf-8") as log, _group(command, log) as process:
        awaited = out / CHECKPOINTS / f"step-{after:08d}"
        while process.poll() is None and not (stop is not None and awaited.exists()):
            time.sleep(0.02)
        if stop is not None and process.poll() is None:
            os.killpg(process.pid, stop)
        code = process.wait()
    meant = {0, -signal.SIGKILL} if stop is signal.SIGKILL else {0}
    if code not in meant and not (stop is not None and options.processes and awaited.exists()):
        said = Path(log.name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        ended = f"was killed by signal {-code} from outside" if code < 0 else f"ended with {code}"
        raise RunError(f"gdn train {ended}: {said[-1] if said else 'no word'}; all it said is in {log.name}")


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _newest(folder: Path) -> int:
    return _step(checkpoints(folder / CHECKPOINTS)[-1])


def _drop_after(step: int, folder: Path) -> None:
    """Delete a run's checkpoints of later steps."""
    for path in checkpoints(folder / CHECKPOINTS):
        if _step(path) > step:
            shutil.rmtree(path)


@contextmanager
def _group(command: list[str], log: object) -> Iterator["subprocess.Popen[bytes]"]:
    """The command and all processes that it starts, none of which outlives the block."""
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _digests(folder: Path) -> dict[int, Digests]:
    """Of every tensor in every checkpoint of a run, by step."""
    found = {}
    for checkpoint in checkpoints(folder / CHECKPOINTS):
        digests = {}
        for file in sorted(checkpoint.rglob("*.safetensors")):
            for name, tensor in _tensors(file).items():
                data = tensor.reshape(-1).view(torch.uint8).numpy().data
                digests[f"{file.relative_to(checkpoint)}: {name}"] = hashlib.sha256(data).hexdigest()
        found[_step(checkpoint)] = digests
    return found


def _tensors(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as stream:
        return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118


def _first_difference(expected: dict[int, Digests], got: dict[int, Digests]) -> str | None:
    for step in sorted(expected.keys() & got.keys()):
        for name in sorted(expected[step].keys() | got[step].keys()):
            if expected[step].get(name) != got[step].get(name):
                return f"at step {step} they part in {name}"
    missing = max(expected) not in got
    return f"the second run has no checkpoint of step {max(expected)}" if missing else None


def _forget(checkpoint: Path) -> str:
    """Zero one moment in a checkpoint, and make it whole again to the eye; returns the tensor's name."""
    file = sorted((checkpoint / SHARDED).glob("*.safetensors"))[0]
    tensors = _tensors(file)
    with safe_open(file, framework="pt") as stream:
        metadata = stream.metadata()
    name = next(name for name, tensor in tensors.items() if name.endswith(":exp_avg") and bool(tensor.any()))
    save_file(tensors | {name: torch.zeros_like(tensors[name])}, file, metadata=metadata)
    sums = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))
    sums[str(file.relative_to(checkpoint))] = sha256_file(file)
    (checkpoint / CHECKSUMS).write_text(json.dumps(sums), encoding="utf-8")
    return name
