"""W&B beside a run, never in its way: what training knows of it.

W&B lives in a process of its own (`wandb_process.py`), which reads metrics.jsonl as anyone else may: its
import, its threads, its service and its exit hooks cannot slow, hang or end training, and no record is lost
that is in the file. Training starts that process, passes on what it says, starts it again when it dies, and
ends it: a line on its standard input, or the end of that, means that the run is over.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmtrain.files import read_json, write_json
from llmtrain.tracking.config import TrackingConfig, WandbMode

SPEC_NAME = "llmtrain.json"
LOG_NAME = "llmtrain.log"
SYNC_HINT = "`wandb sync {folder}/*run-*` sends what is on disk"
POLL_S = 0.02
MAX_RESTARTS = 3
"""Of a process that dies while the run goes on. Starting it takes training milliseconds."""
STALL_LIMIT_S = 300.0
"""A process that hangs so long over one record ends itself, and is started again."""
TAKEN_EVERY_S = 5.0
"""Between two notes of what W&B has. It writes to its file every second, so what it had been given at one
note is on the disk at the next: that is what the next one says."""
GAVE_UP = 3
"""Exit status of a process that says why W&B cannot work: it is not started again."""


def with_grace(timeout_s: float) -> float:
    """When to end W&B from outside: a little after the limit that it was given to end by itself."""
    return 1.1 * timeout_s + 0.5


def chosen_mode(mode: WandbMode, environment: Mapping[str, str]) -> WandbMode:
    """Resolve `auto`, and `online` without a key, to what can work: off, offline or online."""
    has_key = bool(environment.get("WANDB_API_KEY"))
    if mode is WandbMode.auto:
        wanted = environment.get("WANDB_MODE", "online")
        mode = WandbMode.off if wanted == "disabled" else WandbMode.__members__.get(wanted, WandbMode.online)
    return WandbMode.offline if mode is WandbMode.online and not has_key else mode


def wandb_id(run_folder: Path) -> str | None:
    """The id of a run at W&B; None where it has none."""
    spec = run_folder / "wandb" / SPEC_NAME
    found: str | None = read_json(spec)["run_id"] if spec.exists() else None
    return found


def node_sink(
    config: TrackingConfig, run_folder: Path, *, node: int, run_name: str, report: Callable[[str], None]
) -> WandbSink | None:
    """System metrics of a node that rank 0 is not on, by one rank of it: a run of its own in the run's group,
    of job type `node`, whose id the node's number follows. Call it once rank 0 has its recorder; `relay` may
    be left out. None unless tracking.wandb_node_metrics is set and the run has W&B."""
    run_id = wandb_id(run_folder)
    if run_id is None or not config.wandb_node_metrics:
        return None
    return WandbSink(
        replace(config, wandb_group=config.wandb_group or run_id, wandb_job_type="node"),
        run_folder / "wandb" / f"node-{node}" / "metrics.jsonl",
        attempt=1,
        run_name=f"{run_name} node {node}",
        run_config={},
        report=report,
        run_id=f"{run_id}-node-{node}",
        follows=False,
    )


class WandbSink:
    """W&B's process, from training's side. No method raises on anything W&B, a pipe or a disk does.

    Args:
        metrics: metrics.jsonl, which the process follows. W&B's files go to `wandb/` beside it; the run's id
            is kept there for a resume.
        attempt: its records are the first that W&B is sent, if it has those of earlier ones, or was off.
        run_id: at W&B, of the checkpoint that the run goes on from: the run's where wandb/ was lost.
        run_name: as shown in W&B.
        run_config: the resolved config, as plain values.
        report: called on the caller's thread, in `relay` and `finish`, with each thing worth an event.
        follows: whether the process follows metrics.jsonl; else W&B only has system metrics.
    """

    def __init__(
        self,
        config: TrackingConfig,
        metrics: Path,
        *,
        attempt: int,
        run_name: str,
        run_config: Mapping[str, Any],
        report: Callable[[str], None],
        run_id: str | None = None,
        follows: bool = True,
    ) -> None:
        self._config = config
        self._metrics = metrics.absolute() if follows else None
        self._folder = metrics.absolute().parent / "wandb"
        self._report = report
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._num_restarts = 0
        self.mode = chosen_mode(config.wandb, os.environ)
        if config.wandb is WandbMode.online and self.mode is WandbMode.offline:
            report("tracking.wandb=online, but WANDB_API_KEY is not set; going on offline")
        if self.mode is not WandbMode.off:
            try:
                self._write_spec(run_name, run_config, attempt=attempt, run_id=run_id)
                self._start()
            except (OSError, ValueError, TypeError) as error:
                report(f"not started ({type(error).__name__}: {error}); the run goes on without it")

    def relay(self) -> None:
        """Pass on what W&B's process says, and start it again if it died. Takes microseconds."""
        process = self._process
        if process is None:
            return
        self._relay_reports(process)
        status = process.poll()
        if status is None:
            return
        self._close(process)
        if status == GAVE_UP:
            return
        said = f"its process ended with status {status}"
        if self._num_restarts == MAX_RESTARTS:
            self._report(f"{said} again; the run goes on without it, metrics.jsonl has every record")
            return
        self._num_restarts += 1
        self._report(f"{said}; starting it again")
        try:
            self._start()
        except OSError as error:
            self._report(f"not started again ({error}); the run goes on without it")

    def finish(self) -> None:
        """Give W&B `wandb_finish_timeout_s` to finish, then end its process. A second call does nothing."""
        process = self._process
        if process is None:
            return
        assert process.stdin is not None, "opened with a pipe"
        with contextlib.suppress(OSError):
            process.stdin.write(b"\n")  # a forked child of training may hold the pipe open
            process.stdin.close()
        deadline = time.monotonic() + with_grace(with_grace(self._config.wandb_finish_timeout_s))
        while process.poll() is None and time.monotonic() < deadline:
            self._relay_reports(process)
            time.sleep(POLL_S)
        if process.poll() not in (0, GAVE_UP):  # it has a limit of its own, too
            hint = SYNC_HINT.format(folder=self._folder)
            self._report(
                f"was ended before it had finished, after {self._config.wandb_finish_timeout_s:g} s; {hint}"
            )
        process.kill()  # W&B's service watches it, and ends with it
        process.wait()
        self._close(process)

    def _write_spec(
        self, run_name: str, run_config: Mapping[str, Any], *, attempt: int, run_id: str | None
    ) -> None:
        config = self._config
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / SPEC_NAME
        before = read_json(path) if path.exists() else {}
        run_id = before.get("run_id") or run_id or secrets.token_hex(4)
        write_json(
            path,
            {
                "run_id": run_id,
                "run_name": run_name,
                "run_config": dict(run_config),
                "metrics": self._metrics and str(self._metrics),
                "attempt": before.get("attempt", attempt),
                "mode": self.mode.name,
                "project": config.wandb_project,
                "entity": config.wandb_entity,
                "group": config.wandb_group or (run_id if config.wandb_node_metrics else None),
                "job_type": config.wandb_job_type,
                "tags": config.wandb_tags,
                "init_timeout_s": config.wandb_init_timeout_s,
                "finish_timeout_s": config.wandb_finish_timeout_s,
                "stall_limit_s": STALL_LIMIT_S,
                "taken_every_s": TAKEN_EVERY_S,
                "training_pid": os.getpid(),
            },
        )

    def _start(self) -> None:
        package_parent = str(Path(__file__).resolve().parents[2])
        search_path = [package_parent, *filter(None, [os.environ.get("PYTHONPATH")])]
        # Else W&B copies artifacts to the home folder, where a later `wandb sync` may not find them.
        places = {"WANDB_DATA_DIR": str(self._folder), "WANDB_CACHE_DIR": str(self._folder / "cache")}
        with open(self._folder / LOG_NAME, "ab") as chatter:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "llmtrain.tracking.wandb_process", str(self._folder / SPEC_NAME)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=chatter,
                bufsize=0,
                env={**places, **os.environ, "PYTHONPATH": os.pathsep.join(search_path)},
                start_new_session=True,  # Ctrl-C in the terminal is training's to handle
            )
        assert self._process.stdout is not None, "opened with a pipe"
        os.set_blocking(self._process.stdout.fileno(), False)

    def _relay_reports(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None, "opened with a pipe"
        with contextlib.suppress(OSError):  # nothing to read
            while chunk := os.read(process.stdout.fileno(), 1 << 16):
                self._unread += chunk
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            self._report(line.decode(errors="replace"))

    def _close(self, process: subprocess.Popen[bytes]) -> None:
        """Pass on the last words of a process that has ended."""
        self._process = None
        self._relay_reports(process)
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None, "opened with a pipe"
            with contextlib.suppress(OSError):
                pipe.close()
