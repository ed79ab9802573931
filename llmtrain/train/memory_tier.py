"""Snapshots in the memory of the hosts: what a process that dies leaves to the one that takes its place.

Each host keeps the files of its ranks and the whole manifest in a folder of its own, by default in /dev/shm,
which outlives processes. A start takes a snapshot in place of the newest checkpoint on the disk if it is
newer, if the attempt just before wrote it or began with it, and if every file is whole on some host.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import secrets
import shutil
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR
from typing import Any

from llmtrain.checkpoint import storage
from llmtrain.checkpoint.find import clean, list_checkpoints, remove
from llmtrain.checkpoint.format import MARKER_FILE, folder_name
from llmtrain.checkpoint.peers import PeerFileSystem, Server, own_address
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.checkpoint.storage import Place
from llmtrain.checkpoint.write import Ranks
from llmtrain.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

Gather = Callable[[object], list[Any]]


def folder_in(root: Path, run_folder: Path) -> Path:
    """Of a run, made if it is not there.

    Raises:
        OSError: `root` cannot be written, or something of that name there is not this user's folder alone.
    """
    name = hashlib.sha256(str(run_folder.absolute()).encode()).hexdigest()[:16]
    folder = root / f"llmtrain-{os.getuid()}-{name}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(errno.EPERM, "is no folder that you alone may open; remove it", str(folder))
    return folder


@dataclass(frozen=True)
class Snapshot:
    """What a start may go on from."""

    path: Path
    """On this host."""
    places: dict[str, Place]
    """Its files that only other hosts have."""

    def open(self) -> CheckpointReader:
        return CheckpointReader(self.path, elsewhere=self.places)


class MemoryTier:
    """One a rank; every rank makes one and calls its methods together."""

    def __init__(self, folder: Path, *, rank: int, gather: Gather) -> None:
        """
        Args:
            folder: of this run alone, in memory; ranks of one host see the same.
            gather: given a JSON value, every rank's.
        """
        self.folder = folder
        self._rank, self._gather = rank, gather
        stat = folder.stat()
        hosts = gather([socket.gethostname(), stat.st_dev, stat.st_ino])
        self._leaders = [hosts.index(host) for host in hosts]
        self._leader = self._leaders[rank]

    def ranks(self, gather: Callable[[object], list[object]]) -> Ranks:
        """Who saves snapshots together."""
        return Ranks(self._rank, len(self._leaders), gather, leader=self._leader)

    def lacks_room(self, num_bytes: int) -> str | None:
        """The same on all ranks: why two snapshots, of `num_bytes` on all ranks together, do not fit."""
        own = (path.stat().st_blocks * 512 for path in self.folder.rglob("*"))
        free = shutil.disk_usage(self.folder).free + sum(own) if self._is_leader else 0
        found = self._gather([socket.gethostname(), free])
        for leader in sorted(set(self._leaders)):
            host, free = found[leader]
            need = 2 * num_bytes * self._leaders.count(leader) // len(self._leaders)
            if free < need:
                return f"{self.folder} on {host} has {free:,} bytes free, and two snapshots take {need:,}"
        return None

    def newest(
        self, *, after: int, is_ours: Callable[[CheckpointReader], bool], stack: ExitStack
    ) -> Snapshot | None:
        """The newest snapshot of a step `after` that `is_ours` and whole. Others go: the run goes on without.

        Args:
            is_ours: asked on rank 0; raises ConfigError for a snapshot that is, but does not fit.
            stack: closes what other hosts read from, when they have.

        Raises:
            ConfigError: on every rank; the snapshot stays.
        """
        own = self._look(after) if self._is_leader else None
        looks = {rank: look for rank, look in enumerate(self._gather(own)) if look is not None}
        step = _common(looks)
        if step is not None:
            files = {rank: look[str(step)]["files"] for rank, look in looks.items()}
            places = self._serve(folder_name(step), files, stack)
            snapshot = Snapshot(self.folder / folder_name(step), places)
            verdicts = self._gather(self._judge(snapshot, files, is_ours))
            for kind, text in filter(None, verdicts):
                if kind == "refused":
                    raise ConfigError(text)
            if not any(verdicts):
                self._clear(but=step)
                return snapshot
        self._clear(but=None)
        return None

    def forget(self) -> None:
        """The run goes back further than any snapshot; every rank calls this."""
        self._clear(but=None)

    def leave(self) -> None:
        """At the end of a run: nothing of it stays in memory."""
        if self._is_leader:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _is_leader(self) -> bool:
        return self._rank == self._leader

    def _look(self, after: int) -> dict[str, Any]:
        """By step: hash of the manifest, and the files that are here."""
        found: dict[str, Any] = {}
        for step in list_checkpoints(self.folder):
            path = self.folder / folder_name(step)
            if step > after:
                with suppress(CheckpointError):
                    told = storage.read_bytes(path / MARKER_FILE).decode(errors="replace")
                    found[str(step)] = {"marker": told, "files": storage.names(path)}
        return found

    def _serve(self, name: str, files: dict[int, list[str]], stack: ExitStack) -> dict[str, Place]:
        """Where this host finds the files that it does not have."""
        everything = set().union(*files.values())
        if all(everything == set(of_host) for of_host in files.values()):
            return {}
        url = None
        PeerFileSystem.key = self._gather(secrets.token_hex(32))[0].encode()
        address = self._own_address()
        if self._is_leader and address is not None:
            with suppress(OSError):  # the others do not find the files then, and the snapshot is not used
                server = Server(self.folder / name, host=address, key=PeerFileSystem.key)
                stack.callback(server.close)
                url = server.url.text
        urls = self._gather(url)
        here = files[self._leader]
        return {
            file: storage.Url(urls[rank]) / file
            for rank, of_host in files.items()
            for file in of_host
            if file not in here and urls[rank] is not None
        }

    def _own_address(self) -> str | None:
        """Where the others reach this host. The one that the ranks meet on may call itself 127.0.1.1."""

        def on_the_way_to(peer: str) -> str | None:
            try:
                return own_address(peer)
            except OSError:
                return None

        own = on_the_way_to(os.environ.get("MASTER_ADDR", "127.0.0.1"))
        others = [address for address in self._gather(own) if address and not address.startswith("127.")]
        if others and own is not None and own.startswith("127."):
            return on_the_way_to(others[0])
        return own

    def _judge(
        self, snapshot: Snapshot, files: dict[int, list[str]], is_ours: Callable[[CheckpointReader], bool]
    ) -> tuple[str, str] | None:
        """Why it cannot be used, in a word and a sentence; each host compares its own files with their
        hashes."""
        if not self._is_leader:
            return None
        try:
            reader = snapshot.open()
            for at, (path, _, _) in enumerate(reader.files()):
                if path.name in files[self._rank]:
                    for problem in reader.problems_of(at):
                        raise CheckpointError(problem)
            if self._rank == 0 and not is_ours(reader):
                return "not ours", ""
        except ConfigError as error:
            return "refused", str(error)
        except CheckpointError as error:
            log.warning("not using the snapshot in memory: %s", error)
            return "damaged", str(error)
        return None

    def _clear(self, *, but: int | None) -> None:
        if self._is_leader:
            clean(self.folder)
            for step in list_checkpoints(self.folder):
                if step != but:
                    remove(self.folder / folder_name(step))
        self._gather(None)


def _common(looks: dict[int, dict[str, Any]]) -> int | None:
    """The newest step that every host has with the same manifest."""
    first = next(iter(looks.values()))
    for step in sorted(first, key=int, reverse=True):
        if all(look.get(step, {}).get("marker") == first[step]["marker"] for look in looks.values()):
            return int(step)
    return None
