"""A model of 300 M parameters on two ranks: save and load beside DeepSpeed's and PyTorch's own."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from llmtrain.bench.ranks import run_ranks
from llmtrain.bench.table import BenchConfig, Row

NUM_ROUNDS = 3
TIMEOUT_S = 1800.0


def rows(config: BenchConfig, folder: Path) -> list[Row]:
    """One row for each rival; the model is a small one at a scale under 1."""
    return [_row(rival, folder, is_small=config.scale < 1) for rival in ("deepspeed", "dcp")]


def _row(rival: str, folder: Path, *, is_small: bool) -> Row:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        case = {"rival": rival, "folder": place, "num_rounds": NUM_ROUNDS, "is_small": is_small}
        command = [sys.executable, "-m", "llmtrain.bench._checkpoint_rank", json.dumps(case)]
        ranks = run_ranks(command, num_ranks=2, timeout_s=TIMEOUT_S)
    took = {name: max(told[name] for told in ranks) for name in ranks[0]}
    ours, theirs = ((took[f"{who}_save"], took[f"{who}_load"]) for who in ("ours", "theirs"))
    size = sum(told["bytes"] for told in ranks) / 1e9
    return Row(
        name=f"save_load_vs_{rival}, {size:.2f} GB, 2 ranks; save, load in s: "
        f"ours {ours[0]:.2f}, {ours[1]:.2f}, theirs {theirs[0]:.2f}, {theirs[1]:.2f}",
        value=sum(theirs) / sum(ours),
        unit="x",
        limit=1.0,
    )
