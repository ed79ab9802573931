"""The tables of docs/scaling_data.md, computed from the rates above them and from the sizes in the code.

After a change of the rates: `python tests/data/scaling_table.py` writes the tables anew. A test compares.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

from llmtrain.data.decide import OUTCOME
from llmtrain.data.dedup.config import NearConfig
from llmtrain.data.dedup.exact import _COPY
from llmtrain.data.dedup.line_text import LINE_DTYPE
from llmtrain.data.dedup.lsh import BAND_RECORD_BYTES, TASK_DOCUMENTS
from llmtrain.data.dedup.owners import RECORD
from llmtrain.data.dedup.partition import num_partitions_for, record_type
from llmtrain.data.dedup.standing import STANDING
from llmtrain.data.dedup.units import DOCUMENT
from llmtrain.data.dedup.verify import EDGE

PAGE = Path(__file__).parents[2] / "docs/scaling_data.md"
TB = {"1 TB": 1e12, "15 TB": 15e12, "100 TB": 100e12}
PARTITION_GIB = {"1 TB": 2, "15 TB": 8, "100 TB": 32}
UNIT_GIB = {"1 TB": 0.25, "15 TB": 1, "100 TB": 4}
STEPS = 3
"""Copies of the rows of documents that decide holds: after the rules, equal texts, near-duplicates."""
NODE_BYTES = 30
"""dedup/clusters.py: memory a document that is in a pair, besides the bitmap."""

Rates = dict[str, float]


def rates_of(page: str) -> Rates:
    """The numbers of the page's table of rates, by name."""
    return {
        name: float(value) for name, value in re.findall(r"^\| `([A-Z]+_\w+)` \| ([\d.]+) \|", page, re.M)
    }


def short(value: float) -> str:
    """Two significant digits, with thousands."""
    if value == 0:
        return "0"
    digits = 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, digits)
    return f"{rounded:,.0f}" if digits <= 0 else f"{rounded:.{digits}f}"


