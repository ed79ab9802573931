"""Stages of deduplication that are stopped and run again, and files between them that are cut or lost."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.data.dedup.config import NgramConfig
from llmtrain.data.dedup.exact import exact_duplicates
from llmtrain.data.dedup.line_text import LINE_DTYPE
from llmtrain.data.dedup.lines import line_duplicates
from llmtrain.data.dedup.ngrams import NgramWriter, ngram_hashes, ngram_overlap
from llmtrain.data.dedup.standing import standings
from llmtrain.data.engines.engine import Inline

CUTS = (10, 30)
STAGES: dict[str, Callable[..., Any]] = {
    "standing": standings,
    "exact": exact_duplicates,
    "lines": line_duplicates,
    "ngrams": ngram_overlap,
}


class Stopping(Inline):
    """Ends with KeyboardInterrupt before the next of so many tasks."""

    def __init__(self, num_tasks: int) -> None:
        self.num_left = num_tasks

    def map(self, function: Any, units: Any) -> Any:
        for unit in units:
            if self.num_left == 0:
                raise KeyboardInterrupt
            self.num_left -= 1
            yield function(unit)


@pytest.fixture
def units(tmp_path: Path, made_up_documents: Any, cut_units: Any) -> Any:
    draw = np.random.default_rng(2)
    line_paths, ngram_paths = [], []
    for number, (start, end) in enumerate(itertools.pairwise([0, *CUTS, 50])):
        lines = np.zeros(6 * (end - start), dtype=LINE_DTYPE)
        lines["hash"] = draw.integers(0, 60, len(lines)).astype(np.uint64) << np.uint64(58)
        lines["row"] = np.repeat(np.arange(end - start), 6)
        lines["start"] = np.tile(np.arange(6) * 10, end - start)
        lines["end"] = lines["start"] + 9
        line_paths.append(tmp_path / f"lines-{number}.npy")
        np.save(line_paths[-1], lines)
        words = draw.integers(1, 5, 12 * (end - start)).astype(np.uint64)
        ngram_paths.append(tmp_path / f"ngrams-{number}.npy")
        with NgramWriter(ngram_paths[-1]) as writer:
            offsets = np.arange(0, len(words) + 1, 12)
            writer.append(*ngram_hashes(words, words > 0, offsets, NgramConfig(num_words=3)))
    return cut_units(tmp_path, made_up_documents(50, 2), list(CUTS), lines=line_paths, ngrams=ngram_paths)


def outputs(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.npy"))}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_was_stopped_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, units: Any, small_tasks: Any, stage: str
) -> None:
    run = STAGES[stage]
    cfg = small_tasks(2048)
    run(units, cfg, Inline(), tmp_path / "whole")
    num_stops = 0
    for num_tasks in range(4, 1000, 7):
        try:
            run(units, cfg, Stopping(num_tasks), tmp_path / "stopped")
        except KeyboardInterrupt:
            num_stops += 1
            # Between two runs a file of the stage is lost, and another is cut.
            files = sorted((tmp_path / "stopped").rglob("work-*/*.bin"))
            if num_stops in (2, 4) and files:
                files[0].unlink()
                files[-1].write_bytes(files[-1].read_bytes()[:-9])
        else:
            break
    assert num_stops > 0
    assert outputs(tmp_path / "stopped") == outputs(tmp_path / "whole")
    assert outputs(tmp_path / "whole")
    assert not list(tmp_path.rglob("work-*"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_may_go_on_with_other_partitions(
    tmp_path: Path, units: Any, small_tasks: Any, stage: str
) -> None:
    run = STAGES[stage]
    run(units, small_tasks(1 << 30), Inline(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(units, small_tasks(2048), Stopping(9), tmp_path / "stopped")
    run(units, small_tasks(4096), Inline(), tmp_path / "stopped")
    assert outputs(tmp_path / "stopped") == outputs(tmp_path / "whole")
    assert not list(tmp_path.rglob("work-*"))
