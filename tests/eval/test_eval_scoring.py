"""Scores and greedy texts against the plain way, one request at a time in one forward; the same whatever the batches."""

import gc
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn.errors import CheckpointError, ConfigError
from gdn.eval import scoring
from gdn.eval.requests import Likelihood, Request
from gdn.eval.scoring import Scorer
from gdn.generation.batch import ReaderStream
from gdn.generation.engine import reader
from gdn.model.config import ModelConfig
from gdn.model.lm import Backbone, GatedDeltaNetLM, init_weights
from gdn.model.mixer import LayerState

VOCAB = 61


@pytest.fixture(scope="module")
def model() -> GatedDeltaNetLM:
    config = ModelConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_heads=2, head_dim=8, expand_v=1.0)
    model = GatedDeltaNetLM(config)
    init_weights(model, "mamba", 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def draw(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(n)]


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Choices of one context, of one token, of contexts of one token; single requests; texts longer than a small budget."""
    rng = random.Random(0)
    made = []
    for length in (1, 2, 30, 64, 65, 150, 200):
        context = draw(rng, length)
        made += [Request(context, draw(rng, n)) for n in (1, 1, 5, 70)]
    context = draw(rng, 20)
    made += [Request(context, [token]) for token in (3, 4, 5)]
    made += [Request(draw(rng, n), draw(rng, n)) for n in range(1, 100, 7)]
    made += [Request(draw(rng, 3), draw(rng, 300)), Request(draw(rng, 300), draw(rng, 2))]
    return made


def plain(model: GatedDeltaNetLM, request: Request) -> Likelihood:
    ids = torch.tensor([[*request.context, *request.continuation]])
    with torch.no_grad():
        log_p = model(ids[:, :-1]).logits[0, len(request.context) - 1 :].log_softmax(-1)
    wanted = ids[0, len(request.context) :]
    total = log_p.gather(1, wanted[:, None]).double().sum().item()
    return Likelihood(total, bool((log_p.argmax(-1) == wanted).all()))


def greedy(model: GatedDeltaNetLM, request: Request) -> Request:
    """The same context with the continuation that the model finds likeliest."""
    (text,) = Scorer(model).generate([request.context], len(request.continuation), ())
    return Request(request.context, text)


def test_each_score_is_that_of_the_request_alone(model: GatedDeltaNetLM, requests: list[Request]) -> None:
    asked = requests + [greedy(model, request) for request in requests[::9]]
    got = Scorer(model).likelihoods(asked)
    for request, score in zip(asked, got):
        wanted = plain(model, request)
        assert score.total == pytest.approx(wanted.total, rel=1e-5, abs=1e-5)
        assert score.greedy == wanted.greedy
    assert {score.greedy for score in got} == {True, False}


@pytest.mark.parametrize(
    ("budget", "rows", "unit"),
    [(64, 3, 1), (1024, 1000, 1), (8192, 3, 1), (65536, 1000, 1), (256, 20, 256), (256, 20, 64)],
)
def test_scores_do_not_depend_on_batches_or_order(
    model: GatedDeltaNetLM, requests: list[Request], budget: int, rows: int, unit: int
) -> None:
    wanted = Scorer(model).likelihoods(requests)
    order = list(range(len(requests)))
    random.Random(budget).shuffle(order)
    scorer = Scorer(model, token_budget=budget, state_bytes=rows * model.new_state(1).nbytes)
    assert scorer.max_rows == rows
    assert scorer.unit == 1
    scorer.unit = unit  # as on a GPU
    got = scorer.likelihoods([requests[i] for i in order])
    for i, score in zip(order, got):
        assert score.total == pytest.approx(wanted[i].total, rel=1e-6, abs=1e-5)
        assert score.greedy == wanted[i].greedy


def test_a_shared_context_is_read_once(model: GatedDeltaNetLM) -> None:
    rng = random.Random(1)
    context = draw(rng, 50)
    scorer = Scorer(model)
    scorer.likelihoods([Request(context, draw(rng, 10)) for _ in range(4)])
    assert (scorer.tokens_computed, scorer.tokens_asked) == (50 + 4 * 9, 4 * 59)
    scorer.likelihoods([Request(context, [token]) for token in (1, 2)])
    assert (scorer.tokens_computed, scorer.tokens_asked) == (50 + 4 * 9 + 50, 4 * 59 + 2 * 50)


def test_progress_ends_at_all_requests_and_the_collector_rests(model: GatedDeltaNetLM, requests: list[Request]) -> None:
    said: list[int] = []
    collecting: set[bool] = set()
    Scorer(model, token_budget=512).likelihoods(requests, lambda done: said.append(done) or collecting.add(gc.isenabled()))
    assert collecting == {False} and gc.isenabled()
    assert said == sorted(said) and said[-1] == len(requests) and len(said) > 3


def plain_text(model: GatedDeltaNetLM, prompt: list[int], n: int, eos: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + n and (len(ids) == len(prompt) or ids[-1] != eos):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("streamed", [False, True], ids=["stepped", "streamed"])
@pytest.mark.parametrize(("budget", "rows", "unit"), [(64, 2, 1), (8192, 100, 1), (64, 100, 64), (256, 2, 256)])
def test_generation_is_greedy_and_stops(
    model: GatedDeltaNetLM, budget: int, rows: int, unit: int, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if streamed:  # as on a GPU, where the rows are one captured step's; here it is the modules'
        monkeypatch.setattr(Scorer, "_decoder", lambda self: "decoder")
        monkeypatch.setattr(
            scoring, "Stream", lambda decoder, state, sampling: ReaderStream(reader(model, None), state, sampling)
        )
    rng = random.Random(2)
    prompts = [draw(rng, n) for n in (1, 5, 64, 100, 7, 200, 5)]
    eos = plain_text(model, prompts[1], 3, -1)[2]  # one text at least ends early
    scorer = Scorer(model, token_budget=budget, state_bytes=rows * model.new_state(1).nbytes)
    scorer.unit = unit
    wanted = [plain_text(model, prompt, 12, eos) for prompt in prompts]
    assert min(map(len, wanted)) < 12
    assert scorer.generate(prompts, 12, {eos}) == wanted
    cut = [plain_text(model, prompt, 4, -1) for prompt in prompts]
    assert scorer.generate(prompts, 12, (), stop=lambda text: len(text) >= 4) == cut


def test_what_cannot_be_scored_is_named(model: GatedDeltaNetLM) -> None:
    scorer = Scorer(model)
    with pytest.raises(ConfigError, match="no tokens"):
        scorer.likelihoods([Request([1], [])])
    with pytest.raises(ConfigError, match=f"token id {VOCAB}.*vocabulary is {VOCAB}"):
        scorer.likelihoods([Request([1], [VOCAB])])
    with pytest.raises(ConfigError, match="token_budget = 100"):
        Scorer(model, token_budget=100)
    broken = GatedDeltaNetLM(model.config)
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.model.norm.weight[3] = float("nan")
    with pytest.raises(CheckpointError, match="nan"):
        Scorer(broken).likelihoods([Request([1], [2])])
    with pytest.raises(CheckpointError, match="nan"):
        Scorer(broken).generate([[1]], 1, ())
    with torch.no_grad():
        broken.model.norm.weight[3] = 1.0
        broken.lm_head.weight[5] = 3e38  # whose logit overflows
    with pytest.raises(CheckpointError, match="infinite"):
        Scorer(broken).likelihoods([Request([1], [2])])
    with pytest.raises(CheckpointError, match="infinite"):
        Scorer(broken).generate([[1]], 1, ())


def test_a_model_in_float64_is_scored(model: GatedDeltaNetLM, requests: list[Request]) -> None:
    wide = GatedDeltaNetLM(model.config)
    wide.load_state_dict(model.state_dict())
    for exact, score in zip(Scorer(wide.double()).likelihoods(requests), Scorer(model).likelihoods(requests)):
        assert score.total == pytest.approx(exact.total, rel=1e-5, abs=1e-5)


def test_passes_are_whole_units_and_copies_of_states_bounded(
    model: GatedDeltaNetLM, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, own = Backbone.forward, LayerState.own
    tokens, copied = [], [0]

    def noting(self: Backbone, x: Tensor, *arguments: Any) -> Tensor:
        tokens.append(x.numel())
        return read(self, x, *arguments)

    def counting(self: LayerState) -> LayerState:
        copied.append(0 if self.rows is None else len(self.rows))
        return own(self)

    monkeypatch.setattr(Backbone, "forward", noting)
    monkeypatch.setattr(LayerState, "own", counting)
    scorer = Scorer(model, token_budget=256, state_bytes=5 * model.new_state(1).nbytes)
    scorer.likelihoods(requests)
    assert any(count % 64 for count in tokens) and max(copied) == 5
    tokens.clear()
    scorer.unit = 64  # as on a GPU
    scorer.likelihoods(requests)
    assert tokens and not any(count % 64 for count in tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [True, False], ids=["one operator a block", "modules"])
def test_scores_are_the_same_bits_in_any_order_and_company(requests: list[Request], gated: bool) -> None:
    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 128}
    config = ModelConfig(vocab_size=VOCAB, expand_v=1.0, use_gate=gated, **sizes)
    model = GatedDeltaNetLM(config)
    init_weights(model, "mamba", 0)
    model = model.cuda().bfloat16()
    many = requests * 3
    first = Scorer(model, token_budget=2048)
    first.warm_up(texts=True)
    assert (first.tokens_computed, first.tokens_asked, first.fused) == (0, 0, gated)
    wanted = first.likelihoods(many)
    for seed in range(3):
        order = list(range(len(many)))
        random.Random(seed).shuffle(order)
        got = Scorer(model, token_budget=2048).likelihoods([many[i] for i in order])
        assert [got[order.index(i)] for i in range(len(many))] == wanted
