"""WARC and WET: which records become documents, and what broken ones become."""

from __future__ import annotations

import gzip
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import pytest
from fastwarc.stream_io import BrotliWriter

from llmtrain.data.document import BAD_REASONS, SKIP_REASONS, BadRecord, Document, Record, Skipped
from llmtrain.data.sources import markup, web
from llmtrain.data.sources.config import CorpusConfig, Extraction, Format
from llmtrain.data.sources.read import plan_units, read_unit
from llmtrain.errors import ConfigError

SAMPLES = Path(__file__).parents[4] / "shared/corpora/warc"

ARTICLE = "It was the best of times, it was the worst of times, and the page said so at length. " * 5
PAGE = (
    f"<html><head><title>T</title></head><body><nav><a href=/>Menu</a></nav>"
    f"<main><article><h1>Head</h1><p>{ARTICLE}</p></article></main></body></html>"
)


def record(
    block: bytes,
    kind: str = "response",
    content_type: str = "application/http; msgtype=response",
    length: int | str | None = None,
) -> bytes:
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: https://example.org/a\r\n"
        "WARC-Date: 2024-05-18T01:58:10Z\r\nWARC-Record-ID: <urn:uuid:1>\r\n"
        f"Content-Type: {content_type}\r\nContent-Length: {len(block) if length is None else length}\r\n\r\n"
    )
    return head.encode() + block + b"\r\n\r\n"


