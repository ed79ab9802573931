"""Constants of step_time fitted to published step times, and how far off rows are that a fit has not seen.

The tables lie in planner/tables/cost, each with its source. A fit minimises Huber's loss of
log(predicted / measured) over the logarithms of a few constants, each drawn to its prior: what no row depends
on stays there.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.planner.cost import architecture, cluster, programs
from llmtrain.planner.cost.candidates import (
    FULL,
    NO_RECOMPUTE,
    SELECTIVE,
    Candidates,
    candidates,
    num_params,
    stacked,
)
from llmtrain.planner.cost.schedule import INTERLEAVED, ONE_F_ONE_B
from llmtrain.planner.cost.step_time import Constants, Software, step_time

TABLES = Path(__file__).parents[1] / "tables" / "cost"
NUM_FOLDS = 5
HUBER = 0.03
"""Errors above 3% count in proportion, not squared: a cluster has bad days."""
PRIOR_SD: Mapping[str, float] = {"launch_s": 1.0, "fixed_s": 1.0, "slowdown": 0.1, "contention": 0.7}
OTHER_PRIOR_SD = 0.3
"""Of a constant's logarithm: efficiencies are known to a factor of 1.3 before any row is seen, what a host
takes to launch kernels, within 3. Assumed."""


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Measured steps of one program on one kind of cluster, doing the same in all of them."""

    software: Software
    c: Candidates
    step_s: np.ndarray
    group: np.ndarray
    """Rows of one group are layouts of one model on as many GPUs."""

    def __len__(self) -> int:
        return len(self.step_s)

    def rows(self, which: np.ndarray) -> Runs:
        return replace(self, c=self.c.rows(which), step_s=self.step_s[which], group=self.group[which])


@dataclass(frozen=True, kw_only=True)
class Study:
    """What constants of one program on one generation of GPUs are fitted to."""

    program: str
    generation: str
    read: Callable[[], tuple[Runs, ...]]
    prior: Constants
    free: tuple[str, ...]
    """Constants that are fitted; the others stay at the prior."""


# -- the fit


def log_errors(runs: Sequence[Runs], k: Constants) -> np.ndarray:
    """log(predicted / measured), rows of all `runs` in order."""
    return np.concatenate([np.log(step_time(each.c, each.software, k).total / each.step_s) for each in runs])


def fit_constants(
    runs: Sequence[Runs], prior: Constants, free: Sequence[str], *, max_steps: int = 40
) -> Constants:
    """Constants that fit `runs` best, by Levenberg and Marquardt's method on Huber's loss, reweighted each
    step.

    Rows count equally. With fewer rows than constants the prior decides what they leave open.

    Raises:
        ValueError: A measured time or the prior of a free constant is not above 0.
    """
    if any((each.step_s <= 0).any() for each in runs) or any(getattr(prior, name) <= 0 for name in free):
        raise ValueError("measured times and priors of free constants must be above 0")
    runs = _merged(runs)
    start = np.log([getattr(prior, name) for name in free])
    pull = np.array([PRIOR_SD.get(name, OTHER_PRIOR_SD) for name in free]) ** -2.0

    def constants(at: np.ndarray) -> Constants:
        values: dict[str, Any] = {
            name: float(value) for name, value in zip(free, np.exp(at), strict=True)
        }  # Any: Constants also holds a bool, which is never free
        return replace(prior, **values)

    def cost(at: np.ndarray) -> float:
        error = np.abs(log_errors(runs, constants(at))) / HUBER
        huber = np.where(error < 1, error**2 / 2, error - 0.5)
        return float(huber.sum() + ((at - start) ** 2 * pull).sum() / 2)

    found, best, damping, tiny = start, cost(start), 1e-3, 1e-5
    for _ in range(max_steps):
        error = log_errors(runs, constants(found))
        slopes = [
            (log_errors(runs, constants(found + tiny * axis)) - error) / tiny for axis in np.eye(len(free))
        ]
        jacobian = np.stack(slopes, axis=1)
        weight = np.minimum(1.0, HUBER / np.maximum(np.abs(error), 1e-12)) / HUBER**2
        hessian = jacobian.T @ (weight[:, None] * jacobian) + np.diag(pull)
        gradient = jacobian.T @ (weight * error) + (found - start) * pull
        before = best
        while damping < 1e8:
            step = np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), -gradient)
            tried = found + np.clip(step, -1, 1)
            reached = cost(tried)
            if reached < best:
                found, best, damping = tried, reached, max(damping / 8, 1e-6)
                break
            damping *= 4
        if before - best < 1e-6 * before:
            break
    return constants(found)


