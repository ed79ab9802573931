"""What a job of Slurm asks for, where it runs, and how often it starts again. stdlib only.

A value either goes into a line of `#SBATCH`, which knows no safe quoting, and is refused when it holds
anything but plain characters; or it goes into the shell's part of the script, and is quoted there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum

from llmtrain.errors import ConfigError
from llmtrain.launch.environment import check_environment, check_names

PLAIN = re.compile(r"[\w.+@:=,/~%-]+")
"""What names, times and paths in a line of #SBATCH may be made of."""
EXPRESSION = re.compile(r"[\w.+@:=,/~%&|*!()\[\]-]+")
"""What a constraint or a list of nodes may be made of: operators too."""
TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d\d))?(?::(\d\d))?")
MIN_SIGNAL_LEAD_S = 30


class ContainerKind(Enum):
    none = "none"
    """The nodes' own system."""
    pyxis = "pyxis"
    """NVIDIA's plugin of Slurm (github.com/NVIDIA/pyxis) over enroot: options of srun."""
    apptainer = "apptainer"
    """`apptainer exec` on every node (apptainer.org)."""


class After(Enum):
    """How the jobs of slurm.after must have ended (sbatch's manual, --dependency)."""

    ok = "ok"
    """With status 0. Else this job is cancelled."""
    not_ok = "not_ok"
    """With another status. Else this job is cancelled."""
    any = "any"
    """In any way."""

    @property
    def word(self) -> str:
        return {After.ok: "afterok", After.not_ok: "afternotok", After.any: "afterany"}[self]


@dataclass(kw_only=True)
class ContainerConfig:
    kind: ContainerKind = ContainerKind.none
    image: str | None = None
    """A .sqsh or a registry's name for pyxis, a .sif for apptainer."""
    mounts: list[str] = field(default_factory=list)
    """Folders besides the one that `llmtrain submit` is run in, as in /data:/data: data, runs, site files."""

    def __post_init__(self) -> None:
        if (self.kind is ContainerKind.none) != (self.image is None):
            raise ConfigError(
                f"slurm.container.kind={self.kind.name} with slurm.container.image={self.image}: pyxis and "
                "apptainer need an image, and without a container there is none"
            )
        for mount in self.mounts:
            if "," in mount or not mount.startswith("/"):
                raise ConfigError(
                    f"slurm.container.mounts: {mount!r} must be one absolute path, or two joined by a colon"
                )


