#!/usr/bin/env bash
# Train on this machine, one process a GPU, or two processes on the CPU when there is none:
#   launch/single_node.sh +experiment=demo
#   NPROC=4 launch/single_node.sh +experiment=demo run.name=second
# NPROC        processes; default: the GPUs that nvidia-smi lists, else 2
# SHUTDOWN_TIMEOUT  seconds that ranks have to save after a SIGTERM before torchrun kills them; default: 120
# MASTER_PORT  a fixed port for the processes to meet; default: torchrun picks a free one
# Exit status: 0 the run is over, 75 it was told to leave and goes on when started again, 78 it shall not be.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

choose_ranks 2
# --standalone lets torchrun find a free port; a port that the user names is taken as it is.
meet=(--standalone)
if [[ -n ${MASTER_PORT:-} ]]; then
    free_port "or unset it to let torchrun choose"
    meet=(--nnodes 1 --master-addr 127.0.0.1 --master-port "$MASTER_PORT")
fi
check_once "$NPROC" "$@"
exec "${launcher[@]}" "${torchrun[@]}" "${meet[@]}" --nproc-per-node "$NPROC" -m llmtrain.cli.main train "$@"
