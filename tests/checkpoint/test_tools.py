"""`llmtrain checkpoint reshard`, `merge`, `average` and `diff`."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open

from llmtrain import files
from llmtrain.bench._reshard_peak import measure
from llmtrain.checkpoint import rewrite, storage
from llmtrain.checkpoint.config import SaveConfig
from llmtrain.checkpoint.diff import compare
from llmtrain.checkpoint.format import Piece
from llmtrain.checkpoint.inspect import find
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.checkpoint.rewrite import Tensor, average, merge, newest_of, reshard, spread
from llmtrain.checkpoint.storage import place_of
from llmtrain.checkpoint.write import write_checkpoint
from llmtrain.cli.checkpoint_average import AverageConfig
from llmtrain.cli.checkpoint_diff import DiffConfig, show
from llmtrain.data.trace import OutputFormat
from llmtrain.errors import CheckpointError, ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
SHAPES = {"embedding.weight": (40, 7), "norm.weight": (7,), "blocks.0.wq": (7, 9), "nothing": (0, 3)}
KINDS = ("weight", "exp_avg", "exp_avg_sq")
STATE = {
    "tokens": 4096,
    "num_optimizer_steps": 5,
    "eval_loss": 2.5,
    "check_loss": [1.0, 2, 8],
    "model": {"num_layers": 1, "d_model": 7},
    "tokenizer_fingerprint": "abc",
    "config": {"optimizer": {"peak_lr": 0.1}, "data": {"sources": {}}},
}

Values = dict[tuple[str, str], NDArray[Any]]


def numbers(seed: int = 0, kinds: tuple[str, ...] = KINDS) -> Values:
    random = np.random.default_rng(seed)
    return {
        (kind, name): random.standard_normal(shape).astype(np.float32)
        for kind in kinds
        for name, shape in SHAPES.items()
    }


def saved(folder: Path, values: Values, *, step: int = 5, num_files: int = 3, **state: Any) -> Path:
    """A checkpoint in `num_files` files, each tensor cut in all of them."""
    held = []
    for at in range(num_files):
        pieces = []
        for (kind, name), value in values.items():
            flat = value.reshape(-1)
            first, last = flat.size * at // num_files, flat.size * (at + 1) // num_files
            pieces.append(Piece(kind, name, value.shape, first, flat[first:last]))
        held.append(pieces)
    config = SaveConfig(keep_last=9)
    return write_checkpoint(folder, step=step, files=held, state=STATE | state, config=config)


def contents(path: Path) -> Values:
    reader = CheckpointReader(find(path))
    reader.verify()
    return {(kind, name): reader.read(kind, name) for kind in reader.kinds for name in reader.shapes(kind)}


def assert_equal(found: Values, expected: Values) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert found[key].shape == value.shape, key
        assert found[key].tobytes() == value.tobytes(), key


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return saved(tmp_path / "source", numbers())


# -- reshard


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 40), st.sampled_from(["<f4", "<f8", "|b1"])), max_size=6),
    num_files=st.integers(1, 9),
)
def test_every_element_is_in_one_file_and_the_files_are_even(
    sizes: list[tuple[int, str]], num_files: int
) -> None:
    tensors = [Tensor("weight", str(at), (size,), np.dtype(dtype)) for at, (size, dtype) in enumerate(sizes)]
    if num_files > max(1, sum(tensor.num_elements for tensor in tensors)):
        with pytest.raises(ConfigError, match=f"num_files={num_files} must be at least 1, and at most"):
            spread(tensors, num_files)
        return
    plan = spread(tensors, num_files)
    assert len(plan) == num_files
    cuts = [cut for file in plan for cut in file]
    for tensor in tensors:
        own = [(start, length) for each, start, length in cuts if each is tensor]
        assert [start for start, _ in own] == [0, *np.cumsum([length for _, length in own])][:-1]
        assert sum(length for _, length in own) == tensor.num_elements
        assert all(length for _, length in own) or own == [(0, 0)]
    held = [sum(length * tensor.dtype.itemsize for tensor, _, length in file) for file in plan]
    assert max(held) - min(held) < 2 * 8, "each border moves by less than an element"


@pytest.mark.parametrize("num_files", [1, 2, 7])
def test_a_resharded_checkpoint_is_equal_bit_by_bit_and_says_what_it_was_made_of(
    source: Path, tmp_path: Path, num_files: int
) -> None:
    made = reshard(source, tmp_path / "out", num_files=num_files)
    reader = CheckpointReader(Path(made.path))
    assert_equal(contents(Path(made.path)), numbers())
    assert (made.step, reader.step, len(reader.files())) == (5, 5, num_files)
    before = CheckpointReader(source)
    note = {"checkpoint": str(source), "step": 5, "manifest_sha256": before.manifest_hash}
    made_by = {"command": "checkpoint reshard", "sources": [note]}
    assert reader.state == STATE | {"made_by": made_by}
    found = [num_bytes for _, num_bytes, _ in reader.files()]
    assert max(found) - min(found) < 700, "headers differ, contents by an element"
    again = reshard(Path(made.path), tmp_path / "again", num_files=3)
    assert CheckpointReader(Path(again.path)).state["made_by"]["before"] == made_by
    assert_equal(contents(Path(again.path)), numbers())


def test_numbers_of_every_type_come_through(tmp_path: Path) -> None:
    values: Values = {
        ("weight", dtype): np.arange(11).astype(dtype) for dtype in ("<f2", "<f8", "<i8", "|u1", "|b1")
    }
    path = saved(tmp_path / "source", values)
    assert_equal(contents(Path(reshard(path, tmp_path / "out", num_files=4).path)), values)


def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    ratio = measure(tmp_path, num_tensors=8, tensor_bytes=16 << 20)
    assert ratio < 1.5, "1, and what allocators keep"


def test_a_url_is_read_and_written(source: Path) -> None:
    made = reshard(source, place_of("memory://tools/out"), num_files=2)
    assert made.path == "memory://tools/out/step-00000005"
    found = compare(place_of("memory://tools/out"), source, state=True)
    assert not found.differs


# -- merge


def test_any_reader_of_safetensors_finds_whole_weights(source: Path, tmp_path: Path) -> None:
    made = merge(source, tmp_path / "out", kinds="weight")
    (file,) = Path(made.path).glob("*.safetensors")
    with safe_open(file, "numpy") as opened:
        assert set(opened.keys()) == {f"weight/{name}" for name in SHAPES}
        for name in SHAPES:
            assert np.array_equal(opened.get_tensor(f"weight/{name}"), numbers()["weight", name])
    assert CheckpointReader(Path(made.path)).kinds == ["weight"]


def test_everything_or_one_kind_can_be_merged(source: Path, tmp_path: Path) -> None:
    assert_equal(contents(Path(merge(source, tmp_path / "all", kinds="all").path)), numbers())
    assert merge(source, tmp_path / "one", kinds="exp_avg").kinds == ["exp_avg"]
    with pytest.raises(
        ConfigError, match=r"unknown kinds 'weights'; did you mean 'weight'\? Known: all, exp"
    ):
        merge(source, tmp_path / "none", kinds="weights")


# -- average


def test_an_average_is_the_mean_in_float64_rounded_once(tmp_path: Path) -> None:
    paths = [saved(tmp_path / str(seed), numbers(seed), step=seed, tokens=seed) for seed in (1, 3, 2)]
    made = average(paths, tmp_path / "out", weights=None)
    found = contents(Path(made.path))
    assert set(found) == {("weight", name) for name in SHAPES}
    for name in SHAPES:
        parts = [numbers(seed)["weight", name].astype(np.float64) for seed in (1, 3, 2)]
        assert np.array_equal(found["weight", name], (sum(parts) / 3).astype(np.float32))
    state = CheckpointReader(Path(made.path)).state
    assert (made.step, state["tokens"]) == (3, 3), "of the newest"
    assert state["eval_loss"] is None
    assert state["check_loss"] is None
    assert [each["weight"] for each in state["made_by"]["sources"]] == [1.0, 1.0, 1.0]


def test_weights_are_proportions(tmp_path: Path) -> None:
    paths = [saved(tmp_path / str(seed), numbers(seed)) for seed in (1, 2)]
    made = average(paths, tmp_path / "out", weights=[3, 1])
    found = contents(Path(made.path))["weight", "blocks.0.wq"]
    parts = [numbers(seed)["weight", "blocks.0.wq"].astype(np.float64) for seed in (1, 2)]
    assert np.array_equal(found, ((3 * parts[0] + parts[1]) / 4).astype(np.float32))


def test_the_mean_of_equal_numbers_is_those_numbers(tmp_path: Path) -> None:
    paths = [saved(tmp_path / str(at), numbers(), step=at) for at in (1, 2, 3)]
    made = average(paths, tmp_path / "out", weights=None)
    assert_equal(contents(Path(made.path)), numbers(kinds=("weight",)))


def test_the_newest_checkpoints_of_a_run_are_taken_in_their_order(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        saved(tmp_path / "run" / "checkpoints", numbers(step), step=step)
    assert [path.name for path in newest_of(tmp_path / "run", 2)] == ["step-00000004", "step-00000006"]
    with pytest.raises(CheckpointError, match=r"last=4, and .* holds steps 2, 4, 6; a mean takes at least 2"):
        newest_of(tmp_path / "run", 4)
    with pytest.raises(CheckpointError, match=r"last=2, and .* holds no checkpoint"):
        newest_of(tmp_path / "nowhere", 2)


def with_tensor(name: str, value: NDArray[Any]) -> Values:
    return numbers(2, kinds=("weight",)) | {("weight", name): value}


@pytest.mark.parametrize(
    ("values", "state", "message"),
    [
        (with_tensor("norm.weight", np.zeros(8, np.float32)), {}, r"norm.weight has shape \[7\] and \[8\]"),
        (with_tensor("norm.weight", np.zeros(7)), {}, "norm.weight is of type float32 and float64"),
        (with_tensor("extra", np.zeros(7, np.float32)), {}, "only the second has extra"),
        (numbers(2), {"model": {"num_layers": 2, "d_model": 7}}, r"model.num_layers is 1 and 2"),
        (numbers(2), {"tokenizer_fingerprint": "def"}, "tokenizer_fingerprint is abc and def"),
        (
            with_tensor("norm.weight", np.array([1, 1, np.nan, 1, 1, 1, 1], np.float32)),
            {},
            "the mean of weight norm.weight is nan at element 2; leave out the checkpoint",
        ),
    ],
)
def test_what_has_no_mean_is_named(
    source: Path, tmp_path: Path, values: Values, state: dict[str, Any], message: str
) -> None:
    other = saved(tmp_path / "other", values, step=4, **state)
    with pytest.raises(CheckpointError, match=message):
        average([source, other], tmp_path / "out", weights=None)
    assert not storage.names(tmp_path / "out")


def test_only_the_first_has_a_tensor(source: Path, tmp_path: Path) -> None:
    values = numbers()
    del values["weight", "norm.weight"]
    other = saved(tmp_path / "other", values, step=4)
    with pytest.raises(CheckpointError, match=r"are not of one model: only the first has norm.weight"):
        average([source, other], tmp_path / "out", weights=None)


def test_a_mean_of_one_or_of_one_twice_or_with_wrong_weights_is_refused(source: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", saved(tmp_path / "other", numbers(2))
    with pytest.raises(ConfigError, match="a mean of 1 checkpoint is none; name at least two"):
        average([source], out, weights=None)
    with pytest.raises(ConfigError, match="are the same checkpoint; to let one count more, set weights"):
        average([source, source.parent], out, weights=None)
    with pytest.raises(ConfigError, match="weights has 3 numbers for 2 checkpoints; give one for each"):
        average([source, other], out, weights=[1, 1, 1])
    for wrong in ([0, 0], [-1, 2], [float("nan"), 1]):
        with pytest.raises(ConfigError, match="must not be negative, nor all of them 0"):
            average([source, other], out, weights=wrong)
    moments = [saved(tmp_path / str(seed), numbers(seed, kinds=("exp_avg",))) for seed in (1, 2)]
    with pytest.raises(CheckpointError, match="has no weights, only exp_avg; a mean is of weights"):
        average(moments, out, weights=None)
    with pytest.raises(ConfigError, match="name checkpoints as paths="):
        AverageConfig(out="out")
    with pytest.raises(ConfigError, match="name checkpoints as paths="):
        AverageConfig(out="out", paths=["a", "b"], path="run", last=2)
    with pytest.raises(ConfigError, match="path=run and last=None go together, as in path=RUN last=3"):
        AverageConfig(out="out", path="run")


# -- diff


def test_a_checkpoint_does_not_differ_from_itself_in_other_files(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reshard(source, tmp_path / "out", num_files=5)
    show(DiffConfig(a=str(source), b=str(tmp_path / "out")))
    told = capsys.readouterr().out
    assert "12 tensors, 1,050 elements: equal bit by bit; 0 entries of the state differ" in told


def test_every_difference_is_told_and_the_exit_status_is_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = numbers() | {("weight", "odd"): np.zeros((2, 3), np.float32)}
    source = saved(tmp_path / "source", values)
    values = numbers() | {("weight", "odd"): np.zeros((3, 2), np.float32)}
    values["weight", "embedding.weight"][3, 2] += 0.5
    values["exp_avg", "norm.weight"] *= 1.1
    values["weight", "blocks.0.wq"] = values["weight", "blocks.0.wq"].astype(np.float64)
    del values["exp_avg_sq", "norm.weight"]
    values["momentum", "norm.weight"] = np.zeros(7, np.float32)
    saved(tmp_path / "other", values, step=6, config={"optimizer": {"peak_lr": 0.2}}, more=None)
    arguments = {"a": str(source), "b": str(tmp_path / "other")}
    with pytest.raises(SystemExit) as left:
        show(DiffConfig(**arguments))
    assert left.value.code == 1
    told = capsys.readouterr().out
    for line in (
        "step 5\n",
        "step 6\n",
        "  config.optimizer.peak_lr: 0.1 -> 0.2\n",
        "  only in a: exp_avg_sq norm.weight\n",
        "  only in b: 1 tensors of momentum\n",
        "  weight odd has shape [2, 3] -> [3, 2]\n",
        "  weight blocks.0.wq is of type float32 -> float64\n",
        "2 of 11 tensors have other numbers; 1 entries of the state differ",
    ):
        assert line in told
    with pytest.raises(SystemExit):
        show(DiffConfig(**arguments, format=OutputFormat.json))
    found = json.loads(capsys.readouterr().out)
    worst, second = found["tensors"]
    assert (worst["kind"], worst["name"], worst["num_unequal"]) == ("exp_avg", "norm.weight", 7)
    assert worst["relative_l2"] == pytest.approx(0.1, rel=1e-5)  # fp32 rounds the product
    weight = numbers()["weight", "embedding.weight"].astype(np.float64)
    assert (second["num_unequal"], second["num_elements"]) == (1, 280)
    assert second["max_abs"] == pytest.approx(0.5, rel=1e-6)  # fp32 rounds the sum
    assert second["relative_l2"] == pytest.approx(0.5 / np.linalg.norm(weight), rel=1e-6)
    assert found["differs"] is True
    with pytest.raises(SystemExit):
        show(DiffConfig(**arguments, worst=1, state=False))
    assert "the state was not compared" in (told := capsys.readouterr().out)
    assert "and 1 more" in told
    with pytest.raises(ConfigError, match="worst=0 must be at least 1"):
        DiffConfig(**arguments, worst=0)


def test_bits_are_compared_and_what_is_not_a_number_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one: Values = {("weight", name): np.array([1, np.nan, np.inf, 0], np.float32) for name in "abcde"}
    other = {key: value.copy() for key, value in one.items()}
    other["weight", "b"][3] = -0.0
    other["weight", "c"][0] = np.nan
    other["weight", "d"][2] = -np.inf
    one["weight", "e"][:] = 0
    other["weight", "e"][:] = [0, 0, 0, 2]
    a, b = saved(tmp_path / "a", one), saved(tmp_path / "b", other)
    found = {each.name: each for each in compare(a, b, state=True).tensors}
    assert set(found) == {"b", "c", "d", "e"}, "the same bits are equal, numbers or not"
    assert (found["b"].num_unequal, found["b"].max_abs, found["b"].relative_l2) == (1, 0.0, 0.0)
    assert np.isnan(found["c"].max_abs)
    assert found["d"].max_abs == np.inf
    assert (found["e"].max_abs, found["e"].relative_l2) == (2.0, np.inf)
    with pytest.raises(SystemExit):
        show(DiffConfig(a=str(a), b=str(b), format=OutputFormat.json))
    assert '"max_abs": null' in capsys.readouterr().out


# -- what goes wrong


def test_a_folder_that_something_lies_in_is_no_place_for_a_checkpoint(source: Path, tmp_path: Path) -> None:
    before = contents(source)
    for out in (source.parent, source.parent.parent):
        with pytest.raises(ConfigError, match=r"out=.* holds s.*; name a folder that is empty or not there"):
            reshard(source, out, num_files=2)
    for out in (source, source / "inside", tmp_path / "step-00000001"):
        with pytest.raises(ConfigError, match="is in or is the folder of one step"):
            merge(source, out, kinds="weight")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"out=.*file is a file; name a folder that is not there yet"):
        reshard(source, tmp_path / "file", num_files=2)
    assert_equal(contents(source), before)


@pytest.mark.parametrize("command", ["reshard", "merge", "average", "diff"])
def test_a_damaged_source_is_found_whatever_is_done_with_it(
    source: Path, tmp_path: Path, command: str
) -> None:
    other = saved(tmp_path / "other", numbers(2))
    path = source / "rank-00001.safetensors"
    content = bytearray(path.read_bytes())
    header_bytes = 8 + int.from_bytes(content[:8], "little")
    content[header_bytes + 40] ^= 1  # of the first tensor, a weight
    path.write_bytes(content)
    out = tmp_path / "out"
    work = {
        "reshard": lambda: reshard(source, out, num_files=7),
        "merge": lambda: merge(source, out, kinds="weight"),
        "average": lambda: average([other, source], out, weights=None),
        "diff": lambda: compare(other, source, state=True),
    }[command]
    with pytest.raises(CheckpointError, match=r"rank-00001.safetensors is damaged: weight embedding.weight"):
        work()
    assert not storage.names(out)


def test_a_full_disk_is_told_before_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(files, "free_bytes", lambda _: 100)
        with pytest.raises(
            CheckpointError, match=r"out=.* needs 4.1 KiB, and 100 B are free there; make room"
        ):
            reshard(source, out, num_files=2)
    count = 0
    write_all = storage.write_all

    def full(handle: Any, content: memoryview) -> None:
        nonlocal count
        count += 1
        if count > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_all(handle, content)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_all", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            reshard(source, out, num_files=2)
    assert not storage.names(out)
    assert_equal(contents(Path(reshard(source, out, num_files=2).path)), numbers())


KILLED = """
import os, signal, sys
from pathlib import Path
from llmtrain.checkpoint import rewrite, storage
left = int(sys.argv[3])
def dies(old):
    def call(*arguments, **settings):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return old(*arguments, **settings)
    return call
