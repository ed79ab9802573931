"""Damage by disks and people: flipped, cut off, deleted, exchanged, copied over. It is found, and named by
file and by what is wrong there. And what must do no damage: a disk that is full at any byte of a save, a
machine that loses its power, a second run in the same folder."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from several_ranks import Threads

from llmtrain.checkpoint.config import SaveConfig
from llmtrain.checkpoint.find import list_checkpoints, newest_whole
from llmtrain.checkpoint.format import Piece
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.checkpoint.write import Ranks, save_checkpoint
from llmtrain.errors import CheckpointError

SHAPE, NUM_ELEMENTS = (6, 4), 24
KINDS = ("exp_avg", "weight")
NAMES = ("a", "b")
RANK_FILES = ("rank-00000.safetensors", "rank-00001.safetensors")
FILES = (*RANK_FILES, "manifest.json", "COMMITTED")
OLD, NEW = 100, 120


def values(step: int, kind: str, name: str) -> np.ndarray:
    """As many of every tensor, and no number twice."""
    first = 1000 * step + 100 * KINDS.index(kind) + 50 * NAMES.index(name)
    return np.arange(first, first + NUM_ELEMENTS, dtype=np.float32)


def halves(step: int, rank: int) -> Iterator[Piece]:
    start = rank * NUM_ELEMENTS // 2
    for kind in KINDS:
        for name in NAMES:
            own = values(step, kind, name)[start : start + NUM_ELEMENTS // 2]
            yield Piece(kind, name, SHAPE, start, own)


def save(folder: Path, step: int, pieces: Callable[[int, int], Iterator[Piece]] = halves) -> list[Any]:
    """By two ranks; what each returned or raised."""
    return Threads(2).run(
        lambda rank, arguments: save_checkpoint(
            folder,
            step=step,
            pieces=pieces(step, rank),
            state={"step": step},
            config=SaveConfig(keep_last=9),
            **arguments,
        )
    )


@pytest.fixture
def old_and_new(tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints of one run, whose files are of equal sizes."""
    paths = (tmp_path / f"step-{OLD:08d}", tmp_path / f"step-{NEW:08d}")
    for step, path in zip((OLD, NEW), paths, strict=True):
        assert save(tmp_path, step) == [path, path]
    sizes = {(path / name).stat().st_size for path in paths for name in RANK_FILES}
    assert len(sizes) == 1, "an exchange would be found by sizes alone"
    return paths


