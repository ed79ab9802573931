"""The bars and tables of a data folder's report, as plain values that the template only lays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmtrain.units import format_bytes, format_count, format_duration

SMALL_SHARE = 0.001
"""Reasons that dropped less than this of both text and documents share one row of the funnel."""
FEW = 3
"""So many small reasons keep rows of their own."""
NUM_REASONS_NAMED = 3
"""Of a source."""
NUM_LANGUAGES_SHOWN = 15


@dataclass(frozen=True)
class Piece:
    """A part of a bar, from `begin` to `end` as shares of its length."""

    style: str
    begin: float
    end: float
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class FunnelRow:
    """One step of the funnel: a bar of text and one of documents, and the figures."""

    label: str
    style: str
    """`in`, `dropped`, `cut` (out of documents that stay), `left` or `kept`."""
    by_bytes: Piece
    by_documents: Piece
    share: str
    """Of the text that was read."""
    document_share: str
    text: str
    documents: str
    tokens: str
    parts: tuple[str, ...] = ()
    """What a row of many small reasons holds."""


@dataclass(frozen=True, kw_only=True)
class SourceRow:
    name: str
    pieces: list[Piece]
    """Of the source's own text: kept, dropped with its document, cut out of documents."""
    kept_share: str
    text: str
    documents: str
    duplicates: str
    tokens: str
    reasons: str


@dataclass(frozen=True, kw_only=True)
class Share:
    """A bar with two parts, on one scale for all rows."""

    label: str
    pieces: list[Piece]
    share: str
    figures: list[str]


@dataclass(frozen=True, kw_only=True)
class ClusterRow:
    size: str
    clusters: str
    removed: str
    end: float
    """Length of the bar of removed documents."""


@dataclass(frozen=True, kw_only=True)
class StageRow:
    name: str
    end: float
    time: str
    share: str
    speed: str
    documents: str


def funnel_rows(passes: Sequence[Mapping[str, Any]], bytes_per_token: float | None) -> list[FunnelRow]:
    """Steps from all that was read to what was kept; each dropped part begins where the last one ended.

    Tokens are counted where there are any, and else estimated from the bytes, with a sign of that.
    """
    if not passes or not passes[0]["in"].get("bytes"):
        return []
    read = passes[0]["in"]
    left = {"bytes": float(read["bytes"]), "documents": float(read.get("documents", 0))}

    def row(
        label: str, style: str, counts: Mapping[str, Any], begin: Mapping[str, float], **more: Any
    ) -> FunnelRow:
        pieces = {}
        for measure in ("bytes", "documents"):
            whole = max(float(read.get(measure, 0)), 1.0)
            start = begin[measure] - counts.get(measure, 0) if style in ("dropped", "cut") else 0.0
            pieces[measure] = Piece(style, start / whole, (start + counts.get(measure, 0)) / whole)
        tokens = "–"
        if "tokens" in counts:
            tokens = format_count(counts["tokens"])
        elif bytes_per_token:
            tokens = f"≈{format_count(round(counts.get('bytes', 0) / bytes_per_token))}"
        return FunnelRow(
            label=label,
            style=style,
            by_bytes=pieces["bytes"],
            by_documents=pieces["documents"],
            share=percent(counts.get("bytes", 0), read["bytes"]),
            document_share=percent(counts.get("documents", 0), read.get("documents", 0))
            if style != "cut"
            else "–",
            text=format_bytes(counts.get("bytes", 0)),
            documents=f"{counts.get('documents', 0):,}" if style != "cut" else "–",
            tokens=tokens,
            **more,
        )

    rows = [row("read", "in", read, left)]
    for number, entry in enumerate(passes):
        named, small = _split_small(entry.get("dropped") or {}, read)
        steps: list[tuple[str, Mapping[str, Any], tuple[str, ...]]] = [
            (words(reason), counts, ()) for reason, counts in named
        ]
        if small:
            total = {m: sum(counts.get(m, 0) for _, counts in small) for m in ("bytes", "documents")}
            parts = tuple(
                f"{words(reason)}: "
                + (f"{counted(counts['documents'], 'document')}, " if counts.get("documents") else "")
                + format_bytes(counts.get("bytes", 0))
                for reason, counts in small
            )
            steps.append((f"{len(small)} smaller reasons", total, parts))
        for label, counts, parts in steps:
            is_cut = not counts.get("documents") and bool(counts.get("bytes"))
            rows.append(row(label, "cut" if is_cut else "dropped", counts, left, parts=parts))
            left = {measure: left[measure] - counts.get(measure, 0) for measure in left}
        if steps and any(later.get("dropped") for later in passes[number + 1 :]):
            rows.append(row(f"left after {entry['pass']}", "left", entry["kept"], left))
    return [*rows, row("kept", "kept", passes[-1]["kept"], left)]


def text_of(source: Mapping[str, Any]) -> int:
    """Bytes of a source as they were read; of an older facts.json, as the rules met them."""
    return int(source.get("read_bytes", source["bytes"]))


def kept_text_of(source: Mapping[str, Any]) -> int:
    """Bytes of a source that are left in the end."""
    return int(source.get("left_bytes", source["kept"]["bytes"]))


