"""A failure capsule: one archive with all that it takes to do a failed step again, elsewhere and without the
data folder.

Rank 0 writes `<run>/capsules/step-<n>-attempt-<a>.tar.zst` when a step fails: config, versions, command
line, environment, the last records, what every rank said of itself, the rows of the step, tokens included,
and of the steps since the newest checkpoint, its reference and hash, and the checkpoint itself if the model
is small. Bounded in size and time; what did not fit or could not be read is named in it. It never raises into
the run. Values of variables that hold secrets are in no part of it. `llmtrain replay capsule=FILE` reads it
back. No torch.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from llmtrain import files
from llmtrain.checkpoint.find import checkpoint_path, list_checkpoints
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.checkpoint.storage import Place, place_of
from llmtrain.errors import DataError, DivergedError
from llmtrain.loader.documents import documents_of
from llmtrain.loader.ledger import LEDGER_NAME, hash_rows, read_ledger
from llmtrain.loader.open import OpenData
from llmtrain.model.size import num_params
from llmtrain.tracking.recorder import Recorder
from llmtrain.train.config import Intent, TrainRoot
from llmtrain.train.run_folder import RunFolder
from llmtrain.units import format_bytes

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
CAPSULES_NAME = "capsules"
RANKS_NAME = "ranks"
"""Folder of a run where ranks say what they do, and leave their stacks."""
MAX_CAPSULES = 20
"""Of a run: one that fails again and again must not fill the disk."""
TIME_LIMIT_S = 60.0
MAX_ROWS_BYTES = 64 << 20
"""Of token ids, four bytes each, before compression."""
MAX_WEIGHTS_BYTES = 64 << 20
"""Of fp32 weights: a larger model's checkpoint stays where it is. With the optimizer's state three times as
much goes in."""
MAX_FILE_BYTES = 1 << 20
"""Of a rank's file: its end."""
MAX_RANKS_BYTES = 32 << 20
MAX_METRICS_BYTES = 1 << 20
MAX_HISTORY_BYTES = 32 << 20
"""Of metrics.jsonl, for the steps since the checkpoint."""
NUM_RECORDS = 200

SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH|COOKIE|SIGNATURE|PRIVATE", re.IGNORECASE)
MIN_SECRET_LENGTH = 8
"""A shorter value is a word of everyday, and would be found everywhere."""
KEPT_VARIABLES = re.compile(
    r"(SLURM|NCCL|TORCH|PYTORCH|TORCHELASTIC|CUDA|NVIDIA|HIP|ROCR|OMP|KMP|MKL|ONEDNN|DNNL|OPENBLAS|GLOO|UCX|FI"
    r"|EFA|DS|ACCELERATE|LLMTRAIN|ATEN|NUMBA|PYTHON|XLA|GOMP)_.*"
    r"|RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|MASTER_ADDR|MASTER_PORT|HOSTNAME|LD_LIBRARY_PATH"
    r"|LD_PRELOAD|VIRTUAL_ENV|CONDA_PREFIX|LANG|LC_ALL|WANDB_MODE"
)
"""Variables that say how a run was started. All others stay out."""
USER_IN_URL = re.compile(r"(?<=://)[^/\s@:]+:[^/\s@]+(?=@)")

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class StepRows:
    """A step whose rows are in the capsule."""

    step: int
    num_rows: int
    """That are here; fewer than `num_asked` where the capsule would have grown too large."""
    num_asked: int
    lr: float | None
    loss: float | None = None
    """What the run recorded; None: nothing, or not a finite number."""
    grad_norm: float | None = None
    withheld: bool = False
    """Nothing was updated."""
    hash: str | None = None
    """Of the ledger; None where it has none."""


@dataclass(kw_only=True)
class Facts:
    """capsule.json."""

    format_version: int = FORMAT_VERSION
    run: str
    step: int
    """That failed, from 1."""
    attempt: int
    why: str
    """diverged, spike, hang, failed, ..."""
    error: str | None
    time: float
    recorded: dict[str, Any]
    """Of the failed step, as far as it is known: loss, grad_norm, lr; numbers that are not finite as text."""
    world_size: int
    seed: int
    micro_batch_rows: int
    started: dict[str, Any]
    """The attempt's entry of run.json: commit, versions, command line, host."""
    is_fresh: bool = False
    """Whether no checkpoint was there yet: weights are made from the seed."""
    weights_only: bool = False
    """Whether the checkpoint is that of a warm start: step 0, and no optimizer state."""
    checkpoint: dict[str, Any] | None = None
    """path, step, manifest_sha256, state and is_inside; None: fresh, or it could not be opened."""
    steps: list[StepRows] = field(default_factory=list)
    """Those since the checkpoint, the failed one last. Only that one where they were too many."""
    left_out: list[str] = field(default_factory=list)
    """What did not fit, or could not be read, and why."""


