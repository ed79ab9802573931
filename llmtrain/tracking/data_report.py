"""report.html of a data folder: what came in, what was dropped and why, for someone who has a minute.

Reads `facts.json`, which the last run wrote, and what lists its output: `manifest.json` where it ended with
shards, `documents.json` where it ended with documents. Each panel is a function from them to plain values
that the template lays out; a panel without data is left out, or says what is missing.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llmtrain.data.manifest import MANIFEST_NAME, Manifest, ShardEntry, read_manifest
from llmtrain.errors import DataError
from llmtrain.files import atomic_write, read_json
from llmtrain.tracking.data_tables import (
    ClusterRow,
    FunnelRow,
    Share,
    SourceRow,
    cluster_rows,
    counted,
    funnel_rows,
    kept_text_of,
    share_rows,
    source_rows,
    stage_rows,
    text_of,
    words,
)
from llmtrain.tracking.histograms import histogram_svg
from llmtrain.tracking.report import Finding, Tile, plural, template
from llmtrain.tracking.report_tables import clock
from llmtrain.units import format_bytes, format_count, format_duration

FACTS_NAME = "facts.json"
DOCUMENTS_NAME = "documents.json"
SKIPPED = ("http_status", "no_text", "not_a_page", "not_text")
"""Reasons of records that are whole and yet no documents: most of a crawl."""
STATES = {
    "decide": "decided, no text written",
    "documents": "documents written",
    "pack": "prepared",
}
"""How far a run went, by `stop_after`."""
LARGE_SOURCE_LOSS = 0.9
"""Share of a source's text that may be dropped before the page warns; assumed, not measured."""
LARGE_SOURCE_SHARE = 0.01
"""Of all text: smaller sources are not warned of."""
NUM_PAIRS_SHOWN = 8
"""Near-duplicate pairs, of those accepted and of those rejected."""
NUM_SOURCES_OPEN = 15
"""The others are folded."""


@dataclass(frozen=True, kw_only=True)
class DataRun:
    """What a data folder tells."""

    folder: Path
    manifest: Manifest | None
    """None: the last run ended before there were shards."""
    facts: dict[str, Any] = field(default_factory=dict)
    documents: list[dict[str, Any]] = field(default_factory=list)
    """Parquet files of kept documents, where the last run ended with them."""
    facts_note: str = ""
    """What is wrong with the facts."""

    def told(self, name: str) -> Any:
        """What the manifest says under this name, or else the facts."""
        return getattr(self.manifest, name) if self.manifest is not None else self.facts.get(name)

    @property
    def state(self) -> str:
        return STATES.get(self.facts.get("stop_after", "pack"), STATES["pack"])

    @property
    def shards(self) -> Sequence[ShardEntry]:
        return [] if self.manifest is None else self.manifest.shards

    @property
    def text_passes(self) -> list[dict[str, Any]]:
        """Entries of the funnel that count bytes: from reading to tokens."""
        return [entry for entry in self.told("funnel") or [] if "bytes" in entry["in"]]

    @property
    def read(self) -> dict[str, int]:
        passes = self.text_passes
        return dict(passes[0]["in"]) if passes else {"documents": 0, "bytes": 0}

    @property
    def kept(self) -> dict[str, int]:
        passes = self.text_passes
        return dict(passes[-1]["kept"]) if passes else {"documents": 0, "bytes": 0}

    @property
    def num_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def bytes_per_token(self) -> float | None:
        """Of the text that was kept."""
        return self.kept["bytes"] / self.num_tokens if self.num_tokens else None

    def dropped(self) -> Iterator[tuple[str, str, dict[str, int]]]:
        """(pass, reason, counts) of everything that went."""
        for entry in self.text_passes:
            for reason, counts in (entry.get("dropped") or {}).items():
                yield entry["pass"], reason, counts


def is_data_folder(folder: Path) -> bool:
    """Whether `llmtrain data` wrote into the folder."""
    return any((folder / name).is_file() for name in (MANIFEST_NAME, FACTS_NAME))


