"""W&B's own process: follows metrics.jsonl and tells W&B of it until the run is over.

`python -m llmtrain.tracking.wandb_process SPEC`, started by `wandb.py`, whose docstring says how the two live
together. The whole file is read at each start, so that rows are the same whoever sends them; W&B is told of
the records from the spec's attempt on, or from where an earlier process left off (`taken.json`).
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from llmtrain.data.manifest import MANIFEST_NAME
from llmtrain.errors import DataError
from llmtrain.files import hash_file, read_json, write_json
from llmtrain.tracking.follow import MetricsFollower
from llmtrain.tracking.metrics import Record
from llmtrain.tracking.run_data import ENDINGS
from llmtrain.tracking.run_events import ROUTINE, fields_of, printable, shortened, told
from llmtrain.tracking.wandb import GAVE_UP, LOG_NAME, POLL_S, SYNC_HINT, with_grace
from llmtrain.tracking.wandb_rows import AXES, MAX_TEXT, Row, Rows

Mode = Literal["online", "offline"]
NICENESS = 10
"""W&B's import and service take what training leaves of the cores."""
LOOK_S = 1.0
"""Between two looks at metrics.jsonl."""
FINISH_SHARE = 2 / 3
"""Of the time for the end that W&B itself may take; the last artifacts may take the rest."""
FALL_BACK_INIT_TIMEOUT_S = 60.0
"""At least, for the start offline after one online has failed: a limit set for a network's answer may be
short for a busy machine."""
TAKEN_NAME = "taken.json"
FLUSH_S = 1.0
"""How often W&B writes what it has to its file: what a kill may cost of that."""
ALERT_GAP_S = 300.0
"""Between two alerts of one title."""
MAX_EVENTS = 1000
"""The latest, in the table of a run's events."""
SUMMARISED = ("mfu_convention", "device_peak_tflops", "device_peak_source", "world_size")
"""What a start says of its attempt, for W&B's summary."""
MARKER = re.compile(rb"([0-9a-f]{64})  (manifest[.0-9]*\.json)\n")
"""COMMITTED of a checkpoint: docs/checkpoints.md."""


