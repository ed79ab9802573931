"""Event files for TensorBoard: read back here frame by frame, and by TensorBoard itself where it is
installed."""

from __future__ import annotations

import json
import math
import os
import struct
import threading

import pytest

from llmtrain.cli import tensorboard as verb
from llmtrain.cli.tensorboard import TensorBoardConfig
from llmtrain.errors import ConfigError, DataError, DiskError, LaunchError
from llmtrain.files import FolderLock
from llmtrain.tracking import tensorboard
from llmtrain.tracking.metrics import MetricsFile
from llmtrain.tracking.tensorboard import EventFile, TensorBoardSink, scalars_of


def crc32c(content):
    """Bit by bit, from the polynomial of RFC 3720, section 12.1."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def unmasked(checksum):
    """As tensorflow/core/lib/hash/crc32c.h takes the mask off."""
    rotated = (struct.unpack("<I", checksum)[0] - 0xA282EAD8) & 0xFFFFFFFF
    return (rotated >> 17 | rotated << 15) & 0xFFFFFFFF


def frames(path):
    content, at = path.read_bytes(), 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        body = content[at + 12 : at + 12 + length]
        assert unmasked(content[at + 8 : at + 12]) == crc32c(content[at : at + 8])
        assert unmasked(content[at + 12 + length : at + 16 + length]) == crc32c(body)
        yield body
        at += 16 + length


def varint(content, at):
    value = shift = 0
    while True:
        value |= (content[at] & 0x7F) << shift
        shift += 7
        at += 1
        if not content[at - 1] & 0x80:
            return value, at


def fields(content):
    """(number, value) of every field of a message in Protocol Buffers' encoding."""
    at = 0
    while at < len(content):
        key, at = varint(content, at)
        if key & 7 == 0:
            value, at = varint(content, at)
        elif key & 7 == 1:
            value, at = struct.unpack_from("<d", content, at)[0], at + 8
        elif key & 7 == 5:
            value, at = struct.unpack_from("<f", content, at)[0], at + 4
        else:
            length, at = varint(content, at)
            value, at = content[at : at + length], at + length
        yield key >> 3, value


def events(path):
    """Every event as (step, {curve: value}), or (step, "restart")."""
    found = []
    for number, frame in enumerate(frames(path)):
        event = dict(fields(frame))
        if number == 0:
            assert event[3] == b"brain.Event:2"
        elif 7 in event:
            assert dict(fields(event[7])) == {1: 1}
            found.append((event[2], "restart"))
        else:
            values = [dict(fields(value)) for _, value in fields(event[5])]
            found.append((event[2], {value[1].decode(): value[2] for value in values}))
    return found


def only_file(folder):
    (path,) = folder.glob("events.out.tfevents.*")
    return path


def step(number, *, attempt=1, **values):
    return {"kind": "step", "step": number, "attempt": attempt, "time": 1e9 + number, **values}


def write_run(folder, *, ending="finished"):
    """Eight steps and a kill; from step 5 on again to step 12."""
    for attempt, begin, end in ((1, 0, 8), (2, 5, 12)):
        with MetricsFile(folder / "metrics.jsonl", attempt=attempt) as metrics:
            metrics.write("event", begin, what="resume" if begin else "start", time=1e9)
            for number in range(begin + 1, end + 1):
                metrics.write("step", number, loss=attempt + number / 8, tokens=number, time=1e9 + number)
    with MetricsFile(folder / "metrics.jsonl", attempt=2) as metrics:
        metrics.write("eval", 12, eval_loss=2.5, eval_s=1.0, time=1e9 + 13)
        metrics.write("event", 12, what=ending)


@pytest.mark.parametrize("length", [0, 1, 2, 3, 17, 250, 251])
def test_the_checksum_is_crc32c(length):
    content = bytes(number * 37 % 256 for number in range(length))
    assert unmasked(tensorboard._checksum(content)) == crc32c(content)


def test_the_checksum_agrees_with_the_examples_of_its_standard():
    """RFC 3720, appendix B.4."""
    assert unmasked(tensorboard._checksum(bytes(32))) == 0x8A9136AA
    assert unmasked(tensorboard._checksum(b"\xff" * 32)) == 0x62A8AB43


def test_numbers_become_curves_named_by_what_they_are_of(tmp_path):
    with EventFile(tmp_path) as file:
        TensorBoardSink(file).take([step(300, loss=2.5, mfu=None, tokens=12, grad_norm=math.inf, note="x")])
    assert events(file.path) == [(300, {"train/loss": 2.5})]
    assert scalars_of({"kind": "eval", "step": 1, "eval_loss": 2, "eval_s": 3}) == {
        "eval/loss": 2,
        "eval/s": 3,
    }
    assert scalars_of({"kind": "event", "step": 1, "what": "spike", "z": 9.0}) == {}


