"""The GPU's steps, in Triton's interpreter or on a GPU, against the modules' own; draws; and on a GPU: graphs and bits."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn.errors import CheckpointError
from gdn.generation import engine, gpu_decoder
from gdn.generation.batch import generate_batch
from gdn.generation.gpu_decoder import GPUDecoder, Stream
from gdn.generation.sampling import Sampling, finite
from gdn.generation.weights import join_projections
from gdn.model import state as state_module
from gdn.model.config import ModelConfig
from gdn.model.lm import GatedDeltaNetLM, init_weights
from gdn.model.state import DecodeState
from gdn.ops.pending import SLOTS

triton_linear = pytest.importorskip("gdn.ops.triton_linear", exc_type=ImportError)
GPU = torch.cuda.is_available()
if os.environ.get("TRITON_INTERPRET") != "1" and not GPU:
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = "cuda" if GPU else "cpu"
VOCAB = 64
SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-gate": {"use_gate": False},
    "bias-negative-eigenvalues": {"conv_bias": True, "allow_neg_eigval": True},
    "grouped-values": {"num_heads": 2, "num_v_heads": 4},
    "wide-values": {"expand_v": 2.0},
    "tied": {"tie_word_embeddings": True, "norm_eps": 1e-3},
}


@pytest.fixture(autouse=True)
def slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """States in the interpreter, where models are not served by themselves, have room for pending tokens too."""
    if not GPU:
        monkeypatch.setattr(state_module, "slots_for", lambda *_: SLOTS)


def build(dtype: torch.dtype = torch.float32, **config: Any) -> GatedDeltaNetLM:
    """A model of sizes that the kernels take, with no weight at its neutral value."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 1, "num_heads": 1, "head_dim": 64, "expand_v": 1.0}
    model = GatedDeltaNetLM(ModelConfig(**sizes | config)).eval().requires_grad_(False)
    init_weights(model, "mamba", 1)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.to(DEVICE, dtype)
    join_projections(model)
    return model


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def read_state(model: GatedDeltaNetLM, rows: int, length: int = 5) -> DecodeState:
    state = model.new_state(rows)
    ids = torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(rows)).to(DEVICE)
    with torch.no_grad():
        model(ids, state=state)
    return state


def agrees(model: GatedDeltaNetLM, rows: int, tokens: int = 2) -> None:
    """The last of so many tokens, and the state after it."""
    state = read_state(model, rows)
    wanted_state = state.fork()
    for token in range(tokens):
        ids = (torch.arange(2 * rows, device=DEVICE) + 3 + token).view(rows, 2)[
            :, 0
        ]  # a column of several, as of a batch of texts
        assert not ids.is_contiguous() or rows == 1
        with torch.no_grad():
            wanted = model(ids[:, None], state=wanted_state, last_only=True).logits
        got = GPUDecoder(model).step(ids, state)
        assert wanted is not None and relative(got, wanted) < 1e-5
    assert state.pending.any()
    state.settle()
    assert relative(state.recurrent, wanted_state.recurrent) < 1e-5 and relative(state.conv, wanted_state.conv) < 1e-5
    assert torch.equal(state.position, wanted_state.position)


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_a_step_is_the_modules_step(switches: dict[str, Any]) -> None:
    agrees(build(**switches), rows=1)


@pytest.mark.parametrize("rows", [3, 17])
def test_a_step_of_several_rows_is_the_modules_step(rows: int) -> None:
    """By the tiles of few rows and of more."""
    agrees(build(num_hidden_layers=2), rows)


def test_tokens_beyond_all_slots_are_the_modules_tokens() -> None:
    """Each state is written in between, and read with other tokens pending."""
    agrees(build(num_heads=2), rows=1, tokens=SLOTS + 1)


