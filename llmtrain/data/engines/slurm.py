"""Workers of a Dask scheduler as jobs of Slurm, through dask-jobqueue's SLURMCluster (version 0.9).

The scheduler is a thread of this process. Jobs come and go: their time limit ends, they are preempted, a node
fails. dask-jobqueue's issues 122 and 270 tell how such a cluster fails with the settings that come with Dask;
the answers are here: workers leave before their limit and not all at once, as many jobs as wanted are asked
for again, and a unit may lose many workers.
"""

from __future__ import annotations

import logging
import shutil
import signal
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import dask
from distributed import Client

from llmtrain.data.engines.config import DaskConfig, SlurmConfig
from llmtrain.data.engines.dask import client_of, quieten
from llmtrain.data.engines.unit import ONE_THREAD
from llmtrain.errors import ConfigError, LaunchError

log = logging.getLogger(__name__)

LIFETIME, STAGGER = 0.85, 0.05
"""Shares of a job's time limit: a worker leaves at 0.85, give or take 0.05 at random."""
WORKER_ENVIRONMENT = {
    **ONE_THREAD,
    # Workers keep no data, so there is nothing to spill, and a paused one would only wait for itself.
    "DASK_DISTRIBUTED__WORKER__MEMORY__TARGET": "False",
    "DASK_DISTRIBUTED__WORKER__MEMORY__SPILL": "False",
    "DASK_DISTRIBUTED__WORKER__MEMORY__PAUSE": "False",
    "DASK_DISTRIBUTED__WORKER__MEMORY__TERMINATE": "0.95",
    "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
}
SETTINGS = {
    "distributed.scheduler.worker-saturation": 1.0,  # what waits, waits here and not with a worker
    # `tend` replaces lost jobs; Dask's own way would cancel the new one while it is queued.
    "distributed.deploy.lost-worker-timeout": "365 days",
    # Between min_jobs and max_jobs: jobs for five minutes of work at a time, let go after five idle minutes.
    # Assumed, not measured: a queue takes minutes, and after Dask's own seconds jobs would go between passes.
    "distributed.adaptive.target-duration": "5 minutes",
    "distributed.adaptive.interval": "5 seconds",
    "distributed.adaptive.wait-count": 60,
}
"""Of Dask, while there are jobs."""
ASK_S = 60.0
"""How long Slurm's commands may take to answer."""
LIVE_STATES = "PENDING,CONFIGURING,RUNNING,SUSPENDED"
FRUITLESS_ROUNDS = 5
"""How often all jobs may end without a unit done before the run gives up."""


class SlurmJobs:
    """Jobs with worker processes, as many as `engine.slurm` allows, and the scheduler that they work for."""

    def __init__(self, cfg: SlurmConfig, dask_cfg: DaskConfig) -> None:
        self.cfg = cfg
        self.dask_cfg = dask_cfg
        self.log_directory = Path(cfg.log_directory).absolute()
        self.may_be_long = True
        self.advice = f"jobs' messages are in {self.log_directory}"
        self._num_fruitless = 0
        self._cluster: Any = None  # Any: dask_jobqueue.SLURMCluster, see load_jobqueue
        self._settings = ExitStack()

    def connect(self) -> Client:
        """Start the scheduler here and ask Slurm for jobs.

        Raises:
            ConfigError: this machine cannot submit jobs. LaunchError: Slurm refuses the job.
        """
        if shutil.which("sbatch") is None:
            raise ConfigError(
                "engine.kind=dask_slurm needs the command sbatch on this machine; run it on a login node, or "
                "start workers in another way and use engine.kind=dask_address"
            )
        quieten()
        self._settings.enter_context(dask.config.set(SETTINGS))
        try:
            self._cluster = load_jobqueue().SLURMCluster(
                **job_arguments(self.cfg, self.log_directory),
                scheduler_options={
                    "allowed_failures": self.dask_cfg.allowed_failures,
                    "dashboard": False,
                    "dashboard_address": ":0",
                },
            )
            check_job(self._cluster.job_script())
            min_jobs = self.cfg.max_jobs if self.cfg.min_jobs is None else self.cfg.min_jobs
            self._cluster.adapt(minimum_jobs=min_jobs, maximum_jobs=self.cfg.max_jobs)
            log.info(
                "asking Slurm for %d to %d jobs of %d processes", min_jobs, self.cfg.max_jobs,
                self.cfg.num_processes,
            )  # fmt: skip
            return client_of(address=self._cluster)
        except BaseException:
            self.close()
            raise

    def tend(self, *, has_progressed: bool) -> None:
        """Ask again for jobs that ended: by their time limit, preempted, failed, or cancelled.

        dask-jobqueue itself does so only for jobs of one process.

        Raises:
            LaunchError: job after job ends, and no unit was done.
        """
        assert self._cluster is not None, "connect() comes first"
        jobs = {name: str(job.job_id) for name, job in self._cluster.workers.items()}
        live = live_jobs()  # after the line above: a job asked for in between is none of `jobs`
        if live is None:
            return
        ended = [name for name, job in jobs.items() if job not in live]
        self._num_fruitless = len(ended) + (0 if has_progressed else self._num_fruitless)
        if self._num_fruitless > FRUITLESS_ROUNDS * self.cfg.max_jobs:
            raise LaunchError(
                f"{self._num_fruitless} jobs ended one after the other without a unit done; their messages "
                f"are in {self.log_directory}, and engine.slurm says what they ask for and start. What is "
                "done stays done: the same command goes on there"
            )
        if ended:
            log.info("%d jobs have ended; asking for new ones", len(ended))
            self._cluster.sync(self._forget, ended)

    async def _forget(self, names: list[str]) -> None:
        """On the cluster's own thread: drop jobs, and let it find that they are missing."""
        assert self._cluster is not None, "connect() comes first"
        for name in names:
            job = self._cluster.workers.pop(name, None)
            if job is not None:
                await job.close()

    def close(self) -> None:
        """Cancel the jobs and end the scheduler."""
        if self._cluster is not None:
            self._cluster.close()
            self._cluster = None
        self._settings.close()