def parts(path: Path) -> dict[str, tuple[int, int]]:
    """Where a file has what: names as in the header, and begin and end in bytes."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    del header["__metadata__"]
    begins = {key: [end + at for at in entry["data_offsets"]] for key, entry in header.items()}
    return {"its header": (0, end), **{key.replace("/", " "): (at[0], at[1]) for key, at in begins.items()}}


def exchange(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def problems(path: Path) -> list[str]:
    """Everything that is wrong with a checkpoint that opens."""
    reader = CheckpointReader(path)
    return [problem for at in range(len(reader.files())) for problem in reader.problems_of(at)]


# --- bytes


@pytest.mark.parametrize("name", RANK_FILES)
def test_any_flipped_byte_names_its_file_and_its_tensor(old_and_new: tuple[Path, Path], name: str) -> None:
    file = old_and_new[1] / name
    good, seen = file.read_bytes(), 0
    for what, (begin, end) in parts(file).items():
        for at in range(begin, end):
            file.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
            (problem,) = problems(file.parent)
            assert problem.startswith(f"{file} is damaged: {what} at byte {begin} has xxh3_128 ")
            seen += 1
    assert seen == len(good), "every byte belongs to something"


@pytest.mark.parametrize("name", ["manifest.json", "COMMITTED"])
def test_any_flipped_bit_of_manifest_and_marker_is_found(old_and_new: tuple[Path, Path], name: str) -> None:
    file = old_and_new[1] / name
    good = file.read_bytes()
    for at in range(len(good)):
        for bit in range(8) if name == "COMMITTED" else (at % 8,):
            file.write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
            with pytest.raises(
                CheckpointError, match=rf"{re.escape(str(file.parent))}/.*is damaged$|COMMITTED is damaged: "
            ):
                CheckpointReader(file.parent)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_any_other_length_is_named(old_and_new: tuple[Path, Path], name: str) -> None:
    file = old_and_new[1] / name
    good = file.read_bytes()
    says = {
        "manifest.json": rf"{file} has sha256 [0-9a-f]{{64}}, and COMMITTED beside it says ",
        "COMMITTED": rf"{file} is damaged: it must be a sha256 and the name of a manifest, and is b",
    }
    for length in range(len(good) + 2):
        if length == len(good):
            continue
        file.write_bytes((good + b"\n")[:length])
        size = rf"{file} has {length} bytes \(.*\), the manifest says {len(good)} "
        with pytest.raises(CheckpointError, match=says.get(name, size)):
            CheckpointReader(file.parent)


# --- files


Damage = Callable[[Path, Path], None]


def swap_tensors(one: str, other: str, file: str = RANK_FILES[0]) -> Damage:
    def swap(old: Path, new: Path) -> None:
        where = parts(new / file)
        content = bytearray((new / file).read_bytes())
        (a, b), (c, d) = where[one], where[other]
        content[a:b], content[c:d] = content[c:d], content[a:b]
        (new / file).write_bytes(content)

    return swap


def swap_files(*names: str) -> Damage:
    def swap(old: Path, new: Path) -> None:
        for name in names:
            exchange(old / name, new / name)

    return swap


def copy_over(source: str, target: str) -> Damage:
    """Names with {old} and {new} for the folders."""

    def copy(old: Path, new: Path) -> None:
        from_, to = (Path(each.format(old=old, new=new)) for each in (source, target))
        if from_.is_dir():
            shutil.rmtree(to, ignore_errors=True)
            shutil.copytree(from_, to)
        else:
            shutil.copyfile(from_, to)

    return copy


DAMAGES: dict[str, tuple[Damage, int | None, list[str]]] = {
    "rank 0's file is gone": (
        lambda old, new: (new / RANK_FILES[0]).unlink(),
        OLD,
        [r"{new}/rank-00000.safetensors cannot be read: No such file or directory"],
    ),
    "rank 1's file is gone": (
        lambda old, new: (new / RANK_FILES[1]).unlink(),
        OLD,
        [r"{new}/rank-00001.safetensors cannot be read: No such file or directory"],
    ),
    "the manifest is gone": (
        lambda old, new: (new / "manifest.json").unlink(),
        OLD,
        [r"{new}/manifest.json cannot be read: No such file or directory"],
    ),
    "the marker is gone": (
        lambda old, new: (new / "COMMITTED").unlink(),
        OLD,
        [r"{new}/COMMITTED cannot be read: No such file or directory"],
    ),
    "the older one is damaged": (
        lambda old, new: (old / "manifest.json").unlink(),
        NEW,
        [],
    ),
    "two ranks' files exchanged": (
        lambda old, new: exchange(new / RANK_FILES[0], new / RANK_FILES[1]),
        OLD,
        [r"{new}/rank-00000.safetensors is damaged: its header at byte 0 has xxh3_128"],
    ),
    "one rank's file over another's": (
        copy_over("{new}/rank-00000.safetensors", "{new}/rank-00001.safetensors"),
        OLD,
        [r"{new}/rank-00001.safetensors is damaged: its header at byte 0 has xxh3_128"],
    ),
    "two tensors' bytes exchanged": (
        swap_tensors("weight a[0:12]", "weight b[0:12]"),
        OLD,
        [r"{new}/rank-00000.safetensors is damaged: weight a\[0:12\] at byte"],
    ),
    "a weight's and its moment's bytes exchanged": (
        swap_tensors("weight b[12:24]", "exp_avg b[12:24]", RANK_FILES[1]),
        OLD,
        [r"{new}/rank-00001.safetensors is damaged: exp_avg b\[12:24\] at byte"],
    ),
    "a rank's file of another step": (
        copy_over("{old}/rank-00001.safetensors", "{new}/rank-00001.safetensors"),
        OLD,
        [r"{new}/rank-00001.safetensors is damaged: exp_avg a\[12:24\] at byte"],
    ),
    "two steps' files of a rank exchanged": (
        swap_files("rank-00000.safetensors"),
        None,
        [
            r"{new}/rank-00000.safetensors is damaged: exp_avg a\[0:12\] at byte",
            r"{old}/rank-00000.safetensors is damaged: exp_avg a\[0:12\] at byte",
        ],
    ),
    "two steps' manifests exchanged": (
        swap_files("manifest.json"),
        None,
        [
            r"{new}/manifest.json has sha256 [0-9a-f]*, and COMMITTED beside it says",
            r"{old}/manifest.json has sha256 [0-9a-f]*, and COMMITTED beside it says",
        ],
    ),
    "two steps' markers exchanged": (
        swap_files("COMMITTED"),
        None,
        [
            r"{new}/manifest.json has sha256 [0-9a-f]*, and COMMITTED beside it says",
            r"{old}/manifest.json has sha256 [0-9a-f]*, and COMMITTED beside it says",
        ],
    ),
    "two steps' manifests and markers exchanged": (
        swap_files("manifest.json", "COMMITTED"),
        None,
        [rf"{{new}} is the checkpoint of step {OLD}", rf"{{old}} is the checkpoint of step {NEW}"],
    ),
    "two steps' folders exchanged": (
        exchange,
        None,
        [rf"{{new}} is the checkpoint of step {OLD}", rf"{{old}} is the checkpoint of step {NEW}"],
    ),
    "a step under a later step's name": (
        copy_over("{old}", "{new}"),
        OLD,
        [rf"{{new}} is the checkpoint of step {OLD}"],
    ),
    "a step under the name of one that is not there": (
        copy_over("{new}", "{new}9"),
        NEW,
        [rf"{{new}}9 is the checkpoint of step {NEW}"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_newest_whole_one_found(old_and_new: tuple[Path, Path], damage: str) -> None:
    old, new = old_and_new
    do, whole_step, messages = DAMAGES[damage]
    do(old, new)
    expected = [message.format(old=re.escape(str(old)), new=re.escape(str(new))) for message in messages]
    if whole_step is None:
        both = ".*; ".join(expected)
        with pytest.raises(CheckpointError, match=rf"every checkpoint in {old.parent} is damaged: {both}"):
            newest_whole(old.parent, verify=True)
        return
    whole, damaged = newest_whole(old.parent, verify=True)
    assert whole == old.parent / f"step-{whole_step:08d}"
    assert len(damaged) == len(expected)
    for found, message in zip(damaged, expected, strict=True):
        assert re.match(message, found), found


def test_exchanged_bytes_are_found_by_who_reads_them_too(old_and_new: tuple[Path, Path]) -> None:
    """Without `verify`: a tensor's own hash is compared on the way."""
    old, new = old_and_new
    swap_tensors("weight a[0:12]", "weight b[0:12]")(old, new)
    assert len(problems(new)) == 2
    reader = CheckpointReader(new)
    for name in NAMES:
        with pytest.raises(CheckpointError, match=rf"is damaged: weight {name}\[0:12\] at byte"):
            reader.read("weight", name)
        assert np.array_equal(reader.read("exp_avg", name).reshape(-1), values(NEW, "exp_avg", name))


