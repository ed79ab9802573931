"""A Slurm of its own with virtual nodes on this machine, and drills on it that run side by side.

The nodes are named by addresses of the loopback device, 127.0.0.2 and on: a name that every program can look
up without a line in /etc/hosts. Daemons listen on loopback only. One such cluster at a time on a machine.

A drill is a function that submits, does its harm, waits and returns what a test looks at. The drills of all
tests of a session start together; their jobs share the nodes as jobs of several people would.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from data_folder import write_data_folder
from slurm_cluster import daemon, free_ports, slurm, wait_until, why_not

NUM_NODES = 8
"""Each is full with one rank of a job's: killing one harms nobody else."""
BAD_ENDS = {"CANCELLED", "FAILED", "TIMEOUT"}
ASK_EVERY_S = 1.0
"""Drills are many, and each question is a process."""
NODE_MARK = "VIRTUAL_NODE"
LOCK = Path(tempfile.gettempdir()) / "llmtrain-test-slurm.lock"

CONF = """\
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=0,batch_sched_delay=0,bf_interval=2,bf_resolution=1
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=10
MinJobAge=3600
CompleteWait=0
SlurmctldTimeout=10
SlurmdTimeout=15
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=24:00:00 State=UP
"""


@dataclass
class Cluster:
    folder: Path
    environment: dict[str, str]
    slurmds: dict[str, ExitStack] = field(default_factory=dict)
    is_over: threading.Event = field(default_factory=threading.Event)
    """Set when the session ends: drills that still wait give up."""

    def ask(self, *command: str) -> str:
        return slurm(self.environment, *command)

    def start_node(self, name: str) -> None:
        """Start a node's daemon. By NODE_MARK in their environment its children are known."""
        stack = ExitStack()
        command = ["slurmd", "-D", "-N", name]
        mark = {NODE_MARK: self.mark_of(name)}
        stack.enter_context(daemon(self.folder, f"slurmd-{name}", command, self.environment | mark))
        self.slurmds[name] = stack

    def mark_of(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def kill_node(self, name: str) -> None:
        """As a machine that loses its power: its daemon, its steps, and every process of a job on it."""
        ours = f"SLURM_CONF={self.folder}/slurm.conf".encode()
        marks = (f"{NODE_MARK}={self.mark_of(name)}".encode(), f"SLURMD_NODENAME={name}".encode())
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                variables = (process / "environ").read_bytes().split(b"\0")
                if ours in variables and any(mark in variables for mark in marks):
                    os.kill(int(process.name), signal.SIGKILL)
        self.slurmds.pop(name).close()

    def facts(self, job: int | str) -> list[dict[str, str]]:
        """What Slurm says of a job, of each task of an array. A busy controller is asked again."""
        for _ in range(60):
            if lines := self.ask("scontrol", "show", "job", "-o", str(job)).splitlines():
                return [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines]
            time.sleep(ASK_EVERY_S)
        raise AssertionError(f"Slurm does not know job {job}, or does not answer")

    def states(self, job: int | str) -> list[str]:
        return [facts["JobState"] for facts in self.facts(job)]

    def wait_until(self, claim: Callable[[], bool], *, within_s: float = 600.0) -> None:
        deadline = time.monotonic() + within_s
        while not claim():
            assert time.monotonic() < deadline, f"not within {within_s:.0f} s"
            assert not self.is_over.wait(ASK_EVERY_S), "the session is over"

    def wait_for(self, job: int | str, *states: str, within_s: float = 600.0) -> None:
        """Return once every task of the job is in one of `states`, or say where it hangs."""

        def is_there() -> bool:
            found = set(self.states(job))
            assert not found & BAD_ENDS - set(states)
            return found <= set(states)

        try:
            self.wait_until(is_there, within_s=within_s)
        except AssertionError:
            logs = "\n".join(
                f"== {path}\n{path.read_text()[-3000:]}" for path in self.logs_of(job) if path.exists()
            )
            raise AssertionError(f"job {job} is {self.states(job)}, not {states}\n{logs}") from None

    def logs_of(self, job: int | str) -> list[Path]:
        outputs = {Path(facts["StdOut"]) for facts in self.facts(job)}
        return sorted(path for output in outputs for path in output.parent.glob("*.out"))


@contextmanager
def virtual_cluster(folder: Path) -> Iterator[Cluster]:
    """Slurm's daemons as children of this process, all of their files in `folder`."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    ports = free_ports(NUM_NODES + 1)
    host = socket.gethostname().partition(".")[0]
    names = [f"127.0.0.{number + 1}" for number in range(1, NUM_NODES + 1)]
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=8000 "
        "State=UNKNOWN"
        for name, port in zip(names, ports[1:], strict=True)
    )
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, ports=ports, host=host, nodes=nodes))
    cluster = Cluster(folder, {"SLURM_CONF": str(folder / "slurm.conf")})
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.sock"]
    munge += [f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munge.seed"]
    with ExitStack() as stack:
        stack.enter_context(daemon(folder, "munged", munge, cluster.environment))
        wait_until(lambda: (folder / "munge.sock").exists())
        stack.enter_context(daemon(folder, "slurmctld", ["slurmctld", "-D"], cluster.environment))
        for name in names:
            cluster.start_node(name)
        stack.callback(lambda: [node.close() for node in cluster.slurmds.values()])
        wait_until(lambda: cluster.ask("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * NUM_NODES)
        stack.callback(lambda: wait_until(lambda: not cluster.ask("squeue", "-h")))
        stack.callback(cluster.ask, "scancel", "--user=root")
        yield cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Skips where there can be no Slurm; waits for another session's cluster to end."""
    if reason := why_not():
        pytest.skip(f"no Slurm of our own: {reason}")
    with open(LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with virtual_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
            yield cluster


Drill = Callable[[Cluster, Path, Path], Any]
"""Takes the cluster, a data folder, and an empty folder of its own."""


@pytest.fixture(scope="session")
def drills(
    request: pytest.FixtureRequest, cluster: Cluster, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Drill, Future[Any]]]:
    """Those of the tests that are selected, started."""
    wanted = dict.fromkeys(
        each
        for item in request.session.items
        if hasattr(item, "callspec")
        for each in item.callspec.params.get("drill", ())
    )
    with ThreadPoolExecutor(max_workers=len(wanted)) as pool:
        yield {
            drill: pool.submit(drill, cluster, data, tmp_path_factory.mktemp(drill.__name__))
            for drill in wanted
        }
        cluster.is_over.set()
        cluster.ask("scancel", "--user=root")  # what a drill that failed left


@pytest.fixture
def drill(request: pytest.FixtureRequest, drills: dict[Drill, Future[Any]]) -> Any:
    """What each drill that the test names returned, once it has."""
    return [drills[each].result() for each in request.param]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_folder(tmp_path_factory.mktemp("data"))
