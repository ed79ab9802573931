"""Shards are shown and every byte of them compared; a damaged one is put away, and made again as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.cli import inspect_shards as command
from llmtrain.data.config import ShardsConfig
from llmtrain.data.inspect import InspectConfig, inspect_shards
from llmtrain.data.manifest import read_manifest, shard_files, sums_file
from llmtrain.data.pipeline import run
from llmtrain.data.shards import idx_bytes
from llmtrain.data.trace import OutputFormat
from llmtrain.errors import ConfigError, DataError, LaunchError
from llmtrain.files import FolderLock, hash_file


@pytest.fixture
def cfg(write_jsonl: Callable[..., Path], jsonl_config: Callable[..., Any], texts: list[str]) -> Any:
    cfg = jsonl_config(write_jsonl(texts[:60]), shards=ShardsConfig(text_bytes=8000))
    run(cfg, quiet=True)
    return cfg


@pytest.fixture
def folder(cfg: Any) -> Path:
    return Path(cfg.out)


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def one_shard(folder: Path) -> Path:
    return folder / read_manifest(folder).split_shards("train")[1].path


def test_whole_shards_are_shown_with_what_they_hold(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.show(InspectConfig(folder=str(folder), format=OutputFormat.json))
    told = json.loads(capsys.readouterr().out)
    manifest = read_manifest(folder)
    assert [shard["path"] for shard in told["shards"]] == [shard.path for shard in manifest.shards]
    assert sum(shard["num_tokens"] for shard in told["shards"]) == sum(s.num_tokens for s in manifest.shards)
    for shard in told["shards"]:
        raw = np.fromfile(shard_files(folder / shard["path"])[0], dtype=manifest.dtype)
        assert shard["max_id"] == raw.max()
        assert shard["num_eos"] == (raw == manifest.tokenizer.eos_id).sum() == shard["num_documents"]
        assert shard["sources"] == {"texts": shard["num_documents"]}
        assert shard["problems"] == []
    assert told["problems"] == []
    command.show(InspectConfig(folder=str(folder), shard="1"))
    text = capsys.readouterr().out
    assert "1 shards with" in text
    assert "every byte read: 0 damaged" in text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda prefix: flip(shard_files(prefix)[0], 301), "its .sums file says"),
        (lambda prefix: flip(shard_files(prefix)[1], 40), ".idx"),
        (lambda prefix: shard_files(prefix)[0].unlink(), "is missing"),
        (lambda prefix: shard_files(prefix)[0].write_bytes(b"12"), "2 bytes"),
        (lambda prefix: flip(sums_file(prefix), 3), ".sums"),
        (lambda prefix: prefix.with_name(f"{prefix.name}.docs.parquet").write_bytes(b"PAR1"), "docs.parquet"),
        (lambda prefix: prefix.with_name(f"{prefix.name}.docs.parquet").unlink(), "docs.parquet"),
    ],
)
def test_damage_is_named_put_away_and_made_again(
    cfg: Any,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    message: str,
) -> None:
    prefix = one_shard(folder)
    before = {path: hash_file(path) for path in sorted(prefix.parent.iterdir())}
    damage(prefix)
    with pytest.raises(SystemExit, match="1"):
        command.show(InspectConfig(folder=str(folder), quarantine=True))
    text = capsys.readouterr().out
    assert message in text
    assert prefix.name in text
    assert "`llmtrain data` with the same settings writes it again" in text
    [reason] = folder.glob("quarantine/shards/*.reason.json")
    assert message in reason.read_text()
    assert not shard_files(prefix)[1].exists(), "it is still among the good ones"
    run(cfg, quiet=True)
    assert {path: hash_file(path) for path in sorted(prefix.parent.iterdir())} == before
    assert inspect_shards(InspectConfig(folder=str(folder), format=OutputFormat.json)).num_problems == 0


def test_without_being_asked_nothing_is_moved(folder: Path) -> None:
    prefix = one_shard(folder)
    flip(shard_files(prefix)[0], 10)
    found = inspect_shards(InspectConfig(folder=str(folder), format=OutputFormat.json))
    assert [bool(shard.problems) for shard in found.shards].count(True) == 1
    assert shard_files(prefix)[0].exists()
    quick = inspect_shards(InspectConfig(folder=str(folder), content=False, format=OutputFormat.json))
    assert quick.num_problems == 0, "sizes are as they were"


def test_what_was_put_away_before_stays(cfg: Any, folder: Path) -> None:
    prefix, found = one_shard(folder), []
    for offset in (10, 20, 30):
        flip(shard_files(prefix)[0], offset)
        damaged = shard_files(prefix)[0].read_bytes()
        [put_away] = inspect_shards(InspectConfig(folder=str(folder), quarantine=True)).quarantined
        found.append((put_away, damaged))
        run(cfg, quiet=True)
    into = folder / "quarantine/shards"
    assert [path for path, _ in found] == [str(into / f"{prefix.name}{end}") for end in ("", "-2", "-3")]
    for path, damaged in found:
        assert Path(f"{path}.bin").read_bytes() == damaged
        assert json.loads(Path(f"{path}.reason.json").read_text())["path"] == str(prefix.relative_to(folder))
        assert len(list(into.glob(f"{Path(path).name}.*"))) == 6


def test_nothing_is_put_away_while_somebody_writes(folder: Path) -> None:
    prefix = one_shard(folder)
    flip(shard_files(prefix)[0], 10)
    with FolderLock(folder):
        with pytest.raises(LaunchError, match="is being written by pid"):
            inspect_shards(InspectConfig(folder=str(folder), quarantine=True))
        assert inspect_shards(InspectConfig(folder=str(folder))).num_problems == 1
    assert shard_files(prefix)[0].exists()


def test_what_all_shards_share_is_looked_at_too(folder: Path) -> None:
    [model] = folder.glob("tokenizer/*/tokenizer.model")
    model.write_bytes(model.read_bytes() + b"\x00")
    found = inspect_shards(InspectConfig(folder=str(folder), format=OutputFormat.json))
    assert found.problems
    assert "tokenizer" in found.problems[0]


def test_a_bare_pair_of_files_needs_no_manifest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = one_shard(folder)
    command.show(InspectConfig(prefix=str(prefix), format=OutputFormat.json))
    [shard] = json.loads(capsys.readouterr().out)["shards"]
    entry = next(each for each in read_manifest(folder).shards if folder / each.path == prefix)
    assert (shard["num_documents"], shard["num_tokens"]) == (entry.num_documents, entry.num_tokens)
    assert shard["max_id"] == entry.max_id
    assert shard["num_eos"] is None


def test_a_pair_without_a_document_is_shown(tmp_path: Path) -> None:
    """As Megatron's builder leaves it when nothing was added."""
    (tmp_path / "none.bin").touch()
    (tmp_path / "none.idx").write_bytes(idx_bytes(np.zeros(0, dtype=np.int64), "uint16"))
    [shard] = inspect_shards(InspectConfig(prefix=str(tmp_path / "none"))).shards
    assert (shard.num_documents, shard.num_tokens, shard.max_id, shard.problems) == (0, 0, None, [])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give folder or prefix, one of them"),
        ({"folder": "a", "prefix": "b"}, "give folder or prefix, one of them"),
        ({"prefix": "b", "quarantine": True}, "leave shard and quarantine out"),
    ],
)
def test_a_request_without_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InspectConfig(**settings)


def test_what_is_not_there_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="shard=99 is past the last"):
        inspect_shards(InspectConfig(folder=str(folder), shard="99"))
    with pytest.raises(DataError, match="nothing"):
        inspect_shards(InspectConfig(prefix=str(tmp_path / "nothing")))