def _merged(runs: Sequence[Runs]) -> list[Runs]:
    """As few as can be: one for each thing that programs do."""
    alike: dict[Software, list[Runs]] = {}
    for each in runs:
        if len(each):
            alike.setdefault(each.software, []).append(each)
    return [
        Runs(
            software=software,
            c=stacked([each.c for each in those]),
            step_s=np.concatenate([each.step_s for each in those]),
            group=np.concatenate([each.group for each in those]),
        )
        for software, those in alike.items()
    ]


def folds_of(num_rows: int, num_folds: int = NUM_FOLDS) -> np.ndarray:
    """The fold of each row: folds as even as can be, rows shuffled the same way every time."""
    order = np.random.Generator(np.random.Philox(key=num_rows)).permutation(num_rows)
    found = np.empty(num_rows, dtype=int)
    found[order] = np.arange(num_rows) % num_folds
    return found


def _split(runs: Sequence[Runs], held: np.ndarray) -> tuple[list[Runs], list[Runs]]:
    """Rows that a fit may see, and those that are left out, as `held` says."""
    seen, left_out, start = [], [], 0
    for each in runs:
        here = held[start : start + len(each)]
        seen.append(each.rows(~here))
        left_out.append(each.rows(here))
        start += len(each)
    return seen, left_out


def left_out_errors(
    runs: Sequence[Runs], prior: Constants, free: Sequence[str], folds: np.ndarray
) -> np.ndarray:
    """log(predicted / measured) of each row by constants fitted to the other folds."""
    errors = np.empty(len(folds))
    for fold in np.unique(folds):
        seen, left_out = _split(runs, folds == fold)
        errors[folds == fold] = log_errors(left_out, fit_constants(seen, prior, free))
    return errors


# -- intervals


def student_t_90(degrees: float) -> float:
    """The 90% quantile of Student's t, by Cornish and Fisher's expansion (Abramowitz and Stegun 26.7.5):
    within 2% from 2 degrees on."""
    z, nu = 1.2815516, degrees
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / nu + second / nu**2 + third / nu**3


def log_quantiles(errors: np.ndarray) -> tuple[float, float]:
    """10% and 90% of log(measured / predicted) of a next row, from left-out log(predicted / measured).

    From 20 rows on: the order statistics that a next row lies between with a chance of 80% (conformal
    prediction; Vovk et al. 2005). Below, those are the extremes, so: Student's t of a normal distribution.

    Raises:
        ValueError: Fewer than 3 rows.
    """
    log_ratio = np.sort(-errors)
    num = len(log_ratio)
    if num < 3:
        raise ValueError(f"{num} rows say nothing about how far off others are; need 3")
    if num < 20:
        half = student_t_90(num - 1) * log_ratio.std(ddof=1) * np.sqrt(1 + 1 / num)
        return float(log_ratio.mean() - half), float(log_ratio.mean() + half)
    low = int(np.floor(0.1 * (num + 1))) - 1
    return float(log_ratio[low]), float(log_ratio[num - 1 - low])