def _split_small(
    dropped: Mapping[str, Mapping[str, Any]], read: Mapping[str, Any]
) -> tuple[list[tuple[str, Mapping[str, Any]]], list[tuple[str, Mapping[str, Any]]]]:
    ordered = sorted(dropped.items(), key=lambda item: (-item[1].get("bytes", 0), item[0]))
    small = [
        (reason, counts)
        for reason, counts in ordered
        if counts.get("bytes", 0) < SMALL_SHARE * read["bytes"]
        and counts.get("documents", 0) < SMALL_SHARE * read.get("documents", 0)
    ]
    if len(small) <= FEW:
        return ordered, []
    names = {reason for reason, _ in small}
    return [item for item in ordered if item[0] not in names], small


def source_rows(sources: Sequence[Mapping[str, Any]]) -> list[SourceRow]:
    """A row for each source, with what became of its text."""
    rows = []
    for source in sources:
        whole = max(text_of(source), 1)
        left = kept_text_of(source)
        gone = source["bytes"] - source["kept"]["bytes"]
        kept, dropped = left / whole, (left + gone) / whole
        reasons = {reason: counts["bytes"] for reason, counts in source["dropped"].items()}
        reasons["cut out of documents"] = whole - left - gone
        named = [
            f"{words(reason)} {percent(size, whole)}"
            for reason, size in sorted(reasons.items(), key=lambda item: -item[1])
            if size > 0
        ]
        rest = len(named) - NUM_REASONS_NAMED
        named = [*named[:NUM_REASONS_NAMED], f"{rest} more"] if rest > 0 else named
        name = source["source"]
        rows.append(
            SourceRow(
                name=name if name is not None else f"{source.get('num_names', 0):,} smaller sources",
                pieces=[
                    Piece("kept", 0.0, kept),
                    Piece("dropped", kept, dropped),
                    Piece("cut", dropped, 1.0 if whole > left + gone else dropped),
                ],
                kept_share=percent(left, whole),
                text=format_bytes(text_of(source)),
                documents=f"{source['documents']:,}",
                duplicates=f"{source['duplicates']:,}" if "duplicates" in source else "–",
                tokens=format_count(source["tokens"]) if "tokens" in source else "–",
                reasons=", ".join(named) or "nothing dropped",
            )
        )
    return rows


def share_rows(rows: Sequence[Mapping[str, Any]], name: str) -> list[Share]:
    """Documents by name, kept and dropped, against those of all names; the smallest names share a row."""
    total = sum(row["documents"] for row in rows)
    longest = max((row["documents"] for row in rows), default=0)
    ordered = sorted(rows, key=lambda row: (-row["documents"], str(row[name])))
    shown: list[tuple[str, int, int, int]] = [
        (str(row[name]), row["documents"], row["kept"]["documents"], row["bytes"]) for row in ordered
    ]
    if len(shown) > NUM_LANGUAGES_SHOWN + 1:
        rest = shown[NUM_LANGUAGES_SHOWN:]
        documents, kept, size = (sum(column) for column in zip(*(item[1:] for item in rest), strict=True))
        shown = [*shown[:NUM_LANGUAGES_SHOWN], (f"{len(rest)} others", documents, kept, size)]
        longest = max(longest, documents)
    return [
        Share(
            label=label,
            pieces=[
                Piece("kept", 0.0, kept / max(longest, 1)),
                Piece("dropped", kept / max(longest, 1), documents / max(longest, 1)),
            ],
            share=percent(documents, total),
            figures=[f"{documents:,}", percent(kept, documents), format_bytes(size)],
        )
        for label, documents, kept, size in shown
    ]


def cluster_rows(sizes: Sequence[Mapping[str, Any]]) -> list[ClusterRow]:
    most = max((row["removed"] for row in sizes), default=0)
    return [
        ClusterRow(
            size=f"{row['from']:,}" if row["from"] == row["to"] else f"{row['from']:,}–{row['to']:,}",
            clusters=f"{row['clusters']:,}",
            removed=f"{row['removed']:,}",
            end=row["removed"] / max(most, 1),
        )
        for row in sizes
    ]


def stage_rows(stages: Sequence[Mapping[str, Any]]) -> list[StageRow]:
    """Wall time of each stage, and its speed where it read text."""
    total, longest = sum(s["seconds"] for s in stages), max((s["seconds"] for s in stages), default=0.0)
    rows = []
    for stage in stages:
        seconds = max(stage["seconds"], 1e-9)
        speed = stage["bytes"] / 1e6 / seconds if stage.get("bytes") else None
        documents = stage["documents"] / seconds if stage.get("documents") else None
        rows.append(
            StageRow(
                name=words(stage["name"]),
                end=stage["seconds"] / max(longest, 1e-9),
                time=format_duration(stage["seconds"]),
                share=percent(stage["seconds"], total),
                speed="–" if speed is None else f"{speed:,.0f} MB/s" if speed >= 100 else f"{speed:.3g} MB/s",
                documents=f"{format_count(round(documents))}/s" if documents is not None else "–",
            )
        )
    return rows


def percent(part: float, whole: float) -> str:
    """'4.1%'; a part that is not nothing never shows as 0."""
    if not whole:
        return "–"
    share = part / whole
    return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def words(name: str) -> str:
    """A name of the code as people write it."""
    return name.replace("_", " ")
