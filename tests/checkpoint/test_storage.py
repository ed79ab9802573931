"""Checkpoints behind URLs, on stores that fail at random, and on any store cut off at each of its changes."""

from __future__ import annotations

import logging
import random
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from several_ranks import TENSORS, Threads, halves, whole

from llmtrain.checkpoint import storage
from llmtrain.checkpoint.config import SaveConfig
from llmtrain.checkpoint.find import list_checkpoints, newest_checkpoint, newest_whole
from llmtrain.checkpoint.format import MARKER_FILE, UNFINISHED_FILE
from llmtrain.checkpoint.inspect import inspect_checkpoint
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.checkpoint.saver import Saver
from llmtrain.checkpoint.storage import Place, Url, place_of
from llmtrain.checkpoint.write import ALONE, save_checkpoint
from llmtrain.errors import CheckpointError


class FlakyFileSystem(LocalFileSystem):
    """A local folder behind a network that loses requests, answers and connections."""

    protocol = "flaky"
    cachable = False
    luck = random.Random(0)
    share_that_fails = 0.0
    num_failures = 0

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return LocalFileSystem._strip_protocol(str(path).removeprefix("flaky://"))

    @classmethod
    def fall(cls, what: str) -> None:
        if cls.luck.random() < cls.share_that_fails:
            cls.num_failures += 1
            raise ConnectionResetError(f"planted: {what}")

    def _once(self, what: str, *args: Any, **kwargs: Any) -> Any:
        self.fall(f"{what} was not sent")
        result = getattr(super(), what)(*args, **kwargs)
        self.fall(f"{what} was not answered")
        return result

    def ls(self, *args: Any, **kwargs: Any) -> Any:
        return self._once("ls", *args, **kwargs)

    def info(self, *args: Any, **kwargs: Any) -> Any:
        return self._once("info", *args, **kwargs)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> Any:
        self.fall("cat_file was not sent")
        content = Path(path).read_bytes()[start:end]
        self.fall("cat_file was not answered")
        return content

    def rm_file(self, *args: Any, **kwargs: Any) -> Any:
        return self._once("rm_file", *args, **kwargs)

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        self.fall("open was not sent")
        return FlakyFile(super().open(path, mode, **kwargs))


