"""What docs/planner.md shows is what comes out: its commands, tables and figures against the code."""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from llmtrain.planner.cost.calibration import STUDIES, accuracy, coverage
from llmtrain.planner.cost.cluster import find_cluster
from llmtrain.planner.cost.memory_rows import accuracy as memory_accuracy
from llmtrain.planner.cost.memory_rows import read_rows, without_pipeline
from llmtrain.planner.cost.programs import PROGRAMS
from llmtrain.planner.cost.step_time import Constants

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = (REPOSITORY / "docs" / "planner.md").read_text(encoding="utf-8")
BINARIES = Path(sys.executable).parent
CONSTANTS = {
    "`gemm`": ("gemm_efficiency", 1.0),
    "`attention`": ("attention_efficiency", 1.0),
    "`expert`": ("expert_efficiency", 1.0),
    "`memory`": ("memory_efficiency", 1.0),
    "`launch` ms": ("launch_s", 1e3),
    "`contention`": ("contention", 1.0),
    "`slowdown`": ("slowdown", 1.0),
    "`fixed` ms": ("fixed_s", 1e3),
}
"""Column of the page's table -> field of Constants, and its unit."""
NOT_FROM_TABLES = {"besiroglu_worst_coefficient"}
"""Figures of `llmtrain bench planner` that tests/planner/test_laws.py holds."""


def section(heading: str) -> str:
    """From a heading to the next of its level."""
    level = heading.split(" ")[0]
    after = PAGE.split(f"\n{heading}\n")
    assert len(after) == 2, f"docs/planner.md has no heading {heading!r}"
    return re.split(rf"\n{level} ", after[1])[0]


def rows(heading: str) -> Iterator[list[str]]:
    """Cells of the table whose heading begins so, that heading first."""
    lines = PAGE.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading}"))
    for number, line in enumerate(lines[at:]):
        if not line.startswith("|"):
            return
        if number != 1:
            yield [cell.strip() for cell in line.strip("|").split("|")]


