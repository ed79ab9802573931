"""The passes together: the same bytes however the work is cut, interrupted or repeated; nothing lost,
all counted."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import zstandard

from llmtrain.data import pipeline, tokenize
from llmtrain.data.config import (
    DataConfig,
    HeldOutConfig,
    PackConfig,
    ShardsConfig,
    StopAfter,
    TokenizerConfig,
)
from llmtrain.data.content.config import ContentConfig, LanguageConfig
from llmtrain.data.dedup.config import DedupConfig, LineConfig, NearConfig, NgramConfig
from llmtrain.data.document import normalize
from llmtrain.data.engines.config import EngineConfig, EngineKind
from llmtrain.data.filters.config import RulesConfig
from llmtrain.data.flow import check_closes
from llmtrain.data.manifest import Manifest, read_manifest, verify
from llmtrain.data.pipeline import run
from llmtrain.data.shards import ShardReader
from llmtrain.data.sources import python_docs
from llmtrain.data.sources.config import CorpusConfig, Format
from llmtrain.data.tokenizer.load import load_tokenizer
from llmtrain.data.tokenizer.words import WordEncoder
from llmtrain.errors import ConfigError, DataError, LaunchError
from llmtrain.files import FolderLock, read_json

Config = Callable[..., DataConfig]
Write = Callable[..., Path]


def output_of(folder: Path) -> dict[str, bytes]:
    """Every file that training may read."""
    files = [folder / "manifest.json"]
    for kind in ("shards", "packs", "tokenizer"):
        files += sorted(path for path in (folder / kind).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def changed_times(folder: Path, *kinds: str) -> dict[str, int]:
    return {
        str(path): path.stat().st_mtime_ns
        for kind in kinds
        for path in (folder / kind).rglob("*")
        if path.is_file()
    }


def dropped(manifest: Manifest, number: int) -> dict[str, int]:
    counts = manifest.funnel[number]["dropped"]
    return {reason: count["documents"] for reason, count in counts.items() if count["documents"]}


@pytest.fixture
def corpus(write_jsonl: Write, texts: list[str]) -> Path:
    """120 documents, 3 duplicates, 2 short ones; two in need of normalising."""
    return write_jsonl(
        [*texts[:60], texts[0], "too short", "", texts[1], *texts[60:], texts[2] + "\r\n\x00", "e\u0301"]
    )


def test_every_kept_document_is_in_a_shard_whole_and_once(
    corpus: Path, jsonl_config: Config, texts: list[str]
) -> None:
    cfg = jsonl_config(corpus, shards=ShardsConfig(text_bytes=20_000), held_out=HeldOutConfig(fraction=0.1))
    manifest = run(cfg, quiet=True).manifest
    out = Path(cfg.out)
    tokenizer = load_tokenizer(out / manifest.tokenizer.path)
    found: dict[str, list[str]] = {"train": [], "held_out": []}
    raw = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    for shard in manifest.shards:
        reader = ShardReader(out / shard.path)
        for number in range(reader.num_documents):
            ids = reader.document(number)
            assert ids[-1] == tokenizer.eos_id
            text = tokenizer.decode(ids[:-1].tolist())
            found[shard.split].append(text)
            lineage = reader.lineage(number)
            assert (lineage.path, lineage.source) == (str(corpus), "texts")
            assert normalize(raw[lineage.record - 1]) == text
    assert sorted(found["train"] + found["held_out"]) == sorted(normalize(text) for text in texts)
    assert len(found["held_out"]) > 2
    assert len(manifest.split_shards("train")) > 2
    held_out = zstandard.decompress(
        (out / manifest.held_out_text).read_bytes(), max_output_size=1 << 24
    ).decode()
    assert [json.loads(line)["text"] for line in held_out.splitlines()] == found["held_out"]
    verify(out, read_manifest(out), content=True)


def test_the_funnel_closes_and_counts_every_drop_once(corpus: Path, jsonl_config: Config) -> None:
    manifest = run(jsonl_config(corpus), quiet=True).manifest
    for entry in manifest.funnel:
        check_closes(entry)
    assert [entry["pass"] for entry in manifest.funnel] == [
        "scan", "decide", "tokenize", "pack train seq_len=64 concat", "pack held_out seq_len=64 concat",
    ]  # fmt: skip
    assert dropped(manifest, 1) == {"empty": 1, "too_short": 2, "duplicate": 3}
    assert manifest.funnel[0]["in"]["documents"] == 126
    assert manifest.funnel[2]["kept"]["documents"] == 120
    assert manifest.funnel[2]["differing_documents"] == 0
    raw = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    num_away = sum(len(text.encode()) - len(normalize(text).encode()) for text in raw)
    assert manifest.funnel[0]["dropped"] == {"normalised_away": {"documents": 0, "bytes": num_away}}


def test_a_sum_that_does_not_close_is_noticed() -> None:
    with pytest.raises(AssertionError, match="scan: 3 documents came in, 2 are accounted for"):
        check_closes(
            {
                "pass": "scan",
                "in": {"documents": 3},
                "kept": {"documents": 1},
                "dropped": {"a": {"documents": 1}},
            }
        )


def test_the_output_does_not_depend_on_units_workers_or_engine(
    corpus: Path, jsonl_config: Config, tmp_path: Path
) -> None:
    cfg = jsonl_config(corpus, shards=ShardsConfig(text_bytes=20_000))
    run(cfg, quiet=True)
    expected = output_of(Path(cfg.out))
    engines = [
        EngineConfig(kind=EngineKind.inline, unit_bytes=700),
        EngineConfig(kind=EngineKind.local, workers=2, unit_bytes=20_000),
    ]
    for number, engine in enumerate(engines):
        out = tmp_path / f"again{number}"
        run(replace(cfg, engine=engine, out=str(out)), quiet=True)
        assert output_of(out) == expected


def test_a_second_run_does_nothing_anew(corpus: Path, jsonl_config: Config) -> None:
    cfg = jsonl_config(corpus)
    run(cfg, quiet=True)
    out = Path(cfg.out)
    kinds = ("docs", "signals", "verdicts", "tokenizer", "shards", "packs")
    before, output = changed_times(out, *kinds), output_of(out)
    run(cfg, quiet=True)
    assert changed_times(out, *kinds) == before
    assert output_of(out) == output


def test_files_that_were_lost_are_made_again(
    write_jsonl: Write, jsonl_config: Config, texts: list[str]
) -> None:
    """Of each kind: texts and signals, bad records, model, tokens, index, lineage, packs, done files."""
    path = write_jsonl([*texts, {"no": "text"}])
    cfg = jsonl_config(path, shards=ShardsConfig(text_bytes=20_000), max_quarantine_share=0.1)
    run(cfg, quiet=True)
    out = Path(cfg.out)
    expected = output_of(out)
    for suffix in (".arrow", ".jsonl", ".model", ".bin", ".idx", ".parquet", ".npy", ".json"):
        lost = [path for path in out.rglob(f"*{suffix}") if path.parent != out and path.name != "all.jsonl"]
        assert lost
        for cut in (False, True):
            for path in lost:
                path.write_bytes(path.read_bytes()[:-9]) if cut else path.unlink()
            run(cfg, quiet=True)
            assert output_of(out) == expected, (suffix, cut)
            assert all(path.is_file() for path in lost), (suffix, cut)


def test_what_a_killed_writer_left_is_cleared_away(corpus: Path, jsonl_config: Config) -> None:
    cfg = jsonl_config(corpus)
    leftover = Path(cfg.out, "shards/key/.train-00000.bin.tmp-123")
    another = Path(cfg.out, ".manifest.json.tmp-123")
    not_ours = Path(cfg.out, "other/.notes.tmp-1")
    for path in (leftover, another, not_ours):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    run(cfg, quiet=True)
    assert (leftover.exists(), another.exists(), not_ours.exists()) == (False, False, True)


def test_a_text_longer_than_allowed_goes_to_the_quarantine(
    write_jsonl: Write, jsonl_config: Config, texts: list[str]
) -> None:
    path = write_jsonl([*texts, "word " * 500])
    manifest = run(jsonl_config(path, corpus={"max_document_bytes": 2000}), quiet=True).manifest
    assert dropped(manifest, 0) == {"absurd_length": 1}


def test_a_changed_threshold_reads_no_text_again(corpus: Path, jsonl_config: Config) -> None:
    cfg = jsonl_config(corpus)
    first = run(cfg, quiet=True).manifest
    before = changed_times(Path(cfg.out), "docs", "signals")
    second = run(replace(cfg, rules=RulesConfig(min_words=165)), quiet=True).manifest
    assert changed_times(Path(cfg.out), "docs", "signals") == before
    assert dropped(second, 1)["too_short"] > dropped(first, 1)["too_short"]
    assert second.hash(64) != first.hash(64)


def test_changed_input_is_scanned_anew(
    corpus: Path, jsonl_config: Config, write_jsonl: Write, texts: list[str]
) -> None:
    cfg = jsonl_config(corpus)
    run(cfg, quiet=True)
    write_jsonl(texts[:100])
    assert run(cfg, quiet=True).manifest.funnel[0]["in"]["documents"] == 100


def test_more_row_lengths_need_no_new_shards(corpus: Path, jsonl_config: Config) -> None:
    cfg = jsonl_config(corpus)
    first = run(cfg, quiet=True).manifest
    second = run(replace(cfg, pack=PackConfig(seq_lens=[64, 32])), quiet=True).manifest
    assert second.shards == first.shards
    assert [(pack.split, pack.seq_len) for pack in second.packs] == [
        ("train", 32), ("held_out", 32), ("train", 64), ("held_out", 64),
    ]  # fmt: skip
    assert second.packs[2:] == first.packs
    assert second.hash(64) == first.hash(64) != second.hash(32)  # a run on the old length goes on


def test_a_given_tokenizer_is_used_as_it_is(
    corpus: Path, jsonl_config: Config, tokenizer_folder: Path
) -> None:
    given = load_tokenizer(tokenizer_folder)
    cfg = jsonl_config(corpus, tokenizer=TokenizerConfig(path=str(tokenizer_folder)))
    assert run(cfg, quiet=True).manifest.tokenizer.fingerprint == given.fingerprint


def test_a_given_tokenizer_that_changes_text_is_warned_of(
    corpus: Path, jsonl_config: Config, texts: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open(tmp_path / "given.model", "wb") as handle:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.splitlines()),
            model_writer=handle,
            model_type="bpe",
            byte_fallback=True,
            vocab_size=600,
            minloglevel=2,
        )
    cfg = jsonl_config(corpus, tokenizer=TokenizerConfig(path=str(tmp_path / "given.model")))
    manifest = run(cfg, quiet=True).manifest
    assert manifest.funnel[2]["checked_documents"] > 0
    assert manifest.funnel[2]["differing_documents"] == 0  # it puts a space in front, which is known
    assert "given.model does not give back the text that it encodes: 'a  b" in caplog.text


def test_a_shard_with_a_wrong_id_is_encoded_again_by_sentencepiece(
    corpus: Path,
    jsonl_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    right = run(jsonl_config(corpus, out=str(tmp_path / "right")), quiet=True)
    encode = WordEncoder.encode

    def wrong(self: WordEncoder, text: Any, offsets: Any) -> Any:
        ids, lengths = encode(self, text, offsets)
        ids[0] += 1
        return ids, lengths

    monkeypatch.setattr(WordEncoder, "encode", wrong)
    found = run(jsonl_config(corpus, out=str(tmp_path / "wrong")), quiet=True)
    assert found.manifest.funnel[2]["differing_documents"] == 2  # the first of each shard
    assert [shard.sha256 for shard in found.manifest.shards] == [s.sha256 for s in right.manifest.shards]
    assert "differ from SentencePiece; encoding it anew" in caplog.text


def test_fertility_is_told_by_source(corpus: Path, jsonl_config: Config) -> None:
    report = run(jsonl_config(corpus), quiet=True)
    shards = report.manifest.shards
    facts = read_json(report.out / "facts.json")["fertility"]
    assert facts == report.fertility
    for name in ("num_tokens", "text_bytes"):
        assert sum(row[name] for row in facts) == sum(getattr(shard, name) for shard in shards)
    assert sum(row["documents"] for row in facts) == sum(shard.num_documents for shard in shards)
    assert all(0 <= row["num_fallback_tokens"] < row["num_tokens"] for row in facts)
    assert {row["language"] for row in facts} == {None}


def test_the_tokenizers_sample_reaches_its_size(
    write_jsonl: Write, jsonl_config: Config, texts: list[str]
) -> None:
    path = write_jsonl([text[:500] for text in texts])
    cfg = jsonl_config(path, tokenizer=TokenizerConfig(vocab_size=350, sample_bytes=2400))
    manifest = run(cfg, quiet=True).manifest
    facts = json.loads((Path(cfg.out) / manifest.tokenizer.path / "facts.json").read_text())
    assert 2400 <= facts["num_sample_bytes"] < 3000


def test_a_wrong_look_up_is_counted_and_repaired(
    corpus: Path, jsonl_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = jsonl_config(corpus)
    right = run(cfg, quiet=True).manifest
    encode = WordEncoder.encode

    def wrong(self: WordEncoder, text: Any, offsets: Any) -> Any:
        ids, lengths = encode(self, text, offsets)
        ids[0] += 1
        return ids, lengths

    monkeypatch.setattr(tokenize.WordEncoder, "encode", wrong)
    again = run(replace(cfg, out=str(tmp_path / "again")), quiet=True).manifest
    assert again.hash(64) == right.hash(64)
    assert again.funnel[2]["differing_documents"] == len(again.shards)


def test_bad_records_are_listed_counted_and_stop_the_run_past_their_share(
    write_jsonl: Write,
    jsonl_config: Config,
    texts: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = write_jsonl(texts)
    lines = path.read_bytes().splitlines()
    lines[10:10] = [b'{"text": "broken', b'{"body": 1}', b'{"text": "\xff"}']
    path.write_bytes(b"\n".join(lines))
    cfg = jsonl_config(path, engine=EngineConfig(kind=EngineKind.inline, unit_bytes=3000))
    message = (
        r"3 of 123 records \(2.44%\) are bad, more than max_quarantine_share=1.00%: "
        r"broken_json 1, invalid_utf8 1, missing_field 1; the first: .*texts.jsonl, record 11: "
        r".*all.jsonl; mend them"
    )
    for _ in range(2):
        with pytest.raises(DataError, match=message):
            run(cfg, quiet=True)
    manifest = run(replace(cfg, max_quarantine_share=0.1), quiet=True).manifest
    assert dropped(manifest, 0) == {"broken_json": 1, "invalid_utf8": 1, "missing_field": 1}
    (listing,) = (tmp_path / "out/quarantine").rglob("all.jsonl")
    assert "3 of 123 records (2.44%) are bad and left out: broken_json 1, invalid_utf8 1, " in caplog.text
    assert caplog.text.rstrip().endswith(f"They are listed in {listing}")
    records = [json.loads(line) for line in listing.read_text().splitlines()]
    assert [(record["record"], record["reason"]) for record in records] == [
        (11, "broken_json"), (12, "missing_field"), (13, "invalid_utf8"),
    ]  # fmt: skip
    with pytest.raises(DataError, match="are bad, more than max_quarantine_share"):
        run(cfg, quiet=True)  # finished verdicts do not hide the share


def test_a_cut_archive_is_warned_of(
    write_jsonl: Write, jsonl_config: Config, texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl(texts)
    packed = path.with_name("cut.jsonl.gz")
    packed.write_bytes(gzip.compress(path.read_bytes())[:-2000])
    manifest = run(jsonl_config(packed), quiet=True).manifest
    assert dropped(manifest, 0) == {"truncated_archive": 1}
    assert "what follows a truncated_archive in its file is lost and not counted" in caplog.text


def test_bad_records_may_hold_what_utf8_cannot(
    write_jsonl: Write, jsonl_config: Config, texts: list[str], tmp_path: Path
) -> None:
    path = write_jsonl([*texts, {"\ud800": "key"}])
    path.with_name(os.fsdecode(b"x\xff.jsonl")).write_text('{"a": 1}\n')
    manifest = run(jsonl_config(tmp_path / "*.jsonl", max_quarantine_share=0.1), quiet=True).manifest
    assert dropped(manifest, 0) == {"missing_field": 2}
    (listing,) = (tmp_path / "out/quarantine").rglob("all.jsonl")
    records = [json.loads(line) for line in listing.read_text().splitlines()]
    assert records[0]["detail"] == "no field 'text'; fields: \\ud800"
    assert records[1]["path"] == f"{tmp_path}/x\\udcff.jsonl"


def test_a_missing_field_names_the_fields_there_are(write_jsonl: Write, jsonl_config: Config) -> None:
    path = write_jsonl([{"body": "a", "title": "b"}] * 3)
    with pytest.raises(DataError, match=r"3 of 3 .* missing_field 3.* no field 'text'; fields: body, title"):
        run(jsonl_config(path), quiet=True)


def test_an_empty_corpus_is_an_error(write_jsonl: Write, jsonl_config: Config) -> None:
    path = write_jsonl([])
    with pytest.raises(DataError, match=r"corpus jsonl is empty: no document in .*texts.jsonl"):
        run(jsonl_config(path), quiet=True)


def test_when_no_document_is_kept_the_rules_are_named(write_jsonl: Write, jsonl_config: Config) -> None:
    path = write_jsonl([f"just {number} words" for number in range(5)])
    with pytest.raises(DataError, match=r"0 of 5 documents are left.* too_short 5.*rules.min_words=50"):
        run(jsonl_config(path), quiet=True)


def test_a_vocabulary_that_does_not_fit_says_the_largest_possible(corpus: Path, jsonl_config: Config) -> None:
    with pytest.raises(DataError, match=r"vocab_size=60000 is larger than the text allows, at most \d+"):
        run(jsonl_config(corpus, tokenizer=TokenizerConfig(vocab_size=60_000)), quiet=True)


def test_a_corpus_too_small_for_a_row_is_an_error(corpus: Path, jsonl_config: Config) -> None:
    with pytest.raises(DataError, match=r"holds [\d,]+ tokens, less than one row of pack.seq_lens=9999999"):
        run(jsonl_config(corpus, pack=PackConfig(seq_lens=[9_999_999])), quiet=True)


def test_two_runs_do_not_write_one_folder(corpus: Path, jsonl_config: Config) -> None:
    cfg = jsonl_config(corpus)
    with FolderLock(Path(cfg.out)), pytest.raises(LaunchError, match="is being written by pid"):
        run(cfg, quiet=True)
    run(cfg, quiet=True)


def test_other_errors_of_the_system_stay_what_they_are(
    corpus: Path, jsonl_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EACCES, "no entry")

    monkeypatch.setattr(pipeline, "plan_units", refuse)
    with pytest.raises(OSError, match="no entry"):
        run(jsonl_config(corpus), quiet=True)


def test_a_folder_that_cannot_be_written_is_named(corpus: Path, jsonl_config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out, why in (("file", "File exists"), ("file/x", "Not a directory")):
        with pytest.raises(
            DataError, match=rf"out=.*/{out} cannot be written: {why}; give another out=FOLDER"
        ):
            run(jsonl_config(corpus, out=str(tmp_path / out)), quiet=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    mount = subprocess.run(command, capture_output=True, check=False)
    if mount.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {mount.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("kind", [EngineKind.inline, EngineKind.local])
def test_a_full_disk_is_named_with_its_bytes(
    small_disk: Path, write_jsonl: Write, jsonl_config: Config, texts: list[str], kind: EngineKind
) -> None:
    noise = random.Random(0)
    documents = [text + "".join(chr(noise.randint(0x4E00, 0x9FFF)) for _ in range(3000)) for text in texts]
    cfg = jsonl_config(
        write_jsonl(documents),
        out=str(small_disk / "out"),
        engine=EngineConfig(kind=kind, workers=1, unit_bytes=40_000),
    )
    with pytest.raises(
        DataError, match=r"no space left for .*/small/out: [\d,]+ bytes written, [\d,]+ bytes free"
    ):
        run(cfg, quiet=True)
    assert not [path for path in small_disk.rglob("*") if ".tmp-" in path.name]


KILLED = """
import sys
from llmtrain.data.config import *
from llmtrain.data.dedup.config import *
from llmtrain.data.filters.config import *
from llmtrain.data.engines.config import *
from llmtrain.data.sources.config import *
from llmtrain.data.pipeline import run

