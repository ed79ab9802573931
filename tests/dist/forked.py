"""Processes that begin with what they need imported, which often takes longer than all that they do: each is a
fork of a server that has imported it, and can be killed like any other."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")


@dataclass
class Server:
    """Of one kind at a time: whoever wants another stops it."""

    modules: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    """In which it imports them."""
    pid: int | None = None

    def start(self, be: Callable[..., None], *arguments: object) -> BaseProcess:
        """A started process that calls `be`, a function of a module, and ends."""
        if self.pid is None or forkserver._forkserver._forkserver_pid != self.pid:
            forkserver._forkserver._stop()
            _context.set_forkserver_preload(self.modules)
            before = {name: os.environ.get(name) for name in self.environment}
            os.environ.update(self.environment)
            forkserver.ensure_running()
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            self.pid = forkserver._forkserver._forkserver_pid
        process = _context.Process(target=be, args=arguments)
        process.start()
        return process


VERBS = ["llmtrain.cli.main", "llmtrain.cli.plan", "llmtrain.cli.train", "llmtrain.cli.data", "hydra.core.plugins"]
TORCH = Server(
    [
        *VERBS,
        "llmtrain.train.assemble",
        "llmtrain.train.deepspeed_engine",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "torch._dynamo",
    ],
    {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
)
HYDRA = Server(VERBS)
"""Without torch, as a verb is that needs none."""


def become(output: Path, errors: Path, environment: Mapping[str, str]) -> None:
    """Write to those files from now on, in that environment, and listen to Ctrl-C as a program does."""
    for number, name, path in ((1, "stdout", output), (2, "stderr", errors)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
        setattr(sys, name, os.fdopen(number, "w", buffering=1, closefd=False))
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def be_script(script: str, arguments: list[str], *place: Any) -> None:
    """Do as `python <script> <arguments>` would."""
    become(*place)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def script(
    path: Path, *arguments: str, timeout_s: float = 280.0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What `python <path> <arguments>` says, with torch and DeepSpeed imported."""
    return _finished(TORCH, be_script, str(path), list(arguments), timeout_s, environment)


def be_verb(arguments: list[str], *place: Any) -> None:
    """Do as `llmtrain <arguments>` would."""
    become(*place)
    from llmtrain.cli.main import main  # noqa: PLC0415  in the process, not in the server

    sys.argv = ["llmtrain", *arguments]
    main()


def _be_verb_in(folder: str | None, arguments: list[str], *place: Any) -> None:
    if folder is not None:
        os.chdir(folder)
    be_verb(arguments, *place)


def verb(
    *arguments: str,
    cwd: Path | None = None,
    server: Server = HYDRA,
    timeout_s: float = 120.0,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """What `llmtrain <arguments>` says."""
    folder = None if cwd is None else str(cwd)
    return _finished(server, _be_verb_in, folder, list(arguments), timeout_s, environment)


def _finished(
    server: Server,
    be: Callable[..., None],
    what: str | None,
    arguments: list[str],
    timeout_s: float,
    environment: Mapping[str, str],
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as name:
        output, errors = Path(name, "out"), Path(name, "err")
        process = server.start(be, what, arguments, output, errors, {**os.environ, **server.environment, **environment})
        process.join(timeout_s)
        process.kill()
        process.join()
        return subprocess.CompletedProcess(
            arguments, process.exitcode, output.read_text(), errors.read_text()
        )
