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
import tokenizers
import zstandard

from llmtrain.cli import data_export, data_import
from llmtrain.cli import inspect_shards as inspect_command
from llmtrain.data.config import PackConfig, Packing, ShardsConfig
from llmtrain.data.engines.config import EngineConfig, EngineKind
from llmtrain.data.formats import exporting, foreign
from llmtrain.data.formats import look as look_module
from llmtrain.data.formats import write as write_module
from llmtrain.data.formats.config import ExportConfig, ImportConfig, TokenFormat, TokenType
from llmtrain.data.formats.exporting import export_tokens
from llmtrain.data.formats.importing import ImportReport, import_tokens
from llmtrain.data.formats.links import link_or_copy
from llmtrain.data.inspect import InspectConfig, inspect_shards
from llmtrain.data.manifest import read_manifest, shard_files, verify
from llmtrain.data.pipeline import run
from llmtrain.data.shards import ShardReader, idx_bytes
from llmtrain.data.tokenizer.tokenizer import Tokenizer
from llmtrain.data.trace import OutputFormat, TraceConfig, trace
from llmtrain.errors import ConfigError, DataError
from llmtrain.files import read_json
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


def test_an_export_replaces_nobodys_files(folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "sent/train/train-00000.bin"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    with pytest.raises(DataError, match="holds other things; give a folder that is new, empty or an export"):
        send(folder, TokenFormat.megatron, tmp_path / "sent")
    assert own.read_bytes() == b"mine"
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="holds other things"):
        send(folder, TokenFormat.megatron, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    send(folder, TokenFormat.megatron, tmp_path / "empty")
    (tmp_path / "empty/export.json").write_text("no JSON")
    with pytest.raises(DataError, match="holds an export of other shards or of another kind"):
        send(folder, TokenFormat.megatron, tmp_path / "empty")


def test_a_killed_export_is_not_mixed_with_another_and_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, out = 0, tmp_path / "sent"

    def fourth_time_fails(source: Path, target: Path) -> bool:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return link_or_copy(source, target)

    monkeypatch.setattr(exporting, "link_or_copy", fourth_time_fails)
    with pytest.raises(KeyboardInterrupt):
        send(folder, TokenFormat.megatron, out)
    assert read_json(out / "export.json")["done"] is False
    with pytest.raises(DataError, match="holds an export of other shards or of another kind"):
        send(folder, TokenFormat.olmo, out)
    send(folder, TokenFormat.megatron, out)
    assert read_json(out / "export.json")["done"] is True


def test_of_a_symbolic_link_the_file_is_linked(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"tokens")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b").symlink_to(tmp_path / "a")  # as it was left before
    assert link_or_copy(tmp_path / "link", tmp_path / "sub/b") is True
    assert not (tmp_path / "sub/b").is_symlink()
    assert (tmp_path / "sub/b").samefile(tmp_path / "a")


def test_another_file_system_gets_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(18, os.strerror(18))

    flushed = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(os.fstat(fd).st_ino))
    (tmp_path / "a").write_bytes(b"tokens")
    monkeypatch.setattr(os, "link", refuse)
    assert link_or_copy(tmp_path / "a", tmp_path / "b") is False
    assert (tmp_path / "b").read_bytes() == b"tokens"
    assert not (tmp_path / "b").samefile(tmp_path / "a")
    assert flushed == [(tmp_path / "b").stat().st_ino, tmp_path.stat().st_ino]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


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


def write_pair(prefix: Path, documents: list[list[int]], dtype: str = "uint16") -> Path:
    """A .bin and .idx, as Megatron writes them."""
    tokens = [token for document in documents for token in document]
    np.array(tokens, dtype=dtype).tofile(f"{prefix}.bin")
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    Path(f"{prefix}.idx").write_bytes(idx_bytes(lengths, dtype))
    return Path(f"{prefix}.bin")


