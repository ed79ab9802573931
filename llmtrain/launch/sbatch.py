"""The script of a job, as text: for people to read, to edit and to hand to sbatch themselves.

Whatever comes from a user is quoted for the shell or, in lines of #SBATCH, made of plain characters
only (config.py). slurm/train.sbatch is one such script; docs/slurm.md explains it line by line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llmtrain.launch.config import ContainerKind, SlurmConfig
from llmtrain.launch.environment import ALWAYS_PASSED

LEAVE_MARGIN_S = 15
"""Of slurm.signal_lead_s: what is left for asking Slurm to take the job back if ranks have not left."""
FIRST_PORT, NUM_PORTS = 20000, 10000
"""Where ranks meet: below Linux's own range for outgoing connections, which begins at 32768."""
PLAIN_WORD = re.compile(r"[A-Za-z0-9_@%+=:./-]+")
"""What bash reads as it is, wherever it stands."""
SHUTDOWN_S = 120
"""What ranks have to leave when one of them has failed, before torchrun kills them; as in launch/*.sh."""


@dataclass(frozen=True, kw_only=True)
class Job:
    verb: str
    """Of llmtrain: train runs on all GPUs of all nodes, others are one process on one node."""
    runs: list[list[str]]
    """Words after the verb. More than one list makes an array of jobs, a task each."""
    again: list[str]
    """More words from the second start on."""
    name: str
    folder: Path
    """Where the job works: where it was submitted."""
    log_folder: Path
    python: str

    @property
    def is_array(self) -> bool:
        return len(self.runs) > 1

    @property
    def log_name(self) -> str:
        return "%A_%a" if self.is_array else "%j"


def render(job: Job, cfg: SlurmConfig) -> str:
    """The whole script."""
    is_train = job.verb == "train"
    budget = _fill(
        _BUDGET,
        stand_in_queue=(_REQUEUE if cfg.requeue else _NO_REQUEUE).strip("\n"),
        max_restarts=cfg.max_restarts,
        max_failures=cfg.max_failures,
        lead_s=cfg.signal_lead_s,
        leave_s=cfg.signal_lead_s - LEAVE_MARGIN_S,
    )
    ranks = _fill(_LAUNCH_RANKS, first_port=FIRST_PORT, num_ports=NUM_PORTS, shutdown_s=SHUTDOWN_S)
    blocks = [
        [_header(job, cfg)],
        [_what(job, cfg)],
        [_where(cfg)],
        [budget],
        [_fill(_TORCHRUN, told=f"{quote(str(job.log_folder))}/{_own_name(job)}.status") if is_train else ""],
        [_srun(job, cfg)],
        [
            _LOOP_BEGIN,
            ranks if is_train else _fill(_LAUNCH_ONE, verb=job.verb),
            _LOOP_WAIT,
            _LOOP_TOLD if is_train else "",
            _LOOP_END,
        ],
    ]
    texts = ("".join(part.strip("\n") + "\n" for part in block if part) for block in blocks)
    return "\n".join(text for text in texts if text)


def num_gpus(verb: str, cfg: SlurmConfig) -> int:
    """GPUs of a node that the verb uses."""
    return {"train": cfg.gpus_per_node, "evaluate": min(1, cfg.gpus_per_node)}.get(verb, 0)


