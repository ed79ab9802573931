"""Which tokens make which row, for every strategy."""

from __future__ import annotations

import bisect
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtrain.data.config import Packing
from llmtrain.data.manifest import PackEntry, ShardTable
from llmtrain.data.pack import ConcatPlan, FilePlan, RowPlan, plan_rows, write_plan, write_rows
from llmtrain.data.shards import idx_bytes
from llmtrain.errors import DataError

SPAN_FIELDS = ("shard", "start", "length", "has_next")


def plan(
    folder: Path, shards: list[list[int]], seq_len: int, strategy: Packing, window_documents: int = 10**6
) -> tuple[PackEntry, list[list[tuple[int, ...]]]]:
    """The entry of a pack over shards of documents of these lengths, and the spans of each of its rows."""
    lengths = [np.array(part) for part in shards]
    entry = write_plan(
        folder, "packs/k", "train", seq_len, strategy, lengths, window_documents=window_documents
    )
    if not entry.num_rows:
        return entry, []
    opened: RowPlan
    if strategy is Packing.concat:
        records = np.zeros(
            len(shards), dtype=[("split", "u1"), ("num_tokens", "<i8"), ("num_documents", "<i8")]
        )
        for number, part in enumerate(lengths):
            records[number] = (0, part.sum(), len(part))
            (folder / f"train-{number:05d}.idx").write_bytes(idx_bytes(part, "uint16"))
        opened = ConcatPlan(folder, ShardTable("", ("train",), records), seq_len)
    else:
        opened = FilePlan(folder, entry)
    spans, counts = opened.spans(np.arange(entry.num_rows))
    rows = iter(map(tuple, spans.T.tolist()))
    return entry, [list(itertools.islice(rows, count)) for count in counts.tolist()]


SHARDS = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=9), min_size=1, max_size=4)


@pytest.mark.parametrize("strategy", Packing)
@given(shards=SHARDS, seq_len=st.integers(2, 20), window=st.integers(1, 12))
@settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_token_is_lost_invented_or_doubled(
    tmp_path: Path, strategy: Packing, shards: list[list[int]], seq_len: int, window: int
) -> None:
    entry, rows = plan(tmp_path, shards, seq_len, strategy, window)
    ends = [np.cumsum(part).tolist() for part in shards]
    seen: list[tuple[int, int]] = []
    targets = 0
    for row in rows:
        assert sum(length for _, _, length, _ in row) <= seq_len
        for shard, start, length, has_next in row:
            document = bisect.bisect_right(ends[shard], start)
            end = ends[shard][document]
            assert 0 < length <= end - start, "a span goes past the end of its document"
            assert has_next == (start + length < end)
            seen += [(shard, token) for token in range(start, start + length)]
            targets += length - 1 + has_next
    every = [(shard, token) for shard, part in enumerate(shards) for token in range(sum(part))]
    if strategy is Packing.concat:  # in order; a tail that holds no target is left out
        assert seen == every[: len(seen)]
        assert all(token + 1 in ends[shard] for shard, token in every[len(seen) :])
        assert len(every) - len(seen) <= seq_len
    else:
        assert sorted(seen) == every
    lengths = [length for part in shards for length in part]
    assert targets == entry.num_target_tokens == sum(lengths) - len(lengths)
    assert entry.num_padding == entry.num_rows * seq_len - len(seen)
    assert entry.num_long_documents == sum(length > seq_len for length in lengths)
    pieces: dict[tuple[int, int], list[int]] = {}
    for shard, start, length, _ in itertools.chain(*rows):
        pieces.setdefault((shard, bisect.bisect_right(ends[shard], start)), []).append(length)
    wholes = {at: shards[at[0]][at[1]] for at in pieces}
    cut = [at for at, whole in wholes.items() if whole <= seq_len and pieces[at] != [whole]]
    assert entry.num_cut_documents == len(cut)
    if strategy is not Packing.concat:
        assert entry.num_cut_documents == 0
    if strategy is Packing.padded:
        assert all(len(row) == 1 for row in rows)


def reference(lengths: list[int], seq_len: int) -> list[list[int]]:
    """Best-fit decreasing by the book: documents of each row that is not one whole piece of a document."""
    rests = [(-(length % seq_len), at) for at, length in enumerate(lengths) if length % seq_len]
    rooms: dict[int, list[int]] = {}
    rows: list[list[int]] = []
    for negative, document in sorted(rests):
        rest = -negative
        room = min((room for room in rooms if room >= rest and rooms[room]), default=None)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, seq_len
        else:
            row = rooms[room].pop()
        rows[row].append(document)
        if room > rest:
            rooms.setdefault(room - rest, []).append(row)
    return sorted(sorted(row) for row in rows)


@pytest.mark.parametrize("seq_len", [2, 5, 63, 64, 65, 127, 128, 4096, 4097, 10_000])
def test_best_fit_is_that_of_the_book(seq_len: int) -> None:
    random = np.random.default_rng(seq_len)
    for mean in (seq_len / 4 + 1, seq_len, 3.0):
        lengths = random.geometric(1 / mean, 400)
        counts, document, offset, _ = plan_rows(lengths, seq_len, Packing.best_fit)
        ends = np.cumsum(counts)
        rows = [document[end - count : end].tolist() for end, count in zip(ends, counts, strict=True)]
        whole = [offset[end - 1] + seq_len <= lengths[document[end - 1]] for end in ends]
        assert sorted(r for r, is_whole in zip(rows, whole, strict=True) if not is_whole) == reference(
            lengths.tolist(), seq_len
        )
        assert [row[0] for row in rows] == sorted(row[0] for row in rows)


