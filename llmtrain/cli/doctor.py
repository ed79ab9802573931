"""`llmtrain doctor`: what a run would find on this machine: software, limits, storage, GPUs, names, gloo."""

from __future__ import annotations

import json
import os
import platform
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmtrain import files
from llmtrain.bench.ranks import run_ranks
from llmtrain.cli.compose import run_verb
from llmtrain.launch.preflight.config import PreflightConfig
from llmtrain.launch.preflight.findings import (
    AllReduce,
    Answers,
    Finding,
    Level,
    Needs,
    RankAnswer,
    network_rate,
    wrong,
)
from llmtrain.launch.preflight.host import (
    FolderAsked,
    Host,
    Network,
    Place,
    ask_host,
    code_hashes,
    max_open_files,
    within,
)
from llmtrain.launch.preflight.judge import judge
from llmtrain.tracking.facts import cpu_name
from llmtrain.units import format_bytes, format_duration

EXIT_ERRORS = 1
"""Status when something would keep a run from starting."""
IMPORTED = {
    "torch": Level.error,
    "deepspeed": Level.error,
    "accelerate": Level.warning,
    "wandb": Level.warning,
}
"""Package -> how bad it is when it cannot be imported."""
IMPORT = """
import importlib, importlib.metadata, json, sys
module = importlib.import_module(sys.argv[1])
told = {"version": importlib.metadata.version(sys.argv[1])}
if sys.argv[1] == "torch":
    told["CUDA"] = module.version.cuda
    told["GPUs"] = module.cuda.device_count()
    told["threads"] = module.get_num_threads()
print(json.dumps(told))
"""
MIN_OPEN_FILES = 1024
"""Of a rank among a hundred."""
MIN_PROCESSES = 4096
LEVEL_STYLES = {Level.ok: "green", Level.warning: "yellow", Level.error: "bold red"}


@dataclass(kw_only=True)
class DoctorRun:
    folder: str = "runs"
    """Whose file system is measured; it need not exist."""


@dataclass(kw_only=True)
class DoctorData:
    folder: str | None = None
    """A data folder to read from; null: none."""


@dataclass(kw_only=True)
class DoctorRoot:
    """Names as in `llmtrain train`."""

    run: DoctorRun = field(default_factory=DoctorRun)
    data: DoctorData = field(default_factory=DoctorData)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    import_s: float = 120.0
    """Longest that importing a package, or two ranks that meet, may take."""


def main() -> None:
    run_verb("doctor", DoctorRoot, run)


def run(cfg: DoctorRoot) -> None:
    findings = list(examine(cfg))
    show(findings)
    if any(finding.level is Level.error for finding in findings):
        sys.exit(EXIT_ERRORS)


def examine(cfg: DoctorRoot) -> Iterator[Finding]:
    """Everything about this machine; the slow part last."""
    limits = cfg.preflight
    size = limits.storage_mib << 20
    folder = FolderAsked(setting="run.folder", path=Path(cfg.run.folder), token=None, measured_bytes=size)
    host = ask_host(
        [folder],
        {"data.folder": Path(cfg.data.folder)} if cfg.data.folder else {},
        environ={name: value for name, value in os.environ.items() if name != "MASTER_ADDR"},
        asks_gpus=True,
        read_bytes=size,
        measured_s=limits.storage_s,
        limit_s=limits.answer_s,
    )
    yield from machine()
    yield from judged(host, limits)
    for data in host.data:
        if data.manifest_hash is None:
            yield Finding(
                level=Level.error,
                topic="data",
                host="",
                found=f"{data.setting}={data.path} has no manifest.json",
                remedy="run `llmtrain data` first, or to its end, or mount the folder",
            )
    if host.network is not None:
        yield port(host.network)
    yield from software(host, limit_s=cfg.import_s)


def machine() -> Iterator[Finding]:
    """Processor and limits of this process."""
    cores = psutil.cpu_count(logical=False)
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    yield _ok(
        "machine",
        f"{platform.node()}, {platform.system()} {platform.release()}: {cpu_name()}, "
        f"{psutil.cpu_count()} threads of {cores or '?'} cores, load {load}, OMP_NUM_THREADS {threads}",
    )
    limits = {
        "open files": (resource.RLIMIT_NOFILE, False),
        "processes": (resource.RLIMIT_NPROC, False),
        "locked memory": (resource.RLIMIT_MEMLOCK, True),
        "stack": (resource.RLIMIT_STACK, True),
        "core file": (resource.RLIMIT_CORE, True),
    }
    told = []
    for name, (number, is_bytes) in limits.items():
        soft = resource.getrlimit(number)[0]
        if soft == resource.RLIM_INFINITY:
            told.append(f"{name} unlimited")
        else:
            told.append(f"{name} {format_bytes(soft) if is_bytes else f'{soft:,}'}")
    yield _ok("limits", ", ".join(told))
    processes = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if processes != resource.RLIM_INFINITY and processes < MIN_PROCESSES:
        yield Finding(
            level=Level.warning,
            topic="limits",
            host="",
            found=f"a user may have {processes:,} processes and threads",
            remedy="raise it (`ulimit -u`, TasksMax, --pids-limit): ranks have hundreds of threads each",
        )


