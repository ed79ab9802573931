"""Step time and peak memory of our own small runs on this CPU, beside what the planner says after seeing two.

Each run is `llmtrain train` with real ranks, one thread each, on tokens that were drawn. The parent reads the
run's metrics as they come, and the kernel's count of each rank's peak, then ends the ranks: what a save at
the end would add is left out. All runs are done in turns, round by round, so that a slow minute of the
machine meets them all; the seconds of a run are the lower quartile of its settled steps. Two runs calibrate
(llmtrain/planner/calibrate.py), the twelve others are foretold.

Where other work has the cores, seconds of the wall say little: `options.clock=cpu` takes CPU seconds of the
busiest rank instead. They know no waiting, so pipelines are then left out of the figures of time.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from llmtrain import files
from llmtrain.bench.ranks import free_port
from llmtrain.bench.table import BenchConfig, Row
from llmtrain.data.config import Packing
from llmtrain.data.manifest import FORMAT_VERSION, Manifest, ShardEntry, TokenizerEntry, write_manifest
from llmtrain.data.pack import write_plan
from llmtrain.data.shards import ShardWriter
from llmtrain.errors import ConfigError, LLMTrainError, unknown_name
from llmtrain.model.config import ModelConfig
from llmtrain.parent import PARENT_VARIABLE
from llmtrain.planner.calibrate import Observation, calibrate
from llmtrain.planner.cost.architecture import from_model_config
from llmtrain.planner.cost.cluster import THIS_MACHINE, Cluster, this_cpu
from llmtrain.planner.cost.costs import find_costs
from llmtrain.planner.cost.layout import Layout
from llmtrain.planner.prediction import predict
from llmtrain.tracking.metrics import SETTLING_STEPS, read_lines

NUM_ROUNDS = 2
STEPS_A_ROUND = 5
"""Settled ones."""
RUN_TIMEOUT_S = 180.0
POLL_S = 0.05
CLOCKS = ("wall", "cpu")
PROMISED = 10.0
"""Percent, of the mean of the twelve."""


@dataclass(frozen=True, kw_only=True)
class TinyRun:
    """One of the runs: settings of `llmtrain train` beside those that all have."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    num_ranks: int = 1


def _llama(
    *, layers: int, d_model: int, heads: int, ffn: int, vocab: int, kv: int | None = None
) -> dict[str, Any]:
    return {
        "model.num_layers": layers,
        "model.d_model": d_model,
        "model.num_heads": heads,
        "model.num_kv_heads": kv or heads,
        "model.ffn_width": ffn,
        "model.vocab_size": vocab,
    }


def _gpt2(*, layers: int, d_model: int, heads: int, vocab: int, seq_len: int) -> dict[str, Any]:
    shape = _llama(layers=layers, d_model=d_model, heads=heads, ffn=4 * d_model, vocab=vocab)
    return {**shape, "model.family": "gpt2", "model.max_positions": seq_len, "model.tie_embeddings": True}


def _batch(*, seq_len: int, rows: int, accum: int, dp: int = 1) -> dict[str, Any]:
    return {
        "data.seq_len": seq_len,
        "train.micro_batch_rows": rows,
        "train.global_batch_rows": rows * accum * dp,
    }


SMALL = _llama(layers=6, d_model=384, heads=6, ffn=1024, vocab=4096)
"""14 M weights."""
WIDE = _llama(layers=4, d_model=768, heads=12, ffn=2048, vocab=8192, kv=4)
"""38 M."""
DEEP = _llama(layers=12, d_model=256, heads=4, ffn=704, vocab=4096)
GPT = _gpt2(layers=6, d_model=512, heads=8, vocab=8192, seq_len=256)
"""23 M."""

