#!/usr/bin/env bash
# Train on one GPU of this machine, or in one process on its CPU; CUDA_VISIBLE_DEVICES says which GPU:
#   CUDA_VISIBLE_DEVICES=3 launch/one_gpu.sh +experiment=demo
# Everything else is as launch/single_node.sh has it.
set -euo pipefail
NPROC=1 exec "$(dirname "${BASH_SOURCE[0]}")/single_node.sh" "$@"