def judged(host: Host, limits: PreflightConfig) -> Iterator[Finding]:
    """What the start of a run would say of this host."""
    alone = RankAnswer(
        place=Place.here({}),
        preflight=limits,
        code=files.hash_json(code_hashes()),
        versions={"Python": platform.python_version()},
        config="",
        expected_ranks=None,
        gpu=None,
        max_open_files=max_open_files(),
    )
    answers = Answers(ranks=[alone], hosts={0: host}, needs=Needs(open_files=MIN_OPEN_FILES))
    for finding in judge(answers, limits):
        if finding.topic != "ranks":
            yield finding


def port(network: Network) -> Finding:
    """Whether a process here may listen, and another reach it, by an address that other hosts would use."""
    reachable = [address for address in sorted(network.addresses) if ":" not in address]
    address = reachable[0] if reachable else "127.0.0.1"
    try:
        with closing(socket.create_server((address, 0))) as server:
            number = server.getsockname()[1]
            socket.create_connection((address, number), timeout=5).close()
    except OSError as error:
        return Finding(
            level=Level.error,
            topic="ports",
            host="",
            found=f"nothing can listen and be reached at {address}: {error}",
            remedy="see what forbids it: a firewall, a sandbox, an address that is not this machine's",
        )
    return _ok("ports", f"listened at {address}:{number}, and was reached there")


def software(host: Host, *, limit_s: float) -> Iterator[Finding]:
    """Packages, imported, and two ranks over gloo; all at a time."""
    command = [sys.executable, "-m", "llmtrain.train.preflight", str(4 << 20)]
    questions = {name: partial(imported, name, limit_s=limit_s) for name in IMPORTED} | {
        "gloo": partial(run_ranks, command, num_ranks=2, timeout_s=limit_s)
    }
    answers, failures = within(limit_s + 5, questions)
    for name, level in IMPORTED.items():
        if name in failures:
            yield Finding(
                level=level,
                topic="software",
                host="",
                found=f"{name} cannot be imported: {failures[name]}",
                remedy=f"`python -c 'import {name}'` tells more; versions are in docs/dependencies.md",
            )
            continue
        told = answers[name]
        more = "".join(f", {what} {value}" for what, value in told.items() if what != "version")
        yield _ok("software", f"{name} {told['version']}{more}")
    shown = len(host.gpus.gpus) if host.gpus is not None else 0
    if shown and "torch" in answers and answers["torch"]["GPUs"] < shown:
        torch = answers["torch"]
        yield Finding(
            level=Level.error,
            topic="software",
            host="",
            found=f"nvidia-smi shows {shown} GPUs and torch sees {torch['GPUs']} (built for CUDA "
            f"{torch['CUDA']})",
            remedy="install a torch built for the driver's CUDA, and look at CUDA_VISIBLE_DEVICES",
        )
    if "gloo" in failures:
        yield Finding(
            level=Level.error,
            topic="gloo",
            host="",
            found=f"two ranks on this machine could not sum over gloo: {failures['gloo']}",
            remedy="see names and ports above; GLOO_SOCKET_IFNAME=lo tries it without the network",
        )
        return
    told = [AllReduce(**each) for each in answers["gloo"][0]]
    slowest = max(told, key=lambda each: each.seconds)
    num_wrong = sum(each.num_wrong for each in told)
    yield Finding(
        level=Level.error if num_wrong else Level.ok,
        topic="gloo",
        host="",
        found=f"{num_wrong:,} wrong elements in an all-reduce of two ranks"
        if num_wrong
        else f"two ranks: all-reduce of {format_bytes(slowest.num_bytes)} in "
        f"{format_duration(slowest.seconds)}, {network_rate(slowest.bytes_per_s)}",
        remedy="test this machine's memory" if num_wrong else "",
    )


def imported(name: str, *, limit_s: float) -> dict[str, object]:
    """Version and more of a package, imported by a process of its own.

    Raises:
        RuntimeError: with the last line of what Python said.
    """
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, name], capture_output=True, text=True, timeout=limit_s, check=False
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise RuntimeError(said[-1] if said else f"exit status {done.returncode}")
    told: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return told


def show(findings: list[Finding]) -> None:
    """A table on a terminal, else a line a finding."""
    if not sys.stdout.isatty():
        for finding in findings:
            remedy = f"; {finding.remedy}" if finding.remedy else ""
            print(f"{finding.level.name:<8} {finding.topic:<9} {finding.found}{remedy}")
        print(wrong(findings))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("topic", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("what to do", overflow="fold")
    for finding in findings:
        style = LEVEL_STYLES[finding.level]
        table.add_row(
            Text(finding.level.name, style=style), finding.topic, Text(finding.found), Text(finding.remedy)
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(wrong(findings))


def _ok(topic: str, found: str) -> Finding:
    return Finding(level=Level.ok, topic=topic, host="", found=found)
