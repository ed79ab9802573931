"""Pass 2: signals to verdicts. Every document is kept for one split, or dropped for one reason. No text is
read but that of near-duplicates close to the threshold.

    judge     a unit: the rules, from signals alone
    exact     a range of hashes: equal texts
    near      a range of band keys: texts that share most of their word 5-grams
    ngrams    a range of hashes: texts whose n-grams others hold
    lines     a range of hashes: lines that others hold go from the text
    draw      held-out documents, by the hash of their text
    finish    a unit: one row a document, with its verdict, and the sums

A pure function of the signals, so a changed threshold never reads input again. No step holds more than one
unit or one range: `dedup.partition_bytes` bounds them. The order of the reasons is fixed: empty, the rules in
the order of filters/chain.py, then the steps above.

`stages/` holds the rows of each unit after each step: a step copies them and marks what it drops. It goes
once the tables are there.
"""

from __future__ import annotations

import logging
import shutil
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmtrain import rng
from llmtrain.data.config import DataConfig, HeldOutConfig
from llmtrain.data.dedup.config import DedupConfig, Survivor
from llmtrain.data.dedup.exact import exact_duplicates, halves
from llmtrain.data.dedup.index import INDEX_NAME, previous_units, write_index
from llmtrain.data.dedup.line_text import remove_spans, spans_of_rows
from llmtrain.data.dedup.lines import line_duplicates, read_removals
from llmtrain.data.dedup.near import NearResult, near_duplicates
from llmtrain.data.dedup.ngrams import ngram_overlap
from llmtrain.data.dedup.standing import standings
from llmtrain.data.dedup.units import DOCUMENT, DedupUnit, RowWriter, read_units, write_units
from llmtrain.data.docs import StoredTexts
from llmtrain.data.engines.engine import Engine
from llmtrain.data.facts import FACTS_NAME, KEPT
from llmtrain.data.filters.chain import RULES, SETTING_OF_REASON, dropped_by
from llmtrain.data.filters.config import RulesConfig
from llmtrain.data.flow import Flow, FlowBuilder, funnel_entry, merged
from llmtrain.data.folder import key_of, read_done, write_done
from llmtrain.data.run_facts import LookUp, decontamination_report, facts_of_unit, joined, near_facts, save
from llmtrain.data.scan import UnitFiles, unit_files
from llmtrain.data.text.words import split_words
from llmtrain.data.verdicts import (
    PARTS,
    SPLITS,
    VERDICTS,
    Scanned,
    Verdicts,
    check_quarantine,
    collect_bad_records,
    digests,
    flat,
    join_parts,
)
from llmtrain.errors import DataError
from llmtrain.files import atomic_write, hash_file, hash_json, plain, read_json, write_json
from llmtrain.progress import progress

log = logging.getLogger(__name__)

DECIDE_VERSION = 5
"""Part of the folder's key: raise it when the same signals would give other verdicts."""
LATEST_NAME = "latest.json"
"""In `index/`: names the index that the last run wrote."""
ROWS_AT_ONCE = 4096
"""Texts in memory while lines are cut."""
OUTCOME = np.dtype([("num_bytes", "<i8"), ("reason", "<i2"), ("survivor", "<i8"), ("cluster_size", "<i4")])
"""What became of a document so far. `reason`: index into REASONS, or KEPT; `survivor`: the document that
stays for it, or -1. Lies beside the unit's DOCUMENT rows, in `outcome_file`."""
REASONS = (
    "empty",
    *(rule.reason for rule in RULES),
    "duplicate",
    "near_duplicate",
    "ngram_overlap",
    "mostly_duplicate_lines",
)


@dataclass(frozen=True, kw_only=True)
class JudgeTask:
    signals: Path
    num_rows: int | None
    """Documents of the unit that count; None: all. Fewer where a corpus is cut at max_text_bytes."""
    rules: RulesConfig
    survivor: Survivor
    sources: dict[str, int]
    """Numbers of the unit's sources."""
    target: Path


