"""Learning rates as pure functions of tokens seen."""

from __future__ import annotations

import math

from llmtrain.train.config import DecayShape, ScheduleConfig, ScheduleKind


def learning_rate(
    tokens_seen: int, *, step_tokens: int, total_tokens: int, peak: float, cfg: ScheduleConfig
) -> float:
    """The rate of the update that consumes tokens [tokens_seen, tokens_seen + step_tokens).

    Warm-up counts the step's own tokens, so the first update moves and the rate reaches `peak` with the
    step that completes `warmup_tokens`. Past `total_tokens` the rate stays at the floor.
    """
    floor = peak * cfg.floor_ratio
    if tokens_seen < cfg.warmup_tokens:
        return peak * min(1.0, (tokens_seen + step_tokens) / cfg.warmup_tokens)
    if cfg.kind is ScheduleKind.constant:
        return peak
    if cfg.kind is ScheduleKind.inverse_sqrt:
        return max(floor, peak * math.sqrt(cfg.warmup_tokens / tokens_seen))
    if cfg.kind is ScheduleKind.cosine:
        done = min(1.0, (tokens_seen - cfg.warmup_tokens) / max(1, total_tokens - cfg.warmup_tokens))
        return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
    assert cfg.decay_tokens is not None, "checked by ScheduleConfig"
    left = max(0, total_tokens - tokens_seen)
    if left >= cfg.decay_tokens:
        return peak
    done = 1.0 - left / cfg.decay_tokens
    way = math.sqrt(done) if cfg.decay_shape is DecayShape.sqrt else done
    return peak + (floor - peak) * way
