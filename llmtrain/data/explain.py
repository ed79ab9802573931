"""Why a document stayed or went: the functions behind `llmtrain data explain`.

What they look at was written by the run: the verdict of every document, its signals, the bounds in force, the
text that was kept of it. Nothing is measured again. A document is named by the hex digits of its id, as the
report, the lineage of a shard and `llmtrain data trace` show it; so many of the first ones as are needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmtrain.data.dedup.line_text import remove_spans, spans_of_rows
from llmtrain.data.dedup.lines import read_removals
from llmtrain.data.docs import cut_file
from llmtrain.data.facts import FACTS_NAME
from llmtrain.data.filters.chain import RULES, value
from llmtrain.data.filters.config import RulesConfig
from llmtrain.data.filters.rule import Bound, Rule
from llmtrain.data.trace import OutputFormat
from llmtrain.data.verdicts import PARTS
from llmtrain.errors import ConfigError, DataError
from llmtrain.files import read_json

ID_LETTERS = 32
NUM_MATCHES_SHOWN = 10
NUM_OTHERS_SHOWN = 20
"""Members of a cluster that are named."""
CLUSTERS = {"duplicate": "exact", "near_duplicate": "near"}
"""Reasons that name a survivor, and what the members of such a cluster have in common."""


@dataclass(kw_only=True)
class ExplainConfig:
    """Which document to explain."""

    folder: str
    """The data folder."""
    id: str
    """Its id in hex, or the first digits."""
    text_chars: int = 2000
    """Characters of its text to show; 0 shows none."""
    format: OutputFormat = OutputFormat.text

    def __post_init__(self) -> None:
        self.id = self.id.lower().removeprefix("0x")
        if not re.fullmatch(f"[0-9a-f]{{1,{ID_LETTERS}}}", self.id):
            raise ConfigError(
                f"id={self.id!r} must be 1 to {ID_LETTERS} hex digits, as the report shows them; digits "
                "that look like a number, as 12e4, need quotes: id=\"'12e4'\""
            )
        if self.text_chars < 0:
            raise ConfigError(f"text_chars={self.text_chars} must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class Match:
    """A document that was looked for."""

    verdict: str
    """`train`, `held_out` or `dropped`: the table that it stands in."""
    row: dict[str, Any]
    """Its row there; `id` and `content` as hex."""


@dataclass(frozen=True, kw_only=True)
class RuleVerdict:
    """What one rule says of a document."""

    reason: str
    setting: str
    formula: str
    asks: str
    """`at least`, `at most` or `one of`."""
    bound: Any
    """None: the rule is off."""
    value: float | str | None
    """None: its signals were not measured, or it is no number."""
    verdict: str
    """`keeps`, `drops`, `off` or `not measured`."""
    is_reason: bool
    """Whether the document was dropped for it: the first that drops is the reason."""
    source: str


@dataclass(frozen=True, kw_only=True)
class Relative:
    """A document of the same cluster."""

    id: str
    verdict: str
    """`train`, `held_out`, `dropped` or `of an earlier run`."""
    path: str
    record: int | None
    reason: str | None = None
    """For which it was dropped. A survivor may be dropped, too, by a later step."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Documents that were found to be duplicates of each other, the explained one among them."""

    kind: str
    """`exact`, `near`, ..."""
    size: int
    survivor: Relative
    """The one that stayed when the others were dropped."""
    others: list[Relative]
    """Up to NUM_OTHERS_SHOWN of the rest, without the explained one."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """All that a run knows of one document."""

    id: str
    content: str | None
    """Hash of its text."""
    source: str
    path: str
    record: int
    """1-based number of the record in its file."""
    text_bytes: int
    verdict: str
    """`train`, `held_out` or `dropped`."""
    reason: str | None
    """For which it was dropped."""
    signals: dict[str, int | float | str | bool | None]
    rules: list[RuleVerdict]
    clusters: list[Cluster] = field(default_factory=list)
    edits: dict[str, Any] | None = None
    """Lines and bytes cut out of it, by reason: line edits before the rules, and `repeated_lines` after
    them. None: the run had neither."""
    pii: dict[str, int] | None = None
    """Places masked in it, by kind; None: not recorded."""
    evaluation_items: list[dict[str, Any]] = field(default_factory=list)
    """Items that share n-grams with it: `set`, `id`, `ngrams` shared, `of` so many that the item has. Up to
    NUM_OTHERS_SHOWN."""
    url: str | None = None
    metadata: dict[str, str] | None = None
    text: str | None = None
    """Its beginning: of a kept document as training reads it, of a dropped one as the rules saw it."""
    text_is_whole: bool = False


def explain(cfg: ExplainConfig) -> Explanation:
    """Look a document up in a data folder.

    Raises:
        DataError: no document has this id, or several have; no facts, or files that it stands on are gone.
    """
    folder = Path(cfg.folder)
    facts = _facts(folder)
    scan_key, verdicts = facts["folders"]["scan"], folder / "verdicts" / facts["folders"]["verdicts"]
    tables = verdict_tables(verdicts)
    match = find_document(cfg.id, tables)
    unit, row = int(match.row["unit"]), int(match.row["row"])
    signals = read_row(folder / "signals" / scan_key / f"unit-{unit:05d}.arrow", row)
    document = read_row(folder / "docs" / scan_key / f"unit-{unit:05d}.arrow", row)
    left, cut = _without_cuts(verdicts / "cuts", unit, row, document["text"])
    edits = _edits(signals)
    if cut is not None:
        edits = (edits or {}) | ({"repeated_lines": cut} if cut["lines"] else {})
    return explanation(
        match,
        {name: item for name, item in signals.items() if name not in match.row and name != "slice"},
        rules_of(facts["rules"]),
        clusters=related(match, tables),
        edits=edits,
        pii=_masked(signals),
        evaluation_items=_evaluation_items(verdicts, match.row["id"])
        if signals.get("num_contaminated_ngrams")
        else [],
        text=document["text"] if match.row["reason"] else left,
        url=document.get("url"),
        metadata=dict(document.get("metadata") or []),
        text_chars=cfg.text_chars,
    )


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / FACTS_NAME
    try:
        facts: dict[str, Any] = read_json(path)
        assert {"folders", "rules"} <= facts.keys()
    except (OSError, ValueError, AssertionError) as error:
        raise DataError(
            f"{path} is missing or does not say which folders the last run wrote ({error}); run "
            "`llmtrain data` to its end"
        ) from error
    return facts


def _edits(signals: Mapping[str, Any]) -> dict[str, Any] | None:
    """Lines and bytes that the line edits took, by reason; None without edits."""
    reasons = [
        name.removesuffix("_bytes")
        for name in signals
        if name.startswith("removed_") and name.endswith("_bytes")
    ]
    if not reasons:
        return None
    return {
        name.removeprefix("removed_"): {"lines": signals[f"{name}_lines"], "bytes": signals[f"{name}_bytes"]}
        for name in reasons
        if signals[f"{name}_lines"]
    }


def _masked(signals: Mapping[str, Any]) -> dict[str, int] | None:
    """Places masked, by kind; None where nothing is looked for."""
    found = {
        name.removeprefix("num_pii_"): int(item)
        for name, item in signals.items()
        if name.startswith("num_pii_")
    }
    return {kind: count for kind, count in found.items() if count} if found else None


def _without_cuts(cuts: Path, unit: int, row: int, text: bytes) -> tuple[bytes, dict[str, int] | None]:
    """The text without the lines that deduplication cut, and how many lines and bytes those are; None where
    it did not look."""
    path = cut_file(cuts, unit)
    if not path.is_file():
        return text, None
    spans = spans_of_rows(read_removals(path), np.array([row], dtype=np.int64))
    whole = np.frombuffer(bytearray(text), dtype=np.uint8)
    left = remove_spans(whole, np.array([0, len(text)], dtype=np.int64), spans)[0].tobytes()
    return left, {"lines": len(spans), "bytes": len(text) - len(left)}


def _evaluation_items(verdicts: Path, document: str) -> list[dict[str, Any]]:
    """Evaluation items that share n-grams with a document, those with most first, as far as the run listed
    their documents."""
    path = verdicts / "decontamination.json"
    if not path.is_file():
        return []
    found = [
        {"set": item["set"], "id": item["id"], "ngrams": each["ngrams"], "of": item["ngrams"]}
        for item in read_json(path)["items"]
        for each in item["documents"]
        if each["id"] == document
    ]
    return sorted(found, key=lambda item: -item["ngrams"])[:NUM_OTHERS_SHOWN]


def related(match: Match, tables: Sequence[tuple[str, pa.Table]]) -> list[Cluster]:
    """The clusters of equal and of similar texts that a document belongs to: the one that it was dropped for,
    and those that others were dropped for because of it.

    Args:
        tables: the verdict tables; the dropped ones name who stays for them.
    """
    wanted = [(match.row["id"], reason) for reason in CLUSTERS]
    if match.row.get("survivor"):
        wanted.insert(0, (match.row["survivor"], match.row["reason"]))
    found = [_cluster(survivor, reason, match, tables) for survivor, reason in wanted]
    return [cluster for cluster in found if cluster is not None]


def _cluster(
    survivor: str, reason: str, match: Match, tables: Sequence[tuple[str, pa.Table]]
) -> Cluster | None:
    """Those that were dropped for this reason because of `survivor`; None: nobody was."""
    [dropped] = [table for name, table in tables if name == "dropped"]
    rows = np.array(matching_rows(survivor, dropped, "survivor"), dtype=np.int64)
    reasons = np.array(dropped.column("reason").take(pa.array(rows)).to_pylist(), dtype=np.str_)
    rows = rows[reasons == reason]
    if not len(rows):
        return None
    members = [_match("dropped", dropped, row) for row in rows[: NUM_OTHERS_SHOWN + 1].tolist()]
    others = [_relative(member) for member in members if member.row["id"] != match.row["id"]]
    stays = [_match(name, table, row) for name, table in tables for row in matching_rows(survivor, table)]
    return Cluster(
        kind=CLUSTERS.get(reason, reason),
        size=int(members[0].row["cluster_size"]),
        survivor=_relative(stays[0])
        if stays
        else Relative(id=survivor, verdict="of an earlier run", path="", record=None),
        others=others[:NUM_OTHERS_SHOWN],
    )


def explanation(
    match: Match,
    signals: Mapping[str, Any],
    rules: RulesConfig,
    *,
    clusters: Sequence[Cluster] = (),
    edits: dict[str, Any] | None = None,
    pii: dict[str, int] | None = None,
    evaluation_items: Sequence[dict[str, Any]] = (),
    text: bytes | None = None,
    url: str | None = None,
    metadata: dict[str, str] | None = None,
    text_chars: int = 2000,
) -> Explanation:
    """Put together what is known of a document."""
    row = match.row
    reason = row.get("reason") or None
    shown = None if text is None or not text_chars else text.decode(errors="replace")
    return Explanation(
        id=row["id"],
        content=row.get("content"),
        source=row["source"],
        path=row["path"],
        record=row["record"],
        url=url,
        metadata=metadata or None,
        text_bytes=row["text_bytes"],
        verdict=match.verdict,
        reason=reason,
        signals={name: _plain(item) for name, item in signals.items()},
        rules=rule_verdicts(signals, rules, reason),
        clusters=list(clusters),
        edits=edits,
        pii=pii,
        evaluation_items=list(evaluation_items),
        text=None if shown is None else shown[:text_chars],
        text_is_whole=shown is not None and len(shown) <= text_chars,
    )


def as_json(found: Explanation) -> dict[str, Any]:
    return asdict(found)


def find_document(prefix: str, tables: Iterable[tuple[str, pa.Table]]) -> Match:
    """The one document whose id begins with these hex digits.

    Args:
        prefix: lower case.
        tables: (name, table), each with a column `id` of 16 bytes.

    Raises:
        DataError: there is none, or there are several; these are listed.
    """
    found: list[Match] = []
    num_found = num_documents = 0
    for name, table in tables:
        num_documents += table.num_rows
        rows = matching_rows(prefix, table)
        num_found += len(rows)
        found += [_match(name, table, row) for row in rows[: NUM_MATCHES_SHOWN - len(found)]]
    if not found:
        raise DataError(
            f"no document with id {prefix} among {num_documents:,}. Ids stand in the report, in "
            "shards/*/*.docs.parquet and documents/*/*.parquet, and in what `llmtrain data trace` prints"
        )
    if num_found > 1:
        listed = "; ".join(f"{m.row['id']} ({m.row['path']}, record {m.row['record']})" for m in found)
        rest = f"; and {num_found - len(found):,} more" if num_found > len(found) else ""
        raise DataError(
            f"{num_found:,} documents have an id that begins with {prefix}: {listed}{rest}. Give more digits"
        )
    return found[0]


def matching_rows(prefix: str, table: pa.Table, column: str = "id") -> list[int]:
    """Rows whose id, or another column of 16 bytes, begins with these hex digits."""
    whole, half = bytes.fromhex(prefix[: len(prefix) // 2 * 2]), prefix[len(prefix) // 2 * 2 :]
    rows: list[int] = []
    before = 0
    for chunk in table.column(column).chunks:
        ids = _bytes_of(chunk)
        mask = (ids[:, : len(whole)] == np.frombuffer(whole, dtype=np.uint8)).all(axis=1)
        if half:
            mask &= ids[:, len(whole)] >> 4 == int(half, 16)
        rows += (np.flatnonzero(mask) + before).tolist()
        before += len(chunk)
    return rows


def rule_verdicts(signals: Mapping[str, Any], cfg: RulesConfig, reason: str | None) -> list[RuleVerdict]:
    """What every rule says, in their order.

    Args:
        signals: of one document, by name.
        reason: for which it was dropped.
    """
    return [_rule_verdict(rule, signals, getattr(cfg, rule.setting), reason) for rule in RULES]


def rules_of(settings: Mapping[str, Any]) -> RulesConfig:
    """The rules of a manifest's config. Settings that this version does not know are left out."""
    known = {item.name for item in fields(RulesConfig)}
    return RulesConfig(**{name: setting for name, setting in settings.items() if name in known})


