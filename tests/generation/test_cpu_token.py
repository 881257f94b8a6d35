"""The compiled token against the modules: every switch, dtype and width of vectors; and where it cannot be compiled."""

import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from generation_testing import SWITCHES, VOCAB, build, by_modules, exactly, random_ids, relative
from torch import Tensor

from gdn.generation import cpu_token
from gdn.generation.cpu_decoder import CPUDecoder
from gdn.generation.cpu_token import CompiledToken
from gdn.generation.weights import join_projections
from gdn.model.lm import GatedDeltaNetLM
from gdn.model.state import DecodeState
from gdn.ops import cpu_token as compiling

WIDE = {"hidden_size": 64, "head_dim": 64}
NO_COMPILER = not any(map(shutil.which, ("cc", "gcc", "clang")))  # one that fails is no reason to skip
pytestmark = pytest.mark.skipif(NO_COMPILER, reason="no C compiler")


def joined(dtype: torch.dtype, **switches: Any) -> GatedDeltaNetLM:
    model = build(dtype, **WIDE | switches)
    model.compute_dtype = torch.float32
    join_projections(model)
    return model


def by_tokens(model: GatedDeltaNetLM, ids: list[int]) -> tuple[Tensor, DecodeState]:
    assert CompiledToken.serves(model)
    state, token = model.new_state(1), CompiledToken(model)
    return torch.stack([token.step(i, state) for i in ids]), state


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_is_the_modules_token(switches: dict[str, Any], dtype: torch.dtype) -> None:
    """As they have it in float64 on the same weights."""
    model, ids = joined(dtype, **switches), random_ids(40)
    wanted, wanted_state = by_modules(exactly(model), ids)
    got, state = by_tokens(model, ids)
    assert got.dtype == torch.float32 and relative(got, wanted) < 1e-5
    assert relative(state.recurrent, wanted_state.recurrent) < 1e-5
    assert state.conv.numel() == 0 or relative(state.conv, wanted_state.conv) < 1e-5
    assert state.position.tolist() == [40]


def test_a_wrong_token_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: one gate a thousandth off is more than the bound above."""
    model, ids = joined(torch.float32), random_ids(40)
    wanted, _ = by_modules(model, ids)
    layer = cpu_token.layer_weights
    monkeypatch.setattr(cpu_token, "layer_weights", lambda block: layer(block)._replace(rate=layer(block).rate * 1.001))
    assert relative(by_tokens(model, ids)[0], wanted) > 1e-5


@pytest.mark.skipif(platform.machine() != "x86_64", reason="options of x86")
@pytest.mark.parametrize("instructions", ["-march=x86-64", "-march=x86-64-v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shorter_vectors(instructions: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = joined(dtype), random_ids(40)
    wanted, _ = by_modules(exactly(model), ids)
    library, how = compiling.build(instructions)
    assert library is not None, how
    monkeypatch.setattr(cpu_token, "library", lambda: library)
    assert relative(by_tokens(model, ids)[0], wanted) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_has_the_same_bits(dtype: torch.dtype) -> None:
    """More of them than there are heads, too. A fixture puts the tests' own number back."""
    model, ids, seen = joined(dtype), random_ids(20), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        logits, state = by_tokens(model, ids)
        seen.append((logits, state.recurrent, state.conv))
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(other, seen[0]))
    assert not torch.equal(by_tokens(model, ids[::-1])[0], seen[0][0])  # the control


def test_a_bf16_window_is_rounded_as_pytorch_rounds() -> None:
    """Where activations are bf16 the state's window is too; beside the step by operators, which rounds it the same way."""
    model, ids = build(torch.bfloat16, **WIDE), random_ids(9)
    join_projections(model)
    got, state = by_tokens(model, ids)
    decoder, own = CPUDecoder(model), model.new_state(1)
    decoder._compiled = None
    wanted = torch.stack([decoder.step(i, own) for i in ids])
    assert state.conv.dtype == own.conv.dtype == torch.bfloat16
    # The first layer's inputs differ in their last bits alone, and few of them lie where that changes what they round to.
    assert float((state.conv[0] == own.conv[0]).float().mean()) > 0.99
    assert relative(got, wanted) < 1e-2


