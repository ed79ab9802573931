"""metrics.jsonl read while it is written: whole lines only, each once, whatever happens to the file."""

from __future__ import annotations

import json
import os

import pytest

from llmtrain.errors import DataError
from llmtrain.tracking import follow
from llmtrain.tracking.follow import MetricsFollower, parse_line
from llmtrain.tracking.metrics import MetricsFile


def line(step, **fields):
    return json.dumps({"kind": "step", "step": step, "attempt": 1, **fields}).encode() + b"\n"


def steps(records):
    return [record["step"] for record in records]


def test_each_record_comes_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    follower = MetricsFollower(path)
    assert follower.new_records() == []
    with MetricsFile(path, attempt=1) as metrics:
        metrics.write("step", 1, loss=3.0)
        assert steps(follower.new_records()) == [1]
        metrics.write("step", 2, loss=2.0)
        metrics.write("step", 3, loss=1.0)
    assert steps(follower.new_records()) == [2, 3]
    assert follower.new_records() == []


def test_a_half_written_line_is_taken_when_it_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = line(1) + line(2)
    follower = MetricsFollower(path)
    found = []
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        found += steps(follower.new_records())
        assert found == [1, 2][: whole[:end].count(b"\n")]
    assert follower.num_bad_lines == 0


def test_a_torn_line_that_a_resume_cuts_off_is_never_seen(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + line(2)[:20])
    follower = MetricsFollower(path)
    assert steps(follower.new_records()) == [1]
    with MetricsFile(path, attempt=2) as metrics:
        metrics.write("step", 2)
    assert steps(follower.new_records()) == [2]
    assert (follower.num_bad_lines, follower.generation) == (0, 0)


def test_lines_that_are_no_records_are_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\x00\x00\n[1]\n{}\n" + line(1) + b'{"kind": "step", "step": "2", "attempt": 1}\n\n')
    follower = MetricsFollower(path)
    assert steps(follower.new_records()) == [1]
    assert follower.num_bad_lines == 4


def test_a_new_file_in_its_place_is_read_from_its_beginning(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + line(2))
    follower = MetricsFollower(path)
    follower.new_records()
    other = tmp_path / "other"
    other.write_bytes(line(7) + line(8) + line(9))
    os.replace(other, path)
    assert steps(follower.new_records()) == [7, 8, 9]
    assert follower.generation == 1


def test_a_file_that_was_cut_is_read_from_its_beginning(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + line(2))
    follower = MetricsFollower(path)
    follower.new_records()
    with open(path, "r+b") as handle:
        handle.truncate(len(line(1)))
    assert steps(follower.new_records()) == [1]
    assert follower.generation == 1


def test_a_file_that_vanishes_and_comes_back_is_waited_for(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1))
    follower = MetricsFollower(path)
    follower.new_records()
    kept = tmp_path / "kept"
    path.rename(kept)
    assert follower.new_records() == []
    kept.rename(path)
    with open(path, "ab") as handle:
        handle.write(line(2))
    assert steps(follower.new_records()) == [2]


def test_a_long_file_comes_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(follow, "CHUNK_BYTES", 100)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(line(step) for step in range(1, 20)) + line(20, text="x" * 500))
    follower = MetricsFollower(path)
    found = steps(follower.new_records())
    assert follower.is_behind
    assert 0 < len(found) < 19
    while follower.is_behind:
        found += steps(follower.new_records())
    assert found == list(range(1, 21))


def test_a_file_that_may_not_be_read_says_so(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()  # root may read any file, and nobody a folder
    with pytest.raises(DataError, match=r"metrics.jsonl cannot be read: Is a directory; ask its owner"):
        MetricsFollower(tmp_path / "metrics.jsonl").new_records()


@pytest.mark.parametrize("text", [b"", b"nonsense", b"[]", b'{"kind": 3, "step": 1, "attempt": 1}', b"\xff"])
def test_what_is_no_record_is_none(text):
    assert parse_line(text) is None