def coverage(runs: Sequence[Runs], prior: Constants, free: Sequence[str]) -> np.ndarray:
    """For each row, whether it lies in the 80% interval that the other folds' rows alone give: constants and
    quantiles, the latter from folds within them."""
    num = sum(map(len, runs))
    folds, covered = folds_of(num), np.zeros(num, dtype=bool)
    for fold in range(NUM_FOLDS):
        seen, left_out = _split(runs, folds == fold)
        inner = folds_of(sum(map(len, seen)))
        low, high = log_quantiles(left_out_errors(seen, prior, free, inner))
        log_ratio = -log_errors(left_out, fit_constants(seen, prior, free))
        covered[folds == fold] = (low <= log_ratio) & (log_ratio <= high)
    return covered


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation; ties share their mean rank."""
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    found: np.ndarray = (last - (counts - 1) / 2)[where]
    return found


# -- the tables


def read_rows(name: str) -> dict[str, np.ndarray]:
    """A table of tables/cost as columns: floats where every cell is a number, else text."""
    text = (TABLES / name).read_text(encoding="utf-8")
    rows = list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))
    columns: dict[str, np.ndarray] = {}
    for key in rows[0]:
        cells = [row[key] for row in rows]
        try:
            columns[key] = np.array([float(cell) for cell in cells])
        except ValueError:
            columns[key] = np.array(cells)
    return columns


def _where(table: Mapping[str, np.ndarray], which: np.ndarray) -> dict[str, np.ndarray]:
    return {name: column[which] for name, column in table.items()}


def _cluster(name: str) -> dict[str, float]:
    """Columns of a cluster; 16-bit peaks, which fp8 is a multiple of (`Software.product_speed`)."""
    found = cluster.find_cluster(name)
    return cluster.columns(found, "bf16" if "bf16" in found.gpu.peak_flops else "fp16")


def _gpt(d_model: np.ndarray, num_layers: np.ndarray, num_heads: np.ndarray) -> dict[str, np.ndarray]:
    """GPT-2's family: biases, learned positions, tied embeddings."""
    one = np.ones(len(d_model))
    return {
        "num_layers": num_layers,
        "d_model": d_model,
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_width": d_model / num_heads,
        "ffn_width": 4 * d_model,
        "is_tied": one,
        "has_biases": one,
    }


VTRAIN_VOCAB = 51200
"""GPT-2's 50,257 tokens padded as Megatron-LM does at tp=8. The table does not print it: assumed. Unpadded,
the rows of one node fit better (2.5% off in the median, not 3.3%), and Megatron-LM's README of 2020 comes out
worse (8%, not 4%)."""


def vtrain_runs() -> tuple[Runs, ...]:
    """One node, then many: all recompute blocks."""
    found = []
    for name in ("vtrain_single.csv", "vtrain_multi.csv"):
        t = read_rows(name)
        c = candidates(
            **_gpt(t["hidden"], t["layers"], t["n_heads"]),
            **_cluster("vtrain_a100"),
            vocab_size=VTRAIN_VOCAB,
            position_rows=t["seq_len"],
            seq_len=t["seq_len"],
            pp=t["pp"],
            dp=t["dp"],
            tp=t["tp"],
            micro_batch=t["micro_batch"],
            grad_accum=t["global_batch"] / t["micro_batch"] / t["dp"],
            recompute=FULL,
        )
        found.append(
            Runs(
                software=programs.find_program("megatron_deepspeed").does(),
                c=c,
                step_s=t["iter_ms"] / 1e3,
                group=t["gpus"] * 1e6 + t["hidden"],
            )
        )
    return tuple(found)


def llm_foundry_runs(generation: str) -> tuple[Runs, ...]:
    """MPT under FSDP, rows in bf16 and in fp8 apart."""
    program = programs.find_program("llm_foundry")
    gpu, on = {"ampere": ("a100_40gb", "mosaicml_a100"), "hopper": ("h100_80gb", "h100_sxm_8x")}[generation]
    table = read_rows("llm_foundry.csv")
    found = []
    for precision in ("bf16", "fp8"):
        is_here = (table["gpu"] == gpu) & ((table["precision"] == "amp_fp8") == (precision == "fp8"))
        if not is_here.any():
            continue
        t = _where(table, is_here)
        shapes = [architecture.columns(architecture.find_model(f"mpt_{name}")) for name in t["model"]]
        model = {name: np.array([shape[name] for shape in shapes]) for name in shapes[0]}
        model["position_rows"] = t["seq_len"]
        c = candidates(
            **model,
            **_cluster(on),
            seq_len=t["seq_len"],
            dp=t["gpus"],
            zero_stage=3,
            micro_batch=t["micro_batch"],
            grad_accum=t["grad_accum"],
            recompute=np.where(t["act_ckpt"] == "True", FULL, NO_RECOMPUTE),
        )
        if not np.allclose(num_params(c), t["n_params"], rtol=2e-3):
            raise AssertionError("shapes of llm_foundry.csv do not have the parameters it prints")
        found.append(
            Runs(
                software=program.does(precision=precision),
                c=c,
                step_s=t["global_batch_tokens"] / t["tokens_per_s"],
                group=t["n_params"],
            )
        )
    return tuple(found)


