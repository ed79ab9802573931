"""`llmtrain <verb> [overrides]`: find the verb, import only what it needs, hand over to Hydra."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version

from llmtrain.errors import unknown_name

VERBS = {
    "data": "raw text to shards of tokens: scan, decide, tokenize, pack",
    "plan": "a budget to a model, tokens, a layout and a bill, and an experiment YAML",
    "train": "train, or resume, or with check_only=true find every mistake first",
    "submit": "train, data or evaluate as a job of Slurm: checked, written, handed over",
    "doctor": "this machine as a run would find it: software, limits, storage, GPUs, names, gloo",
    "verify": "a small copy of a training config on its layout against one process: same numbers?",
    "evaluate": "held-out loss, perplexity and bits per byte of a checkpoint",
    "generate": "sample text from a checkpoint",
    "replay": "a step of a past run through the model again: the loss of each document",
    "checkpoint": "checkpoints to other checkpoints: in other files, averaged, compared, converted",
    "inspect": "what shards, a checkpoint or a run's ledger hold, and whether it is whole",
    "report": "one self-contained report.html of a run or a data folder",
    "status": "the runs of a folder: state, step, loss, rate, time left, goodput",
    "watch": "one run in the terminal, as it goes: curves and events",
    "tensorboard": "a run's curves as files for TensorBoard, followed while it goes",
    "dashboard": "a project's dashboard at W&B, created or brought up to date",
    "bench": "measure ourselves against the limit or a rival",
}
PARTS = {
    "data explain": "every signal, rule and verdict of one document",
    "data trace": "from a token, or a step of a run, back to documents and files",
    "data import": "files of tokens of Megatron-LM, datatrove or OLMo to a data folder",
    "data export": "shards for Megatron-LM, datatrove or OLMo, as hard links",
    "plan fit": "L(N, D) through own runs: coefficients, larger runs' losses, intervals",
    "plan ladder": "the small runs that a fit needs, as a sweep of `train`, with their cost",
    "plan calibrate": "step times and memory of own runs: the plan's constants, corrected",
    "plan check": "a plan beside what a run measured",
    "inspect shards": "shards of tokens: what they hold, every byte checked",
    "inspect checkpoint": "a checkpoint: what it holds, who wrote it, every byte checked",
    "inspect ledger": "that a run with its restarts took every row once",
    "checkpoint reshard": "the same checkpoint in another number of files",
    "checkpoint merge": "one safetensors file with whole tensors",
    "checkpoint average": "the mean of the weights of several checkpoints",
    "checkpoint diff": "where two checkpoints differ: settings, tensors, numbers",
    "checkpoint convert": "to and from torch.distributed.checkpoint and DeepSpeed's universal format",
    "data train-quality": "a classifier of good documents, in the format of fastText",
}
"""What a verb's second word may be. Module and root YAML join both by an underscore."""
NEED_A_PART = {"checkpoint", "inspect"}
"""Verbs that say nothing without a second word."""


def usage() -> str:
    lines = ["usage: llmtrain VERB [key=value ...]", ""]
    lines += [f"  {verb:<20} {purpose}" for verb, purpose in sorted({**VERBS, **PARTS}.items(), key=_place)]
    lines += ["", "`llmtrain VERB --help` shows every setting of a verb; `--cfg job` the composed config."]
    return "\n".join(lines)


def main() -> None:
    """Entry point of the console command."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        try:
            print(f"llmtrain {version('llmtrain')}")
        except PackageNotFoundError:
            print("llmtrain, not installed: run from a source tree")
        return
    verb = arguments[0]
    if verb not in VERBS:
        print(f"error: {unknown_name('verb', verb, VERBS)}", file=sys.stderr)
        sys.exit(2)
    words = 2 if " ".join(arguments[:2]) in PARTS else 1
    if words == 1 and verb in NEED_A_PART:
        given = f"`{arguments[1]}`" if arguments[1:] else "nothing"
        parts = [part for part in PARTS if part.startswith(f"{verb} ")]
        print(f"error: `llmtrain {verb}` needs a second word, and {given} came; there are", file=sys.stderr)
        print("\n".join(f"  llmtrain {part:<20} {PARTS[part]}" for part in parts), file=sys.stderr)
        sys.exit(2)
    name = " ".join(arguments[:words])
    if name == "train":
        from llmtrain.cli.listen import listening  # noqa: PLC0415  no other verb needs it

        listening()
    module = importlib.import_module(f"llmtrain.cli.{name.replace(' ', '_').replace('-', '_')}")
    sys.argv = [f"llmtrain {name}", *arguments[words:]]
    module.main()


def _place(entry: tuple[str, str]) -> int:
    """A verb's parts follow it."""
    return list(VERBS).index(entry[0].split()[0])


if __name__ == "__main__":
    main()
