#!/usr/bin/env bash
# Train on several machines: run the same line on each of them, in any order.
#   NNODES=2 MASTER_ADDR=node0 MASTER_PORT=29500 launch/multi_node.sh +experiment=demo
# NNODES       machines; none may be missing, and the run ends when one is lost (launch/elastic.sh goes on)
# MASTER_ADDR  name or address of the machine where all meet, as the others reach it
# MASTER_PORT  a free port there
# NODE_RANK    this machine's number, from 0, with machine 0 at MASTER_ADDR: for who wants neighbours in the
#              network to have neighbouring ranks, or whose machines do not know MASTER_ADDR for their own.
#              Give it on all or on none; without it machines find their numbers themselves
# LOCAL_ADDR   this machine's address, where the others cannot look its host name up
# RUN_ID       a name for the meeting, where two runs use the same address and port; default: llmtrain
# AGENT_SILENCE_S   how long the meeting point may be out of reach before this machine leaves; default: 600
# SHUTDOWN_TIMEOUT  seconds that ranks have to save after a SIGTERM before torchrun kills them; default: 120
# NPROC        processes on this machine; default: the GPUs that nvidia-smi lists
# The run folder and the data folder must be on a file system that all machines share.
# Exit status: 0 the run is over, 75 it was told to leave and goes on when started again, 78 it shall not be.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

need "NNODES=2 MASTER_ADDR=node0 MASTER_PORT=29500" NNODES MASTER_ADDR MASTER_PORT
number NNODES 1
number MASTER_PORT 1
meet=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "${RUN_ID:-llmtrain}")
if [[ -n ${NODE_RANK:-} ]]; then
    number NODE_RANK 0
    ((NODE_RANK < NNODES)) || fail "NODE_RANK=$NODE_RANK must be below NNODES=$NNODES: machines are numbered from 0"
    ((NODE_RANK > 0)) || free_port "the same on every machine"
    meet=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
fi
[[ -z ${LOCAL_ADDR:-} ]] || meet+=(--local-addr "$LOCAL_ADDR")
choose_ranks 0
exec "${launcher[@]}" "${torchrun[@]}" --nnodes "$NNODES" "${meet[@]}" --nproc-per-node "$NPROC" -m llmtrain.cli.main train "$@"