def read_data_run(folder: Path) -> DataRun:
    """Read the facts of a data folder, and its manifest if the last run wrote one.

    Raises:
        DataError: neither, facts that are not JSON, or a folder of imported tokens.
    """
    path = folder / FACTS_NAME
    if not path.is_file():
        manifest = read_manifest(folder)
        if manifest.funnel and manifest.funnel[0]["pass"] == "import":
            raise DataError(
                f"{folder} was imported as tokens, so there is no text to report on; `llmtrain inspect "
                f"shards folder={folder}` shows what it holds"
            )
        note = f"{FACTS_NAME} is missing: only the manifest's figures are shown. `llmtrain data` writes it."
        return DataRun(folder=folder, manifest=manifest, facts_note=note)
    try:
        facts = dict(read_json(path))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{path} is damaged ({error!r}); delete it, and run `llmtrain data` again to have it back"
        ) from error
    stop_after = facts.get("stop_after", "pack")
    if stop_after == "pack":
        manifest = read_manifest(folder)
        is_of_another = facts.get("funnel", manifest.funnel) != manifest.funnel
        note = (
            f"{FACTS_NAME} and {MANIFEST_NAME} are of different runs, and figures of both are shown. Run "
            "`llmtrain data` again, to its end."
        )
        return DataRun(
            folder=folder, manifest=manifest, facts=facts, facts_note=note if is_of_another else ""
        )
    documents: list[dict[str, Any]] = []  # a manifest of an earlier run may lie there: it is not looked at
    if stop_after == "documents" and (folder / DOCUMENTS_NAME).is_file():
        documents = read_json(folder / DOCUMENTS_NAME)["files"]
    return DataRun(folder=folder, manifest=None, facts=facts, documents=documents)


