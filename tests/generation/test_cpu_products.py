"""Products of rows with a weight, by whichever library serves, against float64."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from gdn.generation import cpu_products
from gdn.generation.cpu_products import packs, product_with


def missed(weight: Tensor, x: Tensor) -> float:
    wanted = x.double() @ weight.double().T
    return float((product_with(weight)(x).double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("rows", [1, 2, 64, 65, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_rows_in_float32_precision(dtype: torch.dtype, rows: int) -> None:
    weight, x = torch.randn(70, 90).to(dtype), torch.randn(rows, 90)
    assert missed(weight, x) < 1e-6
    assert product_with(weight)(x[None]).shape == (1, rows, 70)


def test_small_bf16_weights_lose_no_more_than_float16s_smallest_step() -> None:
    weight = (torch.randn(70, 90) * 1e-6).bfloat16()
    error = product_with(weight)(torch.eye(90)).T - weight.float()
    assert packs(weight) and float(error.abs().max()) <= 3e-8


@pytest.mark.parametrize("why", ["too large for float16", "nan", "no FBGEMM"])
def test_what_float16_cannot_hold_is_multiplied_as_it_is(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(70, 90).bfloat16(), torch.randn(5, 90)
    assert packs(weight)
    if why == "no FBGEMM":
        monkeypatch.setattr(torch.backends, "quantized", SimpleNamespace(supported_engines=["qnnpack"]))
    else:
        weight[3, 4] = 7e4 if why.startswith("too") else torch.nan
    assert not packs(weight)
    if why != "nan":
        assert missed(weight, x) < 1e-6 and 1e-6 < missed(weight, x[:1]) < 1e-2


@pytest.mark.parametrize("missing", ["processor", "operator"])
def test_without_onednns_product_pytorchs_serves(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "processor":
        monkeypatch.setattr(cpu_products.platform, "machine", lambda: "arm64")
    else:
        monkeypatch.setattr(cpu_products.torch.ops, "mkldnn", object())
    weight, x = torch.randn(70, 90), torch.randn(1, 90)
    assert torch.equal(product_with(weight)(x), torch.nn.functional.linear(x, weight))


def test_without_a_graph_fbgemms_product_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(70, 90).bfloat16(), torch.randn(2, 90)
    wanted = product_with(weight)(x)
    monkeypatch.setattr(cpu_products, "_fbgemm", cpu_products._fbgemm.__wrapped__)
    monkeypatch.delattr(torch._C, "_create_function_from_graph")
    assert torch.equal(product_with(weight)(x), wanted)