def run(command: str, folder: Path) -> tuple[int, str]:
    environment = os.environ | {"PATH": f"{BINARIES}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "150"}
    done = subprocess.run(
        shlex.split(command),
        cwd=folder,
        env=environment | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def assert_shown_in(shown: list[str], printed: str) -> None:
    """Every line that the page shows was printed, in its order; "..." stands for any others."""
    lines, at = [line.rstrip() for line in printed.splitlines()], 0
    for line in shown:
        if line == "...":
            continue
        assert line in lines[at:], f"docs/planner.md shows {line!r}, which is not printed there"
        at = lines.index(line, at) + 1


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The worked plan: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("planned")
    command = re.search(r"^\$ (llmtrain plan budget\.gpu_hours=.*)$", PAGE, re.MULTILINE)
    assert command is not None
    code, printed = run(command[1], folder)
    assert code == 0, printed
    return folder, printed


def test_the_worked_plan_prints_what_the_page_shows(planned: tuple[Path, str]) -> None:
    text = section("## A worked plan").split("### To a running job")[0]
    blocks = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    shown = [line for block in blocks for line in block.splitlines() if not line.startswith("$ ")]
    assert len(shown) > 50, "the page shows more than this"
    assert_shown_in(shown, planned[1])


def test_train_takes_the_experiment_of_the_worked_plan(planned: tuple[Path, str]) -> None:
    folder, _ = planned
    experiment = yaml.safe_load((folder / "plans/experiment/first.yaml").read_text())
    shown = re.search(r"^\$ (llmtrain train --config-dir plans \+experiment=first .*)$", PAGE, re.MULTILINE)
    assert shown is not None
    code, printed = run(f"{shown[1]} --cfg job", folder)
    assert code == 0, printed
    composed = yaml.safe_load(printed)
    assert composed["train"]["global_batch_rows"] == experiment["train"]["global_batch_rows"]
    assert composed["parallel"]["zero_stage"] == 3  # what the page's command changes


@pytest.mark.parametrize("cells", list(rows("typed after `llmtrain plan`"))[1:], ids=lambda cells: cells[0])
def test_what_is_refused_is_refused_in_these_words(cells: list[str], tmp_path: Path) -> None:
    typed, words = (cell.strip("`") for cell in cells)
    code, printed = run(f"llmtrain plan {typed}", tmp_path)
    assert code != 0
    assert words in printed


def test_every_plan_command_of_the_page_plans(tmp_path: Path) -> None:
    commands = re.findall(r"^    (llmtrain plan .*)$", PAGE, re.MULTILINE)
    assert len(commands) >= 7
    for command in commands:
        code, printed = run(command, tmp_path)
        assert code == 0, f"$ {command}\n{printed}"


def test_the_python_example_prints_what_the_page_shows(tmp_path: Path) -> None:
    text = section("## From Python")
    program = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    shown = re.search(r"```text\n(.*?)```", text, re.DOTALL)
    assert program is not None
    assert shown is not None
    (tmp_path / "example.py").write_text(program[1])
    code, printed = run(f"{sys.executable} example.py", tmp_path)
    assert code == 0, printed
    assert printed == shown[1]


def test_the_table_of_constants_is_that_of_the_programs() -> None:
    heading, *said = rows("program | GPUs")
    free = {(study.program, study.generation): study.free for study in STUDIES}
    found = {(cells[0].strip("`"), cells[1]): dict(zip(heading, cells, strict=True)) for cells in said}
    shipped = {(p.name, generation) for p in PROGRAMS.values() for generation in p.calibrated}
    assert set(found) == shipped
    for (name, generation), cells in found.items():
        calibrated = PROGRAMS[name].calibrated[generation]
        assert int(cells["rows"]) == calibrated.num_rows
        for column, (field, unit) in CONSTANTS.items():
            cell = cells[column].strip("*")
            value = getattr(calibrated.constants, field) * unit
            assert cell == f"{value:.{len(cell.partition('.')[2])}f}", f"{name} on {generation}: {field}"
            is_fitted = field in free.get((name, generation), ())
            assert cells[column].startswith("**") == is_fitted, f"{name} on {generation}: {field}"
        ends = [int(end) for end in re.findall(r"[+-]\d+", cells["80% elsewhere"].replace("−", "-"))]
        assert ends == [round(100 * math.expm1(end)) for end in (calibrated.log_low, calibrated.log_high)], (
            f"{name} on {generation}"
        )


def test_constants_that_the_table_leaves_out_are_as_the_text_says() -> None:
    for program in PROGRAMS.values():
        for generation, calibrated in program.calibrated.items():
            constants = calibrated.constants
            assert constants.node_efficiency == 0.8, f"{program.name} on {generation}"
            assert constants.link_efficiency == Constants().link_efficiency == 0.71
            assert constants.call_s == 41e-6


def test_numbers_of_rows_are_those_of_the_tables() -> None:
    golden = read_rows("golden")
    num_alone = len(without_pipeline(golden))
    for sentence in (
        f"{len(golden)} golden runs of Megatron-LM's own tests that have no pipeline ({num_alone})",
        f"{len(read_rows('simumax'))} runs of SimuMax",
        f"or to {len(read_rows('torchtitan'))} of torchtitan",
        f"({len(read_rows('llmtrain'))} ranks)",
        f"| {num_alone} of Megatron-LM's golden runs, without a pipeline |",
        f"| {len(golden) - num_alone}, with one |",
    ):
        assert sentence in " ".join(PAGE.split())


def test_the_two_kinds_of_node_with_a_price_are_named() -> None:
    names = [path.stem for path in (REPOSITORY / "conf" / "cluster").glob("*.yaml")]
    names = [name for name in names if name not in ("this_machine", "custom")]
    priced = {name for name in names if find_cluster(name).price_usd_per_gpu_hour is not None}
    sentence = re.search(r"for two kinds of node only \(([^)]*)\)", PAGE)
    assert sentence is not None
    assert set(re.findall(r"`([^`]+)`", sentence[1])) == priced


@pytest.mark.slow
def test_the_accuracy_table_is_what_the_tables_give() -> None:
    found = {**accuracy(), **memory_accuracy()}
    said = {cells[0].strip("`"): cells[1] for cells in list(rows("figure | value"))[1:]}
    assert set(found) == set(said) - NOT_FROM_TABLES
    for name, cell in said.items():
        if name in NOT_FROM_TABLES:
            continue
        scale = 100 if cell.endswith("%") else 1
        number = cell.rstrip("%")
        last_digit = 10 ** -len(number.partition(".")[2])
        # one unit of the last digit: a fit ends a little elsewhere on another processor
        assert float(number) == pytest.approx(scale * found[name], abs=1.01 * last_digit), name


@pytest.mark.slow
def test_coverage_by_family_is_as_the_caveats_say() -> None:
    covered = {
        (study.program, study.generation): coverage(study.read(), study.prior, study.free)
        for study in STUDIES
    }
    caveat = " ".join(section("## Accuracy").split())
    assert f"775 of {sum(map(len, covered.values()))} rows" in caveat
    assert f"({covered['megatron_deepspeed', 'ampere'].mean():.1%} of them inside)" in caveat
    assert f"{covered['llm_foundry', 'hopper'].mean():.0%} of llm-foundry's on H100" in caveat
    small = [("torchtitan", "hopper"), ("megatron", "hopper"), ("megatron", "blackwell")]
    told = [f"{covered[key].sum()} of {len(covered[key])}" for key in small]
    assert f"{told[0]}, {told[1]} and {told[2]} of the small ones" in caveat
