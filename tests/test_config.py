"""Strict TOML: what is read, what is refused and how the refusal reads, and the way back."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from gdn import config
from gdn.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ConfigError("inner.rate is negative")


@dataclass(frozen=True)
class Middle:
    inner: Inner = field(default_factory=Inner)
    flag: bool = False


@dataclass(frozen=True)
class Outer:
    name: str
    steps: int = 3
    limit: int | None = None
    kind: Literal["a", "b"] = "a"
    pair: tuple[float, str] = (1.0, "x")
    middle: Middle = field(default_factory=Middle)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_reads_every_kind_of_value(tmp_path: Path) -> None:
    text = (
        'name = "n"\nsteps = 7\nlimit = 4\nkind = "b"\npair = [2, "y"]\n[middle]\nflag = true\n[middle.inner]\nsizes = [1, 2]'
    )
    got = config.load(Outer, write(tmp_path, text))
    assert got == Outer("n", 7, 4, "b", (2.0, "y"), Middle(Inner(0.5, (1, 2)), True))
    assert isinstance(got.pair[0], float)  # an integer is a number


@pytest.mark.parametrize("name", ["plain", 'q"uo\\te', "line\nbreak\ttab", "return\r and \x00 \x1b \x7f", "ünï 😀", ""])
def test_dump_reads_back_equal(tmp_path: Path, name: str) -> None:
    for given in (
        Outer(name),
        Outer(name, 0, 9, "b", (1e-15, "\r"), Middle(Inner(1e300, (3, -4)), True)),
        Outer(name, middle=Middle(Inner(123456789.0))),
    ):
        path = tmp_path / "dumped.toml"
        path.write_bytes(config.dump(given).encode())
        assert config.load(Outer, path) == given


def test_to_dict_leaves_none_out() -> None:
    assert config.to_dict(Outer("n")) == {
        "name": "n",
        "steps": 3,
        "kind": "a",
        "pair": [1.0, "x"],
        "middle": {"inner": {"rate": 0.5, "sizes": []}, "flag": False},
    }
    assert config.to_dict(Outer("n", limit=0))["limit"] == 0


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ({"stepz": 1}, ["unknown key 'stepz'", "'steps'"]),
        ({"middle": {"inner": {"ratte": 1}}}, ["unknown key 'middle.inner.ratte'", "'middle.inner.rate'"]),
        ({"name": None}, ["name = None", "a string"]),
        ({"name": 3}, ["name = 3 (int)", "a string"]),
        ({"steps": True}, ["steps = True (bool)", "an integer"]),
        ({"steps": 1.0}, ["steps = 1.0 (float)", "an integer"]),
        ({"limit": "1"}, ["limit = '1'", "an integer"]),
        ({"limit": False}, ["limit = False", "an integer"]),
        ({"kind": "c"}, ["kind = 'c'", "'a', 'b'"]),
        ({"pair": [1.0]}, ["pair = [1.0]", "a list of 2 values"]),
        ({"pair": "ab"}, ["pair = 'ab'", "a list"]),
        ({"pair": ["x", "y"]}, ["pair[0] = 'x'", "a number"]),
        ({"middle": 3}, ["middle = 3", "a section"]),
        ({"middle": {"flag": 1}}, ["middle.flag = 1", "true or false"]),
        ({"middle": {"inner": {"rate": True}}}, ["middle.inner.rate = True", "a number"]),
        ({"middle": {"inner": {"rate": float("nan")}}}, ["middle.inner.rate = nan", "a finite number"]),
        ({"middle": {"inner": {"rate": float("-inf")}}}, ["middle.inner.rate = -inf", "a finite number"]),
        ({"middle": {"inner": {"sizes": [1, 2.5]}}}, ["middle.inner.sizes[1] = 2.5", "an integer"]),
        ({"middle": {"inner": {"rate": -1.0}}}, ["inner.rate is negative"]),
    ],
    ids=str,
)
def test_refuses(data: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        config.build(Outer, {"name": "n"} | data, "here.toml")
    message = str(error.value)
    assert message.startswith("here.toml: ") and message.count("here.toml") == 1 and "\n" not in message
    for part in parts:
        assert part in message


def test_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"here: key 'name' is missing"):
        config.build(Outer, {}, "here")


def test_none_stands_for_an_optional_value() -> None:
    assert config.build(Outer, {"name": "n", "limit": None}, "here").limit is None


def test_override_sets_nested_values_and_leaves_its_input_alone() -> None:
    data = {"name": "n", "middle": {"inner": {"rate": 1.0}, "flag": True}}
    overrides = ["middle.inner.rate=2e-3", "steps=5", "name=a=b c", 'kind="b"', "middle.inner.sizes=[1, 2]", "x.y=false"]
    got = config.override(data, overrides)
    assert got == {
        "name": "a=b c",
        "steps": 5,
        "kind": "b",
        "middle": {"inner": {"rate": 0.002, "sizes": [1, 2]}, "flag": True},
        "x": {"y": False},
    }
    assert data == {"name": "n", "middle": {"inner": {"rate": 1.0}, "flag": True}}
    assert config.override(data, ["name=1", "name=2"])["name"] == 2


@pytest.mark.parametrize("item", ["steps", "=3", "name.deep=3"])
def test_override_of_another_form_is_refused(item: str) -> None:
    with pytest.raises(ConfigError, match=f"override {item!r}"):
        config.override({"name": "n"}, [item])


def test_an_unknown_override_is_an_unknown_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'middle.inner.rates'; the nearest known key is 'middle.inner.rate'"):
        config.load(Outer, write(tmp_path, 'name = "n"'), ["middle.inner.rates=1"])


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe", b'name = "a"\nname = "b"'], ids=["broken", "bytes", "twice"])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"broken\.toml: not valid TOML") as error:
        config.load(Outer, path)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match="no such recipe file") as error:
            config.load(Outer, path)
        assert str(path) in str(error.value)
