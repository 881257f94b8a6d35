"""Data: tokenising beside `tokenizers`, the batch of a random step of a 15-billion-token manifest, and memory.

    python benchmarks/data.py tokenize SOURCE TOKENIZER     # in turn: encode_batch, our encoder, `gdn prepare` end to end
    python benchmarks/data.py batch [--tokens N ...]        # sparse files of 100M tokens each in a temporary folder
    python benchmarks/data.py duplicates MILLIONS ...       # memory and time of leaving out copies, at several sizes
    python benchmarks/data.py memory TOKENIZER [--engine E] # peak of `gdn prepare` with one document of 50 MB among others

With `--plain pieces` the first and the last take the same tokenizer with an NFC normalizer, for which no cut into words is
known, with `--plain whole` with a replacement that changes nothing, for which no cut at all is.
Prints JSON; what was measured on which machine stands in docs/log.md and benchmarks/results/data_cpu.json.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

SEQ_LEN, BATCH = 2048, 256


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    add = commands.add_parser("tokenize")
    add.add_argument("source", type=Path)
    add.add_argument("tokenizer", type=Path)
    add.add_argument("--documents", type=int, default=600, help="(default: %(default)s)")
    add.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    add.add_argument("--engines", default="tokenizers", help="end to end: some of tokenizers,gigatoken")
    add.add_argument("--plain", choices=("pieces", "whole"), help="the path of tokenizers that have no cut into words")
    add.set_defaults(run=tokenize)
    add = commands.add_parser("batch")
    add.add_argument("--tokens", type=float, nargs="+", default=[1e9, 15_032_385_537, 60e9], help="(default: %(default)s)")
    add.set_defaults(run=batch)
    add = commands.add_parser("duplicates")
    add.add_argument("millions", type=int, nargs="+", help="documents, several sizes")
    add.set_defaults(run=duplicates)
    add = commands.add_parser("memory")
    add.add_argument("tokenizer", type=Path)
    add.add_argument("--engine", default="tokenizers", help="(default: %(default)s)")
    add.add_argument("--plain", choices=("pieces",), help="the path of tokenizers that have no cut into words")
    add.set_defaults(run=memory)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if getattr(args, "plain", None):
            args.tokenizer = _without_words(args.tokenizer, Path(folder), args.plain)
        results = args.run(args)
    machine = {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version(), "numpy": np.__version__}
    machine |= {"tokenizers": tokenizers.__version__, "date": time.strftime("%Y-%m-%d")}
    print(json.dumps({"command": sys.argv[1], "machine": machine} | results, indent=1))


def _without_words(tokenizer: Path, folder: Path, path: str) -> Path:
    from gdn.data.cuts import piece_cut, word_cut
    from gdn.data.tokenizer import load_tokenizer

    load_tokenizer(tokenizer).save(folder)
    definition = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    unknown = {"type": "Replace", "pattern": {"String": "\x00"}, "content": "\x00"}
    definition["normalizer"]["normalizers"].append({"type": "NFC"} if path == "pieces" else unknown)
    assert word_cut(definition) is None and (piece_cut(definition) is None) == (path == "whole")
    (folder / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    return folder


def tokenize(args: argparse.Namespace) -> dict[str, Any]:
    """`encode_batch` by 100 and by 1,000 documents, our encoder in two processes, and `gdn prepare`: the same texts, in turn.

    End to end is zst files of those texts to a published folder, with two workers: decompression, JSON, hashes, writing and
    checksums. Start-up is what the same takes with two tasks of a word; it is taken off. Ratios are of each one's best round
    to the better encode_batch's best, and the median of those within a round.
    """
    from gdn.data.readers import read_documents
    from gdn.data.tokenizer import load_tokenizer

    texts = [document.text for _, document in zip(range(args.documents), read_documents(str(args.source)))]
    inner = tokenizers.Tokenizer.from_str(load_tokenizer(args.tokenizer).serialized.decode())
    inner.encode_special_tokens = True

    def plain(size: int) -> list[list[int]]:
        batches = (texts[i : i + size] for i in range(0, len(texts), size))
        return [encoding.ids for batch in batches for encoding in inner.encode_batch(batch, add_special_tokens=False)]

    with tempfile.TemporaryDirectory() as name, _pool(args.tokenizer) as pool:
        folder = Path(name)
        _write_zst(folder / "texts", texts, files=16)
        _write_zst(folder / "words", ["one", "two"], files=2)

        def ours() -> list[list[int]]:
            # What two workers of `gdn prepare` do: each takes half of the documents, and nothing is known to either before.
            pool.map(_forget, range(2), chunksize=1)
            parts = [texts[i : i + 50] for i in range(0, len(texts), 50)]
            return [np.frombuffer(ids, "<u2").tolist() for part in pool.map(_encode, parts, chunksize=1) for ids in part]

        def end_to_end(engine: str) -> float:
            startup = _prepare(folder / "words", args.tokenizer, folder / "out", engine, 4)
            return _prepare(folder / "texts", args.tokenizer, folder / "out", engine, tokens + len(texts)) - startup

        wanted = plain(100)
        assert ours() == wanted
        tokens = sum(map(len, wanted))
        calls: dict[str, Callable[[], float]] = {
            "encode_batch 100": lambda: _seconds(lambda: plain(100)),
            "encode_batch 1000": lambda: _seconds(lambda: plain(1000)),
            "gdn": lambda: _seconds(ours),
        }
        for engine in args.engines.split(","):
            calls[f"end to end, {engine}"] = lambda engine=engine: end_to_end(engine)  # type: ignore[misc]
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(args.rounds):
            for name, call in calls.items():
                seconds[name].append(call())
    both = ("encode_batch 100", "encode_batch 1000")
    better = min(both, key=lambda name: min(seconds[name]))
    by_round = {name: [base / own for base, own in zip(seconds[better], seconds[name])] for name in calls if name not in both}
    return {
        "documents": len(texts),
        "tokens": tokens,
        "load": os.getloadavg(),
        "seconds": seconds,
        "tokens_per_second, best": {name: tokens / min(times) for name, times in seconds.items()},
        f"ratio to {better}, best to best": {name: min(seconds[better]) / min(seconds[name]) for name in by_round},
        f"ratio to {better}, median of rounds": {name: statistics.median(values) for name, values in by_round.items()},
    }


@contextmanager
def _pool(tokenizer: Path) -> Iterator[Any]:
    with multiprocessing.get_context("spawn").Pool(2, _start, (str(tokenizer),)) as pool:
        pool.map(_encode, [["warm up " * 100]] * 2)
        yield pool


def _write_zst(folder: Path, texts: list[str], files: int) -> None:
    import zstandard

    folder.mkdir()
    for number in range(files):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts[number::files])
        rows += json.dumps({"text": " ", "left out": " " * (1 << 20)}) + "\n"  # so that each is a task, words too
        (folder / f"{number:02d}.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(rows.encode()))


def _prepare(source: Path, tokenizer: Path, out: Path, engine: Any, tokens: int) -> float:
    """Seconds of `prepare`, which must find so many tokens, each document's BOS with them."""
    from gdn.data.prepare import Options, prepare
    from gdn.data.sources import Source
    from gdn.data.tokenizer import load_tokenizer

    options = Options(workers=2, engine=engine, holdout=0.0)
    began = time.monotonic()
    manifest = prepare([Source(str(source))], load_tokenizer(tokenizer), out, options)
    seconds = time.monotonic() - began
    assert manifest.num_tokens("train") == tokens, (manifest.num_tokens("train"), tokens)
    shutil.rmtree(out)
    return seconds


