"""Hosts of their own on this machine: a network namespace each, joined by a switch in one more.

Each has an address, a host name, a hosts file and a loopback of its own, and shares the disk with the
others. The machine's own network is neither used nor changed. Needs root and iproute2, else tests skip.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil
import pytest
from data_folder import write_data_folder

REPOSITORY = Path(__file__).resolve().parents[2]
PREFIX = "llmtrain-"
SUBNET = "10.78.0"
PROGRAMS = ("ip", "tc", "nsenter", "unshare")
ENTER = """
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
shift 2
exec "$@"
"""


def why_not() -> str | None:
    """Why there can be no hosts here, or None."""
    if os.geteuid() != 0:
        return "namespaces need root"
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        return f"no {', '.join(missing)}: install iproute2 and util-linux"
    done = subprocess.run(["unshare", "--net", "--mount", "--uts", "true"], capture_output=True, check=False)
    return None if done.returncode == 0 else "this machine gives us no namespaces"


class Hosts:
    """Hosts a, b, ... with addresses SUBNET.1, SUBNET.2, ..."""

    def __init__(self, folder: Path, names: str) -> None:
        self.folder, self.names = folder, names
        self._own = f"{PREFIX}{os.getpid()}-{time.monotonic_ns() % 10**9}"
        self.processes: list[Launched] = []

    def space(self, name: str) -> str:
        return f"{self._own}-{name}"

    def set_up(self) -> None:
        addresses = [f"{SUBNET}.{number} {name}" for number, name in enumerate(self.names, start=1)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *addresses, ""]))
        (self.folder / "nsswitch.conf").write_text("hosts: files\n")  # a name server's silence costs 10 s
        switch = self.space("switch")
        run("ip", "netns", "add", switch)
        run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", switch, "link", "set", "bridge", "up")
        for number, name in enumerate(self.names, start=1):
            space = self.space(name)
            run("ip", "netns", "add", space)
            port = ["peer", "name", "eth0", "netns", space]
            run("ip", "-n", switch, "link", "add", f"port-{name}", "type", "veth", *port)
            run("ip", "-n", switch, "link", "set", f"port-{name}", "master", "bridge", "up")
            run("ip", "-n", space, "addr", "add", f"{SUBNET}.{number}/24", "dev", "eth0")
            run("ip", "-n", space, "link", "set", "eth0", "up")
            run("ip", "-n", space, "link", "set", "lo", "up")

    def tear_down(self) -> None:
        for name in self.names:
            self.kill(name)
        for launched in self.processes:
            launched.process.wait()
            launched.log.close()
        for name in (*self.names, "switch"):
            subprocess.run(["ip", "netns", "del", self.space(name)], capture_output=True, check=False)

    def link(self, name: str, state: str) -> None:
        """The cable of a host: "up" or "down"."""
        run("ip", "-n", self.space("switch"), "link", "set", f"port-{name}", state)

    def slow(self, name: str, rate: str) -> None:
        """Bound what a host sends."""
        shape = ["root", "tbf", "rate", rate, "burst", "32kbit", "latency", "400ms"]
        run("tc", "-n", self.space(name), "qdisc", "add", "dev", "eth0", *shape)

    def kill(self, name: str) -> None:
        """As a machine that loses its power: every process of it."""
        found = subprocess.run(
            ["ip", "netns", "pids", self.space(name)], capture_output=True, text=True, check=False
        )
        for pid in map(int, found.stdout.split()):
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def start(self, name: str, script: str, *arguments: str, **environment: str) -> Launched:
        """Run a script of launch/ on a host, with one rank, at the meeting point host a, port 29500."""
        own = {
            "NPROC": "1",
            "MASTER_ADDR": self.names[0],
            "MASTER_PORT": "29500",
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        enter = ["nsenter", f"--net=/run/netns/{self.space(name)}", "unshare", "--mount", "--uts"]
        log = self.folder / f"{name}{len(self.processes)}.log"
        launched = Launched(
            name,
            log.open("w+"),
            [*enter, "sh", "-c", ENTER, "sh", name, self.folder, REPOSITORY / "launch" / script, *arguments],
            os.environ | own | environment,
        )
        self.processes.append(launched)
        return launched


class Launched:
    """A launch script on a host."""

    def __init__(self, host: str, log: IO[str], command: list[object], environment: dict[str, str]) -> None:
        self.host, self.log = host, log
        self.process = subprocess.Popen(
            list(map(str, command)), env=environment, stdout=log, stderr=subprocess.STDOUT
        )

    @property
    def text(self) -> str:
        return Path(self.log.name).read_text()

    def wait(self, *, within_s: float) -> int:
        """Its exit status."""
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self.host} has not ended within {within_s:g} s:\n{self.text[-3000:]}"
            ) from None

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def remove_left_overs() -> None:
    """Namespaces of test sessions that were killed before they could remove them."""
    for path in Path("/run/netns").glob(f"{PREFIX}*"):
        if not psutil.pid_exists(int(path.name.split("-")[1])):
            subprocess.run(["ip", "netns", "del", path.name], capture_output=True, check=False)


@pytest.fixture(scope="session")
def make_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Hosts]]:
    """Hosts by the letters of a word: make_hosts("ab")."""
    if reason := why_not():
        pytest.skip(f"no hosts of our own: {reason}")
    remove_left_overs()
    made: list[Hosts] = []

    def make(names: str) -> Hosts:
        hosts = Hosts(tmp_path_factory.mktemp("hosts"), names)
        made.append(hosts)
        hosts.set_up()
        return hosts

    try:
        yield make
    finally:
        for hosts in made:
            hosts.tear_down()


@pytest.fixture
def hosts(make_hosts: Callable[[str], Hosts]) -> Iterator[Hosts]:
    """Two of them, a and b."""
    two = make_hosts("ab")
    yield two
    two.tear_down()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_folder(tmp_path_factory.mktemp("data"))
