"""Every setting of a run by the dotted name that a user types. Loads without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints

from llmtrain import files
from llmtrain.train.config import TrainRoot


@cache
def defaults() -> dict[str, Any]:
    """Name -> default, as plain values; None where the user must say. A list, a dictionary or a part that
    may be absent is one setting."""
    return dict(_settings(TrainRoot, ""))


def by_name(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config as plain dictionaries, by the names that `defaults` has. What is no setting of
    this llmtrain comes last, by its own dotted name."""
    named, rest = {}, files.flatten(dict(config))
    for name in defaults():
        found, value = _look_up(config, name)
        if found:
            named[name] = value
            rest = {other: kept for other, kept in rest.items() if not f"{other}.".startswith(f"{name}.")}
    return named | rest


def value_of(config: Mapping[str, Any], name: str) -> Any:
    """Of one setting.

    Raises:
        KeyError: the config does not have it.
    """
    found, value = _look_up(config, name)
    if not found:
        raise KeyError(name)
    return value


def _look_up(config: Mapping[str, Any], name: str) -> tuple[bool, Any]:
    value: Any = config
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False, None
        value = value[part]
    return True, value


def _settings(owner: type, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(owner)
    for field in fields(owner):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _settings(hint, f"{name}.")
        elif field.default_factory is not MISSING:
            yield name, files.plain(field.default_factory())
        else:
            yield name, None if field.default is MISSING else files.plain(field.default)
