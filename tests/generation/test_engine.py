"""The engine against full forwards of a tiny model: greedy text, prefill in pieces, stopping, going on, refusals, dtype."""

import logging
from pathlib import Path

import pytest
import torch
from generation_testing import VOCAB, random_ids, tiny_model
from torch import Tensor

from gdn.errors import CheckpointError, ConfigError
from gdn.generation import engine
from gdn.generation.engine import decode_dtype, for_decoding, generate, pieces, prefill
from gdn.generation.sampling import Sampling
from gdn.model.lm import GatedDeltaNetLM
from gdn.model.load import load_model, save_model
from gdn.model.state import DecodeState

GREEDY = Sampling(temperature=0)
WARM = Sampling(temperature=1.0, top_p=0.95, seed=11)


def full_logits(model: GatedDeltaNetLM, ids: list[int]) -> Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits
    assert logits is not None
    return logits[0]


def test_greedy_text_is_the_argmax_of_a_full_forward_at_every_token() -> None:
    model, ids = tiny_model(), random_ids(70)
    text = list(generate(model, ids, max_new_tokens=24, sampling=GREEDY))
    assert len(text) == 24 and len(set(text)) > 5
    for token in text:
        assert token == full_logits(model, ids)[-1].argmax()
        ids = [*ids, token]


def test_tensors_and_lists_are_the_same_prompt() -> None:
    model, ids = tiny_model(), random_ids(9)
    texts = [list(generate(model, p, max_new_tokens=5, sampling=GREEDY)) for p in (ids, torch.tensor(ids, dtype=torch.int32))]
    assert texts[0] == texts[1]


def test_what_stands_beyond_the_grid_is_read_alone_wherever_one_stopped_on_it() -> None:
    """Else one token left over would be read by a step after a stop, and with its piece without one."""
    assert list(pieces(0, 300, 128, alone=True)) == [128, 128, 44] == list(pieces(0, 300, 128, alone=False))
    assert list(pieces(0, 257, 512, alone=True)) == [256, 1] and list(pieces(0, 257, 512, alone=False)) == [257]
    for stop in range(64, 1025, 64):
        first, rest = list(pieces(0, stop, 512, alone=True)), list(pieces(stop, 1061 - stop, 512, alone=True))
        assert sum(first) == stop and sum(rest) == 1061 - stop and rest[-1] == 1061 % 64
        assert all(size % 64 == 0 for size in first + rest[:-1])
    assert list(pieces(70, 10, 512, alone=True)) == [10]  # from within a chunk of the rule on: nothing to cut


@pytest.mark.parametrize("prefill_chunk", [64, 128, 320])
def test_prefill_in_pieces_is_the_whole(prefill_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model(), random_ids(300)
    widths: list[int] = []
    forward = GatedDeltaNetLM.forward
    monkeypatch.setattr(
        GatedDeltaNetLM, "forward", lambda self, ids, **rest: widths.append(ids.shape[1]) or forward(self, ids, **rest)
    )
    state = model.new_state(1)
    logits = prefill(model, ids[:40], state)
    logits = prefill(model, ids[40:], state, prefill_chunk=prefill_chunk)
    # Flat memory: no piece is longer, and cuts are at multiples of the chunk from the very first token.
    assert widths[0] == 40 and sum(widths) == 300 and max(widths[1:]) <= prefill_chunk
    assert all(sum(widths[: i + 1]) % prefill_chunk == 0 for i in range(1, len(widths) - 1))
    monkeypatch.undo()
    wanted = full_logits(model, ids)[-1:]
    assert (logits - wanted).norm() <= 1e-5 * wanted.norm()
    assert state.position.tolist() == [300] and not logits.requires_grad


def test_an_eos_id_ends_the_stream_and_is_yielded_last() -> None:
    model, ids = tiny_model(), random_ids(20)
    text = list(generate(model, ids, max_new_tokens=20, sampling=WARM))
    eos = text[7]
    stopped = list(generate(model, ids, max_new_tokens=20, sampling=WARM, eos_ids=[60 if eos != 60 else 59, eos]))
    assert stopped == text[: text.index(eos) + 1]


def test_the_model_runs_only_for_tokens_asked_for() -> None:
    model, state = tiny_model(), tiny_model().new_state(1)
    stream = generate(model, random_ids(10), max_new_tokens=50, sampling=GREEDY, state=state)
    assert state.position.tolist() == [0]
    for _ in range(3):
        next(stream)
    assert state.position.tolist() == [12]  # all yielded tokens but the last
    assert torch.is_grad_enabled()


def test_no_new_tokens_still_reads_the_prompt() -> None:
    model, state = tiny_model(), tiny_model().new_state(1)
    assert list(generate(model, random_ids(10), max_new_tokens=0, sampling=GREEDY, state=state)) == []
    assert state.position.tolist() == [10]


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "drawn"])
@pytest.mark.parametrize("stop", [1, 2, 13])
def test_going_on_from_a_state_is_never_having_stopped(sampling: Sampling, stop: int) -> None:
    model, ids = tiny_model(), random_ids(30)
    whole_state, state = model.new_state(1), model.new_state(1)
    whole = list(generate(model, ids, max_new_tokens=25, sampling=sampling, state=whole_state))
    head = list(generate(model, ids, max_new_tokens=stop, sampling=sampling, state=state))
    tail = list(generate(model, head[-1:], max_new_tokens=25 - stop, sampling=sampling, state=state))
    assert head + tail == whole
    assert state.recurrent.equal(whole_state.recurrent) and state.conv.equal(whole_state.conv)