def batch(args: argparse.Namespace) -> dict[str, Any]:
    """At several numbers of tokens, each in a process of its own: what a random step costs, and what memory it takes.

    Milliseconds of random steps, seconds to the first batch of a fresh loader, and memory that is not the files'.
    """
    results = {}
    for tokens in args.tokens:
        with tempfile.TemporaryDirectory() as name, multiprocessing.get_context("spawn").Pool(1) as pool:
            results[f"{tokens:.3g} tokens"] = pool.apply(_batch, (Path(name), int(tokens)))
    return results


def _batch(folder: Path, tokens: int) -> dict[str, Any]:
    from gdn.data.loader import Loader
    from gdn.data.shards import TokenShards

    _write_sparse(folder, tokens)
    rng, steps = random.Random(0), tokens // SEQ_LEN // BATCH
    results: dict[str, Any] = {}
    Loader(TokenShards.open(folder, "train"), SEQ_LEN, 16, BATCH, 42)  # what a process takes once is not the data's
    for reset in (False, True):
        before = _anonymous_mb()
        began = time.perf_counter()
        loader = Loader(TokenShards.open(folder, "train"), SEQ_LEN, 16, BATCH, 42, reset)
        next(loader.micro_batches(rng.randrange(steps)))
        first = time.perf_counter() - began
        chosen = [rng.randrange(steps) for _ in range(200)]
        calls: dict[str, Callable[[int], object]] = {
            "order.batch, 256 windows, ms": lambda step, loader=loader: loader.order.batch(step, BATCH),
            "micro batch of 16 windows read, ms": lambda step, loader=loader: loader.load(loader.windows(step)[:16]),
        }
        row: dict[str, Any] = {"windows": loader.order.num_windows, "first batch of a fresh loader, s": first}
        for name, call in calls.items():
            times = []
            for step in chosen:
                call(step)  # warm: its pages are mapped
                times.append(_seconds(lambda call=call, step=step: call(step)) * 1e3)
            row[name] = {"median": statistics.median(times), "max": max(times)}
        row["memory beside the mapped files, MB"] = _anonymous_mb() - before
        row["wait for a step of 256 windows behind 0.5 s of other work, ms"] = _waits(loader, rng.randrange(steps - 10))
        results["reset_at_documents" if reset else "plain"] = row
    return results