class Process:
    def __init__(self, spec_path: Path) -> None:
        self._spec_path = spec_path
        self._spec: dict[str, Any] = read_json(spec_path)
        self._folder = spec_path.parent
        self._init_deadline: float | None = None
        self._busy_since: float | None = None
        self._parent = os.getppid()
        self._shift: int | None = None
        """From a record's place in the file to W&B's step: not 0 where a server has more than the file."""
        self._groups: set[str] = set()
        self._events: list[list[Any]] = []
        self._last_saved: Record | None = None
        self._ending: str | None = None
        self._log_begin = os.fstat(2).st_size
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
            sys.exit(GAVE_UP)
        self._say(f"{mode}, run {self._spec['run_id']} of project {self._spec['project']}")
        finish_s = self._spec["finish_timeout_s"]
        if self._spec["metrics"] is None:
            while not self._run_is_over(wait_s=LOOK_S):
                continue  # system metrics are W&B's own affair
            self._end_after(with_grace(finish_s))
            run.finish()
            return
        self._for_at_most(self._spec["init_timeout_s"], self._log_inputs, run)
        num_records = self._follow(run)
        self._end_after(with_grace(finish_s))
        self._for_at_most((1 - FINISH_SHARE) * finish_s, self._log_results, run)
        try:
            run.finish(exit_code=0 if self._ending in ("finished", "stopped") else 1)
        except TimeoutError:
            self._say(f"not all was sent in {finish_s:g} s; {SYNC_HINT.format(folder=self._folder)}")
        self._note_taken(num_records)
        for line in self._warnings():
            self._say(line)

    # --- records ---

    def _follow(self, run: Any) -> int:
        """Tell W&B of every record until the run is over, and return how many the file has."""
        follower, rows = MetricsFollower(Path(self._spec["metrics"])), Rows(run_name=self._spec["run_name"])
        taken = self._taken()
        num_records, is_over, is_unread = 0, False, False
        handed, noted_at = taken or 0, time.monotonic()
        while True:
            is_over = is_over or self._run_is_over(wait_s=0 if follower.is_behind else LOOK_S)
            try:
                records = follower.new_records()
            except DataError as error:
                if not is_unread:
                    self._say(str(error))
                records, is_unread = [], True
            if follower.generation:
                self._say(f"{follower.path} was cut or replaced; the run goes on without W&B")
                sys.exit(GAVE_UP)
            for record in records:
                row = rows.take(record)
                num_records = row.number + 1
                self._remember(record)
                is_new = record["attempt"] >= self._spec["attempt"] if taken is None else num_records > taken
                if is_new:
                    if self._shift is None:  # nothing was noted: go on behind what the server has
                        self._shift = max(0, run.step - row.number)
                        self._note_taken(row.number)
                    self._busy_since = time.monotonic()
                    self._log(run, record, row)
                    self._busy_since = None
            if time.monotonic() - noted_at > self._spec["taken_every_s"]:
                self._note_taken(handed)
                handed, noted_at = num_records, time.monotonic()
            if is_over and not records and not follower.is_behind:
                return num_records

    def _log(self, run: Any, record: Record, row: Row) -> None:
        groups = {name.partition("/")[0] for name in row.fields if "/" in name}
        for group in sorted(groups - self._groups):
            run.define_metric(f"{group}/*", step_metric="step")  # any chart may take tokens instead
        self._groups |= groups
        if row.fields:
            run.log(row.fields, step=row.number + (self._shift or 0), commit=True)
        if record.get("what") in ("start", "resume"):
            run.summary.update({f"run/{name}": record[name] for name in SUMMARISED if name in record})
        if row.alert is not None:
            alert = row.alert
            run.alert(title=alert.title, text=alert.text, level=alert.level, wait_duration=ALERT_GAP_S)

    def _remember(self, record: Record) -> None:
        """What the end of the run needs."""
        if record["kind"] == "checkpoint":
            self._last_saved = record
        if record["kind"] != "event":
            return
        what = str(record.get("what", ""))
        if what in ("start", "resume"):
            self._ending = None
        elif what in ENDINGS:
            self._ending = what
        if what not in ROUTINE:
            said = told(record)
            place = [record["step"], record["attempt"], record.get("time")]
            fields = shortened(printable(fields_of(record)), MAX_TEXT)
            self._events = [*self._events[1 - MAX_EVENTS :], [*place, said.level, what, said.details, fields]]

    def _run_is_over(self, *, wait_s: float) -> bool:
        """Whether training has said so on standard input, or is gone."""
        readable, _, _ = select.select([0], [], [], wait_s)
        return bool(readable) or os.getppid() != self._parent

    def _taken(self) -> int | None:
        """How many records W&B surely has; None where no process has noted it for this run."""
        try:
            noted = read_json(self._folder / TAKEN_NAME)
            if noted["run_id"] != self._spec["run_id"]:
                return None
            self._shift = int(noted["shift"])
            return int(noted["num_records"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _note_taken(self, num_records: int) -> None:
        noted = {"run_id": self._spec["run_id"], "num_records": num_records, "shift": self._shift or 0}
        with contextlib.suppress(OSError):  # a later process sends more twice, then
            write_json(self._folder / TAKEN_NAME, noted)

    def _warnings(self) -> list[str]:
        """What W&B itself warned of, in its log."""
        text = (self._folder / LOG_NAME).read_bytes()[self._log_begin :].decode(errors="replace")
        lines = (line.partition("wandb: ")[2] for line in text.splitlines())
        return list(dict.fromkeys(line for line in lines if line.startswith(("WARNING", "ERROR"))))

    # --- artifacts: names, hashes and small files, never data or weights ---

    def _for_at_most(self, limit_s: float, log: Callable[[Any], None], run: Any) -> None:
        """Artifacts ask the server, and wait for it: where it is gone the run is more than they are."""
        thread = threading.Thread(target=log, args=(run,), daemon=True)
        thread.start()
        thread.join(limit_s)
        if thread.is_alive():
            self._say(f"artifacts were not taken in {limit_s:g} s; going on without them")

    def _log_inputs(self, run: Any) -> None:
        config = self._spec["run_config"]
        run_folder = Path(self._spec["metrics"]).parent
        self._log_files(run, "config", [run_folder / "config.yaml"])
        plan = (config.get("run") or {}).get("plan")
        if plan:
            self._log_files(run, "plan", [Path(plan)])
        data = config.get("data") or {}
        folders = {"data": data.get("folder")} | {
            name: source.get("folder") for name, source in (data.get("sources") or {}).items()
        }
        manifests = {name: Path(folder) / MANIFEST_NAME for name, folder in folders.items() if folder}
        if manifests:
            self._log_references(run, "data", manifests)

    def _log_results(self, run: Any) -> None:
        """The run's events as a table, and where its last checkpoint lies."""
        import wandb  # noqa: PLC0415  loaded by now

        if self._events:
            columns = ["step", "attempt", "time", "level", "what", "details", "fields"]
            run.summary["run/events"] = wandb.Table(columns=columns, data=self._events)
        if self._last_saved is None:
            return
        step = self._last_saved["step"]
        folder = (self._spec["run_config"].get("save") or {}).get("folder")
        place = f"{folder or Path(self._spec['metrics']).parent / 'checkpoints'}/step-{step:08d}"
        metadata: dict[str, Any] = {"path": place, "step": step}
        if "://" in place:
            self._log_artifact(run, "checkpoint", metadata, files=[], references={})  # W&B would ask there
            return
        try:
            marker = MARKER.fullmatch((Path(place) / "COMMITTED").read_bytes())
        except OSError as error:
            self._say(f"no checkpoint logged: {place}: {error.strerror}")
            return
        if marker is None:
            self._say(f"no checkpoint logged: {place}/COMMITTED is not llmtrain's")
            return
        metadata["manifest_sha256"] = marker[1].decode()
        manifest = Path(place).absolute() / marker[2].decode()
        self._log_artifact(
            run, "checkpoint", metadata, files=[], references={"manifest": f"file://{manifest}"}
        )

    def _log_files(self, run: Any, kind: str, paths: list[Path]) -> None:
        there = [path for path in paths if path.is_file()]
        if there:
            self._log_artifact(run, kind, {}, files=there, references={})

    def _log_references(self, run: Any, kind: str, paths: dict[str, Path]) -> None:
        there = {name: path.absolute() for name, path in paths.items() if path.is_file()}
        if there:
            metadata = {name: {"path": str(path), "sha256": hash_file(path)} for name, path in there.items()}
            references = {f"{name}/{path.name}": f"file://{path}" for name, path in there.items()}
            self._log_artifact(run, kind, metadata, files=[], references=references)

    def _log_artifact(
        self, run: Any, kind: str, metadata: dict[str, Any], *, files: list[Path], references: dict[str, str]
    ) -> None:
        import wandb  # noqa: PLC0415  loaded by now

        try:
            artifact = wandb.Artifact(f"{kind}-{self._spec['run_id']}", type=kind, metadata=metadata)
            for path in files:
                artifact.add_file(str(path))
            for name, uri in references.items():
                artifact.add_reference(uri, name=name, checksum=uri.startswith("file://"))
            run.log_artifact(artifact)
        except Exception as error:  # a dashboard without it is better than none
            self._say(f"no artifact of the {kind} ({type(error).__name__}: {error})")

    # --- W&B's start and end ---

    def _init(self, mode: Mode) -> Any:
        """Start W&B; where online does not work, offline; where nothing works, say so and return None."""
        spec = self._spec
        if mode != spec["mode"]:
            spec["init_timeout_s"] = max(spec["init_timeout_s"], FALL_BACK_INIT_TIMEOUT_S)
        self._init_deadline = time.monotonic() + with_grace(spec["init_timeout_s"])
        try:
            import wandb  # noqa: PLC0415  may be broken, and a run works without it

            run = wandb.init(
                project=spec["project"],
                entity=spec["entity"],
                name=spec["run_name"],
                group=spec["group"],
                job_type=spec["job_type"],
                tags=spec["tags"],
                id=spec["run_id"],
                resume="allow",
                mode=mode,
                dir=str(self._folder.parent),
                config=spec["run_config"],
                settings=wandb.Settings(
                    init_timeout=spec["init_timeout_s"],
                    finish_timeout=FINISH_SHARE * spec["finish_timeout_s"],
                    finish_timeout_raises=True,
                    silent=True,
                    console="off",
                    disable_git=True,  # config.yaml and run.json say it, and it may be slow
                    x_stats_pid=spec["training_pid"],
                    x_transaction_log_flush_interval=FLUSH_S,
                ),
            )
            for axis in AXES:
                run.define_metric(axis, hidden=True)
            self._init_deadline = None
            return run
        except Exception as error:  # anything at all: W&B's failures are no reason to stop training
            reason = f"{type(error).__name__}: {str(error).partition(os.linesep)[0]}"
            if mode == "online":
                self._restart_offline(reason)
            self._say(f"not started ({reason}); the run goes on without it")
            return None

    def _watch(self, mode: Mode) -> None:
        """End what hangs: an init past its limit, one record, and everything some time after training is
        gone."""
        while True:
            time.sleep(POLL_S)
            now, init_deadline, busy_since = time.monotonic(), self._init_deadline, self._busy_since
            if init_deadline is not None and now > init_deadline:
                if mode == "online":
                    self._restart_offline(f"no answer in {self._spec['init_timeout_s']:g} s")
                self._say(f"did not start in {self._spec['init_timeout_s']:g} s; the run goes on without it")
                os._exit(GAVE_UP)
            if busy_since is not None and now > busy_since + self._spec["stall_limit_s"]:
                self._say(f"took no record for {self._spec['stall_limit_s']:g} s")
                self._end_service()
                os._exit(1)
            if os.getppid() != self._parent:
                self._end_after(with_grace(self._spec["finish_timeout_s"]))
                return

    def _restart_offline(self, reason: str) -> None:
        """Become a new process in offline mode, which begins at the same record."""
        self._say(f"online does not work ({reason}); going on offline")
        os.dup2(self._reports, 1)
        self._end_service()
        arguments = ["-m", "llmtrain.tracking.wandb_process", str(self._spec_path), "offline"]
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


if __name__ == "__main__":
    spec_path = Path(sys.argv[1])
    Process(spec_path).run("offline" if "offline" in sys.argv[2:] else read_json(spec_path)["mode"])
