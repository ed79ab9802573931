"""A Slurm of its own on this machine, for tests: `with slurm_cluster(folder, num_nodes=2) as environment`.

Controller, node daemons and munge run as children of this process, with their keys, ports, state and logs in
one folder, and are ended by their ids. Nothing of a Slurm that is installed for real is read or changed.
Needs root (a node daemon starts jobs as their users) and Debian's packages slurm-wlm and munge, which are
installed when they are missing.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
PACKAGES = ("slurm-wlm", "munge")
START_S = 60.0

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
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
SchedulerParameters=sched_interval=5,sched_min_interval=0,batch_sched_delay=0,bf_interval=2,bf_resolution=1
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=5
CompleteWait=0
SlurmctldTimeout=10
SlurmdTimeout=10
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=24:00:00 State=UP
"""


def why_not() -> str | None:
    """Why there can be no Slurm here, or None. Installs the packages when that is all that is missing."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    if missing() and shutil.which("apt-get"):
        options = ["--yes", "--no-install-recommends", "-o", "Dpkg::Options::=--force-confold"]
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", *options, *PACKAGES]):
            subprocess.run(["apt-get", "-qq", *command], env=environment, capture_output=True, check=False)
    return f"no {', '.join(missing())}: install {' '.join(PACKAGES)}" if missing() else None


def missing() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program) is None]


@contextmanager
def slurm_cluster(folder: Path, *, num_nodes: int, cpus: int = 4) -> Iterator[dict[str, str]]:
    """Yield the environment in which Slurm's commands find this cluster, when all nodes are idle."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    ports = free_ports(num_nodes + 1)
    host = socket.gethostname().partition(".")[0]
    nodes = "\n".join(
        f"NodeName=node{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[number]} CPUs={cpus} "
        "RealMemory=8000 State=UNKNOWN"
        for number in range(1, num_nodes + 1)
    )
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, ports=ports, host=host, nodes=nodes))
    environment = {"SLURM_CONF": str(folder / "slurm.conf")}
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.sock"]
    munge += [f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munge.seed"]
    with ExitStack() as stack:
        stack.enter_context(daemon(folder, "munged", munge, environment))
        wait_until(lambda: (folder / "munge.sock").exists())
        stack.enter_context(daemon(folder, "slurmctld", ["slurmctld", "-D"], environment))
        for number in range(1, num_nodes + 1):
            name = f"node{number}"
            stack.enter_context(daemon(folder, f"slurmd-{name}", ["slurmd", "-D", "-N", name], environment))
        wait_until(
            lambda: slurm(environment, "sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * num_nodes
        )
        stack.callback(end_jobs, environment)
        yield environment


@contextmanager
def daemon(folder: Path, name: str, command: list[str], environment: dict[str, str]) -> Iterator[None]:
    with open(folder / f"{name}.log", "wb") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(START_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def slurm(environment: dict[str, str], *command: str) -> str:
    """What a command of Slurm says; nothing when it fails, as it does while the controller starts."""
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    return done.stdout


def end_jobs(environment: dict[str, str]) -> None:
    slurm(environment, "scancel", "--user=root")
    wait_until(lambda: not slurm(environment, "squeue", "-h"))


def wait_until(claim: Callable[[], bool], *, within_s: float = START_S) -> None:
    deadline = time.monotonic() + within_s
    while not claim():
        assert time.monotonic() < deadline, f"not within {within_s:.0f} s"
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