def test_one_row_of_several_is_stepped_and_the_others_are_not() -> None:
    model, ids = joined(torch.float32), random_ids(12)
    wanted, alone = by_tokens(model, ids)
    state, token = model.new_state(3), CompiledToken(model)
    for tensor in (state.recurrent, state.conv):
        tensor[:, [0, 2]] = 7.0
    got = torch.stack([token.step(i, state.view(1, 2)) for i in ids])
    assert torch.equal(got, wanted) and torch.equal(state.recurrent[:, 1], alone.recurrent[:, 0])
    assert torch.equal(state.conv[:, 1], alone.conv[:, 0]) and state.position.tolist() == [0, 12, 0]
    assert all(bool((tensor[:, [0, 2]] == 7.0).all()) for tensor in (state.recurrent, state.conv))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_what_it_writes_does_not_hang_on_torchs_default_dtype(dtype: torch.dtype) -> None:
    model, ids = joined(torch.float32), random_ids(9)
    wanted, _ = by_tokens(model, ids)
    before, state = torch.get_default_dtype(), model.new_state(1)
    try:
        torch.set_default_dtype(dtype)
        token = CompiledToken(model)
        got = [token.step(i, state) for i in ids]
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(torch.stack(got), wanted)


def test_weights_that_get_other_memory_are_not_read_where_they_were_freed() -> None:
    """A stream under way goes on with those that it began with."""
    model, ids = joined(torch.float32), random_ids(9)
    wanted, _ = by_tokens(model, ids)
    state, token = model.new_state(1), CompiledToken(model)
    for parameter in model.parameters():
        parameter.data = torch.full_like(parameter, torch.nan)
    assert torch.equal(torch.stack([token.step(i, state) for i in ids]), wanted)


def test_vectors_may_lie_scattered() -> None:
    model, ids = joined(torch.float32), random_ids(20)
    wanted, _ = by_modules(exactly(model), ids)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data = torch.stack([parameter.data, torch.full_like(parameter, torch.nan)], -1)[:, 0]
            assert len(parameter) == 1 or not parameter.is_contiguous(), name
    assert relative(by_tokens(model, ids)[0], wanted) < 1e-5


def test_a_state_in_pieces_is_left_to_operators() -> None:
    model, ids = joined(torch.float32), random_ids(9)
    wanted, _ = by_tokens(model, ids)
    state, decoder = model.new_state(1), CPUDecoder(model)
    assert decoder._compiled is not None and decoder._compiled.reads(state)
    state.recurrent = state.recurrent.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert not decoder._compiled.reads(state)
    assert relative(torch.stack([decoder.step(i, state) for i in ids]), wanted) < 1e-5


@pytest.mark.parametrize("extreme", ["tiny keys", "large gates"])
def test_extremes_are_the_modules_too(extreme: str) -> None:
    model, ids = joined(torch.float32), random_ids(20)
    for layer in model.model.layers:
        if extreme == "tiny keys":
            layer.attn.k_proj.weight.mul_(1e-4)
        else:
            layer.attn.dt_bias.fill_(200.0)
            layer.attn.A_log.fill_(-8.0)
    wanted, _ = by_modules(exactly(model), ids)
    assert bool(wanted.isfinite().all()) and relative(by_tokens(model, ids)[0], wanted) < 1e-5


def test_nan_stays_nan_in_a_bf16_window() -> None:
    model = build(torch.bfloat16, **WIDE)
    join_projections(model)
    model.model.layers[0].attn_norm.weight.data = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32).expand(64)
    state = model.new_state(1)
    CompiledToken(model).step(3, state)
    assert bool(state.conv[0, 0, -1].isnan().all())


def test_logits_that_were_given_are_not_written_again() -> None:
    model = joined(torch.float32)
    state, token = model.new_state(1), CompiledToken(model)
    first = token.step(3, state)
    kept = first.clone()
    assert not torch.equal(token.step(4, state), kept) and torch.equal(first, kept)


