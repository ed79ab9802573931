#!/usr/bin/env bash
# Train on this machine, one process a GPU, or two processes on the CPU when there is none:
#   launch/single_node.sh +experiment=demo
#   NPROC=4 launch/single_node.sh +experiment=demo run.name=second
# NPROC        processes; default: the GPUs that nvidia-smi lists, else 2
# SHUTDOWN_TIMEOUT  seconds that ranks have to save after a SIGTERM before torchrun kills them; default: 120
# MASTER_PORT  a fixed port for the processes to meet; default: torchrun picks a free one
set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
torchrun=torchrun
if [[ -x $project/.venv/bin/torchrun ]]; then
    torchrun=$project/.venv/bin/torchrun
elif ! command -v torchrun >/dev/null; then
    echo "error: no torchrun in $project/.venv/bin or on PATH; run \`make setup\` or activate an environment with llmtrain" >&2
    exit 2
fi

num_gpus=0
if command -v nvidia-smi >/dev/null; then
    num_gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
fi
nproc=${NPROC:-$((num_gpus > 0 ? num_gpus : 2))}
if ! [[ $nproc =~ ^[1-9][0-9]*$ ]]; then
    echo "error: NPROC=$nproc must be a number of processes, 1 or more" >&2
    exit 2
fi

# Threads a process: ranks x threads = cores, or the ranks take the cores from each other.
cores=$(OMP_NUM_THREADS='' nproc) # the command, which would answer with OMP_NUM_THREADS if that were set
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}

# --standalone lets torchrun find a free port; a port that the user names is taken as it is.
if [[ -n ${MASTER_PORT:-} ]]; then
    if (exec 3<>"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; then
        echo "error: MASTER_PORT=$MASTER_PORT is taken on this machine; name another, or unset it to let torchrun choose" >&2
        exit 2
    fi
    meet=(--nnodes 1 --master-addr 127.0.0.1 --master-port "$MASTER_PORT")
else
    meet=(--standalone)
fi

# Mistakes that need no ranks are found by one process and said once; torchrun would say them once a rank.
case " $* " in
    *" -m "* | *" --multirun "* | *" --help "* | *" --cfg "*) ;;
    *) WORLD_SIZE=$nproc "$(dirname "$(command -v "$torchrun")")/python" -m llmtrain.cli.main train "$@" check_only=true >/dev/null ;;
esac

trap '' USR1 # ranks save and leave on it; torchrun, which inherits this, does not die of it first
exec "$torchrun" "${meet[@]}" --shutdown-timeout "${SHUTDOWN_TIMEOUT:-120}" --nproc-per-node "$nproc" -m llmtrain.cli.main train "$@"
