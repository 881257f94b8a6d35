"""A recipe: everything that decides a run, as frozen dataclasses read from TOML."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from gdn.data.shards import Manifest
from gdn.errors import ConfigError
from gdn.model.config import ModelConfig
from gdn.model.lm import Init, Recompute


@dataclass(frozen=True)
class DataConfig:
    shards: str  # folder written by `gdn prepare`
    seq_len: int = 2048
    micro_batch_size: int = 16  # sequences in one forward-backward of one process
    global_batch_size: int = 256  # sequences in one optimizer step
    reset_at_documents: bool = False  # empty the state where a document begins


@dataclass(frozen=True)
class TrainConfig:
    steps: int
    seed: int = 42  # of the weights and of the data order
    max_grad_norm: float = 1.0
    init: Init = "mamba"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of activations and matrix products; weights are float32
    recompute: Recompute = "keys"  # what the backward computes again, to save memory; changes no bit
    float8_ffn: bool = False  # the FFNs' products but weights' gradients in float8, on a GPU of capability 8.9 or 9.0
    cuda_graph: bool = True  # one for forward and backward, where the kernels on one GPU serve; changes no bit


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 4e-4
    min_lr: float = 4e-5  # where the cosine ends
    warmup_steps: int = 1024
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-15
    weight_decay: float = 0.1
    no_decay: tuple[str, ...] = ()  # globs over parameter names; one that matches nothing is an error


@dataclass(frozen=True)
class EvalConfig:
    every: int = 0  # steps between held-out evaluations; 0: none
    windows: int = 64  # of the held-out split, from its start
    tasks: tuple[str, ...] = ()  # of `gdn eval`, run on the weights as they are
    tasks_every: int = 0  # steps between them; 0: none
    tasks_limit: int = 100  # documents of each, its first: always the same ones
    tasks_data: str = ""  # the folder of their documents, as --data of `gdn eval`


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 1000  # steps; the last step is always kept
    keep: int = 2  # newest checkpoints that are not deleted


@dataclass(frozen=True)
class ParallelConfig:
    """How torchrun's processes share a step; one process without torchrun has nothing to share."""

    dp_replicate: int = 1  # copies of the sharded model: more than 1 is HSDP, a copy a node
    dp_shard: int = -1  # processes that share one copy's weights, moments and gradients; -1: all there are for it
    cast_gates: bool = False  # A_log and dt_bias in bf16 in the forward, as FSDP2's policy has them in flash-linear-attention


@dataclass(frozen=True)
class GuardConfig:
    max_in_a_row: int = 5  # steps skipped because their loss or gradient was not finite, before the run ends
    spike_deviations: float = 8.0  # above the median of the last losses: a row of metrics.jsonl


@dataclass(frozen=True)
class LogConfig:
    every: int = 10  # steps between rows of metrics.jsonl
    tensorboard: bool = False
    wandb: bool = False  # Weights & Biases; WANDB_MODE=offline keeps it on this machine
    wandb_project: str = "gdn"
    profile_steps: tuple[int, int] | None = None  # first and last step, from 1, that PyTorch's profiler watches


class Plan(NamedTuple):
    """What a recipe comes to on a number of processes."""

    grad_accum_steps: int
    tokens_per_step: int
    tokens: int


@dataclass(frozen=True)
class RunConfig:
    name: str
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def check(self, world_size: int) -> Plan:
        """The run's arithmetic on `world_size` processes; ConfigError for a recipe that cannot be run as written."""
        data, train, optim = self.data, self.train, self.optim
        positive = {
            "data.seq_len": data.seq_len,
            "data.micro_batch_size": data.micro_batch_size,
            "data.global_batch_size": data.global_batch_size,
            "train.steps": train.steps,
            "train.max_grad_norm": train.max_grad_norm,
            "optim.lr": optim.lr,
            "optim.eps": optim.eps,
            "eval.windows": self.eval.windows,
            "checkpoint.every": self.checkpoint.every,
            "checkpoint.keep": self.checkpoint.keep,
            "log.every": self.log.every,
            "parallel.dp_replicate": self.parallel.dp_replicate,
            "guard.max_in_a_row": self.guard.max_in_a_row,
            "guard.spike_deviations": self.guard.spike_deviations,
        }
        for key, value in positive.items():
            if value <= 0:
                raise ConfigError(f"{key} = {value}; expected more than 0")
        for key, value in {"optim.weight_decay": optim.weight_decay, "eval.every": self.eval.every}.items():
            if value < 0:
                raise ConfigError(f"{key} = {value}; expected 0 or more")
        if not 0 <= train.seed < 2**63:
            raise ConfigError(f"train.seed = {train.seed}; expected 0 to {2**63 - 1}")
        if self.eval.tasks_every < 0 or self.eval.tasks_limit <= 0:
            got = f"{self.eval.tasks_every} and {self.eval.tasks_limit}"
            raise ConfigError(f"eval.tasks_every and eval.tasks_limit = {got}; expected 0 or more, and more than 0")
        if self.eval.tasks_every and not (self.eval.tasks and self.eval.tasks_data):
            raise ConfigError("eval.tasks_every is set; expected eval.tasks and eval.tasks_data beside it")
        if train.float8_ffn and train.dtype != "bfloat16":
            raise ConfigError(f'train.dtype = "{train.dtype}"; expected "bfloat16" beside train.float8_ffn = true')
        window = self.log.profile_steps
        if window is not None and not 1 <= window[0] <= window[1]:
            raise ConfigError(f"log.profile_steps = {list(window)}; expected a first step of at least 1, and a last one")
        if not all(0 <= beta < 1 for beta in optim.betas):
            raise ConfigError(f"optim.betas = {list(optim.betas)}; expected both in [0, 1)")
        if not 0 <= optim.warmup_steps <= train.steps:
            raise ConfigError(f"optim.warmup_steps = {optim.warmup_steps}; expected 0 to train.steps = {train.steps}")
        if not 0 <= optim.min_lr <= optim.lr:
            raise ConfigError(f"optim.min_lr = {optim.min_lr}; expected 0 to optim.lr = {optim.lr}")
        replicas, shards = self.parallel.dp_replicate, self.parallel.dp_shard
        if world_size % replicas or shards not in (-1, world_size // replicas):
            raise ConfigError(
                f"parallel.dp_replicate = {replicas}, parallel.dp_shard = {shards}; expected a product of {world_size}, "
                "the number of processes (dp_shard = -1: whatever is left)"
            )
        per_pass = data.micro_batch_size * world_size
        if data.global_batch_size % per_pass:
            raise ConfigError(
                f"data.global_batch_size = {data.global_batch_size}; expected a multiple of data.micro_batch_size = "
                f"{data.micro_batch_size} times {world_size} process(es)"
            )
        tokens_per_step = data.global_batch_size * data.seq_len
        return Plan(data.global_batch_size // per_pass, tokens_per_step, tokens_per_step * train.steps)

    def check_shards(self, manifest: Manifest, folder: Path) -> None:
        """ConfigError if the shards hold token ids that the model has no embedding for."""
        if manifest.vocab_size > self.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size = {self.model.vocab_size}; expected at least {manifest.vocab_size}, "
                f"the vocabulary of the shards in {folder}"
            )
