"""On a GPU: a prompt has the same bits however it is cut on the rule's grid, and in any batch; states taken up again too."""

import copy

import pytest
import torch

from gdn.generation.engine import generate, prefill
from gdn.generation.sampling import Sampling
from gdn.generation.weights import join_projections
from gdn.model.config import ModelConfig
from gdn.model.lm import GatedDeltaNetLM, init_weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=str)
def model(request: pytest.FixtureRequest) -> GatedDeltaNetLM:
    """The published width, three layers; in float32 half of it, whose kernels compile sooner."""
    sizes = {"hidden_size": 1024, "num_heads": 4, "head_dim": 256} if request.param == torch.bfloat16 else {}
    config = {"vocab_size": 32000, "num_hidden_layers": 3, "hidden_size": 512, "num_heads": 4, "head_dim": 128} | sizes
    built = GatedDeltaNetLM(ModelConfig(**config, expand_v=1.0)).eval().requires_grad_(False)  # type: ignore[arg-type]
    init_weights(built, "mamba", 0)
    built.to("cuda", request.param)
    for layer in built.model.layers:
        layer.attn.A_log.data, layer.attn.dt_bias.data = layer.attn.A_log.data.float(), layer.attn.dt_bias.data.float()
    join_projections(built)
    return built


@pytest.mark.parametrize("length", [65, 300, 2113])
def test_any_split_on_the_grid_has_the_same_bits(model: GatedDeltaNetLM, length: int) -> None:
    ids = torch.randint(32000, (length,), generator=torch.Generator().manual_seed(0))
    whole = model.new_state(1)
    logits = prefill(model, ids, whole)
    for chunk, stop in ((64, 0), (256, 0), (2048, 64), (128, 64 * (length // 128)), (2048, length - length % 64)):
        state = model.new_state(1)
        if 0 < stop < length:
            prefill(model, ids[:stop], state)
            state = copy.deepcopy(state)  # a state hit
        rest = ids[stop:] if stop < length else ids
        assert torch.equal(prefill(model, rest, state, prefill_chunk=chunk), logits), (chunk, stop)
        assert torch.equal(state.recurrent, whole.recurrent) and torch.equal(state.conv, whole.conv)
    off_the_grid = model.new_state(1)  # what must differ: the promise is of the grid alone
    prefill(model, ids[:33], off_the_grid)
    prefill(model, ids[33:], off_the_grid)
    assert not torch.equal(off_the_grid.recurrent, whole.recurrent)


@pytest.mark.parametrize("rows", [2, 5, 33])
def test_a_prompt_in_a_batch_is_the_prompt_alone(model: GatedDeltaNetLM, rows: int) -> None:
    ids = torch.randint(32000, (rows, 200), generator=torch.Generator().manual_seed(1)).to("cuda")
    state = model.new_state(rows)
    together = model(ids, state=state, last_only=True).logits
    for row in (0, rows // 2, rows - 1):
        own = model.new_state(1)
        assert torch.equal(model(ids[row : row + 1], state=own, last_only=True).logits[0], together[row])
        assert torch.equal(own.recurrent[:, 0], state.recurrent[:, row])


def test_text_goes_on_with_the_same_bits(model: GatedDeltaNetLM) -> None:
    ids = torch.randint(32000, (130,), generator=torch.Generator().manual_seed(2)).tolist()
    whole = list(generate(model, ids, max_new_tokens=20, sampling=Sampling(temperature=1.0, seed=3)))
    state = model.new_state(1)
    first = list(generate(model, ids, max_new_tokens=8, sampling=Sampling(temperature=1.0, seed=3), state=state))
    rest = list(generate(model, first[-1:], max_new_tokens=12, sampling=Sampling(temperature=1.0, seed=3), state=state))
    assert first + rest == whole
