"""Fields of a record by name, nested ones as `outer.inner`, and their values as text."""

from __future__ import annotations

from typing import Any

import orjson

from llmtrain.data.document import utf8

MISSING = object()
"""What `find` returns for a field that is not there; a field that holds null is None."""


def find(value: dict[str, Any], name: str) -> Any:
    """The value of a field: `a.b` is the field of that name, else field b of what a holds."""
    if name in value:
        return value[name]
    inner: Any = value
    for part in name.split("."):
        if not isinstance(inner, dict) or part not in inner:
            return MISSING
        inner = inner[part]
    return inner


def as_text(value: Any) -> str | None:
    """Text as it is; numbers, truths, lists and objects as JSON, other things (a date, a decimal) as Python
    writes them; None for what is missing or null."""
    if value is MISSING or value is None:
        return None
    if isinstance(value, str):
        return utf8(value)
    if isinstance(value, bool | int | float | list | dict):
        try:
            return orjson.dumps(value).decode()
        except orjson.JSONEncodeError:  # an integer beyond 64 bits, half a surrogate pair, nested too deep
            pass
    try:
        return utf8(str(value))
    except (RecursionError, ValueError) as error:  # nested deeper still, an integer of 4300 digits
        return f"({error})"
