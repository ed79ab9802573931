"""Processes that begin with torch and DeepSpeed imported, which takes four times as long as most of what they
are to do: each is a fork of a server that has imported them, and can be killed like any other."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOADED = [
    "llmtrain.train.assemble",
    "llmtrain.train.deepspeed_engine",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._dynamo",
]
SERVER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
"""Read when torch and DeepSpeed are imported."""

_context = multiprocessing.get_context("forkserver")
_server: int | None = None


def start(be: Callable[..., None], *arguments: object) -> BaseProcess:
    """A started process that calls `be`, a function of a module, and ends."""
    global _server
    if _server is None or forkserver._forkserver._forkserver_pid != _server:
        # Other tests of this process have a server that knows less: it is stopped, and they start another.
        forkserver._forkserver._stop()
        _context.set_forkserver_preload(PRELOADED)
        before = {name: os.environ.get(name) for name in SERVER_ENVIRONMENT}
        os.environ.update(SERVER_ENVIRONMENT)
        forkserver.ensure_running()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        _server = forkserver._forkserver._forkserver_pid
    process = _context.Process(target=be, args=arguments)
    process.start()
    return process


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