def write_data_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of a data folder to `out` (None: report.html in it) and return its path."""
    path = folder / "report.html" if out is None else out
    page = render_data(read_data_run(folder))
    with atomic_write(path, "w") as handle:
        handle.write(page)
    return path


def render_data(run: DataRun) -> str:
    """The whole page as text."""
    facts = run.facts
    with_bounds, without = histograms_of(run)
    sources = sources_of(run)
    return template("data_report.html.j2").render(
        run=run,
        name=run.told("corpus"),
        verdict=verdict_of(run),
        tiles=tiles_of(run),
        findings=list(findings_of(run)),
        funnel=funnel_of(run),
        has_tokens=run.num_tokens > 0,
        bytes_per_token=run.bytes_per_token,
        packs=pack_rows(run),
        fertility=fertility_rows(run.facts.get("fertility") or []),
        histograms=with_bounds,
        other_histograms=without,
        sources=sources[:NUM_SOURCES_OPEN],
        more_sources=sources[NUM_SOURCES_OPEN:],
        languages=languages_of(run),
        clusters=clusters_of(run),
        near_note=near_note(run),
        near_pairs=near_pairs(run),
        stages=stage_rows(facts.get("stages") or []),
        stages_count_documents=any("documents" in stage for stage in facts.get("stages") or []),
        counts=count_tables(run),
        decontamination=facts.get("decontamination") or [],
        samples=samples_of(run),
        config_text=yaml.safe_dump(run.told("config"), sort_keys=True, allow_unicode=True),
        versions=sorted((run.told("versions") or {}).items()),
        written=clock(time.time()),
    )


def verdict_of(run: DataRun) -> str:
    """One or two sentences that say what came out."""
    read, kept = run.read, run.kept
    if not read["bytes"]:
        return "There is no funnel."
    first = (
        f"Of {counted(read['documents'], 'document')} with {format_bytes(read['bytes'])} of text, "
        f"{kept['documents']:,} with {format_bytes(kept['bytes'])} ({_share(kept, read, 'bytes')}) stayed"
    )
    splits = [
        f"{format_count(tokens)} tokens {'held out' if split == 'held_out' else 'to train on'}"
        for split in ("train", "held_out")
        if (tokens := sum(shard.num_tokens for shard in run.shards if shard.split == split))
    ] or [
        f"{counts['documents']:,} {'held out' if split == 'held_out' else 'to train on'}"
        for entry in run.text_passes
        for split, counts in sorted((entry.get("splits") or {}).items(), reverse=True)
    ]
    return f"{first}: {' and '.join(splits)}." if splits else f"{first}."


def tiles_of(run: DataRun) -> list[Tile]:
    """The figures that are asked for first."""
    read, kept = run.read, run.kept
    tiles = [
        Tile(
            name="Documents kept",
            value=format_count(kept["documents"]),
            note=f"of {format_count(read['documents'])} read, {_share(kept, read, 'documents')}",
        ),
        Tile(
            name="Text kept",
            value=format_bytes(kept["bytes"]),
            note=f"of {format_bytes(read['bytes'])} read, {_share(kept, read, 'bytes')}",
        ),
    ]
    if run.bytes_per_token:
        tiles.append(
            Tile(
                name="Tokens",
                value=format_count(run.num_tokens),
                note=f"{run.bytes_per_token:.2f} bytes a token",
            )
        )
    sources = run.facts.get("sources") or []
    if sources and all("duplicates" in row for row in sources):
        removed, total = (sum(row[name] for row in sources) for name in ("duplicates", "documents"))
        tiles.append(
            Tile(
                name="Duplicates removed",
                value=format_count(removed),
                note=f"{removed / max(total, 1):.1%} of the documents scanned",
            )
        )
    if stages := run.facts.get("stages"):
        seconds, longest = sum(s["seconds"] for s in stages), max(stages, key=lambda s: s["seconds"])
        tiles.append(
            Tile(
                name="Time",
                value=format_duration(seconds),
                note=f"{longest['seconds'] / max(seconds, 1e-9):.0%} of it {words(longest['name'])}",
            )
        )
    if run.manifest is not None:
        tiles.append(
            Tile(
                name="Shards",
                value=str(len(run.shards)),
                note=f"vocabulary of {run.manifest.tokenizer.vocab_size:,}, {run.manifest.dtype}",
            )
        )
    if run.documents:
        size = sum(file["num_bytes"] for file in run.documents)
        tiles.append(
            Tile(name="Parquet files", value=str(len(run.documents)), note=f"{format_bytes(size)} in all")
        )
    return tiles


def _share(part: Mapping[str, int], whole: Mapping[str, int], measure: str) -> str:
    return f"{part[measure] / whole[measure]:.1%}" if whole[measure] else "–"


def findings_of(run: DataRun) -> Iterator[Finding]:
    """What a careful reader of the figures would say."""
    if run.facts_note:
        yield Finding("warn", run.facts_note)
    read = run.read
    largest = sorted(run.dropped(), key=lambda item: -item[2].get("bytes", 0))[:3]
    if largest and read["bytes"]:
        named = ", ".join(
            f"{words(reason)} ({counts.get('bytes', 0) / read['bytes']:.1%})" for _, reason, counts in largest
        )
        yield Finding("info", f"Most text went to: {named} of what was read.")
    sources = run.facts.get("sources") or []
    large = LARGE_SOURCE_SHARE * sum(text_of(row) for row in sources)
    for row in sources:
        if row["source"] is not None and (text := text_of(row)) and text >= large:
            lost = 1 - kept_text_of(row) / text
            if lost > LARGE_SOURCE_LOSS:
                yield Finding("warn", f"{lost:.1%} of the text of source {row['source']} did not stay.")
    yield from _checks_of(run)


def _checks_of(run: DataRun) -> Iterator[Finding]:
    reasons = (run.facts.get("quarantine") or {}).items()
    if bad := sum(counts["documents"] for reason, counts in reasons if reason not in SKIPPED):
        yield Finding("warn", f"{plural(bad, 'record')} could not be used and lie in the quarantine.")
    for entry in run.text_passes:
        checked, differing = entry.get("checked_documents"), entry.get("differing_documents")
        if checked:
            level = "bad" if differing else "good"
            yield Finding(
                level,
                f"Of {counted(checked, 'document')} encoded again by SentencePiece itself, "
                f"{differing or 'none'} {'differ' if differing and differing > 1 else 'differs'}.",
            )
    for row in run.facts.get("decontamination") or []:
        if row.get("items_found"):
            yield Finding(
                "warn",
                f"{row['items_found']:,} of {row['items']:,} items of {row['name']} share n-grams with the "
                f"corpus, {row['items_half_found']:,} of them half of theirs or more.",
            )


def funnel_of(run: DataRun) -> list[FunnelRow]:
    return funnel_rows(run.text_passes, run.bytes_per_token)


def pack_rows(run: DataRun) -> list[tuple[str, ...]]:
    """(split, row length, strategy, rows, padding, documents cut, tokens, targets)."""
    return [
        (
            words(pack.split),
            f"{pack.seq_len:,}",
            words(pack.strategy),
            f"{pack.num_rows:,}",
            f"{pack.num_padding / (pack.num_rows * pack.seq_len or 1):.2%}",
            f"{pack.num_cut_documents:,}",
            f"{sum(shard.num_tokens for shard in run.shards if shard.split == pack.split):,}",
            f"{pack.num_target_tokens:,}",
        )
        for pack in (run.told("packs") or [])
    ]


MAX_FERTILITY_ROWS = 24


def fertility_rows(rows: list[dict[str, Any]]) -> list[tuple[str, str, str, str, float]]:
    """(source and language, documents, bytes a token, share of fallback tokens, length of the bar), the most
    text first; past MAX_FERTILITY_ROWS the rest share a row."""
    measures = ("documents", "text_bytes", "num_tokens", "num_fallback_tokens")
    ordered = sorted(rows, key=lambda row: -row["text_bytes"])
    if len(ordered) > MAX_FERTILITY_ROWS:
        rest = ordered[MAX_FERTILITY_ROWS - 1 :]
        joined = {name: sum(row[name] for row in rest) for name in measures}
        ordered = [
            *ordered[: MAX_FERTILITY_ROWS - 1],
            {"source": f"{len(rest)} more", "language": None, **joined},
        ]
    best = max((row["text_bytes"] / row["num_tokens"] for row in ordered), default=1.0)
    return [
        (
            str(row["source"]) if row["language"] is None else f"{row['source']}, {row['language']}",
            f"{row['documents']:,}",
            f"{row['text_bytes'] / row['num_tokens']:.2f}",
            f"{row['num_fallback_tokens'] / row['num_tokens']:.2%}",
            row["text_bytes"] / row["num_tokens"] / best,
        )
        for row in ordered
    ]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A histogram with its head."""

    title: str
    notes: list[str]
    svg: str


