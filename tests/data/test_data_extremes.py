"""`llmtrain data` where it hurts: input that changes, full and read-only disks, odd corpora, and what errors
say."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import whole_corpus as whole

from llmtrain.data import pipeline, signals
from llmtrain.data.config import DataConfig, DocumentsConfig, StopAfter, TokenizerConfig
from llmtrain.data.content.config import ContentConfig, LanguageConfig, UrlsConfig
from llmtrain.data.dedup.config import DedupConfig, LineConfig, NearConfig, Survivor
from llmtrain.data.engines.config import EngineConfig, EngineKind
from llmtrain.data.filters.config import EditsConfig, RulesConfig
from llmtrain.data.flow import check_closes
from llmtrain.data.pipeline import run
from llmtrain.data.sources.config import CorpusConfig, Format
from llmtrain.errors import ConfigError, DataError

Make = Callable[..., DataConfig]
Write = Callable[..., Path]
INLINE = EngineConfig(kind=EngineKind.inline)


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


@pytest.fixture
def plain_config(tmp_path: Path) -> Make:
    """Settings with nothing on but exact duplicates, that end with documents."""

    def with_changes(path: Path, **changes: Any) -> DataConfig:
        values: dict[str, Any] = {
            "corpus": CorpusConfig(name="odd", format=Format.jsonl, paths=[str(path)]),
            "engine": INLINE,
            "stop_after": StopAfter.documents,
            "out": str(tmp_path / "out"),
        }
        return DataConfig(**(values | changes))

    return with_changes


def dropped(out: Path, number: int = 1) -> dict[str, int]:
    counts = whole.summary_of(out)["funnel"][number]["dropped"]
    return {reason: count["documents"] for reason, count in counts.items() if count["documents"]}


# Input that changes.


def grow(path: Path) -> None:
    with open(path, "a") as handle:
        handle.write(json.dumps({"text": whole.story(99), "site": "a"}) + "\n")


def rewrite(path: Path) -> None:
    path.write_text(path.read_text().replace("river", "RIVER"))


def put_another_in_place(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_text(path.read_text().replace("river", "RIVER"))
    other.replace(path)


@pytest.mark.parametrize("change", [grow, rewrite, put_another_in_place, Path.unlink])
def test_input_that_changes_in_the_middle_stops_the_run_with_its_name(
    make: Make, corpus: list[str], monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    engine = EngineConfig(kind=EngineKind.inline, unit_bytes=6_000)
    victim = Path(corpus[2])
    scan_unit = pipeline.scan_unit
    read: list[int] = []

    def scan_and_change(task: Any) -> Any:
        summary = scan_unit(task)
        read.append(task.unit.number)
        if any(piece.path == str(victim) for piece in task.unit.slices) and victim.exists():
            change(victim)
        return summary

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "scan_unit", scan_and_change)
        what = "is gone; it had" if change is Path.unlink else "changed while this run was on"
        with pytest.raises(DataError, match=rf"three\.jsonl {what}.*same command again"):
            run(make(engine=engine, stop_after=StopAfter.documents), quiet=True)
    assert len(read) > 2
    left = [path for path in corpus if Path(path).exists()]
    run(make(engine=engine, paths=left, stop_after=StopAfter.documents), quiet=True)
    run(make("fresh", paths=left, stop_after=StopAfter.documents), quiet=True)
    out, fresh = (whole.output_of(Path(make(name).out)) for name in ("out", "fresh"))
    assert out == fresh


def test_a_list_that_changes_in_the_middle_stops_the_run_with_its_name(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = EngineConfig(kind=EngineKind.inline, unit_bytes=20_000)
    cfg = make(engine=engine, stop_after=StopAfter.documents)
    scan_unit = pipeline.scan_unit

    def change_and_scan(task: Any) -> Any:
        (tmp_path / "domains").write_text("good.example\n")
        signals._TOOLS.clear()  # as in a worker that starts late
        return scan_unit(task)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "scan_unit", change_and_scan)
        with pytest.raises(DataError, match=r"domains changed while this run was on.*same command again"):
            run(cfg, quiet=True)
    run(cfg, quiet=True)
    assert dropped(Path(cfg.out))["url_blocked"] > 80


# Disks.


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """A file system with these options, the same one each time."""
    folder = tmp_path / "small"
    folder.mkdir()
    is_mounted = False

    def with_options(options: str) -> Path:
        nonlocal is_mounted
        how = f"remount,{options}" if is_mounted else options
        command = ["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode and not is_mounted:
            pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.decode().strip()}")
        assert done.returncode == 0, done.stderr
        is_mounted = True
        return folder

    yield with_options
    if is_mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    ("kind", "num_sizes"),
    [
        ("inline", 4),
        pytest.param("local", 6, marks=pytest.mark.slow),
        pytest.param("inline", 60, marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_fills_up_in_any_step_is_named_and_the_run_goes_on_later(
    make: Make, mount: Callable[..., Path], kind: str, num_sizes: int
) -> None:
    engine = EngineConfig(kind=EngineKind[kind], workers=2, unit_bytes=30_000)
    cfg = make(engine=INLINE)
    run(cfg, quiet=True)
    expected = whole.output_of(Path(cfg.out))
    needed = sum(
        (path.stat().st_size + 4095) // 4096 * 4096 for path in Path(cfg.out).rglob("*") if path.is_file()
    )
    said: list[str] = []
    for number in range(num_sizes):
        small = mount(f"size={max(16, needed * (number + 1) // (num_sizes + 1) // 1024)}k")
        limited = replace(cfg, engine=engine, out=str(small / "out"))
        try:
            run(limited, quiet=True)
        except DataError as error:
            said.append(str(error))
        left = [path for path in small.rglob("*") if ".tmp-" in path.name]
        assert kind == "local" or not left  # processes at work are ended, and the next run clears up
        mount("size=100m")
        run(limited, quiet=True)
        assert whole.output_of(small / "out") == expected
        shutil.rmtree(small / "out")
    assert len(said) >= num_sizes - 1
    pattern = (
        r"no space left for .*/small/out: [\d,]+ bytes written, [\d,]+ bytes free on its file system\. Free"
    )
    assert all(re.match(pattern, message) for message in said), said


def test_a_disk_that_is_read_only_is_named(
    make: Make, mount: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = mount("size=100m,ro")
    cfg = replace(make(engine=INLINE), out=str(small))
    with pytest.raises(DataError, match=r"out=.*/small cannot be written: Read-only file system; give anoth"):
        run(cfg, quiet=True)
    mount("rw")

    def refuse(*arguments: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "docs")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "scan_unit", refuse)
        with pytest.raises(
            DataError, match=r"out=.*/small cannot be written any more: .*Read-only file system: 'docs'; moun"
        ):
            run(cfg, quiet=True)
    run(cfg, quiet=True)


# What is done again.


def scans(cfg: DataConfig, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run; whether any input was read for it."""
    is_read: list[bool] = []
    original = pipeline.scan_unit

    def watched(task: Any) -> Any:
        done = Path(task.out) / "signals" / task.key / f"unit-{task.unit.number:05d}.json"
        is_read.append(not done.exists())
        return original(task)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "scan_unit", watched)
        run(cfg, quiet=True)
    return any(is_read)


