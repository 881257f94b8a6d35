"""Several processes train what one does: FSDP2 and HSDP over gloo, any number of processes before and after a stop."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from test_kill import ENVIRONMENT, write_recipe
from train_testing import differences, go, make_run, saved, tensors, with_model

from gdn.errors import ConfigError
from gdn.model.load import load_model
from gdn.train.loop import open_data
from gdn.train.metrics import read_metrics
from gdn.train.recipe import RunConfig

PHASES: dict[str, list[dict[str, Any]]] = {  # of each run in several processes; all are made by one driver, which starts slowly
    "shards": [{"processes": 2}],
    "replicas": [{"processes": 2, "more": ["parallel.dp_replicate=2"]}],
    "packed": [{"processes": 2}],
    "tied": [{"processes": 2}],
    "elastic": [{"processes": 2, "stop": 1}, {"processes": 1, "stop": 2}, {"processes": 0, "stop": 3}, {"processes": 2}],
    "whole": [{"processes": 2}],
    "stopped": [{"processes": 2, "stop": 1}, {"processes": 2, "stop": 4}, {"processes": 2}],
    "full": [{"processes": 2, "full": 2}],
    "broken": [{"processes": 2, "broken": 3}],
    "altered": [{"processes": 2}],
}


def recipe_of(kind: str, shards: Path) -> RunConfig:
    if kind == "packed":
        return make_run(shards, data={"reset_at_documents": True, "micro_batch_size": 1}, eval={"every": 3})
    if kind == "elastic":  # a head of its own is less than two processes can share by rows
        return with_model(make_run(shards, eval={"every": 5}), num_heads=1)
    if kind in ("whole", "stopped"):
        return make_run(shards, train={"dtype": "bfloat16"}, checkpoint={"every": 100})
    if kind == "full":
        return make_run(shards, checkpoint={"every": 2})
    if kind == "broken":
        return make_run(shards)
    if kind == "altered":
        return make_run(shards, train={"steps": 2})
    run = make_run(shards, data={"micro_batch_size": 1}, eval={"every": 3})
    return with_model(run, tie_word_embeddings=True) if kind == "tied" else run


class Fleet(NamedTuple):
    """Where the runs are, each in a folder of its name, and what came of their processes."""

    folder: Path
    codes: dict[str, list[list[int]]]
    said: str


@pytest.fixture(scope="module")
def fleet(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    folder = tmp_path_factory.mktemp("fleet")
    jobs = []
    for kind, phases in PHASES.items():
        recipe = write_recipe(recipe_of(kind, shards), folder / f"{kind}.toml")
        jobs.append({"recipe": recipe, "out": str(folder / kind), "phases": phases})
    go(recipe_of("altered", shards), folder / "altered")
    weights = saved(folder / "altered", 2) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    driver = [sys.executable, str(Path(__file__).with_name("fleet.py")), json.dumps(jobs)]
    result = subprocess.run(driver, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return Fleet(folder, dict(zip(PHASES, json.loads(result.stdout))), result.stderr)


def test_processes_end_well_but_where_they_cannot(fleet: Fleet) -> None:
    for kind, codes in fleet.codes.items():
        assert {code for phase in codes for code in phase} == {2 if kind == "altered" else 0}, (kind, fleet.said)
    assert "Traceback" not in fleet.said


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
def test_two_processes_train_what_one_does(kind: str, fleet: Fleet, shards: Path, tmp_path: Path) -> None:
    run = recipe_of(kind, shards)
    go(run, tmp_path / "one")
    assert_same_training(fleet.folder / kind, tmp_path / "one", 6)
    assert load_model(saved(fleet.folder / kind, 6)).config == run.model  # a plain model folder all the same


def test_two_then_one_then_two_processes(fleet: Fleet, shards: Path, tmp_path: Path) -> None:
    """Also from shards to a plain process and back."""
    go(recipe_of("elastic", shards), tmp_path / "one")
    assert_same_training(fleet.folder / "elastic", tmp_path / "one", 6)
    assert [row["step"] for row in read_metrics(fleet.folder / "elastic") if "loss" in row] == [1, 2, 3, 4, 5, 6]


def checkpoints_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_stopped_processes_go_on_in_the_same_bits(fleet: Fleet) -> None:
    """SIGTERM reaches one process alone; both stop after the same step with one checkpoint, and exit with 0."""
    stopped, whole = fleet.folder / "stopped", fleet.folder / "whole"
    assert checkpoints_of(stopped) == [f"step-{step:08d}" for step in (2, 5, 6)]
    assert differences(saved(stopped, 6), saved(whole, 6)) == []


def test_full_disk_of_one_process_is_a_warning_and_training_goes_on(fleet: Fleet) -> None:
    assert checkpoints_of(fleet.folder / "full") == ["step-00000002", "step-00000006"]


def test_loss_that_is_not_finite_in_one_process_is_a_skipped_step_in_all(fleet: Fleet, shards: Path) -> None:
    """One micro batch a process: the third forward is the third step. The dump has the windows of both."""
    folder = fleet.folder / "broken"
    assert differences(saved(folder, 2), saved(folder, 3)) == [] != differences(saved(folder, 3), saved(folder, 4))
    written = json.loads((folder / "nonfinite-step-00000003.json").read_text())
    assert (written["step"], written["loss"]) == (3, "nan")
    assert written["windows"] == open_data(recipe_of("broken", shards))[0].windows(2).tolist()


def test_error_of_the_first_process_is_everyones(fleet: Fleet) -> None:
    assert fleet.said.count("altered since it was saved") == 2


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