def histograms_of(run: DataRun) -> tuple[list[Picture], list[Picture]]:
    """Histograms of what rules in force look at, and of the other signals."""
    dropped: dict[str, int] = {}
    for _, reason, counts in run.dropped():
        dropped[reason] = dropped.get(reason, 0) + counts.get("documents", 0)
    pictures: tuple[list[Picture], list[Picture]] = ([], [])
    for histogram in run.facts.get("histograms") or []:
        svg = histogram_svg(histogram)
        notes = [
            f"{bound['setting']} = {bound['value']:.10g}: {dropped.get(bound['reason'], 0):,} dropped"
            for bound in histogram["thresholds"]
        ]
        if undefined := histogram.get("undefined"):
            notes.append(f"{undefined['kept'] + undefined['dropped']:,} documents have no such value")
        if svg:
            title = str(histogram["title"])
            shown = Picture(title=title[:1].upper() + title[1:], notes=notes, svg=svg)
            pictures[0 if histogram["thresholds"] else 1].append(shown)
    return pictures


def sources_of(run: DataRun) -> list[SourceRow]:
    return source_rows(run.facts.get("sources") or [])


def languages_of(run: DataRun) -> list[Share]:
    return share_rows(run.facts.get("languages") or [], "language")


def clusters_of(run: DataRun) -> list[tuple[str, list[ClusterRow], list[dict[str, Any]]]]:
    """(kind, rows by size, examples)."""
    return [
        (words(kind), cluster_rows(found["sizes"]), found.get("examples") or [])
        for kind, found in (run.facts.get("duplicates") or {}).items()
        if found["sizes"]
    ]


def near_note(run: DataRun) -> str:
    """What the comparison of similar texts came to, in sentences; "" where there was none."""
    counts = (run.facts.get("near") or {}).get("counts")
    if not counts:
        return ""
    num = defaultdict(int, counts)
    compared = f"{counted(num['num_documents'], 'document')} compared by signatures"
    if not num["num_candidates"]:
        return f"{compared}: no two looked alike."
    found = (
        f"{compared}: "
        f"{counted(num['num_candidates'], 'pair')} looked alike, {num['num_accepted']:,} were accepted as "
        f"near-duplicates ({num['num_by_text']:,} were decided by the texts themselves)."
    )
    if num["num_boilerplate_keys"]:
        found += (
            f" {counted(num['num_boilerplate_keys'], 'band')} had more than dedup.near.max_key_documents "
            "documents, which were compared with one of them only."
        )
    if num["num_oversize_clusters"]:
        found += (
            f" In {counted(num['num_oversize_clusters'], 'cluster')} with more than dedup.near.max_cluster "
            f"documents, {counted(num['num_released'], 'document')} unlike the survivor stayed."
        )
    return found


