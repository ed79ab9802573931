"""Between the passes: the signals of all units in one table, the bad records in one list, the verdicts
as tables.

`verdicts/<key>/` holds `train.arrow`, `held_out.arrow` and `dropped.arrow`, one row for each document in
the order of the input, and `summary.json` with the funnel of the first two passes, which comes last.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from llmtrain.data.config import DataConfig
from llmtrain.data.decide import KEPT, Verdicts, decide
from llmtrain.data.folder import write_done
from llmtrain.data.scan import unit_files
from llmtrain.data.sources.slices import Unit
from llmtrain.data.text.kernels import SIGNALS
from llmtrain.errors import DataError
from llmtrain.files import atomic_write

log = logging.getLogger(__name__)

SPLITS = ("train", "held_out")


@dataclass(frozen=True, kw_only=True)
class Scanned:
    key: str
    units: list[Unit]
    summaries: list[dict[str, Any]]


def load_signals(out: Path, scanned: Scanned) -> pa.Table:
    """Signals of every document in the order of the input, with unit, row, path and record number of the
    file."""
    tables = []
    records_before: Counter[str] = Counter()
    for unit, summary in zip(scanned.units, scanned.summaries, strict=True):
        with pa.OSFile(str(unit_files(out, scanned.key, unit.number).signals)) as handle:
            table = pa.ipc.open_file(handle).read_all()
        names = [piece.name for piece in unit.slices]
        before = []
        for name, num_records in zip(names, summary["num_records"], strict=True):
            before.append(records_before[name])
            records_before[name] += num_records
        slices = table.column("slice").to_numpy()
        records = table.column("record").to_numpy() + np.array(before, dtype=np.int64)[slices]
        path = pa.DictionaryArray.from_arrays(pa.array(slices, pa.int32()), pa.array(names, pa.string()))
        columns = {name: table.column(name) for name in table.column_names}
        columns["source"] = table.column("source").cast(pa.large_string())
        columns["record"] = pa.array(records, pa.int64())
        columns["path"] = path.cast(pa.string()).cast(pa.large_string())  # over 2 GiB of names in one table
        columns["unit"] = pa.array(np.full(table.num_rows, unit.number, dtype=np.int32))
        columns["row"] = pa.array(np.arange(table.num_rows, dtype=np.int64))
        tables.append(pa.table(columns))
    return (
        pa.concat_tables(tables).combine_chunks() if tables else pa.table({"id": pa.array([], pa.binary(16))})
    )


def load_bad_records(out: Path, scanned: Scanned) -> list[dict[str, Any]]:
    """Every bad record, with the record number in its file; also written to `all.jsonl` in the quarantine."""
    records: list[dict[str, Any]] = []
    records_before: Counter[str] = Counter()
    for unit, summary in zip(scanned.units, scanned.summaries, strict=True):
        before = []
        for piece, num_records in zip(unit.slices, summary["num_records"], strict=True):
            before.append(records_before[piece.name])
            records_before[piece.name] += num_records
        if summary["num_bad"]:
            with open(unit_files(out, scanned.key, unit.number).quarantine, encoding="utf-8") as handle:
                for line in handle:
                    record = json.loads(line)
                    record["record"] += before[record["slice"]]
                    record["unit"] = unit.number
                    records.append(record)
    if records:
        with atomic_write(out / "quarantine" / scanned.key / "all.jsonl", "w") as handle:
            shown = ("path", "record", "reason", "num_bytes", "detail")
            lines = (
                json.dumps({name: record[name] for name in shown}, ensure_ascii=False) for record in records
            )
            handle.writelines(f"{line}\n" for line in lines)
    return records


def draw(table: pa.Table, bad: list[dict[str, Any]], cap: int) -> tuple[pa.Table, list[dict[str, Any]]]:
    """Cut after the document that reaches the cap. What was scanned beyond it was not drawn."""
    reached = int(np.searchsorted(np.cumsum(table.column("num_bytes").to_numpy()), cap))
    if reached >= table.num_rows:
        return table, bad
    last = (table.column("unit")[reached].as_py(), table.column("slice")[reached].as_py())
    return table.slice(0, reached + 1), [
        record for record in bad if (record["unit"], record["slice"]) <= last
    ]


def scan_funnel(table: pa.Table, bad: list[dict[str, Any]]) -> dict[str, Any]:
    raw_bytes = int(table.column("raw_bytes").to_numpy().sum()) if table.num_rows else 0
    num_bytes = int(table.column("num_bytes").to_numpy().sum()) if table.num_rows else 0
    dropped: dict[str, dict[str, int]] = {}
    for record in bad:
        drop = dropped.setdefault(record["reason"], {"documents": 0, "bytes": 0})
        drop["documents"] += 1
        drop["bytes"] += record["num_bytes"]
    bad_bytes = sum(drop["bytes"] for drop in dropped.values())
    if raw_bytes != num_bytes:
        dropped["normalised_away"] = {"documents": 0, "bytes": raw_bytes - num_bytes}
    return {
        "pass": "scan",
        "in": {"documents": table.num_rows + len(bad), "bytes": raw_bytes + bad_bytes},
        "kept": {"documents": table.num_rows, "bytes": num_bytes},
        "dropped": dict(sorted(dropped.items())),
    }


def check_quarantine(
    cfg: DataConfig, folder: Path, funnel: dict[str, Any], bad: list[dict[str, Any]]
) -> None:
    """Stop when there is nothing to read, or when too many records are bad; warn of any."""
    num_records, num_kept = funnel["in"]["documents"], funnel["kept"]["documents"]
    if num_records == 0:
        where = ", ".join(cfg.corpus.paths) or cfg.corpus.dataset or "this Python installation"
        raise DataError(f"corpus {cfg.corpus.name} is empty: no document in {where}")
    if num_kept == num_records:
        return
    share = 1 - num_kept / num_records
    reasons = {name: drop["documents"] for name, drop in funnel["dropped"].items() if drop["documents"]}
    counts = ", ".join(
        f"{name} {count:,}" for name, count in sorted(reasons.items(), key=lambda item: -item[1])
    )
    what = f"{num_records - num_kept:,} of {num_records:,} records ({share:.2%}) are bad"
    listing = folder / "all.jsonl"
    if share > cfg.max_quarantine_share:
        first = next((f"; the first: {r['path']}, record {r['record']}: {r['detail']}" for r in bad), "")
        raise DataError(
            f"{what}, more than max_quarantine_share={cfg.max_quarantine_share:.2%}: {counts}{first}. "
            f"All are listed in {listing}; mend them, or raise max_quarantine_share"
        )
    cut = [name for name in ("truncated_archive", "corrupt_archive", "unreadable_file") if name in reasons]
    rest = f"; what follows a {' or '.join(cut)} in its file is lost and not counted" if cut else ""
    log.warning("%s and left out: %s. They are listed in %s%s", what, counts, listing, rest)


def write_verdicts(
    cfg: DataConfig, folder: Path, table: pa.Table, funnel_of_scan: dict[str, Any]
) -> dict[str, Any]:
    """Decide, and write one table a split and one of what was dropped; `summary.json`, which is returned,
    comes last."""
    signals = {name: table.column(name).to_numpy() for name in (*SIGNALS, "num_bytes")}
    content, ids = digests(table, "content"), digests(table, "id")
    verdicts = decide(signals, content, ids, cfg.rules, cfg.held_out)
    num_bytes = signals["num_bytes"]
    parts = {
        "train": (verdicts.reason == KEPT) & ~verdicts.is_held_out,
        "held_out": verdicts.is_held_out,
        "dropped": verdicts.reason != KEPT,
    }
    digest = xxhash.xxh3_128()
    shown = table.select(["unit", "row", "id", "content", "source", "path", "record"])
    shown = shown.append_column("text_bytes", table.column("num_bytes"))
    reason = np.array([*verdicts.reasons, ""])[verdicts.reason]
    for name, mask in parts.items():
        part = shown.append_column("reason", pa.array(reason)).filter(pa.array(mask)).combine_chunks()
        with atomic_write(folder / f"{name}.arrow") as handle, pa.ipc.new_file(handle, part.schema) as writer:
            writer.write_table(part)
        if name in SPLITS:
            _update_digest(digest, name, part)
    funnel = _decide_funnel(verdicts, parts, num_bytes)
    for entry in (funnel_of_scan, funnel):
        check_closes(entry)
    summary = {
        "funnel": [funnel_of_scan, funnel],
        "documents_digest": digest.hexdigest(),
        "num_documents": {name: int(parts[name].sum()) for name in SPLITS},
        "text_bytes": {name: int(num_bytes[parts[name]].sum()) for name in SPLITS},
    }
    write_done(folder / "summary.json", summary, [folder / f"{name}.arrow" for name in parts])
    return summary


def _decide_funnel(
    verdicts: Verdicts, parts: dict[str, npt.NDArray[np.bool_]], num_bytes: npt.NDArray[np.int64]
) -> dict[str, Any]:
    kept = {
        name: {"documents": int(parts[name].sum()), "bytes": int(num_bytes[parts[name]].sum())}
        for name in SPLITS
    }
    return {
        "pass": "decide",
        "in": {"documents": len(num_bytes), "bytes": int(num_bytes.sum())},
        "kept": {what: sum(kept[name][what] for name in SPLITS) for what in ("documents", "bytes")},
        "dropped": verdicts.dropped(num_bytes),
        "splits": kept,
    }


def digests(table: pa.Table, name: str) -> npt.NDArray[np.uint8]:
    """A binary(16) column as [n, 16]."""
    column = table.column(name).combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    raw = np.frombuffer(column.buffers()[1], dtype=np.uint8) if len(column) else np.zeros(0, dtype=np.uint8)
    return raw.reshape(-1, 16)[column.offset : column.offset + len(column)]


def _update_digest(digest: Any, split: str, part: pa.Table) -> None:
    """Take in everything about the documents that the output shows, in order."""
    digest.update(f"{split}:{part.num_rows};".encode())
    for name in ("id", "content"):
        digest.update(digests(part, name).tobytes())
    for name in ("source", "path", "record"):
        digest.update("\x1f".join(map(str, part.column(name).to_pylist())).encode())


def check_closes(entry: Mapping[str, Any]) -> None:
    """Assert that in = kept + dropped for everything that a pass of the funnel counts."""
    for name, total in entry["in"].items():
        rest = entry["kept"].get(name, 0) + sum(drop.get(name, 0) for drop in entry["dropped"].values())
        assert total == rest, f"{entry['pass']}: {total} {name} came in, {rest} are accounted for: {entry}"
