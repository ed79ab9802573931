"""Shards go to other frameworks and come back; what they wrote becomes a data folder."""

from __future__ import annotations

import csv
import gzip
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from llmtrain.cli import data_export, data_import
from llmtrain.data.config import PackConfig, Packing, ShardsConfig
from llmtrain.data.engines.config import EngineConfig, EngineKind
from llmtrain.data.formats import foreign
from llmtrain.data.formats import look as look_module
from llmtrain.data.formats import write as write_module
from llmtrain.data.formats.config import ExportConfig, ImportConfig, TokenFormat, TokenType
from llmtrain.data.formats.exporting import export_tokens
from llmtrain.data.formats.importing import ImportReport, import_tokens
from llmtrain.data.formats.links import link_or_copy
from llmtrain.data.inspect import InspectConfig, inspect_shards
from llmtrain.data.manifest import read_manifest, shard_files, verify
from llmtrain.data.pipeline import run
from llmtrain.data.shards import ShardReader
from llmtrain.data.tokenizer.tokenizer import Tokenizer
from llmtrain.data.trace import OutputFormat, TraceConfig, trace
from llmtrain.errors import ConfigError, DataError
from llmtrain.tracking.data_report import write_data_report

KINDS = list(TokenFormat)


@pytest.fixture(scope="module")
def indexed_dataset() -> Iterator[Any]:
    """Megatron's own reader and writer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
        yield megatron


@pytest.fixture
def folder(write_jsonl: Callable[..., Path], jsonl_config: Callable[..., Any], texts: list[str]) -> Path:
    """Several shards of the training split, two packs."""
    cfg = jsonl_config(
        write_jsonl(texts[:80]),
        shards=ShardsConfig(text_bytes=8000),
        pack=PackConfig(seq_lens=[64], strategies=[Packing.concat, Packing.best_fit]),
    )
    run(cfg, quiet=True)
    return Path(cfg.out)


def documents_of(folder: Path, split: str) -> list[list[int]]:
    found = []
    for shard in read_manifest(folder).split_shards(split):
        reader = ShardReader(folder / shard.path)
        found += [reader.document(number).tolist() for number in range(reader.num_documents)]
    return found


def take_in(
    out: Path, kind: TokenFormat, paths: list[Path], tokenizer: Path, **settings: Any
) -> ImportReport:
    cfg = ImportConfig(
        kind=kind,
        paths=[str(path) for path in paths],
        tokenizer=str(tokenizer),
        pack=PackConfig(seq_lens=[64], strategies=[Packing.concat, Packing.best_fit]),
        engine=EngineConfig(kind=EngineKind.inline),
        out=str(out),
        **settings,
    )
    report = import_tokens(cfg, quiet=True)
    manifest = read_manifest(out)
    verify(out, manifest, content=True)
    assert inspect_shards(InspectConfig(folder=str(out), format=OutputFormat.json)).num_problems == 0
    return report


def send(folder: Path, kind: TokenFormat, out: Path) -> None:
    export_tokens(ExportConfig(folder=str(folder), kind=kind, out=str(out)), quiet=True)


# export


def test_megatron_reads_what_is_exported(folder: Path, tmp_path: Path, indexed_dataset: Any) -> None:
    report = export_tokens(
        ExportConfig(folder=str(folder), kind=TokenFormat.megatron, out=str(tmp_path / "m")), quiet=True
    )
    assert report.num_files["train"] > 2
    for split in ("train", "held_out"):
        found = []
        for path in sorted((tmp_path / "m" / split).glob("*.bin")):
            theirs = indexed_dataset.IndexedDataset(str(path.with_suffix("")))
            assert theirs.document_indices.tolist() == list(range(len(theirs) + 1))
            found += [theirs[number].tolist() for number in range(len(theirs))]
        assert found == documents_of(folder, split)


def test_datatrove_finds_its_files(folder: Path, tmp_path: Path) -> None:
    """Read as its DatatroveFileDataset reads: raw ids, and cumulative ends as u64."""
    export_tokens(
        ExportConfig(folder=str(folder), kind=TokenFormat.datatrove, out=str(tmp_path / "d")), quiet=True
    )
    found: list[list[int]] = []
    for path in sorted((tmp_path / "d/train").glob("*.ds")):
        ends = np.fromfile(f"{path}.index", dtype=np.uint64).tolist()
        tokens = np.fromfile(path, dtype=np.uint16).tolist()
        found += [tokens[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
        name, count, _ = Path(f"{path}.metadata").read_text().split("\n")
        assert name == "tokenizer/tokenizer.model|2"
        assert int(count) == len(tokens)
    assert found == documents_of(folder, "train")
    assert (tmp_path / "d/tokenizer/tokenizer.model").is_file()


def test_olmo_finds_its_files(folder: Path, tmp_path: Path) -> None:
    """Read as OLMo-core reads: a raw map, and start,end of each line of the table."""
    export_tokens(
        ExportConfig(folder=str(folder), kind=TokenFormat.olmo, out=str(tmp_path / "o")), quiet=True
    )
    manifest = read_manifest(folder)
    for shard in manifest.split_shards("train"):
        path = tmp_path / "o" / f"{Path(shard.path).parent.name and 'train'}/{Path(shard.path).name}.npy"
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
        reader = ShardReader(folder / shard.path)
        with gzip.open(path.with_suffix(".csv.gz"), "rt") as handle:
            lines = list(csv.reader(handle))
        assert len(lines) == reader.num_documents
        for number, (start, end, id_, source, record) in enumerate(lines):
            assert tokens[int(start) : int(end)].tolist() == reader.document(number).tolist()
            lineage = reader.lineage(number)
            assert (id_, source, int(record)) == (lineage.document_id, lineage.path, lineage.record)


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_is_copied_and_a_second_export_changes_nothing(
    folder: Path, tmp_path: Path, kind: TokenFormat
) -> None:
    cfg = ExportConfig(folder=str(folder), kind=kind, out=str(tmp_path / "sent"), splits=["train"])
    first = export_tokens(cfg, quiet=True)
    assert first.num_linked == first.num_files["train"]
    assert set(first.num_files) == {"train"}
    for shard in read_manifest(folder).split_shards("train"):
        target = tmp_path / "sent/train" / f"{Path(shard.path).name}{foreign.SUFFIX[kind]}"
        assert target.samefile(shard_files(folder / shard.path)[0])
    before = {path: path.read_bytes() for path in (tmp_path / "sent").rglob("*") if path.is_file()}
    export_tokens(cfg, quiet=True)
    assert {path: path.read_bytes() for path in (tmp_path / "sent").rglob("*") if path.is_file()} == before


def test_an_export_does_not_mix_with_other_things(folder: Path, tmp_path: Path) -> None:
    cfg = ExportConfig(folder=str(folder), kind=TokenFormat.olmo, out=str(tmp_path / "sent"))
    export_tokens(cfg, quiet=True)
    cfg.kind = TokenFormat.datatrove
    with pytest.raises(DataError, match="holds an export of other shards or of another kind"):
        export_tokens(cfg, quiet=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").touch()
    cfg.out = str(tmp_path / "full")
    with pytest.raises(DataError, match="holds other things"):
        export_tokens(cfg, quiet=True)
    with pytest.raises(DataError, match="unknown split 'tests'; known: held_out, train"):
        export_tokens(ExportConfig(folder=str(folder), kind=TokenFormat.olmo, out="x", splits=["tests"]))


def test_another_file_system_gets_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(18, os.strerror(18))

    (tmp_path / "a").write_bytes(b"tokens")
    monkeypatch.setattr(os, "link", refuse)
    assert link_or_copy(tmp_path / "a", tmp_path / "b") is False
    assert (tmp_path / "b").read_bytes() == b"tokens"
    assert not (tmp_path / "b").samefile(tmp_path / "a")


# import


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_exported_comes_back_as_it_was(
    folder: Path, tmp_path: Path, kind: TokenFormat, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sent"
    data_export.export(ExportConfig(folder=str(folder), kind=kind, out=str(out)))
    report = take_in(
        tmp_path / "back", kind, [out / "*/*"], out / "tokenizer", held_out=[str(out / "held_out/*")]
    )
    back, manifest = read_manifest(tmp_path / "back"), read_manifest(folder)
    assert report.num_linked == len(manifest.table) == len(back.table)
    for split in ("train", "held_out"):
        assert documents_of(tmp_path / "back", split) == documents_of(folder, split)
    same = ("sha256", "idx_sha256", "num_tokens", "max_id", "num_eos", "text_bytes")
    for ours, theirs in zip(back.shards, manifest.shards, strict=True):
        assert [getattr(ours, name) for name in same] == [getattr(theirs, name) for name in same]
    assert [pack.num_rows for pack in back.packs] == [pack.num_rows for pack in manifest.packs]
    assert back.tokenizer.fingerprint == manifest.tokenizer.fingerprint
    assert "linked" in capsys.readouterr().out
    with pytest.raises(DataError, match="was imported as tokens, so there is no text to report on"):
        write_data_report(tmp_path / "back")


def test_held_out_text_is_what_the_shards_encode(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "sent"
    send(folder, TokenFormat.megatron, out)
    take_in(
        tmp_path / "back", TokenFormat.megatron, [out / "train/*"], out / "tokenizer", held_out_fraction=0.2
    )
    manifest = read_manifest(tmp_path / "back")
    with open(tmp_path / "back" / manifest.held_out_text, "rb") as handle:
        lines = zstandard.ZstdDecompressor().stream_reader(handle).read().decode().splitlines()
    held_out = [json.loads(line)["text"] for line in lines]
    assert 2 < len(held_out) < 40
    assert sum(len(text.encode()) for text in held_out) == sum(
        shard.text_bytes for shard in manifest.split_shards("held_out")
    )
    [traced] = trace(TraceConfig(folder=str(tmp_path / "back"), split="held_out", token=0, length=5))
    assert traced.is_exact
    assert held_out[0].startswith(traced.text)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_drawn_and_none_is_lost(folder: Path, tmp_path: Path, kind: TokenFormat) -> None:
    out = tmp_path / "sent"
    send(folder, kind, out)
    report = take_in(
        tmp_path / "back", kind, [out / "train/*"], out / "tokenizer", held_out_fraction=0.1, seed=3
    )
    train, held_out = (documents_of(tmp_path / "back", split) for split in ("train", "held_out"))
    assert sorted(train + held_out) == sorted(documents_of(folder, "train"))
    assert held_out
    assert report.num_linked < len(report.manifest.table)
    drawn = {tuple(document) for document in held_out}
    assert not drawn & {tuple(document) for document in train}, "equal documents are drawn together"


def test_at_least_one_document_is_held_out(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "sent"
    send(folder, TokenFormat.olmo, out)
    take_in(tmp_path / "back", TokenFormat.olmo, [out / "train/*"], out / "tokenizer", held_out_fraction=1e-9)
    assert len(documents_of(tmp_path / "back", "held_out")) == 1


def megatron_file(
    indexed_dataset: Any, prefix: Path, documents: list[list[list[int]]], dtype: type = np.int32
) -> Path:
    """What Megatron's own builder writes: documents of several sequences."""
    import torch  # noqa: PLC0415 - only these tests need it

    builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        for sequence in sequences:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return Path(f"{prefix}.bin")


