"""Products of rows by a weight, the bits of a row the same however many rows there are beside it."""

import torch
from torch import Tensor
from torch.nn.functional import pad

FULL = 256


def row_product(x: Tensor, weight: Tensor, added: Tensor | None = None) -> Tensor:
    """x [..., K] @ weight^T [..., N], + added [..., N], which it may overwrite; for GPUs, without gradients.

    In 16 bits cuBLAS splits sums over K for few rows only, so that few are filled up to FULL; in float32 it may choose another
    sum for any number of rows, so that each product there is one of FULL rows (seen on an H200, docs/log.md).
    """
    rows = x.shape[:-1].numel()
    step = FULL if x.dtype == torch.float32 else max(rows, FULL)
    wide, sums = x.reshape(rows, x.shape[-1]), None if added is None else added.reshape(rows, len(weight))
    if rows % step:
        fill = (0, 0, 0, -rows % step)
        wide, sums = pad(wide, fill), None if sums is None else pad(sums, fill)
    out = wide.new_empty(len(wide), len(weight)) if sums is None else sums
    for piece, result in zip(wide.split(step), out.split(step)):
        if added is None:
            torch.mm(piece, weight.t(), out=result)
        else:
            result.addmm_(piece, weight.t())
    return out[:rows].view(*x.shape[:-1], len(weight))
