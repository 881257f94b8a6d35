"""Token shards of given texts, through `prepare`, for whoever needs some to train on or to read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gdn.data.prepare import Options, prepare
from gdn.data.shards import Manifest
from gdn.data.sources import Source
from gdn.data.tokenizer import Tokenizer


def write_rows(path: Path, texts: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def prepare_texts(
    train: Sequence[str], tokenizer: Tokenizer, out: Path, heldout: Sequence[str] = (), **options: Any
) -> Manifest:
    """Shards of the texts in this order, one row each, in `out`; a small `task_bytes` makes several shards."""
    source = out.with_name(f"{out.name}-text")
    write_rows(source / "train" / "rows.jsonl", train)
    if heldout:
        write_rows(source / "validation" / "rows.jsonl", heldout)
    return prepare([Source(str(source))], tokenizer, out, Options(**{"holdout": 0.0} | options))