@pytest.fixture
def their_documents(tokenizer: Tokenizer, texts: list[str]) -> list[list[list[int]]]:
    """A sequence for each paragraph, EOS at the end of the last one."""
    documents = []
    for text in texts[:50]:
        sequences = [tokenizer.encode(part).tolist() for part in text.split("\n") if part]
        sequences[-1].append(tokenizer.eos_id)
        documents.append(sequences)
    return documents


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64])
def test_what_megatron_wrote_opens_here(
    their_documents: list[list[list[int]]],
    tokenizer_folder: Path,
    tmp_path: Path,
    indexed_dataset: Any,
    dtype: type,
) -> None:
    """Sequences are joined to documents; the tokens stay where they are if they can."""
    train = megatron_file(indexed_dataset, tmp_path / "a", their_documents[:40], dtype)
    held_out = megatron_file(indexed_dataset, tmp_path / "b", their_documents[40:], dtype)
    report = take_in(
        tmp_path / "out", TokenFormat.megatron, [train], tokenizer_folder, held_out=[str(held_out)]
    )
    whole = [[token for sequence in document for token in sequence] for document in their_documents]
    assert documents_of(tmp_path / "out", "train") == whole[:40]
    assert documents_of(tmp_path / "out", "held_out") == whole[40:]
    assert report.num_linked == (0 if dtype is np.int64 else 2)
    assert report.manifest.dtype == ("int32" if dtype is np.int32 else "uint16")
    if dtype is not np.int64:
        assert shard_files(tmp_path / "out" / report.manifest.shards[0].path)[0].samefile(train)