@pytest.fixture
def token_documents(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [[*tokenizer.encode(text).tolist(), tokenizer.eos_id] for text in texts[:60]]


def test_eos_past_uint16_is_appended_as_it_is(tmp_path: Path) -> None:
    eos_id = 65_600
    vocab = {f"w{number}": number for number in range(eos_id)} | {"</s>": eos_id}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    words.add_special_tokens(["</s>"])
    words.save(str(tmp_path / "tokenizer.json"))
    documents = [list(range(number, number + 70)) for number in range(50)]
    path = write_pair(tmp_path / "a", documents)
    report = take_in(
        tmp_path / "out", TokenFormat.megatron, [path], tmp_path / "tokenizer.json",
        eos_id=eos_id, append_eos=True, held_out_fraction=0.2,
    )  # fmt: skip
    assert report.manifest.dtype == "int32"
    found = documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "held_out")
    assert sorted(found) == [[*document, eos_id] for document in documents]


@pytest.mark.parametrize(
    "paths", [["rel/*.bin"], ["rel/a", "{}/rel/a.bin", "{}/rel/../rel/a"], ["rel/a.bin", "links/*"]]
)
def test_a_file_named_in_several_ways_is_one(
    token_documents: list[list[int]],
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    paths: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rel").mkdir()
    write_pair(Path("rel/a"), token_documents[:40])
    write_pair(Path("rel/b"), token_documents[40:])
    Path("links").mkdir()
    Path("links/a.bin").symlink_to(tmp_path / "rel/a.bin")
    take_in(
        tmp_path / "out", TokenFormat.megatron, [Path(path.format(tmp_path)) for path in paths],
        tokenizer_folder, held_out=[f"{tmp_path}/rel/b"],
    )  # fmt: skip
    assert documents_of(tmp_path / "out", "train") == token_documents[:40]
    assert documents_of(tmp_path / "out", "held_out") == token_documents[40:]


def test_a_symbolic_link_has_its_index_beside_it(
    token_documents: list[list[int]], tokenizer_folder: Path, tmp_path: Path
) -> None:
    for name, part in (("a", token_documents[:40]), ("b", token_documents[40:])):
        write_pair(tmp_path / name, part).rename(tmp_path / f"{name}.store")
        (tmp_path / f"{name}.bin").symlink_to(tmp_path / f"{name}.store")
    report = take_in(
        tmp_path / "out", TokenFormat.megatron, [tmp_path / "a.bin"], tokenizer_folder,
        held_out=[str(tmp_path / "b")],
    )  # fmt: skip
    assert report.num_linked == 2
    for shard, name in zip(report.manifest.shards, ("a", "b"), strict=True):
        linked = shard_files(tmp_path / "out" / shard.path)[0]
        assert not linked.is_symlink()
        assert linked.samefile(tmp_path / f"{name}.store")


def test_documents_that_become_equal_are_drawn_together(
    token_documents: list[list[int]], tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path
) -> None:
    eos_id = tokenizer.eos_id
    bare = [document[:-1] for document in token_documents]
    path = write_pair(tmp_path / "a", [*bare, *token_documents, [], [eos_id]])
    report = take_in(
        tmp_path / "out", TokenFormat.megatron, [path], tokenizer_folder, append_eos=True,
        held_out_fraction=0.5,
    )  # fmt: skip
    train, held_out = (documents_of(tmp_path / "out", split) for split in ("train", "held_out"))
    assert sorted(train + held_out) == sorted([*token_documents, *token_documents, [eos_id]])
    assert not {tuple(document) for document in train} & {tuple(document) for document in held_out}
    assert report.num_empty == 1


def test_a_linked_file_that_was_damaged_is_not_taken_for_truth(
    token_documents: list[list[int]],
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_pair(tmp_path / "a", token_documents[:40])
    held_out = write_pair(tmp_path / "b", token_documents[40:])

    def again() -> ImportReport:
        return take_in(
            tmp_path / "out", TokenFormat.megatron, [path], tokenizer_folder, held_out=[str(held_out)]
        )

    def write_unseen(target: Path, content: bytes) -> None:
        """In place, with the time of change that it had."""
        stat = target.stat()
        target.write_bytes(content)
        os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    first, whole = again(), path.read_bytes()
    tokens = np.frombuffer(whole, dtype=np.uint16).copy()
    tokens[3] = 7 if tokens[3] != 7 else 8
    write_unseen(path, tokens.tobytes())
    with pytest.raises(SystemExit, match="1"):
        inspect_command.show(InspectConfig(folder=str(tmp_path / "out"), quarantine=True))
    assert "`llmtrain data import` with the same settings writes it again" in capsys.readouterr().out
    with pytest.raises(DataError, match=rf"{path} changed since it was looked at: the xxh3_128 of its tok"):
        again()
    write_unseen(path, whole)
    assert again().manifest.table == first.manifest.table

    lengths = [len(document) for document in token_documents[:40]]
    lengths[0], lengths[1] = lengths[0] - 1, lengths[1] + 1
    shard_files(tmp_path / "out" / first.manifest.shards[0].path)[1].unlink()
    write_unseen(path.with_suffix(".idx"), idx_bytes(np.array(lengths), "uint16"))
    with pytest.raises(DataError, match=r"the xxh3_128 of its document lengths was .*Restore the file"):
        again()


def test_a_change_that_is_meant_gives_other_shards(
    token_documents: list[list[int]], tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Once the look is deleted, as the message says."""
    paths = [write_pair(tmp_path / name, token_documents[at::2]) for at, name in enumerate("ab")]
    stat = paths[0].stat()
    settings: dict[str, Any] = {"held_out": [str(paths[1])]}
    first = take_in(tmp_path / "out", TokenFormat.megatron, paths, tokenizer_folder, **settings)
    tokens = np.fromfile(paths[0], dtype=np.uint16)
    tokens[3] = 7 if tokens[3] != 7 else 8
    paths[0].write_bytes(tokens.tobytes())
    os.utime(paths[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    [look] = (tmp_path / "out/verdicts").iterdir()
    for each in look.iterdir():
        each.unlink()
    second = take_in(tmp_path / "out", TokenFormat.megatron, paths, tokenizer_folder, **settings)
    assert second.manifest.shards[0].sha256 != first.manifest.shards[0].sha256
    assert second.manifest.shards[1].sha256 == first.manifest.shards[1].sha256


def test_an_index_without_documents_is_named(
    token_documents: list[list[int]], tokenizer_folder: Path, tmp_path: Path
) -> None:
    path = write_pair(tmp_path / "a", token_documents)
    content = bytearray(path.with_suffix(".idx").read_bytes())
    content[26:34] = bytes(8)
    del content[34 + 12 * len(token_documents) :]
    path.with_suffix(".idx").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.idx: its document indices do not rise from 0 to 60 sequences"):
        take_in(tmp_path / "out", TokenFormat.megatron, [path], tokenizer_folder)


def test_a_path_is_looked_at_before_it_is_a_pattern(
    token_documents: list[list[int]], tokenizer_folder: Path, tmp_path: Path
) -> None:
    part = write_pair(tmp_path / "a[1]", token_documents[:40])
    write_pair(tmp_path / "a1", token_documents[:10])
    held_out = write_pair(tmp_path / "b[2]", token_documents[40:])
    take_in(
        tmp_path / "out", TokenFormat.megatron, [part], tokenizer_folder,
        held_out=[str(held_out.with_suffix(""))],
    )  # fmt: skip
    assert documents_of(tmp_path / "out", "train") == token_documents[:40]


def test_an_import_does_not_replace_a_run_on_text(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "sent"
    send(folder, TokenFormat.megatron, out)
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(DataError, match=r"json is not the manifest of an import.* give another out=FOLDER"):
        take_in(folder, TokenFormat.megatron, [out / "train/*"], out / "tokenizer")
    assert (folder / "manifest.json").read_bytes() == before
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/manifest.json").write_text("{")
    with pytest.raises(DataError, match="is not the manifest of an import"):
        take_in(tmp_path / "damaged", TokenFormat.megatron, [out / "train/*"], out / "tokenizer")