@dataclass(frozen=True)
class Written:
    step: int
    path: Path
    num_bytes: int
    seconds: float
    left_out: list[str]

    def figures(self) -> dict[str, float]:
        """For the event."""
        return {"num_bytes": self.num_bytes, "seconds": self.seconds, "num_left_out": len(self.left_out)}


@dataclass
class _Now:
    """The step under way."""

    step: int
    positions: Int64
    recorded: dict[str, Any] = field(default_factory=dict)


class Capsules:
    """Rank 0's writer of one attempt's capsules. The loop tells it of each step, which costs nothing; `write`
    may be called from any thread."""

    def __init__(
        self,
        cfg: TrainRoot,
        data: OpenData,
        *,
        attempt: int,
        world_size: int,
        config_text: str,
        source: str | None,
    ) -> None:
        """
        Args:
            source: the checkpoint that this attempt began with; None: fresh weights.
        """
        self.cfg = cfg
        self.data = data
        self.attempt = attempt
        self.world_size = world_size
        self.config_text = config_text
        self.source = source
        self.folder = RunFolder(Path(cfg.run.folder), cfg.save.folder)
        self.num_written = 0
        self.num_failed = 0
        """Capsules that could not be written, or that were too many."""
        self._now: _Now | None = None
        self._lock = threading.Lock()

    def begin_step(self, step: int, *, positions: Int64) -> None:
        """Note what is about to be done: an error has no way to say so."""
        self._now = _Now(step, positions)

    def note(self, **facts: float | str | None) -> None:
        """What is known of the step by now: lr, loss, grad_norm, ..."""
        if self._now is not None:
            self._now.recorded |= facts

    def end_step(self) -> None:
        """What fails from here on is no step."""
        self._now = None

    def write(
        self, why: str, *, error: BaseException | str | None = None, time_limit_s: float = TIME_LIMIT_S
    ) -> Written | None:
        """Write a capsule of the step under way. Never raises. None if there is none: no step is under way,
        or it could not be written, which a warning says."""
        now = self._now
        if now is None:
            return None
        start = time.monotonic()
        told = (
            None if error is None else error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        )
        outcome: list[Written | Exception] = []

        def work() -> None:
            try:
                with self._lock:
                    outcome.append(self._write(now, why, told, start, start + time_limit_s))
            except Exception as failure:  # whatever it is, the run has a failure of its own to tell
                outcome.append(failure)

        # a daemon: a file system that never answers must not keep a failed run from ending
        writer = threading.Thread(target=work, name="failure capsule", daemon=True)
        try:
            writer.start()
            writer.join(time_limit_s + 1.0)
            result = outcome[0] if outcome else TimeoutError(f"not done after {time_limit_s:g} s")
        except RuntimeError as failure:  # no thread can be started any more
            result = failure
        if isinstance(result, Exception):
            self.num_failed += 1
            log.warning("no capsule of step %d: %s: %s", now.step, type(result).__name__, result)
            return None
        self.num_written += 1
        log.warning(
            "capsule of step %d: %s, %s in %.1f s; `llmtrain replay capsule=%s` does the step again%s",
            *(now.step, result.path, format_bytes(result.num_bytes), result.seconds, result.path),
            f"; not in it: {'; '.join(result.left_out)}" if result.left_out else "",
        )
        return result

    def _write(self, now: _Now, why: str, error: str | None, start: float, deadline: float) -> Written:
        folder = self.folder.path / CAPSULES_NAME
        path = folder / f"step-{now.step:08d}-attempt-{self.attempt}.tar.zst"
        there = [each.name for each in folder.glob("step-*.tar.zst")] if folder.is_dir() else []
        if len(there) >= MAX_CAPSULES and path.name not in there:
            raise DataError(f"{folder} has {len(there)} already; move some away to get more")
        started = files.read_json(self.folder.facts)["attempts"][-1]
        facts = Facts(
            run=self.cfg.run.name,
            step=now.step,
            attempt=self.attempt,
            why=why,
            error=error,
            time=time.time(),
            recorded={name: _plain(value) for name, value in now.recorded.items()},
            world_size=self.world_size,
            seed=self.cfg.run.seed,
            micro_batch_rows=self.cfg.train.micro_batch_rows,
            started=started,
        )
        scrub = Scrubber(os.environ)
        with files.atomic_write(path) as handle:
            archive = _Archive(handle, facts.left_out, scrub, deadline)
            archive.text("config.yaml", self.config_text)
            archive.text("environment.json", json.dumps(scrub.environment(), indent=1))
            archive.text("metrics.jsonl", partial(_last_records, self.folder.metrics))
            self._add_rank_files(archive)
            reader = archive.attempt("the checkpoint", partial(self._checkpoint, now.step, facts))
            rows = archive.attempt("rows", partial(self._rows, archive, now, reader, facts))
            for name, values in (rows or {}).items():
                archive.array(f"rows/{name}.npy", values)
            archive.text("documents.json", partial(self._documents, now))
            self._add_checkpoint(archive, facts, reader)
            archive.text("capsule.json", json.dumps(asdict(facts), indent=1))
            archive.close()
        return Written(now.step, path, path.stat().st_size, time.monotonic() - start, facts.left_out)

    def _add_rank_files(self, archive: _Archive) -> None:
        folder = self.folder.path / RANKS_NAME
        total = 0
        for each in sorted(folder.iterdir()) if folder.is_dir() else []:
            text = archive.attempt(str(each), partial(_end_of, each, MAX_FILE_BYTES))
            if text is None:
                continue
            if total + len(text) > MAX_RANKS_BYTES:
                archive.left_out.append(f"{each} and later ones: more than {format_bytes(MAX_RANKS_BYTES)}")
                return
            total += len(text)
            archive.text(f"{RANKS_NAME}/{each.name}", text)

    def _checkpoint(self, step: int, facts: Facts) -> CheckpointReader | None:
        """The newest from before `step`; None: fresh weights."""
        own = self.folder.checkpoints
        before = [number for number in list_checkpoints(own) if number < step]
        place: Place | None = checkpoint_path(own, before[-1]) if before else None
        if place is None and self.source is not None:
            place = place_of(self.source)
            facts.weights_only = self.cfg.run.intent is Intent.warm_start
        facts.is_fresh = place is None
        return None if place is None else CheckpointReader(place)

    def _add_checkpoint(self, archive: _Archive, facts: Facts, reader: CheckpointReader | None) -> None:
        if reader is None:
            return
        is_small = num_params(self.cfg.model) * 4 <= MAX_WEIGHTS_BYTES
        state = {
            name: reader.state.get(name)
            for name in ("num_optimizer_steps", "loss_scale", "position", "model")
        }
        facts.checkpoint = {
            "path": str(reader.path),
            "step": reader.step,
            "manifest_sha256": reader.manifest_hash,
            "state": state,
            "is_inside": is_small,
        }
        if not is_small:
            return
        for kind in reader.kinds:
            for name in reader.shapes(kind):
                member = f"checkpoint/{kind}/{name}.npy"
                if not archive.array(member, partial(reader.read, kind, name)):
                    facts.checkpoint["is_inside"] = False
                    return

    def _rows(
        self, archive: _Archive, now: _Now, reader: CheckpointReader | None, facts: Facts
    ) -> dict[str, npt.NDArray[Any]]:
        """What the failed step read, and before it the steps since the checkpoint, if all of it fits."""
        most = max(1, MAX_ROWS_BYTES // (4 * self.cfg.data.seq_len))
        own = now.positions[:most]
        if len(own) < len(now.positions):
            facts.left_out.append(f"rows: {len(now.positions) - len(own):,} of {len(now.positions):,}")
        before: list[tuple[StepRows, Int64]] = []
        if reader is not None or facts.is_fresh:
            first = 0 if reader is None or facts.weights_only else reader.step
            what = "the steps since the checkpoint"
            before = archive.attempt(what, partial(self._steps_between, first, now.step)) or []
            if sum(len(at) for _, at in before) + len(own) > most:
                facts.left_out.append(f"{what}: more than {format_bytes(MAX_ROWS_BYTES)} of rows")
                before = []
        places = np.concatenate([*(at for _, at in before), own]).astype(np.int64)
        numbers = self.data.order.rows_at(places)
        rows = self.data.train.read_many(numbers)
        failed = StepRows(
            step=now.step,
            num_rows=len(own),
            num_asked=len(now.positions),
            lr=_finite(facts.recorded.get("lr")),
            loss=_finite(facts.recorded.get("loss")),
            grad_norm=_finite(facts.recorded.get("grad_norm")),
            hash=f"{hash_rows(own, rows.tokens[len(places) - len(own) :]):016x}",
        )
        noted = archive.attempt("the ledger", partial(self._noted_hash, now))
        if noted is not None and len(own) == len(now.positions) and noted != failed.hash:
            facts.left_out.append(
                f"rows as the step read them: their hash was {noted}, and is {failed.hash} now"
            )
        facts.steps = [*(step for step, _ in before), failed]
        return {
            "places": places,
            "numbers": numbers,
            "tokens": rows.tokens.astype(np.uint32),
            "targets": rows.targets.astype(np.int32),
            "positions": rows.positions.astype(np.int32),
            "segments": rows.segments.astype(np.int32),
        }

    def _documents(self, now: _Now) -> str:
        """Which documents are in the step's rows."""
        return json.dumps(documents_of(self.data, now.positions, packing=self.cfg.data.packing))

    def _noted_hash(self, now: _Now) -> str | None:
        """Of the step's tokens as it read them; None if it had not come so far."""
        for entry in reversed(read_ledger(self.folder.path / LEDGER_NAME).steps):
            if (entry.attempt, entry.step, entry.first) == (self.attempt, now.step, int(now.positions[0])):
                return entry.hash
        return None

    def _steps_between(self, first: int, step: int) -> list[tuple[StepRows, Int64]]:
        """Steps after `first` and before `step` as the run has done them, and their rows."""
        ledger = read_ledger(self.folder.path / LEDGER_NAME)
        starts = {(each.attempt, each.part): each for each in ledger.attempts}
        records = _step_records(self.folder.metrics)
        found = []
        for entry in ledger.surviving():
            if not first < entry.step < step:
                continue
            record = records.get(entry.step, {})
            if "lr" not in record:
                raise DataError(f"metrics.jsonl does not tell the learning rate of step {entry.step}")
            passed_over = starts[entry.attempt, entry.part].passed_over
            at = passed_over.positions_between(entry.first, entry.last)
            told = StepRows(
                step=entry.step,
                num_rows=len(at),
                num_asked=len(at),
                lr=record["lr"],
                loss=record.get("loss"),
                grad_norm=record.get("grad_norm"),
                withheld=entry.withheld,
                hash=entry.hash,
            )
            found.append((told, at))
        return found


def keep(capsules: Capsules | None, recorder: Recorder, why: str, error: BaseException | str) -> None:
    """Write a capsule of the step under way, and say so in the run's records. None: of another rank's."""
    if capsules is not None and (done := capsules.write(why, error=error)) is not None:
        recorder.event("capsule", done.step, why=why, file=done.path.name, **done.figures())


@contextmanager
def kept(capsules: Capsules | None, recorder: Recorder) -> Iterator[None]:
    """Around all steps: an error that ends them leaves a capsule."""
    try:
        yield
    except Exception as error:
        keep(capsules, recorder, "diverged" if isinstance(error, DivergedError) else "failed", error)
        raise


class Scrubber:
    """Takes out of texts what no file may hold: values of variables whose names say that they are secret,
    and names and passwords in URLs."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        secrets = {
            name: value
            for name, value in environment.items()
            if SECRET_NAME.search(name) and len(value) >= MIN_SECRET_LENGTH
        }
        self._secrets = sorted(secrets.items(), key=lambda pair: -len(pair[1]))

    def text(self, text: str) -> str:
        for name, value in self._secrets:
            text = text.replace(value, f"<{name}>")
        return USER_IN_URL.sub("<user>", text)

    def environment(self) -> dict[str, str]:
        """The variables that say how a run was started."""
        return {
            name: self.text(value)
            for name, value in sorted(self._environment.items())
            if KEPT_VARIABLES.fullmatch(name) and not SECRET_NAME.search(name)
        }


class _Archive:
    """A compressed tar that is written member by member, until the time is up."""

    def __init__(self, handle: Any, left_out: list[str], scrub: Scrubber, deadline: float) -> None:
        self.left_out = left_out
        self._scrub = scrub
        self._deadline = deadline
        self._compressor = zstandard.ZstdCompressor(level=3).stream_writer(handle, closefd=False)
        self._tar = tarfile.open(fileobj=self._compressor, mode="w|")  # noqa: SIM115 - closed in close()

    def attempt(self, what: str, get: Callable[[], Any]) -> Any:
        """What `get` returns; None, and a note, if it fails or the time is up."""
        if time.monotonic() > self._deadline:
            self.left_out.append(f"{what}: the time was up")
            return None
        try:
            return get()
        except Exception as error:  # of any disk, store or file: the rest is worth having
            self.left_out.append(f"{what}: {type(error).__name__}: {self._scrub.text(str(error))}")
            return None

    def text(self, name: str, text: str | Callable[[], str]) -> None:
        found = text if isinstance(text, str) else self.attempt(name, text)
        if found is not None:
            self._add(name, self._scrub.text(found).encode())

    def array(self, name: str, values: npt.NDArray[Any] | Callable[[], npt.NDArray[Any]]) -> bool:
        """Whether it is in."""
        found = self.attempt(name, values) if callable(values) else values
        if found is None:
            return False
        content = io.BytesIO()
        np.save(content, found, allow_pickle=False)
        self._add(name, content.getvalue())
        return True

    def close(self) -> None:
        self._tar.close()
        self._compressor.close()  # type: ignore[no-untyped-call]

    def _add(self, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size, member.mtime, member.mode = len(content), int(time.time()), 0o600
        self._tar.addfile(member, io.BytesIO(content))


@dataclass(frozen=True)
class Capsule:
    """One that was read back."""

    path: Path
    facts: Facts
    members: dict[str, bytes]

    def text(self, name: str) -> str:
        return self.members[name].decode()

    def array(self, name: str) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = np.load(io.BytesIO(self.members[name]), allow_pickle=False)
        return found

    def read(self, kind: str, name: str) -> npt.NDArray[Any]:
        """A tensor of the checkpoint inside."""
        return self.array(f"checkpoint/{kind}/{name}.npy")


def read_capsule(path: Path) -> Capsule:
    """
    Raises:
        DataError: it is not there, not whole, or of another version.
    """
    try:
        with open(path, "rb") as handle, zstandard.ZstdDecompressor().stream_reader(handle) as stream:
            members = {}
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    content = tar.extractfile(member)
                    if content is not None:
                        members[member.name] = content.read()
        told = json.loads(members["capsule.json"])
        if told["format_version"] != FORMAT_VERSION:
            raise DataError(
                f"{path} has capsule format_version={told['format_version']}, and this llmtrain reads "
                f"{FORMAT_VERSION}; read it with the llmtrain that wrote it"
            )
        steps = [StepRows(**each) for each in told.pop("steps")]
        return Capsule(path, Facts(**told, steps=steps), members)
    except (OSError, ValueError, KeyError, TypeError, tarfile.TarError, zstandard.ZstdError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read as a capsule: {type(error).__name__}: {error}") from error


def _last_records(path: Path) -> str:
    """The last lines of metrics.jsonl."""
    return "".join(f"{line}\n" for line in _end_of(path, MAX_METRICS_BYTES).splitlines()[-NUM_RECORDS:])


def _step_records(path: Path) -> dict[int, dict[str, Any]]:
    """The newest record of each step. A line that is being written, by another thread, is passed over."""
    found = {}
    for line in _end_of(path, MAX_HISTORY_BYTES).splitlines():
        with suppress(ValueError):
            record = json.loads(line)
            if record["kind"] == "step":
                found[record["step"]] = record
    return found


def _end_of(path: Path, num_bytes: int) -> str:
    with open(path, "rb") as handle:
        size = handle.seek(0, os.SEEK_END)
        handle.seek(max(0, size - num_bytes))
        text = handle.read(num_bytes).decode(errors="replace")
    return text.partition("\n")[2] if size > num_bytes else text


def _plain(value: Any) -> Any:
    """As JSON takes it: what is not finite becomes text."""
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None
