"""The heartbeat topic runs, and every figure that promises something is within its limit."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json
from llmtrain.bench import heartbeat
from llmtrain.bench.table import BenchConfig
print(json.dumps([row.as_json() for row in heartbeat.run(BenchConfig(topic="heartbeat", scale=0.1))]))
"""


@pytest.mark.slow
def test_the_topic_measures_marks_collectives_and_their_share() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout.splitlines()[-1])}
    for layout in ("ZeRO-1", "ZeRO-3"):
        assert rows[f"{layout}, 2 ranks: marks of a step"]["value"] == 8
        assert rows[f"{layout}, 2 ranks: collectives of a step"]["value"] >= 5
        assert 0 < rows[f"{layout}, 2 ranks: share of a step"]["ratio"] < 1
    assert rows["a mark"]["value"] > 0
