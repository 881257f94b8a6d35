import errno
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from train_testing import differences, go, make_run, make_shards, partials, saved, tensors, with_model

import gdn.distributed.checkpoint as checkpoint
import gdn.files as files
import gdn.model.load as load
import gdn.train.loop as loop
from gdn import config as toml
from gdn.cli import main
from gdn.errors import CheckpointError, ConfigError, DataError, RunError
from gdn.train.metrics import read_metrics

GOLDEN = [5.697823, 5.591753, 5.317645, 4.822317, 4.473498]  # float32, on a CPU


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder) if "loss" in row]


def command(run: Any, tmp_path: Path) -> int:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(toml.dump(run), encoding="utf-8")
    return main(["--quiet", "train", str(recipe), "--out", str(tmp_path / "run"), "--device", "cpu"])


@pytest.mark.parametrize("reset", [False, True])
def test_accumulation_equals_one_large_batch(reset: bool, shards: Path, tmp_path: Path) -> None:
    for size in (1, 4):
        go(make_run(shards, data={"micro_batch_size": size, "reset_at_documents": reset}), tmp_path / str(size))
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "4"), rel=1e-5)
    one, four = tensors(saved(tmp_path / "1", 1)), tensors(saved(tmp_path / "4", 1))
    for name in one:
        if name.endswith(":exp_avg"):  # a tenth of the gradient; weights after Adam's eps of 1e-15 magnify rounding
            assert float((one[name] - four[name]).norm()) <= 1e-5 * float(four[name].norm()) + 1e-9, name


def test_loss_goes_down_and_follows_the_recorded_curve(shards: Path, tmp_path: Path) -> None:
    go(make_run(shards, train={"steps": 30}, checkpoint={"every": 30}), tmp_path / "run")
    curve = losses(tmp_path / "run")
    assert curve[-1] < 0.6 * curve[0]
    go(make_run(shards, train={"steps": 5}), tmp_path / "short")
    assert losses(tmp_path / "short") == pytest.approx(GOLDEN, abs=1e-4)


