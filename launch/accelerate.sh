#!/usr/bin/env bash
# Train under `accelerate launch`, for who starts everything else with it; torchrun is what it calls.
#   launch/accelerate.sh +experiment=demo
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 MASTER_PORT=29500 launch/accelerate.sh +experiment=demo
# Any parallel.engine runs. How ranks share the work is what the run's config says: a mixed precision, FSDP or
# DeepSpeed plugin of accelerate's own configuration would have no effect, and a run that finds one warns.
# NPROC        processes on this machine, 2 or more; default: the GPUs that nvidia-smi lists, else 2
# NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT: as in launch/multi_node.sh; default: this machine alone
# Ranks have 30 s to save after a SIGTERM: accelerate has no option for it.
# Exit status: 0 the run is over, 75 it was told to leave and goes on when started again, 78 it shall not be.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

choose_ranks 2
NNODES=${NNODES:-1}
number NNODES 1
meet=(--num_machines "$NNODES")
if ((NNODES > 1)); then
    need "NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 MASTER_PORT=29500" NODE_RANK MASTER_ADDR MASTER_PORT
    number NODE_RANK 0
    ((NODE_RANK < NNODES)) || fail "NODE_RANK=$NODE_RANK must be below NNODES=$NNODES: machines are numbered from 0"
    meet+=(--machine_rank "$NODE_RANK" --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT")
else
    ((NPROC > 1)) || fail "NPROC=1 leaves accelerate nothing to launch; use launch/one_gpu.sh"
    check_once "$NPROC" "$@"
    meet+=(--main_process_port "${MASTER_PORT:-0}")
fi
exec "${launcher[@]}" accelerate.commands.launch --multi_gpu "${meet[@]}" \
    --num_processes "$((NNODES * NPROC))" --mixed_precision no --dynamo_backend no \
    -m llmtrain.cli.main train "$@"
