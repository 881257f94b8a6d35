"""A block without gradients as one operator: beside the modules, and the same bits in any batch and cut on the rule's grid."""

import copy

import pytest
import torch
from ops_testing import relative_error
from test_triton_block import CASES, DEVICE, GPU, problem, small_programs
from torch import Tensor

from gdn.model.lm import Block
from gdn.model.mixer import LayerState
from gdn.ops import row_product

__all__ = ["small_programs"]
LONG = 200 if GPU else 100  # tokens: more than one piece of the grid


@pytest.fixture(autouse=True)
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Block, "_fused_backend", lambda *_: "triton")


def empty_state(block: Block, rows: int, dtype: torch.dtype = torch.float32) -> LayerState:
    config = block.attn.config
    recurrent = torch.zeros(rows, config.value_heads, config.head_dim, config.head_v_dim, device=DEVICE)
    channels = 2 * config.key_dim + config.value_dim
    return LayerState(recurrent, torch.zeros(rows, config.conv_size - 1, channels, device=DEVICE, dtype=dtype))


def read(block: Block, x: Tensor, state: LayerState | None, cuts: list[int], cu_seqlens: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return torch.cat([block(piece, state, cu_seqlens) for piece in x.split(cuts, dim=1)], dim=1)


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_modules(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.bfloat16 if name == "hopper" else torch.float32
    block, x, _, cu_seqlens = problem(name, dtype)
    block.to(DEVICE)
    rows = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
    x, state, wide = x.to(DEVICE, dtype), empty_state(block, rows, dtype), empty_state(block, rows)
    got = [read(block, x, state, [x.shape[1]], cu_seqlens) for _ in range(2)]  # the second goes on from the first's state
    without = read(block, x, None, [x.shape[1]], cu_seqlens)
    monkeypatch.setattr(Block, "_fused_backend", lambda *_: "torch")
    if GPU:
        monkeypatch.setattr("gdn.model.mixer.choose_backend", lambda *_: "torch")
    wanted = [read(block, x.float(), wide, [x.shape[1]], cu_seqlens) for _ in range(2)]
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other in [*zip(got, wanted), *zip(state[:2], wide), (without, wanted[0])]:
        assert relative_error(one, other) < bound


@pytest.mark.parametrize("name", ["plain", *(name for name, case in CASES.items() if "lengths" in case)])
def test_sequences_begin_from_rows_of_a_state_which_is_only_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block, x, _, cu_seqlens = problem(name, torch.float32)
    block.to(DEVICE)
    count = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
    generator = torch.Generator().manual_seed(2)
    held = LayerState(*(torch.randn(tensor.shape, generator=generator).to(DEVICE) for tensor in empty_state(block, 3)[:2]))
    before = [tensor.clone() for tensor in held[:2]]
    rows = torch.tensor([2, 0, 1, 2, 2, 0, 1, 2, 0, 1][:count], device=DEVICE)
    x, cuts = x.to(DEVICE), [x.shape[1]]
    own = LayerState(held.recurrent[rows], held.conv[rows])
    wanted = read(block, x, own, cuts, cu_seqlens)
    assert torch.equal(read(block, x, held._replace(rows=rows), cuts, cu_seqlens), wanted)
    monkeypatch.setattr(Block, "_fused_backend", lambda *_: "torch")
    if GPU:
        monkeypatch.setattr("gdn.model.mixer.choose_backend", lambda *_: "torch")
    assert relative_error(read(block, x, held._replace(rows=rows), cuts, cu_seqlens), wanted) < 1e-5
    assert all(torch.equal(one, other) for one, other in zip(held, before))


def test_a_row_has_the_same_bits_in_any_batch_and_cut_anywhere_on_the_grid() -> None:
    block, _, _, _ = problem("plain", torch.float32)
    block.to(DEVICE)
    x = torch.randn(3, LONG, 48, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    together, alone = empty_state(block, 3), empty_state(block, 1)
    whole = read(block, x, together, [LONG])
    assert torch.equal(read(block, x[1:2], alone, [64, LONG - 64])[0], whole[1])
    assert all(torch.equal(one[0], all_[1]) for one, all_ in zip(alone[:2], together))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_row_of_a_product_is_the_same_at_any_number_of_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library may add in another order for few rows, or in float32 for any other number; here two that do are made up."""
    x, weight, added = torch.randn(900, 40, dtype=dtype), torch.randn(24, 40, dtype=dtype), torch.randn(900, 24, dtype=dtype)
    wanted = torch.nn.functional.linear(x, weight)
    real, real_sum = torch.mm, torch.Tensor.addmm_

    def error(rows: int) -> float:
        return 0.1 * (rows / 1024 if dtype == torch.float32 else rows < row_product.FULL)

    monkeypatch.setattr(torch, "mm", lambda a, b, out: real(a, b, out=out).add_(error(len(a))))
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda s, a, b: real_sum(s, a, b).add_(error(len(a))))
    whole, summed = row_product.row_product(x, weight), row_product.row_product(x, weight, added.clone())
    torch.testing.assert_close(whole, wanted + error(row_product.FULL if dtype == torch.float32 else 900))
    torch.testing.assert_close(summed, whole + added, rtol=0.02, atol=0.02)
    for rows in (1, 3, 256, 300):
        assert torch.equal(row_product.row_product(x[None, :rows], weight)[0], whole[:rows])
        assert torch.equal(row_product.row_product(x[:rows], weight, added[:rows].clone()), summed[:rows])
    assert row_product.row_product(x[:0], weight).shape == (0, 24)


def test_no_token_changes_no_state() -> None:
    block, x, _, _ = problem("plain", torch.float32)
    block.to(DEVICE)
    state = empty_state(block, 2)
    read(block, x.to(DEVICE), state, [x.shape[1]])
    before = copy.deepcopy(state)
    with torch.no_grad():
        out = block(x[:1, :0].to(DEVICE), state, torch.zeros(3, dtype=torch.int32, device=DEVICE))
    assert out.shape == x[:1, :0].shape
    assert torch.equal(state.conv, before.conv) and torch.equal(state.recurrent, before.recurrent)


def test_it_compiles_whole() -> None:
    block, x, _, _ = problem("plain", torch.float32)
    block.to(DEVICE)
    x, state, other = x.to(DEVICE), empty_state(block, 2), empty_state(block, 2)
    wanted = read(block, x, state, [x.shape[1]])
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x, other), wanted)
    assert torch.equal(other.recurrent, state.recurrent) and torch.equal(other.conv, state.conv)
