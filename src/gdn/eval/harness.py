"""lm-evaluation-harness's tasks, run one by one on our model or another's: its definitions and scoring, our data and errors.

What a task comes to is a plain dict (`run_task`), so that it can be kept, compared and drawn without this module.
"""

import difflib
import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import lm_eval.evaluator
import lm_eval.utils
import torch
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer, PreTrainedConfig

from gdn.errors import CheckpointError, ConfigError, DataError
from gdn.eval import local, ruler
from gdn.eval.adapter import HarnessModel, Progress, Rolling, Scoring
from gdn.eval.card import CARD, RULER_CARD, RULER_LENGTH, STREAM, mean_error, perplexity_error, row_of
from gdn.eval.scoring import Scorer
from gdn.model.lm import GatedDeltaNetLM
from gdn.model.load import CONFIG, is_ours

_TASKS = Path(lm_eval.__file__).parent / "tasks"
# Reading the harness's index of 13,000 tasks takes it half a minute of one core; these few are found without it.
_FOLDERS = {
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "lambada_openai": "lambada",
    "boolq": "super_glue/boolq",
    "copa": "super_glue/copa",
} | {name: name for name in ("hellaswag", "piqa", "winogrande", "sciq", "wikitext")}
_ROLLING: dict[str, Rolling] = {"wikitext": "one_bos", "wikitext_harness": "harness", "wikitext_stream": "stream"}
SEED = 1234  # the harness's own, of few-shot examples
_EXAMPLES = 2  # documents of which a result keeps some text, to be read
_MEANS = ("acc_norm", "acc", "exact_match")


class Work(NamedTuple):
    """One task to run: its name in results; the harness's name for it; for RULER the tokens of its prompts, and how filled."""

    name: str
    task: str
    length: int | None = None
    sizing: ruler.Sizing = "card"


def plan(names: Sequence[str], *, stream: bool = False, ruler_lengths: Sequence[int] = ()) -> list[Work]:
    """What to run for these names, "card" standing for the published table; ruler_lengths replace the card's RULER rows."""
    works = []
    for name in names:
        if name == "card":
            works += [Work(row.task, row.task.removesuffix("_harness")) for row in CARD]
            works += [Work(row.task, row.task, RULER_LENGTH) for row in RULER_CARD if not ruler_lengths]
            needles = [row.task for row in RULER_CARD]
        else:
            needles = [name] if name in ruler.TASKS else []
            if name in _ROLLING:
                works.append(Work(name, "wikitext"))
            elif not needles:
                works.append(Work(name, name))
            elif not ruler_lengths:
                works.append(Work(name, name, RULER_LENGTH))
        works += [Work(f"{task}@{length}", task, length, "exact") for task in needles for length in ruler_lengths]
    if stream:
        works.append(Work(STREAM.task, "wikitext"))
    return list(dict.fromkeys(works))


def expand(names: Sequence[str]) -> list[str]:
    """The names, with the harness's tags and groups replaced by the tasks in them; a name that is not known stays as it is.

    Raises ConfigError for a group that gives its tasks other settings: by their names they would be other tasks.
    """
    own = {"card", *_ROLLING, *ruler.TASKS}
    return list(
        dict.fromkeys(task for name in names for task in ([name] if name in own or task_folder(name) else _members(name)))
    )


def _members(name: str) -> list[str]:
    entry = _index().task_index.get(name)
    if entry is None or name in _index().all_subtasks:
        return [name]
    inside = sorted(entry.tags) if name in _index().all_tags else (entry.cfg or {}).get("task")
    settings = set(entry.cfg or {}) - {"group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag", "include"}
    if not isinstance(inside, list) or not all(isinstance(member, str) for member in inside) or settings:
        raise ConfigError(
            f"{name}: a group of lm-evaluation-harness that changes its tasks' settings; name tasks that are in it"
        )
    return [task for member in inside for task in _members(member)]


@cache
def _index() -> TaskManager:
    return TaskManager()


def load_tokenizer(folder: Path) -> Any:
    """The transformers tokenizer of a model folder: what the harness would use.

    Of our own the configuration says nothing about it: transformers need not know it, whose models take seconds to import.
    """
    try:
        ours = (folder / CONFIG).exists() and is_ours(folder)
        return AutoTokenizer.from_pretrained(folder, **({"config": PreTrainedConfig()} if ours else {}))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: no tokenizer that transformers can load: {str(error).splitlines()[0]}") from None


def adapt(scorer: Scoring, tokenizer: Any, max_length: int | None = None, progress: Progress | None = None) -> HarnessModel:
    """Our model as the harness's; max_length: None for the model's own, which is what HFLM reads."""
    length = max_length or scorer.config.max_position_embeddings
    return HarnessModel(scorer, tokenizer, max_length=length, progress=progress)