def _header(job: Job, cfg: SlurmConfig) -> str:
    gpus = num_gpus(job.verb, cfg)
    cores = None if cfg.cpus_per_rank is None else cfg.cpus_per_rank * _cores_of(job.verb, cfg)
    kind = "" if cfg.gpu_type is None else f"{cfg.gpu_type}:"
    waits = [":".join([cfg.after_end.word, *map(str, cfg.after)])] if cfg.after else []
    waits += ["singleton"] if cfg.singleton else []
    most = "" if cfg.max_array_tasks is None else f"%{cfg.max_array_tasks}"
    options = [
        ("job-name", job.name),
        ("nodes", cfg.nodes),
        ("ntasks-per-node", 1),
        ("gres", f"gpu:{kind}{gpus}" if gpus else None),
        ("cpus-per-task", cores),
        ("mem", cfg.memory),
        ("exclusive", cfg.exclusive),
        ("time", cfg.time),
        ("partition", cfg.partition),
        ("account", cfg.account),
        ("qos", cfg.qos),
        ("constraint", cfg.constraint),
        ("exclude", cfg.exclude),
        ("reservation", cfg.reservation),
        ("array", f"0-{len(job.runs) - 1}{most}" if job.is_array else None),
        ("dependency", ",".join(waits) or None),
        ("kill-on-invalid-dep", "yes" if cfg.after else None),
        ("signal", f"B:USR1@{cfg.signal_lead_s}"),
        ("requeue" if cfg.requeue else "no-requeue", True),
        ("open-mode", "append"),
        ("output", f"{_logs(job)}/{job.log_name}.out"),
        ("export", ",".join(dict.fromkeys([*ALWAYS_PASSED, *cfg.pass_environment]))),
    ]
    lines = [
        f"#SBATCH --{name}" if value is True else f"#SBATCH --{name}={value}"
        for name, value in options
        if value is not None and value is not False
    ]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"# Written by `llmtrain submit {job.verb}`. Read it, edit it, hand it to sbatch; docs/slurm.md",
            "# explains every line. It holds no secrets: whoever hands it over has them in the environment.",
            *lines,
            *(f"#SBATCH {directive}" for directive in cfg.directives),
            "# shellcheck disable=SC2016 # what is quoted is not to be expanded here",
            "set -euo pipefail",
        ]
    )


def _cores_of(verb: str, cfg: SlurmConfig) -> int:
    """Ranks' shares of cores that one node's task gets."""
    return 1 if verb == "evaluate" else cfg.ranks_per_node


def _logs(job: Job) -> str:
    return str(job.log_folder).replace("%", "%%")


def _what(job: Job, cfg: SlurmConfig) -> str:
    lines = [
        f"cd -- {quote(str(job.folder))}",
        "",
        "# -- what runs: each word quoted for the shell, and then read by Hydra",
        f"python={quote(job.python)}",
    ]
    if job.is_array:
        lines.append("case ${SLURM_ARRAY_TASK_ID:?is set in an array of jobs: hand this to sbatch} in")
        lines += [f"    {at}) words=({_words(run)}) ;;" for at, run in enumerate(job.runs)]
        lines += ['    *) echo "error: no run $SLURM_ARRAY_TASK_ID in this script" >&2 && exit 2 ;;', "esac"]
    else:
        lines += ["words=(", *(f"    {quote(word)}" for word in job.runs[0]), ")"]
    lines.append(f"again=({_words(job.again)}) more=() # words to add from the second start on")
    if job.verb == "train":
        lines.append(f"ranks_per_node={cfg.ranks_per_node}")
    return "\n".join(lines)


def _words(words: Iterable[str]) -> str:
    return " ".join(quote(word) for word in words)


_UNSEEN = "# shellcheck disable=SC1090,SC1091 # of the site"


def _where(cfg: SlurmConfig) -> str:
    lines = [f"export {name}={quote(value)}" for name, value in cfg.environment.items()]
    others = []
    if cfg.modules:
        others += [_UNSEEN, "source /etc/profile # it brings `module`"]
        others += [f"module load {_words(cfg.modules)} || exit 1"]
    for script in cfg.scripts:
        others += [_UNSEEN, f"source {quote(script)} || exit 1"]
    if others:
        lines += ["set +eu # what others wrote was not written for these", *others, "set -eu"]
    return "\n".join(["# -- where it runs", *lines]) if lines else ""


def quote(word: str) -> str:
    """A word for bash that means itself. shlex.quote leaves commas bare; shellcheck takes them for slips."""
    return word if PLAIN_WORD.fullmatch(word) else "'" + word.replace("'", "'\\''") + "'"