def torchtitan_runs() -> tuple[Runs, ...]:
    """Llama 3.1 8B on one node: eager, compiled, compiled in fp8."""
    program = programs.find_program("torchtitan")
    table = read_rows("torchtitan.csv")
    model = architecture.columns(architecture.find_model("llama3_8b"))
    found = []
    for is_compiled, is_fp8 in ((False, False), (True, False), (True, True)):
        t = _where(table, (table["compile"] == is_compiled) & (table["float8"] == is_fp8))
        c = candidates(
            **model,
            **_cluster("grand_teton"),
            seq_len=t["seq_len"],
            dp=t["fsdp"],
            cp=t["cp"],
            zero_stage=3,
            micro_batch=t["local_batch"],
            recompute=np.where(t["act_ckpt"] == "full", FULL, SELECTIVE),
        )
        found.append(
            Runs(
                software=program.does(precision="fp8" if is_fp8 else "bf16", is_compiled=is_compiled),
                c=c,
                step_s=t["local_batch"] * t["seq_len"] / t["cp"] / t["tps_per_gpu"],
                group=t["seq_len"],
            )
        )
    return tuple(found)


def megatron_core_runs() -> Runs:
    """H100 weak scaling, in bf16. Micro batches of one row: assumed, for the source does not say. Losses are
    the plain kernels of core/tensor_parallel/cross_entropy.py: 52 bytes a logit, of fp32 copies, maxima,
    exponentials, sums and their gradients."""
    t = read_rows("megatron_core_h100.csv")
    d, num_layers, seq_len, vocab = t["hidden"], t["layers"], t["seq_len"], t["vocab"]
    c = candidates(
        **_gpt(d, num_layers, t["n_heads"]),
        **_cluster("h100_sxm_8x"),
        vocab_size=vocab,
        position_rows=seq_len,
        seq_len=seq_len,
        tp=t["tp"],
        pp=t["pp"],
        dp=t["dp"],
        sequence_parallel=t["tp"] > 1,
        micro_batch=1,
        grad_accum=t["global_batch"] / t["dp"],
    )
    # FLOPs as Megatron-LM counts them: arXiv:2104.04473, appendix, without recomputation
    flops = 72 * t["global_batch"] * seq_len * num_layers * d**2
    flops = flops * (1 + seq_len / 6 / d + vocab / 12 / d / num_layers)
    software = replace(programs.find_program("megatron").does(), loss_bytes=52.0)
    step_s = flops / t["tflops_per_gpu"] / 1e12 / t["gpus"]
    return Runs(software=software, c=c, step_s=step_s, group=t["gpus"])


BRIDGE_CLUSTERS = {"h100": "h100_sxm_8x", "b200": "b200_sxm_8x", "gb200": "gb200_nvl72"}


def _model_columns(name: str) -> dict[str, float]:
    if name == "qwen3_235b_a22b":  # Qwen3 report, arXiv:2505.09388, table 2; widths from its config.json
        sizes = {"num_layers": 94, "d_model": 4096, "num_heads": 64, "num_kv_heads": 4, "head_width": 128}
        experts = {"num_experts": 128, "experts_per_token": 8, "expert_width": 1536}
        return architecture.columns(architecture.build("qwen3", name, vocab_size=151936, **sizes, **experts))
    return architecture.columns(architecture.find_model(name))


def megatron_bridge_runs(systems: Sequence[str]) -> Runs:
    """NeMo's recipes, in fp8."""
    table = read_rows("megatron_bridge.csv")
    t = _where(table, np.isin(table["system"], systems))
    rows = []
    for at, name in enumerate(t["model"]):
        ranks = {axis: t[axis][at] for axis in ("tp", "pp", "cp", "ep", "vpp")}
        dp = t["gpus"][at] / ranks["tp"] / ranks["pp"] / ranks["cp"]
        rows.append(
            candidates(
                **_model_columns(name),
                **_cluster(BRIDGE_CLUSTERS[t["system"][at]]),
                **ranks,
                seq_len=t["seq_len"][at],
                dp=dp,
                zero_stage=3 if t["fsdp"][at] > 1 else 1,
                micro_batch=t["micro_batch"][at],
                grad_accum=np.maximum(1, t["global_batch"][at] / t["micro_batch"][at] / dp),
                sequence_parallel=ranks["tp"] > 1,
                schedule=INTERLEAVED if ranks["vpp"] > 1 else ONE_F_ONE_B,
            )
        )
    return Runs(
        software=programs.find_program("megatron").does(precision="fp8"),
        c=stacked(rows),
        step_s=t["global_batch"] * t["seq_len"] / t["gpus"] / t["tokens_per_s_per_gpu"],
        group=t["gpus"],
    )


