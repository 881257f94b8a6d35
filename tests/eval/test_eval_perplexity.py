"""Losses over whole texts against one plain forward pass and a log-softmax."""

import math

import pytest
import torch

pytest.importorskip("datatrove")

from shards_testing import prepare_texts
from torch import Tensor

from gdn.data.shards import HELDOUT, TokenShards
from gdn.data.tokenizer import train_bpe
from gdn.eval.memory import memory_use
from gdn.eval.perplexity import bits_per_byte, heldout_loss, stream_nats
from gdn.model.config import ModelConfig
from gdn.model.lm import GatedDeltaNetLM, init_weights

VOCAB = 270


def make(**config: bool) -> GatedDeltaNetLM:
    sizes = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 8, "expand_v": 1.0}
    model = GatedDeltaNetLM(ModelConfig(**sizes | config))  # type: ignore[arg-type]
    init_weights(model, "mamba", seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.double().eval()


def plain_nats(model: GatedDeltaNetLM, tokens: Tensor) -> float:
    """-log p of all tokens but the first, in one forward from an empty state."""
    with torch.no_grad():
        logits = model(tokens[None, :-1]).logits[0]
    return float(-logits.log_softmax(-1).gather(1, tokens[1:, None]).sum())


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(VOCAB, (102,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("window", [1, 7, 64, 101, 1000])
def test_one_stream_is_one_forward_whatever_the_window(tokens: Tensor, window: int) -> None:
    model = make()
    assert stream_nats(model, tokens, 1, window) == pytest.approx(plain_nats(model, tokens), rel=1e-6)


@pytest.mark.parametrize("rows", [2, 3, 5, 40])
def test_many_streams_are_the_sum_over_the_pieces(tokens: Tensor, rows: int) -> None:
    model = make()
    length = math.ceil((len(tokens) - 1) / rows)
    pieces = [tokens[start : start + length + 1] for start in range(0, len(tokens) - 1, length)]
    assert sum(len(piece) - 1 for piece in pieces) == len(tokens) - 1
    wanted = sum(plain_nats(model, piece) for piece in pieces)
    assert stream_nats(model, tokens, rows, 8) == pytest.approx(wanted, rel=1e-6)
    assert abs(wanted - plain_nats(model, tokens)) > 1e-3  # a cut costs context, and the test can see it


def test_bits_per_byte() -> None:
    assert bits_per_byte(80 * math.log(2), 40) == pytest.approx(2.0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    folder = tmp_path_factory.mktemp("eval") / "shards"
    texts = ["naïve words 😀, one and two and three. " * 2, "and another one of them, two words long"]
    prepare_texts(["train"], train_bpe(texts, VOCAB), folder, texts)
    return TokenShards.open(folder, HELDOUT)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 100])
def test_heldout_loss_over_the_whole_split(shards: TokenShards, micro_batch_size: int) -> None:
    model, T = make(), 10
    ids = torch.from_numpy(shards.read(0, shards.num_tokens))
    windows = [ids[start : start + T + 1] for start in range(0, len(ids) - 1, T)]
    assert len(windows[-1]) < T + 1  # the last is a part of one
    wanted = sum(plain_nats(model, window) for window in windows)
    got = heldout_loss(model, shards, T, micro_batch_size, 1000)
    assert got["heldout_loss"] == pytest.approx(wanted / (len(ids) - 1), rel=1e-6)
    num_bytes = shards.manifest.num_bytes(HELDOUT) * (len(ids) - 1) / len(ids)  # the first token is no target
    assert got["heldout_bits_per_byte"] == pytest.approx(wanted / math.log(2) / num_bytes, rel=1e-6)


def test_heldout_loss_of_the_first_windows(shards: TokenShards) -> None:
    model, T = make(), 10
    ids = torch.from_numpy(shards.read(0, shards.num_tokens))
    wanted = sum(plain_nats(model, ids[start : start + T + 1]) for start in (0, T, 2 * T, 3 * T)) / (4 * T)
    assert heldout_loss(model, shards, T, 2, 4)["heldout_loss"] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("negative", [False, True])
def test_memory_use_is_that_of_the_gates(tokens: Tensor, negative: bool) -> None:
    model = make(allow_neg_eigval=negative)
    ids = tokens[:100].view(2, 50)
    uses = memory_use(model, ids, bins=8)
    assert len(uses) == 2
    with torch.no_grad():
        x = model.model.embeddings(ids)
        for layer, use in zip(model.model.layers, uses):
            normed = layer.attn_norm(x)
            a, b = layer.attn.a_proj(normed), layer.attn.b_proj(normed)
            kept = torch.exp(-layer.attn.A_log.exp() * torch.log1p(torch.exp(a + layer.attn.dt_bias)))  # of the state, a token
            beta = torch.sigmoid(b) * (2 if negative else 1)
            half_life = (math.log(0.5) / kept.log()).flatten(0, 1)  # kept ** half_life == 1 / 2
            ordered = half_life.sort(dim=0).values
            for column, share in enumerate((0.1, 0.5, 0.9)):
                place = share * 99
                low, high = ordered[int(place)], ordered[int(place) + 1]
                torch.testing.assert_close(
                    use.half_life[:, column].double(), low + (high - low) * (place % 1), rtol=1e-4, atol=0
                )
            top = 2.0 if negative else 1.0
            wanted = [int(((beta >= top * i / 8) & (beta < top * (i + 1) / 8)).sum()) for i in range(8)]
            assert use.counts.tolist() == wanted and sum(wanted) == beta.numel()
            torch.testing.assert_close(use.edges, torch.linspace(0, top, 9))
            x = layer(x)
    assert not any(layer.attn._forward_pre_hooks for layer in model.model.layers)  # type: ignore[union-attr]
