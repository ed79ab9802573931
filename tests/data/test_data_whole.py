"""`llmtrain data` with everything on: the same bytes however it is run, nothing lost, errors that tell."""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import slurm_cluster
import whole_corpus as whole
from dask_cluster import dask_cluster

from llmtrain.data.config import DataConfig, DocumentsConfig, StopAfter
from llmtrain.data.dedup.config import DedupConfig, NearConfig
from llmtrain.data.engines.config import DaskConfig, EngineConfig, EngineKind, SlurmConfig
from llmtrain.data.filters.config import RulesConfig
from llmtrain.data.flow import check_closes
from llmtrain.data.manifest import read_manifest
from llmtrain.data.pipeline import run
from llmtrain.data.shards import ShardReader
from llmtrain.errors import DataError

Make = Callable[..., DataConfig]


@pytest.fixture(autouse=True)
def no_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power is cut here, and thousands of small files flushed to a disk take minutes."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    return whole.write_corpus(tmp_path / "in")


@pytest.fixture
def make(tmp_path: Path, corpus: list[str]) -> Make:
    """Settings with everything on, for the corpus and a folder of that name."""

    def with_changes(out: str = "out", **changes: Any) -> DataConfig:
        return whole.whole_config(tmp_path, changes.pop("paths", corpus), tmp_path / out, **changes)

    return with_changes


def run_twice(cfg: DataConfig) -> dict[str, bytes]:
    """Documents, and after them shards, in one folder: all output."""
    run(replace(cfg, stop_after=StopAfter.documents), quiet=True)
    run(cfg, quiet=True)
    return whole.output_of(Path(cfg.out))


def test_every_step_has_something_to_do(make: Make) -> None:
    """What the other tests in this file rely on."""
    cfg = make()
    run_twice(cfg)
    scan, decide = whole.summary_of(Path(cfg.out))["funnel"]
    assert set(scan["dropped"]) == {
        "absurd_length", "broken_json", "invalid_utf8", "missing_field", "wrong_type", "normalised_away",
        "blank_line", "few_words", "javascript", "no_terminal_mark", "private_data_masked",
    }  # fmt: skip
    assert set(decide["dropped"]) == {
        "empty", "url_blocked", "wrong_language", "few_distinct_stop_words", "bad_words", "lorem_ipsum",
        "contaminated", "duplicate", "near_duplicate", "ngram_overlap", "repeated_lines",
        "mostly_duplicate_lines",
    }  # fmt: skip
    assert len(whole.output_of(Path(cfg.out))) > 30


# The same bytes.


def test_the_output_does_not_depend_on_units_or_workers(make: Make) -> None:
    expected = run_twice(make())
    engines = [
        EngineConfig(kind=EngineKind.inline, unit_bytes=4_000),
        EngineConfig(kind=EngineKind.inline, unit_bytes=25_000),
        EngineConfig(kind=EngineKind.local, workers=2, unit_bytes=20_000),
    ]
    for number, engine in enumerate(engines):
        assert run_twice(make(f"again{number}", engine=engine)) == expected


def test_the_output_does_not_depend_on_the_memory_of_a_task(make: Make) -> None:
    cfg = make()
    expected = run_twice(cfg)
    again = make("again", dedup=replace(cfg.dedup, partition_bytes=20_000))
    assert run_twice(again) == expected


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 7])
@pytest.mark.parametrize("unit_bytes", [3_000, 1 << 20])
def test_one_two_and_seven_workers_write_the_same(make: Make, workers: int, unit_bytes: int) -> None:
    engine = EngineConfig(kind=EngineKind.local, workers=workers, unit_bytes=unit_bytes)
    assert run_twice(make("local", engine=engine)) == run_twice(make())


@pytest.mark.slow
def test_a_dask_cluster_writes_the_same_though_a_worker_dies(make: Make, tmp_path: Path) -> None:
    expected = run_twice(make())
    with dask_cluster(tmp_path / "dask", 3) as cluster:
        for unit_bytes in (4_000, 40_000):
            engine = EngineConfig(
                kind=EngineKind.dask_address,
                unit_bytes=unit_bytes,
                dask=DaskConfig(address=cluster.address, worker_timeout_s=60),
            )
            cfg = make(f"dask{unit_bytes}", engine=engine)
            with killer(lambda out=Path(cfg.out): any(out.glob("signals/*/*.json")), cluster.workers[0].pid):
                output = run_twice(cfg)
            assert output == expected


