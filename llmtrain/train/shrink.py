"""A config made small enough for a login node, with everything kept that decides how ranks share the work.
Arithmetic on configs: no torch.

Kept: family, engine, ZeRO stage, axes of the grid, sequence parallelism and the kind of context parallelism,
tied or not, query heads above key/value heads, key/value heads below tensor-parallel ranks, the pipeline's
schedule and uneven stages, several micro batches where there were several, a batch ramp, activation
checkpointing, the kind of optimizer, DeepSpeed's extra keys. What cannot be kept is named.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

from llmtrain.errors import ConfigError
from llmtrain.model.config import ModelConfig
from llmtrain.parallel.compatibility import problems
from llmtrain.parallel.config import ContextKind, ParallelConfig
from llmtrain.train.certificate import deciding, differences
from llmtrain.train.check import layout_of
from llmtrain.train.config import Precision, RampConfig, TrainConfig, TrainRoot

SEQ_LEN = 24
"""Tokens a row, or the next length that can be cut."""
VOCAB_SIZE, FFN_WIDTH = 48, 40
"""Or the next multiples of tp_size."""
HEAD_WIDTH = 8
ROWS_AT_ONCE = 2
MICRO_BATCHES = 3
"""A rank's of a step, or as many as the pipeline's schedule wants if that is more."""
GRAD_CLIP = 0.1
"""Below the norm of the first gradients, so that clipping is at work."""
ADAMW_EPS = 1e-4
"""As large as small gradients are: near 0 an update is then smooth in the gradient, and rounding shows as
rounding. With 1e-8 the sign of a rounding error would decide."""


@dataclass(frozen=True)
class Shrunk:
    cfg: TrainRoot
    num_ranks: int
    changes: dict[str, tuple[Any, Any]]
    """Dotted setting -> (as given, as run)."""
    not_covered: list[str]
    """What the small run does not do and the real one does, a sentence each."""


def shrink(cfg: TrainRoot, *, num_ranks: int) -> Shrunk:
    """The small config of `cfg`, which is legal on `num_ranks` ranks, for at most verify.max_ranks."""
    parallel = cfg.parallel
    given = {
        "pp_size": parallel.pp_size,
        "dp_size": num_ranks // (parallel.pp_size * parallel.cp_size * parallel.tp_size),
        "cp_size": parallel.cp_size,
        "tp_size": parallel.tp_size,
    }
    sizes = reduced_sizes(given, most=cfg.verify.max_ranks)
    dp_size = sizes.pop("dp_size")
    small_parallel = replace(
        parallel,
        pp_size=sizes["pp_size"],
        cp_size=sizes["cp_size"],
        tp_size=sizes["tp_size"],
        world_size=None,
    )
    seq_len = _seq_len(cfg.data.seq_len, small_parallel)
    model = _model(cfg, small_parallel, seq_len)
    small = replace(
        cfg,
        model=model,
        parallel=small_parallel,
        data=replace(cfg.data, seq_len=seq_len),
        train=_train(cfg, small_parallel, seq_len, given["dp_size"], dp_size),
        optimizer=replace(cfg.optimizer, eps=ADAMW_EPS),
    )
    ranks = dp_size * math.prod(sizes.values())
    wrong = problems(replace(layout_of(small, device="cpu"), dp_size=dp_size))
    assert not wrong, f"shrunk to what is not legal: {wrong}"
    changes = differences(deciding(cfg, num_ranks), deciding(small, ranks))
    return Shrunk(small, ranks, changes, _not_covered(cfg, given, {**sizes, "dp_size": dp_size}))


def reduced_sizes(sizes: dict[str, int], *, most: int) -> dict[str, int]:
    """Sizes of the axes whose product is at most `most`.

    First dp goes down, to 2 if it was more than 1; then the largest other axis is halved, tp before cp
    before pp, while it is above 2; then dp goes to 1; and last axes go from 2 to 1, cp first.

    Raises:
        ConfigError: `most` is below 1.
    """
    if most < 1:
        raise ConfigError(f"verify.max_ranks={most} must be at least 1")
    found = dict(sizes)
    wanted_dp = min(2, sizes["dp_size"])

    def others() -> int:
        return found["pp_size"] * found["cp_size"] * found["tp_size"]

    while others() * wanted_dp > most:
        largest = max(("tp_size", "cp_size", "pp_size"), key=lambda name: found[name])
        if found[largest] > 2:
            found[largest] = max(2, found[largest] // 2)
        elif wanted_dp > 1:
            wanted_dp = 1
        else:
            found[next(name for name in ("cp_size", "pp_size", "tp_size") if found[name] > 1)] = 1
    found["dp_size"] = min(sizes["dp_size"], most // others())
    return found


def _not_covered(cfg: TrainRoot, given: dict[str, int], run: dict[str, int]) -> list[str]:
    found = ["kernels and collectives of GPUs: the check runs in fp32 on CPUs, over gloo"]
    for name, size in given.items():
        if run[name] == 1 < size:
            found.append(f"{name}={size}: no rank of the check shares work along this axis")
        elif run[name] != size and name != "dp_size":
            found.append(f"{name}={size}: the check has {run[name]}")
    if cfg.train.precision is not Precision.fp32:
        found.append(f"train.precision={cfg.train.precision.name}: the check is in fp32")
    if cfg.train.compile_blocks:
        found.append("train.compile_blocks=true: the check compiles nothing")
    if cfg.train.grad_clip == 0:
        found.append("clipping: train.grad_clip=0 switches it off")
    return found


def _seq_len(given: int, parallel: ParallelConfig) -> int:
    cp, tp = parallel.cp_size, parallel.tp_size
    pieces = 2 * cp if cp > 1 and parallel.context is ContextKind.sequence else cp
    unit = math.lcm(pieces, cp * tp if parallel.sequence_parallel else 1)
    return -(-min(given, SEQ_LEN) // unit) * unit


def _model(cfg: TrainRoot, parallel: ParallelConfig, seq_len: int) -> ModelConfig:
    model, tp, pp = cfg.model, parallel.tp_size, parallel.pp_size
    given_stages = cfg.parallel.pp_size * parallel.pp_schedule.stages_per_rank
    num_heads, num_kv_heads = _heads(model, cfg.parallel, parallel)
    is_square = model.d_model == model.num_heads * model.width_per_head
    d_model = num_heads * HEAD_WIDTH + (0 if is_square else HEAD_WIDTH)
    num_layers = min(model.num_layers, max(2, 2 * pp + int(model.num_layers % given_stages > 0)))
    positions = model.max_positions
    if positions is not None:
        positions = seq_len + (4 if positions > cfg.data.seq_len else 0)
    return replace(
        model,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        d_model=d_model,
        head_width=None if is_square else HEAD_WIDTH,
        ffn_width=-(-FFN_WIDTH // tp) * tp,
        vocab_size=-(-VOCAB_SIZE // tp) * tp,
        max_positions=positions,
        init_std=d_model**-0.5,  # attention is far from even, and every weight has a gradient
    )


def _heads(model: ModelConfig, given: ParallelConfig, parallel: ParallelConfig) -> tuple[int, int]:
    """Few query and key/value heads that stand to each other and to the ranks as the model's do."""

    def relations(heads: int, kv_heads: int, config: ParallelConfig) -> tuple[bool, ...]:
        own, own_kv = heads // config.tp_size, max(1, kv_heads // config.tp_size)
        is_exchanged = config.cp_size > 1 and config.context is ContextKind.heads
        served = own // own_kv
        repeats = served // math.gcd(served, max(1, own // config.cp_size)) if is_exchanged else 1
        return (kv_heads < config.tp_size, kv_heads < heads, repeats > 1, kv_heads == 1, own_kv == 1)

    def is_legal(heads: int, kv_heads: int) -> bool:
        tp, cp = parallel.tp_size, parallel.cp_size
        by_tp = heads % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0)
        return by_tp and (parallel.context is not ContextKind.heads or heads // tp % cp == 0)

    wanted = relations(model.num_heads, model.num_kv_heads, given)
    most = 2 * parallel.tp_size * parallel.cp_size
    legal = [
        (served * kv_heads, kv_heads)
        for kv_heads, served in itertools.product(range(1, most + 1), range(1, most + 1))
        if is_legal(served * kv_heads, kv_heads)
    ]

    def distance(heads: tuple[int, int]) -> tuple[object, ...]:
        misses = [a != b for a, b in zip(relations(*heads, parallel), wanted, strict=True)]
        return misses, heads

    return min(legal, key=distance)


def _train(
    cfg: TrainRoot, parallel: ParallelConfig, seq_len: int, given_dp: int, dp_size: int
) -> TrainConfig:
    train = cfg.train
    at_once = min(train.micro_batch_rows, ROWS_AT_ONCE)
    num_stages = parallel.pp_size * parallel.pp_schedule.stages_per_rank
    # one more than dual_pipe_v wants: room for a ramp
    most = max(MICRO_BATCHES, num_stages + int(num_stages > parallel.pp_size))
    first_rows = train.batch_ramp[0].rows if train.batch_ramp else train.global_batch_rows
    first = first_rows // (train.micro_batch_rows * given_dp)
    last = train.global_batch_rows // (train.micro_batch_rows * given_dp)
    small_last, small_first = min(last, most), min(first, most)
    if first < last and small_first == small_last:
        small_first -= 1
    if first > last and small_first == small_last:
        small_last -= 1
    row_tokens = at_once * dp_size * seq_len
    ramp = [RampConfig(until_tokens=small_first * row_tokens, rows=small_first * at_once * dp_size)]
    return replace(
        train,
        total_tokens=cfg.verify.num_steps * small_last * row_tokens,
        global_batch_rows=small_last * at_once * dp_size,
        micro_batch_rows=at_once,
        batch_ramp=ramp if small_first != small_last else [],
        precision=Precision.fp32,
        recompute_every=min(train.recompute_every, 2),
        compile_blocks=False,
        grad_clip=min(train.grad_clip, GRAD_CLIP),
    )
