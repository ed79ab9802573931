"""Input behind URLs: memory:// and a server on this machine; and input that changes during a run."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmtrain.data.document import Document
from llmtrain.data.sources import files, slices
from llmtrain.data.sources.config import CorpusConfig, Format, TextUnit
from llmtrain.data.sources.read import plan_units, read_unit
from llmtrain.data.sources.slices import Plan, file_digests
from llmtrain.errors import DataError

TEXTS = [f"text {number} " + "é" * (number % 7) for number in range(60)]
JSONL = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def config(format_: Format, *paths: str | Path, **changes: Any) -> CorpusConfig:
    return CorpusConfig(name="t", format=format_, paths=[str(path) for path in paths], **changes)


def read(cfg: CorpusConfig, plan: Plan) -> tuple[list[str], dict[str, str]]:
    """Every text, with reasons for bad records, and the hash of each file."""
    found, digests = [], []
    for unit in plan.units:
        digests.append([])
        for _, records in read_unit(unit, cfg):
            found += [
                record.text.decode() if isinstance(record, Document) else record.reason
                for record in records
                if record is not None
            ]
            digests[-1].append(records.digest)
    return found, file_digests(plan.units, digests)


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


def parquet_bytes() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS, "n": list(range(60))}), sink, row_group_size=7)
    return sink.getvalue()


@pytest.mark.parametrize("pattern", ["memory://in/*.jsonl*", "memory://in", "memory://in/a.jsonl"])
def test_files_of_a_remote_file_system_are_listed_and_cut(memory: Any, pattern: str) -> None:
    memory.pipe_file("/in/a.jsonl", JSONL)
    if pattern != "memory://in/a.jsonl":
        memory.pipe_file("/in/b.jsonl.gz", gzip.compress(JSONL))
    cfg = config(Format.jsonl, pattern)
    whole = read(cfg, plan_units(cfg, 1 << 20))
    assert whole[0] == TEXTS * (1 if pattern.endswith("a.jsonl") else 2)
    plan = plan_units(cfg, 100)
    assert len(plan.units) > 10
    assert read(cfg, plan) == whole
    assert plan.fingerprint[0][0] == "memory:///in/a.jsonl"


def test_remote_parquet_is_read_by_row_group(memory: Any) -> None:
    memory.pipe_file("/a.parquet", parquet_bytes())
    cfg = config(Format.parquet, "memory://a.parquet")
    plan = plan_units(cfg, 1)
    assert len(plan.units) == 9
    assert read(cfg, plan)[0] == TEXTS


def test_local_and_remote_paths_stand_together(memory: Any, tmp_path: Path) -> None:
    memory.pipe_file("/a.jsonl", JSONL)
    (tmp_path / "b.jsonl").write_bytes(JSONL)
    cfg = config(Format.jsonl, "memory://a.jsonl", tmp_path / "b.jsonl", f"file://{tmp_path}/b.jsonl")
    found, digests = read(cfg, plan_units(cfg, 1 << 20))
    assert found == TEXTS * 2
    assert len(set(digests.values())) == 1


class Server(BaseHTTPRequestHandler):
    contents: ClassVar[dict[str, bytes]] = {}
    knows_ranges = True
    num_failures = 0
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        content = self.contents.get(self.path)
        if content is None:
            self.answer(404, b"")
            return
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if self.command == "GET" and type(self).num_failures:
            type(self).num_failures -= 1
            self.answer(503, b"")
        elif part and self.knows_ranges:
            end = min(len(content), int(part[2] or len(content)) + 1)
            place = f"bytes {part[1]}-{end - 1}/{len(content)}"
            self.answer(206, content[int(part[1]) : end], ("Content-Range", place))
        else:
            self.answer(200, content, ("ETag", f'"{hash(content)}"'))

    def answer(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (*headers, ("Accept-Ranges", "bytes" if self.knows_ranges else "none")):
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(files, "PAUSES_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(Server, "contents", {})
    monkeypatch.setattr(Server, "knows_ranges", True)
    monkeypatch.setattr(Server, "num_failures", 0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_files_of_a_web_server_are_read(server: str, knows_ranges: bool) -> None:
    Server.knows_ranges = knows_ranges
    Server.contents = {
        "/a.jsonl": JSONL,
        "/b.jsonl.gz?token=1": gzip.compress(JSONL),
        "/c.parquet": parquet_bytes(),
    }
    cfg = config(Format.jsonl, f"{server}/a.jsonl", f"{server}/b.jsonl.gz?token=1")
    plan = plan_units(cfg, 500)
    assert len(plan.units) == (5 if knows_ranges else 2)
    assert read(cfg, plan)[0] == TEXTS * 2
    assert plan.units[0].slices[0].source == "a"
    if knows_ranges:
        cfg = config(Format.parquet, f"{server}/c.parquet")
        assert read(cfg, plan_units(cfg, 500))[0] == TEXTS


def test_a_request_that_fails_is_made_again(server: str) -> None:
    Server.contents = {"/a.jsonl": JSONL}
    cfg = config(Format.jsonl, f"{server}/a.jsonl")
    plan = plan_units(cfg, 1 << 20)
    Server.num_failures = 2
    assert read(cfg, plan)[0] == TEXTS
    Server.num_failures = 99
    with pytest.raises(DataError, match=r"/a.jsonl cannot be read: .*503.*See that it can be reached"):
        read(cfg, plan)


def test_a_file_of_a_server_that_changes_or_goes_is_named(server: str) -> None:
    Server.contents = {"/a.jsonl": JSONL}
    cfg = config(Format.jsonl, f"{server}/a.jsonl")
    plan = plan_units(cfg, 1 << 20)
    Server.contents = {"/a.jsonl": JSONL.replace(b"text 1", b"TEXT 1")}
    with pytest.raises(
        DataError, match=r"a.jsonl changed while this run was on: .*ETag .* when it was listed"
    ):
        read(cfg, plan)
    Server.contents = {}
    with pytest.raises(DataError, match=r"a.jsonl is gone; it had .* when this run listed its input"):
        read(cfg, plan)
    with pytest.raises(DataError, match=r"corpus.paths: 'http://.*/a.jsonl' matches no file; look at it"):
        plan_units(cfg, 1 << 20)


def test_file_systems_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        DataError, match=r"'nowhere://a' cannot be opened: Protocol not known: nowhere; known: .*s3"
    ):
        plan_units(config(Format.jsonl, "nowhere://a"), 1)

    def fails(_: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", fails)
    with pytest.raises(
        DataError, match=r"'s3://b/a' needs a package that is not installed: Install s3fs to access S3"
    ):
        plan_units(config(Format.jsonl, "s3://b/a"), 1)


def test_a_file_system_that_cannot_be_reached_is_named(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no credentials")

    monkeypatch.setattr(type(memory), "info", fails)
    with pytest.raises(DataError, match=r"memory://a.jsonl cannot be read: RuntimeError: no credentials"):
        plan_units(config(Format.jsonl, "memory://a.jsonl"), 1)


# Input that changes, and its hashes.


@pytest.mark.parametrize("what", ["longer", "touched", "gone"])
@pytest.mark.parametrize("when", ["before", "while"])
def test_a_file_that_changes_during_a_run_stops_it(tmp_path: Path, what: str, when: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(JSONL)
    cfg = config(Format.jsonl, path)
    (unit,) = plan_units(cfg, 1 << 20).units

    def change() -> None:
        if what == "longer":
            path.write_bytes(JSONL + b"\n")
        elif what == "touched":
            os.utime(path, ns=(0, 0))
        else:
            path.unlink()

    expected = "is gone; it had" if what == "gone" else "changed while this run was on"
    found = read_unit(unit, cfg)
    if when == "while":
        _, records = next(found)
        assert isinstance(next(iter(records)), Document)
    change()
    with pytest.raises(
        DataError, match=f"{path} {expected}.* bytes, changed at .* ns .*run the same command again"
    ):
        next(found)


def test_a_file_of_the_installation_that_changes_stops_the_run(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text("words")
    piece = slices.Slice(
        path=str(path), name="a", source="a", start=0, end=5, num_bytes=5, version="5 bytes, changed at 1 ns"
    )
    cfg = CorpusConfig(name="t", format=Format.python_docs)
    with pytest.raises(DataError, match=r"a.md changed while this run was on: 5 bytes, changed at 1 ns"):
        list(read_unit(slices.Unit(number=0, slices=(piece,)), cfg))


@pytest.mark.parametrize("unit_bytes", [1, 13, 64, 100, 256, 1000, 1 << 20])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_the_hash_of_a_file_does_not_depend_on_the_cut(
    tmp_path: Path, name: str, unit_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "HASH_CHUNK_BYTES", 64)
    path = tmp_path / name
    content = gzip.compress(JSONL, mtime=0) if name.endswith(".gz") else JSONL
    path.write_bytes(content)
    cfg = config(Format.text, path, text_unit=TextUnit.line)
    _, digests = read(cfg, plan_units(cfg, unit_bytes))
    expected = sum(
        int.from_bytes(slices.xxhash.xxh3_128_digest(content[start : start + 64], seed=start))
        for start in range(0, len(content), 64)
    )
    assert digests == {str(path): f"{expected % (1 << 128):032x}"}
    assert slices.hash_bytes(content).hex() == digests[str(path)]


def test_a_damaged_archive_is_hashed_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    content = gzip.compress(b"one\n") + b"damage" * 99_999
    path.write_bytes(content)
    cfg = config(Format.text, path, text_unit=TextUnit.line)
    found, digests = read(cfg, plan_units(cfg, 1 << 20))
    assert found == ["one", "corrupt_archive"]
    assert digests == {str(path): slices.hash_bytes(content).hex()}


def test_the_hash_of_a_table_follows_the_columns_that_are_read(tmp_path: Path) -> None:
    hashes = []
    for number, (text, other) in enumerate([("a", 1), ("a", 2), ("b", 2)]):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"text": [text] * 9, "n": [other] * 9}), path, row_group_size=3)
        cfg = config(Format.parquet, path)
        hashes.append(*read(cfg, plan_units(cfg, 1))[1].values())
        assert [*read(cfg, plan_units(cfg, 1 << 20))[1].values()] == hashes[-1:]
    assert hashes[0] == hashes[1] != hashes[2]
