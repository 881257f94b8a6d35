"""Micro batches launched and replayed: the choice, and the same bits. On a CPU a stand-in records and replays operators."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from train_testing import differences, go, make_run, saved

import gdn.train.loop as loop
import gdn.train.micro_batch as module
from gdn.data.loader import Batch
from gdn.errors import CheckpointError
from gdn.eval.perplexity import heldout_loss
from gdn.generation.weights import join_projections
from gdn.ops.cross_entropy import IGNORED
from gdn.train.micro_batch import MicroBatch
from gdn.train.optim import build_optimizer
from gdn.train.recipe import RunConfig

STEPS = 6
SCENARIOS = {"plain": 10, "evaluated": 10, "not finite": 10, "moved": 8, "hooked": 8}  # and replays in six steps of two


class StandIn:
    """For torch.cuda.CUDAGraph: the operators of a capture, computed again into the same memory by each replay."""

    def __init__(self) -> None:
        self.done: list[tuple[Any, Any, Any, Any]] = []

    def pool(self) -> tuple[int, int]:
        return 0, 1

    def replay(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, out in self.done:
                again = function(*args, **kwargs)
                for old, new in zip(_listed(out), _listed(again)):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Recorder(TorchDispatchMode):
    def __init__(self, graph: StandIn) -> None:
        super().__init__()
        self.graph, self.before = graph, list[tuple[Tensor, Tensor]]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument, value in zip(function._schema.arguments, args):
            if argument.is_write and isinstance(value, Tensor):
                self.before.append((value, value.clone()))
        out = function(*args, **(kwargs or {}))
        self.graph.done.append((function, args, kwargs or {}, out))
        return out


def _listed(out: Any) -> Any:
    return out if isinstance(out, tuple | list) else (out,)


@contextmanager
def capture(graph: StandIn, **_: Any) -> Iterator[None]:
    """For torch.cuda.graph, in which nothing is computed: what was written over is put back."""
    with Recorder(graph) as recorder:
        yield
    with torch.no_grad():
        for tensor, before in reversed(recorder.before):
            tensor.copy_(before)


class Stream:
    def __init__(self, *_: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "serves", lambda model: True)
    for name, value in {"CUDAGraph": StandIn, "graph": capture, "Stream": Stream, "current_stream": Stream}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each replay; to be asked for after what stands in for graphs."""
    counted: list[int] = []

    class Counted(torch.cuda.CUDAGraph):
        def replay(self) -> None:
            counted.append(1)
            super().replay()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Counted)
    return counted


def trained(run: RunConfig, device: str, scenario: str) -> list[Tensor]:
    """Losses and gradient norms of six steps, then weights and moments."""
    loader, heldout = loop.open_data(run)
    model = loop.build_model(run, torch.device(device))
    micro_batch, optimizer = MicroBatch(model, run.train.cuda_graph), build_optimizer(model, run.optim)
    norm, seen, results = model.model.norm.weight, [], []
    for step in range(STEPS):
        if scenario == "evaluated":
            assert heldout is not None
            seen.append(heldout_loss(model, heldout, run.data.seq_len, 2, 2)["heldout_loss"])
        if scenario == "not finite" and step == 3:
            kept = norm.detach().clone()
            norm.data.fill_(torch.nan)
        if scenario == "moved" and step == 3:
            join_projections(model)
        handle = model.model.register_forward_hook(lambda *_: seen.append(1.0)) if scenario == "hooked" and step == 3 else None
        batches = list(loader.micro_batches(step))
        batches[0].labels[0, :step] = IGNORED  # no step has as many targets as the one before
        result = loop.train_step(micro_batch, optimizer, batches, 1e-2, run)
        results += [result.loss, result.grad_norm]
        if scenario == "not finite" and step == 3:
            assert not bool(result.loss.isfinite()) and not bool(result.grad_norm.isfinite())
            norm.data.copy_(kept)
        if handle is not None:
            handle.remove()
            assert len(seen) == 2
    moments = [value for each in optimizer.state.values() for value in each.values()]
    return [*(x.detach().cpu() for x in (*results, *model.parameters(), *moments)), torch.tensor(seen)]


