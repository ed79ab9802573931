"""Before an elastic launch: can each number of machines that may come train this run?

python -m llmtrain.cli.elastic MIN:MAX RANKS_PER_MACHINE [overrides of `llmtrain train`]
"""

from __future__ import annotations

import sys
from functools import partial

from llmtrain.cli.compose import run_verb
from llmtrain.cli.train import report_check
from llmtrain.errors import ConfigError
from llmtrain.parallel.compatibility import explain
from llmtrain.train.check import layout_of
from llmtrain.train.config import TrainRoot


def main() -> None:
    bounds, num_ranks, *words = sys.argv[1:]
    least, most = map(int, bounds.split(":"))
    sys.argv = ["llmtrain train", *words]
    run_verb("train", TrainRoot, partial(check, least=least, most=most, num_ranks=int(num_ranks)))


def check(cfg: TrainRoot, *, least: int, most: int, num_ranks: int) -> None:
    """
    Args:
        least, most: machines, both included.
        num_ranks: of each machine.

    Raises:
        ConfigError: a number of machines that cannot share the run; names those that can.
    """
    if least > most:
        raise ConfigError(f"NNODES={least}:{most} must be MIN:MAX, the smaller number first")
    if cfg.parallel.world_size is not None and least < most:
        raise ConfigError(
            f"parallel.world_size={cfg.parallel.world_size} with NNODES={least}:{most}: an elastic run has "
            "as many ranks as come; set parallel.world_size=null"
        )
    layout = layout_of(cfg, device=None)
    broken = {nodes: explain(layout, nodes * num_ranks) for nodes in range(least, most + 1)}
    bad = {nodes: problems for nodes, problems in broken.items() if problems}
    if bad:
        worst = min(bad)
        good = [nodes for nodes in broken if nodes not in bad]
        raise ConfigError(
            f"NNODES={least}:{most}: {_some(list(bad))} machines of {num_ranks} ranks cannot share this run, "
            f"{_some(good)} can; with {worst}, {bad[worst][0]}"
        )
    report_check(cfg)


def _some(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:16])) or "none"
    return shown if len(numbers) <= 16 else f"{shown} and {len(numbers) - 16} more"


if __name__ == "__main__":
    main()
