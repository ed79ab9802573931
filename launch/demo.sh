#!/usr/bin/env bash
# The whole road on this machine: text, plan, training that is killed and goes on, evaluation, samples, report.
# Every line that starts with a $ is a command you can type yourself; README.md explains each.
# DEMO_SCALE=short  a few MB of text and a few steps, for CI
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"

name=demo data=data/python_docs kill_at=180
text=() size=()
if [[ ${DEMO_SCALE:-} == short ]]; then
    name=demo_short data=data/python_docs_short kill_at=10
    text=("out=$data" corpus.max_text_bytes=6000000)
    size=("run.name=$name" "data.folder=$data" train.total_tokens=32768 schedule.warmup_tokens=4096
          train.eval_every_steps=8 save.every_steps=4)
fi
run=runs/$name

# With --fresh the demo starts from nothing; without, it continues whatever it was doing when it was stopped.
[[ ${1:-} != --fresh ]] || rm -rf "$run" "$data"

step() { # step COMMAND...: show it, then run it
    printf '\n\033[1m$ %s\033[0m\n' "$*"
    "$@"
}

step llmtrain data corpus=python_docs "${text[@]}"
step llmtrain plan budget.days=6min cluster=this_machine "name=$name" out=plans

train=(launch/single_node.sh +experiment=demo "run.plan=plans/$name.plan.json" "${size[@]}")
last_step() { grep -o '"kind": "step", "step": [0-9]*' "$run/metrics.jsonl" 2>/dev/null | tail -n 1 | grep -o '[0-9]*$' || echo 0; }

if ((10#$(last_step) < kill_at)); then
    printf '\n\033[1m$ %s\033[0m     (to be killed after step %s)\n' "${train[*]}" "$kill_at"
    set -m # a process group of its own, so that one kill -9 ends the script and torchrun
    "${train[@]}" &
    job=$! # torchrun; its ranks die with it
    set +m
    trap 'kill -9 -- -$job 2>/dev/null || true' EXIT
    while kill -0 $job 2>/dev/null && ((10#$(last_step) < kill_at)); do sleep 0.2; done
    if kill -9 -- -$job 2>/dev/null; then
        wait $job 2>/dev/null || true
        printf '\n\033[1mkilled with SIGKILL after step %s; the same command again:\033[0m\n' "$(last_step)"
    else
        wait $job # it ended by itself: say how
    fi
    trap - EXIT
fi
step "${train[@]}"

step llmtrain inspect ledger "run=$run" recompute=true
step llmtrain evaluate "checkpoint=$run"
step llmtrain generate "checkpoint=$run" prompt="Return the number of" temperature=0.7 top_p=0.9
step llmtrain report "run=$run"

cat <<TEXT

The demo is done. What it left:
  $data/manifest.json    what the text became, and what was dropped for which reason
  plans/$name.plan.json            what six minutes buy on this machine; plans/$name.plan.html to look at
  $run/checkpoints/         weights and optimizer state, readable by any number of ranks
  $run/metrics.jsonl        one line a step; $run/run.json has versions and commands
  $run/report.html          open this one in a browser

To try next:
  llmtrain generate checkpoint=$run prompt="Raises ValueError if" temperature=0
  llmtrain data corpus=text corpus.paths='["docs/*.md"]' out=data/mine tokenizer.vocab_size=512
  launch/single_node.sh +experiment=demo run.name=wider model.d_model=320 model.num_heads=5 model.num_kv_heads=5
TEXT
