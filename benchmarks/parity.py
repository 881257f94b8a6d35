"""Loss and gradient norm, step by step, from the same weights on the same batches of real text, beside another implementation.

python benchmarks/parity.py SHARDS [--device cuda] [--steps 100] [--recipe FILE] [--write [--output FOLDER]] [a.b=value ...]

On a GPU: the recipe's model in bf16 beside flash-linear-attention's (`train_models`), which reads gdn's initial weights from
safetensors. On a CPU: a small model in float32 beside one written down here with nothing but autograd, token by token. Batches
are the recipe's, one micro batch a step, learning rates those of its warm-up. Says by how much they differ at most, and exits
with 1 if a loss differs by more than --tolerance: 0.01 on a GPU, 1e-4 of itself on a CPU.
"""

import argparse
import datetime
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import train_models as models
from ops_peers import Result, versions, write
from torch import Tensor, nn

from gdn import config as toml
from gdn.data.loader import Loader
from gdn.data.shards import TRAIN, TokenShards
from gdn.model.config import ModelConfig
from gdn.model.load import save_model
from gdn.ops.cross_entropy import IGNORED
from gdn.train.optim import build_optimizer, learning_rate
from gdn.train.recipe import RunConfig

RESULTS = Path(__file__).parent / "results"
RECIPE = Path(__file__).parent.parent / "recipes" / "gdn_360m_15b.toml"
SMALL = ["model.hidden_size=64", "model.num_hidden_layers=2", "model.num_heads=2", "model.head_dim=32"]
SMALL += ["data.seq_len=96", "data.micro_batch_size=4", "train.dtype=float32", "optim.warmup_steps=20"]


class Plain(nn.Module):
    """The published architecture with its key names, by autograd alone; only what a recipe without extras has."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        self.weights = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(w.clone()) for name, w in weights.items()})

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """The mean loss; labels are those of the same tokens, and shifted here."""
        x = F.embedding(ids, self.weight("model.embeddings"))
        for i in range(self.config.num_hidden_layers):
            layer = f"model.layers.{i}"
            x = x + self.mixer(self.norm(x, f"{layer}.attn_norm"), f"{layer}.attn")
            h = self.norm(x, f"{layer}.mlp_norm")
            gate, up = (h @ self.weight(f"{layer}.mlp.{name}_proj").T for name in ("gate", "up"))
            x = x + (F.silu(gate) * up) @ self.weight(f"{layer}.mlp.down_proj").T
        logits = self.norm(x, "model.norm") @ self.weight("lm_head").T
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)

    def weight(self, name: str) -> Tensor:
        full = name.replace(".", "/")
        return self.weights[full if full in self.weights else full + "/weight"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight(name), self.config.norm_eps)

    def mixer(self, x: Tensor, name: str) -> Tensor:
        m, (B, T, _) = self.config, x.shape
        q, k, v, a, b, g = (x @ self.weight(f"{name}.{part}_proj").T for part in "qkvabg")
        q, k, v = (
            self.convolved(y, f"{name}.{part}_conv1d").view(B, T, m.num_heads, -1) for y, part in ((q, "q"), (k, "k"), (v, "v"))
        )
        q, k = (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6) for y in (q, k))
        decay = torch.exp(-self.weight(f"{name}.A_log").exp() * F.softplus(a + self.weight(f"{name}.dt_bias")))
        beta, state, outputs = b.sigmoid(), x.new_zeros(B, m.num_heads, m.head_dim, m.head_v_dim), []
        for t in range(T):
            state = decay[:, t, :, None, None] * state
            written = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
            state = state + k[:, t, :, :, None] * written[:, :, None]
            outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * m.head_dim**-0.5)
        o = self.norm(torch.stack(outputs, 1), f"{name}.o_norm") * F.silu(g).view(B, T, m.num_heads, -1)
        return o.flatten(-2) @ self.weight(f"{name}.o_proj").T

    def convolved(self, x: Tensor, name: str) -> Tensor:
        weight = self.weight(name)
        return F.silu(F.conv1d(F.pad(x.mT, (weight.shape[-1] - 1, 0)), weight, groups=len(weight)).mT)


def plain_step(run: RunConfig, weights: dict[str, Tensor]) -> models.Step:
    model = Plain(run.model, weights)
    return models.plain_step(run, model, build_optimizer(model, run.optim), model)  # type: ignore[arg-type]


def compare(run: RunConfig, shards: Path, steps: int, device: str) -> Result:
    """Both models' loss and gradient norm at each step."""
    weights = models.initial_model(run).state_dict()
    ours = models.gdn_step(run, weights, device)
    if device == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            save_model(models.initial_model(run), Path(folder))
            theirs = models.fla_step(run, Path(folder))
    else:
        theirs = plain_step(run, weights)
    data = run.data
    loader = Loader(
        TokenShards.open(shards, TRAIN), data.seq_len, data.micro_batch_size, data.global_batch_size, run.train.seed
    )
    rows: list[tuple[Tensor, ...]] = []
    for step in range(steps):
        batches = [models.without_last_target(batch) for batch in loader.micro_batches(step)]
        lr = learning_rate(step, run.train.steps, run.optim)
        rows.append((*ours(batches, lr), *theirs(batches, lr)))
        if step % 10 == 9:
            print(f"step {step + 1}: loss {float(rows[-1][0]):.5f} beside {float(rows[-1][2]):.5f}", flush=True)
    columns = torch.tensor([[float(x) for x in row] for row in rows], dtype=torch.float64).T
    names = ("loss", "grad_norm", "peer_loss", "peer_grad_norm")
    return {
        "largest_loss_difference": (columns[0] - columns[2]).abs().max().item(),
        "largest_relative_loss_difference": ((columns[0] - columns[2]).abs() / columns[2].abs()).max().item(),
        "mean_loss_difference": (columns[0] - columns[2]).mean().item(),
        "largest_relative_grad_norm_difference": ((columns[1] - columns[3]).abs() / columns[3]).max().item(),
    } | {name: [round(x, 6) for x in column.tolist()] for name, column in zip(names, columns)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="folder made by `gdn prepare`")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--tolerance", type=float, help="of the loss at every step (0.01; on a CPU, of itself: 1e-4)")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    options = parser.parse_args(arguments)
    own = SMALL if options.device == "cpu" else []
    run = toml.load(RunConfig, options.recipe, [*own, *options.overrides])
    run = toml.load(
        RunConfig, options.recipe, [*own, f"data.global_batch_size={run.data.micro_batch_size}", *options.overrides]
    )
    row = compare(run, options.shards, options.steps, options.device)
    key, bound = ("largest_loss_difference", 1e-2) if options.device == "cuda" else ("largest_relative_loss_difference", 1e-4)
    bound = bound if options.tolerance is None else options.tolerance
    for name, value in row.items():
        if isinstance(value, float):
            print(f"{name} {value:.3g}")
    if options.write:
        gpu = torch.cuda.get_device_name().removeprefix("NVIDIA ").split()[0].lower() if options.device == "cuda" else "cpu"
        about = {"date": datetime.date.today().isoformat(), "versions": versions(), "recipe": toml.to_dict(run)}
        write(options.output / f"parity_{gpu}.json", {"results": {run.train.dtype: about | row}})
    print("within" if row[key] <= bound else "OUTSIDE", f"{bound:g}")
    return int(row[key] > bound)


if __name__ == "__main__":
    sys.exit(main())
