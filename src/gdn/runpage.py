"""What a finished run's page shows beside its metrics: bits per byte and baselines, samples, the inside of the memory."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from gdn.data.shards import HELDOUT, TRAIN, TokenShards
from gdn.data.tokenizer import Tokenizer
from gdn.eval.baselines import bigram_bits, unigram_bits, xz_bits
from gdn.eval.memory import memory_use
from gdn.eval.perplexity import bits_per_byte, stream_nats
from gdn.generation.engine import generate
from gdn.generation.sampling import Sampling
from gdn.model.lm import GatedDeltaNetLM
from gdn.report.page import Baseline, HeadMemory, Sample, WriteStrengths

SAMPLE_TOKENS = 96
_STREAMS = 32
_MOST_HELDOUT, _MOST_COUNTED = 2_000_000, 32_000_000  # tokens that are read at most: xz and the bigram are no faster than that


def measure_heldout(
    model: GatedDeltaNetLM, tokenizer: Tokenizer, shards: Path, vocabulary: str
) -> tuple[float, list[Baseline], list[str]]:
    """(bits per byte of the model over the held-out split, read in order; baselines on the same bytes; its documents).

    Of a long split its first 2M tokens are taken, of the training text for the baselines its first 32M. `vocabulary` is the
    bigram's note.
    """
    train_split, heldout = TokenShards.open(shards, TRAIN), TokenShards.open(shards, HELDOUT)
    ids = heldout.read(0, min(heldout.num_tokens, _MOST_HELDOUT))
    train_ids = train_split.read(0, min(train_split.num_tokens, _MOST_COUNTED))
    starts = heldout.document_starts(0, len(ids))
    texts = [tokenizer.decode(part.tolist()) for part in np.split(ids, starts[1:])]
    text = "".join(texts).encode()
    size = heldout.manifest.num_bytes(HELDOUT) if len(ids) == heldout.num_tokens else len(text)
    rows = max(1, min(_STREAMS, len(ids) // 512))
    bits = bits_per_byte(stream_nats(model, torch.from_numpy(ids), rows, 256), size)
    vocab = tokenizer.vocab_size
    baselines = [
        Baseline("unigram", unigram_bits(train_ids, ids, vocab) / size, "token frequencies, the model's vocabulary"),
        Baseline("bigram", bigram_bits(train_ids, ids, vocab) / size, vocabulary),
        Baseline("xz -9e", xz_bits(text) / size, "compresses the held-out text by itself"),
    ]
    return bits, baselines, texts


def heldout_prompts(texts: Sequence[str]) -> list[str]:
    """A piece from within each of the two longest documents."""
    longest = sorted(texts, key=len, reverse=True)[:2]
    return [text[len(text) // 3 :][:160].rsplit(" ", 1)[0] for text in longest]


def write_samples(
    before: GatedDeltaNetLM, after: GatedDeltaNetLM, tokenizer: Tokenizer, prompts: Sequence[str]
) -> list[Sample]:
    """The same prompts continued by both models, from one seed."""
    sampling = Sampling(temperature=0.7, top_p=0.95, seed=0)
    before.eval()
    return [Sample(p, *(complete(model, tokenizer, p, sampling) for model in (before, after))) for p in prompts]


def complete(model: GatedDeltaNetLM, tokenizer: Tokenizer, prompt: str, sampling: Sampling) -> str:
    """The text that the model goes on with."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = [*bos, *tokenizer.encode(prompt)]
    # Decoded behind the prompt's last token: some tokenizers drop the space in front of a text's first word.
    shown = tokenizer.decode(ids[-1:])
    made = list(generate(model, ids, max_new_tokens=SAMPLE_TOKENS, sampling=sampling))
    return tokenizer.decode(ids[-1:] + made)[len(shown) :]


def memory_figures(model: GatedDeltaNetLM, shards: Path) -> tuple[list[HeadMemory], list[WriteStrengths]]:
    """Half-lives of all heads and write strengths of all layers over eight pieces of held-out text."""
    heldout = TokenShards.open(shards, HELDOUT)
    length = min(512, heldout.num_tokens // 8)
    ids = torch.from_numpy(heldout.read(0, 8 * length)).view(8, length)
    use = memory_use(model, ids.to(model.model.embeddings.weight.device))
    heads = [
        HeadMemory(i, head, (low.item(), middle.item(), high.item()))
        for i, layer in enumerate(use)
        for head, (low, middle, high) in enumerate(layer.half_life)
    ]
    strengths = [
        WriteStrengths(i, tuple(layer.edges.tolist()), tuple(int(count) for count in layer.counts))
        for i, layer in enumerate(use)
    ]
    return heads, strengths
