"""Batches: every layout feeds the same rows, and a resumed run goes on where the first one stopped."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from llmtrain.errors import ConfigError, DataError
from llmtrain.loader.batch_sizes import BatchSizes
from llmtrain.loader.batches import NO_ROW, Batch, Batches, held_out_batches
from llmtrain.loader.dataset import NO_TARGET, Rows, _close_all
from llmtrain.loader.ledger import hash_rows
from llmtrain.loader.mixture import Mixture, Source
from llmtrain.loader.order import rows_at

GLOBAL_ROWS = 12
LAYOUTS = [
    (dp_size, micro)
    for dp_size in range(1, GLOBAL_ROWS + 1)
    for micro in range(1, GLOBAL_ROWS + 1)
    if GLOBAL_ROWS % (dp_size * micro) == 0
]


@pytest.fixture
def rows(corpus) -> Rows:
    return Rows(corpus.folder, corpus.manifest, "train", 16)


def batches_of(
    rows: Rows, *, dp_rank: int = 0, dp_size: int = 1, micro: int = 1, prefetch: bool = False
) -> Batches:
    return Batches(
        rows,
        order=order_of(rows, seed=5),
        sizes=BatchSizes.of([], GLOBAL_ROWS),
        micro_batch_rows=micro,
        dp_rank=dp_rank,
        dp_size=dp_size,
        prefetch_steps=2 if prefetch else 0,
    )


def order_of(rows: Rows, *, seed: int) -> Mixture:
    source = Source(name="data", num_rows=rows.num_rows, hash=rows.hash)
    return Mixture([source], [(0, {})], seed=seed, block_rows=64)


def step_of(rows: Rows, position: int, *, dp_size: int, micro: int) -> list[int]:
    """The rows that all ranks together read for the step, in the order of ranks."""
    found: list[int] = []
    for dp_rank in range(dp_size):
        batches = batches_of(rows, dp_rank=dp_rank, dp_size=dp_size, micro=micro)
        for batch in batches.step(position).micro_batches:
            assert batch.tokens_BS.shape == (micro, 16)
            found += batch.rows.tolist()
    return found


@pytest.mark.parametrize(("dp_size", "micro"), LAYOUTS)
def test_every_layout_reads_the_same_rows_of_each_step(rows: Rows, dp_size: int, micro: int) -> None:
    for position in (0, 12, 36, 84, 12 * 10**9):  # 41 rows an epoch: the second and later cross its end
        at = np.arange(position, position + 12)
        expected = rows_at(at, num_rows=rows.num_rows, seed=5, pack_hash=rows.hash)
        assert step_of(rows, position, dp_size=dp_size, micro=micro) == expected.tolist()


def test_run_that_changes_layout_at_each_restart_sees_each_row_once_an_epoch(rows: Rows) -> None:
    seen: list[int] = []
    position = 0
    random = np.random.default_rng(1)
    while len(seen) < 3 * rows.num_rows:
        dp_size, micro = LAYOUTS[int(random.integers(len(LAYOUTS)))]
        seen += step_of(rows, position, dp_size=dp_size, micro=micro)
        position += GLOBAL_ROWS
    for epoch in range(3):
        of_epoch = seen[epoch * rows.num_rows : (epoch + 1) * rows.num_rows]
        assert sorted(of_epoch) == list(range(rows.num_rows))


def test_batch_holds_what_the_rows_hold(rows: Rows) -> None:
    for batch in batches_of(rows, micro=4).step(24).micro_batches:
        block = rows.read_many(batch.rows)
        assert torch.equal(batch.tokens_BS, torch.from_numpy(block.tokens))
        assert torch.equal(batch.targets_BS, torch.from_numpy(block.targets))
        assert torch.equal(batch.positions_BS, torch.from_numpy(block.positions))
        assert torch.equal(batch.segments_BS, torch.from_numpy(block.segments))
        assert batch.num_valid == (block.targets != NO_TARGET).sum()
        moved = batch.to("meta")
        assert moved.tokens_BS.device.type == moved.segments_BS.device.type == "meta"
        assert (moved.num_valid, moved.rows is batch.rows) == (batch.num_valid, True)


def test_reading_ahead_changes_nothing(rows: Rows) -> None:
    ahead, plain = batches_of(rows, micro=3, prefetch=True), batches_of(rows, micro=3)
    for position in (0, 12, 24, 60, 60, 0, 12):  # in order, then back and forth as after a restore
        found, expected = ahead.step(position).micro_batches, plain.step(position).micro_batches
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)


def assert_equal(one: Batch, other: Batch) -> None:
    assert one.rows.tolist() == other.rows.tolist()
    assert torch.equal(one.tokens_BS, other.tokens_BS)
    assert torch.equal(one.targets_BS, other.targets_BS)


def test_next_step_is_read_while_this_one_computes(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    readers: list[str] = []
    read_many = Rows.read_many

    def noted(self: Rows, numbers: np.ndarray):
        readers.append(threading.current_thread().name)
        return read_many(self, numbers)

    monkeypatch.setattr(Rows, "read_many", noted)
    batches = batches_of(rows, micro=12, prefetch=True)
    for position in (0, 12, 24):
        batches.step(position)
    batches.close()
    assert set(readers) == {"read rows ahead"}
    assert 3 <= len(readers) <= 5


def test_error_in_the_background_is_raised_by_the_step_that_needs_it(corpus, rows: Rows) -> None:
    paths = [corpus.folder / f"shards/train-0000{number}.bin" for number in range(3)]
    batches = batches_of(rows, micro=12, prefetch=True)
    for path in paths:
        path.rename(path.with_suffix(".away"))
    with pytest.raises(
        DataError, match=r"train-0000\d\.bin, needed for row \d+, cannot be read: No such file"
    ):
        batches.step(0)
    for path in paths:
        path.with_suffix(".away").rename(path)
    batches.step(0)
    batches.step(12)  # steps 24 and 36 are being read behind it
    batches._ahead[36].result()
    _close_all(rows._open_files)  # as if other shards had pushed them out
    for path in paths:
        path.unlink()
    batches.step(24)
    batches.step(36)
    with pytest.raises(
        DataError, match=r"train-0000\d\.bin, needed for row \d+, cannot be read: No such file"
    ) as caught:
        batches.step(48)
    assert any(entry.name == "_read_tokens" for entry in caught.traceback)  # the reader's own


def test_process_ends_at_once_while_a_read_ahead_hangs(corpus) -> None:
    code = f"""