def verdict_tables(folder: Path) -> list[tuple[str, pa.Table]]:
    """The tables of a verdicts folder, mapped into memory."""
    tables = []
    for name in PARTS:
        path = folder / f"{name}.arrow"
        if not path.is_file():
            raise DataError(f"{path} is missing; run `llmtrain data` again, which makes it anew")
        tables.append((name, pa.ipc.open_file(pa.memory_map(str(path))).read_all()))
    return tables


def read_row(path: Path, row: int) -> dict[str, Any]:
    """Row number `row` of an Arrow file, reading the one batch that holds it."""
    if not path.is_file():
        raise DataError(f"{path} is missing; run `llmtrain data` again, which makes it anew")
    with pa.memory_map(str(path)) as handle:
        reader = pa.ipc.open_file(handle)
        left = row
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            if left < batch.num_rows:
                found: dict[str, Any] = batch.slice(left, 1).to_pylist()[0]
                return found
            left -= batch.num_rows
    raise DataError(f"{path} has no row {row:,}; delete it, and run `llmtrain data` again")


def _rule_verdict(rule: Rule, signals: Mapping[str, Any], bound: Any, reason: str | None) -> RuleVerdict:
    is_measured = all(signals.get(name) is not None for name in rule.signals)
    shown: float | str | None = None
    drops = False
    if is_measured and rule.bound is Bound.one_of:
        shown = str(signals[rule.counted[0]])
        drops = bound is not None and shown not in bound
    elif is_measured:
        shown = float(value(rule, {name: np.array([signals[name]]) for name in rule.signals})[0])
        if bound is not None:
            drops = not (shown >= bound if rule.bound is Bound.at_least else shown <= bound)
    verdict = "off" if bound is None else "not measured" if not is_measured else "drops" if drops else "keeps"
    return RuleVerdict(
        reason=rule.reason,
        setting=f"rules.{rule.setting}",
        formula=rule.formula,
        asks=str(rule.bound),
        bound=bound,
        value=None if isinstance(shown, float) and not math.isfinite(shown) else shown,
        verdict=verdict,
        is_reason=rule.reason == reason,
        source=rule.source,
    )


def _match(name: str, table: pa.Table, row: int) -> Match:
    [values] = table.slice(row, 1).to_pylist()
    return Match(verdict=name, row={key: _plain(item) for key, item in values.items()})


def _relative(match: Match) -> Relative:
    row = match.row
    reason = row.get("reason") or None
    return Relative(
        id=row["id"], verdict=match.verdict, path=row["path"], record=row["record"], reason=reason
    )


def _plain(item: Any) -> Any:
    """As JSON has it; bytes as hex."""
    if isinstance(item, bytes):
        return item.hex()
    return item.item() if isinstance(item, np.generic) else item


def _bytes_of(chunk: Any) -> npt.NDArray[np.uint8]:
    """A chunk of a binary(16) column as [n, 16]."""
    if not len(chunk):
        return np.zeros((0, 16), dtype=np.uint8)
    raw = np.frombuffer(chunk.buffers()[1], dtype=np.uint8).reshape(-1, 16)
    return raw[chunk.offset : chunk.offset + len(chunk)]
