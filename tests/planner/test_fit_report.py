"""The printed fit and its JSON."""

import json

import numpy as np
import pytest

from llmtrain.errors import ConfigError
from llmtrain.planner.loss import laws
from llmtrain.planner.loss.envelope import Runs
from llmtrain.planner.loss.fit_report import (
    COLUMNS,
    Target,
    fit_json,
    fit_text,
    make_report,
    notes,
    parse_target,
)

TARGETS = [
    Target(num_params=6_887_575_552, num_tokens=4e12),
    Target(num_params=13_202_396_160, num_tokens=5e12),
]


def ladder():
    rows = laws.read_table("olmo_ladder.csv")
    rows = rows[rows[:, 3] == 1]
    names = tuple(f"{n / 1e6:.0f}M-{d / 1e9:.0f}B" for n, d in rows[:, :2])
    return Runs(names=names, num_params=rows[:, 0], num_tokens=rows[:, 1], loss=rows[:, 2])


def report_of(runs, **changes):
    asked = {
        "targets": TARGETS,
        "budgets": [],
        "drop_highest": 0,
        "huber_delta": None,
        "num_resamples": 20,
        "seed": 0,
    }
    return make_report(runs, **(asked | changes))


@pytest.fixture(scope="module")
def olmo():
    return report_of(ladder(), left_out=["runs/x: diverged"])


def test_olmos_ladder_is_printed_with_interval_and_extrapolation_factors(olmo):
    text = fit_text(olmo)
    line = next(line for line in text.splitlines() if line.startswith("  13.2B/5T"))
    assert line.split()[-3:] == ["10.3", "19.5", "202"], "N, D and FLOPs over the largest run's"
    low, high = map(float, line.split()[2].split(".."))
    assert low < 2.4376 < high
    assert "BACK-TEST" in text
    assert "without the 4 dearest runs, the fit of the other 12" in text
    assert max(map(len, text.splitlines())) <= COLUMNS


def test_everything_weak_is_said(olmo):
    found = "\n".join(notes(olmo))
    assert "left out: runs/x: diverged" in found
    assert "13.2B/5T is 202 times the largest run's FLOPs: nobody has shown how wide" in found
    assert "these runs do not settle them; trust the envelope" in found
    assert "an interval says what these runs leave open" in found


def test_dropped_runs_are_named_with_a_warning():
    found = report_of(ladder(), drop_highest=2)
    assert found.dropped == ["190M-4B", "190M-8B"]
    assert any("dropped, as asked, for the highest losses: 190M-4B, 190M-8B" in note for note in notes(found))


def test_budgets_default_to_ten_and_a_hundred_times_the_largest_run(olmo):
    largest = 6 * 1_279_395_840 * 255_895_535_616
    assert [row.flops for row in olmo.budgets] == pytest.approx([10 * largest, 100 * largest])
    given = report_of(ladder(), budgets=[1e22])
    assert [row.flops for row in given.budgets] == [1e22]
    row = given.budgets[0]
    assert row.num_params.low < row.num_params.mid < row.num_params.high
    assert row.band == laws.band(1e22)


def test_the_json_says_all_that_the_page_says(olmo):
    found = json.loads(json.dumps(fit_json(olmo), allow_nan=False))
    assert set(found["variants"]) == {"free", "tied", "prior_0.30", "prior_0.34"}
    assert set(found["variants"]["free"]["alpha"]) == {"low", "mid", "high"}
    assert len(found["runs"]) == 16
    assert found["back_test"]["num_kept"] == 12
    assert found["foretold"][1]["loss"]["low"] < 2.4376 < found["foretold"][1]["loss"]["high"]
    assert found["foretold"][1]["beyond"]["flops"] == pytest.approx(201.6, rel=1e-3)
    assert found["left_out"] == ["runs/x: diverged"]
    assert found["notes"] == notes(olmo)
    assert found["isoflop"] is None


def test_isoflop_runs_get_their_parabolas():
    table = laws.read_table("isoflop_runs.csv")
    rows = table[table[:, 0] == 0][:, 2:]
    names = tuple(map(str, range(len(rows))))
    runs = Runs(names=names, num_params=rows[:, 0], num_tokens=rows[:, 1], loss=rows[:, 2])
    found = report_of(runs, targets=[])
    text = fit_text(found)
    assert "ISOFLOP PARABOLAS" in text
    assert "N = const C^a: a = 0." in text
    assert "LOSS OF LARGER RUNS" not in text
    assert max(map(len, text.splitlines())) <= COLUMNS
    assert np.isfinite(found.isoflop.exponent.mid)


def test_a_target_is_parameters_and_tokens():
    assert parse_target("7B/4T") == Target(num_params=7e9, num_tokens=4e12)
    with pytest.raises(ConfigError, match="at=7B must be PARAMS/TOKENS, as in 7B/4T"):
        parse_target("7B")
    with pytest.raises(ConfigError, match="tokens of target=4TB: 'TB' belongs to a size in bytes"):
        parse_target("7B/4TB", name="target")


def test_runs_that_do_not_belong_together_are_asked_about(olmo):
    assert not any("belong together" in note for note in notes(olmo))
    runs = ladder()
    mixed = runs.loss * np.where(np.arange(16) % 2, 1.3, 1.0)
    other = Runs(names=runs.names, num_params=runs.num_params, num_tokens=runs.num_tokens, loss=mixed)
    assert any("look whether these runs belong together" in note for note in notes(report_of(other)))