def test_a_changed_bound_reads_no_input(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = make(stop_after=StopAfter.documents)
    assert scans(cfg, monkeypatch)
    dedup, near, lines, ngrams = cfg.dedup, cfg.dedup.near, cfg.dedup.lines, cfg.dedup.ngrams
    changed = [
        {"rules": replace(cfg.rules, min_words=30)},
        {"rules": RulesConfig()},
        {"dedup": replace(dedup, near=replace(near, threshold=0.85))},
        {"dedup": replace(dedup, near=replace(near, bands=28, rows=4, max_key_documents=5))},
        {"dedup": replace(dedup, lines=replace(lines, max_removed_share=0.9))},
        {"dedup": replace(dedup, ngrams=replace(ngrams, max_share=0.5))},
        {"dedup": replace(dedup, survivor=Survivor.smallest_id, exact=False)},
        {"held_out": replace(cfg.held_out, fraction=0.2)},
        {"max_quarantine_share": 0.5},
        {"engine": replace(cfg.engine, max_worker_deaths=1)},
    ]
    outputs = []
    for changes in changed:
        assert not scans(replace(cfg, **changes), monkeypatch), changes
        listing = (Path(cfg.out) / "documents.json").read_text()
        again = make("again", stop_after=StopAfter.documents, **changes)
        run(again, quiet=True)
        assert (Path(again.out) / "documents.json").read_text() == listing, changes
        outputs.append(json.dumps(json.loads(listing)["files"]))
        shutil.rmtree(again.out)
    assert len(set(outputs)) >= 6


def test_changed_lists_models_and_settings_of_the_text_read_it_again(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = make(stop_after=StopAfter.decide)
    assert scans(cfg, monkeypatch)
    counts = dropped(Path(cfg.out))

    def again() -> dict[str, int]:
        assert scans(cfg, monkeypatch)
        assert not scans(cfg, monkeypatch)
        newest = max(Path(cfg.out).glob("verdicts/*/summary.json"), key=lambda path: path.stat().st_mtime_ns)
        found = json.loads(newest.read_text())["funnel"][1]["dropped"]
        return {reason: count["documents"] for reason, count in found.items()}

    (tmp_path / "domains").write_text("nowhere.example\n")
    assert "url_blocked" not in again()
    (tmp_path / "bad_words.txt").write_text("river\n")
    assert again()["bad_words"] > counts["bad_words"]
    (tmp_path / "items.jsonl").write_text('{"question": "no text asks for this one at all, not ever"}\n')
    assert "contaminated" not in again()
    cfg = replace(cfg, edits=replace(cfg.edits, min_words_per_line=9))
    again()


def test_verdicts_do_not_depend_on_the_engine_or_its_units(make: Make) -> None:
    found = []
    for number, unit_bytes in enumerate((3_000, 30_000, 1 << 20)):
        engine = EngineConfig(kind=EngineKind.inline, unit_bytes=unit_bytes)
        cfg = make(f"units{number}", engine=engine, stop_after=StopAfter.decide)
        run(cfg, quiet=True)
        summary = whole.summary_of(Path(cfg.out))
        found.append([summary["documents_digest"], summary["funnel"]])
    assert found[0] == found[1] == found[2]


# Odd corpora.


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], r"corpus odd is empty: no document in .*texts\.jsonl"),
        (["One text."], r"1 of 1 documents are left, and two different ones are needed.*Dropped: none"),
        (["A text."] * 2, r"1 of 2 documents are left, and two different ones are needed.*duplicate 1"),
        (["", " \n ", "\x00"], r"0 of 3 documents are left.*Dropped: empty 3"),
    ],
)
def test_a_corpus_without_two_texts_says_what_became_of_them(
    write_jsonl: Write, plain_config: Make, documents: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        run(plain_config(write_jsonl(documents)), quiet=True)


def test_copies_that_are_kept_are_no_two_texts(write_jsonl: Write, plain_config: Make) -> None:
    cfg = plain_config(write_jsonl(["A text."] * 3), dedup=DedupConfig(exact=False))
    with pytest.raises(DataError, match=r"3 of 3 documents are left, all of the same text, and two diff"):
        run(cfg, quiet=True)


def test_two_texts_are_enough(write_jsonl: Write, plain_config: Make) -> None:
    cfg = plain_config(write_jsonl(["One.", "Two."]))
    assert [file.num_documents for file in run(cfg, quiet=True).documents] == [1, 1]


def test_units_without_a_good_record_or_a_kept_document_leave_no_trace(make: Make, tmp_path: Path) -> None:
    paths = whole.write_corpus(tmp_path / "more")
    run(make("with", paths=paths), quiet=True)
    for name, content in [
        ("a_bad.jsonl", b"{\n" * 3),
        ("b_empty.jsonl", b""),
        ("c_blank.jsonl", b"\n\n\n"),
        ("d_short.jsonl", b'{"text": "short"}\n' * 3),
        ("p_void.jsonl", b'{"text": ""}\n' * 3),
    ]:
        (tmp_path / "more" / name).write_bytes(content)
        paths.insert(0 if name < "n" else 2, str(tmp_path / "more" / name))
    outputs = []
    for unit_bytes in (4_000, 1 << 20):
        engine = EngineConfig(kind=EngineKind.inline, unit_bytes=unit_bytes)
        cfg = make(f"odd{unit_bytes}", paths=paths, engine=engine)
        run(cfg, quiet=True)
        outputs.append(whole.output_of(Path(cfg.out)))
    assert outputs[0] == outputs[1]


def test_documents_that_edits_empty_are_dropped_as_empty(write_jsonl: Write, plain_config: Make) -> None:
    path = write_jsonl(["menu\nhome\nnews", "A sentence that stays here.\nmenu", "Another that stays too."])
    cfg = plain_config(path, edits=EditsConfig(terminal_marks="."))
    run(cfg, quiet=True)
    scan, decide = whole.summary_of(Path(cfg.out))["funnel"]
    assert dropped(Path(cfg.out)) == {"empty": 1}
    assert decide["dropped"]["empty"] == {"documents": 1, "bytes": 0}
    assert scan["dropped"]["no_terminal_mark"]["bytes"] == len("menu\nhome\nnews") + len("\nmenu")
    check_closes(scan)


def test_a_hundred_thousand_tiny_documents_in_many_units(write_jsonl: Write, plain_config: Make) -> None:
    path = write_jsonl([f"Tiny text number {number} of many." for number in range(100_000)])
    dedup = DedupConfig(lines=LineConfig(enabled=True, min_chars=5), max_source_removal=None)
    cfg = plain_config(path, dedup=dedup, engine=EngineConfig(kind=EngineKind.local, unit_bytes=200_000))
    files = run(cfg, quiet=True).documents
    assert sum(file.num_documents for file in files) == 100_000


@pytest.mark.slow
def test_a_document_of_nineteen_megabytes_among_small_ones(tmp_path: Path, write_jsonl: Write) -> None:
    long = whole.story(555, 165_000)
    assert 19_000_000 > len(long) > 15_000_000
    documents = [{"text": whole.story(number)} for number in range(20)]
    path = write_jsonl([*documents[:10], {"text": long}, *documents[10:], {"text": long + " So it ends."}])
    cfg = whole.whole_config(tmp_path, [str(path)], tmp_path / "out", stop_after=StopAfter.documents)
    cfg = replace(
        cfg,
        corpus=CorpusConfig(name="jsonl", format=Format.jsonl, paths=[str(path)]),
        rules=RulesConfig(min_words=5),
    )
    run(cfg, quiet=True)
    assert dropped(Path(cfg.out)) == {"near_duplicate": 1}
    scan, decide = whole.summary_of(Path(cfg.out))["funnel"]
    assert decide["kept"]["bytes"] > len(long) * 0.9
    check_closes(scan)
    check_closes(decide)


def test_a_corpus_of_one_boilerplate_is_all_compared_with_few(write_jsonl: Write, plain_config: Make) -> None:
    """Band keys above the cap: their documents are compared with a representative, and all are found."""
    page = whole.story(3, 6)
    texts = [whole.slightly_changed(page, seed, 1) for seed in range(300)]
    near = NearConfig(enabled=True, max_key_documents=10, max_cluster=50)
    dedup = DedupConfig(near=near, lines=LineConfig(enabled=True))
    cfg = plain_config(write_jsonl([*texts, whole.story(4), whole.story(5)]), dedup=dedup)
    run(cfg, quiet=True)
    facts = json.loads((Path(cfg.out) / "facts.json").read_text())
    assert facts["near"]["counts"]["num_boilerplate_keys"] > 0
    assert facts["near"]["counts"]["num_candidates"] < 300 * 14 * 8
    found = dropped(Path(cfg.out))
    assert sum(found.values()) >= 298
    again = replace(cfg, engine=EngineConfig(kind=EngineKind.inline, unit_bytes=20_000), out=cfg.out + "2")
    run(again, quiet=True)
    assert whole.output_of(Path(again.out)) == whole.output_of(Path(cfg.out))


def test_a_source_that_is_all_copies_stops_the_run_until_its_bound_is_raised(
    tmp_path: Path, write_jsonl: Write, plain_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = whole.story(3, 12)
    records = [{"text": whole.slightly_changed(page, seed, 3), "site": "mirror"} for seed in range(40)]
    records += [{"text": whole.story(100 + seed), "site": "blog"} for seed in range(40)]
    dedup = DedupConfig(near=NearConfig(enabled=True), min_source_documents=20)
    path = write_jsonl(records)
    cfg = plain_config(path, dedup=dedup)
    cfg = replace(cfg, corpus=replace(cfg.corpus, source_field="site"))
    message = (
        r"near-duplicates remove 39 of 40 documents \(97\.5%\) of source 'mirror', above "
        r"dedup\.max_source_removal=0\.8\. Removed, and what stays for them: [0-9a-f]{32} for [0-9a-f]{32} "
        r"\(signatures agree in \d+%\); .*raise dedup\.max_source_removal.*dedup\.near\.threshold=0\.7"
    )
    for _ in range(2):
        with pytest.raises(DataError, match=message):
            run(cfg, quiet=True)
    raised = replace(cfg, dedup=replace(dedup, max_source_removal=None))
    assert not scans(raised, monkeypatch)
    assert dropped(Path(cfg.out)) == {"near_duplicate": 39}
    with pytest.raises(DataError, match=message):
        run(cfg, quiet=True)  # finished verdicts do not hide what they did
    few = replace(cfg, dedup=replace(dedup, min_source_documents=41))
    run(few, quiet=True)


def test_records_of_a_crawl_that_are_no_text_are_skipped_and_counted(
    tmp_path: Path, plain_config: Make
) -> None:
    def record(kind: str, block: bytes, content_type: str) -> bytes:
        head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: https://example.org/a\r\n"
        head += f"WARC-Date: 2024-05-18T01:58:10Z\r\nContent-Type: {content_type}\r\n"
        return f"{head}Content-Length: {len(block)}\r\n\r\n".encode() + block + b"\r\n\r\n"

    def page(text: str, status: str = "200 OK") -> bytes:
        body = f"<html><body><main><p>{text}</p></main></body></html>"
        block = f"HTTP/1.1 {status}\r\nContent-Type: text/html\r\n\r\n{body}".encode()
        return record("response", block, "application/http; msgtype=response")

    stories = [whole.story(number) for number in range(6)]
    parts = [record("request", b"GET / HTTP/1.1\r\n\r\n", "application/http; msgtype=request")]
    parts += [page(text) for text in stories] + [page("gone", "404 Not Found"), page(stories[0])]
    path = tmp_path / "crawl.warc.gz"
    path.write_bytes(b"".join(gzip.compress(part, mtime=0) for part in parts))
    cfg = plain_config(path, dedup=DedupConfig(near=NearConfig(enabled=True)))
    cfg = replace(cfg, corpus=replace(cfg.corpus, format=Format.warc))
    run(cfg, quiet=True)
    scan, decide = whole.summary_of(Path(cfg.out))["funnel"]
    for entry in (scan, decide, *scan["sources"].values(), *decide["sources"].values()):
        check_closes({"pass": "", **entry})
    assert dropped(Path(cfg.out), 0) == {"http_status": 1, "not_a_page": 1}
    assert scan["in"]["documents"] == 9
    assert dropped(Path(cfg.out)) == {"duplicate": 1}
    path.write_bytes(gzip.compress(parts[0]) + gzip.compress(parts[-2]))
    with pytest.raises(DataError, match=r"is empty: no document in .*crawl.* \(2 records are no text\)"):
        run(cfg, quiet=True)


# What errors say.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rules": RulesConfig(languages=["en"])},
            r"rules\.languages=\['en'\] needs the signal language: set content\.language\.enabled=true, or "
            r"rules\.languages=null",
        ),
        (
            {"rules": RulesConfig(min_language_score=0.6)},
            r"rules\.min_language_score=0\.6 needs the signal language_score: set content\.language",
        ),
        (
            {
                "rules": RulesConfig(languages=["en", "klingon"]),
                "content": ContentConfig(language=LanguageConfig(enabled=True)),
            },
            r"rules\.languages: unknown language code 'klingon'",
        ),
        ({"rules": RulesConfig(min_quality=0.5)}, r"needs the signal quality: set content\.quality\.model="),
        ({"rules": RulesConfig(max_blocked_urls=0)}, r"signal url_blocked: set content\.urls\.block=\[FILE"),
        (
            {"rules": RulesConfig(max_contaminated_ngrams=0)},
            r"needs the signal num_contaminated_ngrams: set content\.decontamination\.sets=",
        ),
        (
            {"rules": RulesConfig(min_words=5), "measure": False},
            r"rules\.min_words=5 needs the signal num_words: set measure=true, or rules\.min_words=null",
        ),
        (
            {"dedup": DedupConfig(survivor=Survivor.quality)},
            r"dedup\.survivor=quality needs the signal quality: set content\.quality\.model=FILE, or another",
        ),
    ],
)
def test_settings_that_need_others_are_refused_before_any_work(
    write_jsonl: Write, plain_config: Make, changes: dict[str, Any], message: str
) -> None:
    cfg = plain_config(write_jsonl(["One.", "Two."]), **changes)
    with pytest.raises(ConfigError, match=message):
        run(cfg, quiet=True)
    assert not Path(cfg.out).exists()


