"""What came in, what was kept and what was dropped, by reason: one entry for each pass, and one for each
source in it. Sums of documents, bytes and, where they exist, tokens; every entry closes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Flow = dict[str, dict[str, Any]]
"""{source: {"in": counts, "kept": counts, "dropped": {reason: counts}}}"""


class FlowBuilder:
    """Sums of one unit, source by source."""

    def __init__(self, sources: list[str], source_of: npt.NDArray[np.int64]) -> None:
        """Args: the names; of each document, which name."""
        self._names = sources
        self._source_of = source_of
        self.flow: Flow = {name: {"in": {}, "kept": {}, "dropped": {}} for name in sources}

    def add(self, part: str, documents: npt.NDArray[Any] | None, **counts: npt.NDArray[Any]) -> None:
        """Add documents (a mask; None: none of them as a whole) and counts, one value a document.

        Args:
            part: `in`, `kept`, or a reason.
        """
        columns = dict(counts)
        if documents is not None:
            columns = {name: np.where(documents, values, 0) for name, values in counts.items()}
        columns["documents"] = np.zeros(len(self._source_of), np.int64) if documents is None else documents
        for name, values in columns.items():
            totals = np.zeros(len(self._names), dtype=np.int64)
            np.add.at(totals, self._source_of, values.astype(np.int64))
            for source, total in zip(self._names, totals.tolist(), strict=True):
                entry = self.flow[source]
                target = entry[part] if part in ("in", "kept") else entry["dropped"].setdefault(part, {})
                target[name] = target.get(name, 0) + total


def merged(flows: Iterable[Flow]) -> Flow:
    """The sum of several."""
    total: Flow = {}
    for flow in flows:
        for source, entry in flow.items():
            _add(total.setdefault(source, {"in": {}, "kept": {}, "dropped": {}}), entry)
    return total


def _add(into: dict[str, Any], entry: Mapping[str, Any]) -> None:
    for name, value in entry.items():
        if isinstance(value, Mapping):
            _add(into.setdefault(name, {}), value)
        else:
            into[name] = into.get(name, 0) + value


def funnel_entry(name: str, flow: Flow) -> dict[str, Any]:
    """The pass as the manifest shows it: totals, and the same by source. Reasons that dropped nothing are
    left out.

    Raises:
        AssertionError: something is unaccounted for.
    """
    sources = {source: _without_zeros(entry) for source, entry in sorted(flow.items())}
    total: dict[str, Any] = {"in": {}, "kept": {}, "dropped": {}}
    for source, entry in sources.items():
        check_closes({"pass": f"{name} of {source}", **entry})
        _add(total, entry)
    for part in ("in", "kept"):
        for count in ("documents", "bytes"):
            total[part].setdefault(count, 0)
    total["dropped"] = dict(sorted(total["dropped"].items()))
    return {"pass": name, **total, "sources": sources}


def _without_zeros(entry: dict[str, Any]) -> dict[str, Any]:
    dropped = {reason: counts for reason, counts in sorted(entry["dropped"].items()) if any(counts.values())}
    return {"in": entry["in"], "kept": entry["kept"], "dropped": dropped}


def check_closes(entry: Mapping[str, Any]) -> None:
    """Assert that in = kept + dropped for everything that a pass of the funnel counts."""
    for name, total in entry["in"].items():
        rest = entry["kept"].get(name, 0) + sum(drop.get(name, 0) for drop in entry["dropped"].values())
        assert total == rest, f"{entry['pass']}: {total} {name} came in, {rest} are accounted for: {entry}"