def simumax_runs() -> tuple[Runs, ...]:
    """Megatron-LM 0.14 on 8 B200, models cut to a few layers. The DeepSeeks' first layer is taken for
    dense."""
    t = read_rows("simumax_b200.csv")
    names = {
        "llama3-70b": "llama3_70b",
        "llama3-405b": "llama3_405b",
        "deepseekv2": "deepseek_v2",
        "deepseekv3": "deepseek_v3",
    }
    rows = []
    for at, name in enumerate(t["model"]):
        model = architecture.columns(architecture.find_model(names[name]))
        model["num_layers"] = t["layers"][at]
        model["num_moe_layers"] = t["layers"][at] - 1 if model.get("num_moe_layers") else 0
        rows.append(
            candidates(
                **model,
                **_cluster("b200_sxm_8x"),
                **{axis: t[axis][at] for axis in ("tp", "pp", "dp", "ep", "cp", "seq_len")},
                micro_batch=1,
                grad_accum=t["mbc"][at],
                sequence_parallel=t["tp"][at] > 1,
            )
        )
    software = programs.find_program("megatron_plain").does()
    return (Runs(software=software, c=stacked(rows), step_s=t["real_ms"] / 1e3, group=t["layers"]),)


# -- what is fitted to what

PRIOR = Constants(
    gemm_efficiency=0.75,
    attention_efficiency=0.6,
    memory_efficiency=0.6,
    launch_s=3e-4,
    node_efficiency=0.8,
    contention=0.2,
)
"""Of every fit: what is usual on GPUs. Assumed; link_efficiency is measured (collectives.py)."""

MEGATRON_PRIOR = replace(PRIOR, attention_efficiency=1.0, expert_efficiency=0.6, launch_s=8.7e-4)
"""Megatron-LM's host takes what vTrain's rows say. Every key counts in `attention_efficiency`: a kernel that
skips what a causal mask hides and runs at half of the peak has 1. With attention's prior at 0.6 and launches
of 0.3 ms the weak-scaling rows, left out in turn, were 8% off."""
MEGATRON_FREE = ("gemm_efficiency", "attention_efficiency", "memory_efficiency", "expert_efficiency")

STUDIES: tuple[Study, ...] = (
    Study(
        program="megatron_deepspeed",
        generation="ampere",
        read=vtrain_runs,
        prior=PRIOR,
        free=("gemm_efficiency", "memory_efficiency", "launch_s", "slowdown", "fixed_s"),
    ),
    Study(
        program="llm_foundry",
        generation="ampere",
        read=lambda: llm_foundry_runs("ampere"),
        prior=PRIOR,
        free=("gemm_efficiency", "attention_efficiency", "memory_efficiency", "contention"),
    ),
    Study(
        program="llm_foundry",
        generation="hopper",
        read=lambda: llm_foundry_runs("hopper"),
        prior=PRIOR,
        free=("gemm_efficiency", "attention_efficiency", "memory_efficiency", "contention"),
    ),
    Study(
        program="torchtitan",
        generation="hopper",
        read=torchtitan_runs,
        prior=PRIOR,
        free=("gemm_efficiency", "attention_efficiency"),
    ),
    Study(
        program="megatron",
        generation="hopper",
        read=lambda: (megatron_core_runs(), megatron_bridge_runs(["h100"])),
        prior=MEGATRON_PRIOR,
        free=MEGATRON_FREE,
    ),
    Study(
        program="megatron",
        generation="blackwell",
        read=lambda: (megatron_bridge_runs(["b200", "gb200"]),),
        prior=MEGATRON_PRIOR,
        free=MEGATRON_FREE,
    ),
    Study(
        program="megatron_plain",
        generation="blackwell",
        read=simumax_runs,
        prior=MEGATRON_PRIOR,
        free=MEGATRON_FREE,
    ),
)


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    constants: Constants
    errors: np.ndarray
    """log(predicted / measured) of each row, left out in turn."""
    has_experts: np.ndarray
    """Whether a row's model has them."""
    ranges: Mapping[str, tuple[float, float]]


