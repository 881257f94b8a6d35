"""Where a checkpoint comes from, as its model card tells it: recipe, summary of the data's manifest, what was measured."""

from pathlib import Path
from typing import Any, NamedTuple

from gdn.config import load, to_dict
from gdn.data.shards import Manifest, read_manifest
from gdn.errors import DataError
from gdn.model.load import read_json
from gdn.train.metrics import METRICS, read_metrics
from gdn.train.recipe import RunConfig
from gdn.train.state import PROGRESS, RECIPE

_MEASURED = ("loss", "heldout_loss", "heldout_bits_per_byte")


class Provenance(NamedTuple):
    """Plain dicts, empty where the folder says nothing."""

    recipe: dict[str, Any]
    data: dict[str, Any]
    results: dict[str, Any]


def provenance(checkpoint: Path, results: Path | None = None) -> Provenance:
    """What the checkpoint's folder and its run say of it; `results` is a JSON file of further measurements.

    Of the shards, if they are no longer where the recipe has them, only the fingerprint that the checkpoint holds is told.
    Raises ConfigError, DataError or CheckpointError for files that are there and broken.
    """
    further = {} if results is None else read_json(results, "a JSON object of what was measured")
    if not (checkpoint / RECIPE).exists():
        return Provenance({}, {}, further)
    run = load(RunConfig, checkpoint / RECIPE)
    progress = read_json(checkpoint / PROGRESS) if (checkpoint / PROGRESS).exists() else {}
    fingerprint = progress.pop("shards", None)
    data: dict[str, Any] = {} if fingerprint is None else {"fingerprint": fingerprint}
    shards = Path(run.data.shards)
    if shards.is_dir():
        manifest = read_manifest(shards)
        if fingerprint not in (None, manifest.fingerprint):
            raise DataError(f"{shards}: its fingerprint is {manifest.fingerprint}; the checkpoint was trained on {fingerprint}")
        data = summary(manifest)
    measured = progress | _last_rows(checkpoint.parent.parent, progress.get("step", 0))
    return Provenance(to_dict(run), data, measured | further)


def summary(manifest: Manifest) -> dict[str, Any]:
    """What a reader wants to know of the data, and the fingerprint by which it can be told from other data."""
    splits = {
        split: {
            "documents": manifest.num_documents(split),
            "bytes": manifest.num_bytes(split),
            "tokens": manifest.num_tokens(split),
        }
        for split in manifest.splits
    }
    return {
        "sources": ", ".join(source.name for source in manifest.sources),
        **splits,
        "vocabulary": manifest.vocab_size,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "fingerprint": manifest.fingerprint,
    }


def _last_rows(run: Path, step: int) -> dict[str, float]:
    """The newest value of each metric of interest up to `step`."""
    if not (run / METRICS).exists():
        return {}
    rows = [row for row in read_metrics(run) if row["step"] <= step]
    return {name: row[name] for name in _MEASURED for row in rows if row.get(name) is not None}