def test_documents_without_eos_are_refused_and_get_one_when_asked(
    their_documents: list[list[list[int]]], tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path,
    indexed_dataset: Any,
) -> None:  # fmt: skip
    """As Megatron's preprocess_data.py writes without --append-eod; and empty documents."""
    bare = [[[*sequences[0][:5]]] for sequences in their_documents[:20]]
    path = megatron_file(indexed_dataset, tmp_path / "a", [*bare, [[]], *their_documents[20:40]])
    with pytest.raises(DataError, match=r"20 of 41 documents do not end in EOS \(1\), the first is doc"):
        take_in(tmp_path / "out", TokenFormat.megatron, [path], tokenizer_folder)
    report = take_in(tmp_path / "out", TokenFormat.megatron, [path], tokenizer_folder, append_eos=True)
    assert report.num_appended == 20
    assert report.num_empty == 1
    text = "\n".join(data_import.lines(report))
    assert "20 documents got one" in text
    assert "1 documents without a token were left out" in text
    found = documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "held_out")
    expected = [[*sequences[0], tokenizer.eos_id] for sequences in bare]
    expected += [[token for part in document for token in part] for document in their_documents[20:40]]
    assert sorted(found) == sorted(expected)
    assert report.manifest.funnel[0]["dropped"] == {"empty": {"documents": 1, "tokens": 0}}


