"""What processes tell each other beside FSDP's own traffic: what the first one did, sums, and the norm of all gradients."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gdn.distributed.mesh import SHARD, Workers
from gdn.errors import GDNError

T = TypeVar("T")


def agree(work: Callable[[], T], workers: Workers, group: dist.ProcessGroup | None = None) -> T:
    """`work` is done by the first process alone; all return its result (pickled), or raise its GDNError or OSError."""
    if workers.mesh is None:
        return work()
    box: list[object] = [None, None]
    if workers.first:
        try:
            box[0] = work()
        except (GDNError, OSError) as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0, group=group, device=torch.device("cpu"))
    if isinstance(box[1], Exception):
        raise box[1]
    return box[0]  # type: ignore[return-value]


def sum_counts(counts: Sequence[int], device: torch.device) -> Tensor:
    """Each count summed over all processes, int64 on `device`, without the host waiting for it."""
    sums = torch.stack([torch.full((), count, dtype=torch.int64, device=device) for count in counts])
    dist.all_reduce(sums)
    return sums


def sum_replicated(gradients: Sequence[Tensor], loss: Tensor) -> list[Tensor]:
    """Sums over all processes of gradients that FSDP does not reduce, and of a scalar loss, last, in one message."""
    parts = [*gradients, loss]
    flat = torch.cat([part.float().flatten() for part in parts])
    dist.all_reduce(flat)
    return [piece.view_as(part) for piece, part in zip(flat.split([part.numel() for part in parts]), parts)]


def total_norm(gradients: Sequence[Tensor], workers: Workers) -> Tensor:
    """2-norm of all gradients together: those of the shards of other processes too, a plain tensor once. A float32 scalar."""
    if workers.mesh is None:
        return torch.nn.utils.get_total_norm(gradients)
    shards = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    own = torch.nn.utils.get_total_norm(shards).square().view(1)
    # Gathered and then added in the order of ranks: replicas must not differ in the last bit.
    squares = [torch.empty_like(own) for _ in range(workers.mesh[SHARD].size())]
    dist.all_gather(squares, own, group=workers.mesh.get_group(SHARD))
    return (torch.cat(squares).sum() + torch.nn.utils.get_total_norm(whole).square()).sqrt()


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Scale all gradients, in place, so that their 2-norm `norm` becomes at most `max_norm`."""
    coefficient = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    gradients = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], coefficient)
