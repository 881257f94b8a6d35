"""FSDP2 and HSDP around the model, and back to one plain model."""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from gdn.distributed.collectives import sum_replicated
from gdn.distributed.mesh import REPLICATE, SHARD, Workers
from gdn.model.lm import GatedDeltaNetLM

_GATES = ("A_log", "dt_bias")


def parallelize(model: GatedDeltaNetLM, workers: Workers, cast_gates: bool) -> None:
    """Shard the model's matrices over the mesh, in place: gathered in the compute dtype, gradients summed in float32.

    Whatever is not a matrix (A_log, dt_bias, norms, convolutions: a thousandth of the weights) stays whole and float32 on
    every process, as it is in one: FSDP2's policy would hand the forward all of it in bf16. Their gradients are summed by
    `reduce_gradients`. `cast_gates` puts A_log and dt_bias under the policy after all, as flash-linear-attention under FSDP2
    has them. Weights stay gathered from the first micro batch of a step to the backward of its last.
    """
    assert workers.mesh is not None
    compute = model.compute_dtype if model.compute_dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = workers.mesh if workers.mesh[REPLICATE].size() > 1 else workers.mesh[SHARD]
    whole = {p for name, p in model.named_parameters() if p.ndim != 2 and not (cast_gates and name.endswith(_GATES))}
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=whole)
        assert isinstance(module, FSDPModule)
        # Sums, not means: the loss is divided by the number of tokens of all processes.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def mark_micro_batch(model: nn.Module, last: bool) -> None:
    """Before a forward: whether the step's gradients are complete with it. Only then are they reduced and weights let go."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
        model.set_reshard_after_backward(last)


def reduce_gradients(parameters: list[nn.Parameter], loss: Tensor) -> Tensor:
    """Sum the gradients of all plain parameters over the processes, in place; returns the sum of their losses."""
    plain = [p for p in parameters if not isinstance(p, DTensor)]
    *sums, total = sum_replicated([p.grad for p in plain if p.grad is not None], loss)
    for parameter, gradient in zip([p for p in plain if p.grad is not None], sums):
        parameter.grad = gradient
    return total


def empty_copy(model: GatedDeltaNetLM, device: torch.device) -> GatedDeltaNetLM:
    """A plain model like `model` on `device`, its weights not set."""
    with torch.device("meta"):
        plain = GatedDeltaNetLM(model.config, model.compute_dtype)
    plain.to_empty(device=device)
    if model.config.tie_word_embeddings:
        plain.lm_head.weight = plain.model.embeddings.weight
    return plain


def gather(model: GatedDeltaNetLM, device: torch.device, keep: bool = True) -> GatedDeltaNetLM | None:
    """A plain copy of a model, sharded or not, with whole weights on `device`; None where not to `keep`. All call it."""
    plain = empty_copy(model, device) if keep else None
    targets = dict(plain.named_parameters()) if plain is not None else {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if name in targets:
                targets[name].copy_(whole)
    return plain


def scatter(plain: GatedDeltaNetLM, model: GatedDeltaNetLM) -> None:
    """Set the weights of `model`, sharded or not, to those of a plain one; no process needs another for it."""
    sources = dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = sources[name].to(parameter.device)
            if isinstance(parameter, DTensor):
                part = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
                parameter.to_local().copy_(part.to_local())
            else:
                parameter.copy_(whole)
