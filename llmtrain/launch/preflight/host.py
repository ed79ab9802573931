"""What a rank and a host say of themselves before a run: code, names and addresses, storage, limits.

Nothing here judges; `judge.py` does. Whatever may hang, as a dead file system or name server does, is
asked in a thread that can be left behind.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import platform
import resource
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import psutil

import llmtrain
from llmtrain.files import hash_file
from llmtrain.launch.preflight.gpus import Gpus, list_gpus

PACKAGES = ("torch", "deepspeed", "accelerate", "numpy")
"""Whose versions must be the same everywhere."""
BLOCK_BYTES = 1 << 20
SHARED_MEMORY = Path("/dev/shm")
SOCKET_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
INFINIBAND = Path("/sys/class/infiniband")
TOKEN_WAIT_S = 3.0
"""How long a shared file system may take to show a new file."""
MAX_LISTED = 64
"""Files of a data folder that are looked at for one to read."""


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """What Slurm says of the processes that it started."""

    nodes: int
    tasks: int | None
    """Of the step; None where no srun started this process."""
    node: str | None
    """This one's name in Slurm."""

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Scheduler | None:
        """None outside a job."""
        nodes = environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_NNODES")
        if nodes is None or not nodes.isdecimal():
            return None
        tasks = environ.get("SLURM_STEP_NUM_TASKS", "")
        return cls(
            nodes=int(nodes),
            tasks=int(tasks) if tasks.isdecimal() else None,
            node=environ.get("SLURMD_NODENAME"),
        )


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank runs, as its launcher and the system say."""

    host: str
    machine: str
    """The same for all processes that reach each other over loopback."""
    rank: int
    world_size: int
    local_rank: int | None
    local_world_size: int | None
    agent: str | None
    """Number of the torchrun that started it."""
    has_launcher: bool
    """Whether somebody said how many ranks there are."""
    master_addr: str | None
    agent_keeps_store: bool
    """Whether torchrun, not rank 0, listens at MASTER_ADDR."""
    scheduler: Scheduler | None

    @classmethod
    def here(cls, environ: Mapping[str, str]) -> Place:
        def number(name: str) -> int | None:
            return int(environ[name]) if environ.get(name, "").isdecimal() else None

        scheduler = Scheduler.of(environ)
        return cls(
            host=(scheduler and scheduler.node) or socket.gethostname(),
            machine=_machine(),
            rank=number("RANK") or 0,
            world_size=number("WORLD_SIZE") or 1,
            local_rank=number("LOCAL_RANK"),
            local_world_size=number("LOCAL_WORLD_SIZE"),
            agent=environ.get("GROUP_RANK"),
            has_launcher="WORLD_SIZE" in environ,
            master_addr=environ.get("MASTER_ADDR"),
            agent_keeps_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            scheduler=scheduler,
        )


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """A name, resolved."""

    name: str
    addresses: tuple[str, ...]
    seconds: float
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Network:
    """Interfaces and names of a host."""

    interfaces: dict[str, tuple[str, ...]]
    """Addresses of those that are up."""
    own: Lookup
    """The host's own name."""
    master: Lookup | None
    """MASTER_ADDR, if there is one."""
    chosen: dict[str, str]
    """SOCKET_VARIABLES that are set."""

    @property
    def addresses(self) -> set[str]:
        """That other hosts could reach."""
        every = {address for of_one in self.interfaces.values() for address in of_one}
        return {address for address in every if not is_loopback(address)}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Bytes moved, and the seconds that it took; flushed to the device when written."""

    num_bytes: int
    seconds: float

    @property
    def bytes_per_s(self) -> float:
        return self.num_bytes / max(self.seconds, 1e-9)


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder that the run writes to, or where it will be made."""

    setting: str
    path: str
    looked_at: str
    """The nearest folder that exists."""
    free_bytes: int
    free_inodes: int | None
    """None where the file system counts none."""
    is_writable: bool = True
    sees_token: bool | None = None
    """Whether the file that rank 0 wrote is here; None: nobody asked."""
    write: Speed | None = None
    read: Speed | None = None


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data folder."""

    setting: str
    path: str
    manifest_hash: str | None
    """Of manifest.json; None: there is none."""
    tokenizer: str | None
    """Its fingerprint; None where the manifest does not tell."""
    read: Speed | None = None


@dataclass(frozen=True, kw_only=True)
class Host:
    """A host's answer."""

    network: Network | None
    """None: nobody asked, or no answer."""
    folders: list[Folder]
    data: list[Data]
    gpus: Gpus | None
    """None: nobody asked."""
    free_shared_memory_bytes: int | None
    free_memory_bytes: int
    num_cores: int
    """That this process may use."""
    max_locked_bytes: int | None
    """None: any number."""
    has_infiniband: bool
    failures: dict[str, str] = field(default_factory=dict)
    """What could not be found out, and why."""