def judge_unit(task: JudgeTask) -> dict[str, Any]:
    """Apply the rules to one unit. Returns its documents, their sources and the flow of the scan."""
    done = task.target.with_suffix(".json")
    if (finished := read_done(done)) is not None:
        return finished
    with pa.memory_map(str(task.signals)) as handle:
        table = pa.ipc.open_file(handle).read_all().slice(0, task.num_rows)
        signals = signal_columns(table)
        names, source_of = sources_of(table)
        documents = np.zeros(table.num_rows, dtype=DOCUMENT)
        outcomes = np.zeros(table.num_rows, dtype=OUTCOME)
        outcomes["reason"], outcomes["survivor"], outcomes["num_bytes"] = KEPT, -1, signals["num_bytes"]
        for reason, mask in (
            ("empty", signals["edited_num_segments"] == 0),
            *dropped_by(signals, task.rules),
        ):
            number = REASONS.index(reason)
            outcomes["reason"][(outcomes["reason"] == KEPT) & mask] = number
        documents["alive"] = outcomes["reason"] == KEPT
        documents["rank"] = rank(signals, task.survivor)
        documents["id_high"], documents["id_low"] = halves(digests(table, "id"))
        documents["content_high"], documents["content_low"] = halves(digests(table, "content"))
        documents["source"] = np.array([task.sources[name] for name in names], dtype=np.int32)[source_of]
        flow = _scan_flow(names, source_of, signals)
    summary = {"num_documents": len(documents), "flow": flow}
    write_done(done, summary, save_state(task.target, documents, outcomes))
    return summary


def _scan_flow(
    names: list[str], source_of: npt.NDArray[np.int64], signals: Mapping[str, npt.NDArray[Any]]
) -> Flow:
    """Bytes that the scan read, removed and kept. Bad and skipped records come from its summaries."""
    builder = FlowBuilder(names, source_of)
    everything = np.ones(len(source_of), dtype=np.bool_)
    builder.add("in", everything, bytes=signals["raw_bytes"])
    builder.add("kept", everything, bytes=signals["num_bytes"])
    left = signals["raw_bytes"] - signals["clean_bytes"]
    builder.add("normalised_away", None, bytes=left)
    masked = signals["clean_bytes"] - signals["num_bytes"]
    for name, values in signals.items():
        if name.startswith("removed_") and name.endswith("_bytes"):
            builder.add(name.removeprefix("removed_").removesuffix("_bytes"), None, bytes=values)
            masked = masked - values
    builder.add("private_data_masked", None, bytes=masked)
    return builder.flow


def signal_columns(table: pa.Table) -> dict[str, npt.NDArray[Any]]:
    """Numbers by name, and `language` as text where it is there."""
    columns: dict[str, npt.NDArray[Any]] = {}
    for name in table.column_names:
        kind = table.schema.field(name).type
        if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
            columns[name] = table.column(name).to_numpy()
        elif name == "language":
            columns[name] = np.array(table.column(name).to_pylist(), dtype=np.str_)
    return columns


def sources_of(table: pa.Table) -> tuple[list[str], npt.NDArray[np.int64]]:
    """The names of the sources, and of each document, which."""
    coded = flat(table, "source").dictionary_encode()
    return coded.dictionary.to_pylist(), coded.indices.to_numpy().astype(np.int64)


def rank(signals: Mapping[str, npt.NDArray[Any]], survivor: Survivor) -> npt.NDArray[Any]:
    """What of several copies the one that stays has most of."""
    match survivor:
        case Survivor.smallest_id:
            return np.zeros(len(signals["num_bytes"]))
        case Survivor.longest:
            return signals["num_bytes"].astype(np.float64)
        case Survivor.quality:
            if "quality" not in signals:
                raise DataError(
                    "dedup.survivor=quality needs the signal quality; set content.quality.model, or another "
                    "survivor"
                )
            return signals["quality"]


@dataclass(frozen=True, kw_only=True)
class MarkTask:
    source: Path
    target: Path
    first: int
    duplicates: Path
    reason: str


