"""Tasks in worker processes: order, asks, errors, deaths, and whom they outlive. What is measured is made up, as the scorer."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from gdn.errors import CheckpointError, ConfigError, DataError, RunError
from gdn.eval import workers
from gdn.eval.requests import Likelihood, Request


class FakeWork(NamedTuple):
    name: str
    task: str
    length: int | None = None


class FakeScorer:
    """Says in which process it answers; of what it was asked keeps first tokens. `during` is called with each progress."""

    def __init__(self, during: Callable[[Callable[[int], None]], None] = lambda progress: progress(1)) -> None:
        self.tokens_computed, self.tokens_asked = 100, 200
        self.asked: list[int] = []
        self.during = during

    def likelihoods(self, requests: Sequence[Request], progress: Callable[[int], None]) -> list[Likelihood]:
        self.asked.append(requests[0].context[0])
        self.during(progress)
        self.tokens_computed, self.tokens_asked = self.tokens_computed + 1, self.tokens_asked + len(requests)
        return [Likelihood(-float(os.getpid()), True) for _ in requests]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        eos_ids: set[int],
        stop: Callable[[list[int]], bool],
        progress: Callable[[int], None],
    ) -> list[list[int]]:
        return [[max_new_tokens, *eos_ids, os.getpid(), stop([1])] for _ in prompts]


def prepare(scorer: Any, progress: Callable[[int, int], None] | None) -> Callable[[FakeWork], dict[str, Any]]:
    """Measures by name: "killed" dies, "slow" takes long, "bad" and "bug" raise, "asks" asks; else what its process has."""

    def measure(work: FakeWork) -> dict[str, Any]:
        if work.task == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if work.task == "slow":
            time.sleep(1)
        if work.task == "forever":
            os.write(1, f"{work.name} begins\n".encode())
            time.sleep(600)
        if work.task == "bad":
            raise DataError(f"{work.name}: cut short")
        if work.task == "bug":
            raise ZeroDivisionError
        if work.task == "asks":
            scores = scorer.likelihoods([Request([7], [8])] * 3)
            texts = scorer.generate([[1], [2]], 5, {6}, isinstance_of_list)
            return {"scores": scores, "texts": texts, "counts": (scorer.tokens_computed, scorer.tokens_asked)}
        if work.task == "leaves":  # an ask behind it
            scorer._connection.send(("ask", ("likelihoods", [Request([9], [8])])))
            os.kill(os.getpid(), signal.SIGKILL)
        blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        given = [torch.get_num_threads(), os.environ["RAYON_NUM_THREADS"], os.environ["CUDA_VISIBLE_DEVICES"]]
        copied, when = "gdn.evaluate" in sys.modules, os.environ.get("GDN_TEST_WHEN")  # nothing here imports that
        own = {"pid": os.getpid(), "parent": os.getppid(), "copied": copied}
        return own | {"given": given, "deaf": blocked, "when": when}

    return measure


def isinstance_of_list(ids: list[int]) -> bool:
    return isinstance(ids, list)


def unprepared(scorer: Any, progress: Callable[[int, int], None] | None) -> Callable[[FakeWork], dict[str, Any]]:
    raise ConfigError("not its tokenizer")


def measure(
    names: str,
    into: dict[str, Any] | None = None,
    number: int = 2,
    prepare: Any = prepare,
    opener: Callable[[], Any] = FakeScorer,
) -> dict[str, Any]:
    """What comes of these tasks, in the order it came; also in `into`, for those that end in an error."""
    found: dict[str, Any] = {} if into is None else into
    works: Any = [FakeWork(name, name.rstrip("0123456789")) for name in names.split()]
    SHOWN.clear()
    with closing(workers.measure(works, number, opener, prepare, lambda *shown: SHOWN.append(shown))) as results:
        for work, result in results:
            found[work.name] = result
    return found


SHOWN: list[tuple[str, int, int]] = []


def begun() -> list[str]:
    return [name for name, _, total in SHOWN if total == 0]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_tasks_run_the_longest_first_in_processes_that_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(workers, "usable_cores", lambda physical: 7)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    found = measure("copa piqa slow hellaswag")
    assert set(found) == {"copa", "piqa", "slow", "hellaswag"} and len({result["pid"] for result in found.values()}) == 2
    assert os.getpid() not in {result["pid"] for result in found.values()}
    assert all(result["given"] == [1, "3", ""] and result["deaf"] for result in found.values())
    assert begun() == ["hellaswag", "slow", "piqa", "copa"] and next(iter(found)) == "hellaswag"
    assert "RAYON_NUM_THREADS" not in os.environ and os.environ["CUDA_VISIBLE_DEVICES"] == "3"


@pytest.mark.skipif(sys.platform != "linux", reason="spawned elsewhere")
def test_workers_are_copies_of_one_process_that_has_imported_the_harness() -> None:
    pytest.importorskip("lm_eval")
    results = [result for _ in range(2) for result in measure("copa piqa").values()]
    assert len({result["pid"] for result in results}) == 4 and all(result["copied"] for result in results)
    assert len({result["parent"] for result in results} - {os.getpid()}) == 1


def test_workers_have_the_environment_of_now_and_the_users_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")  # a list, by nesting, as OpenMP has it
    monkeypatch.setenv("RAYON_NUM_THREADS", "5")
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for when in ("first", "second"):
            monkeypatch.setenv("GDN_TEST_WHEN", when)
            result = measure("copa piqa")["copa"]
            assert result["given"] == [3, "5", ""] and result["when"] == when
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("how", ["a module of the same name", "a long name"])
def test_workers_begin_wherever_they_are_called_from(tmp_path: Path, how: str) -> None:
    """Importing nothing from the current folder, and where no socket's name would fit."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in [str(Path(__file__).parent), *sys.path] if path)}
    if how == "a long name":
        environment["TMPDIR"] = str(tmp_path / ("d" * 100))
        Path(environment["TMPDIR"]).mkdir()
    else:
        (tmp_path / "datasets.py").write_text("raise SystemExit('not this one')\n")
    script = "import test_eval_workers as t; print(sorted(t.measure('copa piqa')))"
    command = [sys.executable, "-P", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "['copa', 'piqa']\n", done.stderr


def test_the_model_is_opened_while_workers_begin() -> None:
    def opener() -> FakeScorer:
        until(lambda: len(begun()) == 2)
        return FakeScorer()

    assert set(measure("copa piqa", opener=opener)) == {"copa", "piqa"}


def test_a_model_that_cannot_be_opened_ends_the_workers() -> None:
    def opener() -> FakeScorer:
        raise CheckpointError("no weights")

    with pytest.raises(CheckpointError, match="no weights"):
        measure("forever1 forever2", opener=opener)
    until(lambda: not multiprocessing.active_children())


def test_asks_are_answered_here() -> None:
    """Errors and counts are those of a Scorer beside the task; what is asked is shown as it is done."""
    here = os.getpid()
    scores, texts = [Likelihood(-float(here), True)] * 3, [[5, 6, here, True]] * 2
    found = measure("asks1 asks2 asks3")
    assert found["asks1"]["scores"] == scores and found["asks2"]["texts"] == texts and ("asks3", 1, 3) in SHOWN
    assert {result["counts"] for result in found.values()} <= {(1, 3), (2, 6), (3, 9)}  # of its worker's tasks


def test_who_has_ended_a_task_gets_the_next_while_another_is_scored() -> None:
    def during(progress: Callable[[int], None]) -> None:
        until(lambda: progress(1) or "copa" in begun())

    found = measure("asks slow copa", opener=lambda: FakeScorer(during))  # "slow" ends when "asks" has asked
    assert set(found) == {"asks", "slow", "copa"}


def test_an_error_of_the_scorer_is_its_task_s() -> None:
    def fails(error: BaseException) -> Callable[[], FakeScorer]:
        def during(progress: Callable[[int], None]) -> None:
            raise error

        return lambda: FakeScorer(during)

    found: dict[str, Any] = {}
    with pytest.raises(CheckpointError, match=r"^logits are nan$"):
        measure("slow asks copa", found, opener=fails(CheckpointError("logits are nan")))
    assert set(found) >= {"slow"}
    with pytest.raises(RuntimeError, match=r"(?s)scorer.likelihoods.*self.during\(progress\).*KeyError: 'bug'"):
        measure("slow asks", opener=fails(KeyError("bug")))
    with pytest.raises(KeyboardInterrupt):
        measure("asks forever", opener=fails(KeyboardInterrupt()))
    assert not multiprocessing.active_children()


def test_what_is_not_wanted_any_more_is_not_scored() -> None:
    """Behind a task that has failed; but the worker that asked is free again, for what comes before that."""
    found: dict[str, Any] = {}
    scorer = FakeScorer(lambda progress: until(lambda: progress(1) or "copa1" in begun()))
    with pytest.raises(DataError, match=r"^bad: cut short$"):
        measure("copa1 copa2 bad asks1 asks2", found, 3, opener=lambda: scorer)
    assert set(found) >= {"copa1", "copa2"} and len(scorer.asked) <= 1


def test_asks_of_a_worker_that_died_are_let_go() -> None:
    """Two die: while the ask of one is scored, whose answer goes nowhere, and with an ask that is not scored any more."""

    def during(progress: Callable[[int], None]) -> None:
        until(lambda: len(multiprocessing.active_children()) == living)
        for _ in range(4):  # whatever they have said, and their end
            progress(1)

    for living, names in enumerate(("leaves1 leaves2", "asks leaves1 leaves2")):
        scorer = FakeScorer(during)
        found: dict[str, Any] = {}
        with pytest.raises(RunError, match=r"^leaves1: the worker process that measured it was killed"):
            measure(names, found, 2 + living, opener=lambda scorer=scorer: scorer)
        assert scorer.asked.count(9) <= 1 and len(found) == living


def test_the_longest_task_is_answered_first() -> None:
    """Its worker has most left to do behind that."""
    works: Any = [FakeWork("copa", "copa"), FakeWork("hellaswag", "hellaswag"), FakeWork("piqa", "piqa")]
    team, scorer = workers._Team(works, lambda *shown: None), FakeScorer()
    for number in range(3):
        ours, _ = multiprocessing.Pipe()
        team.running[ours], team.asks[ours] = number, ("likelihoods", [Request([number], [8])])
    while team.asks:
        team.answer(scorer)
    assert scorer.asked == [1, 2, 0]


def test_an_error_is_the_first_of_the_plan_and_what_is_before_it_is_done() -> None:
    """ "bug" fails at once, with "slow" begun and "copa" waiting; "piqa" behind it is not begun any more."""
    found: dict[str, Any] = {}
    with pytest.raises(RuntimeError, match="raise ZeroDivisionError"):
        measure("slow copa bug bad piqa", found)
    assert set(found) == {"slow", "copa"}
    with pytest.raises(ConfigError, match=r"^not its tokenizer$"):
        measure("copa piqa", prepare=unprepared)

    def no_model() -> FakeScorer:
        raise CheckpointError("weights: not a model")

    with pytest.raises(CheckpointError, match=r"^weights: not a model$"):
        measure("copa bad", opener=no_model)
    assert not multiprocessing.active_children()


def test_a_worker_that_is_killed_is_named_by_its_task() -> None:
    found: dict[str, Any] = {}
    with pytest.raises(
        RunError, match=r"^killed: the worker process that measured it was killed \(SIGKILL\); what is finished"
    ):
        measure("slow copa killed", found)
    assert set(found) == {"slow", "copa"}
    with pytest.raises(RunError, match=r"^killed1: the worker"):  # none is left
        measure("killed1 killed2 copa piqa", found)


def test_no_worker_outlives_its_parent() -> None:
    """Killed, it can stop nobody: they must see to it themselves. The pipe's end is seen when nobody holds it any more."""
    script = "import sys; sys.path[:0] = sys.argv[1:]; import test_eval_workers as t; t.measure('forever1 forever2')"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            assert {parent.stdout.readline() for _ in range(2)} == {"forever1 begins\n", "forever2 begins\n"}
        finally:
            parent.kill()
        parent.communicate(timeout=60)


def test_how_many_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    choose = workers.choose_workers
    for cores, numbers in ((3, [1, 1, 1, 1]), (16, [1, 1, 3, 4]), (64, [1, 1, 3, 8])):
        monkeypatch.setattr(workers, "usable_cores", lambda physical, cores=cores: cores)
        assert [choose(None, tasks, cuda, True) for tasks in (0, 1, 3, 15)] == numbers
    assert choose(None, 15, cuda, False) == choose(None, 15, cpu, True) == choose(1, 15, cuda, False) == 1
    assert choose(3, 15, cpu, True) == 3 and choose(99, 2, cuda, True) == 2
    with pytest.raises(ConfigError, match=r"^--workers = 0; expected at least 1$"):
        choose(0, 15, cpu, True)
    with pytest.raises(ConfigError, match=r"^--workers = 2 for a model of another architecture, which answers no other"):
        choose(2, 15, cuda, False)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert choose(None, 15, cuda, True) == choose(1, 15, cpu, False) == 1
    with pytest.raises(ConfigError, match=r"^--workers = 2 under torchrun, whose processes share each task"):
        choose(2, 15, cpu, True)