import time
from pathlib import Path
from llmtrain.data.manifest import read_manifest
from llmtrain.loader.batch_sizes import BatchSizes
from llmtrain.loader.batches import Batches
from llmtrain.loader.dataset import Rows
from llmtrain.loader.mixture import Mixture, Source
folder = Path({str(corpus.folder)!r})
rows = Rows(folder, read_manifest(folder), "train", 16)
source = Source(name="data", num_rows=rows.num_rows, hash=rows.hash)
order = Mixture([source], [(0, dict())], seed=0, block_rows=8)
sizes = BatchSizes.of([], 1)
batches = Batches(rows, order=order, sizes=sizes, micro_batch_rows=1, dp_rank=0, dp_size=1)
rows.read_many, read_many = (lambda numbers: time.sleep(600)), rows.read_many
batches._enqueue(0, 1)
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.parametrize(
    ("global_rows", "micro", "dp_size", "product"), [(12, 5, 1, 5), (12, 2, 4, 8), (0, 1, 1, 1), (4, 8, 1, 8)]
)
def test_uneven_splits_are_refused(
    rows: Rows, global_rows: int, micro: int, dp_size: int, product: int
) -> None:
    message = (
        rf"train.global_batch_rows={global_rows} is not a positive multiple of train.micro_batch_rows times "
        rf"data-parallel ranks, {micro} \* {dp_size} = {product}; change one of them"
    )
    with pytest.raises(ConfigError, match=message):
        Batches(
            rows,
            order=order_of(rows, seed=0),
            sizes=BatchSizes.of([], global_rows),
            micro_batch_rows=micro,
            dp_rank=0,
            dp_size=dp_size,
        )


