"""Settings of the engines: who runs work units. Nothing here changes a byte of the output. stdlib only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from llmtrain.errors import ConfigError


class EngineKind(Enum):
    inline = "inline"
    """In this process, one unit after another."""
    local = "local"
    """Processes on this machine."""
    dask_slurm = "dask_slurm"
    """Jobs of a Slurm cluster, asked for by this process (`engine.slurm`), run by Dask."""
    dask_address = "dask_address"
    """The workers of a Dask scheduler that somebody else started (`engine.dask`)."""


@dataclass(kw_only=True)
class DaskConfig:
    """What both Dask engines need to know."""

    address: str | None = None
    """Of a running scheduler, as in tcp://10.0.0.7:8786. Only for kind=dask_address."""
    scheduler_file: str | None = None
    """File that `dask scheduler --scheduler-file FILE` wrote, instead of the address."""
    allowed_failures: int = 10
    """How many workers may die with a unit before the run gives up on it. Dask's own 3 is too few where jobs
    end by their time limit or are preempted (dask-jobqueue issues 122 and 270). A scheduler that somebody
    else started has a number of its own; a smaller one is warned of."""
    retries: int = 2
    """How often a unit is done again after an error of the operating system, as a file server has them for a
    moment. Other errors end the run at once."""
    max_in_flight: int = 10_000
    """Units that the scheduler knows at a time. More cost memory there and gain nothing."""
    worker_timeout_s: float = 120.0
    """How long to wait with no worker at all before the run gives up. While jobs of dask_slurm are queued or
    running, it waits on, however long the queue is."""

    def __post_init__(self) -> None:
        if self.allowed_failures < 0:
            raise ConfigError(f"engine.dask.allowed_failures={self.allowed_failures} must be at least 0")
        if self.retries < 0:
            raise ConfigError(f"engine.dask.retries={self.retries} must be at least 0")
        if self.max_in_flight < 1:
            raise ConfigError(f"engine.dask.max_in_flight={self.max_in_flight} must be at least 1")
        if self.worker_timeout_s <= 0:
            raise ConfigError(f"engine.dask.worker_timeout_s={self.worker_timeout_s} must be above 0")


@dataclass(kw_only=True)
class SlurmConfig:
    """One job of engine.kind=dask_slurm, and how many of them. Passed to dask-jobqueue's SLURMCluster."""

    queue: str | None = None
    """Partition; null: the cluster's default."""
    account: str | None = None
    """Whom to charge; null: the user's default."""
    cores: int = 1
    """Cores a job."""
    processes: int | None = None
    """Worker processes a job, each with one thread; null: one a core. Fewer leave cores idle, for units that
    need much memory."""
    memory_gib: float = 4.0
    """Memory a job, shared evenly by its processes. A process above 95 % of its share is ended and its unit
    done again."""
    walltime_hours: float = 4.0
    """Time limit of a job. Workers leave between 80 and 90 % of it, each at its own moment, and new jobs take
    their place."""
    max_jobs: int = 1
    """Jobs at a time, at most."""
    min_jobs: int | None = None
    """Jobs to keep while there is little to do; null: max_jobs. Between the two, Dask asks for jobs by the
    work that waits."""
    extra_directives: list[str] = field(default_factory=list)
    """More lines of the job's header, without `#SBATCH`, as in --qos=low."""
    prologue: list[str] = field(default_factory=list)
    """Shell commands before the worker starts, as in `module load python`."""
    interface: str | None = None
    """Network interface of scheduler and workers, as in ib0; null: the one of the default route."""
    local_directory: str | None = None
    """Where workers put what they need on a disk of their own; null: the temporary folder."""
    log_directory: str = "logs/dask"
    """Where the jobs' output goes."""
    python: str | None = None
    """Interpreter on the compute nodes; null: the one that runs this."""

    def __post_init__(self) -> None:
        for name in ("cores", "processes", "max_jobs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"engine.slurm.{name}={value} must be at least 1")
        if self.processes is not None and self.processes > self.cores:
            raise ConfigError(
                f"engine.slurm.processes={self.processes} must not exceed engine.slurm.cores={self.cores}: "
                "a process uses one core"
            )
        if self.memory_gib <= 0:
            raise ConfigError(f"engine.slurm.memory_gib={self.memory_gib} must be above 0")
        if self.walltime_hours < MIN_WALLTIME_HOURS:
            raise ConfigError(
                f"engine.slurm.walltime_hours={self.walltime_hours} must be at least {MIN_WALLTIME_HOURS}: "
                "a worker needs some time to start and to leave"
            )
        if self.min_jobs is not None and not 0 <= self.min_jobs <= self.max_jobs:
            raise ConfigError(
                f"engine.slurm.min_jobs={self.min_jobs} must lie in 0..engine.slurm.max_jobs={self.max_jobs}"
            )

    @property
    def num_processes(self) -> int:
        return self.cores if self.processes is None else self.processes


MIN_WALLTIME_HOURS = 0.05


@dataclass(kw_only=True)
class EngineConfig:
    """How the work is spread. Nothing here changes a byte of the output."""

    kind: EngineKind = EngineKind.local
    workers: int | None = None
    """Processes of kind=local; null: one for each core that this process may use."""
    unit_bytes: int = 16 << 20
    """Input bytes a work unit of the scan."""
    max_worker_deaths: int = 3
    """How many workers of kind=local may die with the same unit before the run gives up on it."""
    dask: DaskConfig = field(default_factory=DaskConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"engine.workers={self.workers} must be at least 1, or null for one a core")
        if self.unit_bytes < 1:
            raise ConfigError(f"engine.unit_bytes={self.unit_bytes} must be at least 1")
        if self.max_worker_deaths < 0:
            raise ConfigError(f"engine.max_worker_deaths={self.max_worker_deaths} must be at least 0")
        named = (self.dask.address, self.dask.scheduler_file)
        if self.kind is EngineKind.dask_address and (named[0] is None) == (named[1] is None):
            raise ConfigError(
                f"engine.kind=dask_address needs one of engine.dask.address={named[0]} and "
                f"engine.dask.scheduler_file={named[1]}; `dask scheduler --scheduler-file FILE` starts one "
                "and writes the file"
            )