def test_an_id_outside_the_vocabulary_reads_no_foreign_memory() -> None:
    model = joined(torch.float32)
    for outside in (-1, VOCAB):
        with pytest.raises(IndexError, match=rf"token {outside}; expected an id in \[0, {VOCAB}\)"):
            CompiledToken(model).step(outside, model.new_state(1))


def test_what_it_cannot_read_is_left_to_operators() -> None:
    assert not CompiledToken.serves(build(torch.float32))  # widths that are no whole blocks
    model = joined(torch.float32)
    assert CompiledToken.serves(model) and CPUDecoder(model)._compiled is not None
    model.lm_head.weight.data = model.lm_head.weight.data.bfloat16()
    assert not CompiledToken.serves(model)
    model = joined(torch.float32)
    model.lm_head.weight.data = model.lm_head.weight.data.T.contiguous().T
    assert not CompiledToken.serves(model)


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Compiling as if for the first time; the folder that it is kept in."""
    monkeypatch.setattr(compiling, "build", compiling.build.__wrapped__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gdn"


def no_home() -> Path:
    raise RuntimeError("no home directory")


def test_it_is_compiled_once(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiling.build()[0] is not None
    [made] = anew.iterdir()
    kept = made.read_bytes()
    monkeypatch.setattr(compiling.subprocess, "run", lambda *args, **kwargs: pytest.fail("compiled again"))
    assert compiling.build()[0] is not None
    monkeypatch.undo()
    assert [path.read_bytes() for path in anew.iterdir()] == [kept]


def test_a_damaged_file_is_made_again(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as unloaded:  # a library once loaded is never read again
        unloaded.setattr(compiling.ctypes, "CDLL", lambda path: SimpleNamespace(gdn_step=SimpleNamespace()))
        compiling.build()
    [made] = anew.iterdir()
    made.write_bytes(b"no library")
    assert compiling.build()[0] is not None and made.stat().st_size > 1000


def test_a_compiler_with_arguments(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "env cc")
    library, how = compiling.build()
    assert library is not None and how == "by env"


@pytest.mark.parametrize(
    "trouble",
    [
        "no compiler",
        "not there",
        "failing",
        "silent",
        "another language",
        "unknown processor",
        "folder",
        "owner",
        "open folder",
        "no home",
    ],
)
def test_without_it_operators_serve_and_say_why(
    trouble: str, anew: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if trouble == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CC", raising=False)
        said = "no C compiler was found"
    elif trouble == "not there":
        monkeypatch.setenv("CC", "nosuchcc")
        said = "nosuchcc: .*No such file"
    elif trouble in ("failing", "silent", "another language"):
        words = {"failing": "warning: old\\nerror: unsupported option", "silent": "", "another language": "\\377\\376"}[trouble]
        compiler = tmp_path / "mycc"
        compiler.write_text(f"#!/bin/sh\nprintf '{words}\\n' >&2\nexit 1\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CC", str(compiler))
        said = (
            f"{compiler}: "
            + {"failing": "error: unsupported option", "silent": ".*exit status 1", "another language": "\ufffd\ufffd"}[trouble]
        )
    elif trouble == "unknown processor":
        monkeypatch.setattr(compiling.platform, "machine", lambda: "riscv64")
        said = f"not compiled for {platform.system()} on riscv64"
    elif trouble == "folder":
        anew.parent.write_text("a file where a folder should be")
        said = "Not a directory"
    elif trouble == "open folder":
        anew.mkdir(parents=True)
        anew.chmod(0o777)
        said = "others may write to it"
    elif trouble == "owner":
        monkeypatch.setattr(compiling.os, "getuid", lambda: -1)
        said = "belongs to another user"
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(compiling.Path, "home", staticmethod(no_home))
        said = "no home directory"
    library, how = compiling.build()
    assert library is None and re.search(said, how), how
    model = joined(torch.float32)
    assert not CompiledToken.serves(model)
    decoder, ids = CPUDecoder(model), random_ids(5)
    assert decoder._compiled is None
    state = model.new_state(1)
    assert relative(torch.stack([decoder.step(i, state) for i in ids]), by_modules(model, ids)[0]) < 1e-5
