"""Hand a script to Slurm, and say what a person can do with the job then."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from shlex import quote

from llmtrain.errors import ConfigError, LaunchError
from llmtrain.launch.environment import outside_a_job
from llmtrain.launch.sbatch import Job

ASK_S = 60.0
"""How long Slurm's commands may take to answer."""
ANSWER = re.compile(r"(\d+)(?:;\S+)?")
"""sbatch --parsable: the job's id, and the cluster's name where there are several."""


def has_slurm() -> bool:
    return shutil.which("sbatch") is not None


def check(script: Path) -> str:
    """Ask Slurm whether it would take the job, without handing it over; its answer, when and where it would
    start.

    Raises:
        LaunchError: with Slurm's own words.
    """
    return _sbatch("--test-only", str(script)).stderr.strip()


def submit(script: Path) -> int:
    """Hand the job over, and return its id.

    Raises:
        ConfigError: this machine has no sbatch. LaunchError: Slurm refuses the job.
    """
    if not has_slurm():
        raise ConfigError(
            f"there is no sbatch on this machine; run `llmtrain submit` on a login node, or take {script} "
            "there"
        )
    answer = _sbatch("--parsable", str(script)).stdout.strip()
    match = ANSWER.fullmatch(answer)
    if match is None:
        raise LaunchError(f"sbatch --parsable {script} answered {answer!r}, which names no job")
    return int(match[1])


def _sbatch(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(
            ["sbatch", *arguments],
            env=outside_a_job(os.environ),
            capture_output=True,
            text=True,
            timeout=ASK_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LaunchError(f"Slurm does not answer within {ASK_S:.0f} s; is its controller up?") from error
    if done.returncode != 0:
        raise LaunchError(
            f"Slurm refuses the job: {done.stderr.strip()}; mend the setting of slurm. that asks for it"
        )
    return done


def advice(job: Job, number: int) -> list[str]:
    """Lines for the person who handed the job over."""
    name = f"{number}_*" if job.is_array else str(number)
    logs = quote(str(job.log_folder))
    lines = [
        f"logs      {job.log_folder}/{name}.out: starts and restarts; {name}.N.out: what node N prints",
        f"follow    tail -F {logs}/{name}.out {logs}/{name}.0.out",
        f"queue     squeue --jobs={number}",
        f"requeue   scancel --batch --signal=USR1 {number}   (ranks save first)",
        f"cancel    scancel {number}",
    ]
    follower = {"data": "train", "train": "evaluate"}.get(job.verb)
    if follower is not None:
        lines.append(f"after it  llmtrain submit {follower} ... slurm.after=[{number}]")
    return lines
