"""Which variables a job gets: some by value in its script, some by name from whoever submits it. stdlib
only."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from llmtrain.errors import ConfigError

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
ALWAYS_PASSED = ("HOME", "LANG", "PATH", "USER")
"""What programs take for granted. Nothing else of a login shell reaches a job: half an environment of conda
would, and no second job would be like the first."""
SECRET_WORDS = {"KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL", "CREDENTIALS"}
MIN_SECRET_LENGTH = 8
"""Shorter values are found by chance."""


def looks_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret: WANDB_API_KEY does, TOKENIZERS_PARALLELISM does not."""
    return not SECRET_WORDS.isdisjoint(name.upper().split("_"))


def check_names(setting: str, names: Iterable[str]) -> None:
    for name in names:
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"{setting}: {name!r} is no name of a variable; letters, digits and _ make one, and values "
                "do not belong there"
            )


def check_environment(environment: Mapping[str, str]) -> None:
    """Raise on a name that is none, and on one whose value would be a secret in a file."""
    check_names("slurm.environment", environment)
    secret = [name for name in environment if looks_secret(name)]
    if secret:
        raise ConfigError(
            f"slurm.environment.{secret[0]} sounds like a secret, and would stand in the script for all to "
            f"read; export {secret[0]} in your shell and put the name into slurm.pass_environment"
        )


def refuse_secrets(text: str, environ: Mapping[str, str], names: Iterable[str]) -> None:
    """Raise when `text` holds the value of a variable that is passed on by name, or sounds like a secret.

    Args:
        environ: of whoever submits.
        names: of slurm.pass_environment.
    """
    for name in sorted({*names, *filter(looks_secret, environ)}):
        value = environ.get(name, "")
        if len(value) >= MIN_SECRET_LENGTH and value in text:
            raise ConfigError(
                f"the job's script would hold the value of {name}; take it out of the overrides and "
                "settings: a job gets it by slurm.pass_environment"
            )


def outside_a_job(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` without what Slurm says of the job that we may be in: sbatch would hand it to the new one."""
    return {
        name: value
        for name, value in environ.items()
        if not name.startswith("SLURM_") or name == "SLURM_CONF"
    }


def job_end(environment: Mapping[str, str]) -> float:
    """Unix seconds at which Slurm ends this job; infinite outside of one (sbatch's manual, output
    environment variables)."""
    told = environment.get("SLURM_JOB_END_TIME", "")
    return float(told) if told.isdigit() and int(told) > 0 else math.inf


def array_job(environment: Mapping[str, str]) -> str | None:
    """Id of the job array that this process is a task of."""
    return environment.get("SLURM_ARRAY_JOB_ID")
