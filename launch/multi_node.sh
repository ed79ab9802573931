#!/usr/bin/env bash
# Train on several machines: run this once on each of them, with the same arguments and another NODE_RANK.
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 MASTER_PORT=29500 launch/multi_node.sh +experiment=demo
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 MASTER_PORT=29500 launch/multi_node.sh +experiment=demo
# NNODES       machines
# NODE_RANK    this one's number, from 0
# MASTER_ADDR  name or address of machine 0, as the others reach it
# MASTER_PORT  a free port on machine 0
# SHUTDOWN_TIMEOUT  seconds that ranks have to save after a SIGTERM before torchrun kills them; default: 120
# NPROC        processes on this machine; default: the GPUs that nvidia-smi lists
# The run folder and the data folder must be on a file system that all machines share.
set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
torchrun=torchrun
if [[ -x $project/.venv/bin/torchrun ]]; then
    torchrun=$project/.venv/bin/torchrun
elif ! command -v torchrun >/dev/null; then
    echo "error: no torchrun in $project/.venv/bin or on PATH; run \`make setup\` or activate an environment with llmtrain" >&2
    exit 2
fi

missing=()
for name in NNODES NODE_RANK MASTER_ADDR MASTER_PORT; do
    [[ -n ${!name:-} ]] || missing+=("$name")
done
if ((${#missing[@]})); then
    echo "error: set ${missing[*]}; for example: NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 MASTER_PORT=29500 $0 ..." >&2
    exit 2
fi
for name in NNODES NODE_RANK MASTER_PORT; do
    if ! [[ ${!name} =~ ^[0-9]+$ ]]; then
        echo "error: $name=${!name} must be a number" >&2
        exit 2
    fi
done
if ((NODE_RANK >= NNODES)); then
    echo "error: NODE_RANK=$NODE_RANK must be below NNODES=$NNODES: machines are numbered from 0" >&2
    exit 2
fi

if ((NODE_RANK == 0)) && (exec 3<>"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; then
    echo "error: MASTER_PORT=$MASTER_PORT is taken on this machine; name another, the same on every machine" >&2
    exit 2
fi

if [[ -z ${NPROC:-} ]]; then
    num_gpus=0
    if command -v nvidia-smi >/dev/null; then
        num_gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
    fi
    if ((num_gpus == 0)); then
        echo "error: nvidia-smi lists no GPU on this machine; set NPROC to the number of processes it shall run" >&2
        exit 2
    fi
    NPROC=$num_gpus
fi
if ! [[ $NPROC =~ ^[1-9][0-9]*$ ]]; then
    echo "error: NPROC=$NPROC must be a number of processes, 1 or more" >&2
    exit 2
fi

# Threads a process: ranks x threads = cores, or the ranks take the cores from each other.
cores=$(OMP_NUM_THREADS='' nproc) # the command, which would answer with OMP_NUM_THREADS if that were set
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))}

trap '' USR1 # ranks save and leave on it; torchrun, which inherits this, does not die of it first
exec "$torchrun" --shutdown-timeout "${SHUTDOWN_TIMEOUT:-120}" --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$NPROC" \
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
    -m llmtrain.cli.main train "$@"
