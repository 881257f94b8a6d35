import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_testing import relative, tokens
from torch import Tensor
from transformers import AutoTokenizer, TextStreamer, pipeline

from gdn.data.tokenizer import train_bpe
from gdn.hf import GatedDeltaNetCache, GatedDeltaNetForCausalLM, export
from gdn.model.config import ModelConfig
from gdn.model.lm import GatedDeltaNetLM, init_weights

Model = GatedDeltaNetForCausalLM


def generate(model: Model, ids: Tensor, **options: Any) -> Tensor:
    """Only the new tokens."""
    # Without a mask generate takes any pad id in the prompt for padding, and these prompts are random.
    settings: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0}
    settings["attention_mask"] = torch.ones_like(ids)
    out: Tensor = model.generate(ids, **settings | options)
    return out[:, ids.shape[1] :]


def test_greedy_is_the_argmax_of_full_passes(model: Model) -> None:
    ids = tokens(2, 23)
    got = generate(model, ids)
    assert got.unique().numel() > 4  # a text that repeats one token would prove little
    for _ in range(14):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, ids[:, 23:])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 2, "top_k": 5},
        {"repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_with_and_without_a_cache(model: Model, options: dict[str, Any]) -> None:
    outs = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        outs.append(generate(model, tokens(2, 9), use_cache=use_cache, **options))
    assert torch.equal(*outs)
    assert len(outs[0]) == 2 * options.get("num_return_sequences", 1)


@pytest.mark.parametrize("side", ["left", "right", "interior"])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}, {"prefill_chunk_size": 4}], ids=str)
def test_a_padded_batch_is_each_row_alone(model: Model, side: str, options: dict[str, Any]) -> None:
    rows = [tokens(1, n, seed=n) for n in (19, 5, 1)]
    ids, mask = tokens(3, 21, seed=8), torch.zeros(3, 21, dtype=torch.long)
    for i, row in enumerate(rows):
        n = row.shape[1]
        places = {"left": torch.arange(21 - n, 21), "right": torch.arange(n), "interior": torch.linspace(0, 20, n).long()}[side]
        ids[i, places], mask[i, places] = row[0], 1
    got = generate(model, ids, attention_mask=mask, **options)
    alone = options if "num_beams" in options else {}
    for i, row in enumerate(rows):
        assert torch.equal(got[i], generate(model, row, **alone)[0]), i


def test_prompt_as_embeddings_and_in_chunks(model: Model) -> None:
    ids = tokens(2, 23)
    wanted = generate(model, ids)
    assert torch.equal(generate(model, ids, prefill_chunk_size=5), wanted)
    embedded = model.generate(inputs_embeds=model.model.embeddings(ids), max_new_tokens=14, do_sample=False, pad_token_id=0)
    assert torch.equal(embedded, wanted)


def test_going_on_from_a_cache(model: Model) -> None:
    ids, cache = tokens(2, 9), GatedDeltaNetCache(model.config)
    first = torch.cat([ids, generate(model, ids, past_key_values=cache, max_new_tokens=6)], dim=1)
    assert cache.get_seq_length() == 14  # the newest token has not been read
    longer = torch.cat([first, tokens(2, 4, seed=1)], dim=1)
    fork = copy.deepcopy(cache)
    assert torch.equal(generate(model, longer, past_key_values=cache), generate(model, longer))
    assert fork.get_seq_length() == 14
    assert torch.equal(generate(model, longer, past_key_values=fork), generate(model, longer))
    again = copy.deepcopy(cache)
    again.reset()
    model(longer, past_key_values=again)
    for read in (longer, ids):
        with pytest.raises(ValueError, match=r"past_key_values has read the whole text and \d+ tokens more"):
            generate(model, read, past_key_values=again)


def test_a_cache_made_under_inference_mode_goes_on_outside(model: Model) -> None:
    ids = tokens(2, 12)
    with torch.inference_mode():
        cache = model(ids[:, :7]).past_key_values
    assert torch.equal(generate(model, ids, past_key_values=cache), generate(model, ids))