class FlakyFile:
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __enter__(self) -> FlakyFile:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._inner.close()
        if kind is None:
            FlakyFileSystem.fall("close was not answered")

    def write(self, content: Any) -> None:
        self._inner.write(content[: len(content) // 2])
        FlakyFileSystem.fall("the connection broke in the middle")
        self._inner.write(content[len(content) // 2 :])


fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> type[FlakyFileSystem]:
    monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(FlakyFileSystem, "luck", random.Random(5))
    monkeypatch.setattr(FlakyFileSystem, "share_that_fails", 0.0)
    monkeypatch.setattr(FlakyFileSystem, "num_failures", 0)
    return FlakyFileSystem


@pytest.fixture(params=["folder", "memory", "flaky"])
def place(request: pytest.FixtureRequest, tmp_path: Path, flaky: Any) -> Place:
    if request.param == "folder":
        return tmp_path / "checkpoints"
    where = f"/{uuid.uuid4().hex}/run" if request.param == "memory" else str(tmp_path / "checkpoints")
    return place_of(f"{request.param}://{where}")


def save(place: Place, step: int, *, keep: int = 100, plus: float = 0.0, **state: Any) -> Place:
    return save_checkpoint(
        place, step=step, pieces=whole(plus=plus), state=state, ranks=ALONE, config=SaveConfig(keep_last=keep)
    )


def check(path: Place, *, plus: float) -> None:
    reader = CheckpointReader(path)
    reader.verify()
    for name, value in TENSORS.items():
        assert np.array_equal(reader.read("weight", name), value + value.dtype.type(plus))


def test_places_are_folders_or_urls() -> None:
    assert place_of("runs/mine") == Path("runs/mine")
    assert place_of("file:///runs/mine") == Path("/runs/mine")
    there = place_of("s3://bucket/run/")
    assert there == Url("s3://bucket/run/")
    assert (there / "step-00000001").name == "step-00000001"
    assert str((there / "step-00000001").parent) == "s3://bucket/run"


def test_save_find_read_replace_and_retire(place: Place) -> None:
    assert (list_checkpoints(place), newest_checkpoint(place)) == ([], None)
    for step in (1, 2, 3):
        save(place, step, keep=2, plus=step, position=step)
    assert list_checkpoints(place) == [2, 3]
    save(place, 3, keep=2, plus=9)
    newest = newest_checkpoint(place)
    assert newest == place / "step-00000003"
    check(newest, plus=9)
    check(place / "step-00000002", plus=2)
    names = ["COMMITTED", "manifest.1.json", "rank-00000.1.safetensors"]
    assert storage.names(newest) == names
    assert storage.names(place) == ["step-00000002", "step-00000003"]
    found = inspect_checkpoint(place, verify=True)
    assert (found.path, found.steps, found.problems) == (str(newest), [2, 3], [])
    reader = CheckpointReader(newest)
    part = reader.read_flat("weight", "embedding.weight", 7, 20)
    assert np.array_equal(part, TENSORS["embedding.weight"].reshape(-1)[7:27] + 9)


def test_several_ranks_save_in_the_background(place: Place) -> None:
    def work(rank: int, arguments: dict[str, Any]) -> None:
        saver = Saver(place, arguments["ranks"], SaveConfig(keep_last=1))
        for step in (1, 2):
            saver.save(step, halves(rank), {})
        saver.finish()

    assert Threads(2).run(work) == [None, None]
    assert list_checkpoints(place) == [2]
    check(place / "step-00000002", plus=0)


def test_a_store_that_fails_at_random_loses_nothing(
    tmp_path: Path, flaky: type[FlakyFileSystem], caplog: pytest.LogCaptureFixture
) -> None:
    place = place_of(f"flaky://{tmp_path}/run")
    flaky.share_that_fails = 0.05
    for step in range(1, 25):
        save(place, step, keep=2, plus=step)
        newest = newest_checkpoint(place)
        assert newest is not None
        assert newest.name == f"step-{step:08d}"
        check(newest, plus=step)
    flaky.share_that_fails = 0.0
    assert list_checkpoints(place) == [23, 24]
    assert storage.names(place) == ["step-00000023", "step-00000024"]
    assert flaky.num_failures > 50
    tries = [record for record in caplog.records if "try" in record.getMessage()]
    assert len(tries) == flaky.num_failures, "each failure is told"
    assert all(record.levelno == logging.WARNING for record in tries)


def test_a_store_that_is_gone_is_an_error_that_names_it(tmp_path: Path, flaky: type[FlakyFileSystem]) -> None:
    place = place_of(f"flaky://{tmp_path}/run")
    save(place, 1)
    flaky.share_that_fails = 1.0
    with pytest.raises(
        CheckpointError,
        match=rf"listing {place} failed 6 times, last with ConnectionResetError: planted: ls was not sent",
    ):
        list_checkpoints(place)
    with pytest.raises(
        CheckpointError, match=r"could not save step 2 in flaky://.*: rank 0: .* failed 6 times"
    ):
        save(place, 2)
    flaky.share_that_fails = 0.0
    assert list_checkpoints(place) == [1]
    save(place, 3)
    assert list_checkpoints(place) == [1, 3]


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "manifest.json", MARKER_FILE])
def test_a_missing_object_is_named(tmp_path: Path, name: str, flaky: Any) -> None:
    path = save(place_of(f"flaky://{tmp_path}/run"), 1)
    (tmp_path / "run" / "step-00000001" / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{path / name} cannot be read: No such file or directory"):
        CheckpointReader(path)


def test_a_package_or_protocol_that_is_missing_is_named() -> None:
    with pytest.raises(
        CheckpointError, match="nowhere://x cannot be opened: Protocol not known: nowhere; known"
    ):
        list_checkpoints(place_of("nowhere://x"))


class CutOff(BaseException):
    """The process is gone: nothing of it goes on, not even its tidying."""


def cut_off_after(number: int, patch: pytest.MonkeyPatch) -> None:
    """Of the changes of a store, the first `number` happen; half of a file counts."""
    done = 0

    def limited(change: Callable[..., Any], *, half: bool) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            nonlocal done
            done += 1
            if done <= number:
                return change(*arguments)
            if half and done == number + 1:
                place, chunks = arguments
                content = b"".join(bytes(chunk) for chunk in chunks())
                change(place, lambda: [memoryview(content[: len(content) // 2])])
            raise CutOff

        return run

    for name in ("write", "put", "replace", "delete", "delete_folder"):
        patch.setattr(storage, name, limited(getattr(storage, name), half=name == "write"))


def changes(place: Place) -> Iterator[Callable[[], None]]:
    """Saves that replace, retire and tidy."""
    yield lambda: check(save(place, 1, keep=1, plus=1), plus=1)
    yield lambda: check(save(place, 2, keep=1, plus=2), plus=2)
    yield lambda: check(save(place, 2, keep=1, plus=3), plus=3)
    yield lambda: check(save(place, 5, keep=1, plus=5), plus=5)


def test_cut_off_at_any_change_the_newest_committed_one_loads(place: Place) -> None:
    num_cuts = 0
    for number in range(60):
        folder = place / str(number)
        done, before = 0, (None, 0.0)
        all_of_it = True
        with pytest.MonkeyPatch.context() as patch:
            cut_off_after(number, patch)
            try:
                for change in changes(folder):
                    change()
                    done += 1
            except CutOff:
                all_of_it = False
                num_cuts += 1
        before = [(None, 0.0), (1, 1.0), (2, 2.0), (2, 3.0), (5, 5.0)]
        newest, damaged = newest_whole(folder, verify=True)
        assert damaged == []
        allowed = before[done : done + 2]  # the commit may have been the last that happened
        if newest is None:
            assert None in [step for step, _ in allowed]
        else:
            reader = CheckpointReader(newest)
            plus = reader.read("weight", "final_norm.weight")[0] - 1
            assert (reader.step, plus) in allowed
        save(folder, 6, keep=1, plus=6)  # nothing left behind is in its way, and nothing stays
        assert storage.names(folder) == ["step-00000006"]
        assert UNFINISHED_FILE not in storage.names(folder / "step-00000006")
        if all_of_it:
            break
    else:
        pytest.fail("60 changes were not all")
    assert num_cuts > 20


def test_an_error_without_words_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, keep=1)
    put = storage.put

    def refuse(place: Place, content: bytes) -> None:
        if place.name == MARKER_FILE:
            raise PermissionError
        put(place, content)

    monkeypatch.setattr(storage, "put", refuse)
    with pytest.raises(CheckpointError, match=r"could not save step 2 in .*: rank 0: PermissionError: "):
        save(tmp_path, 2, keep=1)
    assert list_checkpoints(tmp_path) == [1]
    check(tmp_path / "step-00000001", plus=0)


def test_a_runs_checkpoints_are_where_its_config_says(tmp_path: Path) -> None:
    save(tmp_path / "run" / "checkpoints", 1)  # of before it was told another place
    save(tmp_path / "elsewhere", 2)
    (tmp_path / "run" / "config.yaml").write_text(f"save:\n  folder: {tmp_path / 'elsewhere'}\n")
    assert inspect_checkpoint(tmp_path / "run", verify=True).step == 2
    (tmp_path / "run" / "config.yaml").write_text("save:\n  folder: null\n")
    assert inspect_checkpoint(tmp_path / "run", verify=True).step == 1