def test_best_fit_pads_little() -> None:
    """A thousandth of the positions at most: documents of a geometric length, 800 tokens in the mean."""
    lengths = np.random.default_rng(0).geometric(1 / 800, 50_000)
    counts, *_ = plan_rows(lengths, 2048, Packing.best_fit)
    assert len(counts) * 2048 < 1.001 * lengths.sum()
    padded, *_ = plan_rows(lengths, 2048, Packing.padded)
    assert len(padded) > 2 * len(counts)


def test_windows_only_join_documents_that_are_near(tmp_path: Path) -> None:
    shards = [[5, 5, 5], [5, 5]]
    _, together = plan(tmp_path, shards, 10, Packing.best_fit)
    assert len(together) == 3
    _, rows = plan(tmp_path, shards, 10, Packing.best_fit, window_documents=3)
    assert [[span[:2] for span in row] for row in rows] == [[(0, 0), (0, 5)], [(0, 10)], [(1, 0), (1, 5)]]


def test_spans_name_their_documents(tmp_path: Path) -> None:
    _, rows = plan(tmp_path, [[3, 2], [4]], 4, Packing.concat)
    assert rows == [[(0, 0, 3, 0), (0, 3, 1, 1)], [(0, 4, 1, 0), (1, 0, 3, 1)]]
    _, rows = plan(tmp_path, [[3, 2], [9, 1]], 4, Packing.best_fit)
    assert rows == [
        [(0, 0, 3, 0), (1, 8, 1, 0)], [(0, 3, 2, 0), (1, 9, 1, 0)], [(1, 0, 4, 1)], [(1, 4, 4, 1)]
    ]  # fmt: skip


@pytest.mark.parametrize("strategy", Packing)
def test_a_pack_without_documents_has_no_rows(tmp_path: Path, strategy: Packing) -> None:
    assert plan(tmp_path, [], 4, strategy)[0].num_rows == 0


def test_documents_of_no_token_are_passed_over(tmp_path: Path) -> None:
    """Others write them."""
    _, rows = plan(tmp_path, [[0, 3, 0, 0, 2, 0], [0, 4]], 4, Packing.concat)
    assert rows == [[(0, 0, 3, 0), (0, 3, 1, 1)], [(0, 4, 1, 0), (1, 0, 3, 1)]]


def test_a_plan_in_files_that_are_damaged_is_refused(tmp_path: Path) -> None:
    entry, _ = plan(tmp_path, [[3, 2, 7]], 4, Packing.best_fit)
    with pytest.raises(DataError, match="does not fit its manifest entry"):
        FilePlan(tmp_path, replace(entry, num_rows=2))
    rows, spans = (tmp_path / f"packs/k/train.{kind}.npy" for kind in ("rows", "spans"))
    whole = spans.read_bytes()
    spans.write_bytes(whole[:-7])
    with pytest.raises(DataError, match=r"of split 'train' in .* is damaged"):
        FilePlan(tmp_path, entry)
    spans.unlink()
    with pytest.raises(DataError, match=r"train\.spans\.npy is missing"):
        FilePlan(tmp_path, entry)
    spans.write_bytes(whole)
    np.save(rows, np.array([0, 0, 4, 4], dtype="<i8"))
    with pytest.raises(DataError, match="its rows file points outside its spans file"):
        FilePlan(tmp_path, replace(entry, num_rows=3)).spans(np.array([0]))


def test_indexes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    plan(tmp_path, [[3, 2]], 4, Packing.concat)
    records = np.array([(0, 5, 3)], dtype=[("split", "u1"), ("num_tokens", "<i8"), ("num_documents", "<i8")])
    table = ShardTable("", ("train",), records)
    with pytest.raises(DataError, match=r"train-00000\.idx has 2 documents, the manifest says 3"):
        ConcatPlan(tmp_path, table, 4).spans(np.array([0]))
    records["num_documents"] = 2
    index = bytearray((tmp_path / "train-00000.idx").read_bytes())
    index[34] = 1  # the first document ends too early
    (tmp_path / "train-00000.idx").write_bytes(index)
    with pytest.raises(DataError, match=r"is damaged: documents do not cover tokens 0 to 4"):
        ConcatPlan(tmp_path, table, 4).spans(np.array([0]))
    (tmp_path / "train-00000.idx").unlink()
    with pytest.raises(DataError, match=r"train-00000\.idx cannot be read: No such file"):
        ConcatPlan(tmp_path, table, 4).spans(np.array([0]))


def test_a_plan_that_is_written_in_pieces_is_one_file(tmp_path: Path) -> None:
    spans = np.arange(5 * 4).reshape(5, 4)
    dtype = [(name, kind) for name, kind in zip(SPAN_FIELDS, ("<u4", "<u8", "<u4", "u1"), strict=True)]
    pieces = np.array([tuple(row) for row in spans.tolist()], dtype=dtype)
    one = write_rows(tmp_path / "one", "train", [(np.array([2, 1, 2]), pieces)])
    two = write_rows(tmp_path / "two", "train", [(np.array([2]), pieces[:2]), (np.array([1, 2]), pieces[2:])])
    assert one == two
    assert np.load(tmp_path / "two/train.rows.npy").tolist() == [0, 2, 3, 5]
