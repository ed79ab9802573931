from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
GIB = 1 << 30


def figures(folder: Path, num_documents: int, partition_bytes: int) -> dict[str, Any]:
    """Run the stage in a process of its own; delete what it wrote."""
    folder.mkdir()
    done = subprocess.run(
        [
            sys.executable,
            str(TESTS / "near_memory.py"),
            str(folder),
            str(num_documents),
            str(partition_bytes),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parents[1])])},
        capture_output=True,
        text=True,
        check=False,
    )
    shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    small, large = (figures(tmp_path / "run", num, 8 << 20) for num in (60_000, 240_000))
    assert large["num_documents"] == 4 * small["num_documents"]
    assert large["num_duplicates"] > 3.9 * small["num_duplicates"]
    # 24 MiB: nodes of clusters take about 30 bytes each, as documented, and allocators do not give all back.
    assert large["peak"] < small["peak"] + (24 << 20)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_20_million_signatures_take_less_than_1_5_gib(tmp_path: Path) -> None:
    """All 14 bands, from band keys to clusters, in one process, with 512 MiB for a task."""
    if shutil.disk_usage(tmp_path).free < 16 * GIB:
        pytest.skip("20 million signatures and their bands need 16 GiB of disk for temporary files")
    found = figures(tmp_path / "run", 20_000_000, 512 << 20)
    assert found["num_documents"] == 20_000_000
    assert found["num_duplicates"] > 6_000_000
    assert found["num_boilerplate_keys"] == 1
    assert found["peak"] < 1.5 * GIB
