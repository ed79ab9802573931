from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from near_corpus import (
    StoredTexts,
    edited,
    rows_of,
    signatures_of,
    small_config,
    split_fixed,
    text_of,
    write_tables,
)

from llmtrain.data.dedup.config import DedupConfig
from llmtrain.data.dedup.index import previous_units, read_index, write_index
from llmtrain.data.dedup.near import near_duplicates
from llmtrain.data.dedup.units import DedupUnit
from llmtrain.data.engines.engine import Inline
from llmtrain.errors import DataError


@pytest.fixture
def stars() -> list[bytes]:
    """Originals with copies that are like the original and like each other."""
    draw = np.random.default_rng(0)
    documents = []
    for _ in range(60):
        words = draw.integers(0, 2**30, 90)
        copies = [edited(words, int(draw.integers(0, 3)), draw) for _ in range(int(draw.integers(0, 6)))]
        documents += [text_of(copy.tolist()) for copy in (words, *copies)]
    return [documents[at] for at in draw.permutation(len(documents))]


def duplicates(
    folder: Path, units: list[DedupUnit], texts: list[bytes | None], cfg: DedupConfig
) -> list[int]:
    result = near_duplicates(units, cfg, StoredTexts(texts), Inline(), folder, split=split_fixed)
    return np.load(result.duplicates)["document"].tolist()


def write_kept(folder: Path, units: list[DedupUnit], removed: list[int]) -> list[Path]:
    paths = []
    for unit in units:
        kept = ~np.isin(np.arange(unit.first, unit.end), removed)
        paths.append(folder / f"kept-{unit.number}.npy")
        np.save(paths[-1], kept)
    return paths


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_two_runs_keep_what_one_run_keeps_and_the_second_needs_no_text_of_the_first(
    tmp_path: Path, stars: list[bytes], share: float
) -> None:
    """One run over all, with the ids in order, prefers the documents of the first run, too."""
    cfg = small_config(near={"num_permutations": 112, "bands": 28, "rows": 4})
    rows, signed = rows_of(len(stars)), signatures_of(stars, cfg.near)
    whole = write_tables(tmp_path / "all", rows, signed)
    expected = duplicates(tmp_path / "near-all", whole, list(stars), cfg)

    cut = int(share * len(stars))
    first = write_tables(tmp_path / "first", rows[:cut], signed[:cut], cuts=(cut // 3,))
    removed = duplicates(tmp_path / "near-first", first, list(stars[:cut]), cfg)
    kept = write_kept(tmp_path, first, removed)
    num_kept = write_index(first, kept, cfg, Inline(), tmp_path / "index")
    assert num_kept == cut - len(removed)

    cfg.previous = [str(tmp_path / "index")]
    second = write_tables(tmp_path / "second", rows[cut:], signed[cut:])
    second += previous_units(cfg, second)
    texts = [*stars[cut:], *[None] * num_kept]
    removed += [cut + document for document in duplicates(tmp_path / "near-second", second, texts, cfg)]
    assert removed == expected


def test_a_third_run_reads_both_indexes_and_an_index_holds_its_own_documents_only(tmp_path: Path) -> None:
    cfg = small_config()
    documents = [text_of(range(at, at + 50)) for at in (0, 100, 200)]
    signed = signatures_of(documents, cfg.near)
    for number in range(2):
        units = write_tables(tmp_path / f"{number}", rows_of(1, id_low=number), signed[number : number + 1])
        units += previous_units(cfg, units)
        kept = write_kept(tmp_path, units, [])
        assert write_index(units, kept, cfg, Inline(), tmp_path / f"index-{number}") == 1
        cfg.previous.append(str(tmp_path / f"index-{number}"))
    units = write_tables(tmp_path / "new", rows_of(3, id_low=[7, 8, 9]), signed)
    units += previous_units(cfg, units)
    assert [(unit.number, unit.first, unit.num_documents) for unit in units] == [
        (0, 0, 3),
        (1, 3, 1),
        (2, 4, 1),
    ]
    assert duplicates(tmp_path / "near", units, [*documents, None, None], cfg) == [0, 1]


def test_small_units_share_files_and_writing_again_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = small_config()
    documents = [text_of(range(at, at + 50)) for at in range(20)]
    units = write_tables(tmp_path / "u", rows_of(20), signatures_of(documents, cfg.near), range(2, 20, 2))
    kept = write_kept(tmp_path, units, [3])
    monkeypatch.setattr("llmtrain.data.dedup.index.FILE_DOCUMENTS", 8)
    assert write_index(units, kept, cfg, Inline(), tmp_path / "index") == 19
    read = read_index(tmp_path / "index", cfg, first=100, number=7)
    assert [unit.num_documents for unit in read] == [7, 8, 4]
    assert (read[0].number, read[0].first, read[-1].end) == (7, 100, 119)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").glob("*.npy")}
    assert write_index(units, kept, cfg, Inline(), tmp_path / "index") == 19
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "index").glob("*.npy")} == before


def test_without_near_duplicates_an_index_holds_hashes_only(tmp_path: Path) -> None:
    cfg = small_config(near={"enabled": False})
    units = write_tables(tmp_path / "u", rows_of(2), np.zeros((2, 32), dtype=np.uint32))
    assert write_index(units, write_kept(tmp_path, units, []), cfg, Inline(), tmp_path / "index") == 2
    assert read_index(tmp_path / "index", cfg, first=0, number=0)[0].signatures is None
    with pytest.raises(DataError, match="num_permutations=None and shingle_words=None, which do not compare"):
        read_index(tmp_path / "index", small_config(), first=0, number=0)


def test_an_index_of_other_settings_is_refused(tmp_path: Path) -> None:
    cfg = small_config()
    units = write_tables(tmp_path / "u", rows_of(2), np.zeros((2, 32), dtype=np.uint32))
    write_index(units, write_kept(tmp_path, units, []), cfg, Inline(), tmp_path / "index")
    with pytest.raises(DataError, match=r"dedup\.near\.shingle_words=9; take its settings, leave it out"):
        read_index(tmp_path / "index", small_config(near={"shingle_words": 9}), first=0, number=0)


def test_a_folder_without_an_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no index of an earlier run"):
        read_index(tmp_path, small_config(), first=0, number=0)
    (tmp_path / "index.json").write_text(json.dumps([]))
    with pytest.raises(DataError, match=r"dedup\.previous names"):
        read_index(tmp_path, small_config(), first=0, number=0)


def test_an_index_that_lost_a_file_is_refused(tmp_path: Path) -> None:
    cfg = small_config()
    units = write_tables(tmp_path / "u", rows_of(2), np.zeros((2, 32), dtype=np.uint32))
    write_index(units, write_kept(tmp_path, units, []), cfg, Inline(), tmp_path / "index")
    path = tmp_path / "index" / "signatures-000000.npy"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match="delete it and run again"):
        read_index(tmp_path / "index", cfg, first=0, number=0)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read as a table"):
        read_index(tmp_path / "index", cfg, first=0, number=0)