# --- disks that are full


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every name below, with its bytes; None for folders."""
    every = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in every}


def uneven(big_rank: int) -> Callable[[int, int], Iterator[Piece]]:
    """Pieces of which one rank has nearly all."""

    def pieces(step: int, rank: int) -> Iterator[Piece]:
        border = 260 if big_rank == 0 else 40
        start, end = [(0, border), (border, 300)][rank]
        yield Piece("weight", "a", (300,), start, np.arange(start + step, end + step, dtype=np.float32))

    return pieces


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """The kernel takes so many bytes of a file, and refuses the next."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("step", [NEW, OLD], ids=["another step", "the same step again"])
@pytest.mark.parametrize("big_rank", [0, 1])
def test_a_write_that_fails_at_any_byte_leaves_all_as_it_was(
    tmp_path: Path, big_rank: int, step: int
) -> None:
    """The token, then the marker, the small file, the big one and the manifest end at a limit that rises."""
    pieces = uneven(big_rank)
    assert save(tmp_path, OLD, pieces) == [tmp_path / f"step-{OLD:08d}"] * 2
    before, told = contents(tmp_path), set()
    for limit in count(0, 13):
        with largest_file(limit):
            outcomes = save(tmp_path, step, pieces)
        if not isinstance(outcomes[0], Exception):
            break
        assert [str(outcome) for outcome in outcomes] == [str(outcomes[0])] * 2
        assert isinstance(outcomes[0], CheckpointError)
        match = re.match(
            rf"could not save step {step} in {tmp_path}: (rank [01]): \[Errno 27\] File too large",
            str(outcomes[0]),
        )
        assert match, outcomes[0]
        told.add(match[1])
        assert contents(tmp_path) == before
    assert limit > 1000, "the limit was never at work"
    assert told == {"rank 0", f"rank {big_rank}"}
    CheckpointReader(outcomes[0]).verify()
    assert list_checkpoints(tmp_path) == sorted({OLD, step})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root and the right to mount")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("what", ["size", "nr_inodes"])
