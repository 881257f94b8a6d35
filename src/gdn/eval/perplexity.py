"""How well a model predicts text: held-out loss while training, bits per byte of a whole split after it."""

import itertools
import math

import torch
from torch import Tensor

from gdn.data.loader import sequential_windows
from gdn.data.shards import TokenShards
from gdn.model.lm import GatedDeltaNetLM
from gdn.ops.cross_entropy import IGNORED


def heldout_loss(
    model: GatedDeltaNetLM, shards: TokenShards, seq_len: int, micro_batch_size: int, windows: int
) -> dict[str, float]:
    """Mean nats a token over the split's first `windows` windows, each from an empty state, and the bits per byte they imply.

    The bytes are those of the whole split, taken in proportion to the tokens: exact over the whole split, close on a part.
    """
    nats, tokens = 0.0, 0
    device = model.model.embeddings.weight.device
    batches = sequential_windows(shards, seq_len, micro_batch_size)
    with torch.no_grad():
        for batch in itertools.islice(batches, -(-windows // micro_batch_size)):
            loss_sum = model(batch.input_ids.to(device), batch.labels.to(device)).loss_sum
            nats += loss_sum.item()
            tokens += int((batch.labels != IGNORED).sum())
    manifest = shards.manifest
    bytes_per_token = manifest.num_bytes(shards.split) / shards.num_tokens
    return {"heldout_loss": nats / tokens, "heldout_bits_per_byte": bits_per_byte(nats, tokens * bytes_per_token)}


def stream_nats(model: GatedDeltaNetLM, tokens: Tensor, rows: int, window: int) -> float:
    """Sum of -log p(token | all before it) over tokens [n] int64, the first left out, reading them as `rows` long streams.

    The text is cut into `rows` contiguous streams, read side by side in windows with the state carried on: each token but a
    stream's first is predicted from its stream's whole past.
    """
    targets = len(tokens) - 1
    length = -(-targets // rows)
    inputs = torch.zeros(rows * length, dtype=torch.int64)
    labels = torch.full((rows * length,), IGNORED, dtype=torch.int64)
    inputs[:targets], labels[:targets] = tokens[:-1], tokens[1:]
    device = model.model.embeddings.weight.device
    inputs, labels = inputs.view(rows, length).to(device), labels.view(rows, length).to(device)
    state, nats = model.new_state(rows), 0.0
    with torch.no_grad():
        for start in range(0, length, window):
            part = slice(start, start + window)
            nats += model(inputs[:, part], labels[:, part], state=state).loss_sum.item()
    return nats


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """A sum of nats over a text of so many UTF-8 bytes, in bits per byte."""
    return nats / math.log(2) / text_bytes
