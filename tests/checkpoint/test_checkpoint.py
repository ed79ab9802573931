"""A checkpoint is whole or it is not there, on one rank and on several."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from several_ranks import TENSORS, Threads, cut, halves, whole

from llmtrain.checkpoint import storage
from llmtrain.checkpoint.config import SaveConfig
from llmtrain.checkpoint.find import checkpoint_path, list_checkpoints, newest_checkpoint
from llmtrain.checkpoint.format import (
    FORMAT_VERSION,
    MARKER_FILE,
    UNFINISHED_FILE,
    Piece,
    manifest_name,
    marker,
)
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.checkpoint.write import ALONE, save_checkpoint
from llmtrain.errors import CheckpointError, ConfigError

MANIFEST_FILE = manifest_name()


SOLO = {"ranks": ALONE}
KEEP_1 = SaveConfig(keep_last=1)


def save(folder: Path, step: int, *, keep: int = 100, plus: float = 0.0, **state: Any) -> Path:
    return save_checkpoint(
        folder, step=step, pieces=whole(plus=plus), state=state, config=SaveConfig(keep_last=keep), **SOLO
    )  # fmt: skip


def header_bytes(path: Path) -> int:
    """Of the first rank's file."""
    found: int = json.loads((path / MANIFEST_FILE).read_text())["files"][0]["header_bytes"]
    return found


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if not re.fullmatch(r"step-\d{8}", path.name)]


# --- what is saved comes back


def test_tensors_and_state_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 120, position=7, nested={"a": [1, 2.5, None, "é"]})
    assert path == tmp_path / "checkpoints" / "step-00000120"
    reader = CheckpointReader(path)
    reader.verify()
    assert (reader.step, reader.state) == (120, {"position": 7, "nested": {"a": [1, 2.5, None, "é"]}})
    assert reader.tensors == {name: value.shape for name, value in TENSORS.items()}
    assert reader.kinds == ["weight"]
    file = path / "rank-00000.safetensors"
    assert reader.num_bytes == file.stat().st_size
    opened = load_file(file)  # the library's own reader
    assert set(opened) == {f"weight/{name}" for name in TENSORS}
    for name, value in TENSORS.items():
        read = reader.read("weight", name)
        assert read.dtype == reader.dtype("weight", name) == value.dtype
        assert read.shape == value.shape
        assert read.tobytes() == value.tobytes()
        assert np.array_equal(opened[f"weight/{name}"], value)


@pytest.mark.parametrize("dtype", ["float16", "float32", ">f8", "int64", ">u2", "bool"])
def test_every_number_type_comes_back_little_endian(tmp_path: Path, dtype: str) -> None:
    values = (np.arange(10) % 3).astype(dtype)
    path = save_checkpoint(
        tmp_path, step=1, pieces=[Piece("k", "x", (10,), 0, values)], state={}, config=KEEP_1, **SOLO
    )
    read = CheckpointReader(path).read("k", "x")
    assert read.dtype == values.dtype.newbyteorder("<")
    assert read.tolist() == values.tolist()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), world_size=st.integers(1, 4), num_elements=st.integers(1, 40))
def test_any_layout_reads_any_layout(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, world_size: int, num_elements: int
) -> None:
    value = np.random.default_rng(num_elements).standard_normal((1, num_elements)).astype(np.float32)
    borders = data.draw(st.lists(st.integers(0, num_elements), max_size=8))
    pieces = cut(value, "exp_avg", "w", borders)
    owners = [data.draw(st.integers(0, world_size - 1)) for _ in pieces]
    folder = tmp_path_factory.mktemp("run")

    def work(rank: int, arguments: dict[str, Any]) -> Path:
        own = (piece for piece, owner in zip(pieces, owners, strict=True) if owner == rank)
        return save_checkpoint(folder, step=1, pieces=own, state={}, config=KEEP_1, **arguments)

    paths = Threads(world_size).run(work)
    assert paths == [folder / "step-00000001"] * world_size
    reader = CheckpointReader(paths[0])
    reader.verify()
    assert np.array_equal(reader.read("exp_avg", "w"), value)
    start = data.draw(st.integers(0, num_elements))
    length = data.draw(st.integers(0, num_elements - start))
    part = reader.read_flat("exp_avg", "w", start, length)
    assert np.array_equal(part, value.reshape(-1)[start : start + length])