if __name__ == "__main__":
    run(
        DataConfig(
            corpus=CorpusConfig(name="jsonl", format=Format.jsonl, paths=[sys.argv[1]]),
            rules=RulesConfig(min_words=50, max_duplicate_line_fraction=0.3),
            dedup=DedupConfig(near=NearConfig(enabled=True), lines=LineConfig(enabled=True)),
            tokenizer=TokenizerConfig(vocab_size=600),
            pack=PackConfig(seq_lens=[64]),
            shards=ShardsConfig(text_bytes=3000),
            engine=EngineConfig(kind=EngineKind[sys.argv[3]], workers=2, unit_bytes=2000),
            out=sys.argv[2],
        ),
        quiet=True,
    )
"""


@pytest.mark.parametrize(
    ("kind", "num_kills"),
    [
        ("inline", 3),
        pytest.param("inline", 30, marks=pytest.mark.slow),
        pytest.param("local", 20, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bytes(
    corpus: Path, jsonl_config: Config, tmp_path: Path, kind: str, num_kills: int
) -> None:
    dedup = DedupConfig(near=NearConfig(enabled=True), lines=LineConfig(enabled=True))
    cfg = jsonl_config(corpus, shards=ShardsConfig(text_bytes=3000), dedup=dedup)
    run(cfg, quiet=True)
    expected = output_of(Path(cfg.out))
    (tmp_path / "killed.py").write_text(KILLED)
    out = tmp_path / "killed"
    command = [sys.executable, str(tmp_path / "killed.py"), str(corpus), str(out), kind]
    delays = random.Random(num_kills)
    num_killed = num_files = 0
    while num_killed < num_kills:
        started = subprocess.Popen(command)
        while started.poll() is None and not (out / ".lock").exists():
            time.sleep(0.01)
        time.sleep(delays.uniform(0.2, 1.0))
        started.kill()
        if started.wait() == 0:  # it had come to its end
            assert output_of(out) == expected
            shutil.rmtree(out)
            num_files = 0
            continue
        num_killed += 1
        kinds = ("docs", "signals", "shards", "packs", "tokenizer")
        finished = [path for kind in kinds for path in (out / kind).rglob("*") if ".tmp-" not in path.name]
        found = len(finished)
        assert found >= num_files  # what is finished stays
        num_files = found
    subprocess.run(command, check=True, timeout=60)
    assert output_of(out) == expected


def test_the_embedded_corpus_stops_at_its_cap_whatever_the_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [
        file for file in python_docs.installed_files() if file.source in ("python", "numpy", "sentencepiece")
    ]
    monkeypatch.setattr(python_docs, "installed_files", lambda: files)
    outputs = []
    for number, unit_bytes in enumerate((100_000, 5 << 20)):
        cfg = DataConfig(
            corpus=CorpusConfig(name="python_docs", format=Format.python_docs, max_text_bytes=600_000),
            dedup=DedupConfig(
                near=NearConfig(enabled=True),
                lines=LineConfig(enabled=True),
                ngrams=NgramConfig(enabled=True),
            ),
            tokenizer=TokenizerConfig(vocab_size=1000),
            engine=EngineConfig(kind=EngineKind.inline, unit_bytes=unit_bytes),
            max_quarantine_share=0.1,
            out=str(tmp_path / str(number)),
        )
        manifest = run(cfg, quiet=True).manifest
        assert 600_000 <= manifest.funnel[0]["kept"]["bytes"] < 1_000_000
        outputs.append(output_of(Path(cfg.out)))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (HeldOutConfig, {"fraction": 0.0}, "held_out.fraction=0.0 must lie between 0 and 1"),
        (HeldOutConfig, {"max_bytes": 0}, "held_out.max_bytes=0 must be at least 1"),
        (TokenizerConfig, {"vocab_size": 258}, "tokenizer.vocab_size=258 must be at least 259"),
        (TokenizerConfig, {"sample_bytes": 0}, "tokenizer.sample_bytes=0 must be at least 1"),
        (
            TokenizerConfig,
            {"character_coverage": 0.0},
            "tokenizer.character_coverage=0.0 must lie in 0.98..1",
        ),
        (ShardsConfig, {"text_bytes": 0}, "shards.text_bytes=0 must be at least 1"),
        (PackConfig, {"seq_lens": []}, r"pack.seq_lens=\[\] must name different lengths of at least 2"),
        (PackConfig, {"seq_lens": [8, 8]}, r"pack.seq_lens=\[8, 8\] must name different lengths"),
    ],
)
def test_settings_that_cannot_be_are_refused(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**settings)


def test_the_quarantine_share_is_a_share(jsonl_config: Config) -> None:
    with pytest.raises(ConfigError, match=r"max_quarantine_share=1.5 must lie in 0..1"):
        jsonl_config("x", max_quarantine_share=1.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rules": RulesConfig(min_words=5), "measure": False},
            r"rules.min_words=5 needs the signal num_words: set measure=true, or rules.min_words=null",
        ),
        (
            {"rules": RulesConfig(min_language_score=0.5)},
            r"needs the signal language_score: set content.language.enabled=true",
        ),
        (
            {"rules": RulesConfig(min_quality=0.5)},
            r"needs the signal quality: set content.quality.model=FILE",
        ),
        (
            {
                "rules": RulesConfig(languages=["en", "eng"]),
                "content": ContentConfig(language=LanguageConfig(enabled=True)),
            },
            r"rules.languages: unknown language code 'eng'",
        ),
    ],
)
def test_a_rule_that_cannot_be_decided_is_refused_before_any_work(
    corpus: Path, jsonl_config: Config, changes: dict[str, Any], message: str
) -> None:
    cfg = jsonl_config(corpus, **changes)
    with pytest.raises(ConfigError, match=message):
        run(cfg, quiet=True)
    assert not Path(cfg.out).exists()


def test_without_measuring_the_documents_are_the_same(
    corpus: Path, jsonl_config: Config, tmp_path: Path
) -> None:
    digests = []
    for measure in (True, False):
        changes = {"rules": RulesConfig(), "measure": measure, "stop_after": StopAfter.documents}
        report = run(jsonl_config(corpus, out=str(tmp_path / f"out-{measure}"), **changes), quiet=True)
        digests.append([file.sha256 for file in report.documents])
    assert digests[0] == digests[1]
    assert digests[0]


def test_the_manifest_tells_that_a_file_has_other_bytes(
    write_jsonl: Write, jsonl_config: Config, texts: list[str]
) -> None:
    hashes = []
    for changed in (texts, texts, [*texts[:-1], texts[-1].swapcase()]):
        path = write_jsonl(changed)
        cfg = jsonl_config(path)
        hashes.append(run(cfg, quiet=True).manifest.input_hash)
        listed = json.loads(Path(cfg.out, "input.json").read_text())["files"]
        assert [(file["name"], file["bytes"]) for file in listed] == [(str(path), path.stat().st_size)]
    assert hashes[0] == hashes[1] != hashes[2]
