"""A band of losses that recorded runs of one recipe on one text span: what a stranger's run is held against."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gdn.config import build, to_dict
from gdn.errors import ConfigError, DataError
from gdn.files import write_text
from gdn.report.page import BandPoint
from gdn.train.recipe import RunConfig

PARTS = 20  # stretches that a run is cut into
# Student's t, 95 % two-sided, of 1, 2, ... degrees of freedom: the fewer runs were recorded, the wider the band must be.
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
_NO_MATTER = {  # the band is over seeds; the others change rounding, or nothing
    *(("data", key) for key in ("shards", "micro_batch_size")),
    *(("train", key) for key in ("seed", "recompute", "cuda_graph")),
}


class Stretch(NamedTuple):
    """The mean of the logged losses of a twentieth of the run that ends at so many tokens."""

    tokens: float
    loss: float


def stretches(rows: Sequence[Mapping[str, Any]], steps: int) -> list[Stretch]:
    """The run's loss in `PARTS` stretches; DataError where one has no logged loss. Of a step logged twice the later counts."""
    logged = {row["step"]: row for row in rows if row.get("loss") is not None}
    found: list[list[Mapping[str, Any]]] = [[] for _ in range(PARTS)]
    for step in sorted(logged):
        found[min(PARTS - 1, (step - 1) * PARTS // steps)].append(logged[step])
    if not all(found):
        raise DataError(
            f"{sum(map(bool, found))} of {PARTS} stretches of the run have a logged loss; expected a smaller log.every"
        )
    return [Stretch(part[-1]["tokens"], statistics.fmean(row["loss"] for row in part)) for part in found]


def check_logging(run: RunConfig) -> None:
    """ConfigError for a run that logs too seldom to be held against a band."""
    steps = run.train.steps
    logged = {1, steps, *range(run.log.every, steps + 1, run.log.every)}  # as the training loop has it
    try:
        stretches([{"step": step, "loss": 0.0, "tokens": 0} for step in logged], steps)
    except DataError as error:
        raise ConfigError(f"log.every = {run.log.every}, train.steps = {steps}: {error}") from None


def objection(path: Path, run: RunConfig, data: str, record: bool) -> str:
    """A line that says why this run will get no verdict, or ""; ConfigError where it is to be recorded and cannot be."""
    if record:
        _of_this(path, run, data)
        return ""
    missing = read_band(path, run, data)[1]
    return missing and f"{missing}\n"


def record_band(path: Path, run: RunConfig, curve: Sequence[Stretch], data: str, origin: Mapping[str, Any]) -> None:
    """Add a run to the band in `path`, in place of one of its seed. ConfigError if the band is of another recipe or text."""
    content = _of_this(path, run, data)
    content = content or {"recipe": _deciding(run), "data": data, "tokens": [s.tokens for s in curve], "runs": []}
    entry = {"seed": run.train.seed, "loss": [round(s.loss, 5) for s in curve], **origin}
    content["runs"] = [*(known for known in content["runs"] if known["seed"] != run.train.seed), entry]
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_band(path: Path, run: RunConfig, data: str) -> tuple[list[tuple[float, float]] | None, str]:
    """(lowest and highest loss of each stretch, "") or (None, why there is none for this run).

    The interval in which another seed's loss is expected 19 times of 20: mean of the recorded runs, plus and minus t sqrt(1 +
    1/n) standard deviations between them; that of the stretch, or that over all stretches if it is more, because a few runs
    may agree by chance in one.
    """
    content = _read(path)
    how = "gdn reproduce --scaled --record-band with train.seed=42, again with train.seed=43 and another --out, makes one"
    if content is None:
        return None, f"No verdict: no band is recorded in {path}; {how}."
    if other := _differs(content, run, data):
        return None, f"No verdict: {path}: {other}."
    curves = [known["loss"] for known in content["runs"]]
    if len(curves) < 2:
        return None, f"No verdict: {path} holds one run, and a width needs two; {how}."
    means = [statistics.fmean(losses) for losses in zip(*curves)]
    deviations = [statistics.stdev(losses) for losses in zip(*curves)]
    pooled = math.sqrt(statistics.fmean(deviation**2 for deviation in deviations))
    n = len(curves)
    factor = _STUDENT[min(n - 1, len(_STUDENT)) - 1] * math.sqrt(1 + 1 / n)
    widths = [factor * max(deviation, pooled) for deviation in deviations]
    return [(mean - width, mean + width) for mean, width in zip(means, widths)], ""


def verdict_of(points: Sequence[BandPoint]) -> str:
    """Whether the run lies within the band, in a sentence."""
    outside = [point for point in points if not point.low <= point.loss <= point.high]
    if not outside:
        return f"Inside: the loss lies within the recorded band in all {len(points)} stretches of the run."
    first = outside[0]
    return (
        f"Outside: in {len(outside)} of {len(points)} stretches the loss leaves the recorded band, first at "
        f"{first.tokens:,.0f} tokens: {first.loss:.3f}, where {first.low:.3f} to {first.high:.3f} was expected."
    )


def _of_this(path: Path, run: RunConfig, data: str) -> dict[str, Any] | None:
    content = _read(path)
    if content is not None and (other := _differs(content, run, data)):
        raise ConfigError(f"{path}: {other}; delete it to record another")
    return content


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if {"recipe", "data", "runs"} <= content.keys():
            return content
    except (ValueError, AttributeError):
        pass
    raise DataError(f"{path}: no band of losses; expected what --record-band writes")


def _deciding(run: RunConfig) -> dict[str, Any]:
    """What of a recipe decides its losses."""
    whole = to_dict(run)
    sections = ("model", "data", "train", "optim")
    kept = {s: {k: v for k, v in whole[s].items() if (s, k) not in _NO_MATTER} for s in sections}
    plain: dict[str, Any] = json.loads(json.dumps(kept))
    return plain


def _differs(content: Mapping[str, Any], run: RunConfig, data: str) -> str:
    # Through the recipe's own reader: a setting that came later had its default when the band was recorded.
    recorded = content["recipe"] | {"name": "band", "data": content["recipe"]["data"] | {"shards": ""}}
    before = _deciding(build(RunConfig, recorded, "the recorded recipe"))
    for section, ours in _deciding(run).items():
        theirs = before[section]
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                return f"the band is of another recipe: {section}.{key} = {theirs.get(key)!r} there, {ours.get(key)!r} here"
    if content["data"] != data:
        return f"the band is of another text: its shards have the fingerprint {content['data'][:12]}..., these {data[:12]}..."
    return ""
