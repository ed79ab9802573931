"""What docs/planner_laws.md says in figures agrees with the code."""

import re
from pathlib import Path

import pytest

from llmtrain.planner.loss import laws
from llmtrain.planner.loss.inference import over_training
from llmtrain.planner.loss.repetition import data_limited_optimum

TEXT = (Path(__file__).parents[2] / "docs" / "planner_laws.md").read_text(encoding="utf-8")
BESIROGLU = laws.find_law("besiroglu2024").form


def rows(heading):
    """Cells of the table whose heading begins so."""
    lines = TEXT.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading}"))
    for line in lines[at + 2 :]:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split("|")]


def test_every_law_has_a_row_that_says_whether_it_votes():
    said = {}
    for cells in rows("name | form"):
        names = re.findall(r"`([^`]+)`", cells[0])
        names = [names[0], *(names[0].rpartition("_")[0] + rest for rest in names[1:])]
        said |= dict.fromkeys(names, cells[4].startswith("yes"))
    assert said == {law.name: not law.is_superseded for law in laws.LAWS.values()}


@pytest.mark.parametrize("cells", list(rows("FLOPs | N, 80%")), ids=lambda cells: cells[0])
def test_the_bands_figures(cells):
    found = laws.band(float(cells[0]))
    assert re.findall(r"[\d.]+", cells[1]) == [
        f"{value / 1e9:.{1 if value < 1e10 else 0}f}"
        for value in (found.num_params.mid, found.num_params.low, found.num_params.high)
    ]
    ratios = found.tokens_per_param
    assert re.findall(r"\d+", cells[2]) == [f"{v:.0f}" for v in (ratios.mid, ratios.low, ratios.high)]
    refits, _ = laws.optimum_interval(float(cells[0]))
    low, high = map(float, re.findall(r"[\d.]+", cells[3]))
    assert (low, high) == pytest.approx((refits.low / 1e9, refits.high / 1e9), rel=0.02)


def test_the_over_training_tables_figures():
    found = over_training(BESIROGLU, flops=1e21)
    said = list(rows("tokens per parameter"))
    assert len(said) == len(found)
    for cells, row in zip(said, found, strict=True):
        ratio, size, training, inference, penalty = (float(re.search(r"-?[\d.]+", c).group()) for c in cells)
        assert ratio == row.tokens_per_param
        assert size == pytest.approx(row.num_params / 1e9, abs=0.006)
        assert training == pytest.approx(100 * row.extra_training, abs=0.6)
        assert inference == pytest.approx(100 * row.saved_inference, abs=0.6)
        assert penalty == pytest.approx(100 * row.penalty, abs=0.06)


def test_the_figures_of_limited_text():
    text = " ".join(TEXT.split())
    said = re.search(
        r"8\.3B and 2 epochs on 100B unique tokens \(\+0\.1% loss\), 6\.3B and 13 epochs on 20B \(\+1\.9%\), "
        r"5\.6B and 30 epochs on 10B \(\+4\.2%\)",
        text,
    )
    assert said is not None
    for unique, size, epochs, penalty in ((1e11, 8.3, 2, 0.1), (2e10, 6.3, 13, 1.9), (1e10, 5.6, 30, 4.2)):
        found = data_limited_optimum(BESIROGLU, flops=1e22, unique_tokens=unique)
        assert found.num_params / 1e9 == pytest.approx(size, abs=0.06)
        assert found.epochs == pytest.approx(epochs, abs=0.6)
        assert 100 * found.penalty == pytest.approx(penalty, abs=0.06)
