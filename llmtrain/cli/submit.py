"""`llmtrain submit train|data|evaluate ...`: the same command, as a job of Slurm.

The words after the verb are that verb's own and reach it as they are; those that begin with `slurm` are this
one's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser

from llmtrain import files
from llmtrain.cli.compose import run_verb, to_dataclass
from llmtrain.errors import EXIT_FAILED, ConfigError, unknown_name
from llmtrain.launch import submit as slurm
from llmtrain.launch.config import ContainerKind, SlurmConfig, check_plain
from llmtrain.launch.environment import refuse_secrets
from llmtrain.launch.sbatch import Job, render
from llmtrain.train.config import Intent, TrainRoot

VERBS = ("train", "data", "evaluate")
OWN = re.compile(r"[+~]{0,2}slurm(?:[.=@].*)?", re.DOTALL)
"""Words that are settings of the job."""
FLAGS_WITH_VALUE = ("--config-dir", "-cd")
"""Flags that both verbs get, with the word after them."""
OWN_FLAGS = ("--help", "-h", "--hydra-help", "--cfg", "-c", "--resolve", "--info")
PLAIN_PATH = re.compile(r"[\w./+-]+")
"""Words that Hydra reads as they are."""


@dataclass(kw_only=True)
class SubmitRoot:
    slurm: SlurmConfig


@dataclass(frozen=True)
class Words:
    """What stood after `llmtrain submit`."""

    verb: str | None
    overrides: list[str]
    """Of the verb, without flags."""
    flags: list[str]
    """Of the verb: --config-dir and its folder."""
    is_sweep: bool


def main() -> None:
    words, own = split(sys.argv[1:])
    sys.argv = [sys.argv[0], *own]
    run_verb("submit", SubmitRoot, partial(run, words=words))


def split(arguments: Sequence[str]) -> tuple[Words, list[str]]:
    """The words of the verb to submit, and those of `submit` itself."""
    rest = list(arguments)
    verb = rest.pop(0) if rest and not rest[0].startswith("-") and "=" not in rest[0] else None
    own: list[str] = []
    own_flags: list[str] = []
    overrides: list[str] = []
    flags: list[str] = []
    is_sweep = False
    while rest:
        word = rest.pop(0)
        if word == "--dry-run":
            own.append("slurm.dry_run=true")
        elif word in ("-m", "--multirun"):
            is_sweep = True
        elif word.split("=")[0] in FLAGS_WITH_VALUE:
            shared = [word] if "=" in word else [word, *rest[:1]]
            del rest[: len(shared) - 1]
            flags += shared
        elif word in OWN_FLAGS:
            own_flags.append(word)
            if word in ("--cfg", "-c"):
                own_flags += rest[:1]
                del rest[:1]
        elif OWN.fullmatch(word):
            own.append(word)
        else:
            overrides.append(word)
    return Words(verb, overrides, flags, is_sweep), [*own_flags, *flags, *own]


def run(root: SubmitRoot, *, words: Words) -> None:
    cfg = root.slurm
    if words.verb is None:
        raise ConfigError(
            f"`llmtrain submit` needs a verb first, one of {', '.join(VERBS)}; as in `llmtrain submit train "
            "+experiment=demo slurm.nodes=2`"
        )
    if words.verb not in VERBS:
        raise ConfigError(unknown_name("verb to submit", words.verb, VERBS))
    flags = [word for word in words.overrides if word.startswith("-")]
    if flags:
        raise ConfigError(
            f"`llmtrain submit` takes no {flags[0]}; it knows --dry-run, -m and --config-dir DIR"
        )
    runs = _runs(words)
    job = _train_job(words, runs, cfg) if words.verb == "train" else _other_job(words, runs, cfg)
    text = render(job, cfg)
    refuse_secrets(text, os.environ, cfg.pass_environment)
    if cfg.dry_run:
        print(text, end="")
        return
    job.log_folder.mkdir(parents=True, exist_ok=True)
    script = job.log_folder / f"{job.verb}.sbatch"
    with files.atomic_write(script, "w") as handle:
        handle.write(text)
    print(f"script    {script}")
    if slurm.has_slurm():
        print(f"slurm     {slurm.check(script)}")
    number = slurm.submit(script)
    print(f"job       {number}" + (f", {len(job.runs)} runs" if job.is_array else ""))
    print("\n".join(slurm.advice(job, number)))


def _runs(words: Words) -> list[list[str]]:
    """The overrides of every run: one, or with -m one for each combination."""
    if not words.is_sweep:
        return [words.overrides]
    if words.verb != "train":
        raise ConfigError(f"-m sweeps over runs of `train`, and {words.verb} is one; submit each by itself")
    parsed = OverridesParser.create().parse_overrides(words.overrides)
    batches = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return [list(run) for batch in batches for run in batch]


def _train_job(words: Words, runs: list[list[str]], cfg: SlurmConfig) -> Job:
    roots = [_compose_train(run) for run in runs]
    for root in roots:
        _check_world_size(root, cfg)
    base = Path(roots[0].run.folder)
    if words.is_sweep:
        runs = [
            [*run, f"run.folder={_hydra_word(f'{root.run.folder}/{at}')}"]
            for at, (run, root) in enumerate(zip(runs, roots, strict=True))
        ]
    runs = [[*words.flags, *run] for run in runs]
    if cfg.after:
        print(
            "check     only the config: the rest when the job starts, after the jobs it waits for",
            file=sys.stderr,
        )
    else:
        for arguments in runs:
            _check_only(arguments, num_ranks=cfg.num_ranks)
    return _job(words, runs, cfg, again=_again(roots), name=roots[0].run.name, log_folder=base / "slurm")


def _other_job(words: Words, runs: list[list[str]], cfg: SlurmConfig) -> Job:
    assert words.verb is not None, "checked by run"
    if cfg.nodes != 1:
        raise ConfigError(
            f"slurm.nodes={cfg.nodes}, and `llmtrain {words.verb}` is one process; set slurm.nodes=1"
        )
    runs = [[*words.flags, *run] for run in runs]
    _ask_the_verb([words.verb, *runs[0], "--cfg", "job"])
    return _job(words, runs, cfg, again=[], name=words.verb, log_folder=Path("logs/slurm"))


def _job(
    words: Words,
    runs: list[list[str]],
    cfg: SlurmConfig,
    *,
    again: list[str],
    name: str,
    log_folder: Path,
) -> Job:
    assert words.verb is not None, "checked by run"
    folder = Path(cfg.log_folder or log_folder).absolute()
    check_plain("log_folder", str(folder))
    python = sys.executable if cfg.container.kind is ContainerKind.none else "python3"
    if cfg.venv is not None:
        python = f"{cfg.venv}/bin/python"
    return Job(
        verb=words.verb,
        runs=runs,
        again=again,
        name=cfg.job_name or re.sub(r"[^\w.-]", "_", name),
        folder=Path.cwd(),
        log_folder=folder,
        python=python,
    )


def _compose_train(overrides: list[str]) -> TrainRoot:
    """The config of one run, checked against its dataclasses."""
    unknown = [word for word in overrides if re.match(r"[+~]{0,2}cluster[=.]", word)]
    if unknown:
        raise ConfigError(
            f"{unknown[0]}: cluster is of `llmtrain plan`; a site of Slurm is slurm=..., and its size "
            "slurm.nodes and slurm.gpus_per_node"
        )
    ConfigStore.instance().store(name="train_schema", node=TrainRoot)
    return to_dataclass(compose("train", overrides), TrainRoot)


def _check_world_size(root: TrainRoot, cfg: SlurmConfig) -> None:
    wanted = root.parallel.world_size
    if wanted is None or wanted == cfg.num_ranks:
        return
    each = "gpus_per_node" if cfg.gpus_per_node else "cpu_ranks_per_node"
    nodes, rest = divmod(wanted, cfg.ranks_per_node)
    remedy = f"set slurm.nodes={nodes}" if nodes and not rest else f"change slurm.{each}"
    raise ConfigError(
        f"parallel.world_size={wanted}, but slurm.nodes * slurm.{each} = {cfg.nodes} * {cfg.ranks_per_node} "
        f"= {cfg.num_ranks}; {remedy}, or plan for what there is"
    )


def _again(roots: list[TrainRoot]) -> list[str]:
    """Words for a start that is not the first: go on where the last one saved."""
    intents = {root.run.intent for root in roots}
    if len(intents) > 1:
        raise ConfigError(
            "a sweep over run.intent: its jobs could not start again alike; submit each by itself"
        )
    return {
        Intent.fresh: ["run.intent=fresh_or_resume"],
        # Never fresh_or_resume: without a checkpoint that would begin with random weights.
        Intent.warm_start: ["run.intent=resume", "run.init_from=null"],
    }.get(intents.pop(), [])


def _check_only(arguments: list[str], *, num_ranks: int) -> None:
    """`llmtrain train check_only=true` as if on the job's ranks."""
    _ask_the_verb(["train", *arguments, "check_only=true"], WORLD_SIZE=str(num_ranks))
    print(f"check     nothing stands in the way of this run on {num_ranks} ranks", file=sys.stderr)


def _ask_the_verb(arguments: list[str], **environment: str) -> None:
    """Let the verb itself look at its words. What it refuses, it says; and we end with its status."""
    done = subprocess.run(
        [sys.executable, "-m", "llmtrain.cli.main", *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode != 0:
        print(f"error: `llmtrain {arguments[0]}` says no, so nothing was submitted", file=sys.stderr)
        sys.exit(EXIT_FAILED)


def _hydra_word(value: str) -> str:
    """A value as Hydra's grammar takes it."""
    if PLAIN_PATH.fullmatch(value):
        return value
    escaped = value.replace("\\'", "\\\\'").replace("'", "\\'")
    return f"'{escaped}'"