def test_olmo_tokens_without_a_table_are_cut_after_eos(
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:

    monkeypatch.setattr(foreign, "SCAN_TOKENS", 100)
    documents = [[*tokenizer.encode(text).tolist(), tokenizer.eos_id] for text in texts[:20]]
    np.concatenate(documents).astype(np.uint32).tofile(tmp_path / "a.npy")
    with pytest.raises(DataError, match="every second token is 0"):
        take_in(tmp_path / "out", TokenFormat.olmo, [tmp_path / "a"], tokenizer_folder, token_type=None)
    take_in(
        tmp_path / "out", TokenFormat.olmo, [tmp_path / "a"], tokenizer_folder, token_type=TokenType.uint32
    )
    found = documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "held_out")
    assert sorted(found) == sorted(documents)
    assert read_manifest(tmp_path / "out").dtype == "int32"


def test_groups_cut_between_documents(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "sent"
    send(folder, TokenFormat.megatron, out)
    whole = take_in(tmp_path / "whole", TokenFormat.megatron, [out / "train/*"], out / "tokenizer")
    monkeypatch.setattr(look_module, "GROUP_TOKENS", 50)
    cut = take_in(tmp_path / "cut", TokenFormat.megatron, [out / "train/*"], out / "tokenizer")
    assert cut.manifest.table == whole.manifest.table


def test_a_killed_import_goes_on_where_it_was(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "sent"
    send(folder, TokenFormat.megatron, out)
    arguments = tmp_path / "back", TokenFormat.megatron, [out / "train/*"], out / "tokenizer"
    calls = 0

    def third_time_fails(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    original = write_module.text_lengths
    monkeypatch.setattr(write_module, "text_lengths", third_time_fails)
    with pytest.raises(KeyboardInterrupt):
        take_in(*arguments)
    first = sorted((tmp_path / "back/shards").rglob("train-*.json"))
    assert len(first) == 2
    stamps = [path.stat().st_mtime_ns for path in first]
    report = take_in(*arguments)
    assert [path.stat().st_mtime_ns for path in first] == stamps
    again = take_in(tmp_path / "fresh", TokenFormat.megatron, [out / "train/*"], out / "tokenizer")
    assert again.manifest.table == report.manifest.table


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.with_suffix(".idx").unlink(), "nothing says where the documents"),
        (cut_short, "Is it cut, or of another"),
        (lambda path: cut_short(path.with_suffix(".idx")), "need"),
        (lambda path: path.write_bytes(b"\xff" * path.stat().st_size), "Was it made with another tokenizer"),
    ],
)
def test_damaged_files_are_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    out = tmp_path / "sent"
    send(folder, TokenFormat.megatron, out)
    path = out / "train/train-00001.bin"
    for each in (path, path.with_suffix(".idx")):  # not the links
        content = each.read_bytes()
        each.unlink()
        each.write_bytes(content)
    damage(path)
    with pytest.raises(DataError, match=message) as error:
        take_in(tmp_path / "back", TokenFormat.megatron, [out / "train/*"], out / "tokenizer")
    assert "train-00001" in str(error.value)
    assert not list((tmp_path / "back").glob("shards/*/*.bin"))