def _waits(loader: Any, first: int) -> dict[str, float]:
    """ms that a training loop waits for a step's batches, from the second step on, with 0.5 s of other work a step."""
    waits = []
    for step in range(first, first + 9):
        waits.append(_seconds(lambda step=step: list(loader.micro_batches(step))) * 1e3)
        time.sleep(0.5)
    return {"median": statistics.median(waits[1:]), "max": max(waits[1:])}


def duplicates(args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory and seconds of choosing what is kept of so many documents, a tenth of them copies, in tasks of 250,000.

    Each size in a process of its own, over rows as the tasks leave them. The peak is of memory that is not a file's, above
    what the process has before; a mapped file's pages are the system's to take back.
    """
    results = {}
    for millions in args.millions:
        with tempfile.TemporaryDirectory() as name, multiprocessing.get_context("spawn").Pool(1) as pool:
            results[f"{millions}M documents"] = pool.apply(_select, (Path(name), millions))
    return results


def _select(work: Path, millions: int) -> dict[str, float]:
    from gdn.data.assemble import ROWS, TASK, select, task_folder
    from gdn.data.sources import Stream

    rng, count = np.random.default_rng(0), 250_000
    for task in range(4 * millions):
        rows = np.zeros(count, dtype=ROWS)
        rows["start"] = np.arange(count) * 1000
        rows["hash"] = rng.integers(0, 1 << 64, (count, 2), dtype=np.uint64)
        rows["hash"][::10] = np.arange(0, count, 10)[:, None]  # the same in every task
        folder = task_folder(work, task)
        folder.mkdir(parents=True)
        rows.tofile(folder / "train.rows")
        split = {"tokens": 1000 * count, "documents": count, "sha256": ""}
        summary = {"splits": {"train": split}, "labels": [""], "documents": count}
        (folder / TASK).write_text(json.dumps(summary), encoding="utf-8")
    before, peak, done = _anonymous_mb(), [0.0], threading.Event()

    def sample() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], _anonymous_mb())

    thread = threading.Thread(target=sample)
    thread.start()
    seconds = _seconds(lambda: select([Stream(0, None, None, 0, [[]] * 4 * millions)], work, True))
    done.set()
    thread.join()
    added = peak[0] - before
    return {"memory, MB": added, "bytes a document": added / millions, "seconds": seconds}


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak of all processes together, sampled, while two workers prepare 200 MB with one document of 50 MB."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(1, 12))) for _ in range(50_000)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(8):
            with (folder / f"{number}.jsonl").open("w") as stream:
                size = 50_000_000 if number == 3 else 20_000
                for _ in range(1 if number == 3 else 1000):
                    stream.write(json.dumps({"text": " ".join(rng.choices(words, k=size // 7))}) + "\n")
        command = [sys.executable, "-m", "gdn", "prepare", str(folder), "--tokenizer", str(args.tokenizer), "--workers", "2"]
        command += ["--engine", args.engine]
        process = subprocess.Popen([*command, "--out", str(folder / "out")], start_new_session=True, stdout=subprocess.DEVNULL)
        peaks = [0, 0]

        def sample() -> None:
            while process.poll() is None:
                sizes = [_proportional_mb(pid) for pid in _session(process.pid)]
                peaks[0], peaks[1] = max(peaks[0], int(sum(sizes))), max(peaks[1], int(max(sizes, default=0)))
                time.sleep(0.05)

        thread = threading.Thread(target=sample)
        thread.start()
        process.wait()
        thread.join()
    return {"exit code": process.returncode, "peak of all processes, MB": peaks[0], "peak of one process, MB": peaks[1]}


def _write_sparse(folder: Path, tokens: int) -> None:
    from gdn.data.shards import FORMAT_VERSION, Manifest, ShardFile, SourceRecord, write_manifest

    shards = -(-tokens // 100_000_000)
    files = []
    for i in range(shards):
        size = tokens * (i + 1) // shards - tokens * i // shards
        with (folder / f"train-{i:05d}.bin").open("wb") as stream:
            stream.truncate(2 * size)
        starts = np.arange(0, size, 1100, dtype="<u8")
        starts.tofile(folder / f"train-{i:05d}.docs")
        files.append(ShardFile(f"train-{i:05d}.bin", "0" * 64, "0" * 64, size, len(starts), 4 * size, 0))
    source = (SourceRecord("sparse", "", None),)
    splits, counts = {"train": tuple(files)}, {"train": {"": tokens}}
    policy = ("before_each_document", 1, "none", None)
    manifest = Manifest(FORMAT_VERSION, "uint16", 32_000, "0" * 64, *policy, splits, counts, 0, 0, 0.0, {}, source, {})
    write_manifest(manifest, folder)


def _start(tokenizer: str) -> None:
    from gdn.data.encoding import DocumentEncoder
    from gdn.data.tokenizer import load_tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    global _encoder, _loaded
    _loaded = load_tokenizer(Path(tokenizer))
    _encoder = DocumentEncoder(_loaded, np.dtype("<u2"))


def _encode(texts: list[str]) -> list[bytes]:
    return _encoder.encode(texts)


def _forget(_: int) -> None:
    from gdn.data.encoding import DocumentEncoder

    global _encoder
    _encoder = DocumentEncoder(_loaded, np.dtype("<u2"))
    time.sleep(0.05)  # so that the other worker takes the other call


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _anonymous_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def _proportional_mb(pid: int) -> float:
    """A process's share of memory: what several map is divided among them."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1e3
    except OSError:
        pass
    return 0.0


def _session(leader: int) -> Iterator[int]:
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[3]) == leader:
                yield int(entry)
        except OSError:
            continue


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
