"""What being watched costs a step: marks, collectives that are heard, beats."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from llmtrain.bench.ranks import run_ranks
from llmtrain.bench.table import BenchConfig, Row

WORKER = Path(__file__).with_name("_heartbeat_rank.py")
MARK_LIMIT_US = 2.0
SHARE_LIMIT = 0.5
"""Percent of a step's time."""


def run(config: BenchConfig) -> list[Row]:
    """The share is what one call costs times the calls of a step, over the step's time: the difference of two
    step times would be lost in their noise."""
    config.only_options()
    with tempfile.TemporaryDirectory() as scratch:
        numbers = [str(config.scaled(20_000, least=200)), str(config.scaled(10, least=2))]
        told = run_ranks([sys.executable, str(WORKER), scratch, *numbers], num_ranks=2, timeout_s=3600)[0]
    rows = [
        Row(name="a mark", value=told["mark_us"], unit="us", limit=MARK_LIMIT_US),
        Row(name="a collective: to hear it", value=told["collective_us"], unit="us"),
        Row(
            name="a beat, once a second",
            value=max(step["beat_us"] for step in told["steps"].values()),
            unit="us",
        ),
    ]
    for layout, step in told["steps"].items():
        spent_us = step["marks"] * told["mark_us"] + step["collectives"] * told["collective_us"]
        spent_us += step["step_s"] * step["beat_us"]
        rows += [
            Row(name=f"{layout}, 2 ranks: marks of a step", value=step["marks"], unit="calls"),
            Row(name=f"{layout}, 2 ranks: collectives of a step", value=step["collectives"], unit="calls"),
            Row(name=f"{layout}, 2 ranks: a step", value=step["step_s"], unit="s"),
            Row(
                name=f"{layout}, 2 ranks: share of a step",
                value=1e-4 * spent_us / step["step_s"],
                unit="%",
                limit=SHARE_LIMIT,
            ),
        ]
    return rows