def test_a_disk_that_is_full_at_any_point_of_a_save_leaves_all_as_it_was(small_disk: Path, what: str) -> None:
    """The room left grows by a block, or by a name, until a save fits."""

    def resize(option: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{option}", str(small_disk)], check=True)

    def pieces(step: int, rank: int) -> Iterator[Piece]:
        for at in range(5):
            yield Piece("weight", f"{rank}.{at}", (1500,), 0, np.full(1500, step, np.float32))

    folder = small_disk / "checkpoints"
    save(folder, OLD, pieces)
    before, told = contents(folder), set()
    for room in range(100):
        disk = os.statvfs(small_disk)
        if what == "size":
            resize(f"size={(disk.f_blocks - disk.f_bfree + room) * disk.f_frsize}")
        else:
            resize(f"nr_inodes={disk.f_files - disk.f_ffree + room}")
        outcomes = save(folder, NEW, pieces)
        if not isinstance(outcomes[0], Exception):
            break
        assert [str(outcome) for outcome in outcomes] == [str(outcomes[0])] * 2
        assert f"could not save step {NEW} in {folder}: rank" in str(outcomes[0])
        told |= set(re.findall(r"(rank [01]): \[Errno 28\] No space left on device", str(outcomes[0])))
        assert contents(folder) == before
    CheckpointReader(outcomes[0]).verify()
    assert list_checkpoints(folder) == [OLD, NEW]
    assert room > (10 if what == "size" else 3)
    assert told == {"rank 0", "rank 1"}


# --- a machine that loses its power


def test_a_checkpoint_is_durable_with_its_name_before_an_older_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file's bytes are on the disk once it was flushed, and a name once the folder was that it is in."""
    folder = tmp_path / "run" / "checkpoints"
    old, new = folder / f"step-{OLD:08d}", folder / f"step-{NEW:08d}"
    flushed_bytes: dict[int, int] = {}
    flushed_names: dict[Path, set[str]] = {}
    not_durable: list[list[str]] = []
    fsync = os.fsync

    def watched(fd: int) -> None:
        fsync(fd)
        path, status = Path(os.readlink(f"/proc/self/fd/{fd}")), os.fstat(fd)
        if path == old and list_checkpoints(folder) == [NEW]:  # from here on the older one is gone for good
            names = [folder, new, *new.iterdir()]
            not_durable.append([str(at) for at in names if at.name not in flushed_names.get(at.parent, ())])
            files = [(at, at.stat()) for at in new.iterdir()]
            not_durable.append([str(at) for at, of in files if flushed_bytes.get(of.st_ino) != of.st_size])
        if path.is_dir():
            flushed_names[path] = set(os.listdir(path))
        else:
            flushed_bytes[status.st_ino] = status.st_size

    monkeypatch.setattr(os, "fsync", watched)
    for step in (OLD, NEW):
        save_checkpoint(
            folder,
            step=step,
            pieces=[*halves(step, 0), *halves(step, 1)],
            state={},
            ranks=Ranks(0, 1, lambda value: [value]),
            config=SaveConfig(keep_last=1),
        )
    assert not_durable, "the older checkpoint was not seen to go"
    assert not_durable[:2] == [[], []]


# --- a second run


@pytest.mark.parametrize(
    ("when", "step", "message"),
    [
        (1, NEW, "UNFINISHED, which rank 0 has just written, is not there on"),
        (1, NEW + 1, "UNFINISHED, which rank 0 has just written, is not there on"),
        (2, NEW, "another run saves in"),
        (2, NEW + 1, "another run saves in|rank-00000.safetensors cannot be read: No such file"),
    ],
)
def test_a_run_that_saves_where_another_does_is_stopped_and_damages_nothing(
    tmp_path: Path, when: int, step: int, message: str
) -> None:
    """As when two machines have one folder and no lock: in the middle of the first run's save of NEW the
    second saves `step`, before the first one's ranks write (1) or before it commits (2)."""
    gathers = count(1)

    def save_alone(number: int, between: Callable[[], object] = lambda: None) -> Path:
        def gather(value: object) -> list[object]:
            between()
            return [value]

        return save_checkpoint(
            tmp_path,
            step=number,
            pieces=[*halves(number, 0), *halves(number, 1)],
            state={},
            ranks=Ranks(0, 1, gather),
            config=SaveConfig(keep_last=9),
        )

    def second_run() -> None:
        if next(gathers) == when:
            save_alone(step)

    save_alone(OLD)
    with pytest.raises(CheckpointError, match=rf"could not save step {NEW} in .*: rank 0: .*({message})"):
        save_alone(NEW, second_run)
    assert list_checkpoints(tmp_path) == [OLD, step]
    assert newest_whole(tmp_path, verify=True) == (tmp_path / f"step-{step:08d}", [])
    CheckpointReader(tmp_path / f"step-{OLD:08d}").verify()
    assert save_alone(NEW + 2) == tmp_path / f"step-{NEW + 2:08d}"