def check(run: Callable[[bool], RunConfig], device: str, scenario: str, replays: list[int]) -> None:
    launched = trained(run(False), device, scenario)
    assert not replays
    captured = trained(run(True), device, scenario)
    assert len(replays) == SCENARIOS[scenario]
    assert len(launched) == len(captured)
    assert [torch.equal(_bytes(a), _bytes(b)) for a, b in zip(launched, captured)] == [True] * len(captured)


def _bytes(x: Tensor) -> Tensor:
    return x.reshape(-1).contiguous().view(torch.uint8)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_replayed_steps_have_the_bits_of_launched_ones(
    scenario: str, shards: Path, stand_ins: None, replays: list[int]
) -> None:
    check(lambda on: make_run(shards, train={"cuda_graph": on}, eval={"every": 1}), "cpu", scenario, replays)


def test_one_micro_batch_a_step_and_other_shapes(shards: Path, stand_ins: None, replays: list[int]) -> None:
    """Without others there is no second graph; a batch of another shape is launched, and captured when it comes again."""
    run = make_run(shards, data={"micro_batch_size": 4})
    loader, _ = loop.open_data(run)
    micro_batch = MicroBatch(loop.build_model(run, torch.device("cpu")), True)
    valid = torch.tensor(128)

    def call(rows: int) -> tuple[float, int]:
        whole = next(iter(loader.micro_batches(0)))
        batch = Batch(whole.input_ids[:rows], whole.labels[:rows], None, whole.window_ids[:rows])
        for parameter in micro_batch.model.parameters():
            parameter.grad = None
        return float(micro_batch(batch, valid)), len(replays)

    got = [call(rows) for rows in (4, 4, 4, 2, 2, 4)]
    assert [count for _, count in got] == [0, 1, 2, 2, 3, 3]
    assert len({loss for loss, _ in got}) == 2 and got[0][0] == got[2][0] == got[5][0] and got[3][0] == got[4][0]
    assert list(micro_batch._graphs) == []


def test_on_a_cpu_micro_batches_are_launched(shards: Path) -> None:
    model = loop.build_model(make_run(shards), torch.device("cpu"))
    assert not module.serves(model) and module.is_plain(model)
    assert MicroBatch(model, True)._stream is None


@pytest.mark.parametrize("where", ["", "model", "model.layers.1", "model.layers.0.mlp.up_proj", "lm_head"])
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_hooks_are_found(where: str, kind: str, shards: Path) -> None:
    model = loop.build_model(make_run(shards), torch.device("cpu"))
    handle = getattr(model.get_submodule(where), f"register_{kind}")(lambda *_: None)
    assert not module.is_plain(model)
    handle.remove()
    assert module.is_plain(model)
    model.model.layers[0].attn.o_proj = torch.nn.Linear(32, 32, bias=False)  # an adapter, say
    assert not module.is_plain(model)


def test_divisor_as_a_tensor_has_the_bits_of_a_number() -> None:
    torch.manual_seed(0)
    losses = torch.cat([torch.rand(3000) * 1e6, torch.tensor([0.0, torch.inf, torch.nan])])
    for loss, valid in zip(losses, torch.randint(1, 1 << 24, (len(losses),)).tolist()):
        one, other = (loss.clone().requires_grad_() for _ in range(2))
        a, b = one / valid, other / torch.full((), valid)
        assert a.dtype == b.dtype == torch.float32 and torch.equal(_bytes(a.detach()), _bytes(b.detach()))
        a.backward(), b.backward()
        assert torch.equal(one.grad, other.grad)


def test_what_changes_no_bit_may_change_at_a_stop(shards: Path, tmp_path: Path) -> None:
    whole, run = make_run(shards), tmp_path / "run"
    go(whole, tmp_path / "whole")
    go(make_run(shards, train={"recompute": "nothing", "cuda_graph": False}), run)
    for step in range(3, 7):
        shutil.rmtree(saved(run, step))
    go(make_run(shards, train={"recompute": "blocks", "cuda_graph": True}), run)
    assert differences(saved(tmp_path / "whole", 6), saved(run, 6)) == []
    with pytest.raises(CheckpointError, match=r"train\.seed"):
        go(make_run(shards, train={"seed": 8}), run)
