"""The tasks of `gdn eval` while training: the same numbers as afterwards on the checkpoint, and no other bits of training."""

from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from eval_testing import write_data
from train_testing import differences, go, make_run, saved

from gdn.errors import ConfigError
from gdn.eval import harness
from gdn.eval.scoring import Scorer
from gdn.model.load import load_model
from gdn.train.metrics import read_metrics


def test_scores_while_training_are_those_of_the_checkpoints(shards: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    asked = {"tasks": ["hellaswag", "copa"], "tasks_every": 2, "tasks_limit": 3, "tasks_data": str(data)}
    go(make_run(shards, train={"steps": 5}, eval=asked), tmp_path / "asked")
    go(make_run(shards, train={"steps": 5}), tmp_path / "plain")
    rows = {row["step"]: row for row in read_metrics(tmp_path / "asked") if "hellaswag/acc_norm" in row}
    assert list(rows) == [2, 4, 5]
    for step, row in rows.items():
        checkpoint = saved(tmp_path / "asked", step)
        tokenizer = harness.load_tokenizer(checkpoint)
        model = harness.adapt(Scorer(load_model(checkpoint)), tokenizer)
        for name in ("hellaswag", "copa"):
            result = harness.run_task(model, harness.Work(name, name), tokenizer, data=data, limit=3)
            assert result["documents"] == 3 and row[f"{name}/{result['metric']}"] == result["value"]
    assert differences(saved(tmp_path / "asked", 5), saved(tmp_path / "plain", 5)) == []


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"tasks_every": 2}, "expected eval.tasks and eval.tasks_data beside it"),
        ({"tasks_every": -1}, "expected 0 or more, and more than 0"),
        ({"tasks_limit": 0}, "expected 0 or more, and more than 0"),
    ],
)
def test_what_cannot_be_asked_is_named(shards: Path, asked: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_run(shards, eval=asked).check(1)
