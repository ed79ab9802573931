"""Ranks over gloo that look at each other before they load anything. Hosts are names as Slurm gives them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from data_folder import train_arguments, write_data_folder
from ranks import REPOSITORY, free_port

import llmtrain
from llmtrain.errors import EXIT_FAILED, LaunchError
from llmtrain.launch.preflight.config import PreflightConfig
from llmtrain.train.preflight import check_before_meeting, rounds, same_settings, shifts

WORKER = Path(__file__).with_name("preflight_worker.py")


@dataclass
class Own:
    """What a rank has for itself."""

    arguments: Sequence[str] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "."
    fault: str | None = None
    value: str = ""


Look = Callable[..., tuple[list[int], list[str], Path]]


@pytest.fixture(scope="module")
def worker() -> Iterator[subprocess.Popen[str]]:
    environ = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(WORKER)],
        env=environ | {"PYTHONWARNINGS": "ignore"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield process


@pytest.fixture
def look(worker: subprocess.Popen[str], data: Path, tmp_path: Path) -> Look:
    """Statuses, what each rank said, and the report's file, of ranks on hosts a, b, ... of one rank each."""

    def look(
        *own: Own,
        hosts: str = "ab",
        arguments: Sequence[str] = (),
        preflight: Mapping[str, object] = {},
    ) -> tuple[list[int], list[str], Path]:
        shared = {"WORLD_SIZE": str(len(hosts)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        shared |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "SLURM_NNODES": str(len(hosts))}
        plans: list[dict[str, Any]] = []
        for rank, host in enumerate(hosts):
            mine = own[rank] if rank < len(own) else Own()
            base = train_arguments(data, tmp_path / "runs" / "x", *arguments)[1:]
            plans.append(
                {
                    "arguments": [*base, *mine.arguments],
                    "environ": {**shared, "RANK": str(rank), "SLURMD_NODENAME": host, **mine.environ},
                    "cwd": str(tmp_path / mine.cwd),
                    "fault": mine.fault,
                    "value": mine.value,
                    "preflight": {"all_reduce_mib": 1, **preflight},
                    "output": str(tmp_path / f"{rank}.txt"),
                    "report": str(tmp_path / "preflight.json"),
                }
            )
        worker.stdin.write(json.dumps(plans) + "\n")
        worker.stdin.flush()
        told = json.loads(worker.stdout.readline())
        return told["statuses"], told["texts"], tmp_path / "preflight.json"

    return look


def refused(told: tuple[list[int], list[str], Path]) -> str:
    """What rank 0 says, alone, of a run that no rank starts."""
    statuses, texts, report = told
    assert statuses == [EXIT_FAILED] * len(statuses), "\n".join(texts)
    assert not any("error: " in text for text in texts[1:]), "one rank speaks for all"
    assert not report.exists()
    return texts[0]


def test_ranks_that_agree_measure_and_leave_a_report(look: Look, tmp_path: Path) -> None:
    statuses, texts, path = look()
    assert statuses == [0, 0], "\n".join(texts)
    assert re.search(r"preflight, .*: 2 ranks on 2 hosts; all-reduce of 1 MiB in .*B/s, bus .*B/s", texts[0])
    [attempt] = json.loads(path.read_text())["attempts"]
    assert not [each for each in attempt["findings"] if each["level"] == "error"]
    measured = attempt["measured"]
    assert list(measured["hosts"]) == ["a", "b"]
    for host in measured["hosts"].values():
        [folder] = host["folders"]
        assert folder["sees_token"], "a real file, that rank 0 wrote and both have read"
        assert folder["write"]["num_bytes"] > 100_000, "as much as a checkpoint of the tiny model"
        assert host["data"][0]["read"]["num_bytes"] > 1000
    assert [each["rank"] for each in measured["all_reduce"]] == [0, 1]
    assert all(each["bus_bytes_per_s"] == each["bytes_per_s"] > 1e6 for each in measured["all_reduce"])
    assert len(measured["slowest_links"]) == 2
    clock = measured["clocks"]["b"]
    assert abs(clock["ahead_s"]) <= clock["bound_s"] + 0.001, "one machine, one clock"
    left = {each.name for each in tmp_path.iterdir()}
    assert left == {"0.txt", "1.txt", "preflight.json"}, "neither a token nor the run's folder"


def test_other_settings_are_named(look: Look) -> None:
    text = refused(look(Own(), Own(arguments=["optimizer.peak_lr=0.02", "run.seed=3"])))
    assert "b (rank 1): other settings than elsewhere (hash " in text
    assert "optimizer.peak_lr=0.02, elsewhere 0.01; run.seed=3, elsewhere 0; launch all with the same" in text


def test_folders_of_a_hosts_own_are_no_other_settings(look: Look, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "copy")
    own = Own(arguments=[f"data.folder={tmp_path / 'copy'}", f"save.memory_folder={tmp_path}"])
    statuses, texts, _ = look(Own(), own)
    assert statuses == [0, 0], "\n".join(texts)


def test_of_sources_only_the_folders_may_differ() -> None:
    source = {"folder": "/here", "weight": 2.0}
    plain = {"data": {"folder": "/x", "sources": {"a.b": source}}, "save": {"memory_folder": "/dev/shm"}}
    assert same_settings(plain) == {"data.sources.a.b.weight": 2.0}


def test_other_code_is_named(look: Look, tmp_path: Path) -> None:
    other = tmp_path / "llmtrain"
    shutil.copytree(Path(llmtrain.__file__).parent, other, ignore=shutil.ignore_patterns("__pycache__"))
    (other / "model" / "norm.py").write_text("# another version\n")
    text = refused(look(Own(), Own(fault="code", value=str(other))))
    assert re.search(
        r"b \(rank 1\): other files of llmtrain than elsewhere \(hash \w{12}\): model/norm.py", text
    )


def test_other_data_and_tokenizers_are_named(look: Look, data: Path, tmp_path: Path) -> None:
    write_data_folder(tmp_path / "other", seed=1)
    text = refused(look(Own(), Own(arguments=[f"data.folder={tmp_path / 'other'}"])))
    assert f"b (rank 1): manifest.json of data.folder={tmp_path / 'other'} has the hash " in text
    changed = tmp_path / "changed"
    shutil.copytree(data, changed)
    manifest = json.loads((changed / "manifest.json").read_text())
    manifest["tokenizer"]["fingerprint"] = "0" * 64
    (changed / "manifest.json").write_text(json.dumps(manifest))
    text = refused(look(Own(), Own(arguments=[f"data.folder={changed}"])))
    assert f"b (rank 1): the tokenizer of data.folder={changed} has the fingerprint 000000000000" in text


def test_a_run_folder_that_is_not_shared_is_named(look: Look, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    text = refused(look(Own(cwd="a"), Own(cwd="b"), arguments=["run.folder=runs/x"]))
    assert "b (rank 1): run.folder=runs/x is not the folder that rank 0 sees" in text
    assert f"does not appear in {tmp_path / 'b'}" in text
    assert not list((tmp_path / "a").iterdir())


def test_several_errors_are_said_at_once(look: Look, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    own = Own(arguments=["run.seed=3"], cwd="b")
    text = refused(look(Own(), own, arguments=["run.folder=runs/x", "parallel.world_size=4"]))
    for part in (
        "run.seed=3, elsewhere 0",
        "is not the folder that rank 0 sees",
        "but 2 ranks were launched",
    ):
        assert text.count(part) == 1, text


def test_a_wrong_sum_is_named(look: Look) -> None:
    text = refused(look(Own(), Own(fault="sum")))
    assert "b (rank 1): an all-reduce gave 3 wrong elements of 1 MiB; take the host out of the run" in text


def test_a_clock_that_is_off_is_named_within_its_bound(look: Look) -> None:
    statuses, texts, path = look(Own(), Own(fault="clock", value="5"), Own(), hosts="abc")
    assert statuses == [0, 0, 0], "\n".join(texts)
    [told] = [line for line in texts[0].splitlines() if "its clock is" in line]
    found = re.search(
        r"b \(rank 1\): its clock is (.*) s \(±(.*)\) ahead of that of rank 0's host; run", told
    )
    assert abs(float(found[1]) - 5) <= float(found[2]) + 0.01
    clocks = json.loads(path.read_text())["attempts"][0]["measured"]["clocks"]
    assert abs(clocks["c"]["ahead_s"]) <= clocks["c"]["bound_s"] + 0.001


def test_a_slow_rank_is_named(look: Look) -> None:
    own = Own(fault="link", value="0.5")
    statuses, texts, _ = look(Own(), own, Own(), hosts="abc", preflight={"network_s": 30.0})
    assert statuses == [0, 0, 0], "\n".join(texts)
    told = [line for line in texts[0].splitlines() if "B/s at best" in line]
    assert len(told) == 2, texts[0]
    assert "b (rank 1): sends at " in told[0]
    assert "b (rank 1): receives at " in told[1]


def test_preflight_off_is_off_for_all(look: Look) -> None:
    statuses, texts, path = look(preflight={"enabled": False})
    assert statuses == [0, 0], "\n".join(texts)
    assert not path.exists()
    assert "preflight" not in texts[0]


def test_what_keeps_ranks_from_meeting_is_told_before_they_try(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    launch = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    check_before_meeting(PreflightConfig())
    assert "unless all ranks are on this machine: MASTER_ADDR=127.0.0.1 is 127.0.0.1, the host" in caplog.text
    caplog.clear()
    monkeypatch.setenv("MASTER_ADDR", "nobody.invalid")
    with pytest.raises(
        LaunchError, match=r"MASTER_ADDR=nobody.invalid does not resolve: .*; give an address"
    ):
        check_before_meeting(PreflightConfig())
    monkeypatch.setenv("LOCAL_RANK", "1")
    caplog.clear()
    with pytest.raises(SystemExit, match="2"):
        check_before_meeting(PreflightConfig())
    check_before_meeting(PreflightConfig(enabled=False))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_before_meeting(PreflightConfig())
    assert caplog.text == ""


@pytest.mark.parametrize("world_size", [2, 3, 4, 7, 12])
def test_no_rank_is_in_two_links_at_a_time(world_size: int) -> None:
    for shift in range(1, world_size):
        parts = rounds(world_size, shift)
        assert len(parts) <= 3
        assert sorted(pair for pairs in parts for pair in pairs) == [
            (rank, (rank + shift) % world_size) for rank in range(world_size)
        ]
        for pairs in parts:
            busy = [rank for pair in pairs for rank in pair]
            assert len(busy) == len(set(busy))


def test_links_that_are_tried() -> None:
    assert shifts(1, 1) == []
    assert shifts(4, 2) == [1, 2, 3], "every pair"
    assert shifts(64, 8) == [1, 8, 63, 16, 2, 24]
    assert shifts(16, 16) == [1, 15, 2], "one host"