@pytest.mark.slow
def test_jobs_of_a_real_slurm_write_the_same(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := slurm_cluster.why_not():
        pytest.skip(reason)
    expected = run_twice(make())
    with slurm_cluster.slurm_cluster(tmp_path / "slurm", num_nodes=2) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        slurm = SlurmConfig(
            memory_gib=2, max_jobs=2, interface="lo", local_directory=str(tmp_path / "scratch"),
            log_directory=str(tmp_path / "logs"),
        )  # fmt: skip
        engine = EngineConfig(
            kind=EngineKind.dask_slurm, unit_bytes=6_000, slurm=slurm, dask=DaskConfig(worker_timeout_s=120)
        )
        assert run_twice(make("jobs", engine=engine)) == expected


class killer:
    """`with killer(is_time, pid)`: end a process once, when it is time."""

    def __init__(self, is_time: Callable[[], bool], pid: int) -> None:
        self._is_time, self._pid = is_time, pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            if self._is_time():
                os.kill(self._pid, signal.SIGKILL)
                return

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


def test_workers_killed_in_the_scan_and_later_cost_nothing(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run_twice(make())
    cfg = make("killed", engine=EngineConfig(kind=EngineKind.local, workers=2, unit_bytes=4_000))
    out = Path(cfg.out)
    moments = [lambda: any(out.glob("signals/*/*.json")), lambda: any(out.glob("verdicts/*/stages/near"))]
    stop = threading.Event()
    killed: list[int] = []

    def watch() -> None:
        for is_time in moments:
            while not is_time() or not multiprocessing.active_children():
                if stop.wait(0.002):
                    return
            victim = multiprocessing.active_children()[0]
            os.kill(victim.pid, signal.SIGKILL)
            killed.append(victim.pid)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        output = run_twice(cfg)
    finally:
        stop.set()
        thread.join()
    assert len(set(killed)) == 2
    assert output == expected


# Interrupted.


class Interrupted(BaseException):
    pass


def interrupt_at(monkeypatch: pytest.MonkeyPatch, number: int, *, after: bool) -> Callable[[], int]:
    """Stop everything at the number-th file that appears, before it does or after; tells how many did."""
    original = Path.replace
    seen = itertools.count(1)
    last = [0]

    def counted(self: Path, target: Path) -> Path:
        last[0] = next(seen)
        if last[0] == number and not after:
            raise Interrupted
        moved = original(self, target)
        if last[0] == number:
            raise Interrupted
        return moved

    monkeypatch.setattr(Path, "replace", counted)
    return lambda: last[0]


@pytest.mark.parametrize(
    "step", [pytest.param(61, id="some files"), pytest.param(1, id="every file", marks=pytest.mark.slow)]
)
@pytest.mark.timeout(1200)
def test_a_run_stopped_at_any_file_goes_on_to_the_same_bytes(
    make: Make, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    engine = EngineConfig(kind=EngineKind.inline, unit_bytes=30_000)
    with monkeypatch.context() as patch:
        count = interrupt_at(patch, -1, after=False)
        expected = run_twice(make(engine=engine))
        num_files = count()
    assert num_files > 100
    out = Path(make("stopped").out)
    for number in range(1, num_files + 1, step):
        with monkeypatch.context() as patch:
            interrupt_at(patch, number, after=number % 2 == 0)
            with pytest.raises(Interrupted):
                run_twice(make("stopped", engine=engine))
        assert run_twice(make("stopped", engine=engine)) == expected, number
        assert not [path for path in out.rglob("*") if ".tmp-" in path.name or path.name == "stages"], number
        shutil.rmtree(out)


KILLED = """
import sys
from pathlib import Path
import whole_corpus as whole
from llmtrain.data.engines.config import EngineConfig, EngineKind
from llmtrain.data.pipeline import run

if __name__ == "__main__":
    folder, out, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    engine = EngineConfig(kind=EngineKind[kind], workers=2, unit_bytes=4_000)
    run(whole.whole_config(folder, sys.argv[4:], out, engine=engine), quiet=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "num_kills"), [("inline", 30), ("local", 12)])
@pytest.mark.timeout(1200)
def test_a_run_with_everything_on_killed_at_30_moments_ends_in_the_same_bytes(
    make: Make, tmp_path: Path, corpus: list[str], kind: str, num_kills: int
) -> None:
    cfg = make()
    run(cfg, quiet=True)
    expected = whole.output_of(Path(cfg.out))
    (tmp_path / "killed.py").write_text(KILLED)
    out = tmp_path / "killed"
    command = [sys.executable, str(tmp_path / "killed.py"), str(tmp_path), str(out), kind, *corpus]
    search = [str(Path(whole.__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search))}

    def started() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (out / ".lock").exists():
            time.sleep(0.005)
        return process

    whole_s = time.monotonic()
    assert started().wait() == 0
    whole_s = time.monotonic() - whole_s
    shutil.rmtree(out)
    draw = random.Random(num_kills)
    num_killed = num_ends = 0
    while num_killed < num_kills:
        process = started()
        time.sleep(draw.uniform(0.1, 0.9) * whole_s)
        process.kill()
        if process.wait() == 0:
            assert whole.output_of(out) == expected
            shutil.rmtree(out)
            num_ends += 1
            continue
        num_killed += 1
    assert started().wait() == 0
    assert whole.output_of(out) == expected


@pytest.mark.parametrize(
    "kinds",
    [
        "signatures verdicts shards",
        "docs signals lines ngrams matches quarantine index documents tokenizer packs",
    ],
)
def test_lost_and_cut_files_of_every_kind_are_made_again(make: Make, kinds: str) -> None:
    cfg = make(engine=EngineConfig(kind=EngineKind.inline, unit_bytes=30_000))
    expected = run_twice(cfg)
    out = Path(cfg.out)
    for kind in kinds.split():
        lost = sorted(path for path in (out / kind).rglob("*") if path.is_file())
        assert lost, kind
        for cut in (False, True):
            for path in lost:
                if path.exists():
                    path.write_bytes(path.read_bytes()[:-9]) if cut else path.unlink()
            assert run_twice(cfg) == expected, (kind, cut)
            missing = [path for path in lost if not path.is_file()]
            assert not missing, (kind, cut)


# Sums.


def sums(entry: dict[str, Any], name: str) -> int:
    return sum(counts.get(name, 0) for counts in entry["dropped"].values())


def test_all_that_came_in_is_kept_or_dropped_for_a_reason(make: Make, corpus: list[str]) -> None:
    cfg = make(engine=EngineConfig(kind=EngineKind.inline, unit_bytes=9_000))
    report = run(cfg, quiet=True)
    manifest = report.manifest
    summary = whole.summary_of(Path(cfg.out))
    scan, decide = summary["funnel"]
    assert set(decide["sources"]) == {"a", "b", "c"}
    for entry in (*manifest.funnel, scan, decide):
        check_closes(entry)
        of_sources = entry.get("sources", {}).values()
        for source in of_sources:
            check_closes({"pass": "a source", **source})
        for part in ("in", "kept") if of_sources else ():
            for name, total in entry[part].items():
                assert total == sum(source[part].get(name, 0) for source in of_sources)
        for reason, counts in entry["dropped"].items() if of_sources else ():
            for name, total in counts.items():
                assert total == sum(s["dropped"].get(reason, {}).get(name, 0) for s in of_sources)
    assert scan["kept"]["documents"] == decide["in"]["documents"] == len(whole.documents())
    assert scan["kept"]["bytes"] == decide["in"]["bytes"]
    assert scan["in"]["documents"] == len(whole.documents()) + 5
    for name in ("documents", "bytes"):
        assert decide["kept"][name] == sum(split[name] for split in decide["splits"].values())
        assert decide["kept"][name] == manifest.funnel[2]["in"][name] == manifest.funnel[2]["kept"][name]
    assert sum(report.tokens.values()) == manifest.funnel[2]["kept"]["tokens"]
    assert set(report.tokens) == {"a", "b", "c"}


def test_bytes_masked_are_those_of_private_data_alone(make: Make) -> None:
    """`private_data_masked` is what no other reason explains, so a wrong count elsewhere would land in it."""
    cfg = make()
    run(cfg, quiet=True)
    scan = whole.summary_of(Path(cfg.out))["funnel"][0]
    few = 5
    addresses = [f"jane.doe{number}@mail.com" for number in range(few)] + ["bob@post.org"] * few
    masked = sum(len(address) - len("<EMAIL>") for address in addresses)
    assert scan["dropped"]["private_data_masked"] == {"documents": 0, "bytes": masked}
    off = make("off", content=replace(cfg.content, pii=dataclasses.replace(cfg.content.pii, email=None)))
    run(off, quiet=True)
    assert "private_data_masked" not in whole.summary_of(Path(off.out))["funnel"][0]["dropped"]


def test_a_placeholder_longer_than_what_it_replaces_counts_as_bytes_gained(make: Make) -> None:
    cfg = make()
    long = dataclasses.replace(cfg.content.pii, email="<AN_ADDRESS_FOR_ELECTRONIC_MAIL_WAS_HERE>")
    cfg = make(content=replace(cfg.content, pii=long))
    manifest = run(cfg, quiet=True).manifest
    assert manifest.funnel[0]["dropped"]["private_data_masked"]["bytes"] < 0
    for entry in manifest.funnel:
        check_closes(entry)


def test_kept_text_is_what_the_steps_left(make: Make) -> None:
    """Parquet, shards and verdicts tell the same documents; no dropped line or address is in them."""
    cfg = make(documents=DocumentsConfig(file_bytes=9_000))
    run_twice(cfg)
    out = Path(cfg.out)
    listing = json.loads((out / "documents.json").read_text())
    tables = [pq.read_table(out / file["path"]).to_pylist() for file in listing["files"]]
    rows = [row for table in tables for row in table]
    assert len(tables) > 4
    assert [len(table) for table in tables] == [file["num_documents"] for file in listing["files"]]
    for file, table in zip(listing["files"], tables, strict=True):
        assert file["text_bytes"] == sum(len(row["text"].encode()) for row in table)
    decide = whole.summary_of(out)["funnel"][1]
    assert len(rows) == decide["kept"]["documents"]
    assert sum(len(row["text"].encode()) for row in rows) == decide["kept"]["bytes"]
    texts = [row["text"] for row in rows]
    for gone in ("@", "javascript", "menu", "lorem ipsum", "odious", whole.QUESTION):
        assert not [text for text in texts if gone in text], gone
    assert any("<EMAIL>" in text for text in texts)
    assert [sum(line in text for text in texts) for line in whole.BOILERPLATE] == [1, 1, 1]
    assert {row["source"] for row in rows} == {"a", "b", "c"}
    assert all(row["url"].startswith("http://good.example/") for row in rows)
    assert all(dict(row["metadata"]).keys() == {"rating"} for row in rows)
    by_place = {(row["path"], row["record"]): row for row in rows}
    found = 0
    for shard in read_manifest(out).shards:
        reader = ShardReader(out / shard.path)
        for number in range(reader.num_documents):
            lineage = reader.lineage(number)
            row = by_place[lineage.path, lineage.record]
            assert lineage.source == row["source"]
            found += 1
    assert found == len(rows)


# Incremental.


def texts_of(out: Path) -> list[str]:
    listing = json.loads((out / "documents.json").read_text())
    return [row["text"] for file in listing["files"] for row in pq.read_table(out / file["path"]).to_pylist()]


def paired(number: int) -> str:
    """A pair's first text: longer than the one like it, so that one run over both keeps it too."""
    return whole.story(30_000 + number, 6) + "\nAnd that was the whole of this long story."


@pytest.fixture
def two_corpora(tmp_path: Path) -> tuple[Path, Path]:
    first = [whole.story(20_000 + number, 6) for number in range(30)] + [paired(n) for n in range(20)]
    second = [whole.story(40_000 + number, 6) for number in range(30)]
    second += first[:10]  # copies
    second += [whole.slightly_changed(whole.story(30_000 + n, 6), n, 1) for n in range(20)]
    second += [second[0], whole.slightly_changed(second[1], 1)]
    paths = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    for path, texts in zip(paths, (first, second), strict=True):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return paths


def incremental(tmp_path: Path, name: str, paths: list[Path], **dedup: Any) -> DataConfig:
    return replace(
        whole.whole_config(tmp_path, [str(path) for path in paths], tmp_path / name),
        dedup=DedupConfig(near=NearConfig(enabled=True), survivor=whole.Survivor.longest, **dedup),
        rules=RulesConfig(),
        stop_after=StopAfter.documents,
    )


def test_a_later_run_keeps_what_one_run_over_all_files_would(
    tmp_path: Path, two_corpora: tuple[Path, Path]
) -> None:
    first, second = two_corpora
    both = incremental(tmp_path, "both", [first, second])
    run(both, quiet=True)
    earlier = incremental(tmp_path, "earlier", [first])
    run(earlier, quiet=True)
    first.unlink()
    for name in ("docs", "signals", "signatures", "documents", "verdicts"):
        shutil.rmtree(tmp_path / "earlier" / name)
    for units, unit_bytes in enumerate((1 << 20, 3_000)):
        later = replace(
            incremental(tmp_path, f"later{units}", [second], previous=[earlier.out]),
            engine=EngineConfig(kind=EngineKind.inline, unit_bytes=unit_bytes),
        )
        run(later, quiet=True)
        kept, of_both = texts_of(Path(later.out)), texts_of(Path(both.out))
        assert sorted([*kept, *texts_of_first(two_corpora)]) == sorted(of_both)
        assert len(kept) == 30
        reasons = whole.summary_of(Path(later.out))["funnel"][1]["dropped"]
        assert {name: drop["documents"] for name, drop in reasons.items()} == {
            "duplicate": 11, "near_duplicate": 21,
        }  # fmt: skip


def texts_of_first(two_corpora: tuple[Path, Path]) -> list[str]:
    return [whole.story(20_000 + number, 6) for number in range(30)] + [paired(n) for n in range(20)]


def test_three_runs_one_after_the_other_keep_every_text_once(
    tmp_path: Path, two_corpora: tuple[Path, Path]
) -> None:
    first, second = two_corpora
    third = tmp_path / "third.jsonl"
    third.write_text(first.read_text() + second.read_text() + json.dumps({"text": whole.story(1, 6)}) + "\n"
                     + json.dumps({"text": whole.story(2, 6)}) + "\n")  # fmt: skip
    previous: list[str] = []
    for name, path in (("a", first), ("b", second), ("c", third)):
        cfg = incremental(tmp_path, name, [path], previous=list(previous))
        run(cfg, quiet=True)
        previous.append(cfg.out)
    assert sorted(texts_of(tmp_path / "c")) == sorted([whole.story(1, 6), whole.story(2, 6)])


def test_a_changed_index_is_noticed_and_a_lost_one_named(
    tmp_path: Path, two_corpora: tuple[Path, Path]
) -> None:
    first, second = two_corpora
    earlier = incremental(tmp_path, "earlier", [first])
    run(earlier, quiet=True)
    later = incremental(tmp_path, "later", [second], previous=[earlier.out])
    run(later, quiet=True)
    before = texts_of(Path(later.out))
    others = [whole.story(60_000 + number, 6) for number in range(50)]
    first.write_text("".join(json.dumps({"text": text}) + "\n" for text in others))
    run(earlier, quiet=True)  # as many documents, other texts
    run(later, quiet=True)
    assert len(texts_of(Path(later.out))) == len(before) + 30
    index = Path(earlier.out) / "index"
    index /= json.loads((index / "latest.json").read_text())["folder"]
    table = index / "signatures-000000.npy"
    content = table.read_bytes()
    table.write_bytes(content[:-9])
    fresh = replace(later, out=str(tmp_path / "fresh"))
    with pytest.raises(DataError, match=r"signatures-000000\.npy holds \d+ bytes of rows and says shape"):
        run(fresh, quiet=True)
    table.write_bytes(content)
    (index / "index.json").unlink()
    for cfg in (fresh, later):
        with pytest.raises(
            DataError, match=r"dedup\.previous names .*earlier.*, but .*index\.json is no index of an earlier"
        ):
            run(cfg, quiet=True)
    assert not (tmp_path / "fresh" / "docs").exists()  # told before the scan
    run(earlier, quiet=True)  # "run the earlier one again"
    run(fresh, quiet=True)


def test_an_index_that_does_not_compare_is_refused_before_the_scan(
    tmp_path: Path, two_corpora: tuple[Path, Path]
) -> None:
    first, second = two_corpora
    run(incremental(tmp_path, "earlier", [first]), quiet=True)
    later = incremental(tmp_path, "later", [second], previous=[str(tmp_path / "earlier")])
    near = replace(later.dedup.near, shingle_words=3)
    with pytest.raises(DataError, match=r"shingle_words=5, which do not compare .*shingle_words=3; take its"):
        run(replace(later, dedup=replace(later.dedup, near=near)), quiet=True)
    assert not (tmp_path / "later" / "docs").exists()


def test_an_index_is_written_when_it_is_asked_for_later(
    tmp_path: Path, two_corpora: tuple[Path, Path]
) -> None:
    first, second = two_corpora
    without = incremental(tmp_path, "earlier", [first], write_index=False)
    run(without, quiet=True)
    assert not (tmp_path / "earlier" / "index").exists()
    run(replace(without, dedup=replace(without.dedup, write_index=True)), quiet=True)
    later = incremental(tmp_path, "later", [second], previous=[without.out])
    run(later, quiet=True)
    assert len(texts_of(Path(later.out))) == 30


def test_a_later_run_takes_the_index_of_the_last_run_not_of_the_last_settings_tried(
    tmp_path: Path, two_corpora: tuple[Path, Path]
) -> None:
    first, second = two_corpora
    earlier = incremental(tmp_path, "earlier", [first])
    run(earlier, quiet=True)
    run(replace(earlier, rules=RulesConfig(min_words=140)), quiet=True)
    run(earlier, quiet=True)  # finished verdicts: nothing is done anew
    later = incremental(tmp_path, "later", [second], previous=[earlier.out])
    run(later, quiet=True)
    assert len(texts_of(Path(later.out))) == 30