def other_model(folder: Path, tokenizer: Any, device: torch.device, dtype: torch.dtype, max_length: int | None) -> LM:
    """A model of another architecture, through transformers and the harness's own class."""
    import lm_eval.models  # noqa: F401  fills the harness's registry
    from lm_eval.models.huggingface import HFLM

    try:
        return HFLM(
            pretrained=str(folder), tokenizer=tokenizer, device=str(device), dtype=dtype, max_length=max_length, batch_size=8
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: transformers cannot load it: {str(error).splitlines()[0]}") from None


def open_folder(name: str) -> Path:
    """A model folder by its path; else by its id on the Hub, downloaded to its cache. CheckpointError if it is neither."""
    path = Path(name)
    if path.exists():
        return path
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise CheckpointError(f"{name}: no such folder, and no id of the Hub (owner/name)")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model"]))
    except (OSError, huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.LocalEntryNotFoundError) as error:
        raise CheckpointError(f"{name}: no such folder, and not to be had from the Hub: {str(error).splitlines()[0]}") from None


def run_task(
    model: LM,
    work: Work,
    tokenizer: Any,
    *,
    data: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """The harness's result of one task: metrics, standard errors, hashes, counts, one entry a document; ready for JSON.

    data: the folder of `gdn.eval.local`; None: the harness downloads what it needs. limit: of documents.
    Raises ConfigError for a task that is not known or cannot be set up so, DataError for its data, CheckpointError for nan.
    """
    datasets.disable_progress_bars()
    started = time.monotonic()
    documents, task = _load(work, tokenizer, data, limit, num_fewshot)
    loaded = time.monotonic()
    scorer = model.scorer if isinstance(model, HarnessModel) else None
    counts = (0, 0) if scorer is None else (scorer.tokens_computed, scorer.tokens_asked)
    # Its bootstrap takes minutes for a standard error that has a formula: ours are in `card`.
    with _set_for(work, model), _templates_compiled_once():
        results = lm_eval.evaluator.evaluate(
            model, {"tasks": {work.task: task}}, limit=limit, bootstrap_iters=0, log_samples=True
        )
    assert results is not None
    logged = results["samples"][work.task]
    rule = logged[0]["filter"] if logged else ""  # of ways to read an answer from a text the task's first; most have but one
    samples = [_sample(sample) for sample in logged if sample["filter"] == rule]
    metrics = _metrics(work, results["results"][work.task], samples, rule)
    if not samples or not metrics:
        raise DataError(f"{work.name}: the harness scored {len(samples)} documents and gave {len(metrics)} metrics")
    main = _main_metric(work.name, metrics)
    return {
        "metric": main,
        **metrics[main],
        "metrics": metrics,
        "documents": len(samples),
        "repeated": any(sample.get("repeated") for sample in samples),
        "left_out": 0 if documents is None else documents.left_out,
        "num_fewshot": num_fewshot or 0,
        "length": work.length,
        "sizing": work.sizing if work.length else None,
        "version": str(results["versions"].get(work.task)),
        "task_sha256": _task_hash(task),
        "prompts_sha256": _hash([[sample["document"], sample["prompt"]] for sample in samples]),
        "data_sha256": None if documents is None else documents.sha256,
        "tokens_computed": scorer.tokens_computed - counts[0] if scorer else None,
        "tokens_asked": scorer.tokens_asked - counts[1] if scorer else None,
        "seconds": time.monotonic() - started,
        "seconds_loading": loaded - started,
        "samples": samples,
    }


@contextmanager
def _set_for(work: Work, model: LM) -> Iterator[None]:
    """How texts are read in this task; another's scores must not depend on whether it was before."""
    if not isinstance(model, HarnessModel):
        yield
        return
    before = model.rolling, model.max_length
    model.rolling = _ROLLING.get(work.name, "harness")
    model.max_length = max(model.max_length, work.length or 0)  # longer prompts are asked for by name
    try:
        yield
    finally:
        model.rolling, model.max_length = before


@contextmanager
def _templates_compiled_once() -> Iterator[None]:
    """The harness compiles a task's templates anew for every document, which takes it four fifths of its own time."""
    templates = lm_eval.utils.env
    templates.from_string = lru_cache(1000)(templates.from_string)
    try:
        yield
    finally:
        del templates.from_string


def scores(model: GatedDeltaNetLM, tokenizer: Path, tasks: Sequence[str], data: Path, limit: int) -> dict[str, float]:
    """ "task/metric" to value of each task's first `limit` documents; errors as in `run_task`."""
    loaded = load_tokenizer(tokenizer)
    adapted = adapt(Scorer(model), loaded)
    results = {work.name: run_task(adapted, work, loaded, data=data, limit=limit) for work in plan(tasks)}
    return {f"{name}/{result['metric']}": result["value"] for name, result in results.items()}


def local_documents(work: Work, data: Path) -> local.Documents:
    """Of a task that is not RULER's; ConfigError for one that no such folder has, DataError for a file not as it should be."""
    if work.task not in local.SOURCES:
        known = ", ".join([*local.SOURCES, *ruler.TASKS])
        raise ConfigError(f"{work.name}: no local data; expected one of {known}, or no --data")
    return local.read_documents(work.task, data)


def _load(
    work: Work, tokenizer: Any, data: Path | None, limit: int | None, num_fewshot: int | None
) -> tuple[local.Documents | None, Any]:
    overrides: dict[str, Any] = {}
    documents = None
    if work.length is not None:
        if data is None:
            raise ConfigError(f"{work.name}: RULER's prompts are made from local essays; expected --data DIR")
        samples = min(ruler.SAMPLES, limit or ruler.SAMPLES)
        made = ruler.dataset(work.task, data, tokenizer, work.length, sizing=work.sizing, samples=samples)
        overrides["custom_dataset"] = lambda **metadata: made
        overrides["metric_list"] = [{"metric": str(work.length), "aggregation": "mean", "higher_is_better": True}]
    elif data is not None:
        documents = local_documents(work, data)
        if num_fewshot:
            raise ConfigError(f"{work.name}: few-shot examples come from training splits, which --data does not hold")
        overrides["custom_dataset"] = local.as_dataset(work.task, documents, limit)
        # Splits that are not there must not be asked for.
        split = local.SOURCES[work.task].split
        overrides |= {f"{name}_split": None for name in ("training", "validation", "test") if name != split}
    try:
        if work.length is not None:
            assert data is not None
            with ruler.sentence_tables(data):
                return documents, _build(work.task, overrides, num_fewshot)
        return documents, _build(work.task, overrides, num_fewshot)
    except (ConnectionError, OSError) as error:
        raise DataError(
            f"{work.name}: its data cannot be had: {str(error).splitlines()[0]}; --data DIR needs no network"
        ) from None


def task_folder(name: str) -> Path | None:
    """Where the harness defines one of the table's tasks; None: to be found in its index."""
    folder = "ruler" if name in ruler.TASKS else _FOLDERS.get(name)
    return None if folder is None else _TASKS / folder


def _build(name: str, overrides: dict[str, Any], num_fewshot: int | None) -> Any:
    folder = task_folder(name)
    manager = _index() if folder is None else TaskManager(include_defaults=False, include_path=str(folder))
    if name not in manager.all_subtasks:
        if name in manager.all_tasks:
            raise ConfigError(f"{name} is a group of lm-evaluation-harness's tasks; name the tasks that are in it")
        near = difflib.get_close_matches(name, manager.all_subtasks, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{name}: no task of lm-evaluation-harness {lm_eval.__version__}{hint}")
    # A group of one: the harness's way to change a task's settings and keep the rest of its definition.
    task = manager.load([{"group": "gdn", "task": [{"task": name, **overrides}]}])["tasks"][name]
    if num_fewshot is not None or task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=SEED)
    return task


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a document: hashes in place of its text, the model's answers, its metrics."""
    responses = [response[0] for response in sample["resps"]]
    kept = {
        "id": sample["doc_id"],
        "document": sample["doc_hash"][:16],
        "prompt": sample["prompt_hash"][:16],
        "target": sample["target"]
        if isinstance(sample["target"], list)
        else str(sample["target"])[:200],  # a page, of WikiText
        "responses": responses,
        "metrics": {name: sample[name] for name in sample["metrics"] if sample[name] != -1.0},
    }
    if sample["doc_id"] < _EXAMPLES:
        arguments = sample["arguments"]
        endings = [str(pair[1])[:200] if len(pair) > 1 and isinstance(pair[1], str) else "" for pair in arguments]
        kept |= {"prompt_end": str(arguments[0][0])[-400:], "endings": endings}
    if "outputs" in sample["doc"]:
        kept |= {"depth": ruler.depth(sample["doc"]), "repeated": bool(sample["doc"].get("repeated"))}
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=_plain))
    return plain


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def _metrics(
    work: Work, results: dict[str, Any], samples: list[dict[str, Any]], rule: str
) -> dict[str, dict[str, float | None]]:
    """Each metric's value as the harness aggregates it, and its standard error by formula where there is one."""
    metrics: dict[str, dict[str, float | None]] = {}
    for key, value in results.items():
        name, _, of = key.partition(",")
        if of != rule or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        values = [sample["metrics"][name] for sample in samples if name in sample["metrics"]]
        if not values:
            continue
        stderr: float | None = None
        if name in ("word_perplexity", "byte_perplexity"):
            stderr = perplexity_error([ll for ll, _ in values], [count for _, count in values])
        elif name == "perplexity":
            stderr = perplexity_error(values, [1.0] * len(values))
        elif all(isinstance(value, int | float) for value in values) and math.isclose(value, sum(values) / len(values)):
            stderr = mean_error(values)
        suffix = {"wikitext_harness": "_harness", "wikitext_stream": "_stream"}.get(work.name, "")
        label = f"ruler_exact_{name}" if work.length and work.sizing == "exact" else name + suffix
        metrics[label] = {"value": float(value), "stderr": stderr}
    return metrics


def _main_metric(name: str, metrics: dict[str, Any]) -> str:
    published = [metric for metric in metrics if row_of(name, metric).title != name]
    return (published or [metric for metric in _MEANS if metric in metrics] or list(metrics))[0]


def _task_hash(task: Any) -> str:
    """Of the definition as the harness has it, functions by their name; not of where the documents lie."""
    config = {key: value for key, value in task.dump_config().items() if key not in ("custom_dataset", "metadata")}
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=_name).encode()).hexdigest()


def _name(value: Any) -> str:
    return str(getattr(value, "__qualname__", value))


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
