"""The planner: how fast it imports and searches, and how far off it is on published runs that it left out.

Step times: 5-fold, constants fitted on the other folds. Memory and intervals: llmtrain/planner/cost. Every
figure comes from tables that the package ships; docs/planner.md explains them. `llmtrain bench own_runs`
holds the planner against runs of this machine.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time

import numpy as np

from llmtrain.bench.table import BenchConfig, Row
from llmtrain.planner.cost.architecture import find_model
from llmtrain.planner.cost.calibration import accuracy as time_accuracy
from llmtrain.planner.cost.cluster import find_cluster
from llmtrain.planner.cost.layouts import search
from llmtrain.planner.cost.memory_rows import accuracy as memory_accuracy
from llmtrain.planner.loss import laws
from llmtrain.planner.loss.fit import fit

NUM_OUTLIERS = 5
"""Runs of the highest loss, which Besiroglu et al. leave out."""
IMPORT_LIMIT_S, SEARCH_LIMIT_S, SEARCH_LIMIT_MB = 0.2, 1.0, 500.0
BESIROGLU = {
    "entropy": 1.8172,
    "params_scale": 477.8,
    "tokens_scale": 2143.0,
    "alpha": 0.3473,
    "beta": 0.3672,
}
"""Refit of the 240 extracted points (epoch-research/analyzing-chinchilla@9225883) that the issue's table
prints."""
LIMITS = {
    "vtrain_5fold_median": 0.04,
    "vtrain_5fold_mean": 0.07,
    "vtrain_spearman": 0.85,
    "llm_foundry_5fold_mean": 0.04,
    "torchtitan_5fold_mean": 0.08,
    "h100_weak_mean": 0.05,
    "memory_golden_mean": 0.05,
    "memory_simumax_max": 0.02,
}


def run(config: BenchConfig) -> list[Row]:
    config.only_options()
    turns = config.scaled(5)
    rows = [
        Row(name="import_s", value=import_s(turns), unit="s", limit=IMPORT_LIMIT_S),
        *_search(turns),
        *_laws(),
    ]
    for name, value in {**time_accuracy(), **memory_accuracy()}.items():
        unit = "rank correlation" if "spearman" in name else "share"
        rows.append(Row(name=name, value=value, unit=unit, limit=LIMITS.get(name)))
    return rows


def import_s(turns: int) -> float:
    """Processor seconds of `from llmtrain.planner import predict` in a fresh process: the least of
    several."""
    program = (
        "import time; begin = time.process_time(); from llmtrain.planner import predict; "
        "print(time.process_time() - begin)"
    )
    return min(
        float(
            subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        )
        for _ in range(turns)
    )


def _search(turns: int) -> list[Row]:
    """All axes of 405B on 16,384 GPUs."""
    arch, cluster = find_model("llama3_405b"), find_cluster("h100_sxm_8x", num_nodes=2048)
    spent = []
    for _ in range(turns):
        begin = time.process_time()
        found = search(arch, cluster, seq_len=8192, global_batch_rows=2048)
        spent.append(time.process_time() - begin)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return [
        Row(name="search_16k_s", value=statistics.median(spent), unit="s", limit=SEARCH_LIMIT_S),
        Row(name="search_16k_layouts", value=float(found.num_legal), unit="layouts"),
        Row(name="search_16k_peak_mb", value=peak_mb, unit="MiB", limit=SEARCH_LIMIT_MB),
    ]


def _laws() -> list[Row]:
    """Besiroglu's fit of the 240 points: the worst relative distance of a coefficient from the printed
    one."""
    table = laws.read_table("chinchilla_runs.csv")
    num_params, flops, loss = table[np.argsort(table[:, 2])[:-NUM_OUTLIERS]].T
    found = fit(num_params, flops / laws.FLOPS_PER_PARAM_TOKEN / num_params, loss)
    ours = {
        "entropy": found.entropy,
        "params_scale": found.params_scale,
        "tokens_scale": found.tokens_scale,
        "alpha": found.params_exponent,
        "beta": found.tokens_exponent,
    }
    worst = max(abs(float(ours[name]) / printed - 1) for name, printed in BESIROGLU.items())
    return [Row(name="besiroglu_worst_coefficient", value=worst, unit="share", limit=1e-3)]
