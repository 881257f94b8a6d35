"""Who computes: torchrun's processes as a mesh of replicas and shards. A process that torchrun did not start is `ALONE`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from gdn.errors import ConfigError

REPLICATE, SHARD = "dp_replicate", "dp_shard"


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
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    elif device.type == "cpu":
        dist.init_process_group("gloo")
    else:
        raise ConfigError(f"device {device} under torchrun; expected cpu or cuda")
    try:
        yield device
    finally:
        dist.destroy_process_group()


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
