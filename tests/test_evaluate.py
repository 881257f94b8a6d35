"""`gdn eval` from the command line, on a tiny model and made-up documents: table, reuse, comparison, errors."""

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("lm_eval")

from eval_testing import make_documents, make_model, write_data, write_tokenizer

from gdn.cli import main
from gdn.eval import harness
from gdn.eval.scoring import Scorer
from gdn.evaluate import Options, _open, _Table
from gdn.model.load import save_model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tokenizer(tmp_path_factory.mktemp("model"), adds_bos=True)
    save_model(make_model(), folder)
    return folder


def run(*arguments: object) -> int:
    return main(["--quiet", "eval", *map(str, arguments)])


def test_the_command_lets_the_number_of_processes_be_chosen_and_warms_up_where_there_are_several(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []
    warmed: list[bool] = []

    def choose(workers: int | None, *_: object) -> int:
        asked.append(workers)  # twice in each run
        return 1 if len(asked) <= 2 else 2

    monkeypatch.setattr("gdn.eval.workers.choose_workers", choose)
    monkeypatch.setattr("gdn.eval.scoring.Scorer.warm_up", lambda self, texts: warmed.append(texts))
    for number in range(2):
        assert run(checkpoint, "--data", data, "--tasks", "copa,sciq", "--limit", 1, "--out", tmp_path / str(number)) == 0
    assert asked == [None] * 4 and warmed == [False]


def test_our_tokenizer_is_read_without_transformers_models(checkpoint: Path) -> None:
    """They take longer to import than all else of a worker; and nothing is said of a kind of model it does not know."""
    code = "import sys, pathlib; from gdn.eval.harness import load_tokenizer\n"
    code += "print(load_tokenizer(pathlib.Path(sys.argv[1]))('a b')['input_ids'], 'transformers.modeling_utils' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, checkpoint], check=True, capture_output=True, text=True)
    assert done.stdout == f"{harness.load_tokenizer(checkpoint)('a b')['input_ids']} False\n"
    assert "model of type" not in done.stderr


def test_the_table_is_printed_and_kept(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(checkpoint, "--data", data, "--tasks", "arc_easy,sciq,wikitext_harness", "--stream", "--out", out) == 0
    shown = capsys.readouterr().out
    for words in ("ARC-Easy", "0.4630", "SciQ", "1 rows of the file cannot be scored", "word_perplexity_stream", "27.60"):
        assert words in shown
    content = json.loads((out / "results.json").read_text())
    assert list(content["tasks"]) == ["arc_easy", "sciq", "wikitext_harness", "wikitext_stream"]
    assert content["lock"]["lm_eval"] == "0.4.13" and content["lock"]["dtype"] == "float32"
    assert "[0]" in content["lock"]["bos"]
    page = (out / "report.html").read_text()
    assert "ARC-Easy, right answer: 0" in page and "0.463" in page and "(1 unusable rows left out)" in page


def test_the_table_says_where_essays_are_repeated_and_what_the_needles_come_to(capsys: pytest.CaptureFixture[str]) -> None:
    result = {"metric": "ruler_exact_1048576", "value": 0.5, "stderr": 0.1, "documents": 2, "left_out": 0, "repeated": True}
    with _Table(Console(width=160)) as table:
        table.add("niah_single_2@1048576", result)
        table.add("ruler", result | {"metric": "2048", "value": 0.745, "repeated": False})
    shown = capsys.readouterr().out
    assert "niah_single_2@1048576: the essays are shorter than this and are repeated" in shown and shown.count("repeated") == 1
    assert "RULER, mean of the four" in shown and shown.count("0.7450") == 4 and "+0.0" in shown


def test_an_error_keeps_what_is_finished_and_the_next_call_reuses_it(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run(checkpoint, "--data", data, "--tasks", "copa,mmlu", "--out", out) == 2
    assert "mmlu: no local data" in capsys.readouterr().err
    measured = []
    original = harness.run_task
    monkeypatch.setattr(harness, "run_task", lambda *a, **k: measured.append((a[1].name, gc.isenabled())) or original(*a, **k))
    assert run(checkpoint, "--data", data, "--tasks", "copa,piqa", "--out", out) == 0
    assert measured == [("piqa", False)] and gc.isenabled()
    assert run(checkpoint, "--data", data, "--tasks", "copa,piqa", "--out", out, "--limit", 2) == 2
    assert "another lock (limit: none, 2)" in capsys.readouterr().err


def test_two_workers_write_what_one_process_does(
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    test_data: Callable[[str], Path],
) -> None:
    """Files and table of an error, which comes third, and of the next call, which uses what was kept; but for the seconds.

    Only this process has the model: asked here are the sequences of all tasks, scored and written ones.
    """
    (data / "ruler").symlink_to(test_data("data/ruler/PaulGrahamEssays.json").parent)
    tasks = "copa,wikitext_harness,sciq,hellaswag,niah_single_1"
    kept, pages = {}, {}
    asked: list[tuple[str, int]] = []
    for name in ("likelihoods", "generate"):
        own = getattr(Scorer, name)
        monkeypatch.setattr(
            Scorer,
            name,
            lambda self, items, *a, _own=own, _name=name, **k: asked.append((_name, len(items))) or _own(self, items, *a, **k),
        )
    counts = {}
    for workers in (1, 2):
        asked.clear()
        out = tmp_path / str(workers) / "eval"
        arguments = [checkpoint, "--data", data, "--limit", 3, "--out", out, "--workers", workers]
        assert run(*arguments, "--tasks", "copa,wikitext_harness,mmlu") == 2
        assert "gdn: mmlu: no local data; expected one of hellaswag, piqa" in capsys.readouterr().err
        before = json.loads((out / "results.json").read_text())["tasks"]
        assert list(before) == ["copa", "wikitext_harness"]
        assert run(*arguments, "--tasks", tasks, "--stream") == 0
        table = capsys.readouterr().out.split("task")[-1].splitlines()
        after = json.loads((out / "results.json").read_text())
        assert after["tasks"]["copa"] == before["copa"]
        for name, task in after["tasks"].items():
            assert task.pop("seconds") > task.pop("seconds_loading") >= 0, name
        samples = {path.name: path.read_bytes() for path in out.glob("samples_*")}
        kept[workers], pages[workers] = json.dumps(after), [table[:-1], (out / "report.html").read_bytes(), samples]
        counts[workers] = sorted(asked)
    assert kept[1] == kept[2] and pages[1] == pages[2]
    assert counts[1] == counts[2] and ("generate", 3) in counts[2] and len(counts[2]) == 6


def test_comparison_of_two_results(checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, options in (("a", []), ("b", ["--max-length", "48"])):
        assert run(checkpoint, "--data", data, "--tasks", "boolq", "--out", tmp_path / name, *options) == 0
    capsys.readouterr()
    assert run("compare", tmp_path / "a", tmp_path / "b") == 0
    shown = capsys.readouterr().out
    assert "boolq" in shown and "noise" in shown and "max_length: 96, 48" in shown
    assert run("compare", tmp_path / "a") == 2
    assert "takes two folders of results; got 1" in capsys.readouterr().err


def test_the_model_is_not_one_in_training(checkpoint: Path) -> None:
    """Of such a one a GPU captures no steps: texts take twice as long."""
    scorer = _open(checkpoint, Options(None), torch.device("cpu"), torch.float32, [])
    assert not any(parameter.requires_grad for parameter in scorer.model.parameters())


def test_workers_begin_before_the_harness_is_imported_where_they_are_likely(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gdn.eval.forkserver.begin", lambda: sys.exit("begun"))
    monkeypatch.setitem(sys.modules, "gdn.eval.harness", None)
    for likely in (["--workers", 2], ["--workers", 3, "--tasks", "copa,sciq"]):
        with pytest.raises(SystemExit, match="begun"):
            run(checkpoint, *likely)
    for unlikely in ([], ["--workers", 1], ["--workers", 2, "--tasks", "copa"]):
        with pytest.raises(ImportError, match=r"gdn\.eval\.harness"):
            run(checkpoint, *unlikely)
    with pytest.raises(ImportError, match=r"gdn\.eval\.harness"):
        run("owner/name", "--workers", 2)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ImportError, match=r"gdn\.eval\.harness"):
        run(checkpoint, "--workers", 2)


def test_what_cannot_be_evaluated_is_named(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, words in [
        (["nowhere", "--data", data], "nowhere: no such folder, and no id of the Hub"),
        ([checkpoint, checkpoint], "takes one checkpoint"),
        ([checkpoint, "--data", data, "--limit", 0], "--limit = 0; expected at least 1"),
        ([checkpoint, "--data", data, "--ruler-lengths", "4k"], "--ruler-lengths 4k: expected numbers"),
        ([checkpoint, "--tasks", "niah_single_1"], "expected --data DIR"),
    ]:
        assert run(*arguments, "--out", tmp_path / "out") == 2
        assert words in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(checkpoint) == 2
    assert capsys.readouterr().err == 'gdn: eval takes its tasks from lm-evaluation-harness: pip install "gdn[eval]"\n'


def test_a_model_of_another_architecture_goes_through_the_harness(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = write_tokenizer(tmp_path / "gpt2", adds_bos=False)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=400, n_embd=16, n_layer=1, n_head=2, n_positions=96, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    arguments = [folder, "--data", data, "--tasks", "copa,sciq", "--out", tmp_path / "out"]
    assert run(*arguments, "--workers", 2) == 2
    assert "gdn: --workers = 2 for a model of another architecture" in capsys.readouterr().err
    assert run(*arguments) == 0
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["lock"]["backend"] == "transformers" and content["tasks"]["copa"]["documents"] == 4


@pytest.mark.soak
def test_two_processes_measure_what_one_does(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    arguments = ["eval", str(checkpoint), "--data", str(data), "--tasks", "hellaswag,wikitext,boolq", "--device", "cpu"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29713", "-m", "gdn"]
    for name, start in (("one", [sys.executable, "-m", "gdn"]), ("two", launcher)):
        run_ = subprocess.run([*start, *arguments, "--out", str(tmp_path / name)], capture_output=True, text=True, timeout=300)
        assert run_.returncode == 0, run_.stderr
    one, two = (json.loads((tmp_path / name / "results.json").read_text())["tasks"] for name in ("one", "two"))
    for task, result in one.items():
        assert two[task]["value"] == pytest.approx(result["value"], rel=1e-6)
        assert two[task]["documents"] == result["documents"]


def test_download_makes_a_folder_that_evaluates(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub and nltk's server are stand-ins: the tests have no network."""
    import datasets
    import nltk

    asked = []

    def load_dataset(path: str, name: str | None, split: str) -> list[dict[str, object]]:
        asked.append((path, name, split))
        if path == "baber/paul_graham_essays":
            return [{"text": "One."}, {"text": "Two."}]
        rows = make_documents()["boolq" if name == "boolq" else {"Rowan/hellaswag": "hellaswag"}.get(path, by_name(path, name))]
        return [{**row, "label": int(bool(row.pop("answer")))} if name == "boolq" else row for row in rows]

    def by_name(path: str, name: str | None) -> str:
        known = {"ARC-Easy": "arc_easy", "ARC-Challenge": "arc_challenge", "winogrande_xl": "winogrande", "copa": "copa"}
        return known.get(name or "", {"wikitext_document_level": "wikitext"}.get(path.split("/")[1], path.split("/")[1]))

    def fetch(name: str, download_dir: str, quiet: bool) -> bool:
        tables = Path(download_dir) / "tokenizers" / name / "english"
        tables.mkdir(parents=True)
        for file in ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt"):
            (tables / file).write_text("")
        return True

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(nltk, "download", fetch)
    folder = tmp_path / "made"
    assert run("--download", folder) == 0
    assert len(asked) == 11 and ("aps/super_glue", "boolq", "validation") in asked
    assert run("--download", folder) == 0 and len(asked) == 11  # what is there is kept
    for name, where in (("made", folder), ("local", data)):
        assert run(checkpoint, "--data", where, "--tasks", "boolq,sciq,hellaswag", "--out", tmp_path / name / "out") == 0
    made, local = (json.loads((tmp_path / name / "out" / "results.json").read_text())["tasks"] for name in ("made", "local"))
    assert {name: task["value"] for name, task in made.items()} == {name: task["value"] for name, task in local.items()}
    assert json.loads((folder / "ruler" / "PaulGrahamEssays.json").read_text()) == {"text": "One. Two."}
    capsys.readouterr()

    def refuse(*arguments: object, **options: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    assert run("--download", tmp_path / "other") == 2
    assert "Rowan/hellaswag: cannot be downloaded: no route" in capsys.readouterr().err
    assert run(checkpoint, "--download", folder) == 2


def test_an_id_of_the_hub(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub is a stand-in: the tests have no network."""
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: asked.append(name) or str(checkpoint))
    monkeypatch.chdir(tmp_path)
    assert run("someone/small", "--data", data, "--tasks", "copa") == 0
    assert asked == ["someone/small"] and (tmp_path / "eval" / "small" / "results.json").exists()

    def refuse(name: str, **options: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    assert run("someone/other", "--data", data) == 2
    assert "someone/other: no such folder, and not to be had from the Hub: no route" in capsys.readouterr().err