@pytest.mark.parametrize("forgets", [False, True], ids=["", "control"])
def test_a_prompt_after_tokens(forgets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole passes read a state that single tokens left; and not where they forget what is pending."""
    model = build(num_hidden_layers=2)
    state = read_state(model, 2)
    wanted_state, ids = state.fork(), torch.tensor([[3, 9, 60, 7, 7], [5, 8, 1, 2, 40]], device=DEVICE)
    for token in range(2):
        GPUDecoder(model).step(ids[:, token], state)
    with torch.no_grad():
        wanted = model(ids, state=wanted_state, last_only=True).logits
        if forgets:
            monkeypatch.setattr(DecodeState, "settle", lambda self: None)
        got = model(ids[:, 2:], state=state, last_only=True).logits
    assert wanted is not None and (relative(got, wanted) < 1e-5) is not forgets
    assert (relative(state.recurrent, wanted_state.recurrent) < 1e-5) is not forgets


def test_a_step_in_float16_is_near_the_modules_step() -> None:
    model, wide = build(torch.float16, num_hidden_layers=2), build(num_hidden_layers=2)
    ids = torch.tensor([3, 9, 60], device=DEVICE)
    with torch.no_grad():
        wanted = wide(ids[:, None], state=wide.new_state(3), last_only=True).logits
    assert wanted is not None and 1e-5 < relative(GPUDecoder(model).step(ids, model.new_state(3)), wanted) < 3e-3


@pytest.mark.parametrize("tokens", [SLOTS - 2, SLOTS - 1])
def test_a_second_prompt(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settled by the kernel, in the interpreter too. After the larger number of tokens the state was just written, and old
    tokens lie in the slots that the prompt's length then counts as filled."""
    from gdn.ops.triton_pending import settle

    monkeypatch.setattr(state_module, "settle", settle)
    model = build()
    ids = torch.randint(VOCAB, (1, 7 + tokens), generator=torch.Generator().manual_seed(tokens)).to(DEVICE)
    state, decoder = model.new_state(1), GPUDecoder(model)
    with torch.no_grad():
        model(ids[:, :1], state=state)
        for place in range(1, 1 + tokens):
            decoder.step(ids[:, place], state)
        model(ids[:, 1 + tokens : 6 + tokens], state=state)
        got = decoder.step(ids[:, 6 + tokens], state)
        wanted = model(ids, last_only=True).logits
    assert wanted is not None and relative(got, wanted) < 1e-5


def test_rows_at_different_positions_have_the_bits_of_each_alone() -> None:
    """One state is written at the second token, the other at the fifth."""
    model = build()
    decoder, ids = GPUDecoder(model), torch.arange(2, device=DEVICE) * 7
    alone = [read_state(model, 1, length) for length in (SLOTS - 2, SLOTS - 5)]
    together = model.new_state(2)
    for row, state in enumerate(alone):
        together.view(row, row + 1).copy_(state)
    for token in range(6):
        logits = decoder.step(ids + token, together)
        for row, state in enumerate(alone):
            assert torch.equal(decoder.step(ids[row : row + 1] + token, state)[0], logits[row]), (token, row)
            pairs = zip(state.tensors().values(), together.view(row, row + 1).tensors().values())
            assert all(torch.equal(a, b) for a, b in pairs), (token, row)


def in_order(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
    """A product summed one by one from the accumulator on, as tensor cores do by 16: NumPy's order hangs on the shape."""
    total = d.data.copy()
    for k in range(a.data.shape[-1]):
        total += a.data[..., :, k, None] * b.data[..., None, k, :]
    return type(d)(total, d.dtype.scalar)


@pytest.mark.skipif(GPU, reason="on a GPU the test of the published width says it")
@pytest.mark.parametrize("by_rows", [False, True], ids=["", "control"])
def test_a_row_has_the_same_bits_beside_others(by_rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In few rows and in more; and not where the number of rows says in what order parts of a product are added."""
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(InterpreterBuilder, "create_dot", in_order)
    model, group = build(intermediate_size=320), triton_linear.group
    ids, results = torch.arange(17) * 5 % VOCAB, []
    for rows in (slice(16, 17), slice(14, 17), slice(0, 17)):
        if by_rows:
            monkeypatch.setattr(triton_linear, "group", (lambda segments: segments) if rows.start == 0 else group)
        state = model.new_state(len(ids[rows]))
        steps = [GPUDecoder(model).step((ids[rows] + n) % VOCAB, state)[-1] for n in range(2)]
        own = state.view(len(ids[rows]) - 1, len(ids[rows])).tensors().values()
        results.append(torch.cat([*steps, *(tensor.flatten() for tensor in own)]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2]) is not by_rows


def test_what_the_last_norm_gives() -> None:
    model = build()
    ids, state = torch.tensor([3, 9], device=DEVICE), read_state(model, 2)
    with torch.no_grad():
        wanted = model.model(ids[:, None], state=state.fork())[:, 0]
    logits, h = GPUDecoder(model).read(ids, state.fork())
    assert relative(h, wanted) < 1e-5 and torch.equal(logits, GPUDecoder(model).step(ids, state))


def test_a_wrong_step_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of `test_a_step_is_the_modules_step`: one norm a thousandth off is more than its bound."""
    model = build()
    layer = gpu_decoder.layer_weights
    monkeypatch.setattr(gpu_decoder, "layer_weights", lambda block: layer(block)._replace(o_norm=layer(block).o_norm * 1.001))
    ids, state = torch.tensor([3], device=DEVICE), model.new_state(1)
    with torch.no_grad():
        wanted = model(ids[:, None], state=state.fork(), last_only=True).logits
    assert wanted is not None and relative(GPUDecoder(model).step(ids, state), wanted) > 1e-5


def test_models_that_it_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_decoder, "choose_backend", lambda *_: "triton")
    assert GPUDecoder.serves(build())
    refused = ({"use_short_conv": False}, {"hidden_size": 96}, {"intermediate_size": 96}, {"expand_v": 1.5}, {"expand_v": 0.5})
    assert not any(GPUDecoder.serves(build(**config)) for config in refused)
    monkeypatch.setattr(gpu_decoder, "choose_backend", lambda *_: "torch")
    assert not GPUDecoder.serves(build())


class Eager:
    """In a graph's place where there is none."""

    def __init__(self, stream: Stream) -> None:
        self.replay = stream._step


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine takes the GPU's way here too, and streams replay by running."""
    if not GPU:
        monkeypatch.setattr(gpu_decoder, "choose_backend", lambda *_: "triton")
        monkeypatch.setattr(Stream, "_capture", lambda self: setattr(self, "_graph", Eager(self)))


@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(seed=-3), Sampling(0.8, 20, 0.9, 5)], ids=str)
def test_going_on_is_never_having_stopped(sampling: Sampling) -> None:
    model, prompt = build(), [1, 5, 9, 2, 60]
    whole = list(engine.generate(model, prompt, max_new_tokens=6, sampling=sampling))
    state = model.new_state(1)
    first = list(engine.generate(model, prompt, max_new_tokens=3, sampling=sampling, state=state))
    assert int(state.position) == 5 + 2
    rest = list(engine.generate(model, first[-1:], max_new_tokens=3, sampling=sampling, state=state))
    assert first + rest == whole and len(set(whole)) > 1
    ended = list(engine.generate(model, prompt, max_new_tokens=6, sampling=sampling, eos_ids=[whole[1]]))
    assert ended == whole[: whole.index(whole[1]) + 1]