def load_jobqueue() -> ModuleType:
    """dask_jobqueue, without the handlers that it sets when it is imported: Ctrl-C would end a run as if it
    had succeeded."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    import dask_jobqueue  # noqa: PLC0415 - sets signal handlers, taken back below

    for number, handler in handlers.items():
        signal.signal(number, handler)
    module: ModuleType = dask_jobqueue
    return module


def job_arguments(cfg: SlurmConfig, log_directory: Path) -> dict[str, Any]:  # Any: of Dask's SLURMCluster
    """A job as dask-jobqueue takes it."""
    walltime_s = round(cfg.walltime_hours * 3600)
    hours, rest_s = divmod(walltime_s, 3600)
    return {
        "queue": cfg.queue,
        "account": cfg.account,
        "cores": cfg.num_processes,  # one thread each
        "processes": cfg.num_processes,
        "job_cpu": cfg.cores,
        "memory": f"{cfg.memory_gib}GiB",
        "walltime": f"{hours:02d}:{rest_s // 60:02d}:{rest_s % 60:02d}",
        "job_extra_directives": list(cfg.extra_directives),
        "job_script_prologue": [
            *(f"export {name}={value}" for name, value in WORKER_ENVIRONMENT.items()),
            *cfg.prologue,
        ],
        "worker_extra_args": [
            "--lifetime", f"{round(LIFETIME * walltime_s)}s",
            "--lifetime-stagger", f"{round(STAGGER * walltime_s)}s",
            "--no-dashboard",
        ],
        "interface": cfg.interface,
        "local_directory": cfg.local_directory,
        "log_directory": str(log_directory),
        "python": cfg.python,
    }  # fmt: skip


def live_jobs() -> set[str] | None:
    """Ids of the user's jobs that are queued or running; None when Slurm does not answer, as it does at
    times."""
    asked = ["squeue", "--me", "--noheader", f"--states={LIVE_STATES}", "--format=%i"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=ASK_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("Slurm does not say which jobs there are: %s", error)
        return None
    return set(answer.stdout.split())


def check_job(script: str) -> None:
    """Ask Slurm whether it would take the job, without submitting it: what it refuses later, only logs tell.

    Raises:
        LaunchError: with Slurm's own words.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".sh", encoding="utf-8") as file:
        file.write(script)
        file.flush()
        try:
            answer = subprocess.run(
                ["sbatch", "--test-only", file.name],
                capture_output=True,
                text=True,
                timeout=ASK_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise LaunchError(f"Slurm does not answer within {ASK_S:.0f} s; is its controller up?") from error
    if answer.returncode != 0:
        raise LaunchError(
            f"Slurm refuses the job that engine.slurm describes: {answer.stderr.strip()}; mend its settings"
        )