def response(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    lines = "".join(f"{header}\r\n" for header in headers)
    return record(f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body)


HTML = "Content-Type: text/html; charset=utf-8"
WET = record(b"One text.\nTwo lines.", "conversion", "text/plain")


def read(path: Path, content: bytes | None = None, **changes: Any) -> list[Record]:
    if content is not None:
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    cfg = CorpusConfig(name="t", format=Format.warc, paths=[str(path)], **changes)
    return [
        record
        for unit in plan_units(cfg, 100).units
        for _, records in read_unit(unit, cfg)
        for record in records
    ]


def shown(records: list[Record]) -> list[str]:
    """Texts of documents, reasons of the rest."""
    return [
        found.text.decode() if isinstance(found, Document) else found.reason
        for found in records
        if found is not None
    ]


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz"])
def test_pages_and_texts_become_documents_with_url_date_and_place(tmp_path: Path, name: str) -> None:
    page = response(PAGE.encode(), HTML)
    found = read(tmp_path / name, page + record(b"x", "request") + WET)
    assert [type(one) for one in found] == [Document, Skipped, Document]
    first, skipped, last = found
    assert isinstance(first, Document)
    assert isinstance(last, Document)
    assert isinstance(skipped, Skipped)
    assert (first.url, first.metadata) == ("https://example.org/a", {"warc_date": "2024-05-18T01:58:10Z"})
    assert first.text.decode().split() == ["Head", *ARTICLE.split()]
    assert (skipped.reason, skipped.detail) == ("not_a_page", "a record of type request")
    assert last.text == b"One text.\nTwo lines."
    assert (first.position, last.position) == (0, len(page) + len(record(b"x", "request")))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (response(b"gone", HTML, status="404 Not Found"), "http_status"),
        (response(b"moved", HTML, status="302 Found"), "http_status"),
        (response(b"%PDF-1.4", "Content-Type: application/pdf"), "not_text"),
        (response(b"\x89PNG\r\n\x1a\n" + bytes(40)), "not_text"),
        (response(b"", HTML), "no_text"),
        (response(b"<html><body><script>var a = 1</script>", HTML), "no_text"),
        (response(b"plain words", "Content-Type: text/plain"), "plain words"),
        (response(b"plain words", "content-TYPE:text/PLAIN;x=y"), "plain words"),
        (record(b"no status line at all"), "broken_page"),
        (record(b"{}", "conversion", "application/json"), "not_text"),
        (record(b"x", "resource", "text/html"), "not_a_page"),
        (record(b"x", "response", "text/dns"), "not_a_page"),
        (response(b"x" * 3000, "Content-Type: text/plain"), "absurd_length"),
        (response(zlib.compress(bytes(99_999)), HTML, "Content-Encoding: deflate"), "absurd_length"),
        (response(b"\x1f\x8bgarbage", HTML, "Content-Encoding: gzip"), "broken_page"),
        (response(b"garbage", HTML, "Content-Encoding: br"), "broken_page"),
    ],
)
def test_what_is_no_page_is_counted_and_what_follows_is_read(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    found = read(tmp_path / "a.warc", content + WET, max_document_bytes=2000)
    assert shown(found) == [expected, "One text.\nTwo lines."]
    kind = Skipped if expected in SKIP_REASONS else BadRecord if expected in BAD_REASONS else Document
    assert type(found[0]) is kind


def brotli(content: bytes, folder: Path) -> bytes:
    path = folder / "packed.br"
    writer = BrotliWriter(str(path))
    writer.write(content)
    writer.close()
    return path.read_bytes()


@pytest.mark.parametrize(
    "encoding", ["gzip", "deflate", "raw deflate", "br", "chunked", "chunked gzip", "said only"]
)
def test_bodies_are_unpacked(tmp_path: Path, encoding: str) -> None:
    page = PAGE.encode()
    raw = zlib.compressobj(wbits=-15)
    chunks = b"%x;ext=1\r\n%s\r\n5\r\n%s\r\n0\r\n\r\n"
    body, *headers = {
        "gzip": (gzip.compress(page), "Content-Encoding: gzip"),
        "deflate": (zlib.compress(page), "Content-Encoding: deflate"),
        "raw deflate": (raw.compress(page) + raw.flush(), "Content-Encoding: deflate"),
        "br": (brotli(page, tmp_path), "Content-Encoding: br"),
        "chunked": (chunks % (len(page) - 5, page[:-5], page[-5:]), "Transfer-Encoding: chunked"),
        "chunked gzip": (
            b"%x\r\n%s\r\n0\r\n\r\n" % (len(gzip.compress(page)), gzip.compress(page)),
            "Transfer-Encoding: chunked",
            "Content-Encoding: gzip",
        ),
        "said only": (page, "Transfer-Encoding: chunked", "Content-Encoding: gzip, br, deflate"),
    }[encoding]
    (found,) = read(tmp_path / "a.warc", response(body, HTML, *headers))
    assert isinstance(found, Document)
    assert found.text.decode().split() == ["Head", *ARTICLE.split()]


@pytest.mark.parametrize(
    ("encoding", "content_type", "meta"),
    [
        ("cp1251", "text/html; charset=windows-1251", ""),
        ("cp1251", "text/html", "<meta charset=windows-1251>"),
        ("cp1251", "text/html; charset=utf-8", "<meta charset=windows-1251>"),
        ("cp1251", "text/html; charset=nonsense", "<meta charset='windows-1251'>"),
        ("utf-8", "text/html", ""),
        ("utf-8-sig", "text/html; charset=iso-8859-1", ""),
    ],
)
def test_a_page_is_decoded_by_what_fits(tmp_path: Path, encoding: str, content_type: str, meta: str) -> None:
    text = "Все люди рождаются свободными и равными в своем достоинстве и правах. " * 4
    page = f"<html><head>{meta}</head><body><main><p>{text}</p></main></body></html>".encode(encoding)
    (found,) = read(tmp_path / "a.warc", response(page, f"Content-Type: {content_type}"))
    assert shown([found]) == [text.strip()]


def test_raw_text_keeps_the_menu(tmp_path: Path) -> None:
    (found,) = read(tmp_path / "a.warc", response(PAGE.encode(), HTML), extraction=Extraction.raw_text)
    assert "Menu" in shown([found])[0]


@pytest.mark.parametrize(
    ("content", "reason", "detail"),
    [
        (
            WET + record(b"short", length=9999),
            "truncated_archive",
            "a record of 9,999 bytes ends after",
        ),
        (WET + record(b"short", "request", length=9999), "truncated_archive", "9,999 bytes ends after 9"),
        (WET + record(b"short")[:-40], "corrupt_archive", "a record whose Content-Length is ''"),
        (WET + b"garbage " * 9 + WET, "corrupt_archive", "the file is lost behind the record at byte 0"),
        (WET + record(b"x" * 50, length="many") + WET, "corrupt_archive", "Content-Length is 'many'"),
        (WET + record(b"x" * 50, length=10**30) + WET, "corrupt_archive", "Content-Length is '1000"),
        (WET + b"WARC/1.0\r\nX: " + b"a" * 99_999 + WET, "corrupt_archive", "header length exceeded"),
    ],
)
def test_damage_ends_the_file_with_one_bad_record(
    tmp_path: Path, content: bytes, reason: str, detail: str
) -> None:
    found = read(tmp_path / "a.warc", content)
    assert shown(found)[0] == "One text.\nTwo lines."
    bad = found[-1]
    assert isinstance(bad, BadRecord)
    assert (bad.reason, len(found)) == (reason, 2)
    assert detail in bad.detail


def test_a_panic_of_the_parser_is_a_bad_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    panic = type("PanicException", (BaseException,), {})

    def panics(*_: object, **__: object) -> None:
        raise panic("called unwrap on an Err value")

    monkeypatch.setattr(web, "ArchiveIterator", panics)
    (found,) = read(tmp_path / "a.warc", WET)
    assert isinstance(found, BadRecord)
    assert (found.reason, "called unwrap" in found.detail) == ("corrupt_archive", True)
    panic.__name__ = "KeyboardInterrupt"
    with pytest.raises(panic):
        read(tmp_path / "a.warc")


@pytest.mark.parametrize(
    "page",
    [
        "<div>" * 20_000 + "x",
        "<ul><li>x" * 20_000,
        "<div><span>" * 20_000,
        "<p " + " ".join(f"a{number}=1" for number in range(60_000)) + ">x",
        "<p " + "a='>' " * 60_000 + ">x",
    ],
)
def test_a_page_that_would_take_minutes_is_left_out(tmp_path: Path, page: str) -> None:
    (found,) = read(tmp_path / "a.warc", response(page.encode(), HTML))
    assert isinstance(found, BadRecord)
    assert found.reason == "absurd_nesting"
    assert "tags are nested or filled so that extraction would take minutes" in found.detail


@pytest.mark.parametrize(
    ("page", "work"),
    [
        ("", 0),
        ("<p>a</p>", 0),
        ("<div><p>a</p></div><p>", 2),
        ("<DIV><Article>a</article></div><p>", 3),
        ("<div><!-- <div><div> --><ul></ul></div>", 3),
        ("</div></div><div>", 1),
        ("<p a b c d>", 1),
        ("<p a='b c d e' f=\"> >\" g=h >", 0),
        ("<", 0),
        ("<div", 1),
        ("<!--", 0),
        ("a < b and <3", 0),
    ],
)
def test_the_work_of_a_page_is_counted(page: str, work: int) -> None:
    assert markup.extraction_work(page.encode()) == work


def test_trafilatura_is_asked_for_precision_and_its_absence_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    fake: Any = types.ModuleType("trafilatura")
    fake.extract = lambda page, **settings: calls.append(settings) or None
    monkeypatch.setitem(sys.modules, "trafilatura", fake)
    path = tmp_path / "a.warc"
    assert shown(read(path, response(PAGE.encode(), HTML), extraction=Extraction.trafilatura)) == ["no_text"]
    assert calls == [{"favor_precision": True, "include_comments": False}]
    monkeypatch.setitem(sys.modules, "trafilatura", None)
    with pytest.raises(ConfigError, match=r"corpus.extraction=trafilatura needs the package trafilatura"):
        read(path, extraction=Extraction.trafilatura)


def test_trafilatura_finds_the_article(tmp_path: Path) -> None:
    pytest.importorskip("trafilatura", reason="an optional extra", exc_type=ImportError)
    found = read(tmp_path / "a.warc", response(PAGE.encode(), HTML), extraction=Extraction.trafilatura)
    assert ARTICLE.strip() in shown(found)[0]
    assert "Menu" not in shown(found)[0]


def test_errors_of_an_extractor_are_bad_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> str:
        raise ValueError("no tree")

    monkeypatch.setattr(web, "extract_plain_text", fails)
    (found,) = read(tmp_path / "a.warc", response(PAGE.encode(), HTML))
    assert isinstance(found, BadRecord)
    assert (found.reason, found.detail) == ("broken_page", "ValueError: no tree")


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the shared corpora are not here")
def test_real_and_broken_samples_all_end_without_an_exception() -> None:
    counts: dict[str, list[str]] = {}
    for path in sorted(SAMPLES.iterdir()):
        for extraction in (Extraction.resiliparse, Extraction.raw_text):
            found = read(path, extraction=extraction)
            kinds = [type(one).__name__ for one in found]
            assert kinds, path.name
            counts[path.name] = kinds
    assert counts["clipped.warc.gz"] == ["BadRecord"]
    assert counts["warcfile.warc.gz"].count("Document") == 16
    assert counts["warcfile.warc.gz"].count("Skipped") == 34
    assert counts["whirlwind.warc.wet.gz"] == ["Skipped", "Document"]
    assert counts["clueweb-quirk.warc.gz"].count("Document") == 29
    assert counts["example.arc"] == ["BadRecord"]