def test_settings_without_sense_are_refused(folder: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"names no \.ds file, which kind=datatrove has its tokens in"):
        take_in(tmp_path / "o", TokenFormat.datatrove, [tmp_path / "x*"], tokenizer_folder)
    with pytest.raises(ConfigError, match=r"paths=\[\] names no file"):
        take_in(tmp_path / "o", TokenFormat.datatrove, [], tokenizer_folder)
    with pytest.raises(ConfigError, match=r"an .idx says which type its tokens have"):
        take_in(tmp_path / "o", TokenFormat.megatron, [folder], tokenizer_folder, token_type=TokenType.uint16)
    with pytest.raises(ConfigError, match=r"held_out_fraction=1.0 must lie between 0 and 1"):
        take_in(tmp_path / "o", TokenFormat.megatron, [folder], tokenizer_folder, held_out_fraction=1.0)
    shards = [shard_files(folder / shard.path)[0] for shard in read_manifest(folder).shards]
    with pytest.raises(ConfigError, match="nothing is left to train on"):
        take_in(tmp_path / "o", TokenFormat.megatron, shards[:1], tokenizer_folder, held_out=[str(shards[0])])
    with pytest.raises(DataError, match=r"ends documents with id 1, and 7 was given"):
        take_in(tmp_path / "o", TokenFormat.megatron, shards, tokenizer_folder, eos_id=7)


def test_a_table_that_does_not_fit_is_named(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "sent"
    send(folder, TokenFormat.olmo, out)
    table = out / "train/train-00000.csv.gz"
    for text, message in (
        ("0,5,a\n", "line 1 is not start,end,id,src,loc"),
        ("3,5,a,b,1\n", "line 1: tokens 3 to 5 do not follow on 0"),
    ):
        table.write_bytes(gzip.compress(text.encode()))
        with pytest.raises(DataError, match=message):
            take_in(tmp_path / "back", TokenFormat.olmo, [out / "train/*"], out / "tokenizer")