def test_draws_depend_on_the_seed_and_differ_from_position_to_position() -> None:
    model, ids = tiny_model(), random_ids(30)
    texts = [list(generate(model, ids, max_new_tokens=30, sampling=Sampling(seed=seed))) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    for parameter in model.parameters():  # all logits equal: nothing but the draws tells positions apart
        parameter.data.zero_()
    assert len(set(generate(model, ids, max_new_tokens=30, sampling=Sampling(seed=1)))) > 10


def test_two_streams_at_once_do_not_disturb_each_other() -> None:
    model = tiny_model()
    alone = [list(generate(model, random_ids(12, s), max_new_tokens=8, sampling=WARM)) for s in (1, 2)]
    together = zip(*(generate(model, random_ids(12, s), max_new_tokens=8, sampling=WARM) for s in (1, 2)))
    assert [list(text) for text in zip(*together)] == alone


def test_bad_arguments_are_named_at_the_call() -> None:
    model = tiny_model()

    def refused(message: str, ids: object = (1, 2), **changes: object) -> None:
        arguments = {"max_new_tokens": 3, "sampling": GREEDY} | changes
        with pytest.raises(ConfigError, match=message):
            generate(model, ids, **arguments)  # type: ignore[arg-type]

    refused("prompt_ids is empty", [])
    refused(r"prompt_ids\[2\] = 61; expected an id in \[0, 61\)", [0, 60, VOCAB])
    refused(r"prompt_ids\[0\] = -1", [-1])
    refused(r"prompt_ids is torch.int64 \(1, 2\)", [[1, 2]])
    refused("prompt_ids is torch.float32", [1.5])
    for strange in (["a"], None, "abc", [2**70], [[1], [2, 3]]):
        refused("prompt_ids is no row of integers: ", strange)
    refused("max_new_tokens = -1", max_new_tokens=-1)
    refused("eos_ids: 61", eos_ids=[VOCAB])
    refused("prefill_chunk = 100; expected a multiple of 64", prefill_chunk=100)
    refused("prefill_chunk = 0", prefill_chunk=0)
    refused(r"state.recurrent is torch.float32 \(2, 2, 2, 16, 16\)", state=model.new_state(2))
    refused(
        r"state.recurrent is .* expected torch.float32 \(2, 1, 2, 16, 16\)", state=tiny_model(num_hidden_layers=3).new_state(1)
    )
    refused("state.conv is torch.bfloat16", state=DecodeState.empty(model.config, 1, dtype=torch.bfloat16))


def test_weights_that_give_nan_are_an_error_and_not_a_text() -> None:
    model = tiny_model()
    model.lm_head.weight.data[3, 3] = torch.nan
    with pytest.raises(CheckpointError, match="expected a finite number"):
        next(generate(model, [1], max_new_tokens=1, sampling=GREEDY))


@pytest.mark.parametrize(
    ("device", "stored", "dots", "widens", "compiled", "wanted"),
    [
        ("cpu", torch.bfloat16, False, False, False, torch.float32),
        ("cpu", torch.bfloat16, True, False, False, torch.bfloat16),
        ("cpu", torch.bfloat16, False, True, False, torch.bfloat16),
        ("cpu", torch.bfloat16, False, False, True, torch.bfloat16),
        ("cpu", torch.float16, True, True, True, torch.float32),
        ("cpu", torch.float32, True, True, True, torch.float32),
        ("cpu", torch.float64, False, False, True, torch.float64),
        ("cuda:1", torch.bfloat16, False, False, False, torch.bfloat16),
        ("cuda", torch.float16, False, False, False, torch.float16),
    ],
    ids=str,
)
def test_the_dtype_follows_from_the_processor(
    device: str,
    stored: torch.dtype,
    dots: bool,
    widens: bool,
    compiled: bool,
    wanted: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processor(monkeypatch, dots, widens)
    assert decode_dtype(device, stored, compiled=compiled)[0] == wanted


def test_without_fbgemm_a_compiled_token_alone_does_not_keep_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches would be slow."""
    processor(monkeypatch, dots=False, widens=False)
    monkeypatch.setattr(engine, "has_fbgemm", lambda: False)
    assert decode_dtype("cpu", torch.bfloat16, compiled=True)[0] == torch.float32


def processor(monkeypatch: pytest.MonkeyPatch, dots: bool, widens: bool) -> None:
    monkeypatch.setattr(engine, "cpu_has_bf16_dots", lambda: dots)
    monkeypatch.setattr(engine, "cpu_widens_bf16", lambda: widens)
    monkeypatch.setattr(engine, "has_fbgemm", lambda: True)


def test_the_choice_is_logged_once_with_its_reason(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    processor(monkeypatch, False, False)
    engine._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="gdn.generation.engine"):
        for _ in range(3):
            decode_dtype("cpu", torch.bfloat16, compiled=False)
    assert [record.getMessage() for record in caplog.records] == [
        "decoding on cpu in torch.float32 (weights stored in torch.bfloat16): "
        "neither bf16 dot products nor a compiled token, without which bf16 may be many times slower"
    ]


def test_a_bf16_folder_decodes_in_float32_where_bf16_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tiny_model(), tmp_path, dtype=torch.bfloat16)
    ways = [(False, False, torch.float32, torch.float32), (True, False, torch.bfloat16, torch.bfloat16)]
    for dots, widens, weights, activations in [*ways, (False, True, torch.bfloat16, torch.float32)]:
        processor(monkeypatch, dots, widens)
        stored = load_model(tmp_path)
        gates = [layer.attn.A_log.clone() for layer in stored.model.layers]
        model = for_decoding(stored, "cpu")
        assert model.lm_head.weight.dtype == weights and model.new_state(1).conv.dtype == activations
        assert all(layer.attn.A_log.equal(gate) for layer, gate in zip(model.model.layers, gates))
        assert len(list(generate(model, [1, 2, 3], max_new_tokens=3, sampling=GREEDY))) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stop", [1, 2, 13])
def test_going_on_with_joined_projections_is_never_having_stopped(dtype: torch.dtype, stop: int) -> None:
    model, ids = for_decoding(tiny_model().to(dtype), "cpu"), random_ids(64)
    whole_state, state = model.new_state(1), model.new_state(1)
    whole = list(generate(model, ids, max_new_tokens=25, sampling=WARM, state=whole_state))
    head = list(generate(model, ids, max_new_tokens=stop, sampling=WARM, state=state))
    tail = list(generate(model, head[-1:], max_new_tokens=25 - stop, sampling=WARM, state=state))
    assert head + tail == whole and len(set(whole)) > 5
    assert state.recurrent.equal(whole_state.recurrent) and state.conv.equal(whole_state.conv)