def test_marker_is_what_sha256sum_checks(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    done = subprocess.run(
        ["sha256sum", "--check", MARKER_FILE], cwd=path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "manifest.json: OK\n")


def test_same_step_again_replaces_the_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 5, version=1)
    save(tmp_path, 5, version=2, plus=1.0)
    reader = CheckpointReader(tmp_path / "step-00000005")
    assert reader.state == {"version": 2}
    assert np.array_equal(reader.read("weight", "final_norm.weight"), np.full(5, 2.0, dtype=np.float32))
    assert leftovers(tmp_path) == []
    names = ["COMMITTED", "manifest.1.json", "rank-00000.1.safetensors"]
    assert sorted(path.name for path in reader.path.iterdir()) == names
    done = subprocess.run(["sha256sum", "--check", MARKER_FILE], cwd=reader.path, check=False)
    assert done.returncode == 0


def test_a_checkpoint_counts_until_the_marker_of_its_replacement_is_there(tmp_path: Path) -> None:
    save(tmp_path, 4)
    path = save(tmp_path, 5, version=1)
    (path / "notes.txt").write_text("mine")
    (path / "rank-00000.1.safetensors").write_bytes(b"half")  # killed while it was saved again
    (path / UNFINISHED_FILE).write_text("token")
    assert list_checkpoints(tmp_path) == [4, 5]
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert CheckpointReader(newest).state == {"version": 1}
    save(tmp_path, 6)  # the next save clears it away
    names = ["COMMITTED", "manifest.json", "notes.txt", "rank-00000.safetensors"]
    assert sorted(path.name for path in path.iterdir()) == names
    assert newest_checkpoint(tmp_path) == tmp_path / "step-00000006"


def test_what_is_being_deleted_does_not_count_and_is_no_damage(tmp_path: Path) -> None:
    save(tmp_path, 4)
    path = save(tmp_path, 5)
    (path / MARKER_FILE).rename(path / UNFINISHED_FILE)  # killed right after that
    assert list_checkpoints(tmp_path) == [4]
    assert newest_checkpoint(tmp_path) == tmp_path / "step-00000004"
    save(tmp_path, 6)
    assert not path.exists()


# --- finding and retention


def test_folder_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "absent") is None
    assert newest_checkpoint(tmp_path) is None
    assert list_checkpoints(tmp_path / "absent") == []