def test_folder_in_use_names_the_holder(shards: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from gdn.files import lock_folder\n"
        "with lock_folder(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=rf"in use by another process \(pid {process.pid}\)"):
            go(make_run(shards), tmp_path / "run")
        process.communicate("")
    assert not (tmp_path / "run" / "checkpoints").exists()
    go(make_run(shards), tmp_path / "run")


@pytest.mark.parametrize("how", ["truncated", "flipped"])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_bad_shard_is_refused_before_any_step(how: str, split: str, tmp_path: Path) -> None:
    path = make_shards(tmp_path / "data") / f"{split}-00000.bin"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if how == "flipped" else data[:-2])
    with pytest.raises(DataError, match=rf"{split}-00000.bin: .*altered"):
        go(make_run(tmp_path / "data", eval={"every": 2}), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_vocabulary_larger_than_the_models(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 100; expected at least \d+"):
        go(with_model(make_run(shards), vocab_size=100), tmp_path / "run")


def test_checkpoint_of_another_run_is_refused(shards: Path, tmp_path: Path) -> None:
    run = make_run(shards, train={"steps": 2})
    go(run, tmp_path / "run")
    before = tensors(saved(tmp_path / "run", 2))
    with pytest.raises(CheckpointError, match=r"num_heads = 2 there, 1 in the recipe"):
        go(with_model(run, num_heads=1), tmp_path / "run")
    others: list[tuple[str, dict[str, dict[str, Any]]]] = [
        (r"optim\.lr = 0\.01 there, 0\.02", {"optim": {"lr": 0.02}}),
        (r"train\.seed = 7 there, 8", {"train": {"steps": 2, "seed": 8}}),
        (r"train\.steps = 2 there, 6", {}),
        (r"data\.seq_len = 32 there, 16", {"train": {"steps": 2}, "data": {"seq_len": 16}}),
    ]
    for message, changes in others:
        with pytest.raises(CheckpointError, match=message):
            go(make_run(shards, **({"train": {"steps": 2}} | changes if "optim" in changes else changes)), tmp_path / "run")
    with pytest.raises(CheckpointError, match="other token shards"):
        go(make_run(make_shards(tmp_path / "other", seed=99), train={"steps": 2}), tmp_path / "run")
    assert all(torch.equal(before[name], value) for name, value in tensors(saved(tmp_path / "run", 2)).items())


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer/shard-00001-model-00001-of-00001.safetensors", "progress.json", "checksums.json"]
)
@pytest.mark.parametrize("how", ["altered", "missing"])
def test_bad_newest_checkpoint_is_named(name: str, how: str, shards: Path, tmp_path: Path) -> None:
    run = make_run(shards, train={"steps": 3})
    go(run, tmp_path / "run")
    path = saved(tmp_path / "run", 3) / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 64
    path.write_bytes(data) if how == "altered" else path.unlink()
    with pytest.raises(CheckpointError, match=rf"{name}: .*delete .*step-00000003"):
        go(run, tmp_path / "run")


def test_full_disk_keeps_the_checkpoint_before(
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A save in the background that fails is a warning, the last one ends the command; the checkpoint before stays."""
    run, saves = make_run(shards), [0]
    go(run, tmp_path / "whole")

    def full(*args: Any, **kwargs: Any) -> None:
        saves[0] += 1
        if saves[0] > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(load, "save_file", full)
        assert command(run, tmp_path) == 2
        error = capsys.readouterr().err
        assert error == "gdn: No space left on device\n"
        warned = [record.getMessage() for record in caplog.records if "was not saved" in record.getMessage()]
        assert [message.split(": ")[0] for message in warned] == [
            f"checkpoint of step {step} was not saved" for step in (4, 5, 6)
        ]
        with pytest.raises(OSError, match="No space left"):
            go(run, tmp_path / "run")
    assert partials(tmp_path / "run") == []
    assert differences(saved(tmp_path / "run", 3), saved(tmp_path / "whole", 3)) == []
    assert command(run, tmp_path) == 0
    assert differences(saved(tmp_path / "run", 6), saved(tmp_path / "whole", 6)) == []


def test_disk_that_refuses_safetensors_is_one_line(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """safetensors reports what the disk says as an error of its own kind: a limit on file sizes brings it about."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        code = command(make_run(shards), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("gdn: ") and error.count("\n") == 1 and "too large" in error
    assert partials(tmp_path / "run") == []


def test_pruning_and_leftovers(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step-00000001.partial-1").mkdir(parents=True)
    (tmp_path / "run" / "recipe.toml.partial-1").write_text("half")
    go(make_run(shards, checkpoint={"every": 2, "keep": 2}), tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    assert partials(tmp_path / "run") == []


def test_a_kill_while_pruning_leaves_no_part_of_a_checkpoint(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Deleting ends after a first file, as a kill or a disk would have it: what is left has no checkpoint's name."""
    deleted: list[Path] = []

    def cut(path: Path) -> None:
        deleted.append(path)
        next(path.glob("*.json")).unlink()
        raise OSError(errno.EIO, "Input/output error")

    run, saves = make_run(shards, checkpoint={"every": 2, "keep": 2}), tmp_path / "run" / "checkpoints"
    with monkeypatch.context() as patch:
        patch.setattr(files, "shutil", SimpleNamespace(rmtree=lambda path, **how: None if how else cut(path)))
        go(run, tmp_path / "run")
    assert [path.name.split(".")[0] for path in deleted] == ["step-00000002"] and deleted[0].exists()
    assert [path.name for path in checkpoint.checkpoints(saves)] == ["step-00000004", "step-00000006"]
    assert "no longer kept could not be deleted" in caplog.text and "not saved" not in caplog.text
    go(run, tmp_path / "run")
    assert partials(tmp_path / "run") == []


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{}"], ids=repr)
def test_checksums_that_are_none_verify_nothing(content: bytes, shards: Path, tmp_path: Path) -> None:
    go(make_run(shards), tmp_path / "run")
    (saved(tmp_path / "run", 6) / checkpoint.CHECKSUMS).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"(checksums\.json: missing or broken|not in checksums\.json).*delete"):
        checkpoint.verify(saved(tmp_path / "run", 6))


def test_float8_where_there_is_none_is_an_error(shards: Path, tmp_path: Path) -> None:
    """Before a step, by the switch's name: on a CPU, and where no block is one operator."""
    wanted = {"dtype": "bfloat16", "float8_ffn": True}
    run = make_run(shards, train=wanted)
    with pytest.raises(
        ConfigError, match=r"train\.float8_ffn = true: the model is on cpu; expected a GPU of compute capability 8\.9 or 9\.0"
    ):
        go(run, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"train\.float8_ffn = true: model\.use_gate"):
        go(with_model(run, use_gate=False), tmp_path / "run")


def test_a_run_goes_on_in_float8_only_if_it_began_so(shards: Path, tmp_path: Path) -> None:
    go(make_run(shards, train={"steps": 1, "dtype": "bfloat16"}, optim={"warmup_steps": 1}), tmp_path / "run")
    changed = make_run(shards, train={"steps": 1, "dtype": "bfloat16", "float8_ffn": True}, optim={"warmup_steps": 1})
    with pytest.raises(CheckpointError, match=r"train\.float8_ffn = False there, True in the recipe"):
        loop._newest(changed, tmp_path / "run" / loop.CHECKPOINTS)
