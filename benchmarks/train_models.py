"""What `train_step` and `parity` share: gdn's and flash-linear-attention's model with optimizer, one step of each.

flash-linear-attention's stands as Flame trains it: FSDP2 on one process, bf16 parameters in the forward, float32 reduction,
fused AdamW, clipping by norm. A step is given the batches of gdn's loader; that model shifts the labels itself, so the last
token of a window has no target there, and `without_last_target` takes it from ours.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gdn.data.loader import Batch
from gdn.model.lm import GatedDeltaNetLM, init_weights
from gdn.ops.cross_entropy import IGNORED
from gdn.train.loop import train_step
from gdn.train.micro_batch import MicroBatch
from gdn.train.optim import build_optimizer
from gdn.train.recipe import RunConfig

Step = Callable[[Sequence[Batch], float], tuple[Tensor, Tensor]]  # (micro batches, lr) -> loss, gradient norm, on the device


def compute_dtype(run: RunConfig) -> torch.dtype:
    return torch.bfloat16 if run.train.dtype == "bfloat16" else torch.float32


def initial_model(run: RunConfig) -> GatedDeltaNetLM:
    """On the CPU, with the recipe's initial weights."""
    model = GatedDeltaNetLM(run.model, compute_dtype(run))
    init_weights(model, run.train.init, run.train.seed)
    return model


def gdn_step(run: RunConfig, weights: dict[str, Tensor], device: str) -> Step:
    with torch.device("meta"):
        model = GatedDeltaNetLM(run.model, compute_dtype(run), run.train.recompute, run.train.float8_ffn)
    model.to_empty(device=device)
    model.load_state_dict(weights)
    micro_batch, optimizer = MicroBatch(model, run.train.cuda_graph), build_optimizer(model, run.optim)

    def step(batches: Sequence[Batch], lr: float) -> tuple[Tensor, Tensor]:
        result = train_step(micro_batch, optimizer, batches, lr, run)
        return result.loss, result.grad_norm

    return step


def fla_step(run: RunConfig, weights: Path) -> Step:
    """`weights`: a folder with model.safetensors, as gdn writes it."""
    from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
    from safetensors.torch import load_file
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if not dist.is_initialized():
        file = Path(tempfile.mkdtemp()) / "store"
        dist.init_process_group("nccl", init_method=f"file://{file}", rank=0, world_size=1)
    m = run.model
    config = GatedDeltaNetConfig(
        vocab_size=m.vocab_size,
        hidden_size=m.hidden_size,
        num_hidden_layers=m.num_hidden_layers,
        num_heads=m.num_heads,
        head_dim=m.head_dim,
        expand_v=m.expand_v,
        hidden_ratio=m.hidden_ratio,
        max_position_embeddings=m.max_position_embeddings,
        norm_eps=m.norm_eps,
        use_cache=False,
    )
    model = GatedDeltaNetForCausalLM(config).float().cuda()
    model.load_state_dict(load_file(weights / "model.safetensors"))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh("cuda", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.train()
    optimizer = build_optimizer(model, run.optim)
    return plain_step(run, model, optimizer, lambda ids, labels: model(input_ids=ids, labels=labels).loss)


def plain_step(
    run: RunConfig, model: nn.Module, optimizer: torch.optim.Optimizer, mean_loss: Callable[[Tensor, Tensor], Tensor]
) -> Step:
    """A step of a model that shifts labels itself and returns the mean over valid ones; each micro batch counts the same."""

    def step(batches: Sequence[Batch], lr: float) -> tuple[Tensor, Tensor]:
        device = next(model.parameters()).device
        total = torch.zeros((), device=device)
        for batch in batches:
            ids, labels = (x.to(device, non_blocking=True) for x in (batch.input_ids, shifted_back(batch.labels)))
            loss = mean_loss(ids, labels) / len(batches)
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), run.train.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total, norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    return step


def shifted_back(labels: Tensor) -> Tensor:
    """Labels [B, T] of the next token as labels of the same token: those of the first are not known and never used."""
    return torch.cat([labels[:, :1], labels[:, :-1]], dim=1)


def without_last_target(batch: Batch) -> Batch:
    labels = batch.labels.clone()
    labels[:, -1] = IGNORED
    return batch._replace(labels=labels)
