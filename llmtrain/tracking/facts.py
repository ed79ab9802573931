"""What a run was made with: commit, versions, machine, command line. Read without torch, kept in run.json."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import llmtrain
from llmtrain.files import read_json, write_json

PACKAGES = (
    "llmtrain",
    "torch",
    "deepspeed",
    "numpy",
    "pyarrow",
    "sentencepiece",
    "datasets",
    "numba",
    "hydra-core",
    "omegaconf",
    "transformers",
    "wandb",
)
GIT_TIMEOUT_S = 5.0


def collect_facts(command_line: Sequence[str] | None = None) -> dict[str, Any]:
    """Everything about this process and machine that a later reader needs to repeat the run."""
    commit, is_dirty = git_state(Path(llmtrain.__file__).resolve().parent)
    return {
        "command_line": shlex.join(sys.orig_argv if command_line is None else command_line),
        "started": time.time(),
        "working_folder": os.getcwd(),
        "git_commit": commit,
        "git_dirty": is_dirty,
        "versions": package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpu": cpu_name(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def record_start(
    run_folder: Path,
    *,
    attempt: int,
    command_line: Sequence[str] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Add this start to `run.json` and return it. Earlier starts stay: versions may change between them.

    Args:
        extra: facts that only the caller knows, such as world_size or the names of the devices.
    """
    path = run_folder / "run.json"
    before = read_json(path)["attempts"] if path.exists() else []
    facts = {"attempt": attempt, **collect_facts(command_line), **(extra or {})}
    write_json(path, {"format_version": 1, "attempts": [*before, facts]})
    return facts


def git_state(folder: Path) -> tuple[str | None, bool | None]:
    """The commit of the work tree that tracks `folder`, and whether files differ from it; None outside."""
    tracked = _git(folder, "ls-files", "__init__.py")
    commit = _git(folder, "rev-parse", "HEAD") if tracked else None
    if not commit:
        return None, None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit, None if changes is None else bool(changes)


def package_versions() -> dict[str, str]:
    """The installed version of each package that can change a result."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def cpu_name() -> str:
    """The processor's model as Linux names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