def test_a_read_that_does_not_come_back_is_an_error(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = batches_of(rows, micro=12, prefetch=True)
    batches.timeout_s = 0.05
    wait = threading.Event()
    read_many = Rows.read_many
    batches.step(0)
    monkeypatch.setattr(Rows, "read_many", lambda self, numbers: (wait.wait(10), read_many(self, numbers))[1])
    batches._ahead.clear()  # steps 12 and 24 may have been read before
    for ahead in (0, 2):  # also without reading ahead
        batches.prefetch_steps = ahead
        with pytest.raises(DataError, match=r"reading the step at row 36 has not come back after 0.05 s"):
            batches.step(36)
    wait.set()
    batches.close()


@pytest.mark.parametrize(("dp_size", "micro"), LAYOUTS)
def test_hashes_of_a_step_add_up_to_the_same_in_every_layout(rows: Rows, dp_size: int, micro: int) -> None:
    parts = [
        batches_of(rows, dp_rank=rank, dp_size=dp_size, micro=micro).step(36).tokens_hash
        for rank in range(dp_size)
    ]
    at = rows_at(np.arange(36, 48), num_rows=rows.num_rows, seed=5, pack_hash=rows.hash)
    assert sum(parts) % 2**64 == hash_rows(36, rows.read_many(at).tokens)


def test_a_ramp_reads_what_its_sizes_say(rows: Rows) -> None:
    sizes = BatchSizes.of([(10, 4)], 12)
    batches = Batches(
        rows, order=order_of(rows, seed=5), sizes=sizes, micro_batch_rows=2, dp_rank=1, dp_size=2
    )
    position, seen = 0, []
    for _ in range(5):
        size = sizes.rows_at(position)
        found = [row for batch in batches.step(position).micro_batches for row in batch.rows.tolist()]
        at = np.arange(position + size // 2, position + size)
        assert found == rows_at(at, num_rows=rows.num_rows, seed=5, pack_hash=rows.hash).tolist()
        seen.append(size)
        position += size
    batches.close()
    assert seen == [4, 4, 4, 12, 12]


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("micro", [1, 4, 50])
@pytest.mark.parametrize("max_rows", [None, 5, 1000])
def test_held_out_rows_come_once_over_ranks_with_equal_numbers_of_batches(
    rows: Rows, dp_size: int, micro: int, max_rows: int | None
) -> None:
    by_rank = [
        list(held_out_batches(rows, micro_batch_rows=micro, dp_rank=rank, dp_size=dp_size, max_rows=max_rows))
        for rank in range(dp_size)
    ]
    assert len({len(batches) for batches in by_rank}) == 1
    num_rows = min(rows.num_rows, max_rows or rows.num_rows)
    found = np.concatenate([batch.rows for batches in by_rank for batch in batches])
    chosen = [number * rows.num_rows // num_rows for number in range(num_rows)]  # spread over the split
    assert sorted(found[found != NO_ROW].tolist()) == chosen
    expected = rows.read_many(np.array(chosen)).targets != NO_TARGET
    assert sum(batch.num_valid for batches in by_rank for batch in batches) == expected.sum()
    for batch in (batch for batches in by_rank for batch in batches):
        assert batch.tokens_BS.shape == (micro, 16)
        masked = torch.from_numpy(batch.rows == NO_ROW)
        assert (batch.targets_BS[masked] == NO_TARGET).all()
        assert int((batch.targets_BS != NO_TARGET).sum()) == batch.num_valid


def test_held_out_rows_that_run_out_are_filled_with_masked_ones(rows: Rows) -> None:
    spread = [number * rows.num_rows // 8 for number in range(8)]
    batches = held_out_batches(rows, micro_batch_rows=3, dp_rank=1, dp_size=2, max_rows=8)
    assert [batch.rows.tolist() for batch in batches] == [spread[3:6], [NO_ROW] * 3]


def test_no_thread_is_left_after_close(rows: Rows) -> None:
    batches = batches_of(rows, micro=12, prefetch=True)
    batches.step(0)
    thread = batches._thread
    assert thread is not None
    assert thread.is_alive()
    batches.close()
    assert not thread.is_alive()


def test_a_rank_that_cannot_read_held_out_rows_stays_in_step_and_tells(corpus, rows: Rows) -> None:
    whole = list(held_out_batches(rows, micro_batch_rows=4, dp_rank=0, dp_size=2))
    (corpus.folder / "shards/train-00001.bin").unlink()
    _close_all(rows._open_files)
    with pytest.raises(DataError, match="cannot be read"):
        list(held_out_batches(rows, micro_batch_rows=4, dp_rank=0, dp_size=2))
    failures: list[Exception] = []
    found = list(held_out_batches(rows, micro_batch_rows=4, dp_rank=0, dp_size=2, on_failure=failures.append))
    assert failures
    assert len(found) == len(whole)
    lost = [batch for batch in found if batch.num_valid == 0]
    assert len(lost) == len(failures)
    for one, other in zip(found, whole, strict=True):
        assert one.tokens_BS.shape == other.tokens_BS.shape
        if one.num_valid:
            assert torch.equal(one.targets_BS, other.targets_BS)
