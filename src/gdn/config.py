"""Strict TOML to frozen dataclasses, `a.b=value` overrides, and back to TOML. Knows no particular configuration."""

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from gdn.errors import ConfigError

T = TypeVar("T")


def load(cls: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """Read the TOML file at `path`, apply `a.b=value` overrides and build the dataclass `cls`.

    Raises ConfigError for a missing file, broken TOML, an unknown key (naming the nearest), a missing key or a wrong type.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"{path}: no such recipe file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    return build(cls, override(data, overrides), str(path))


def override(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of `data` with each `a.b=value` set; the value is TOML, or a bare string where it is not."""
    result = _copy(data)
    for item in overrides:
        key, separator, text = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {item!r}: expected the form section.key=value")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        node = result
        *sections, last = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {item!r}: {section!r} is a value, not a section")
        node[last] = value
    return result


def build(cls: type[T], data: Mapping[str, Any], where: str, prefix: str = "") -> T:
    """Build the dataclass `cls` from `data`, checking every key and type; `where` names the source in errors."""
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)
            raise ConfigError(f"{where}: unknown key {prefix + key!r}; the nearest known key is {prefix + near[0]!r}")
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _convert(data[name], hints[name], where, prefix + name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: key {prefix + name!r} is missing")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as nested plain dicts, without keys whose value is None (TOML has no null)."""
    result: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            result[field.name] = to_dict(value)
        elif value is not None:
            result[field.name] = list(value) if isinstance(value, tuple) else value
    return result


def dump(config: Any) -> str:
    """The dataclass as TOML text that `load` reads back to an equal object."""
    return _dump_table(to_dict(config), "")


def _dump_table(table: Mapping[str, Any], name: str) -> str:
    lines = [f"[{name}]"] if name else []
    lines += [f"{key} = {_dump_value(value)}" for key, value in table.items() if not isinstance(value, dict)]
    text = "\n".join(lines) + "\n"
    for key, value in table.items():
        if isinstance(value, dict):
            text += "\n" + _dump_table(value, f"{name}.{key}" if name else key)
    return text


def _dump_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes, and the one TOML adds
    if isinstance(value, list):
        return "[" + ", ".join(_dump_value(item) for item in value) + "]"
    return repr(value)


def _copy(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in data.items()}


def _convert(value: Any, hint: Any, where: str, key: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(value, next(arg for arg in args if arg is not type(None)), where, key)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}: {key} = {value!r}; expected one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _wrong_type(where, key, value, "a list")
        variadic = len(args) == 2 and args[1] is Ellipsis
        if not variadic and len(value) != len(args):
            raise ConfigError(f"{where}: {key} = {value!r}; expected a list of {len(args)} values")
        inner = [args[0]] * len(value) if variadic else args
        return tuple(_convert(item, one, where, f"{key}[{i}]") for i, (item, one) in enumerate(zip(value, inner)))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise _wrong_type(where, key, value, "a section")
        return build(hint, value, where, f"{key}.")  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise _wrong_type(
            where, key, value, {int: "an integer", float: "a number", str: "a string", bool: "true or false"}[hint]
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: {key} = {value!r}; expected a finite number")
    return value


def _wrong_type(where: str, key: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"{where}: {key} = {value!r} ({type(value).__name__}); expected {expected}")