for name in ("write_all", "put", "flush"):
    setattr(storage, name, dies(getattr(storage, name)))
rewrite.reshard(Path(sys.argv[1]), Path(sys.argv[2]), num_files=3)
"""


def test_a_command_that_is_killed_leaves_none_or_all_and_does_not_block_the_next(
    source: Path, tmp_path: Path
) -> None:
    """At the first file, between files, before the manifest, before the marker, and after it."""
    ended = set()
    for calls in (0, 2, 12, 18, 20, 21, 99):
        out = tmp_path / str(calls)
        arguments = [sys.executable, "-c", KILLED, str(source), str(out), str(calls)]
        done = subprocess.run(arguments, check=False, capture_output=True, text=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        ended.add(done.returncode)
        there = storage.names(out)
        if there and "COMMITTED" in storage.names(out / there[0]):
            assert_equal(contents(out), numbers())
            with pytest.raises(ConfigError, match="name a folder that is empty"):
                reshard(source, out, num_files=2)
        else:
            assert_equal(contents(Path(reshard(source, out, num_files=2).path)), numbers())
    assert ended == {0, -signal.SIGKILL}


def test_two_threads_never_share_the_memory_of_a_tensor() -> None:
    whole = rewrite._Whole(lambda tensor, into: None, 8)
    whole._thread = -1
    with pytest.raises(AssertionError, match="two threads would share one buffer"):
        whole.part(Tensor("weight", "w", (2,), np.dtype("<f4")), 0, 2)


# -- the command line


def run_verb(*arguments: str) -> subprocess.CompletedProcess[str]:
    return forked.verb("checkpoint", *arguments, cwd=REPOSITORY, server=forked.TORCH)


def test_the_commands_print_what_they_made_and_say_what_is_wrong(source: Path, tmp_path: Path) -> None:
    done = run_verb("reshard", f"path={source.parent}", f"out={tmp_path / 'out'}", "num_files=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        f"{tmp_path / 'out' / source.name}: step 5, 12 tensors of exp_avg, exp_avg_"
    )
    assert "reshard: 4.1 KiB in" in done.stderr
    same = run_verb("diff", f"a={source}", f"b={tmp_path / 'out'}")
    assert (same.returncode, "equal bit by bit" in same.stdout) == (0, True), same.stderr
    again = run_verb("merge", f"path={source}", f"out={tmp_path / 'out'}")
    assert (again.returncode, "name a folder that is empty" in again.stderr) == (2, True)
    nothing = run_verb()
    assert nothing.returncode == 2
    assert "`llmtrain checkpoint` needs a second word, and nothing came" in nothing.stderr
    assert "checkpoint reshard" in nothing.stderr