def test_a_restart_voids_the_steps_that_it_does_again(tmp_path):
    write_run(tmp_path)
    verb.follow(TensorBoardConfig(run=str(tmp_path)))
    found = events(only_file(tmp_path / "tensorboard"))
    assert [number for number, _ in found] == [*range(1, 9), 6, *range(6, 13), 12]
    assert found[8] == (6, "restart")
    assert found[9] == (6, {"train/loss": 2.75})
    assert found[-1] == (12, {"eval/loss": 2.5, "eval/s": 1.0})


def test_tensorboard_reads_what_stands(tmp_path):
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="pip install tensorboard"
    )
    write_run(tmp_path)
    verb.follow(TensorBoardConfig(run=str(tmp_path)))
    read = reader.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    curve = [(each.step, each.value) for each in read.Scalars("train/loss")]
    assert curve == [(number, (1 if number <= 5 else 2) + number / 8) for number in range(1, 13)]


def test_a_second_call_replaces_the_files_of_the_first(tmp_path, capsys):
    write_run(tmp_path)
    for _ in range(2):
        verb.follow(TensorBoardConfig(run=str(tmp_path)))
    assert len(events(only_file(tmp_path / "tensorboard"))) == 17
    assert f"15 steps in {tmp_path / 'tensorboard'}" in capsys.readouterr().out


def test_a_run_that_goes_on_is_followed_to_its_end(tmp_path):
    """A stop does not end it: the next attempt does."""
    write_run(tmp_path, ending="stopped")
    follower = threading.Thread(
        target=verb.follow, args=[TensorBoardConfig(run=str(tmp_path), refresh_s=0.05)], daemon=True
    )
    follower.start()
    follower.join(0.5)
    assert follower.is_alive()
    with MetricsFile(tmp_path / "metrics.jsonl", attempt=3) as metrics:
        metrics.write("event", 12, what="resume")
        metrics.write("step", 13, loss=1.0)
        metrics.write("event", 13, what="finished")
    follower.join(60)
    assert not follower.is_alive()
    assert events(only_file(tmp_path / "tensorboard"))[-1] == (13, {"train/loss": 1.0})


def test_a_run_begun_anew_in_the_same_folder_begins_anew_here(tmp_path):
    write_run(tmp_path, ending="stopped")
    follower = threading.Thread(
        target=verb.follow, args=[TensorBoardConfig(run=str(tmp_path), refresh_s=0.05)], daemon=True
    )
    follower.start()
    follower.join(0.5)
    other = tmp_path / "other.jsonl"
    lines = [step(1, loss=9.0), {"kind": "event", "what": "finished", "step": 1, "attempt": 1, "time": 1e9}]
    other.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(other, tmp_path / "metrics.jsonl")
    follower.join(60)
    assert events(only_file(tmp_path / "tensorboard")) == [(1, {"train/loss": 9.0})]


def test_without_follow_what_there_is_is_converted(tmp_path):
    write_run(tmp_path, ending="stopped")
    verb.follow(TensorBoardConfig(run=str(tmp_path), out=str(tmp_path / "elsewhere"), follow=False))
    assert len(events(only_file(tmp_path / "elsewhere"))) == 17


def test_two_writers_of_one_folder_are_one_too_many(tmp_path):
    write_run(tmp_path)
    with FolderLock(tmp_path / "tensorboard"), pytest.raises(LaunchError, match="is being written by pid"):
        verb.follow(TensorBoardConfig(run=str(tmp_path)))


def test_a_folder_that_cannot_be_written_says_so(tmp_path):
    write_run(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match=r"file/tb cannot be written: Not a directory; give another folder"):
        verb.follow(TensorBoardConfig(run=str(tmp_path), out=str(tmp_path / "file/tb")))


def test_no_metrics_is_an_error_that_says_where_to_look(tmp_path):
    with pytest.raises(DataError, match=r"x holds no metrics.jsonl; `llmtrain status folder="):
        verb.follow(TensorBoardConfig(run=str(tmp_path / "x")))


def test_a_refresh_of_no_time_is_refused():
    with pytest.raises(ConfigError, match=r"refresh_s=0 must be above 0 seconds"):
        TensorBoardConfig(run="x", refresh_s=0)
