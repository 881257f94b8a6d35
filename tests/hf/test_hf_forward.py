import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hf_testing import plain, relative, tokens
from torch import Tensor
from transformers import DynamicCache

from gdn.hf import GatedDeltaNetCache, GatedDeltaNetForCausalLM
from gdn.model.lm import GatedDeltaNetLM

Model = GatedDeltaNetForCausalLM
LENGTHS = (40, 17, 1, 25)
WIDTH = 45


def padded(side: str, lengths: tuple[int, ...] = LENGTHS, width: int = WIDTH) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A batch of these lengths padded on a side or in between, its mask, and the rows alone."""
    generator = torch.Generator().manual_seed(1)
    rows = [tokens(1, n, seed=n) for n in lengths]
    ids, mask = tokens(len(lengths), width, seed=99), torch.zeros(len(lengths), width, dtype=torch.long)
    for i, row in enumerate(rows):
        n = row.shape[1]
        places = {
            "left": torch.arange(width - n, width),
            "right": torch.arange(n),
            "interior": torch.randperm(width, generator=generator)[:n].sort().values,
        }[side]
        ids[i, places], mask[i, places] = row[0], 1
    return ids, mask, rows


@pytest.mark.parametrize("side", ["left", "right", "interior"])
def test_padding_changes_nothing(model: Model, side: str) -> None:
    ids, mask, rows = padded(side)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, output_hidden_states=True)
        hidden = model.model(ids, attention_mask=mask.bool()).last_hidden_state
        for i, row in enumerate(rows):
            alone = model(row, output_hidden_states=True)
            assert relative(out.logits[i][mask[i] == 1], alone.logits[0]) < 1e-5
            for got, wanted in zip(out.hidden_states, alone.hidden_states):
                assert relative(got[i][mask[i] == 1], wanted[0]) < 1e-5
            assert relative(out.past_key_values.state.recurrent[:, i], alone.past_key_values.state.recurrent[:, 0]) < 1e-5
            assert relative(out.past_key_values.state.conv[:, i], alone.past_key_values.state.conv[:, 0]) < 1e-5
            assert relative(out.logits[i, -1], alone.logits[0, -1]) < 1e-5 or mask[i, -1] == 1
    assert not hidden[mask == 0].any()
    assert out.past_key_values.state.position.tolist() == list(LENGTHS)
    assert out.past_key_values.get_seq_length() == WIDTH


@pytest.mark.parametrize("side", ["left", "right", "interior"])
@pytest.mark.parametrize("pieces", [[20, 25], [44, 1], [1] * WIDTH, [3, 30, 12]], ids=str)
def test_padding_in_pieces_through_the_cache(model: Model, side: str, pieces: list[int]) -> None:
    ids, mask, rows = padded(side)
    cache, logits, end = GatedDeltaNetCache(model.config), [], 0
    with torch.no_grad():
        for n in pieces:
            end += n
            whole = mask[:, :end] if n % 2 else mask[:, end - n : end]  # the mask of everything or that of the new tokens
            logits.append(model(ids[:, end - n : end], attention_mask=whole, past_key_values=cache).logits)
        for i, row in enumerate(rows):
            alone = model(row).logits[0]
            assert relative(torch.cat(logits, dim=1)[i][mask[i] == 1], alone) < 1e-5
            assert relative(logits[-1][i, -1], alone[-1]) < 1e-5  # a masked end repeats the last token's
    assert cache.state is not None and cache.state.position.tolist() == list(LENGTHS)


def test_masks_of_ones_take_the_plain_path(model: Model) -> None:
    ids = tokens(2, 30)
    with torch.no_grad():
        wanted = model(ids).logits
        for mask in (torch.ones(2, 30), torch.ones(2, 30, dtype=torch.long), torch.ones(2, 30, dtype=torch.bool)):
            assert torch.equal(model(ids, attention_mask=mask).logits, wanted)


def test_rows_and_batches_without_any_token(model: Model) -> None:
    ids, mask = tokens(2, 9), torch.zeros(2, 9, dtype=torch.long)
    with torch.no_grad():
        out = model(ids, attention_mask=mask)
        assert not out.logits.any() and not out.past_key_values.state.recurrent.any()
        mask[1, 4:] = 1
        out = model(ids, attention_mask=mask)
        assert relative(out.logits[1, 4:], model(ids[1:, 4:]).logits[0]) < 1e-5 and not out.logits[0].any()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.full((2, 6), 2), "attention_mask holds 2; expected ones for tokens and zeros"),
        (torch.zeros(2, 6) - 10000.0, "attention_mask holds -10000.0"),
        (torch.full((2, 6), float("nan")), "attention_mask holds nan"),
        (torch.ones(2, 5), r"attention_mask is \(2, 5\); expected \(2, 6\)"),
        (torch.ones(2, 7), r"attention_mask is \(2, 7\)"),
        (torch.ones(1, 6), r"attention_mask is \(1, 6\)"),
        (torch.ones(2, 1, 6, 6), r"attention_mask is \(2, 1, 6, 6\)"),
    ],
    ids=str,
)
def test_bad_masks_are_refused(model: Model, mask: Tensor, message: str) -> None:
    for module in (model, model.model):
        with pytest.raises(ValueError, match=message):
            module(tokens(2, 6), attention_mask=mask)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"position_ids": torch.arange(6)[None]}, TypeError, "no argument 'position_ids'"),
        ({"output_attentions": True}, TypeError, "no argument 'output_attentions'"),
        ({"cu_seqlens": torch.tensor([0, 6])}, TypeError, "'cu_seqlens'"),
        ({"past_key_values": DynamicCache()}, TypeError, "past_key_values is a DynamicCache; expected a GatedDeltaNetCache"),
        ({"inputs_embeds": torch.zeros(2, 6, 32)}, ValueError, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": None}, ValueError, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, ValueError, r"input_ids is \(2, 0\)"),
        ({"input_ids": torch.zeros(6, dtype=torch.long)}, ValueError, r"input_ids is \(6,\); expected \[B, T\]"),
        ({"input_ids": torch.zeros(2, 6)}, ValueError, "input_ids are torch.float32; expected integers"),
        ({"labels": torch.zeros(2, 5, dtype=torch.long)}, ValueError, r"labels are \(2, 5\); expected \(2, 6\)"),
        ({"labels": torch.full((2, 6), -1)}, ValueError, r"labels\[0, 0\] = -1; expected an id in \[0, 67\), .*, or -100"),
        ({"labels": torch.full((2, 6), 67)}, ValueError, r"labels\[0, 0\] = 67; expected an id"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_arguments_that_would_change_the_result_are_refused(
    model: Model, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    cache = model(tokens(2, 3)).past_key_values
    with pytest.raises(error, match=message):
        model(**{"input_ids": tokens(2, 6), "past_key_values": cache} | arguments)
    assert cache.get_seq_length() == 3 and cache.state.position.tolist() == [3, 3]
    model(tokens(2, 6), output_attentions=False, token_type_ids=None)


def test_ids_outside_the_vocabulary_are_named(model: Model) -> None:
    ids = tokens(2, 6)
    for bad in (67, -1):
        ids[1, 3] = bad
        for call in (lambda: model(ids), lambda: model.generate(ids, max_new_tokens=2, attention_mask=torch.ones_like(ids))):
            with pytest.raises(ValueError, match=rf"input_ids\[1, 3\] = {bad}; expected an id in \[0, 67\)"):
                call()


def test_a_cache_of_another_model_is_refused(model: Model, make: Callable[..., Model]) -> None:
    for change in ({"num_hidden_layers": 3}, {"head_dim": 4}, {"conv_size": 3}):
        cache = make(**change)(tokens(2, 6)).past_key_values
        with pytest.raises(ValueError, match="past_key_values is of another model"):
            model(tokens(2, 1), past_key_values=cache)


def test_a_cache_of_other_rows_is_refused(model: Model) -> None:
    cache = model(tokens(2, 6)).past_key_values
    for rows in (1, 3):
        with pytest.raises(ValueError, match=f"past_key_values holds 2 rows; the batch has {rows}"):
            model(tokens(rows, 1), past_key_values=cache)
    cache.reset()  # and nothing would be lost
    with torch.no_grad():
        assert torch.equal(model(tokens(3, 4), past_key_values=cache).logits, model(tokens(3, 4)).logits)


def test_embeddings_tuples_hidden_states_and_kept_logits(model: Model) -> None:
    ids = tokens(2, 20)
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, out.logits)
        assert torch.equal(model(ids, return_dict=False)[0], out.logits)
        assert len(out.hidden_states) == 3
        assert torch.equal(out.hidden_states[0], model.model.embeddings(ids))
        assert torch.equal(out.hidden_states[-1], model.model(ids).last_hidden_state)
        assert torch.equal(out.hidden_states[1], model.model.layers[0](out.hidden_states[0]))
        for keep, kept in ((1, [19]), (3, [17, 18, 19]), (torch.tensor([0, 7]), [0, 7])):
            logits = model(ids, logits_to_keep=keep).logits
            assert logits.shape[1] == len(kept) and relative(logits, out.logits[:, kept]) < 1e-6
        assert model(ids, use_cache=False).past_key_values is None
        assert model.model(ids, return_dict=False)[0].shape == (2, 20, 32)


def test_loss_is_the_mean_over_shifted_labels(model: Model) -> None:
    ids, labels = tokens(2, 30), tokens(2, 30, seed=3)
    labels[0, 4:9] = -100
    with torch.no_grad():
        out = model(ids, labels=labels)
        wanted = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        assert float(out.loss) == pytest.approx(float(wanted.sum() / 53), rel=1e-5)
        for items in (7, torch.tensor(7)):
            assert float(model(ids, labels=labels, num_items_in_batch=items).loss) == pytest.approx(
                float(wanted.sum() / 7), rel=1e-5
            )
        assert float(model(ids, labels=torch.full_like(ids, -100)).loss) == 0


@pytest.mark.parametrize("side", ["left", "right", "interior"])
def test_loss_of_a_padded_batch_is_that_of_its_rows(model: Model, side: str) -> None:
    ids, mask, rows = padded(side)
    sums, items = 0.0, 0
    with torch.no_grad():
        loss = model(ids, attention_mask=mask, labels=ids).loss  # labels at masked positions are not -100: they do not count
        for row in rows:
            targets = row.shape[1] - 1
            sums, items = sums + float(model(row, labels=row).loss) * targets, items + targets
    assert float(loss) == pytest.approx(sums / items, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
def test_gradients_are_those_of_the_plain_model(make: Callable[..., Model]) -> None:
    ids = tokens(2, 40)
    model = make().train()
    own = plain(model)
    (own(ids[:, :-1], ids[:, 1:]).loss_sum / 78).backward()
    wanted = {name: parameter.grad for name, parameter in own.named_parameters()}
    ways: dict[str, Callable[[], Tensor]] = {
        "loss": lambda: model(ids, labels=ids).loss,
        "logits": lambda: torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()),
        "checkpointing": lambda: model(ids, labels=ids).loss,
    }
    for way, loss in ways.items():
        if way == "checkpointing":
            calls = count_layer_calls(model)
            model.gradient_checkpointing_enable()  # deprecated from 5.23 on, the only name before
        model.zero_grad()
        loss().backward()
        for name, parameter in model.named_parameters():
            assert relative(parameter.grad, wanted[name]) < 1e-4, (way, name)
    assert calls == [2]  # once forward, once again in the backward pass
    with pytest.raises(ValueError, match="use_cache with gradient checkpointing"):
        model(ids, use_cache=True)


def count_layer_calls(model: Model) -> list[int]:
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    model.model.layers[0].attn_norm.register_forward_pre_hook(count)
    return calls


def test_training_makes_no_cache_and_no_logits_where_told(make: Callable[..., Model]) -> None:
    model, ids = make(fuse_linear_cross_entropy=True).train(), tokens(2, 9)
    out = model(ids, labels=ids)
    assert out.logits is None and out.past_key_values is None and out.loss.requires_grad
    assert model(ids).logits is not None and model.eval()(ids, labels=ids).logits is not None


def test_generate_while_training_with_gradient_checkpointing(make: Callable[..., Model]) -> None:
    """As a callback of a Trainer does; with gradients, a state would be updated again in the backward."""
    model, ids = make().train(), tokens(2, 9)
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    model.gradient_checkpointing_enable()
    assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False), wanted)
    with pytest.raises(ValueError, match="use_cache with gradient checkpointing in training"):
        model(ids, use_cache=True)


def test_gradients_past_a_cache(make: Callable[..., Model]) -> None:
    """The state enters as a constant, and updating it in place does not disturb the backward pass."""
    model, ids = make().double(), tokens(2, 30)
    cache = model(ids[:, :20]).past_key_values

    def loss() -> Tensor:
        return model(ids[:, 20:], past_key_values=copy.deepcopy(cache)).logits[..., 0].sum()

    loss().backward()
    weight = model.model.layers[0].attn.k_proj.weight
    index = int(weight.grad.abs().argmax())
    with torch.no_grad():
        weight.view(-1)[index] += 1e-6
        up = loss()
        weight.view(-1)[index] -= 2e-6
        assert float(weight.grad.view(-1)[index]) == pytest.approx(float(up - loss()) / 2e-6, rel=1e-4)


def test_autocast_is_gdns_own_mixed_precision(make: Callable[..., Model]) -> None:
    model, ids = make().train(), tokens(2, 40)
    own = GatedDeltaNetLM(model.config.to_model_config(), compute_dtype=torch.bfloat16)
    own.load_state_dict(model.state_dict())
    (own(ids[:, :-1], ids[:, 1:]).loss_sum / 78).backward()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    for (name, parameter), wanted in zip(model.named_parameters(), own.parameters()):
        assert parameter.grad.dtype == torch.float32 and relative(parameter.grad, wanted.grad) < 1e-2, name