@dataclass(frozen=True, kw_only=True)
class Token:
    """A file that rank 0 wrote, which all hosts must see."""

    folder: str
    name: str
    content: str


@dataclass(frozen=True, kw_only=True)
class FolderAsked:
    setting: str
    path: Path
    token: Token | None
    measured_bytes: int
    """To write, and to read back; 0: no measurement."""


def ask_host(
    folders: Sequence[FolderAsked],
    data: Mapping[str, Path],
    *,
    environ: Mapping[str, str] | None,
    asks_gpus: bool,
    read_bytes: int,
    measured_s: float,
    limit_s: float,
) -> Host:
    """This host's answer, within `limit_s` and a little.

    Args:
        data: data folders by setting.
        environ: what names the network's hosts; None: no question about names.
        read_bytes: of a shard of each; 0: no measurement.
        measured_s: the longest that one measurement of a speed may take before its flush.
    """
    questions: dict[str, Callable[[], Any]] = {}
    if environ is not None:
        questions["names and addresses"] = partial(ask_network, environ)
    if asks_gpus:
        questions["GPUs"] = partial(list_gpus, limit_s=limit_s)
    for each in folders:
        questions[f"{each.setting}={each.path}"] = _asked(each, measured_s)
    for setting, path in data.items():
        questions[f"{setting}={path}"] = _asked_data(setting, path, read_bytes, measured_s)
    answers, failures = within(limit_s, questions)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return Host(
        network=answers.get("names and addresses"),
        folders=[answer for answer in answers.values() if isinstance(answer, Folder)],
        data=[answer for answer in answers.values() if isinstance(answer, Data)],
        gpus=answers.get("GPUs"),
        free_shared_memory_bytes=shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None,
        free_memory_bytes=psutil.virtual_memory().available,
        num_cores=len(os.sched_getaffinity(0)),
        max_locked_bytes=None if locked == resource.RLIM_INFINITY else locked,
        has_infiniband=INFINIBAND.is_dir() and any(INFINIBAND.iterdir()),
        failures=failures,
    )


def within(
    limit_s: float, questions: Mapping[str, Callable[[], Any]]
) -> tuple[dict[str, Any], dict[str, str]]:
    """(answers, failures), each by question, of all at once. Who does not answer in time is left behind."""
    answers: dict[str, Any] = {}
    failures: dict[str, str] = {}

    def ask(name: str, question: Callable[[], Any]) -> None:
        try:
            answers[name] = question()
        except Exception as error:  # whatever it is, the others answer; it is reported
            failures[name] = f"{type(error).__name__}: {error}"

    threads = {
        name: threading.Thread(target=ask, args=(name, question), name=f"preflight: {name}", daemon=True)
        for name, question in questions.items()
    }
    end = time.monotonic() + limit_s
    for thread in threads.values():
        thread.start()
    for name, thread in threads.items():
        thread.join(max(0.0, end - time.monotonic()))
        if thread.is_alive():
            failures[name] = f"no answer in {limit_s:g} s"
    for name in failures:
        answers.pop(name, None)
    return {name: answers[name] for name in questions if name in answers}, dict(failures)


def ask_network(environ: Mapping[str, str]) -> Network:
    up = {name: state.isup for name, state in psutil.net_if_stats().items()}
    families = (socket.AF_INET, socket.AF_INET6)
    interfaces = {
        name: tuple(entry.address.partition("%")[0] for entry in entries if entry.family in families)
        for name, entries in psutil.net_if_addrs().items()
        if up.get(name, True)
    }
    master = environ.get("MASTER_ADDR")
    return Network(
        interfaces=interfaces,
        own=look_up(socket.gethostname()),
        master=look_up(master) if master else None,
        chosen={name: environ[name] for name in SOCKET_VARIABLES if environ.get(name)},
    )


def look_up(name: str) -> Lookup:
    """As gloo and NCCL do, in the system's order."""
    started = time.monotonic()
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return Lookup(name=name, addresses=(), seconds=time.monotonic() - started, error=str(error))
    addresses = dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found)
    return Lookup(name=name, addresses=tuple(addresses), seconds=time.monotonic() - started)


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def code_hashes() -> dict[str, str]:
    """sha256 of every file of the llmtrain package, by its path there."""
    package = Path(llmtrain.__file__).resolve().parent
    return {path.relative_to(package).as_posix(): hash_file(path) for path in sorted(package.rglob("*.py"))}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def max_open_files() -> int:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def write_token(folder: Path) -> Token:
    """Write a file for the others to find, where `folder` is or will be. Whoever wrote it deletes it."""
    there = existing(folder)
    token = Token(folder=str(there), name=f".preflight-{os.urandom(6).hex()}", content=os.urandom(16).hex())
    with open(there / token.name, "x", encoding="utf-8") as handle:
        handle.write(token.content)
        handle.flush()
        os.fsync(handle.fileno())
    return token


def remove_token(token: Token) -> None:
    Path(token.folder, token.name).unlink(missing_ok=True)


