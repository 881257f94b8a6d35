"""The GPU half of `decode.py --device cuda`: steps of the whole model at several batches, prefill, and transformers' generate.

A step's floor is one read of the weights that it uses (all but the embedding table) and one read and one write of the rows'
states, at the rate of a 2 GiB copy on the same machine, bytes read and written counted. As a state is written once in some
tokens (`ops.pending`), a step may take less; `moved_ms` is what the bytes that it does move take at that rate. A step is the
captured token with its draw, and the wait for its ids, by the wall clock of tokens one after another. Levels of batch alternate
with nothing: the GPU is the benchmark's own.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from gdn.generation import engine
from gdn.generation.gpu_decoder import GPUDecoder, Stream
from gdn.generation.sampling import Sampling
from gdn.hf import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
from gdn.model.lm import GatedDeltaNetLM
from gdn.ops.pending import SLOTS

BATCHES = (1, 16, 64, 256)
PREFILL = (16, 2048)


def measure_gpu(model: GatedDeltaNetLM, tokens: int, repetitions: int, sampling: Sampling) -> dict[str, Any]:
    if not GPUDecoder.serves(model):
        raise SystemExit("the GPU's steps do not serve here: `gdn doctor` says why")
    copied = copy_rate()
    weights = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("model.embeddings"))
    decode = {}
    for rows in BATCHES:
        state = model.new_state(rows)
        recurrent, rest = state.recurrent.nbytes, state.conv.nbytes + state.position.nbytes
        # Half of the slots are read of a token, on average, and one is written.
        moved = recurrent * (1 + 1 / SLOTS) + 2 * rest + state.pending.nbytes * (1 / 2 + 1 / SLOTS)
        floors = [1e-9 * (weights + states) / copied for states in (2 * (recurrent + rest), moved)]
        row = step_ms(model, rows, tokens, repetitions, sampling)
        row |= {"floor_ms": round(floors[0], 4), "share_of_floor": round(floors[0] / row["ms"], 3)}
        decode[f"batch {rows}"] = row | {"moved_ms": round(floors[1], 4), "share_of_moved": round(floors[1] / row["ms"], 3)}
    return {
        "copy_tb_s": round(copied, 3),
        "decode": decode,
        "transformers generate, batch 1": {"ms": through_transformers(model, tokens)},
        "prefill": prefill(model, repetitions),
        "context": long_context(model, tokens, repetitions, sampling),
    }


def step_ms(model: GatedDeltaNetLM, rows: int, tokens: int, repetitions: int, sampling: Sampling) -> dict[str, Any]:
    """ms of a token of all rows by the wall clock; and of the captured work alone, without the wait."""
    state = model.new_state(rows)
    stream = Stream(GPUDecoder(model), state, sampling)
    logits = torch.randn(1, model.config.vocab_size, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    for row in range(rows):
        stream.start(row, logits, seed=row)
    everyone = list(range(rows))
    start = time.perf_counter()
    stream.next(everyone)
    capture = time.perf_counter() - start
    ms = in_a_row(stream, everyone, tokens, repetitions)
    assert stream._graph is not None
    replayed = events(stream._graph.replay, tokens)
    return {"ms": round(ms, 4), "graph_ms": round(replayed, 4), "capture_s": round(capture, 2)}


def in_a_row(stream: Stream, rows: list[int], tokens: int, repetitions: int) -> float:
    """ms of a token, each waited for and looked at by the host before the next one: the fastest repetition's mean."""

    def several() -> None:
        for _ in range(tokens):
            stream.next(rows)

    return min(seconds(several) for _ in range(repetitions)) * 1e3 / tokens


def prefill(model: GatedDeltaNetLM, repetitions: int) -> dict[str, float]:
    """Tokens a second of 16 prompts of 2,048 tokens, and the logits after the last."""
    ids = torch.randint(model.config.vocab_size, PREFILL, device="cuda")

    def run() -> object:
        with torch.no_grad():
            return model(ids, state=model.new_state(PREFILL[0]), last_only=True)

    run()
    ms = min(events(run, 3) for _ in range(repetitions))
    return {"ms": round(ms, 2), "tokens_per_second": round(1e3 * ids.numel() / ms)}


def long_context(model: GatedDeltaNetLM, tokens: int, repetitions: int, sampling: Sampling) -> dict[str, Any]:
    """ms of a token after 1,024 and after 1,048,576 others, read in chunks, in turn; memory that reading and decoding add."""
    result: dict[str, Any] = {}
    streams: dict[str, Stream] = {}
    for length in (1 << 10, 1 << 20):
        ids = torch.randint(model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
        state = model.new_state(1)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        read_s = seconds(lambda ids=ids, state=state: engine.prefill(model, ids, state))
        streams[str(length)] = stream = Stream(GPUDecoder(model), state, sampling)
        stream.start(0, torch.randn(1, model.config.vocab_size, device="cuda"), seed=0)
        stream.next([0])
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        result[str(length)] = {"read_s": round(read_s, 3), "peak_mib": round(peak, 1)}
    turns = [{length: in_a_row(stream, [0], tokens, 1) for length, stream in streams.items()} for _ in range(2 * repetitions)]
    for length, stream in streams.items():
        assert stream._graph is not None
        ms, replayed = min(turn[length] for turn in turns), events(stream._graph.replay, tokens)
        result[length] |= {"ms": round(ms, 4), "graph_ms": round(replayed, 4)}
    return result


def through_transformers(model: GatedDeltaNetLM, tokens: int) -> float:
    face = GatedDeltaNetForCausalLM(GatedDeltaNetConfig.from_model_config(model.config)).to("cuda").eval()
    face.load_state_dict(model.state_dict(), assign=True)
    ids = torch.tensor([[1, 2, 3]], device="cuda")
    run = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    face.generate(ids, max_new_tokens=2, **run)
    short, long = (seconds(lambda n=n: face.generate(ids, max_new_tokens=n, **run)) for n in (2, tokens + 2))
    return round(1e3 * (long - short) / tokens, 3)


def copy_rate() -> float:
    """TB/s of copying 2 GiB."""
    source = torch.empty(1 << 29, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / events(lambda: target.copy_(source), 20) / 1e9


def events(run: Callable[[], object], times: int) -> float:
    """ms of one of `times` runs, by the GPU's clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / times


def seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start
