"""Linear layer and cross-entropy in one: against PyTorch's, in any chunking, and without ever holding all logits."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops_testing import LargestTensor, PoisonedMemory, assert_close
from torch import Tensor

from gdn.ops import cross_entropy, linear_cross_entropy

R, D, V = 23, 6, 11
IGNORED = -100


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(R, D, generator=generator), torch.randn(V, D, generator=generator)
    labels = torch.randint(V, (R,), generator=generator)
    labels[[0, 7, 8, 9, 10, 22]] = IGNORED  # a whole chunk of four among them
    return hidden.to(dtype), weight.to(dtype), labels


def pytorch_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.mT, labels, ignore_index=IGNORED, reduction="sum")


def with_gradients(function: Any, hidden: Tensor, weight: Tensor, labels: Tensor, d_loss: float = 1.0) -> dict[str, Tensor]:
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    loss = function(*leaves, labels)
    d_hidden, d_weight = torch.autograd.grad(loss * d_loss, leaves)
    return {"loss": loss, "d_hidden": d_hidden, "d_weight": d_weight}


@pytest.fixture(params=[1, V, 4 * V, 4 * V + 5, 22 * V, 23 * V, 1 << 22], ids="chunk_logits={}".format)
def chunk_logits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """From one row at a time to all rows at once."""
    monkeypatch.setattr(cross_entropy, "_CHUNK_LOGITS", request.param)
    return int(request.param)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_matches_pytorch(chunk_logits: int, dtype: torch.dtype) -> None:
    hidden, weight, labels = problem(dtype)
    got = with_gradients(linear_cross_entropy, hidden, weight, labels)
    assert got["loss"].shape == () and all(x.dtype == dtype for x in got.values())
    assert_close(got, with_gradients(pytorch_loss, hidden.double(), weight.double(), labels), dtype)


def test_upstream_gradient_is_respected() -> None:
    got = with_gradients(linear_cross_entropy, *problem(), d_loss=-0.3)
    assert_close(got, with_gradients(pytorch_loss, *problem(), d_loss=-0.3), torch.float64)


def test_all_labels_ignored_is_zero_with_zero_gradients(chunk_logits: int) -> None:
    hidden, weight, labels = problem()
    got = with_gradients(linear_cross_entropy, hidden, weight, torch.full_like(labels, IGNORED))
    assert all(x.abs().max() == 0 for x in got.values())


def test_no_rows_is_zero() -> None:
    hidden, weight, labels = problem()
    got = with_gradients(linear_cross_entropy, hidden[:0], weight, labels[:0])
    assert got["loss"] == 0 and got["d_weight"].abs().max() == 0 and got["d_hidden"].shape == (0, D)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, labels = problem()
    got = with_gradients(linear_cross_entropy, 1000 * hidden.float(), weight.float(), labels)
    wanted = with_gradients(pytorch_loss, 1000 * hidden, weight, labels)
    assert_close(got, wanted, torch.float32)


@pytest.mark.parametrize("wanted", [0, 1], ids=["hidden", "weight"])
def test_gradient_of_one_input_alone(wanted: int) -> None:
    hidden, weight, labels = problem()
    leaf = (hidden, weight)[wanted].requires_grad_()
    (d,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), leaf)
    (exact,) = torch.autograd.grad(pytorch_loss(hidden, weight, labels), leaf)
    assert_close({"d": d}, {"d": exact}, torch.float64)


def test_without_gradients_the_value_is_the_same() -> None:
    loss = with_gradients(linear_cross_entropy, *problem())["loss"]
    with torch.no_grad():
        assert linear_cross_entropy(*problem()).item() == loss.item()


def test_bfloat16_hidden_beside_float32_weight(chunk_logits: int) -> None:
    """As under mixed precision: the loss in float32, gradients in the dtype of what they belong to."""
    hidden, weight, labels = problem(torch.float32)
    hidden = hidden.bfloat16()
    got = with_gradients(linear_cross_entropy, hidden, weight, labels)
    assert [x.dtype for x in got.values()] == [torch.float32, torch.bfloat16, torch.float32]
    wanted = with_gradients(pytorch_loss, hidden.double(), weight.bfloat16().double(), labels)
    assert_close(got, wanted, torch.bfloat16)


def test_strided_hidden_on_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_CHUNK_LOGITS", 4 * V)
    hidden, weight, labels = problem()
    strided = hidden.mT.contiguous().mT
    assert not strided.is_contiguous()
    with PoisonedMemory() as poison:
        got = with_gradients(linear_cross_entropy, strided, weight, labels)
    assert poison.filled
    assert_close(got, with_gradients(pytorch_loss, hidden, weight, labels), torch.float64)


def test_the_full_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, width, vocabulary, limit = 300, 4, 50, 1000
    monkeypatch.setattr(cross_entropy, "_CHUNK_LOGITS", limit)
    hidden, weight, labels = torch.randn(rows, width), torch.randn(vocabulary, width), torch.randint(vocabulary, (rows,))
    with LargestTensor() as largest:
        with_gradients(pytorch_loss, hidden, weight, labels)
    assert largest.numel == rows * vocabulary  # the observer sees what it is to see
    with LargestTensor() as largest:
        with_gradients(linear_cross_entropy, hidden, weight, labels)
    assert largest.numel <= max(limit, rows * width)


def test_a_label_outside_the_vocabulary_is_an_error() -> None:
    hidden, weight, labels = problem()
    for wrong in (V, -1):
        labels[3] = wrong
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            linear_cross_entropy(hidden, weight, labels)
