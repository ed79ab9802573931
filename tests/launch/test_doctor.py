"""`llmtrain doctor` on this machine, and on machines that are not as well."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from data_folder import write_data_folder

from llmtrain.cli import doctor
from llmtrain.cli.doctor import DoctorData, DoctorRoot, DoctorRun
from llmtrain.errors import LLMTrainError
from llmtrain.launch.preflight.findings import Finding, Level
from llmtrain.launch.preflight.gpus import Gpu, Gpus
from llmtrain.launch.preflight.host import Host, ask_host, ask_network


@pytest.fixture
def here() -> Host:
    return ask_host([], {}, environ=os.environ, asks_gpus=False, read_bytes=0, measured_s=1, limit_s=60)


def of_topic(findings: list[Finding], topic: str) -> list[Finding]:
    return [each for each in findings if each.topic == topic]


def test_this_machine(tmp_path: Path) -> None:
    """All of it for real: imports, two ranks over gloo, disks, names; an error ends it with status 1."""
    data = write_data_folder(tmp_path / "data")
    command = [sys.executable, "-m", "llmtrain.cli.main", "doctor", f"data.folder={data}"]
    done = subprocess.run(
        [*command, f"run.folder={tmp_path / 'run'}", "preflight.storage_mib=2"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    lines = done.stdout.splitlines()
    errors = [line for line in lines if line.startswith("error")]
    assert done.returncode == (1 if errors else 0), done.stderr
    assert errors == [], "the machine that runs the tests can train"
    for start, part in (
        ("ok       machine", "threads of"),
        ("ok       limits", "open files"),
        ("ok       data", "data.folder: manifest "),
        ("ok       names", "127.0.0.1"),
        ("ok       storage", f"run.folder={tmp_path / 'run'}: "),
        ("ok       storage", "MB/s, reads "),
        ("ok       ports", "was reached there"),
        ("ok       software", "torch 2."),
        ("ok       software", "deepspeed 0."),
        ("ok       software", "accelerate 1."),
        ("ok       software", "wandb 0."),
        ("ok       gloo", "two ranks: all-reduce of 4 MiB in "),
    ):
        assert any(line.startswith(start) and part in line for line in lines), (start, part, done.stdout)
    assert re.fullmatch(r"nothing is wrong|\d+ warnings?", lines[-1])
    assert not (tmp_path / "run").exists()


def test_errors_end_it_with_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "software", lambda host, *, limit_s: iter(()))
    cfg = DoctorRoot(run=DoctorRun(folder=str(tmp_path)), data=DoctorData(folder=str(tmp_path / "no")))
    with pytest.raises(SystemExit, match="1"):
        doctor.run(cfg)
    told = capsys.readouterr().out
    assert (
        f"error    data      data.folder={tmp_path / 'no'} has no manifest.json; run `llmtrain data`" in told
    )
    assert told.splitlines()[-1].startswith("1 error")


def test_a_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "120")
    doctor.show(
        [
            Finding(level=Level.ok, topic="ports", host="", found="listened"),
            Finding(level=Level.error, topic="data", host="", found="[x] missing", remedy="mount it"),
        ]
    )
    head, _, first, second, summary = (line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert head.split() == ["topic", "found", "what", "to", "do"]
    assert first.split() == ["ok", "ports", "listened"]
    assert second.split("  ")[0] == "error"
    assert "[x] missing" in second
    assert second.endswith("mount it")
    assert summary == "1 error"


def test_a_host_name_on_loopback_is_a_warning_here(here: Host) -> None:
    lookup = replace(here.network.own, addresses=("127.0.1.1",))
    host = replace(here, network=replace(here.network, own=lookup))
    [first, *_] = of_topic(list(doctor.judged(host, DoctorRoot().preflight)), "names")
    assert first.level is Level.warning
    assert "is 127.0.1.1: gloo would use loopback" in first.found
    assert "GLOO_SOCKET_IFNAME=" in first.remedy


def test_a_slurm_job_around_it_is_none_of_its_business(here: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NNODES", "4")
    monkeypatch.setenv("WORLD_SIZE", "8")
    findings = list(doctor.judged(here, DoctorRoot().preflight))
    assert [each for each in findings if each.level is Level.error] == []


def test_an_address_that_nobody_may_listen_at() -> None:
    network = replace(ask_network({}), interfaces={"eth9": ("203.0.113.7",)})
    found = doctor.port(network)
    assert found.level is Level.error
    assert "nothing can listen and be reached at 203.0.113.7: " in found.found
    assert doctor.port(replace(network, interfaces={})).level is Level.ok, "then by loopback"


def test_packages_that_are_missing_or_do_not_fit(here: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def imported(name: str, *, limit_s: float) -> dict[str, object]:
        if name in ("deepspeed", "wandb"):
            raise RuntimeError("ImportError: libcudart.so.12: cannot open shared object file")
        return (
            {"version": "2.13.0", "CUDA": None, "GPUs": 0, "threads": 4}
            if name == "torch"
            else {"version": "1"}
        )

    def run_ranks(command: list[str], **_: object) -> None:
        raise LLMTrainError("rank 1 of 2 exited with 2")

    monkeypatch.setattr(doctor, "imported", imported)
    monkeypatch.setattr(doctor, "run_ranks", run_ranks)
    gpu = Gpu(
        index=0, uuid="GPU-0", name="H100", driver="550", memory_bytes=None, used_bytes=None, celsius=None,
        uncorrected_errors=None, repair_is_pending=False, repair_failed=False, throttled=(),
    )  # fmt: skip
    findings = list(doctor.software(replace(here, gpus=Gpus(gpus=(gpu, gpu))), limit_s=5))
    told = {each.found: each for each in findings}
    broken = "cannot be imported: RuntimeError: ImportError: libcudart.so.12: cannot open shared object file"
    assert told[f"deepspeed {broken}"].level is Level.error
    assert told[f"wandb {broken}"].level is Level.warning
    assert told["nvidia-smi shows 2 GPUs and torch sees 0 (built for CUDA None)"].level is Level.error
    gloo = "two ranks on this machine could not sum over gloo: LLMTrainError: rank 1 of 2 exited with 2"
    assert told[gloo].level is Level.error
    assert all(each.remedy for each in findings if each.level is not Level.ok)


def test_a_wrong_sum_of_two_ranks_is_an_error(here: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = {"num_bytes": 1 << 20, "seconds": 0.01, "num_wrong": 3}
    monkeypatch.setattr(doctor, "imported", lambda name, *, limit_s: {"version": "1"})
    monkeypatch.setattr(doctor, "run_ranks", lambda command, **_: [[rank, rank | {"num_wrong": 0}]] * 2)
    [found] = of_topic(list(doctor.software(here, limit_s=5)), "gloo")
    assert found.level is Level.error
    assert found.found == "3 wrong elements in an all-reduce of two ranks"


def test_an_import_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="ModuleNotFoundError: No module named 'no_such_package'"):
        doctor.imported("no_such_package", limit_s=60)