CALIBRATION = (
    TinyRun(name="llama 14M", settings={**SMALL, **_batch(seq_len=256, rows=2, accum=2)}),
    TinyRun(
        name="gpt2 23M, dp 2, ZeRO-1",
        settings={**GPT, **_batch(seq_len=256, rows=2, accum=1, dp=2)},
        num_ranks=2,
    ),
)
RUNS = (
    TinyRun(name="llama 38M", settings={**WIDE, **_batch(seq_len=256, rows=1, accum=2)}),
    TinyRun(name="llama 11M deep, S 512", settings={**DEEP, **_batch(seq_len=512, rows=2, accum=1)}),
    TinyRun(
        name="llama 11M deep, recomputed",
        settings={**DEEP, **_batch(seq_len=512, rows=4, accum=1), "train.recompute_every": 1},
    ),
    TinyRun(name="gpt2 23M, 8 rows", settings={**GPT, **_batch(seq_len=256, rows=8, accum=1)}),
    TinyRun(
        name="llama 14M, dp 2, ZeRO-0",
        settings={**SMALL, **_batch(seq_len=256, rows=2, accum=2, dp=2), "parallel.zero_stage": 0},
        num_ranks=2,
    ),
    TinyRun(
        name="llama 38M, dp 2, ZeRO-1",
        settings={**WIDE, **_batch(seq_len=256, rows=1, accum=2, dp=2), "parallel.zero_stage": 1},
        num_ranks=2,
    ),
    TinyRun(
        name="llama 14M, dp 2, ZeRO-2",
        settings={**SMALL, **_batch(seq_len=512, rows=1, accum=2, dp=2), "parallel.zero_stage": 2},
        num_ranks=2,
    ),
    TinyRun(
        name="llama 38M, dp 2, ZeRO-3",
        settings={**WIDE, **_batch(seq_len=256, rows=2, accum=1, dp=2), "parallel.zero_stage": 3},
        num_ranks=2,
    ),
    TinyRun(
        name="llama 38M, tp 2",
        settings={**WIDE, **_batch(seq_len=256, rows=2, accum=2), "parallel.tp_size": 2},
        num_ranks=2,
    ),
    TinyRun(
        name="gpt2 23M, tp 2",
        settings={**GPT, **_batch(seq_len=256, rows=4, accum=1), "parallel.tp_size": 2},
        num_ranks=2,
    ),
    TinyRun(
        name="llama 14M, pp 2",
        settings={**SMALL, **_batch(seq_len=256, rows=2, accum=4), "parallel.pp_size": 2},
        num_ranks=2,
    ),
    TinyRun(
        name="llama 14M, cp 2",
        settings={**SMALL, **_batch(seq_len=1024, rows=1, accum=2), "parallel.cp_size": 2},
        num_ranks=2,
    ),
)


@dataclass
class Measured:
    """Of one run, over its rounds."""

    step_s: list[float] = field(default_factory=list)
    """Settled steps."""
    peak_bytes: list[int] = field(default_factory=list)
    """Of the fullest rank, a round."""
    rank_bytes: list[list[int]] = field(default_factory=list)
    """A round, each rank's."""
    cpu_s: list[float] = field(default_factory=list)
    """CPU seconds a settled step of the busiest rank, a round."""

    def seconds(self, clock: str) -> float:
        """Lower quartile of the wall's, or the least CPU seconds of a round."""
        return min(self.cpu_s) if clock == "cpu" else float(np.quantile(self.step_s, 0.25))

    @property
    def bytes(self) -> float:
        return float(np.median(self.peak_bytes))


