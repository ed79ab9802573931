"""What a layout costs: a step beside bare DeepSpeed's; bytes sent and peak memory beside their formulas.

Time: our engine and a loop that calls DeepSpeed and nothing else train the same model on the same batches, in
turns, in one process. Nobody talks there: what is left is what we put around DeepSpeed. On a CPU the ratio is
of CPU time on one thread, which other work on the machine moves less; seconds are of the wall.

Bytes: two gloo ranks count what they hand to collectives (_layout_rank.py). Memory: the most bytes of tensors
at once, counted operation by operation, on a CPU alone.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from llmtrain.bench._live_bytes import LiveBytes
from llmtrain.bench.ranks import run_ranks
from llmtrain.bench.shapes import DEMO
from llmtrain.bench.table import BenchConfig, Row
from llmtrain.loader.batches import Batch
from llmtrain.model.config import Family, ModelConfig
from llmtrain.model.size import peak_bytes
from llmtrain.parallel.config import ParallelConfig
from llmtrain.parallel.groups import build_groups
from llmtrain.parallel.topology import Topology
from llmtrain.train.config import OptimizerConfig, Precision, TrainConfig
from llmtrain.train.deepspeed_config import deepspeed_config
from llmtrain.train.deepspeed_engine import DeepSpeedEngine, join_deepspeed
from llmtrain.train.optimizer import build_optimizer
from llmtrain.train.placement import Placement, fresh_weights, place
from llmtrain.train.ranks import join_ranks
from llmtrain.train.state import fill

SEQ_LEN, GLOBAL_ROWS, MICRO_ROWS = 512, 4, 2
LR, CLIP = 1e-3, 1.0
PROMISED_OVERHEAD = 1.03

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp": {"tp_size": 2},
    "tp, bf16, recomputed": {"tp_size": 2, "precision": "bf16", "recompute_every": 1},
    "tp, sequence parallel": {"tp_size": 2, "sequence_parallel": True},
    "cp by heads": {"cp_size": 2},
    "cp by sequence": {"cp_size": 2, "context": "sequence"},
    "pp": {"pp_size": 2},
    "pp, bf16, tied": {"pp_size": 2, "precision": "bf16", "model": {"tie_embeddings": True}},
    "pp, two stages a rank": {
        "pp_size": 2,
        "pp_schedule": "dual_pipe_v",
        "num_micro_batches": 4,
        "model": {"num_layers": 4, "tie_embeddings": True},
    },
    "ZeRO-0": {"zero_stage": 0},
    "ZeRO-1": {"zero_stage": 1},
    "ZeRO-2": {"zero_stage": 2},
    "ZeRO-3": {"zero_stage": 3},
    "ZeRO-3, every weight split": {
        "zero_stage": 3,
        "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    },
}
"""Name -> a case of _layout_rank, on two ranks."""

MEMORY_SHAPE: dict[str, Any] = {
    "vocab_size": 2048,
    "num_layers": 4,
    "d_model": 256,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_width": 704,
}
RANKS_TIMEOUT_S = 300
MEMORY_SEQ_LEN, MEMORY_ROWS, BUCKET_ELEMENTS = 256, 4, 1_000_000


def run(config: BenchConfig) -> list[Row]:
    config.only_options()
    device = join_ranks(timeout_s=60)
    rows = overhead_rows(device, num_turns=config.scaled(16, least=4))
    if device.type == "cpu":  # on a GPU backward passes run in a thread that the count does not see
        rows += memory_rows(device)
    dist.destroy_process_group()
    return rows + volume_rows()


# -- time


@dataclass(frozen=True)
class Setting:
    """What both sides of a comparison are given."""

    placement: Placement
    train: TrainConfig
    optimizer: OptimizerConfig
    device: torch.device
    batches: list[Batch]

    @classmethod
    def of_stage(cls, zero_stage: int, device: torch.device) -> Setting:
        return cls(
            placement=place(
                DEMO, ParallelConfig(zero_stage=zero_stage), build_groups(Topology()), seq_len=SEQ_LEN
            ),
            train=TrainConfig(
                total_tokens=1,
                global_batch_rows=GLOBAL_ROWS,
                micro_batch_rows=MICRO_ROWS,
                grad_clip=CLIP,
                precision=Precision.fp32,
            ),
            optimizer=OptimizerConfig(peak_lr=LR),
            device=device,
            batches=micro_batches(
                device,
                num=GLOBAL_ROWS // MICRO_ROWS,
                rows=MICRO_ROWS,
                seq_len=SEQ_LEN,
                vocab_size=DEMO.vocab_size,
            ),
        )


def overhead_rows(device: torch.device, *, num_turns: int) -> list[Row]:
    rows = []
    for stage in (1, 0, 2, 3):
        setting = Setting.of_stage(stage, device)
        ours = OurStep(setting)
        steps: dict[str, Callable[[], object]] = {
            "ours": ours,
            "bare_deepspeed": bare_deepspeed_step(setting),
        }
        if stage == 1:
            steps["bare_pytorch"] = bare_pytorch_step(setting)
        costs, seconds = take_turns(steps, num_turns=num_turns, device=device)
        suffix = "" if stage == 1 else f"_zero{stage}"
        for name in list(steps)[1:]:
            ratios = [ours_s / rival_s for ours_s, rival_s in zip(costs["ours"], costs[name], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            rows += [
                Row(
                    name=f"overhead_vs_{name}{suffix}",
                    value=middle,
                    unit=f"x, quartiles {low:.3f} {high:.3f}",
                    limit=PROMISED_OVERHEAD if name == "bare_deepspeed" else None,
                ),
                Row(
                    name=f"step_s_vs_{name}{suffix}",
                    value=statistics.median(seconds["ours"]),
                    rival=statistics.median(seconds[name]),
                    unit="s",
                ),
            ]
        rows.append(
            Row(
                name=f"outside_deepspeed_percent{suffix}",
                value=100 * statistics.median(ours.shares_outside[-num_turns:]),
                unit="% of our step",
                limit=100 * (PROMISED_OVERHEAD - 1),
            )
        )
        del ours, steps
        gc.collect()
    return rows


def micro_batches(device: torch.device, *, num: int, rows: int, seq_len: int, vocab_size: int) -> list[Batch]:
    """One step's batches: random tokens, two documents of equal length a row."""
    random = np.random.default_rng(0)
    places = np.arange(seq_len)
    half = seq_len // 2
    batches = []
    for _ in range(num):
        tokens = torch.from_numpy(random.integers(0, vocab_size, (rows, seq_len + 1)))
        batch = Batch(
            tokens_BS=tokens[:, :-1].contiguous(),
            targets_BS=tokens[:, 1:].contiguous(),
            positions_BS=torch.from_numpy(places % half).repeat(rows, 1),
            segments_BS=torch.from_numpy((places // half).astype(np.int32)).repeat(rows, 1),
            num_valid=rows * seq_len,
            rows=np.arange(rows),
        )
        batches.append(batch.to(device))
    return batches


class OurStep:
    """Our engine's step, with a look at the clock around each call of DeepSpeed's three."""

    def __init__(self, setting: Setting) -> None:
        self.engine = DeepSpeedEngine(
            setting.placement, device=setting.device, train=setting.train, optimizer=setting.optimizer
        )
        self.engine.load(fresh_weights(setting.placement, seed=0))
        self.batches = setting.batches
        self.shares_outside: list[float] = []
        """Of every step so far: the part of its time outside of DeepSpeed."""
        self._inside_s = 0.0
        for name in ("forward", "backward", "step"):
            setattr(self.engine._engine, name, self._timed(getattr(self.engine._engine, name)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            self._inside_s += time.perf_counter() - start
            return result

        return timed

    def __call__(self) -> float:
        self._inside_s, start = 0.0, time.perf_counter()
        loss = self.engine.train_step(self.batches, lr=LR).loss
        self.shares_outside.append(1 - self._inside_s / (time.perf_counter() - start))
        return loss


def fresh_model(setting: Setting) -> torch.nn.Module:
    """The model that our engine builds, with the weights that it starts from."""
    with torch.device("meta"):
        model = setting.placement.build(setting.train)
    model.to_empty(device=setting.device)
    source = fresh_weights(setting.placement, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fill(parameter.detach().view(-1), source, "weight", name, 0)
    return model


def bare_deepspeed_step(setting: Setting) -> Callable[[], float]:
    """The loop of DeepSpeed's own tutorial, with the loss read once a step, for a log."""
    join_deepspeed(setting.device)
    model = fresh_model(setting)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, setting.optimizer),
        config=deepspeed_config(setting.train, setting.placement.parallel, dp_size=1),
    )
    inputs = [
        (each.tokens_BS, each.positions_BS, each.segments_BS, each.targets_BS) for each in setting.batches
    ]

    def step() -> float:
        for each in inputs:
            loss = engine(*each) / each[-1].numel()
            engine.backward(loss)
            engine.step()
        return float(loss.detach())

    return step


def bare_pytorch_step(setting: Setting) -> Callable[[], float]:
    """What a good PyTorch loop does, and nothing else."""
    model = fresh_model(setting)
    optimizer = build_optimizer(model, setting.optimizer)
    inputs = [
        (each.tokens_BS, each.positions_BS, each.segments_BS, each.targets_BS) for each in setting.batches
    ]
    num_valid = sum(each.num_valid for each in setting.batches)

    def step() -> float:
        for each in inputs:
            loss = model(*each) / num_valid
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def take_turns(
    steps: dict[str, Callable[[], object]], *, num_turns: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """(CPU seconds on one thread, or on a GPU those of the wall; seconds of the wall) of each step, turn by
    turn, after two turns to warm up. Every other turn goes backwards, so that nobody is always the second."""
    cost_clock = time.process_time if device.type == "cpu" else time.perf_counter
    costs: dict[str, list[float]] = {name: [] for name in steps}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for turn in range(num_turns + 2):
        for name in list(steps)[:: 1 if turn % 2 else -1]:
            cost, start = cost_clock(), time.perf_counter()
            steps[name]()
            if turn >= 2:
                costs[name].append(cost_clock() - cost)
                seconds[name].append(time.perf_counter() - start)
    torch.set_num_threads(num_threads)
    return costs, seconds


# -- memory


def memory_rows(device: torch.device) -> list[Row]:
    """Peak of a step at ZeRO-1, beside model/size.py's."""
    rows = []
    for family in (Family.llama, Family.gpt2):
        learned = MEMORY_SEQ_LEN if family is Family.gpt2 else None
        model = ModelConfig(**MEMORY_SHAPE, family=family, max_positions=learned)
        for precision in (Precision.fp32, Precision.bf16):
            for recompute_every in (0, 1):
                train = TrainConfig(
                    total_tokens=1,
                    global_batch_rows=2 * MEMORY_ROWS,
                    micro_batch_rows=MEMORY_ROWS,
                    precision=precision,
                    recompute_every=recompute_every,
                )
                expected = peak_bytes(
                    model,
                    micro_batch_rows=MEMORY_ROWS,
                    seq_len=MEMORY_SEQ_LEN,
                    precision=precision.name,
                    recompute_every=recompute_every,
                    reduce_bucket_elements=BUCKET_ELEMENTS,
                )
                fullest = max(expected, key=lambda moment: expected[moment])
                recomputed = "recomputed" if recompute_every else "kept"
                rows.append(
                    Row(
                        name=f"peak, {family.name} {precision.name}, {recomputed}, rival: formula, {fullest}",
                        value=measured_peak(model, train, device) / 1e6,
                        rival=expected[fullest] / 1e6,
                        unit="MB",
                    )
                )
    return rows


def measured_peak(model: ModelConfig, train: TrainConfig, device: torch.device) -> int:
    """Bytes of tensors in the second step, when the optimizer's state is there."""
    zero = {"reduce_bucket_size": BUCKET_ELEMENTS}  # DeepSpeed's default is 2 GB in fp32
    parallel = ParallelConfig(zero_stage=1, deepspeed={"zero_optimization": zero})
    live = LiveBytes()
    with live:
        placement = place(model, parallel, build_groups(Topology()), seq_len=MEMORY_SEQ_LEN)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints the memory of every bf16 start
            engine = DeepSpeedEngine(
                placement, device=device, train=train, optimizer=OptimizerConfig(peak_lr=LR)
            )
        engine.load(fresh_weights(placement, seed=0))
        batches = micro_batches(
            device, num=2, rows=MEMORY_ROWS, seq_len=MEMORY_SEQ_LEN, vocab_size=model.vocab_size
        )
        engine.train_step(batches, lr=LR)
        gc.collect()
        live.peak = live.now
        engine.train_step(batches, lr=LR)
    return live.peak


# -- bytes sent


def volume_rows() -> list[Row]:
    """What two gloo ranks hand to collectives in a step, both together, beside parallel/volume.py's."""
    told = run_cases(LAYOUTS, num_ranks=2)
    rows = []
    for name in LAYOUTS:
        counted, expected = Counter[str](), Counter[str]()
        for results in told:
            for totals, found in ((counted, "counted"), (expected, "expected")):
                for axis, volume in results[name][found].items():
                    totals[axis] += sum(volume.values())
        rows += [
            Row(
                name=f"bytes over {axis}, {name}, rival: formula",
                value=counted[axis],
                rival=expected[axis],
                unit="bytes",
            )
            for axis in counted | expected
        ]
    return rows


def run_cases(cases: dict[str, Any], *, num_ranks: int) -> list[dict[str, Any]]:
    """What each rank of _layout_rank says of `cases`."""
    command = [sys.executable, "-m", "llmtrain.bench._layout_rank", json.dumps(cases)]
    return run_ranks(command, num_ranks=num_ranks, timeout_s=RANKS_TIMEOUT_S)
