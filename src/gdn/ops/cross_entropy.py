"""Linear layer and cross-entropy in chunks of rows: the full logits of a batch never exist in training. And what scoring wants
of logits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gdn.ops.backend import backend_for

IGNORED = -100  # the label of a position that is not a target: PyTorch's own convention
_CHUNK_LOGITS = 1 << 22  # logits alive at a time: 16 MiB in float32
_GPU_CHUNK_LOGITS = 1 << 28  # 512 MiB in bfloat16: products large enough for a GPU, and few of them


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log softmax(hidden @ weight^T)[label] over all rows whose label is not -100: a float32 scalar.

    hidden [R, D]; weight [V, D]; labels [R] int64. The matrix products run in hidden's dtype, softmax and sums in float32
    (float64 for float64). The gradients are computed with the loss, chunk by chunk, which saves a second product.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels)
    return loss


def row_scores(logits: Tensor) -> tuple[Tensor, Tensor]:
    """log sum exp of each row of logits [R, V], float32 [R], and where it is largest, int64 [R]. No gradients.

    Of equals the first is the largest (on a GPU; elsewhere which PyTorch finds). A nan or +inf among the logits makes the sum
    nan or +inf.
    """
    if backend_for(logits) == "triton":
        from gdn.ops import triton_cross_entropy

        return triton_cross_entropy.row_scores(logits.contiguous())
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.logsumexp(-1).float(), logits.argmax(-1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        ctx.weight_dtype = weight.dtype
        if backend_for(hidden) == "triton":
            loss, d_hidden, d_weight = _on_gpu(hidden, weight, labels, *wanted)
            ctx.save_for_backward(d_hidden, d_weight)
            return loss
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        narrow = weight.to(hidden.dtype)
        loss = torch.zeros((), dtype=dtype, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if wanted[0] else None
        d_weight = torch.zeros_like(weight, dtype=dtype) if wanted[1] else None
        rows = max(1, _CHUNK_LOGITS // len(weight))
        for h, target, part in zip(hidden.split(rows), labels.split(rows), range(0, len(hidden), rows)):
            valid = target != IGNORED
            log_probabilities = F.log_softmax((h @ narrow.mT).to(dtype), dim=-1)
            index = target.where(valid, 0).unsqueeze(-1)
            loss -= log_probabilities.gather(-1, index).squeeze(-1).mul(valid).sum()
            if d_hidden is None and d_weight is None:
                continue
            d_logits = log_probabilities.exp_()
            d_logits.scatter_add_(-1, index, torch.full_like(index, -1, dtype=dtype))
            d_logits = d_logits.mul_(valid.unsqueeze(-1)).to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, narrow, out=d_hidden[part : part + rows])
            if d_weight is not None:
                d_weight += d_logits.mT @ h
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * d_loss.to(d_hidden.dtype),
            None if d_weight is None else (d_weight * d_loss).to(ctx.weight_dtype),
            None,
        )


def _on_gpu(
    hidden: Tensor, weight: Tensor, labels: Tensor, with_d_hidden: bool, with_d_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss and gradients as wanted, by a kernel that turns logits, rounded to hidden's dtype, into their gradients in place."""
    from gdn.ops.triton_cross_entropy import cross_entropy_in_place

    narrow, labels = weight.to(hidden.dtype), labels.contiguous()
    losses = hidden.new_empty(len(hidden), dtype=torch.float32)
    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if with_d_hidden else None
    d_weight = torch.zeros_like(weight, dtype=torch.float32) if with_d_weight and not len(hidden) else None
    chunks = max(1, -(-len(hidden) * len(weight) // _GPU_CHUNK_LOGITS))
    rows = 128 * max(1, -(-len(hidden) // (128 * chunks)))  # whole tiles of the products
    for start in range(0, len(hidden), rows):
        h, part = hidden[start : start + rows], slice(start, start + rows)
        logits = h @ narrow.mT
        losses[part] = cross_entropy_in_place(logits, labels[part], IGNORED, with_d_hidden or with_d_weight)
        if d_hidden is not None:
            torch.mm(logits, narrow, out=d_hidden[part])
        if with_d_weight:
            if h.dtype == torch.float32 or not h.is_cuda:
                d = (logits.mT @ h).float()
            else:
                d = torch.mm(logits.mT, h, out_dtype=torch.float32)
            d_weight = d if d_weight is None else d_weight.add_(d)
            del d
        del logits  # before the next chunk's are there: this is where a training step's memory peaks
    return losses.sum(), d_hidden, d_weight