def mark_unit(task: MarkTask) -> dict[str, Any]:
    """Copy a unit's documents with those marked that a step dropped. Returns how many those are."""
    done = task.target.with_suffix(".json")
    if (finished := read_done(done)) is not None:
        return finished
    documents, outcomes = load_state(task.source)
    dropped = np.load(task.duplicates, mmap_mode="r")
    low, high = (
        bisect_left(range(len(dropped)), number, key=lambda row: int(dropped[row]["document"]))
        for number in (task.first, task.first + len(documents))
    )
    part = np.array(dropped[low:high])
    rows = part["document"] - task.first
    assert documents["alive"][rows].all(), (
        f"{task.reason} drops a document of {task.source} that is gone already"
    )
    documents["alive"][rows] = False
    outcomes["reason"][rows] = REASONS.index(task.reason)
    for name in ("survivor", "cluster_size"):
        if name in (part.dtype.names or ()):
            outcomes[name][rows] = part[name]
    write_done(done, {"num_dropped": len(part)}, save_state(task.target, documents, outcomes))
    return {"num_dropped": len(part)}


def outcome_file(documents: Path) -> Path:
    """Where the OUTCOME rows of a unit's documents lie."""
    return documents.with_suffix(".outcome.npy")


def load_state(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    return np.load(path), np.load(outcome_file(path))


def save_state(path: Path, documents: npt.NDArray[Any], outcomes: npt.NDArray[Any]) -> list[Path]:
    for target, rows in ((path, documents), (outcome_file(path), outcomes)):
        with RowWriter(target, rows.dtype) as writer:  # np.save does not tell a full disk from other errors
            writer.append(rows)
    return [path, outcome_file(path)]


@dataclass(frozen=True, kw_only=True)
class MarkLinesTask:
    source: Path
    target: Path
    first: int
    cuts: Path
    texts: StoredTexts
    max_removed_share: float | None


def mark_lines(task: MarkLinesTask) -> dict[str, Any]:
    """Copy a unit's documents with the bytes that they have left without duplicate lines. Those that lose too
    much, or everything, are dropped. Reads the texts that lose lines."""
    done = task.target.with_suffix(".json")
    if (finished := read_done(done)) is not None:
        return finished
    documents, outcomes = load_state(task.source)
    spans = read_removals(task.cuts)
    rows = np.unique(spans["row"]).astype(np.int64)
    for at in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[at : at + ROWS_AT_ONCE]
        texts = task.texts.texts(some + task.first)
        _, offsets = remove_spans(*texts, spans_of_rows(spans, some))
        left, before = np.diff(offsets), outcomes["num_bytes"][some]
        is_dropped = left == 0
        if task.max_removed_share is not None:
            is_dropped |= before - left > task.max_removed_share * before
        dropped = some[is_dropped]
        documents["alive"][dropped] = False
        outcomes["reason"][dropped] = REASONS.index("mostly_duplicate_lines")
        outcomes["num_bytes"][some[~is_dropped]] = left[~is_dropped]
    summary = {"num_dropped": int((outcomes["reason"] == REASONS.index("mostly_duplicate_lines")).sum())}
    write_done(done, summary, save_state(task.target, documents, outcomes))
    return summary


@dataclass(frozen=True, kw_only=True)
class FinishTask:
    number: int
    out: Path
    scan_key: str
    folder: Path
    documents: Path
    num_rows: int | None
    names: list[str]
    """Of the files of the unit's slices."""
    records_before: list[int]
    """Records of each of these files in the units before."""
    first: int
    rules: RulesConfig
    held_out: int
    """Documents whose hash is at most this are held out."""
    seed: int


def finish_unit(task: FinishTask) -> dict[str, Any]:
    """Write a unit's rows of the verdict tables: a batch for each of PARTS. Returns the flow of the pass."""
    target = _part_file(task.folder, task.number)
    done = target.with_suffix(".json")
    if (finished := read_done(done)) is not None:
        return finished
    with pa.memory_map(str(unit_files(task.out, task.scan_key, task.number).signals)) as handle:
        table = pa.ipc.open_file(handle).read_all().slice(0, task.num_rows)
        names, source_of = sources_of(table)
        num_bytes = table.column("num_bytes").to_numpy()
        documents, outcomes = load_state(task.documents)
        is_kept = outcomes["reason"] == KEPT
        order = split_order(documents["content_low"], task.seed, "held_out")
        is_held_out = is_kept & (order <= np.uint64(task.held_out))
        masks = {"train": is_kept & ~is_held_out, "held_out": is_held_out, "dropped": ~is_kept}
        builder = FlowBuilder(names, source_of)
        builder.add("in", np.ones(len(outcomes), dtype=np.bool_), bytes=num_bytes)
        builder.add("kept", is_kept, bytes=outcomes["num_bytes"])
        builder.add("repeated_lines", None, bytes=np.where(is_kept, num_bytes - outcomes["num_bytes"], 0))
        for number in np.unique(outcomes["reason"][~is_kept]).tolist():
            builder.add(REASONS[number], outcomes["reason"] == number, bytes=num_bytes)
        rows = _verdict_rows(task, table, outcomes)
        facts = facts_of_unit(
            table, signal_columns(table), outcomes, first=task.first, rules=task.rules, reasons=REASONS
        )
    with atomic_write(target) as stream, pa.ipc.new_file(stream, VERDICTS) as writer:
        for name in PARTS:
            writer.write_batch(rows.filter(pa.array(masks[name])))
    summary = {
        "flow": builder.flow,
        "splits": {
            name: {
                "documents": int(masks[name].sum()),
                "bytes": int(outcomes["num_bytes"][masks[name]].sum()),
            }
            for name in SPLITS
        },
    }
    kept = _array_file(task.folder / "stages" / "kept", task.number)
    with RowWriter(kept, is_kept.dtype) as kept_writer:
        kept_writer.append(is_kept)
    save(facts, _facts_file(task.folder, task.number))
    write_done(done, summary, [target, kept, _facts_file(task.folder, task.number)])
    return summary


def _verdict_rows(task: FinishTask, table: pa.Table, outcomes: npt.NDArray[Any]) -> pa.RecordBatch:
    units = read_units(task.folder / "stages" / "units.json")
    slices = table.column("slice").to_numpy()
    records = table.column("record").to_numpy() + np.array(task.records_before, dtype=np.int64)[slices]
    reasons = pa.DictionaryArray.from_arrays(
        pa.array(np.where(outcomes["reason"] == KEPT, len(REASONS), outcomes["reason"]), pa.int32()),
        pa.array([*REASONS, ""]),
    )
    columns = {
        "unit": pa.array(np.full(len(outcomes), task.number, dtype=np.int32)),
        "row": pa.array(np.arange(len(outcomes), dtype=np.int64)),
        "id": flat(table, "id"),
        "content": flat(table, "content"),
        "source": flat(table, "source").cast(pa.large_string()),
        "path": pa.array(task.names, pa.large_string()).take(pa.array(slices)),
        "record": pa.array(records, pa.int64()),
        "text_bytes": pa.array(outcomes["num_bytes"], pa.int64()),
        "reason": reasons.cast(pa.string()),
        "survivor": _ids_of(units, outcomes["survivor"]),
        "cluster_size": pa.array(outcomes["cluster_size"], pa.int32()),
    }
    return pa.record_batch([columns[name] for name in VERDICTS.names], schema=VERDICTS)


def _ids_of(units: Sequence[DedupUnit], numbers: npt.NDArray[np.int64]) -> pa.Array:
    """128-bit ids of documents given by number; null for -1."""
    values: list[bytes | None] = [None] * len(numbers)
    wanted = np.flatnonzero(numbers >= 0)
    firsts = np.array([unit.first for unit in units], dtype=np.int64)
    of = np.searchsorted(firsts, numbers[wanted], side="right") - 1
    for number in np.unique(of).tolist():
        rows = wanted[of == number]
        documents = np.load(units[number].documents, mmap_mode="r")[numbers[rows] - firsts[number]]
        ids = np.stack([documents["id_high"], documents["id_low"]], axis=1).astype(">u8").tobytes()
        for place, row in enumerate(rows.tolist()):
            values[row] = ids[16 * place : 16 * place + 16]
    return pa.array(values, pa.binary(16))


def split_order(content_low: npt.NDArray[np.uint64], seed: int, name: str) -> npt.NDArray[np.uint64]:
    """64 uniform bits a document, from the low half of its text's hash, the seed and a name."""
    return rng.mix(content_low ^ np.uint64(rng.key(seed, name)))


def draw_held_out(units: Iterable[Path], cfg: HeldOutConfig) -> int | None:
    """The hash up to which kept documents are held out: below `fraction`, the lowest first, while they fit
    into max_bytes, and at least one text where there are two. Equal texts stay together. None: one text at
    most.

    Holds the documents below `fraction`, and three more.
    """
    limit = np.uint64(min(int(cfg.fraction * 2.0**64), 2**64 - 1))
    hashes, sizes = np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    for path in units:
        documents, outcomes = load_state(path)
        kept = documents["alive"]
        hashes = np.concatenate([hashes, split_order(documents["content_low"][kept], cfg.seed, "held_out")])
        sizes = np.concatenate([sizes, outcomes["num_bytes"][kept]])
        distinct = np.unique(hashes)
        above = distinct[distinct >= limit][:1]
        wanted = (hashes < limit) | np.isin(hashes, np.concatenate([distinct[:2], above]))
        hashes, sizes = hashes[wanted], sizes[wanted]
    order = np.argsort(hashes, kind="stable")
    hashes, sizes = hashes[order], sizes[order]
    num_drawn = int((hashes < limit).sum())
    if cfg.max_bytes is not None:
        num_drawn = min(num_drawn, int((np.cumsum(sizes) <= cfg.max_bytes).sum()))
    cuts = np.flatnonzero(np.diff(hashes)) + 1  # where another text begins
    if not len(cuts):
        return None
    return int(hashes[cuts[max(int(np.searchsorted(cuts, num_drawn, side="right")) - 1, 0)] - 1])


def decide(
    cfg: DataConfig, out: Path, scanned: Scanned, engine: Engine, *, quiet: bool
) -> tuple[Verdicts, dict[str, Any]]:
    """Give every document its verdict. Returns the tables and their summary.

    Raises:
        DataError: nothing to read, too many bad records, fewer than two texts left, a source that
        deduplication all but removed.
    """
    check_previous(cfg.dedup)
    dedup = replace(cfg.dedup, previous=[str(_index_folder(Path(name))) for name in cfg.dedup.previous])
    cfg = replace(cfg, dedup=dedup)
    key = key_of(
        version=DECIDE_VERSION,
        scan=scanned.key,
        last=scanned.last,
        rules=plain(cfg.rules),
        dedup=cfg.deciding()["dedup"],
        held_out=plain(cfg.held_out),
        previous=[_index_fingerprint(Path(name)) for name in dedup.previous],
    )
    folder = out / "verdicts" / key
    summary = read_done(folder / "summary.json")
    if summary is not None and not _still_answers(summary, cfg.dedup):
        summary = None
    if summary is None:
        summary = _decide(cfg, out, folder, scanned, engine, quiet=quiet)
    else:
        check_quarantine(cfg, out / "quarantine" / scanned.key, summary["funnel"][0], None)
        if not (out / "quarantine" / scanned.key / "all.jsonl").exists():
            collect_bad_records(out, scanned)
    if cfg.dedup.write_index:
        write_json(out / "index" / LATEST_NAME, {"folder": folder.name})
    verdicts = Verdicts(out=out, scan_key=scanned.key, folder=folder, has_cuts=summary["has_cuts"])
    return verdicts, summary


def _still_answers(summary: dict[str, Any], cfg: DedupConfig) -> bool:
    """Whether finished verdicts hold for settings that do not decide them: an index that is asked for is
    there, and no source lost so many near-duplicates that the run stops."""
    limit = 1.0 if cfg.max_source_removal is None else cfg.max_source_removal
    removals = [one for one in summary["near_removals"] if one[0] >= cfg.min_source_documents]
    has_index: bool = summary["has_index"] or not cfg.write_index
    return has_index and all(lost / count <= limit for count, lost in removals)


def _decide(
    cfg: DataConfig, out: Path, folder: Path, scanned: Scanned, engine: Engine, *, quiet: bool
) -> dict[str, Any]:  # fmt: skip
    stages = folder / "stages"
    judged = _judge(cfg, out, stages / "judged", scanned, engine, quiet=quiet)
    bad = collect_bad_records(out, scanned)
    funnel_of_scan = funnel_entry("scan", merged([*(unit["flow"] for unit in judged), bad.flow]))
    check_quarantine(cfg, out / "quarantine" / scanned.key, funnel_of_scan, bad.first)
    units = _dedup_units(cfg.dedup, out, stages / "judged", scanned, judged)
    cuts = folder / "cuts"
    units, near = _deduplicate(cfg.dedup, units, out, scanned, stages, cuts, engine, quiet=quiet)
    own = units[: len(scanned.units)]
    held_out = draw_held_out((unit.documents for unit in own), cfg.held_out)
    if held_out is None:
        raise DataError(_too_few(own, cfg.rules))
    write_units(stages / "units.json", units)
    finished = _finish(cfg, out, folder, scanned, own, held_out, engine, quiet=quiet)
    digest = join_parts(folder, [_part_file(folder, unit.number) for unit in own])
    funnel = funnel_entry("decide", merged(unit["flow"] for unit in finished))
    funnel["splits"] = {
        name: {
            count: sum(unit["splits"][name][count] for unit in finished) for count in ("documents", "bytes")
        }
        for name in SPLITS
    }
    summary = {
        "funnel": [funnel_of_scan, funnel],
        "documents_digest": hash_json(digest),
        "input_hash": scanned.input_hash,
        "num_documents": {name: funnel["splits"][name]["documents"] for name in SPLITS},
        "text_bytes": {name: funnel["splits"][name]["bytes"] for name in SPLITS},
        "has_cuts": cfg.dedup.lines.enabled,
        "has_index": cfg.dedup.write_index,
        "near_removals": [[one.num_documents, one.num_removed] for one in near.sources] if near else [],
    }
    write_json(folder / FACTS_NAME, _facts(cfg, out, folder, scanned, units, near))
    files = [folder / FACTS_NAME, *(folder / f"{name}.arrow" for name in PARTS)]
    if cfg.dedup.write_index:
        kept = [_array_file(stages / "kept", unit.number) for unit in own]
        write_index(own, kept, cfg.dedup, engine, out / "index" / folder.name)
        files += sorted((out / "index" / folder.name).iterdir())
    if cfg.dedup.lines.enabled:
        files += sorted(path for path in cuts.iterdir() if path.is_file())
    write_done(folder / "summary.json", summary, files)
    shutil.rmtree(stages)
    shutil.rmtree(folder / "parts")
    return summary


def _judge(
    cfg: DataConfig, out: Path, folder: Path, scanned: Scanned, engine: Engine, *, quiet: bool
) -> list[dict[str, Any]]:
    numbers = {name: number for number, name in enumerate(scanned.sources)}
    tasks = [
        JudgeTask(
            signals=unit_files(out, scanned.key, unit.number).signals,
            num_rows=scanned.num_rows(unit.number),
            rules=cfg.rules,
            survivor=cfg.dedup.survivor,
            sources={name: numbers[name] for name in summary["sources"]},
            target=_array_file(folder, unit.number),
        )
        for unit, summary in zip(scanned.units, scanned.summaries, strict=True)
    ]
    return _each(engine, judge_unit, tasks, "decide: rules", quiet=quiet)


def _dedup_units(
    cfg: DedupConfig, out: Path, folder: Path, scanned: Scanned, judged: list[dict[str, Any]]
) -> list[DedupUnit]:
    """The units of this run, and after them those of earlier ones."""
    units: list[DedupUnit] = []
    first = 0
    for unit, summary in zip(scanned.units, judged, strict=True):
        files = unit_files(out, scanned.key, unit.number)
        if scanned.num_rows(unit.number) is not None:
            files = _shortened(cfg, files, summary["num_documents"], folder.parent / "shortened")
        units.append(
            DedupUnit(
                number=unit.number,
                first=first,
                num_documents=summary["num_documents"],
                documents=_array_file(folder, unit.number),
                signatures=files.signatures,
                lines=files.lines,
                ngrams=files.ngrams,
            )
        )
        first += summary["num_documents"]
    return units + previous_units(cfg, units)


def _shortened(cfg: DedupConfig, files: UnitFiles, num_rows: int, folder: Path) -> UnitFiles:
    """The unit's first documents alone, where a corpus is cut at max_text_bytes."""
    short = replace(files, **{name: folder / f"{name}.npy" for name in ("signatures", "lines", "ngrams")})
    if cfg.near.enabled:
        _write_rows(short.signatures, np.load(files.signatures, mmap_mode="r")[:num_rows])
    if cfg.lines.enabled:
        lines = np.load(files.lines)
        _write_rows(short.lines, lines[lines["row"] < num_rows])
    if cfg.ngrams.enabled:
        ngrams = np.load(files.ngrams)  # hashes of all documents, then how many each has
        with pa.memory_map(str(files.signals)) as handle:
            num_scanned = pa.ipc.open_file(handle).read_all().num_rows
        counts = ngrams[len(ngrams) - num_scanned :][:num_rows]
        _write_rows(short.ngrams, np.concatenate([ngrams[: int(counts.sum())], counts]))
    return short


def _write_rows(path: Path, rows: npt.NDArray[Any]) -> None:
    with RowWriter(path, rows.dtype, rows.shape[1:]) as writer:
        writer.append(np.ascontiguousarray(rows))


def _index_folder(folder: Path) -> Path:
    """The index itself, or the one that a run wrote last into a data folder."""
    latest = folder / "index" / LATEST_NAME
    if not (folder / INDEX_NAME).exists() and latest.exists():
        return folder / "index" / str(read_json(latest)["folder"])
    return folder


def _index_fingerprint(folder: Path) -> list[Any]:
    """What changes when the documents of an index do: its settings, and their ids and hashes. Signatures
    follow from these."""
    return [hash_file(folder / INDEX_NAME), *(hash_file(path) for path in sorted(folder.glob("documents-*")))]


def check_previous(cfg: DedupConfig) -> None:
    """Raise DataError when an index of an earlier run is not there, or does not compare."""
    previous_units(replace(cfg, previous=[str(_index_folder(Path(name))) for name in cfg.previous]), [])


def _deduplicate(
    cfg: DedupConfig, units: list[DedupUnit], out: Path, scanned: Scanned, stages: Path, cuts: Path,
    engine: Engine, *, quiet: bool,
) -> tuple[list[DedupUnit], NearResult | None]:  # fmt: skip
    """Mark copies, step by step."""
    num_own = len(scanned.units)
    texts = StoredTexts(out, scanned.key, np.array([unit.first for unit in units[:num_own]], dtype=np.int64))
    near = None
    standing = None
    if cfg.exact or cfg.ngrams.enabled or cfg.lines.enabled:
        standing = standings(units, cfg, engine, stages / "standing")

    def marked(reason: str, duplicates: Path) -> list[DedupUnit]:
        folder = stages / reason
        tasks = [
            MarkTask(
                source=unit.documents,
                target=_array_file(folder, unit.number),
                first=unit.first,
                duplicates=duplicates,
                reason=reason,
            )
            for unit in units[:num_own]
        ]
        _each(engine, mark_unit, tasks, f"decide: {reason}", quiet=quiet)
        return [
            *(replace(u, documents=t.target) for u, t in zip(units, tasks, strict=False)),
            *units[num_own:],
        ]

    if cfg.exact:
        units = marked("duplicate", exact_duplicates(units, cfg, engine, stages / "exact", standing))
    if cfg.near.enabled:
        near = near_duplicates(
            units, cfg, texts, engine, stages / "near", split=split_words, source_names=scanned.sources
        )
        units = marked("near_duplicate", near.duplicates)
    if cfg.ngrams.enabled:
        units = marked(
            "ngram_overlap", ngram_overlap(units, cfg, engine, stages / "ngrams", standing).dropped
        )
    if cfg.lines.enabled:
        found = line_duplicates(units, cfg, engine, cuts, standing)
        lines = [
            MarkLinesTask(
                source=unit.documents,
                target=_array_file(stages / "lines", unit.number),
                first=unit.first,
                cuts=removal,
                texts=texts,
                max_removed_share=cfg.lines.max_removed_share,
            )
            for unit, removal in zip(units[:num_own], found.removals, strict=False)
        ]
        _each(engine, mark_lines, lines, "decide: lines", quiet=quiet)
        units = [
            *(replace(u, documents=t.target) for u, t in zip(units, lines, strict=False)),
            *units[num_own:],
        ]
    return units, near


def _finish(
    cfg: DataConfig, out: Path, folder: Path, scanned: Scanned, units: list[DedupUnit], held_out: int,
    engine: Engine, *, quiet: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    tasks = [
        FinishTask(
            number=unit.number,
            out=out,
            scan_key=scanned.key,
            folder=folder,
            documents=state.documents,
            num_rows=scanned.num_rows(unit.number),
            names=[piece.name for piece in unit.slices],
            records_before=before,
            first=state.first,
            rules=cfg.rules,
            held_out=held_out,
            seed=cfg.held_out.seed,
        )
        for unit, state, before in zip(scanned.units, units, scanned.records_before(), strict=True)
    ]
    return _each(engine, finish_unit, tasks, "decide: verdicts", quiet=quiet)


def _each(
    engine: Engine, function: Callable[[Any], Any], tasks: Sequence[Any], name: str, *, quiet: bool
) -> list[Any]:
    results = []
    with progress(name, total=len(tasks), unit="units", quiet=quiet) as advance:
        for result in engine.map(function, tasks):
            results.append(result)
            advance(1)
    return results


def _array_file(folder: Path, number: int) -> Path:
    return folder / f"unit-{number:05d}.npy"


def _part_file(folder: Path, number: int) -> Path:
    return folder / "parts" / f"unit-{number:05d}.arrow"


def _facts_file(folder: Path, number: int) -> Path:
    return folder / "stages" / "facts" / f"unit-{number:05d}.pickle"


def _facts(
    cfg: DataConfig,
    out: Path,
    folder: Path,
    scanned: Scanned,
    units: list[DedupUnit],
    near: NearResult | None,
) -> dict[str, Any]:
    """What the passes so far tell, as JSON."""
    own = units[: len(scanned.units)]
    texts = StoredTexts(out, scanned.key, np.array([unit.first for unit in own], dtype=np.int64))
    look_up = LookUp(out, scanned, units, texts)
    facts = joined([_facts_file(folder, unit.number) for unit in own]).result(
        look_up,
        corpus=cfg.corpus.name,
        rules=plain(cfg.rules),
        folders={"scan": scanned.key, "verdicts": folder.name},
    )
    if near is not None:
        facts["near"] = near_facts(near, look_up)
    if cfg.content.decontamination.is_on:
        found = decontamination_report(cfg.content.decontamination, out, scanned, [u.documents for u in own])
        write_json(folder / "decontamination.json", found)
        facts["decontamination"] = [{"name": title, **counts} for title, counts in found["sets"].items()]
    return facts


def _too_few(units: Sequence[DedupUnit], rules: RulesConfig) -> str:
    counts: Counter[str] = Counter()
    num_documents = 0
    for unit in units:
        reasons = np.load(outcome_file(unit.documents))["reason"]
        num_documents += len(reasons)
        numbers, each = np.unique(reasons, return_counts=True)
        counts.update(
            {REASONS[n] if n != KEPT else "": c for n, c in zip(numbers.tolist(), each.tolist(), strict=True)}
        )
    num_kept = counts.pop("", 0)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))  # whatever the units
    dropped = ", ".join(f"{name} {count:,}" for name, count in ordered) or "none"
    left = f"{num_kept:,} of {num_documents:,} documents are left"
    message = (
        f"{left}{', all of the same text' if num_kept > 1 else ''}, and two different ones are needed: "
        f"one to train on and one to hold out. Dropped: {dropped}"
    )
    for name, _ in ordered:
        if name in SETTING_OF_REASON:
            setting = SETTING_OF_REASON[name]
            value = getattr(rules, setting)
            return f"{message}. The first to loosen: rules.{setting}={value} (null switches it off)"
    return message
