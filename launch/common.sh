# shellcheck shell=bash
# What the launch scripts share; they source it. Nothing to run by itself.

fail() {
    echo "error: $*" >&2
    exit 2
}

number() { # number NAME LEAST: the variable NAME holds a whole number, LEAST or more
    if ! [[ ${!1} =~ ^[0-9]+$ ]] || ((10#${!1} < $2)); then fail "$1=${!1} must be a number, $2 or more"; fi
}

need() { # need EXAMPLE NAME...: variables that must be set
    local example=$1 name missing=()
    shift
    for name; do [[ -n ${!name:-} ]] || missing+=("$name"); done
    ((${#missing[@]} == 0)) || fail "set ${missing[*]}; for example: $example $0 ..."
}

# NPROC, ranks of this machine, and OMP_NUM_THREADS: ranks x threads = cores, or ranks take the cores from
# each other.
choose_ranks() { # choose_ranks WITHOUT_GPU: how many where there is no GPU; 0: NPROC must say
    local cores num_gpus=0
    if command -v nvidia-smi >/dev/null; then num_gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true); fi
    if [[ -z ${NPROC:-} ]]; then
        NPROC=$((num_gpus > 0 ? num_gpus : $1))
        ((NPROC > 0)) || fail "nvidia-smi lists no GPU on this machine; set NPROC to the number of processes it shall run"
    fi
    number NPROC 1
    cores=$(OMP_NUM_THREADS='' nproc) # the command, which would answer with OMP_NUM_THREADS if that were set
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))}
}

free_port() { # free_port WHAT_ELSE: MASTER_PORT is free on this machine
    if (exec 3<>"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; then
        fail "MASTER_PORT=$MASTER_PORT is taken on this machine; name another, $1"
    fi
}

# Mistakes that need no ranks are found by one process and said once; torchrun would say them once a rank.
check_once() { # check_once WORLD_SIZE WORD...
    local world_size=$1
    shift
    case " $* " in
        *" -m "* | *" --multirun "* | *" --help "* | *" --cfg "*) ;;
        *) WORLD_SIZE=$world_size "$python" -m llmtrain.cli.main train "$@" check_only=true >/dev/null ;;
    esac
}

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$project/.venv/bin/python
if [[ ! -x $project/.venv/bin/torchrun ]]; then
    python=$(command -v torchrun) ||
        fail "no torchrun in $project/.venv/bin or on PATH; run \`make setup\` or activate an environment with llmtrain"
    python=$(dirname "$python")/python
fi

# Runs torchrun, and ends with the status that its ranks mean; llmtrain/cli/launcher.py says more.
# shellcheck disable=SC2034 # the scripts use both
launcher=("$python" -m llmtrain.cli.launcher) torchrun=(torch.distributed.run --shutdown-timeout "${SHUTDOWN_TIMEOUT:-120}")
trap '' USR1 # ranks save and leave on it; torchrun, which inherits this, does not die of it first