def write_data(folder: Path, *, seq_lens: set[int], vocab_size: int, num_tokens: int, seed: int) -> Path:
    """Documents of random tokens, with packs of every row length, in both splits; returns `folder`."""
    random = np.random.default_rng(seed)
    shards, packs = [], []
    for split, count in (("train", num_tokens), ("held_out", num_tokens // 8)):
        path = f"shards/drawn/{split}-00000"
        writer = ShardWriter(folder / path, "uint16", vocab_size, eos_id=1)
        lengths: list[int] = []
        while sum(lengths) < count:
            length = int(random.integers(200, 2000))
            writer.add(np.append(random.integers(2, vocab_size, length), 1).astype(np.uint16))
            lengths.append(length + 1)
        result = writer.close()
        columns = {
            "id": [f"{split}-{at}" for at in range(len(lengths))],
            "source": ["drawn"] * len(lengths),
            "path": [""] * len(lengths),
            "record": list(range(1, len(lengths) + 1)),
        }
        pq.write_table(pa.table(columns), folder / f"{path}.docs.parquet")
        shards.append(ShardEntry(path=path, split=split, text_bytes=4 * result.num_tokens, **vars(result)))
        packs += [
            write_plan(folder, "", split, seq_len, Packing.concat, [np.array(lengths)])
            for seq_len in sorted(seq_lens)
        ]
    with files.atomic_write(folder / "tokenizer/drawn/tokenizer.model") as handle:
        handle.write(b"none: tokens were drawn")
    with files.atomic_write(folder / "held_out.jsonl.zst") as handle:
        handle.write(zstandard.compress(b""))
    write_manifest(
        folder,
        Manifest(
            format_version=FORMAT_VERSION,
            corpus="drawn",
            dtype="uint16",
            tokenizer=TokenizerEntry(
                path="tokenizer/drawn",
                kind="sentencepiece_bpe",
                vocab_size=vocab_size,
                fingerprint=files.hash_file(folder / "tokenizer/drawn/tokenizer.model"),
                eos_id=1,
                bos_id=None,
            ),
            shards=shards,
            packs=packs,
            funnel=[],
            config={},
            config_hash="",
            versions={},
            held_out_text="held_out.jsonl.zst",
            tool_version="bench",
        ),
    )
    return folder


def measure(run: TinyRun, *, data: Path, folder: Path, num_steps: int, into: Measured) -> None:
    """Start the ranks of `run`, and end them after `num_steps` settled steps.

    Raises:
        LLMTrainError: a rank ended by itself, or the time is over; with the end of what it wrote.
    """
    settings = {
        "run.name": "own",
        "run.folder": folder,
        "data.folder": data,
        "train.total_tokens": 10**7,  # never reached
        "data.max_epochs": 1000,
        "optimizer.peak_lr": 1e-4,
        "save.every_steps": 10**6,
        "save.in_background": False,
        "train.eval_rows": 1,
        "tracking.wandb": "off",
        **run.settings,
    }
    environment = os.environ | {
        "WORLD_SIZE": str(run.num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        PARENT_VARIABLE: str(os.getpid()),
    }
    command = [
        sys.executable,
        "-m",
        "llmtrain.cli.main",
        "train",
        *(f"{key}={value}" for key, value in settings.items()),
    ]
    folder.mkdir(parents=True)
    logs = [folder / f"rank{rank}.log" for rank in range(run.num_ranks)]
    processes = []
    try:
        for rank, log_path in enumerate(logs):
            with log_path.open("w") as handle:
                processes.append(
                    subprocess.Popen(
                        command,
                        env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=handle,
                        stderr=subprocess.STDOUT,
                    )
                )
        wait_for = partial(_wait_for_steps, folder, processes=processes, logs=logs, name=run.name)
        before = len(wait_for(SETTLING_STEPS))
        spent = [_cpu_s(process.pid) for process in processes]
        steps = wait_for(before + num_steps)
        spent = [_cpu_s(process.pid) - each for process, each in zip(processes, spent, strict=True)]
        into.cpu_s.append(max(spent) / (len(steps) - before))
        peaks = [_peak_bytes(process.pid) for process in processes]
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
    into.step_s += [float(step["step_s"]) for step in steps if step["step"] > SETTLING_STEPS]
    into.rank_bytes.append(peaks)
    into.peak_bytes.append(max(peaks))


def _wait_for_steps(
    folder: Path, num_steps: int, *, processes: list[subprocess.Popen[bytes]], logs: list[Path], name: str
) -> list[dict[str, Any]]:
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + RUN_TIMEOUT_S
    while True:
        steps = (
            [record for record in read_lines(metrics) if record["kind"] == "step"] if metrics.exists() else []
        )
        if len(steps) >= num_steps:
            return steps
        ended = [rank for rank, process in enumerate(processes) if process.poll() is not None]
        if ended or time.monotonic() > deadline:
            rank = ended[0] if ended else 0
            why = f"rank {rank} ended" if ended else f"not over after {RUN_TIMEOUT_S:g} s"
            raise LLMTrainError(f"{name}: {why}:\n{logs[rank].read_text(errors='replace')[-3000:]}")
        time.sleep(POLL_S)


def _cpu_s(pid: int) -> float:
    """User and system seconds that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _peak_bytes(pid: int) -> int:
    """Most resident memory that a process has had. VmHWM: ru_maxrss may know the parent's."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None, "Linux tells every live process's"
    return int(found[1]) * 1024


# -- from settings to what the planner takes, and the figures


def layout_of(run: TinyRun) -> Layout:
    def setting(name: str, default: int = 1) -> int:
        return int(run.settings.get(name, default))

    pp, cp, tp = (setting(f"parallel.{axis}_size") for axis in ("pp", "cp", "tp"))
    dp, rows = run.num_ranks // (pp * cp * tp), setting("train.micro_batch_rows")
    return Layout(
        seq_len=setting("data.seq_len"),
        pp=pp,
        dp=dp,
        cp=cp,
        tp=tp,
        zero_stage=setting("parallel.zero_stage"),
        micro_batch_rows=rows,
        grad_accum=setting("train.global_batch_rows") // (rows * dp),
        recompute="full" if setting("train.recompute_every", 0) else "none",
        precision="fp32",
    )


def observation_of(run: TinyRun, measured: Measured, cluster: Cluster, *, clock: str) -> Observation:
    shape = {
        name.removeprefix("model."): value
        for name, value in run.settings.items()
        if name.startswith("model.")
    }
    return Observation(
        name=run.name,
        arch=from_model_config(ModelConfig(**shape)),
        layout=layout_of(run),
        cluster=cluster,
        step_s=measured.seconds(clock),
        peak_bytes=measured.bytes,
        is_resident=True,
    )


def this_machine(num_ranks: int) -> Cluster:
    """As it is for each of so many ranks, a core each: a lone one has caches and memory to itself."""
    gpu = this_cpu(num_ranks, threads_per_rank=1)
    return Cluster(
        name=THIS_MACHINE,
        gpu=gpu,
        gpus_per_node=num_ranks,
        num_nodes=1,
        node_bytes_s=gpu.link_bytes_s,
        price_usd_per_gpu_hour=None,
        price_date=None,
        price_source="",
        goodput=1.0,
        source="measured here",
    )


def judged(measured: Mapping[str, Measured], clusters: Mapping[int, Cluster], *, clock: str) -> list[Row]:
    """The figures, and beside each run's measured seconds and bytes what was foretold.

    Args:
        clusters: by the number of ranks that share the machine.
    """

    def observed(runs: Iterable[TinyRun]) -> list[Observation]:
        return [
            observation_of(each, measured[each.name], clusters[each.num_ranks], clock=clock) for each in runs
        ]

    calibration = calibrate(observed(CALIBRATION)).calibration
    shipped = find_costs("llmtrain", gpu_name=THIS_MACHINE, precision="fp32").memory_program
    rows: list[Row] = []
    time_errors, memory_errors = [], []
    for each in observed(RUNS):
        told = predict(
            each.arch,
            each.layout,
            each.cluster,
            program="llmtrain",
            constants=calibration.calibrated(),
            memory_program=calibration.memory_program(shipped),
        )
        assert each.peak_bytes is not None, "every run's peak is read"
        knows_time = clock == "wall" or each.layout.pp == 1
        if knows_time:
            time_errors.append(abs(told.step_s.mid / each.step_s - 1))
        memory_errors.append(abs(told.peak_bytes.mid / each.peak_bytes - 1))
        rows += [
            Row(
                name=f"step, {each.name}; rival: predicted",
                value=each.step_s,
                rival=told.step_s.mid,
                unit="s",
            )
        ] * knows_time
        rows.append(
            Row(
                name=f"peak, {each.name}; rival: predicted",
                value=each.peak_bytes / 2**20,
                rival=told.peak_bytes.mid / 2**20,
                unit="MiB",
            )
        )
    figures = {
        "own_runs_step_time_mean_error": float(np.mean(time_errors)),
        "own_runs_step_time_max_error": max(time_errors),
        "own_runs_memory_mean_error": float(np.mean(memory_errors)),
        "own_runs_memory_max_error": max(memory_errors),
    }
    limits = {"own_runs_step_time_mean_error": PROMISED, "own_runs_memory_mean_error": PROMISED}
    return [
        *(
            Row(name=name, value=100 * value, unit="%", limit=limits.get(name))
            for name, value in figures.items()
        ),
        *rows,
    ]


def run(config: BenchConfig) -> list[Row]:
    """Options: clock, wall or cpu; rounds."""
    config.only_options("clock", "rounds")
    clock, num_rounds = config.option("clock", "wall"), config.option("rounds", NUM_ROUNDS)
    if clock not in CLOCKS:
        raise ConfigError(unknown_name("clock", clock, CLOCKS))
    clusters = {num_ranks: this_machine(num_ranks) for num_ranks in (1, 2)}
    measured = {each.name: Measured() for each in (*CALIBRATION, *RUNS)}
    with tempfile.TemporaryDirectory(prefix="llmtrain-bench-") as name:
        seq_lens = {int(each.settings["data.seq_len"]) for each in (*CALIBRATION, *RUNS)}
        data = write_data(
            Path(name) / "data", seq_lens=seq_lens, vocab_size=4096, num_tokens=400_000, seed=config.seed
        )
        for number in range(num_rounds):
            for at, each in enumerate((*CALIBRATION, *RUNS)):
                measure(
                    each,
                    data=data,
                    folder=Path(name) / f"run-{number}-{at}",
                    num_steps=config.scaled(STEPS_A_ROUND, least=2),
                    into=measured[each.name],
                )
    return judged(measured, clusters, clock=clock)