def _fill(text: str, **values: object) -> str:
    for name, value in values.items():
        text = text.replace(f"@{name}@", str(value))
    return text


def _own_name(job: Job) -> str:
    """What the files of this job, or of this task of an array, begin with: for bash."""
    return '"$SLURM_ARRAY_JOB_ID"_"$SLURM_ARRAY_TASK_ID"' if job.is_array else '"$SLURM_JOB_ID"'


def _srun(job: Job, cfg: SlurmConfig) -> str:
    cores = [] if cfg.cpus_per_rank is None else ['    --cpus-per-task="$SLURM_CPUS_PER_TASK"']
    in_container, inside = _container(cfg, num_gpus(job.verb, cfg))
    logs = f"{quote(_logs(job))}/{_own_name(job)}"
    return "\n".join(
        [
            "# -- how it is started: one task a node, which gets all of the node's part of the job",
            "srun=(",
            '    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1',
            *cores,
            "    --cpu-bind=none --export=ALL --kill-on-bad-exit=1",
            ")",
            "task=(",
            f"    --open-mode=append --output={logs}.%t.out # %t: the node's number",
            *in_container,
            ")",
            f"inside=({inside})",
        ]
    )


def _container(cfg: SlurmConfig, gpus: int) -> tuple[list[str], str]:
    """Options of srun, and the words before the command."""
    container = cfg.container
    mounts = "".join(f",{mount}" for mount in container.mounts)
    here = '"$PWD:$PWD"' + (quote(mounts) if mounts else "")
    if container.kind is ContainerKind.none:
        return [], ""
    assert container.image is not None, "checked by ContainerConfig"
    image = quote(container.image)
    if container.kind is ContainerKind.pyxis:
        return [
            f'    --container-image={image} --container-workdir="$PWD"',
            f"    --container-mounts={here}",
        ], ""
    nv = "--nv " if gpus else ""
    return [], f'apptainer exec {nv}--pwd "$PWD" --bind {here} {image}'


_BUDGET = r"""
# -- how often it may start
max_restarts=@max_restarts@ # of the job, whoever asked for it
max_failures=@max_failures@ # of the run within one start of the job
restarts=${SLURM_RESTART_COUNT:-0}
say() { printf '%(%F %T)T job %s, start %s: %s\n' -1 "$SLURM_JOB_ID" "$((restarts + 1))" "$*"; }

@stand_in_queue@

# Slurm sends USR1 to this shell alone, @lead_s@ s before the time limit or at a preemption with notice. It
# goes on to the ranks, which agree on a step, save and leave. Who cancels or requeues sends TERM, and that
# reaches the ranks without us.
stop='' step='' leave_by=''
# shellcheck disable=SC2317 # the trap calls it
on_usr1() {
    stop=USR1 leave_by=$((SECONDS + @leave_s@))
    say "USR1: telling the ranks to save and leave"
    [[ -z $step ]] || kill -USR1 "$step" 2>/dev/null || true
}
trap on_usr1 USR1
trap 'stop=TERM' TERM
"""

_REQUEUE = r"""
stand_in_queue() { # stand_in_queue WHY
    if ((restarts >= max_restarts)); then
        say "$1; not again: it was started again $restarts times, and max_restarts=$max_restarts"
        exit 1
    fi
    say "$1; asking Slurm to start this job again"
    for _ in 1 2 3 4 5 6; do
        if scontrol requeue "$SLURM_JOB_ID"; then exit 0; fi
        sleep 5
    done
    say "Slurm does not take the job back; \`sbatch THIS_SCRIPT again\` goes on"
    exit 75 # EX_TEMPFAIL of sysexits.h
}
"""

_NO_REQUEUE = r"""
stand_in_queue() { # stand_in_queue WHY
    say "$1; slurm.requeue=false: \`sbatch THIS_SCRIPT again\` goes on"
    exit 75 # EX_TEMPFAIL of sysexits.h
}
"""

