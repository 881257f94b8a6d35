"""Several processes train what one does: FSDP2 and HSDP over gloo, any number of processes before and after a stop."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_kill import ENVIRONMENT, write_recipe
from train_testing import differences, go, make_run, saved, tensors, with_model

from gdn.errors import ConfigError
from gdn.model.load import load_model
from gdn.train.metrics import read_metrics
from gdn.train.recipe import RunConfig


def fleet(run: RunConfig, out: Path, phases: Sequence[dict[str, Any]], code: int = 0) -> str:
    """Run the phases; every process must exit with `code`. Returns what they said on stderr."""
    recipe = write_recipe(run, out.with_suffix(".toml"))
    driver = [sys.executable, str(Path(__file__).with_name("fleet.py")), recipe, str(out), json.dumps(phases)]
    result = subprocess.run(driver, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert {each for codes in json.loads(result.stdout) for each in codes} == {code}, result.stderr
    return result.stderr


def curve(folder: Path, key: str = "loss") -> list[float]:
    return [row[key] for row in read_metrics(folder) if key in row]


def assert_same_training(one: Path, other: Path, steps: int) -> None:
    """Losses, norms and held-out losses to rounding; weights by their first moments, which Adam's eps does not magnify."""
    for key in ("loss", "grad_norm", "heldout_loss"):
        assert curve(one, key) == pytest.approx(curve(other, key), rel=1e-5)
    a, b = tensors(saved(one, steps)), tensors(saved(other, steps))
    assert a.keys() == b.keys()
    for name in a:
        if name.endswith(":exp_avg"):
            assert float((a[name] - b[name]).norm()) <= 1e-4 * float(b[name].norm()) + 1e-9, name


@pytest.mark.parametrize("kind", ["shards", "replicas", "packed", "tied"])
def test_two_processes_train_what_one_does(kind: str, shards: Path, tmp_path: Path) -> None:
    run = make_run(shards, data={"reset_at_documents": kind == "packed", "micro_batch_size": 1}, eval={"every": 3})
    if kind == "tied":
        run = with_model(run, tie_word_embeddings=True)
    go(run, tmp_path / "one")
    more = ["parallel.dp_replicate=2"] if kind == "replicas" else []
    fleet(run, tmp_path / "two", [{"processes": 2, "more": more}])
    assert_same_training(tmp_path / "two", tmp_path / "one", 6)
    assert load_model(saved(tmp_path / "two", 6)).config == run.model  # a plain model folder all the same


def test_two_then_one_then_two_processes(shards: Path, tmp_path: Path) -> None:
    """Also from shards to a plain process and back; a head of its own is less than two processes can share by rows."""
    run = with_model(make_run(shards, eval={"every": 5}), num_heads=1)
    go(run, tmp_path / "one")
    phases = [{"processes": 2, "stop": 1}, {"processes": 1, "stop": 2}, {"processes": 0, "stop": 3}, {"processes": 2}]
    fleet(run, tmp_path / "run", phases)
    assert_same_training(tmp_path / "run", tmp_path / "one", 6)
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_stopped_processes_go_on_in_the_same_bits(shards: Path, tmp_path: Path) -> None:
    """SIGTERM reaches one process alone; both stop after the same step with one checkpoint, and exit with 0."""
    run = make_run(shards, train={"dtype": "bfloat16"}, checkpoint={"every": 100, "keep": 100})
    fleet(run, tmp_path / "whole", [{"processes": 2}])
    fleet(run, tmp_path / "run", [{"processes": 2, "stop": 1}, {"processes": 2, "stop": 4}, {"processes": 2}])
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in (2, 5, 6)
    ]
    assert differences(saved(tmp_path / "run", 6), saved(tmp_path / "whole", 6)) == []


def test_error_of_the_first_process_is_everyones(shards: Path, tmp_path: Path) -> None:
    run = make_run(shards, train={"steps": 2})
    fleet(run, tmp_path / "run", [{"processes": 2}])
    weights = saved(tmp_path / "run", 2) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    said = fleet(run, tmp_path / "run", [{"processes": 2}], code=2)
    assert said.count("altered since it was saved") == 2 and "delete" in said and "Traceback" not in said


@pytest.mark.parametrize("gates", ["keep", "cast"])
def test_gates_stay_float32_in_the_forward_and_the_switch_casts_them(gates: str) -> None:
    """FSDP2's policy hands each parameter it manages to the forward in bf16: right for matrices, not for A_log and dt_bias."""
    script = str(Path(__file__).with_name("gates_seen.py"))
    result = subprocess.run([sys.executable, script, gates], env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    dtypes = json.loads(result.stdout)
    assert set(dtypes["resting"].values()) == set(dtypes["gradients"].values()) == {"torch.float32"}
    for name, dtype in dtypes["seen"].items():
        if name.endswith(("A_log", "dt_bias")):
            assert dtype == ("torch.float32" if gates == "keep" else "torch.bfloat16"), name
        elif name.endswith(("_proj.weight", "embeddings.weight", "lm_head.weight")):
            assert dtype == "torch.bfloat16", name  # gathered so: a plain float32 gather would move twice the bytes
        else:
            assert dtype == "torch.float32", name


def test_cast_gates_without_processes_is_an_error(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.cast_gates = true; expected processes of torchrun"):
        go(make_run(shards, parallel={"cast_gates": True}), tmp_path / "run")