def test_only_the_newest_stay_and_leftovers_of_killed_saves_go(tmp_path: Path) -> None:
    for step, names in {
        1: [UNFINISHED_FILE, "rank-00000.safetensors"],
        2: [],
        9: [".COMMITTED.tmp-1-2"],
    }.items():
        (tmp_path / f"step-0000000{step}").mkdir()
        for name in names:
            (tmp_path / f"step-0000000{step}" / name).write_bytes(b"half")
    assert newest_checkpoint(tmp_path) is None
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert list_checkpoints(tmp_path) == [3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_first_checkpoints_past_multiples_of_tokens_and_the_best_stay(tmp_path: Path) -> None:
    config = SaveConfig(keep_last=1, keep_every_tokens=1000, keep_best=1)
    losses = {1: 3.0, 2: None, 3: 2.0, 4: 2.5, 5: 2.0, 6: None, 7: 4.0}
    for step, loss in losses.items():
        state = {"tokens": 400 * step, "eval_loss": loss}
        save_checkpoint(tmp_path, step=step, pieces=whole(), state=state, ranks=ALONE, config=config)
    # 3, 5: first at or past 1000, 2000; 3 is the best, too (5 came later); 7 is the last, and before 3000
    assert list_checkpoints(tmp_path) == [3, 5, 7]


def test_a_damaged_checkpoint_among_those_to_choose_from_stays_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = SaveConfig(keep_last=1, keep_best=1)
    for step in (1, 2, 3):
        state = {"tokens": step, "eval_loss": 1.0 / step}
        path = save_checkpoint(tmp_path, step=step, pieces=whole(), state=state, ranks=ALONE, config=config)
        if step == 1:
            (path / "rank-00000.safetensors").unlink()
    assert list_checkpoints(tmp_path) == [1, 3]
    assert "a damaged checkpoint stays, though nothing starts from it" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_last": 0}, "save.keep_last=0 must be at least 1"),
        ({"every_steps": 0}, "save.every_steps=0 must be at least 1"),
        ({"keep_best": -1}, "save.keep_best=-1 must not be negative; 0 switches it off"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SaveConfig(**settings)


def test_save_after_going_back_keeps_itself_and_the_later_ones(tmp_path: Path) -> None:
    for step in (100, 120, 200):
        save(tmp_path, step)
    save(tmp_path, 130, keep=1)
    assert list_checkpoints(tmp_path) == [130, 200]


def test_unknown_step_lists_the_steps_there_are(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=f"no checkpoint of step 9 in {tmp_path}; it holds no checkpoint"
    ):
        checkpoint_path(tmp_path, 9)
    save(tmp_path, 3)
    save(tmp_path, 4)
    assert checkpoint_path(tmp_path, 3) == tmp_path / "step-00000003"
    with pytest.raises(CheckpointError, match=f"no checkpoint of step 9 in {tmp_path}; it holds 3, 4"):
        checkpoint_path(tmp_path, 9)


def test_old_checkpoint_that_cannot_be_deleted_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = save(tmp_path, 1)

    def refuse(path: Path) -> None:
        if path.parent == first:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    monkeypatch.setattr(storage, "delete", refuse)
    save(tmp_path, 2, keep=1)
    assert f"could not delete the old checkpoint {tmp_path / 'step-00000001'}: [Errno 16]" in caplog.text
    assert list_checkpoints(tmp_path) == [2]


# --- damage


def test_flipped_byte_anywhere_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 1, position=3)
    for name in ("rank-00000.safetensors", MANIFEST_FILE, MARKER_FILE):
        file = path / name
        good = file.read_bytes()
        for at in range(0, len(good), max(1, len(good) // 40)):
            file.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
            with pytest.raises(CheckpointError, match=re.escape(str(file if name != MARKER_FILE else path))):
                CheckpointReader(path).verify()
        file.write_bytes(good)
    CheckpointReader(path).verify()


def test_flipped_byte_names_the_tensor_and_both_hashes(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    file = path / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    data = header_bytes(path)
    content[data + 4 * 60 + 5] ^= 1
    file.write_bytes(content)
    message = (
        rf"{file} is damaged: weight blocks.0.mlp.w_up.weight\[0:21\] at byte {data + 240} has xxh3_128 "
        r"[0-9a-f]{32}, the manifest says [0-9a-f]{32}"
    )
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(path).verify()
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(path).read("weight", "blocks.0.mlp.w_up.weight")


@pytest.mark.parametrize("name", ["rank-00000.safetensors", MANIFEST_FILE, MARKER_FILE])
def test_missing_file_is_named(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{path / name} cannot be read: No such file or directory"):
        CheckpointReader(path)


@pytest.mark.parametrize("change", [-1, 1])
def test_file_of_another_size_is_named_with_both_sizes(tmp_path: Path, change: int) -> None:
    path = save(tmp_path, 1)
    file = path / "rank-00000.safetensors"
    size = file.stat().st_size
    os.truncate(file, size + change)
    message = rf"{file} has {size + change} bytes \(\d+ B\), the manifest says {size} \(\d+ B\)"
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(path)


def test_file_cut_short_after_opening_is_an_error_of_the_read(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    reader = CheckpointReader(path)
    end = header_bytes(path) + 100
    os.truncate(path / "rank-00000.safetensors", end)
    with pytest.raises(
        CheckpointError, match=rf"rank-00000\.safetensors ends at byte {end}, and 140 more are needed"
    ):
        reader.read("weight", "embedding.weight")


def test_unknown_format_version_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / MANIFEST_FILE).read_text())
    content = json.dumps(manifest | {"format_version": 99}).encode()
    (path / MANIFEST_FILE).write_bytes(content)
    (path / MARKER_FILE).write_bytes(marker(content, MANIFEST_FILE))
    known = FORMAT_VERSION
    message = (
        f"{path} has checkpoint format_version=99, and this llmtrain reads {known}; read it with the llmtrain"
    )
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(path)


def test_damaged_newest_is_reported_and_the_next_older_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer, newest = (save(tmp_path, step) for step in (1, 2, 3))
    (newest / MARKER_FILE).unlink()
    file = newer / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with caplog.at_level(logging.ERROR):
        assert newest_checkpoint(tmp_path) == older
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == [
        "not using a damaged checkpoint"
    ] * 2
    assert "step-00000003/COMMITTED cannot be read" in caplog.text
    assert f"{file} is damaged: weight scale[0:1] at byte" in caplog.text
    assert newest_checkpoint(tmp_path, verify=False) == newer


def test_all_damaged_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    for step in (1, 2):
        os.truncate(save(tmp_path, step) / "rank-00000.safetensors", 3)
    with pytest.raises(
        CheckpointError, match=rf"every checkpoint in {tmp_path} is damaged: .*00002.*00001.*restore one"
    ):
        newest_checkpoint(tmp_path)


# --- asking for what is not there


def test_unknown_tensor_and_kind_name_the_nearest(tmp_path: Path) -> None:
    reader = CheckpointReader(save(tmp_path, 1))
    with pytest.raises(
        CheckpointError, match=r"unknown weight tensor 'final_norm.wieght'; did you mean 'final_norm.weight'"
    ):
        reader.read("weight", "final_norm.wieght")
    with pytest.raises(CheckpointError, match="unknown kind of tensor 'exp_avg'; known: weight"):
        reader.dtype("exp_avg", "scale")


@pytest.mark.parametrize(("start", "length"), [(-1, 3), (0, 61), (58, 3), (5, -1)])
def test_range_outside_a_tensor_is_refused(tmp_path: Path, start: int, length: int) -> None:
    reader = CheckpointReader(save(tmp_path, 1))
    message = (
        rf"elements {start} to {start + length} asked of weight embedding.weight, which has shape \[12, 5\]"
    )
    with pytest.raises(CheckpointError, match=message):
        reader.read_flat("weight", "embedding.weight", start, length)


def test_checkpoint_of_another_model_names_every_difference(tmp_path: Path) -> None:
    reader = CheckpointReader(save(tmp_path, 1))
    shapes = {name: value.shape for name, value in TENSORS.items()}
    reader.require(shapes, kinds=["weight"])
    message = (
        r"does not fit the model: weight embedding.weight has shape \[12, 5\], the model needs \[13, 5\]"
    )
    with pytest.raises(CheckpointError, match=message):
        reader.require(shapes | {"embedding.weight": (13, 5)}, kinds=["weight"])
    with pytest.raises(CheckpointError, match=r"weight head.weight is missing$"):
        reader.require(shapes | {"head.weight": (1,)}, kinds=["weight"])
    del shapes["scale"]
    with pytest.raises(CheckpointError, match=r"weight scale is not part of this model$"):
        reader.require(shapes, kinds=["weight"])
    with pytest.raises(CheckpointError, match=r"exp_avg embedding.weight is missing; .*; and 1 more$"):
        reader.require(shapes, kinds=["weight", "exp_avg"])


# --- pieces that do not fit together


FLAT = np.zeros(10, dtype=np.float32)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([Piece("weight", "w", (10,), 0, FLAT[:4])], "no rank holds elements 4 to 10 of weight w"),
        ([Piece("weight", "w", (10,), 2, FLAT[:8])], "no rank holds elements 0 to 2 of weight w"),
        (
            [Piece("weight", "w", (10,), 0, FLAT[:3]), Piece("weight", "w", (10,), 5, FLAT[:5])],
            "no rank holds elements 3 to 5 of weight w",
        ),
        (
            [Piece("weight", "w", (10,), 0, FLAT[:6]), Piece("weight", "w", (10,), 5, FLAT[:5])],
            "more than one piece holds element 5 of weight w; the second is of rank 0",
        ),
        (
            [Piece("weight", "w", (10,), 0, FLAT), Piece("weight", "w", (10,), 0, FLAT)],
            "this rank brings weight/w twice",
        ),
        (
            [Piece("weight", "w", (10,), 5, FLAT)],
            r"weight w is elements 5 to 15, outside its shape \[10\] of 10 elements",
        ),
        ([Piece("weight", "w", (10,), -1, FLAT)], r"weight w is elements -1 to 9, outside its shape \[10\]"),
        (
            [Piece("weight", "w", (2, 5), 0, FLAT.reshape(2, 5))],
            "weight w is a 2-D array of float32; need 1-D numbers",
        ),
        (
            [Piece("weight", "w", (1,), 0, np.array(["x"]))],
            "weight w is a 1-D array of <U1; need 1-D numbers",
        ),
        (
            [Piece("weight", "w", (10,), 0, FLAT), Piece("exp_avg", "w", (5, 2), 0, FLAT)],
            r"exp_avg w has shape \[5, 2\] and \[10\] in different pieces",
        ),
        (
            [
                Piece("weight", "w", (10,), 0, FLAT[:5]),
                Piece("weight", "w", (10,), 5, FLAT[5:].astype(np.float64)),
            ],
            "weight w has dtype <f8 and <f4 in different pieces",
        ),
    ],
)
def test_pieces_that_are_not_the_tensor_exactly_once_are_refused(
    tmp_path: Path, pieces: list[Piece], message: str
) -> None:
    save(tmp_path, 1)
    with pytest.raises(
        CheckpointError, match=rf"could not save step 2 in {tmp_path}: rank 0: .*{message}.*; the earlier "
    ):
        save_checkpoint(tmp_path, step=2, pieces=pieces, state={}, config=KEEP_1, **SOLO)
    assert list_checkpoints(tmp_path) == [1]
    assert leftovers(tmp_path) == []


def test_state_that_is_not_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"the state of the run cannot be written as JSON: .* not JSON compliant"
    ):
        save(tmp_path, 1, loss=float("nan"))
    with pytest.raises(
        CheckpointError, match="cannot be written as JSON: Object of type set is not JSON serializable"
    ):
        save(tmp_path, 1, seen={1})
    assert list(tmp_path.iterdir()) == []


# --- several ranks


def test_two_ranks_write_two_files_and_one_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2):
        Threads(2).run(
            lambda rank, arguments, step=step: save_checkpoint(
                tmp_path, step=step, pieces=halves(rank), state={"from": rank}, config=KEEP_1, **arguments
            )
        )
    assert list_checkpoints(tmp_path) == [2]
    names = ["COMMITTED", "manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"]
    assert sorted(path.name for path in (tmp_path / "step-00000002").iterdir()) == names
    reader = CheckpointReader(tmp_path / "step-00000002")
    reader.verify()
    assert reader.state == {"from": 0}
    for name, value in TENSORS.items():
        assert np.array_equal(reader.read("weight", name), value)