_TORCHRUN = r"""
# -- how ranks find each other: they meet on the first node, by the name that Slurm has for it
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
if ((${#hosts[@]} != SLURM_JOB_NUM_NODES)); then
    say "error: $SLURM_JOB_NODELIST is $SLURM_JOB_NUM_NODES nodes, and scontrol names ${#hosts[@]}"
    exit 2
fi
export OMP_NUM_THREADS=$((SLURM_CPUS_ON_NODE > ranks_per_node ? SLURM_CPUS_ON_NODE / ranks_per_node : 1))
# torchrun ignores USR1, which would end it, and TERM, which it would hand to ranks that have theirs from
# Slurm already: a second one ends a rank at once.
on_each_node='trap "" USR1 TERM
exec "$0" -m torch.distributed.run --local-addr "$SLURMD_NODENAME" "$@"'
# torchrun has one status for all failures, and srun ends the other nodes at the first. So a rank of each node
# writes here what is meant: 75 of sysexits.h, start me again; 78, never again.
export LLMTRAIN_EXIT_FILE=@told@
"""

_LOOP_BEGIN = r"""
# -- the run
if ((restarts > max_restarts)); then
    say "not again: Slurm started it again $restarts times, and max_restarts=$max_restarts"
    exit 1
fi
for ((failures = 0; ; failures++)); do
    if ((restarts + failures > 0)) || [[ ${1:-} == again ]]; then more=("${again[@]}"); fi
    [[ -z $stop ]] || break
"""

_LAUNCH_RANKS = r"""
    : >"$LLMTRAIN_EXIT_FILE"
    port=$((@first_port@ + (SLURM_JOB_ID * 101 + restarts * 11 + failures) % @num_ports@))
    say "${#hosts[@]} x $ranks_per_node ranks meet at ${hosts[0]}:$port: ${hosts[*]}"
    "${srun[@]}" "${task[@]}" "${inside[@]}" bash -c "$on_each_node" "$python" \
        --nnodes="${#hosts[@]}" --nproc-per-node="$ranks_per_node" --max-restarts=0 \
        --shutdown-timeout=@shutdown_s@ --signals-to-handle=SIGINT \
        --rdzv-backend=c10d --rdzv-endpoint="${hosts[0]}:$port" \
        --rdzv-id="$SLURM_JOB_ID.$restarts.$failures" \
        -m llmtrain.cli.main train "${words[@]}" "${more[@]}" &
"""

_LAUNCH_ONE = r"""
    say "llmtrain @verb@ on $SLURMD_NODENAME"
    "${srun[@]}" "${task[@]}" "${inside[@]}" "$python" \
        -m llmtrain.cli.main @verb@ "${words[@]}" "${more[@]}" &
"""

_LOOP_WAIT = r"""
    step=$!
    while kill -0 "$step" 2>/dev/null; do
        [[ -z $leave_by ]] || ((SECONDS < leave_by)) || stand_in_queue "the run did not leave in time"
        sleep 1 &
        wait $! || true # a signal ends it early
    done
    status=0
    wait "$step" || status=$?
    step=''
    [[ -z $stop ]] || break
"""

_LOOP_TOLD = r"""
    case $(cut -d ' ' -f 1 "$LLMTRAIN_EXIT_FILE") in
        75) stand_in_queue "the run left before its time was over" ;;
        78)
            say "the run says that starting it again is no use; the ends of the nodes' logs say why"
            exit 78
            ;;
    esac
"""

_LOOP_END = r"""
    if ((status == 0)); then
        say "the run is over"
        exit 0
    fi
    say "srun returned $status; the ends of the nodes' logs say why"
    ((failures < max_failures)) || exit "$status"
    # Does every node still start a process? If not, others will do.
    timeout 60 "${srun[@]}" --output=/dev/null true || stand_in_queue "a node does not answer"
done
if [[ $stop == TERM ]]; then
    say "ended by Slurm or its user"
    exit 143
fi
stand_in_queue "told to leave"
"""
