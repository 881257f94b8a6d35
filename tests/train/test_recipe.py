import math
from pathlib import Path
from typing import Any

import pytest
from train_testing import make_run

from gdn import config as toml
from gdn.errors import ConfigError
from gdn.model.lm import GatedDeltaNetLM
from gdn.train.metrics import METRICS, Metrics, read_metrics
from gdn.train.optim import build_optimizer, learning_rate
from gdn.train.recipe import OptimConfig, Plan, RunConfig

PUBLISHED = Path(__file__).resolve().parents[2] / "recipes" / "gdn_360m_15b.toml"


def test_published_recipe() -> None:
    run = toml.load(RunConfig, PUBLISHED)
    assert run.check(1) == Plan(16, 524_288, 15_032_385_536) and run.check(8).grad_accum_steps == 2
    assert run.model.num_parameters() == 357_781_928
    assert run.optim == OptimConfig(4e-4, 4e-5, 1024, (0.9, 0.95), 1e-15, 0.1, ())


@pytest.mark.parametrize(("name", "most"), [("scaled", 50.1e6), ("demo", 118e6)])
def test_short_recipes_train_the_published_model(name: str, most: float) -> None:
    """They may differ in how long, on what and how fast it learns."""
    run, published = (toml.load(RunConfig, PUBLISHED.with_name(f"gdn_360m_{which}.toml")) for which in (name, "15b"))
    assert run.model == published.model
    assert 0.9 * most < run.check(1).tokens <= most
    assert (run.train.init, run.train.dtype, run.optim.weight_decay) == ("mamba", "bfloat16", published.optim.weight_decay)
    assert run.optim.warmup_steps == run.train.steps // 10


def test_round_trip(tmp_path: Path) -> None:
    run = make_run(tmp_path, optim={"no_decay": ["*.A_log", 'q"\\'], "eps": 1e-15})
    (tmp_path / "r.toml").write_text(toml.dump(run), encoding="utf-8")
    assert toml.load(RunConfig, tmp_path / "r.toml") == run


BAD: list[tuple[str, dict[str, Any]]] = [
    ("data.global_batch_size = 5", {"data": {"global_batch_size": 5}}),
    ("train.steps = 0", {"train": {"steps": 0}}),
    ('train.dtype = "float32"', {"train": {"float8_ffn": True}}),
    ("optim.warmup_steps = 7", {"optim": {"warmup_steps": 7}}),
    ("optim.min_lr = 1.0", {"optim": {"min_lr": 1.0}}),
    ("optim.betas", {"optim": {"betas": [0.9, 1.0]}}),
    ("optim.weight_decay = -1.0", {"optim": {"weight_decay": -1.0}}),
    ("checkpoint.keep = 0", {"checkpoint": {"keep": 0}}),
    ("eval.every = -1", {"eval": {"every": -1}}),
]


@pytest.mark.parametrize(("message", "changes"), BAD)
def test_recipe_that_cannot_run(message: str, changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        make_run(tmp_path, **changes).check(1)
    assert message in str(error.value)


def test_metrics_rows(tmp_path: Path) -> None:
    with Metrics(tmp_path, make_run(tmp_path)) as metrics:
        metrics.write({"step": 1, "loss": math.nan})
    with (tmp_path / METRICS).open("a") as stream:
        stream.write('{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None}]
    with Metrics(tmp_path, make_run(tmp_path)) as metrics:
        metrics.write({"step": 2, "loss": 0.5})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}]


def test_schedule_by_hand() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.2, warmup_steps=4)
    got = [learning_rate(step, 12, config) for step in (0, 3, 4, 8, 12)]
    assert got == pytest.approx([0.25, 1.0, 1.0, 0.6, 0.2])


def test_decay_groups(tmp_path: Path) -> None:
    model = GatedDeltaNetLM(make_run(tmp_path).model)
    decayed, exempt = build_optimizer(model, OptimConfig(no_decay=("*.A_log",))).param_groups
    wanted = {id(p) for name, p in model.named_parameters() if name.endswith("A_log")}
    assert {id(p) for p in exempt["params"]} == wanted and len(wanted) == 2
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + 2 == len(list(model.parameters()))
    with pytest.raises(ConfigError, match="matches no parameter"):
        build_optimizer(model, OptimConfig(no_decay=("nothing*",)))