class FullDisk:
    """Writes of one rank fail after some bytes, as on a full disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, rank: int, after: int) -> None:
        write_all = storage.write_all

        def write_some(handle: Any, content: memoryview) -> None:
            if f"rank-{rank:05d}" in handle.name and handle.tell() + content.nbytes > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write_all(handle, content)

        monkeypatch.setattr(storage, "write_all", write_some)


@pytest.mark.parametrize("full_rank", [0, 2])
def test_disk_full_on_one_rank_fails_the_save_on_all_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_rank: int
) -> None:
    value = np.arange(3000, dtype=np.float32)

    def work(rank: int, arguments: dict[str, Any], step: int) -> Path:
        piece = cut(value, "weight", "w", [1000, 2000])[rank]
        return save_checkpoint(tmp_path, step=step, pieces=[piece], state={}, config=KEEP_1, **arguments)

    Threads(3).run(lambda rank, arguments: work(rank, arguments, 1))
    with monkeypatch.context() as patch:
        FullDisk(patch, rank=full_rank, after=500)
        outcomes = Threads(3).run(lambda rank, arguments: work(rank, arguments, 2))
    message = (
        f"could not save step 2 in {tmp_path}: rank {full_rank}: [Errno 28] No space left on device; "
        "the earlier checkpoints there are untouched"
    )
    assert [(type(outcome), str(outcome)) for outcome in outcomes] == [(CheckpointError, message)] * 3
    assert isinstance(outcomes[full_rank].__cause__, OSError)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert (
        Threads(3).run(lambda rank, arguments: work(rank, arguments, 2)) == [tmp_path / "step-00000002"] * 3
    )


def test_bug_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    def pieces(rank: int) -> Iterator[Piece]:
        yield from halves(rank)
        if rank == 1:
            raise KeyError("optimizer state")

    outcomes = Threads(2).run(
        lambda rank, arguments: save_checkpoint(
            tmp_path, step=1, pieces=pieces(rank), state={}, config=KEEP_1, **arguments
        )
    )
    assert all("rank 1: KeyError: 'optimizer state'; the earlier" in str(outcome) for outcome in outcomes)
    assert list(tmp_path.iterdir()) == []


def test_many_failing_ranks_are_counted_and_not_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(handle: object, content: memoryview) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage, "write_all", no_space)
    outcomes = Threads(6).run(
        lambda rank, arguments: save_checkpoint(
            tmp_path, step=1, pieces=whole(), state={}, config=KEEP_1, **arguments
        )
    )
    assert "rank 3: [Errno 28] No space left on device; and 2 more; the earlier" in str(outcomes[5])


def test_ranks_that_save_different_steps_are_told(tmp_path: Path) -> None:
    outcomes = Threads(2).run(
        lambda rank, arguments: save_checkpoint(
            tmp_path, step=10 + rank, pieces=halves(rank), state={}, config=KEEP_1, **arguments
        )
    )
    assert all(
        r"the ranks disagree on [step, world_size]: [10, 2]; [11, 2]" in str(each) for each in outcomes
    )
    assert list(tmp_path.iterdir()) == []


def test_run_folder_that_only_rank_0_sees_is_explained(tmp_path: Path) -> None:
    """A node-local folder: each rank's path leads to a disk of its own."""
    outcomes = Threads(2).run(
        lambda rank, arguments: save_checkpoint(
            tmp_path / str(rank), step=1, pieces=halves(rank), state={}, config=KEEP_1, **arguments
        )
    )
    for outcome in outcomes:
        assert "UNFINISHED, which rank 0 has just written, is not there on" in str(outcome)
        assert "all nodes must share the folder of the checkpoints" in str(outcome)