def sees(token: Token, folder: Path, *, wait_s: float = TOKEN_WAIT_S) -> bool:
    """Whether the file is in `folder`, or appears there in time."""
    end = time.monotonic() + wait_s
    while True:
        try:
            return (folder / token.name).read_text(encoding="utf-8") == token.content
        except (FileNotFoundError, NotADirectoryError):
            if time.monotonic() > end:
                return False
            time.sleep(0.05)


def measure_storage(folder: Path, *, num_bytes: int, limit_s: float) -> tuple[Speed, Speed]:
    """Speeds of writing with a flush at the end, and of reading it back past this host's cache where the
    system lets go of it. The file has no name, so that nothing stays whoever is killed."""
    path = folder / f".preflight-{os.urandom(6).hex()}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        path.unlink()
        block = os.urandom(min(num_bytes, BLOCK_BYTES))
        started, written = time.monotonic(), 0
        while written < num_bytes and (not written or time.monotonic() - started < limit_s):
            written += os.write(descriptor, block[: num_bytes - written])
        os.fsync(descriptor)
        write = Speed(num_bytes=written, seconds=time.monotonic() - started)
        return write, _read(descriptor, start=0, num_bytes=written, limit_s=limit_s)
    finally:
        os.close(descriptor)


def measure_reading(path: Path, *, num_bytes: int, limit_s: float) -> Speed:
    """Of a part of a file; another one on each host, or a server would read it once for all."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        num_blocks = max(1, (size - num_bytes) // BLOCK_BYTES + 1)
        seed = hashlib.sha256(socket.gethostname().encode()).digest()
        start = int.from_bytes(seed[:8], "little") % num_blocks * BLOCK_BYTES
        return _read(descriptor, start=start, num_bytes=min(num_bytes, size - start), limit_s=limit_s)
    finally:
        os.close(descriptor)


def _read(descriptor: int, *, start: int, num_bytes: int, limit_s: float) -> Speed:
    os.posix_fadvise(descriptor, start, num_bytes, os.POSIX_FADV_DONTNEED)
    started, at = time.monotonic(), 0
    while at < num_bytes and (not at or time.monotonic() - started < limit_s):
        block = os.pread(descriptor, min(BLOCK_BYTES, num_bytes - at), start + at)
        if not block:
            break
        at += len(block)
    return Speed(num_bytes=at, seconds=time.monotonic() - started)


def _asked(folder: FolderAsked, limit_s: float) -> Callable[[], Folder]:
    def answer() -> Folder:
        there = existing(folder.path)
        system = os.statvfs(there)
        write = read = None
        is_writable = there.is_dir() and os.access(there, os.W_OK)
        if is_writable and folder.measured_bytes:
            num_bytes = min(folder.measured_bytes, system.f_bavail * system.f_frsize // 2)
            if num_bytes:
                write, read = measure_storage(there, num_bytes=num_bytes, limit_s=limit_s)
        return Folder(
            setting=folder.setting,
            path=str(folder.path),
            looked_at=str(there),
            free_bytes=system.f_bavail * system.f_frsize,
            free_inodes=system.f_favail if system.f_files else None,
            is_writable=is_writable,
            sees_token=None if folder.token is None else sees(folder.token, there),
            write=write,
            read=read,
        )

    return answer


def _asked_data(setting: str, path: Path, num_bytes: int, limit_s: float) -> Callable[[], Data]:
    def answer() -> Data:
        manifest = path / "manifest.json"
        if not manifest.is_file():
            return Data(setting=setting, path=str(path), manifest_hash=None, tokenizer=None)
        try:
            told = json.loads(manifest.read_text(encoding="utf-8"))
            shards, tokenizer = path / told["shards"]["folder"], str(told["tokenizer"]["fingerprint"])
        except (ValueError, KeyError, TypeError):  # of another version, or damaged: said when it is opened
            return Data(setting=setting, path=str(path), manifest_hash=hash_file(manifest), tokenizer=None)
        tokens = _some_tokens(shards) if num_bytes else None
        return Data(
            setting=setting,
            path=str(path),
            manifest_hash=hash_file(manifest),
            tokenizer=tokenizer,
            read=None if tokens is None else measure_reading(tokens, num_bytes=num_bytes, limit_s=limit_s),
        )

    return answer


def _some_tokens(folder: Path) -> Path | None:
    """The largest of the first files of tokens."""
    with os.scandir(folder) as entries:
        sizes = {
            entry.path: entry.stat().st_size for entry in islice(entries, MAX_LISTED) if ".bin" in entry.name
        }
    return Path(max(sizes, key=lambda path: sizes[path])) if sizes else None


def _machine() -> str:
    """The kernel's start and the network's name space: containers and virtual hosts differ in the second."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = socket.gethostname()
    try:
        return f"{boot} {os.readlink('/proc/self/ns/net')}"
    except OSError:
        return boot
