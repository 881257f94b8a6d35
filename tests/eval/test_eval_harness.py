"""The harness's tasks on our model: the scores of its own HFLM for the same ids, whatever the batches; texts and tables."""

import json
import math
import pickle
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

import jinja2
import lm_eval.models  # its own registry first, so that HFLM is found
from eval_testing import make_documents, make_model, sentence, write_data, write_tokenizer
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from gdn.errors import CheckpointError, ConfigError, DataError
from gdn.eval import harness
from gdn.eval.adapter import HarnessModel
from gdn.eval.local import SOURCES, Rows, read_documents
from gdn.eval.scoring import Scorer
from gdn.hf import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
from gdn.model.lm import GatedDeltaNetLM


@pytest.fixture(scope="module")
def model() -> GatedDeltaNetLM:
    return make_model()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=[True, False], ids=["adds-bos", "no-bos"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"), adds_bos=request.param)
    return harness.load_tokenizer(folder)


def test_a_longer_task_leaves_the_model_as_it_was(model: GatedDeltaNetLM, data: Path, tokenizer: Any) -> None:
    """Scores must not depend on the tasks before: with workers it is not known which those are."""
    lm = harness.adapt(Scorer(model), tokenizer)
    with harness._set_for(harness.Work("niah_single_1@4096", "niah_single_1", 4096, "exact"), lm):
        assert lm.max_length == 4096
    harness.run_task(lm, harness.Work("wikitext_stream", "wikitext"), tokenizer, data=data)
    assert lm.max_length == 96 and lm.rolling == "one_bos"


def as_hflm(model: GatedDeltaNetLM, tokenizer: Any, batch_size: int = 3) -> HFLM:
    config = GatedDeltaNetConfig(**model.config.to_json())
    theirs = GatedDeltaNetForCausalLM(config)
    theirs.load_state_dict(model.state_dict())
    return HFLM(pretrained=theirs.eval(), tokenizer=tokenizer, batch_size=batch_size, device="cpu", backend="causal")


class Recorder:
    """Keeps what a task asks of a model and what it answers."""

    def __init__(self, lm: Any) -> None:
        self.lm = lm
        self.answers: list[Any] = []
        self.asked: list[Instance] = []
        for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(lm, name, self.wrap(getattr(lm, name)))

    def wrap(self, method: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        def call(requests: list[Instance], **options: Any) -> list[Any]:
            answers = method(requests, **options)
            self.asked += requests
            self.answers += answers
            return answers

        return call


def same(got: list[Any], wanted: list[Any], tolerance: float, relative: float = 2.5e-7) -> None:
    """Within the tolerance, or within two of the last places that HFLM's float32 sums have, where that is more."""
    assert len(got) == len(wanted) > 0
    for mine, theirs in zip(got, wanted):
        if isinstance(theirs, str):
            assert mine == theirs
        elif isinstance(theirs, tuple):
            assert mine[0] == pytest.approx(theirs[0], abs=tolerance, rel=relative) and mine[1] == theirs[1]
        else:
            assert mine == pytest.approx(theirs, abs=tolerance, rel=relative)


def test_every_task_of_the_table_equals_hflm(model: GatedDeltaNetLM, tokenizer: Any, data: Path) -> None:
    theirs = as_hflm(model, tokenizer)
    for work in harness.plan(["card"]):
        if work.length is not None or work.name == "wikitext":
            continue
        ours, hflm = Recorder(harness.adapt(Scorer(model), tokenizer)), Recorder(theirs)
        mine = harness.run_task(ours.lm, work, tokenizer, data=data)
        other = harness.run_task(theirs, work, tokenizer, data=data)
        same(ours.answers, hflm.answers, 1e-4)
        assert {name: metric["value"] for name, metric in mine["metrics"].items()} == pytest.approx(
            {name: metric["value"] for name, metric in other["metrics"].items()}, rel=1e-5
        )
        assert (mine["task_sha256"], mine["prompts_sha256"]) == (other["task_sha256"], other["prompts_sha256"])
        del theirs.loglikelihood, theirs.loglikelihood_rolling, theirs.generate_until


def instance(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)  # type: ignore[arg-type]


def test_odd_pairs_and_long_ones_equal_hflm(model: GatedDeltaNetLM, tokenizer: Any) -> None:
    pairs = [
        ("", "the river"),
        ("", "<|endoftext|>the river"),
        ("old boats ", "past"),
        ("<|endoftext|>old boats", " past"),
        ("the river carries old boats " * 30, "past nine quiet towns"),  # longer than the model reads
        ("the river carries old boats " * 30, "past"),
        ("the river\n\n", "past é and 😀"),
    ]
    requests = [instance("loglikelihood", *pair) for pair in pairs]
    ours, theirs = harness.adapt(Scorer(model), tokenizer), as_hflm(model, tokenizer, 1)
    same(ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True), 1e-4)


def test_generated_texts_equal_hflm(model: GatedDeltaNetLM, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = harness.adapt(Scorer(model), tokenizer), as_hflm(model, tokenizer, 2)
    prompts = ["the river", "old boats past nine", "winter " * 90, "a"]
    free = {"do_sample": False, "temperature": 0.0, "max_gen_toks": 24, "until": []}
    requests = [instance("generate_until", prompt, free) for prompt in prompts]
    texts = ours.generate_until(requests)
    assert texts == theirs.generate_until(requests, disable_tqdm=True)
    assert len(set(texts)) > 1
    stop = texts[0][len(texts[0]) // 3 :][:2]  # something that is written, and not at once
    cut = [instance("generate_until", prompt, free | {"until": [stop]}) for prompt in prompts]
    got = ours.generate_until(cut)
    assert got == theirs.generate_until(cut, disable_tqdm=True)
    assert got[0] == texts[0].split(stop)[0] != texts[0]
    own = Scorer.generate
    monkeypatch.setattr(Scorer, "generate", lambda self, *asked: own(self, *pickle.loads(pickle.dumps(asked))))
    assert ours.generate_until(cut) == got  # a scorer in another process, where all is sent


def test_sampling_is_refused(model: GatedDeltaNetLM, tokenizer: Any) -> None:
    ours = harness.adapt(Scorer(model), tokenizer)
    for settings in ({"do_sample": True, "temperature": 1.0}, {"num_beams": 4}):
        with pytest.raises(ConfigError, match="greedy"):
            ours.generate_until([instance("generate_until", "the", settings)])


def test_scores_do_not_depend_on_budget_or_order(model: GatedDeltaNetLM, tokenizer: Any, data: Path) -> None:
    recorder = Recorder(harness.adapt(Scorer(model), tokenizer))
    for name in ("hellaswag", "winogrande", "boolq"):
        harness.run_task(recorder.lm, harness.Work(name, name), tokenizer, data=data)
    for budget in (1024, 8192, 65536):
        order = list(range(len(recorder.asked)))
        random.Random(budget).shuffle(order)
        again = harness.adapt(Scorer(model, token_budget=budget), tokenizer)
        got = again.loglikelihood([recorder.asked[i] for i in order])
        same(got, [recorder.answers[i] for i in order], 1e-5)


def word_perplexity(model: GatedDeltaNetLM, tokenizer: Any, pages: list[str], *, twice: bool) -> float:
    """By hand: each page behind a BOS, in windows of the model's length, each from an empty state; the last reaches back."""
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    T, bos = model.config.max_position_embeddings, tokenizer.bos_token_id
    total, words = 0.0, 0
    for page in pages:
        ids = [bos, *tokenizer(wikitext_detokenizer({"page": page}), add_special_tokens=False)["input_ids"]]
        if twice:  # the tokenizer's and the harness's
            ids = [bos, *ids]
        for start in range(0, len(ids) - 1, T):
            end = min(start + T, len(ids) - 1)
            window = torch.tensor(ids[max(0, end - T) : end + 1])
            with torch.no_grad():
                log_p = model(window[None, :-1]).logits[0].double().log_softmax(-1)
            total += log_p.gather(1, window[1:, None])[start - end :].sum().item()
        words += len(re.split(r"\s+", page))
    return math.exp(-total / words)


def test_word_perplexity_is_that_of_thirty_lines(model: GatedDeltaNetLM, tokenizer: Any, data: Path) -> None:
    pages = [row["page"] for row in make_documents()["wikitext"]]
    ours = harness.adapt(Scorer(model), tokenizer)
    results = {
        work.name: harness.run_task(ours, work, tokenizer, data=data)
        for work in harness.plan(["card"], stream=True)
        if work.task == "wikitext"
    }
    one = word_perplexity(model, tokenizer, pages, twice=False)
    adds_bos = len(tokenizer("")["input_ids"]) == 1
    two = word_perplexity(model, tokenizer, pages, twice=adds_bos)
    assert (abs(one / two - 1) > 1e-4) == adds_bos
    assert results["wikitext"]["value"] == pytest.approx(one, rel=1e-5)
    assert results["wikitext_harness"]["value"] == pytest.approx(two, rel=1e-5)
    assert results["wikitext"]["metric"] == "word_perplexity"
    assert results["wikitext_harness"]["metric"] == "word_perplexity_harness"
    whole = make_model(max_length=1 << 20)
    stream = word_perplexity(whole, tokenizer, pages, twice=False)
    assert results["wikitext_stream"]["value"] == pytest.approx(stream, rel=1e-5)
    assert abs(stream / one - 1) > 1e-4


def test_templates_are_compiled_once(
    model: GatedDeltaNetLM, tokenizer: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    plain = jinja2.Environment.compile
    monkeypatch.setattr(jinja2.Environment, "compile", lambda self, source: compiled.append(source) or plain(self, source))
    result = harness.run_task(harness.adapt(Scorer(model), tokenizer), harness.Work("sciq", "sciq"), tokenizer, data=data)
    assert result["documents"] == 3 and compiled
    assert max(Counter(compiled).values()) == 2  # once as the task is set up, once for all documents
    assert "from_string" not in vars(lm_eval.utils.env)  # as it was before


def test_documents_are_prepared_once() -> None:
    prepared = []

    def prepare() -> Callable[[dict[str, Any]], dict[str, Any]]:
        return lambda row: prepared.append(row["page"]) or {"page": row["page"].upper()}  # type: ignore[func-returns-value]

    rows = Rows([{"page": "a", "n": 1}, {"page": "b", "n": 2}])
    first, again = rows.map(prepare()), rows.map(prepare())  # two functions of one code, as the harness makes them
    assert first == [{"page": "A", "n": 1}, {"page": "B", "n": 2}] and again is first
    assert rows.map(lambda row: {"n": 0}) == [{"page": "a", "n": 0}, {"page": "b", "n": 0}]
    assert prepared == ["a", "b"] and rows[0] == {"page": "a", "n": 1}


def test_what_a_result_tells(model: GatedDeltaNetLM, tokenizer: Any, data: Path) -> None:
    ours = harness.adapt(Scorer(model), tokenizer)
    result = harness.run_task(ours, harness.Work("sciq", "sciq"), tokenizer, data=data)
    assert (result["documents"], result["left_out"], result["metric"]) == (3, 1, "acc")
    right = [sample["metrics"]["acc"] for sample in result["samples"]]
    assert result["value"] == pytest.approx(sum(right) / 3)
    assert result["tokens_computed"] < result["tokens_asked"]
    limited = harness.run_task(ours, harness.Work("sciq", "sciq"), tokenizer, data=data, limit=2)
    assert [s["responses"] for s in limited["samples"]] == [s["responses"] for s in result["samples"][:2]]


@pytest.fixture
def local_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks with a training split, a tag, and groups, in place of the harness's own index."""
    for split, count in (("train", 5), ("test", 4)):
        rows = [{"q": sentence(n + count), "choices": [sentence(n), sentence(n + 3, 4)], "gold": n % 2} for n in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{train: {tmp_path}/train.jsonl, test: {tmp_path}/test.jsonl}}}}
output_type: multiple_choice
training_split: train
test_split: test
fewshot_split: train
doc_to_text: "Question: {{{{q}}}}\\nAnswer:"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{{metric: acc}}]
tag: [both]
task: """
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(task + name + "\n")
    (tmp_path / "group.yaml").write_text("group: all\ntask: [both, two]\naggregate_metric_list: [{metric: acc}]\n")
    (tmp_path / "other.yaml").write_text("group: shots\ntask: [{task: one, num_fewshot: 3}]\n")
    (tmp_path / "set.yaml").write_text("group: settings\ntask: [one]\nnum_fewshot: 3\n")
    index = harness.TaskManager(include_defaults=False, include_path=str(tmp_path))
    monkeypatch.setattr(harness, "_index", lambda: index)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("local_tasks")
def test_few_examples_in_front_are_the_harness_own(model: GatedDeltaNetLM, tokenizer: Any) -> None:
    ours, theirs = Recorder(harness.adapt(Scorer(model), tokenizer, 400)), as_hflm(model, tokenizer)
    theirs._max_length = 400
    hflm = Recorder(theirs)
    work = harness.Work("one", "one")
    mine = harness.run_task(ours.lm, work, tokenizer, num_fewshot=2)
    other = harness.run_task(hflm.lm, work, tokenizer, num_fewshot=2)
    same(ours.answers, hflm.answers, 1e-4)
    assert [request.args for request in ours.asked] == [request.args for request in hflm.asked]
    assert all(request.args[0].count("Question:") == 3 for request in ours.asked) and mine["num_fewshot"] == 2
    assert mine["prompts_sha256"] == other["prompts_sha256"]
    plain = harness.run_task(ours.lm, work, tokenizer)
    assert plain["num_fewshot"] == 0 and plain["prompts_sha256"] != mine["prompts_sha256"]
    assert ours.asked[-1].args[0].count("Question:") == 1


@pytest.mark.usefixtures("local_tasks")
def test_tags_and_groups_are_the_tasks_in_them() -> None:
    assert harness.expand(["card", "both", "niah_single_1", "nowhere"]) == ["card", "one", "two", "niah_single_1", "nowhere"]
    assert harness.expand(["two", "all"]) == ["two", "one"]
    for name in ("shots", "settings"):
        with pytest.raises(ConfigError, match=f"{name}: a group .* that changes its tasks' settings"):
            harness.expand([name])


def test_names_of_the_table_need_no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_index", lambda: pytest.fail("half a minute of processor time"))
    names = ["card", "copa", "wikitext_stream", "niah_multiquery"]
    assert harness.expand(names) == names


def test_bad_setups_are_named(model: GatedDeltaNetLM, tokenizer: Any, data: Path) -> None:
    ours = harness.adapt(Scorer(model), tokenizer)
    with pytest.raises(ConfigError, match=r"mmlu: no local data; expected one of hellaswag.*niah_single_1"):
        harness.run_task(ours, harness.Work("mmlu", "mmlu"), tokenizer, data=data)
    with pytest.raises(ConfigError, match="few-shot"):
        harness.run_task(ours, harness.Work("copa", "copa"), tokenizer, data=data, num_fewshot=2)
    with pytest.raises(ConfigError, match=r"\d+ ids, the model embeddings for 300"):
        HarnessModel(Scorer(make_model(300)), tokenizer, max_length=96)
    broken = make_model()
    with torch.no_grad():
        broken.lm_head.weight[5] = float("inf")
    with pytest.raises(CheckpointError, match="nan"):
        harness.run_task(harness.adapt(Scorer(broken), tokenizer), harness.Work("copa", "copa"), tokenizer, data=data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: None, r"no such file; expected the documents of piqa, 1,838 rows"),
        (lambda text: text[:-30], r"piqa_val.jsonl:\d: not JSON.*cut short"),
        (lambda text: "".join(text.splitlines(True)[:-1]), r"3 rows; expected 4: cut short"),
        (lambda text: text.replace('"sol1"', '"solution"', 1), r"piqa_val.jsonl:1: column 'sol1' is missing; expected str"),
        (lambda text: text.replace('"label": 1', '"label": "1"', 1), r":2: column 'label' is str '1'; expected int"),
        (lambda text: "[1]\n" + text, r":1: a list; expected a JSON object"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, change: Callable[[str], str | None], message: str) -> None:
    folder = write_data(tmp_path)
    file = folder / "eval" / SOURCES["piqa"].file
    text = change(file.read_text())
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    with pytest.raises(DataError, match=message):
        read_documents("piqa", folder)


@pytest.mark.soak
def test_the_first_fifty_documents_of_each_real_task_equal_hflm(test_data: Callable[[str], Path]) -> None:
    data = test_data("data/eval").parent
    real = harness.load_tokenizer(test_data("data/tokenizer/mistral-7b-v0.1"))
    model = make_model(32000, 2048)
    works = [work for work in harness.plan(["card"]) if work.name != "wikitext"]
    for work in works:
        theirs = as_hflm(model, real, 4)
        ours, hflm = Recorder(harness.adapt(Scorer(model), real)), Recorder(theirs)
        limit = 5 if work.length or work.task == "wikitext" else 50
        harness.run_task(ours.lm, work, real, data=data, limit=limit)
        harness.run_task(theirs, work, real, data=data, limit=limit)
        # A page is a sum over thousands of tokens, in float32 there.
        same(ours.answers, hflm.answers, 1e-4, 1e-6 if work.task == "wikitext" else 2.5e-7)


def test_processes_share_the_work(model: GatedDeltaNetLM, tokenizer: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, one after the other: each computes its share alone, contexts undivided, and together they have all."""
    recorder = Recorder(harness.adapt(Scorer(model), tokenizer))
    harness.run_task(recorder.lm, harness.Work("hellaswag", "hellaswag"), tokenizer, data=data)
    shares: dict[int, Any] = {}
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    computed, answers = [], []
    for turn in (0, 1, 0):  # the first rank cannot be answered before the second has run
        scorer = Scorer(model)

        def gather(parts: list[Any], mine: Any, turn: int = turn) -> None:
            shares[turn] = mine
            parts[:] = [shares.get(0, []), shares.get(1, [])]

        monkeypatch.setattr(torch.distributed, "get_rank", lambda turn=turn: turn)
        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
        try:
            answers = harness.adapt(scorer, tokenizer).loglikelihood(recorder.asked)
        except AttributeError:  # the other share is not there yet
            assert turn == 0 and len(shares) == 1
        computed.append(scorer.tokens_computed)
    same(answers, recorder.answers, 1e-5)
    assert sum(computed[1:]) == recorder.lm.scorer.tokens_computed
    assert min(computed) > 0.3 * sum(computed[1:])


def test_what_names_stand_for() -> None:
    names = [work.name for work in harness.plan(["card"])]
    assert len(names) == 15 and names[0] == "hellaswag" and names[-1] == "niah_multikey_1"
    assert {work.length for work in harness.plan(["card"])} == {None, 2048}
    exact = harness.plan(["card", "niah_multivalue"], ruler_lengths=[4096, 8192])
    assert len(exact) == 11 + 5 * 2
    assert exact[-1] == harness.Work("niah_multivalue@8192", "niah_multivalue", 8192, "exact")
    assert harness.plan(["niah_multikey_3"]) == [harness.Work("niah_multikey_3", "niah_multikey_3", 2048, "card")]
    assert harness.plan(["copa", "copa"], stream=True)[-1] == harness.Work("wikitext_stream", "wikitext")
    assert len(harness.plan(["copa", "copa"])) == 1


def test_of_several_filters_the_first_counts(model: GatedDeltaNetLM, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task whose answers are read in two ways has each document twice in the harness's log."""
    sample = {"doc_id": 7, "doc": {}, "target": "a", "arguments": [("q", {})], "resps": [["a"]], "metrics": ["exact_match"]}
    sample |= {"doc_hash": "d", "prompt_hash": "p"}
    logged = [sample | {"filter": rule, "exact_match": score} for rule, score in (("strict", 0.0), ("loose", 1.0))]
    numbers = {"exact_match,strict": 0.0, "exact_match,loose": 1.0, "alias": "x"}
    answer = {"samples": {"x": logged}, "results": {"x": numbers}, "versions": {"x": 3}}
    monkeypatch.setattr(harness, "_load", lambda *arguments: (None, None))
    monkeypatch.setattr(harness, "_task_hash", lambda task: "")
    monkeypatch.setattr(harness.lm_eval.evaluator, "evaluate", lambda *arguments, **options: answer)
    result = harness.run_task(harness.adapt(Scorer(model), tokenizer), harness.Work("x", "x"), tokenizer)
    assert (result["documents"], result["metric"], result["value"], result["version"]) == (1, "exact_match", 0.0, "3")