def test_stopping_and_streaming(make: Callable[..., Model], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tokenizer = train_bpe(["the cat sat on the mat. " * 20], 300)
    tokenizer.save(tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    model = make(vocab_size=300)
    texts = [auto.decode([i]) for i in range(300)]
    only: dict[str, Any] = {
        "suppress_tokens": [i for i, text in enumerate(texts) if not (text.isascii() and text.isprintable())]
    }
    free = generate(model, tokens(1, 5), **only)[0].tolist()
    n = next(i for i, token in enumerate(free) if i > 2 and token not in free[:i])
    for eos in (free[n], [free[n], 299]):
        assert generate(model, tokens(1, 5), eos_token_id=eos, **only)[0].tolist() == free[: n + 1]
    generate(model, tokens(1, 5), streamer=TextStreamer(auto, skip_prompt=True), **only)
    assert capsys.readouterr().out.strip() == auto.decode(free).strip()
    stopped = generate(model, tokens(1, 5), stop_strings=[texts[free[n - 1]] + texts[free[n]]], tokenizer=auto, **only)
    assert stopped[0].tolist() == free[: n + 1]


def test_assisted_decoding_is_refused(model: Model) -> None:
    for way in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": model}):
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            generate(model, tokens(1, 9), **way)


def test_the_cache_is_of_constant_size_and_counts(model: Model) -> None:
    cache = GatedDeltaNetCache(model.config)
    assert (cache.get_seq_length(), cache.batch_size, cache.is_initialized, len(cache)) == (0, -1, False, 2)
    sizes = set()
    with torch.no_grad():
        for n in (1, 50, 1, 7):
            model(tokens(2, n), past_key_values=cache)
            assert cache.state is not None
            sizes.add(cache.state.nbytes)
    assert len(sizes) == 1
    assert (cache.get_seq_length(), cache.batch_size, cache.is_initialized) == (59, 2, True)
    assert cache.get_max_length() == -1 and cache.get_mask_sizes(3, 0) == (62, 0) and cache.has_previous_state()
    assert not cache.is_croppable and not cache.is_compileable
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(1)
    cache.reset()
    padded = torch.ones(2, 6, dtype=torch.long)
    padded[:, :2] = 0  # where the logits are those of the token before
    with torch.no_grad():
        again = model(tokens(2, 6), padded, past_key_values=cache).logits
        assert torch.equal(again, model(tokens(2, 6), padded).logits) and cache.get_seq_length() == 6


def test_the_cache_reorders_repeats_and_selects(model: Model) -> None:
    ids, new = tokens(3, 20), tokens(1, 4, seed=7)
    for change, order in [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    ]:
        with torch.no_grad():
            before = model(ids)
            cache = before.past_key_values
            change(cache)
            batch, padding = new.expand(len(order), -1), torch.zeros(len(order), 2)
            masked = model(batch[:, :2], past_key_values=cache, attention_mask=padding).logits
            assert relative(masked[:, -1], before.logits[order, -1]) < 1e-5
            got = model(batch, past_key_values=cache).logits
            for row, source in enumerate(order):
                wanted = model(torch.cat([ids[source : source + 1], new], dim=1)).logits[0, -4:]
                assert relative(got[row], wanted) < 1e-5


def test_text_generation_pipeline(tmp_path: Path) -> None:
    tokenizer = train_bpe(["the cat sat on the mat. " * 20], 300)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    config = ModelConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_heads=2, head_dim=8, expand_v=1.0, **ids)
    own = GatedDeltaNetLM(config)
    init_weights(own, "mamba", 0)
    export(own, tmp_path / "out", tokenizer_files=tokenizer.save)
    generator = pipeline("text-generation", model=str(tmp_path / "out"))
    prompts = ["the cat", "the mat. the cat sat on"]
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    alone = [generator(prompt, **options)[0]["generated_text"] for prompt in prompts]
    state = own.new_state(1)
    with torch.no_grad():
        logits, wanted = own(torch.tensor([tokenizer.encode(prompts[0])]), state=state, last_only=True).logits, []
        for _ in range(8):
            wanted.append(int(logits.argmax()))
            logits = own(torch.tensor([[wanted[-1]]]), state=state, last_only=True).logits
    assert alone[0] == tokenizer.decode(wanted)
    generator.tokenizer.pad_token = generator.tokenizer.eos_token
    generator.tokenizer.padding_side = "left"
    assert [out[0]["generated_text"] for out in generator(prompts, batch_size=2, **options)] == alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 1.5}, r"top_p = 1.5; expected a number in \(0, 1\]"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": float("nan")}, "top_p = nan"),
        ({"temperature": float("nan")}, r"`temperature` \(=nan\)"),
    ],
    ids=str,
)
def test_bad_sampling_is_refused(model: Model, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, tokens(1, 4), do_sample=True, **options)


@pytest.mark.parametrize("shape", [(1, 0), (0, 4)], ids=str)
def test_no_tokens_and_no_rows_are_refused(model: Model, shape: tuple[int, int]) -> None:
    with pytest.raises(
        ValueError, match=rf"input_ids is \({shape[0]}, {shape[1]}\); expected .* at least one row and one token"
    ):
        generate(model, torch.zeros(shape, dtype=torch.long))