def test_bytes_that_change_on_their_way_to_the_disk_stop_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all = storage.write_all
    monkeypatch.setattr(
        storage, "write_all", lambda handle, content: write_all(handle, memoryview(bytes(content)[::-1]))
    )
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors is damaged: its header at byte 0"):
        save(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_real_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    if (
        shutil.which("mount") is None
        or subprocess.run(mount, capture_output=True, check=False).returncode != 0
    ):
        pytest.skip("mounting a tmpfs needs root and the right to mount")
    try:
        save(tmp_path / "run", 1)
        big = [Piece("weight", "w", (100_000,), 0, np.zeros(100_000, dtype=np.float32))]
        with pytest.raises(
            CheckpointError, match=r"could not save step 2 in .*: rank 0: \[Errno 28\] No space left"
        ):
            save_checkpoint(tmp_path / "run", step=2, pieces=big, state={}, config=KEEP_1, **SOLO)
        assert leftovers(tmp_path / "run") == []
        newest = newest_checkpoint(tmp_path / "run")
        assert newest is not None
        assert newest.name == "step-00000001"
        save(tmp_path / "run", 3)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_format_document_names_every_key_that_is_written(tmp_path: Path) -> None:
    document = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    manifest = json.loads((save(tmp_path, 1) / MANIFEST_FILE).read_text())
    tensor = manifest["tensors"]["weight"]["final_norm.weight"]
    assert f"## The format, version {manifest['format_version']}" in document
    for key in (*manifest, *tensor):
        assert f"| `{key}` |" in document
    assert f"`{{{', '.join(['file', 'offset', 'start', 'length', 'xxh3_128'])}}}`" in document
    assert set(tensor["pieces"][0]) == {"file", "offset", "start", "length", "xxh3_128"}
    assert f"`{{{', '.join(manifest['files'][0])}}}`" in document