def test_a_run_that_names_itself_as_an_earlier_one_is_refused(write_jsonl: Write, plain_config: Make) -> None:
    cfg = plain_config(write_jsonl(["One.", "Two."]))
    run(cfg, quiet=True)
    previous = os.path.join(cfg.out, ".", "")
    with pytest.raises(ConfigError, match=r"dedup\.previous names out=.* itself, so every document would be"):
        run(replace(cfg, dedup=DedupConfig(previous=[previous])), quiet=True)


def test_files_that_the_settings_name_are_looked_at_before_the_scan(
    tmp_path: Path, write_jsonl: Write, plain_config: Make
) -> None:
    path = write_jsonl(["One.", "Two."])
    urls = ContentConfig(urls=UrlsConfig(block=[str(tmp_path / "no_list")]))
    with pytest.raises(DataError, match=r"no_list, which the settings of content or edits name, cannot be"):
        run(plain_config(path, content=urls), quiet=True)
    given = TokenizerConfig(path=str(tmp_path / "no_model"))
    with pytest.raises(DataError, match="no_model"):
        run(plain_config(path, tokenizer=given, stop_after=StopAfter.pack), quiet=True)
    assert not (tmp_path / "out" / "docs").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"file_bytes": 0}, "documents.file_bytes=0 must be at least 1"),
        ({"zstd_level": 0}, r"documents.zstd_level=0 must lie in 1\.\.22"),
        ({"zstd_level": 23}, r"documents.zstd_level=23 must lie in 1\.\.22"),
    ],
)
def test_settings_of_documents_that_cannot_be_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DocumentsConfig(**settings)


def test_what_was_dropped_is_told_in_one_order_whatever_the_units(
    write_jsonl: Write, plain_config: Make
) -> None:
    path = write_jsonl(["A text of five words.", "", "A text of five words.", "a b", "  "])
    for unit_bytes in (1, 1 << 20):
        engine = EngineConfig(kind=EngineKind.inline, unit_bytes=unit_bytes)
        cfg = plain_config(path, rules=RulesConfig(min_words=3), engine=engine)
        with pytest.raises(DataError, match=r"1 of 5 .*Dropped: empty 2, duplicate 1, too_short 1\. The fir"):
            run(cfg, quiet=True)
