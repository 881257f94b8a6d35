"""Who computes: torchrun's processes as a mesh of replicas and shards. A process that torchrun did not start is `ALONE`."""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from gdn.errors import ConfigError, GDNError, RunError

REPLICATE, SHARD = "dp_replicate", "dp_shard"
_PATIENCE = 300  # seconds for all processes of a start to be there


@dataclass(frozen=True)
class Workers:
    """The processes of a run, as one of them sees them."""

    rank: int = 0
    world_size: int = 1
    mesh: DeviceMesh | None = None  # [dp_replicate, dp_shard]; None: one plain process, without a group
    saving: dist.ProcessGroup | None = None  # gloo, apart from training's: a background save talks while a step does

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and shows."""
        return self.rank == 0


ALONE = Workers()


@contextmanager
def join(device: torch.device) -> Iterator[torch.device]:
    """Join torchrun's group for the block, if torchrun started this process; yields the device of this process.

    NCCL on CUDA, gloo on CPU. Raises ConfigError for any other device under torchrun.
    """
    if "LOCAL_RANK" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise ConfigError(f"device {device} under torchrun; expected cpu or cuda")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=_new_store(rank, size), rank=rank, world_size=size)
    try:
        yield device
    except (GDNError, OSError):
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()  # not after any other error: another process may be lost, and NCCL would wait for it


def _new_store(rank: int, size: int) -> dist.Store:
    """A store in which nothing is written yet, the same for all processes that this start of the job has.

    torchrun's agent keeps one store for all starts, and torch.distributed (2.11 to 2.13) does not tell them apart: after a
    restart a process may read the address of one that was killed, and wait for it. So the first process draws a name for this
    start and tells it to each process that says, under a word of its own, that it is there; old words are answered in vain.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return dist.TCPStore(host, port, size, is_master=rank == 0)
    store = dist.TCPStore(host, port, is_master=False)
    word = uuid.uuid4().hex
    if rank:
        store.set(f"gdn/word/{rank}", word)
        start = store.get(f"gdn/start/{word}").decode()
        store.set(f"gdn/{start}/{rank}", "here")
        return dist.PrefixStore(start, store)
    waiting = set(range(1, size))
    deadline = time.monotonic() + _PATIENCE
    while waiting:
        for other in sorted(waiting):
            if store.check([f"gdn/word/{other}"]):
                store.set(f"gdn/start/{store.get(f'gdn/word/{other}').decode()}", word)
            if store.check([f"gdn/{word}/{other}"]):
                waiting.remove(other)
        if time.monotonic() > deadline:
            raise RunError(f"processes {sorted(waiting)} of {size} did not come within {_PATIENCE} s")
        time.sleep(0.01)
    return dist.PrefixStore(word, store)


def world_size() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def make_workers(device: torch.device, dp_replicate: int) -> Workers:
    """The group joined before, as `dp_replicate` replicas of equally many shards; `ALONE` without one. All call it."""
    if not dist.is_initialized():
        return ALONE
    size = dist.get_world_size()
    mesh = init_device_mesh(device.type, (dp_replicate, size // dp_replicate), mesh_dim_names=(REPLICATE, SHARD))
    return Workers(dist.get_rank(), size, mesh, dist.new_group(backend="gloo"))