def size(num_bytes: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return f"{short(num_bytes / scale)} {unit}"
    return f"{short(num_bytes)} bytes"


def shuffle_reads(documents: float, partition_gib: float, near: NearConfig) -> float:
    """Ranged reads with which the linking tasks fetch all band keys: every partition from every band file."""
    ranges = num_partitions_for(int(documents) * BAND_RECORD_BYTES, int(partition_gib * 2**30) // 4)
    return near.bands * ranges * math.ceil(documents / TASK_DOCUMENTS)


def tables(rates: Rates) -> dict[str, list[str]]:
    """Each table's lines, by the name that the page marks it with."""
    near = NearConfig()
    documents = {name: text / rates["SIZE_document"] for name, text in TB.items()}

    def hours(rate: str) -> Callable[[str], float]:
        return lambda name: TB[name] / 1e6 / rates[rate] / 3600

    def of_text(share: str) -> Callable[[str], float]:
        return lambda name: TB[name] * rates[share]

    def each(num_bytes: float) -> Callable[[str], float]:
        return lambda name: documents[name] * num_bytes

    def total(*parts: Callable[[str], float]) -> Callable[[str], float]:
        return lambda name: sum(part(name) for part in parts)

    def row(title: str, value: Callable[[str], float], shown: Callable[[float], str]) -> str:
        return "| " + " | ".join([title, *(shown(value(name)) for name in TB)]) + " |"

    def head(title: str) -> list[str]:
        return ["| " + " | ".join([title, *TB]) + " |", "|---" * (1 + len(TB)) + "|"]

    scan, decide = hours("RATE_scan"), hours("RATE_decide")
    parquet, tokens = hours("RATE_documents"), hours("RATE_tokenize")
    to_parquet, to_shards = total(scan, decide, parquet), total(scan, decide, tokens)
    num_tokens = lambda name: TB[name] / rates["SIZE_token"]  # noqa: E731 - as short as its neighbours
    stays = total(
        of_text("SIZE_docs"), each(rates["SIZE_signals"]), each(4 * near.num_permutations),
        each(rates["SIZE_verdicts"]), each(DOCUMENT.itemsize + 4 * near.num_permutations),
    )  # fmt: skip
    rows_of_steps = each(STEPS * (DOCUMENT.itemsize + OUTCOME.itemsize) + STANDING.itemsize)
    bands = each(near.bands * BAND_RECORD_BYTES)
    edges = each(rates["SHARE_edges"] * record_type(EDGE).itemsize)
    return {
        "work": [
            *head("core-hours"),
            row("documents", documents.__getitem__, lambda n: f"{short(n / 1e6)} million"),
            row("tokens", num_tokens, lambda n: f"{short(n / 1e12)} trillion"),
            row("scan", scan, short),
            row("decide", decide, short),
            row("documents as Parquet", parquet, short),
            row("or tokenize, pack", tokens, short),
            row("**to Parquet**", to_parquet, short),
            row("**to shards**", to_shards, short),
            row("hours on 1,000 cores, to shards", lambda name: to_shards(name) / 1000, short),
            row("before it, where the text lies in WARC: extraction", hours("RATE_extract_text"), short),
        ],
        "disk": [
            *head("disk"),
            row("`docs`, lz4", of_text("SIZE_docs"), size),
            row("`signals`", each(rates["SIZE_signals"]), size),
            row("`signatures`", each(4 * near.num_permutations), size),
            row("`verdicts`", each(rates["SIZE_verdicts"]), size),
            row("`index`", each(DOCUMENT.itemsize + 4 * near.num_permutations), size),
            row("**these together**", stays, size),
            row("`documents`, Parquet with zstd", of_text("SIZE_parquet"), size),
            row("or `shards`, 2 bytes a token", lambda name: 2 * num_tokens(name), size),
            row("while decide runs: rows of documents", rows_of_steps, size),
            row("equal texts, at their time", each(record_type(_COPY).itemsize), size),
            row("band keys, at their time", bands, size),
            row("pairs, at their time", edges, size),
            row("**most while decide runs**", total(rows_of_steps, bands, edges), size),
            row("with `dedup.lines`: `lines`", of_text("SIZE_lines"), size),
            row(
                "and their shuffle",
                lambda name: TB[name] * rates["SIZE_lines"] / LINE_DTYPE.itemsize * RECORD.itemsize,
                size,
            ),
            row("with `dedup.ngrams`: `ngrams`", of_text("SIZE_ngrams"), size),
            row("and their shuffle", lambda name: 2 * TB[name] * rates["SIZE_ngrams"], size),
        ],
        "memory": [
            *head("memory, and settings"),
            row("`engine.unit_bytes`", UNIT_GIB.__getitem__, lambda n: f"{n:g} GiB"),
            row(
                "units of the scan",
                lambda name: TB[name] * rates["SHARE_input"] / (UNIT_GIB[name] * 2**30),
                lambda n: f"{short(n)}",
            ),
            row("a process that scans", lambda _: rates["RATE_worker_mb"] * 1e6, size),
            row("`dedup.partition_bytes`", PARTITION_GIB.__getitem__, lambda n: f"{n:g} GiB"),
            row(
                "reads of the band shuffle",
                lambda name: shuffle_reads(documents[name], PARTITION_GIB[name], near),
                lambda n: f"{short(n / 1e6)} million",
            ),
            row(
                "the one process that clusters",
                lambda name: documents[name] * (1 / 8 + rates["SHARE_paired"] * NODE_BYTES),
                size,
            ),
        ],
    }  # fmt: skip


def filled(page: str) -> str:
    """The page with its tables as they should be."""
    for name, lines in tables(rates_of(page)).items():
        begin, end = f"<!-- computed: {name} -->\n", "\n<!-- end -->"
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        assert after, f"docs/scaling_data.md has no place for the table {name}"
        page = before + begin + "\n".join(lines) + end + after
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
