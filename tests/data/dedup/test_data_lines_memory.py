"""Ten million lines with small tasks: memory does not grow with the corpus."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmtrain.data.dedup.line_text import LINE_DTYPE
from llmtrain.data.dedup.units import DOCUMENT

NUM_UNITS, LINES, DOCUMENTS = 10, 1_000_000, 50_000

PROGRAM = """
import sys
from pathlib import Path
from llmtrain.data.dedup.config import DedupConfig
from llmtrain.data.dedup.lines import line_duplicates
from llmtrain.data.dedup.units import DedupUnit
from llmtrain.data.engines.engine import Inline

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) >> 10

folder, documents = Path(sys.argv[1]), int(sys.argv[3])
units = [
    DedupUnit(n, n * documents, documents, folder / "documents.npy", lines=folder / f"lines-{n}.npy")
    for n in range(int(sys.argv[2]))
]
cfg = DedupConfig(partition_bytes=16 << 20)
before = peak()
result = line_duplicates(units, cfg, Inline(), folder / "out")
print(result.num_lines, result.num_removed, peak() - before)
"""


@pytest.mark.slow
def test_ten_million_lines_take_no_more_memory_than_the_settings_say(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    rows = np.zeros(DOCUMENTS, dtype=DOCUMENT)
    rows["alive"] = True
    rows["id_high"] = draw.integers(0, 2**63, DOCUMENTS)
    np.save(tmp_path / "documents.npy", rows)
    different = set()
    for number in range(NUM_UNITS):
        lines = np.zeros(LINES, dtype=LINE_DTYPE)
        texts = draw.integers(0, 6_000_000, LINES)
        different.update(np.unique(texts).tolist())
        lines["hash"] = texts.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        lines["row"] = np.sort(draw.integers(0, DOCUMENTS, LINES))
        lines["end"] = 60
        np.save(tmp_path / f"lines-{number}.npy", lines)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(NUM_UNITS), str(DOCUMENTS)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=250).stdout
    num_lines, num_removed, peak_mib = (int(part) for part in printed.split())
    assert num_lines == NUM_UNITS * LINES
    assert num_removed == num_lines - len(different)
    assert peak_mib < 16 + 90  # loading the kernels takes about 50, measured with tasks of 8 MiB