@pytest.mark.usefixtures("streams")
def test_rows_end_and_join_beside_each_other() -> None:
    model, sampling, prompts = build(), Sampling(seed=9), [[1, 5, 9], [60, 2], [7, 8, 33, 2]]
    alone = [list(engine.generate(model, prompt, max_new_tokens=3, sampling=sampling)) for prompt in prompts]
    found: list[list[int]] = [[], [], []]
    for i, token in generate_batch(model, prompts, max_new_tokens=3, sampling=sampling, rows=2):
        found[i].append(token)
    assert found == alone


@pytest.mark.usefixtures("streams")
def test_weights_that_are_damaged_are_told() -> None:
    model = build()
    model.model.layers[0].mlp.down_proj.weight[3, 3] = torch.nan
    with pytest.raises(CheckpointError, match="row 0: the best logit is not finite"):
        list(engine.generate(model, [1, 2], max_new_tokens=2, sampling=Sampling(temperature=0)))
    assert finite(torch.tensor([[1.0, -torch.inf], [torch.nan, 1.0], [-torch.inf, -torch.inf]])).tolist() == [
        True,
        False,
        False,
    ]


# --- on a GPU only --------------------------------------------------------------------------------------------------------

gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no GPU")]


def published(dtype: torch.dtype = torch.bfloat16) -> GatedDeltaNetLM:
    """The published width, three layers."""
    sizes = {"hidden_size": 1024, "num_heads": 4, "head_dim": 256, "num_hidden_layers": 3, "vocab_size": 32000}
    return build(dtype, **sizes)


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 16, 17, 32, 64, 65, 128, 256])
def test_a_row_has_the_same_bits_at_any_batch(rows: int) -> None:
    model = published()
    decoder, state = GPUDecoder(model), model.new_state(rows)
    ids = torch.arange(rows, device=DEVICE) * 17 % 32000
    steps = [
        decoder.step(ids + n, state) for n in range(SLOTS + 1)
    ]  # each state is written once, in other tokens than its neighbours
    for row in (0, rows // 2, rows - 1):
        own = model.new_state(1)
        for n, logits in enumerate(steps):
            assert torch.equal(decoder.step(ids[row : row + 1] + n, own)[0], logits[row]), (row, n)
        pairs = zip(own.tensors().values(), state.view(row, row + 1).tensors().values())
        assert all(torch.equal(a, b) for a, b in pairs)


test_a_row_has_the_same_bits_at_any_batch.pytestmark = [*gpu, *test_a_row_has_the_same_bits_at_any_batch.pytestmark]


def test_bf16_is_near_the_modules_in_float32() -> None:
    model = published()
    wide = GatedDeltaNetLM(model.config).to(DEVICE).eval().requires_grad_(False)
    wide.load_state_dict({name: x.float() for name, x in model.state_dict().items()})
    ids, state, wanted_state = torch.tensor([5, 900], device=DEVICE), model.new_state(2), wide.new_state(2)
    for _ in range(8):
        logits = GPUDecoder(model).step(ids, state)
        wanted = wide(ids[:, None], state=wanted_state, last_only=True).logits
        ids = wanted.argmax(-1)
        assert relative(logits, wanted) < 2e-2


test_bf16_is_near_the_modules_in_float32.pytestmark = gpu