@dataclass(frozen=True, kw_only=True)
class PairRow:
    """Two texts that were compared."""

    likeness: str
    documents: list[Mapping[str, Any]]


def near_pairs(run: DataRun) -> list[tuple[str, str, str, list[PairRow]]]:
    """(title, style, note, pairs) of a sample of accepted and of rejected pairs, the closest calls first."""
    near = run.facts.get("near") or {}
    groups = []
    for kind, style in (("accepted", "dropped"), ("rejected", "kept")):
        pairs = sorted(near.get(kind) or [], key=_likeness, reverse=kind == "rejected")
        rows = [_pair_row(pair) for pair in pairs[:NUM_PAIRS_SHOWN]]
        title = f"{counted(len(rows), 'pair')} {kind}"
        note = f"Of a sample of {len(pairs):,}, those nearest to the threshold." if rows else ""
        groups.append((title, style, note, rows))
    return [group for group in groups if group[3]]


def _likeness(pair: Mapping[str, Any]) -> float:
    """What decided: the similarity of the texts where it was looked at."""
    similarity = pair.get("similarity")
    return float(pair["agreement"] if similarity is None else similarity)


def _pair_row(pair: Mapping[str, Any]) -> PairRow:
    likeness = f"signatures agree in {pair['agreement']:.1%}"
    if pair.get("similarity") is not None:
        likeness = f"similarity of the texts {pair['similarity']:.3f}, {likeness}"
    nameless = {"path": "document", "record": None, "source": None, "text": None}
    ids: list[Mapping[str, Any]] = [nameless | {"id": pair[name]} for name in ("document_id", "other_id")]
    return PairRow(likeness=likeness, documents=pair.get("documents") or ids)


def count_tables(run: DataRun) -> list[tuple[str, list[str], list[list[str]], str]]:
    """(title, heads, rows, note) of what was masked, edited out and put aside."""
    tables = []
    facts = run.facts
    if pii := facts.get("pii"):
        rows = [[words(kind), f"{count:,}"] for kind, count in _largest_first(pii)]
        tables.append(
            ("Personal data masked", ["kind", "places"], rows, "Placeholders stand in the text instead.")
        )
    if edits := facts.get("edits"):
        rows = [
            [words(reason), f"{counts.get('lines', 0):,}", format_bytes(counts.get("bytes", 0))]
            for reason, counts in _largest_first(edits)
        ]
        note = "Lines, or places in them, before the document was judged."
        tables.append(("Cut out of documents", ["by", "places", "text"], rows, note))
    if quarantine := facts.get("quarantine"):
        rows = [
            [words(reason), f"{counts['documents']:,}", format_bytes(counts["bytes"])]
            for reason, counts in _largest_first(quarantine)
        ]
        note = "Listed with path, record and detail in the folder's quarantine/."
        tables.append(("Records that are no documents", ["reason", "records", "size"], rows, note))
    return tables


def _largest_first(counts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    def size(value: Any) -> float:
        return float(value.get("bytes", 0) if isinstance(value, Mapping) else value)

    return sorted(counts.items(), key=lambda item: (-size(item[1]), item[0]))


def samples_of(run: DataRun) -> list[tuple[str, str, Sequence[Mapping[str, Any]]]]:
    """(title, style, samples): what stayed, then each reason, those that dropped most first."""
    samples = run.facts.get("samples")
    if not samples:
        return []
    totals: dict[str, dict[str, int]] = {}
    for _, reason, counts in run.dropped():
        totals[reason] = counts
    groups = [("Kept", "kept", samples.get("kept") or [])]
    by_size = sorted(
        (samples.get("dropped") or {}).items(),
        key=lambda item: -totals.get(item[0], {}).get("bytes", 0),
    )
    for reason, drawn in by_size:
        total = totals.get(reason, {}).get("documents")
        count = f": {counted(total, 'document')}" if total else ""
        groups.append((f"Dropped, {words(reason)}{count}", "dropped", drawn))
    return [group for group in groups if group[2]]