@dataclass(kw_only=True)
class SlurmConfig:
    """One job. Its name, logs and rank counts follow from here; conf/slurm has settings of sites."""

    nodes: int = 1
    gpus_per_node: int = 8
    """GPUs of each node, a rank each; 0 for a run on CPUs."""
    gpu_type: str | None = None
    """As the site names it in its gres, as in h100; null: whichever."""
    cpu_ranks_per_node: int = 2
    """Ranks of each node at gpus_per_node=0; no effect otherwise."""
    cpus_per_rank: int | None = 8
    """Cores, as Slurm counts them, for each rank, so for each GPU; null: what comes with the whole node,
    which slurm.exclusive asks for."""
    memory: str | None = None
    """Of a node, as in 500G; 0: all of it; null: the site's default for the cores."""
    exclusive: bool = False
    """Whether nodes are shared with nobody."""
    time: str = "1-00:00:00"
    """Limit of one start, as in 12:00:00 or 2-00:00:00. With requeue the run may take many of them."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    """Features that nodes must have, as in a100&nvlink."""
    exclude: str | None = None
    """Nodes to stay away from, as in gpu[003,017]."""
    reservation: str | None = None
    directives: list[str] = field(default_factory=list)
    """More options of sbatch, each as in --mail-type=END."""
    job_name: str | None = None
    """null: run.name for `train`, else the verb."""
    log_folder: str | None = None
    """null: slurm/ in run.folder for `train`, else logs/slurm. On a file system that all nodes share."""

    container: ContainerConfig = field(default_factory=ContainerConfig)
    venv: str | None = None
    """Folder whose bin/python runs; null: the interpreter of `llmtrain submit`, in a container python3."""
    modules: list[str] = field(default_factory=list)
    """For `module load`, in this order."""
    scripts: list[str] = field(default_factory=list)
    """Files that the job sources after its modules, as sites give them for their network."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of the job. They stand in the script for all to read: no secrets."""
    pass_environment: list[str] = field(default_factory=lambda: ["WANDB_API_KEY", "HF_TOKEN"])
    """Names of variables that the job gets from whoever submits it, where they are set; Slurm hands their
    values on, and no file of ours holds them. Beside these, a job gets HOME, LANG, PATH and USER."""

    signal_lead_s: int = 300
    """How long before the time limit ranks are told to save and leave: longer than a step, an evaluation
    and a save together take. Slurm may be up to a minute early."""
    requeue: bool = True
    """Whether the job stands in the queue again after its time limit, preemption or a node's failure."""
    max_restarts: int = 100
    """How often it may start again, Slurm's own requeues included. Assumed, not measured: a hundred days of
    a partition with a limit of one."""
    max_failures: int = 2
    """How often in one start the run may fail and be started again on the same nodes."""
    after: list[int] = field(default_factory=list)
    """Ids of jobs that must end before this one starts. What is checked of `train` here is only its config
    then, as its data may not be there yet."""
    after_end: After = After.ok
    """No effect without slurm.after."""
    singleton: bool = False
    """Whether to wait for all my jobs of the same name."""
    max_array_tasks: int | None = None
    """How many runs of a sweep (-m) may run at a time; null: as many as the cluster has room for."""
    dry_run: bool = False
    """Whether to print the script and hand nothing over; `--dry-run` says the same."""

    def __post_init__(self) -> None:
        self._check_numbers()
        for name in ("partition", "account", "qos", "reservation", "gpu_type", "memory", "job_name"):
            check_plain(name, getattr(self, name))
        check_plain("log_folder", self.log_folder)
        for name in ("constraint", "exclude"):
            check_plain(name, getattr(self, name), EXPRESSION)
        for directive in self.directives:
            if not directive.startswith("--"):
                raise ConfigError(
                    f"slurm.directives: {directive!r} must be a long option of sbatch, as in --mail-type=END"
                )
            check_plain("directives", directive, EXPRESSION)
        check_environment(self.environment)
        check_names("slurm.pass_environment", self.pass_environment)

    def _check_numbers(self) -> None:
        for name in ("nodes", "cpu_ranks_per_node", "cpus_per_rank", "max_array_tasks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"slurm.{name}={value} must be at least 1")
        for name in ("gpus_per_node", "max_restarts", "max_failures"):
            if getattr(self, name) < 0:
                raise ConfigError(f"slurm.{name}={getattr(self, name)} must be at least 0")
        if any(job < 1 for job in self.after):
            raise ConfigError(
                f"slurm.after={self.after} must be ids of jobs, as `llmtrain submit` prints them"
            )
        if self.cpus_per_rank is None and not self.exclusive:
            raise ConfigError(
                "slurm.cpus_per_rank=null with slurm.exclusive=false: a job that asks for no cores gets one; "
                "give a number, or take whole nodes with slurm.exclusive=true"
            )
        if not MIN_SIGNAL_LEAD_S <= self.signal_lead_s < self.time_s:
            raise ConfigError(
                f"slurm.signal_lead_s={self.signal_lead_s} must be at least {MIN_SIGNAL_LEAD_S} and less "
                f"than slurm.time={self.time}, {self.time_s} s: a run takes time to save, and more to train"
            )

    @property
    def time_s(self) -> int:
        return seconds_of(self.time)

    @property
    def ranks_per_node(self) -> int:
        return self.gpus_per_node or self.cpu_ranks_per_node

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.ranks_per_node


def seconds_of(time: str) -> int:
    """A time limit in seconds: HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS.

    Slurm takes more forms. Not here: a number alone is minutes to Slurm and, written in YAML without quotes,
    12:00:00 arrives as the number 43200.
    """
    match = TIME.fullmatch(time)
    if match is None or (match[1] is None and match[4] is None):
        raise ConfigError(
            f"slurm.time={time!r} must look like 12:00:00 or 2-00:00:00; in a YAML file with quotes, "
            '"12:00:00"'
        )
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def check_plain(name: str, value: str | None, allowed: re.Pattern[str] = PLAIN) -> None:
    """Raise on what a line of #SBATCH could not hold."""
    if value is not None and not allowed.fullmatch(value):
        odd = " ".join(sorted({repr(mark) for mark in allowed.sub("", value)})) or "nothing"
        raise ConfigError(
            f"slurm.{name}={value!r} holds {odd}, and a line of #SBATCH has no safe way to write that; "
            "use letters, digits and simple marks"
        )
