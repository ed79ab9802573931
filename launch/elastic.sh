#!/usr/bin/env bash
# Train on as many machines as there are: run the same line on each, whenever it comes.
#   NNODES=2:4 MASTER_ADDR=node0 MASTER_PORT=29500 launch/elastic.sh +experiment=demo
# When a machine is lost or joins, all ranks end, those that are left meet again, and the run goes on at its
# last checkpoint, or where it was when the change was announced: with the same rows in the same global batch.
# NNODES       the least and the most machines, MIN:MAX. Each number of them must divide the global batch
# MASTER_ADDR  name or address of the machine where all meet; this one must live: when it is lost all end
# MASTER_PORT  a free port there
# MAX_RESTARTS how often ranks may fail on this machine before it gives up; default: 100
# RDZV_CONF    more for torchrun's rendezvous, as in last_call_timeout=60,join_timeout=3600: how long it waits
#              for more machines once MIN are there, and how long for MIN; default: 30 and 600
# LOCAL_ADDR, RUN_ID, AGENT_SILENCE_S, SHUTDOWN_TIMEOUT, NPROC: as in launch/multi_node.sh. NPROC must be the
# same on all machines.
# A SIGTERM here takes this machine out: ranks save, and the others go on without it.
# Exit status: 0 the run is over, 75 this machine was told to leave, 78 the run shall not be started again.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

need "NNODES=2:4 MASTER_ADDR=node0 MASTER_PORT=29500" NNODES MASTER_ADDR MASTER_PORT
[[ $NNODES =~ ^[1-9][0-9]*:[1-9][0-9]*$ ]] || fail "NNODES=$NNODES must be MIN:MAX, as in 2:4"
number MASTER_PORT 1
MAX_RESTARTS=${MAX_RESTARTS:-100}
number MAX_RESTARTS 0
case " $* " in
    *" run.intent="*) fail "leave run.intent out: elastic runs start with run.intent=fresh_or_resume" ;;
esac
choose_ranks 0
words=("$@" run.intent=fresh_or_resume)
"$python" -m llmtrain.cli.elastic "$NNODES" "$NPROC" "${words[@]}" >/dev/null
meet=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "${RUN_ID:-llmtrain}")
[[ -z ${RDZV_CONF:-} ]] || meet+=(--rdzv-conf "$RDZV_CONF")
[[ -z ${LOCAL_ADDR:-} ]] || meet+=(--local-addr "$LOCAL_ADDR")
# A machine that joins later asks where rank 0 is, and with a shared store torch 2.13 says so in the first round only.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec "${launcher[@]}" --rejoin "${torchrun[@]}" --nnodes "$NNODES" "${meet[@]}" --max-restarts "$MAX_RESTARTS" \
    --nproc-per-node "$NPROC" -m llmtrain.cli.main train "${words[@]}"
