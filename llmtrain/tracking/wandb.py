"""W&B beside a run, never in its way.

W&B lives in a process of its own: its import, its threads, its service and its exit hooks cannot slow, hang
or end training. `WandbSink.log` is one write into a pipe that never blocks: the pipe is the bounded queue,
and what does not fit is dropped and counted. When training ends, by `finish` or by a kill, the pipe closes,
and W&B's process has a limited time to finish what it has.

This file is both ends: the sink, and (`python -m llmtrain.tracking.wandb SPEC`) the process.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from llmtrain.files import read_json, write_json
from llmtrain.tracking.config import TrackingConfig, WandbMode

Mode = Literal["online", "offline"]
QUEUE_BYTES = 1 << 20
"""About 3,000 step records: what W&B may lag behind before records are dropped."""
SPEC_NAME = "llmtrain.json"
SYNC_HINT = "`wandb sync {folder}` sends what is on disk"
POLL_S = 0.02
NICENESS = 10
"""W&B's import and service take what training leaves of the cores."""


FALL_BACK_INIT_TIMEOUT_S = 60.0
"""At least, for the start offline after one online has failed: a limit set for a network's answer may be
short for a busy machine."""


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


class WandbSink:
    """Sends metrics records to W&B. No method raises on anything W&B, a pipe or a disk does.

    Args:
        run_folder: W&B's files go to `<run_folder>/wandb`. The run's id is kept there for a resume.
        run_name: as shown in W&B.
        run_config: the resolved config, as plain values.
        report: called on the caller's thread, in `log` and `finish`, with each thing worth an event.
    """

    def __init__(
        self,
        config: TrackingConfig,
        run_folder: Path,
        *,
        run_name: str,
        run_config: Mapping[str, Any],
        report: Callable[[str], None],
    ) -> None:
        self._config = config
        self._folder = run_folder.absolute() / "wandb"
        self._report = report
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self.num_dropped = 0
        """Records that W&B did not take. They are in metrics.jsonl."""
        self.mode = chosen_mode(config.wandb, os.environ)
        if config.wandb is WandbMode.online and self.mode is WandbMode.offline:
            report("tracking.wandb=online, but WANDB_API_KEY is not set; going on offline")
        if self.mode is not WandbMode.off:
            try:
                self._start(run_name, run_config)
            except (OSError, ValueError, TypeError) as error:
                report(f"not started ({type(error).__name__}: {error}); the run goes on without it")

    def log(self, record: Mapping[str, Any]) -> None:
        """Hand over one record of metrics.jsonl. Takes microseconds, whatever W&B does."""
        if self._process is None:
            return
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        if not self._put(line):
            self.num_dropped += 1
            if self.num_dropped == 1:
                self._report("not keeping up, records are being dropped; all of them are in metrics.jsonl")
        self._relay_reports()

    def finish(self) -> None:
        """Give W&B `wandb_finish_timeout_s` to finish, then end its process. A second call does nothing."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None, "opened with a pipe"
        with contextlib.suppress(OSError):
            process.stdin.close()
        deadline = time.monotonic() + with_grace(with_grace(self._config.wandb_finish_timeout_s))
        while process.poll() is None and time.monotonic() < deadline:
            self._relay_reports(process)
            time.sleep(POLL_S)
        if process.poll() is None:
            hint = SYNC_HINT.format(folder=self._folder)
            self._report(f"did not finish in {self._config.wandb_finish_timeout_s:g} s and was ended; {hint}")
        process.kill()  # W&B's service watches it, and ends with it
        process.wait()
        self._relay_reports(process)
        assert process.stdout is not None, "opened with a pipe"
        process.stdout.close()
        if self.num_dropped:
            self._report(f"{self.num_dropped} records were dropped; metrics.jsonl has all of them")

    def _start(self, run_name: str, run_config: Mapping[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        spec = self._folder / SPEC_NAME
        run_id = read_json(spec)["run_id"] if spec.exists() else secrets.token_hex(4)
        write_json(
            spec,
            {
                "run_id": run_id,
                "run_name": run_name,
                "run_config": dict(run_config),
                "mode": self.mode.name,
                "project": self._config.wandb_project,
                "entity": self._config.wandb_entity,
                "init_timeout_s": self._config.wandb_init_timeout_s,
                "finish_timeout_s": self._config.wandb_finish_timeout_s,
                "training_pid": os.getpid(),
            },
        )
        package_parent = str(Path(__file__).resolve().parents[2])
        search_path = [package_parent, *filter(None, [os.environ.get("PYTHONPATH")])]
        with open(self._folder / "llmtrain.log", "ab") as chatter:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "llmtrain.tracking.wandb", str(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=chatter,
                bufsize=0,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(search_path)},
                start_new_session=True,  # Ctrl-C in the terminal is training's to handle
            )
        assert self._process.stdin is not None, "opened with a pipe"
        assert self._process.stdout is not None, "opened with a pipe"
        os.set_blocking(self._process.stdin.fileno(), False)
        os.set_blocking(self._process.stdout.fileno(), False)
        with contextlib.suppress(OSError):  # a container may forbid it; 64 KiB then
            fcntl.fcntl(self._process.stdin.fileno(), fcntl.F_SETPIPE_SZ, QUEUE_BYTES)

    def _put(self, line: bytes) -> bool:
        """Write `line` whole or not at all: the kernel promises that up to PIPE_BUF bytes."""
        assert self._process is not None, "log checks it"
        assert self._process.stdin is not None, "opened with a pipe"
        if len(line) > select.PIPE_BUF:
            return False
        try:
            os.write(self._process.stdin.fileno(), line)
        except OSError:  # full, or the process is gone
            return False
        return True

    def _relay_reports(self, process: subprocess.Popen[bytes] | None = None) -> None:
        process = process or self._process
        if process is None or process.stdout is None:
            return
        with contextlib.suppress(OSError):  # nothing to read
            while chunk := os.read(process.stdout.fileno(), 1 << 16):
                self._unread += chunk
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            self._report(line.decode(errors="replace"))


class _Process:
    """The other end: reads records from standard input until it ends, and gives them to W&B."""

    def __init__(self, spec_path: Path) -> None:
        self._spec_path = spec_path
        self._spec: dict[str, Any] = read_json(spec_path)
        self._init_deadline: float | None = None
        self._parent = os.getppid()
        os.nice(NICENESS)
        # Reports go to training through this pipe; whatever W&B prints goes to the log.
        self._reports = os.dup(1)
        os.dup2(2, 1)
        for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"):
            signal.signal(getattr(signal, name), signal.SIG_IGN)  # training decides when the run is over

    def run(self, mode: Mode) -> None:
        threading.Thread(target=self._watch, args=(mode,), daemon=True).start()
        run = self._init(mode)
        if run is None:
            return
        self._say(f"{mode}, run {self._spec['run_id']} of project {self._spec['project']}")
        for line in iter(sys.stdin.buffer.readline, b""):
            run.log(wandb_fields(json.loads(line)))
        self._end_after(with_grace(self._spec["finish_timeout_s"]))
        run.finish()

    def _init(self, mode: Mode) -> Any:
        """Start W&B; where online does not work, offline; where nothing works, say so and return None."""
        spec = self._spec
        if mode != spec["mode"]:
            spec["init_timeout_s"] = max(spec["init_timeout_s"], FALL_BACK_INIT_TIMEOUT_S)
        self._init_deadline = time.monotonic() + with_grace(spec["init_timeout_s"])
        try:
            import wandb  # noqa: PLC0415  only this process pays for it, and a run works without it

            run = wandb.init(
                project=spec["project"],
                entity=spec["entity"],
                name=spec["run_name"],
                id=spec["run_id"],
                resume="allow",
                mode=mode,
                dir=str(self._spec_path.parents[1]),
                config=spec["run_config"],
                settings=wandb.Settings(
                    init_timeout=spec["init_timeout_s"],
                    finish_timeout=spec["finish_timeout_s"],
                    silent=True,
                    console="off",
                    disable_git=True,  # config.yaml and run.json say it, and it may be slow
                    x_stats_pid=spec["training_pid"],
                ),
            )
            # An offline resume counts its own steps from 0 again, so ours is the axis.
            run.define_metric("step", hidden=True)
            run.define_metric("tokens", hidden=True)
            for pattern in ("train/*", "eval/*", "checkpoint/*", "plan/*"):
                run.define_metric(pattern, step_metric="step")
            self._init_deadline = None
            return run
        except Exception as error:  # anything at all: W&B's failures are no reason to stop training
            reason = f"{type(error).__name__}: {str(error).partition(os.linesep)[0]}"
            if mode == "online":
                self._restart_offline(reason)
            self._say(f"not started ({reason}); the run goes on without it")
            return None

    def _watch(self, mode: Mode) -> None:
        """End what hangs: an init past its limit, and everything some time after training is gone."""
        while True:
            time.sleep(POLL_S)
            if self._init_deadline is not None and time.monotonic() > self._init_deadline:
                if mode == "online":
                    self._restart_offline(f"no answer in {self._spec['init_timeout_s']:g} s")
                self._say(f"did not start in {self._spec['init_timeout_s']:g} s; the run goes on without it")
                os._exit(1)
            if os.getppid() != self._parent:
                self._end_after(with_grace(self._spec["finish_timeout_s"]))
                return

    def _restart_offline(self, reason: str) -> None:
        """Become a new process in offline mode. Standard input, with every record so far, stays as it is."""
        self._say(f"online does not work ({reason}); going on offline")
        os.dup2(self._reports, 1)
        self._end_service()
        arguments = ["-m", "llmtrain.tracking.wandb", str(self._spec_path), "offline"]
        os.execv(sys.executable, [sys.executable, *arguments])

    def _end_service(self) -> None:
        """Else W&B would find its service again through the environment, and refuse the run's id as taken."""
        os.environ.pop("WANDB_SERVICE", None)
        with contextlib.suppress(OSError):  # a kernel need not list children
            for children in Path("/proc/self/task").glob("*/children"):
                for pid in children.read_text().split():
                    os.kill(int(pid), signal.SIGKILL)

    def _end_after(self, seconds: float) -> None:
        timer = threading.Timer(seconds, os._exit, args=(1,))
        timer.daemon = True
        timer.start()

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):
            os.write(self._reports, text.encode() + b"\n")


def wandb_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record's numbers under W&B's names: `step` and `tokens` as axes, the others in a group by kind."""
    group = {"step": "train", "eval": "eval", "checkpoint": "checkpoint"}.get(record["kind"], record["kind"])
    fields = {name: record[name] for name in ("step", "tokens") if name in record}
    for name, value in record.items():
        if isinstance(value, int | float) and name not in ("step", "tokens", "attempt", "time"):
            fields[f"{group}/{name.removeprefix(group + '_')}"] = value
    return fields


if __name__ == "__main__":
    spec_path = Path(sys.argv[1])
    process = _Process(spec_path)
    process.run("offline" if "offline" in sys.argv[2:] else read_json(spec_path)["mode"])
