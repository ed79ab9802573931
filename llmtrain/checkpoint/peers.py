"""Files of a folder that only one host sees, read by others: `peer://HOST:PORT/NAME`.

For snapshots in memory after a restart: each host has the files of its own ranks, and a rank needs pieces
that ranks of another host wrote. Who reads must know the key; what is served is one folder, read-only, for as
long as the loading takes.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.spec import AbstractFileSystem

from llmtrain.checkpoint.storage import Url

PROTOCOL = "peer"
ANSWER_S = 60.0
"""Seconds that a request may take."""
ACCEPT_PAUSE_S = 0.05


class Server:
    """Answers requests for the files of a folder, in threads of its own, until it is closed."""

    def __init__(self, folder: Path, *, host: str, key: bytes) -> None:
        """
        Args:
            host: the address of this host that the others reach.
        """
        self._folder = folder
        self._key = key
        self._listener = Listener((host, 0), backlog=128)
        address = self._listener.address
        assert isinstance(address, tuple), "of a host and a port"
        self.url = Url(f"{PROTOCOL}://{host}:{address[1]}")
        """Of the folder."""
        self._is_open = True
        threading.Thread(target=self._accept, name="peers", daemon=True).start()

    def close(self) -> None:
        self._is_open = False
        with suppress(OSError):  # wakes the thread that waits for the next one
            Client(self._listener.address).close()
        self._listener.close()

    def _accept(self) -> None:
        while self._is_open:
            try:
                connection = self._listener.accept()
            except OSError:  # who went away; a closed listener
                time.sleep(ACCEPT_PAUSE_S)
                continue
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: Connection) -> None:
        # who is silent or has another key is left alone in this thread
        with connection, suppress(EOFError, OSError, AuthenticationError):
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            while self._is_open:
                asked = json.loads(connection.recv_bytes())
                try:
                    answer = self._read(asked["name"], asked["start"], asked["end"])
                except OSError as error:
                    connection.send_bytes(json.dumps({"failure": os.strerror(error.errno or 0)}).encode())
                    continue
                connection.send_bytes(json.dumps({"failure": None}).encode())
                connection.send_bytes(answer)

    def _read(self, name: str, start: int, end: int | None) -> bytes:
        """The bytes of a file; with `end` of None, how many it has, as text."""
        if name != Path(name).name:
            raise PermissionError(1, "outside the folder")
        with open(self._folder / name, "rb") as handle:
            if end is None:
                return str(os.fstat(handle.fileno()).st_size).encode()
            return os.pread(handle.fileno(), end - start, start)


class PeerFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec is untyped
    """What the checkpoint reader asks of a store: the sizes of files, and ranges of them."""

    protocol = PROTOCOL
    cachable = False
    key: ClassVar[bytes] = b""
    """Of the servers, told to every rank over the group that it trusts."""
    _local = threading.local()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix(f"{PROTOCOL}://")

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        size = int(self._ask(self._strip_protocol(path), 0, None))
        return {"name": path, "size": size, "type": "file"}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        path = self._strip_protocol(path)
        return self._ask(path, start or 0, self.info(path)["size"] if end is None else end)

    def _ask(self, path: str, start: int, end: int | None) -> bytes:
        host_port, _, name = path.partition("/")
        host, _, port = host_port.rpartition(":")
        connections = self._local.__dict__.setdefault("connections", {})
        try:
            if host_port not in connections:
                connections[host_port] = Client((host, int(port)), authkey=self.key)
            connection = connections[host_port]
            connection.send_bytes(json.dumps({"name": name, "start": start, "end": end}).encode())
            if not connection.poll(ANSWER_S):
                raise TimeoutError(f"no answer from {host_port} in {ANSWER_S:g} s")
            failure = json.loads(connection.recv_bytes())["failure"]
            answer: bytes = b"" if failure else connection.recv_bytes()
        except Exception:
            connections.pop(host_port, None)  # half an answer may be on its way
            raise
        if failure:
            raise FileNotFoundError(f"{path}: {failure}")
        return answer


fsspec.register_implementation(PROTOCOL, PeerFileSystem, clobber=True)


def own_address(peer: str) -> str:
    """The address of this host on the way to `peer`, a host that all ranks reach."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))  # sends nothing
        address: str = probe.getsockname()[0]
        return address