def run_study(study: Study) -> StudyResult:
    """Constants fitted to all rows, and each row's error when it is left out."""
    runs = study.read()
    num = sum(map(len, runs))
    # fewer than 3 rows a fold: each row alone is left out
    folds = folds_of(num) if num >= 3 * NUM_FOLDS else np.arange(num)
    columns = {
        name: np.concatenate([programs.quantity(each.c, name) for each in runs])
        for name in programs.QUANTITIES
    }
    return StudyResult(
        constants=fit_constants(runs, study.prior, study.free),
        errors=left_out_errors(runs, study.prior, study.free, folds),
        has_experts=np.concatenate([each.c.num_moe_layers > 0 for each in runs]),
        ranges={name: (float(values.min()), float(values.max())) for name, values in columns.items()},
    )


def find_study(program: str, generation: str) -> Study:
    return next(each for each in STUDIES if (each.program, each.generation) == (program, generation))


def accuracy() -> dict[str, float]:
    """Figures of all studies, rows left out in turn (5 folds; with fewer than 15 rows, each by itself).

    | figure | of |
    |---|---|
    | ..._mean, ..._median | abs(predicted / measured - 1) |
    | vtrain_spearman, ..._median, ..._min | rank correlation of predicted and measured, below |
    | h100_weak_mean | the three rows of Megatron-Core's weak scaling |
    | interval_coverage_80 | share of all studies' rows in the interval that the other folds alone give |

    Constants are fitted anew for each fold. Not chosen anew are `Software`, priors and step_time's own
    numbers, some of which were chosen with these rows in view (megatron's tp_overlap, elementwise_passes, its
    priors of attention_efficiency and launch_s; torchtitan's balances_context; FP8_SPEED): figures of few
    rows, h100_weak_mean and torchtitan_5fold_mean above all, are the better for it.

    Ranks are those among the layouts of one model on as many GPUs, of many-node rows: the mean, the median
    and the least of groups of 4 layouts or more.
    """
    found: dict[str, float] = {}
    errors = {}
    for study in STUDIES:
        errors[study.program, study.generation] = run_study(study).errors

    vtrain = errors["megatron_deepspeed", "ampere"]
    found["vtrain_5fold_median"], found["vtrain_5fold_mean"] = _median(vtrain), _mean(vtrain)
    single, multi = vtrain_runs()
    ahead = vtrain[len(single) :]
    found["vtrain_multi_5fold_mean"] = _mean(ahead)
    ranks = np.array(
        [
            spearman(multi.step_s[here] * np.exp(ahead[here]), multi.step_s[here])
            for here in (multi.group == group for group in np.unique(multi.group))
            if here.sum() >= 4
        ]
    )
    found["vtrain_spearman"] = float(ranks.mean())
    found["vtrain_spearman_median"], found["vtrain_spearman_min"] = (
        float(np.median(ranks)),
        float(ranks.min()),
    )

    foundry = [errors["llm_foundry", generation] for generation in ("ampere", "hopper")]
    found["llm_foundry_5fold_mean"] = _mean(np.concatenate(foundry))
    found["llm_foundry_a100_5fold_mean"], found["llm_foundry_h100_5fold_mean"] = map(_mean, foundry)
    found["torchtitan_5fold_mean"] = _mean(errors["torchtitan", "hopper"])
    megatron = errors["megatron", "hopper"]
    found["h100_weak_mean"] = _mean(megatron[: len(megatron_core_runs())])
    found["megatron_bridge_h100_mean"] = _mean(megatron[len(megatron_core_runs()) :])
    found["megatron_bridge_b200_mean"] = _mean(errors["megatron", "blackwell"])
    found["simumax_b200_mean"] = _mean(errors["megatron_plain", "blackwell"])
    covered = [coverage(study.read(), study.prior, study.free) for study in STUDIES]
    found["interval_coverage_80"] = float(np.concatenate(covered).mean())
    return found


def _mean(log_error: np.ndarray) -> float:
    return float(np.abs(np.expm1(log_error)).mean())


def _median(log_error: np.ndarray) -> float:
    return float(np.median(np.abs(np.expm1(log_error))))
