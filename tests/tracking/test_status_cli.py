"""`llmtrain status`: the table, its order, its filter, and JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from llmtrain.cli.status import OutputFormat, StatusConfig, show
from llmtrain.errors import ConfigError, DataError
from llmtrain.tracking.metrics import MetricsFile
from llmtrain.tracking.run_list import State


def write_run(folder, *, what=None, **fields):
    now = time.time()
    with MetricsFile(folder / "metrics.jsonl", attempt=1) as metrics:
        metrics.write("event", 0, what="start", time=now - 101)
        for step in range(1, 51):
            metrics.write("step", step, loss=2.5, step_s=1.0, tokens_per_s=2048.0, time=now - 51 + step)
        if what:
            metrics.write("event", 50, what=what, **fields)


def shown(capsys, folder, **settings):
    show(StatusConfig(folder=str(folder), **settings))
    return capsys.readouterr().out


def test_a_line_holds_everything_about_a_run(tmp_path, capsys):
    write_run(tmp_path / "a")
    text = shown(capsys, tmp_path)
    head, _, row, summary = text.strip().split("\n")
    assert head.split() == [
        "run",
        "state",
        "step",
        "loss",
        "tokens/s",
        "left",
        "heard",
        "beat",
        "tries",
        "goodput",
        "note",
    ]
    assert row.split()[:6] == ["a", "running", "50", "2.500", "2.05k", "–"]
    assert row.split()[-2:] == ["1", "50%"]
    assert summary == "1 run: 1 running"


def test_the_reason_of_a_failure_is_the_note(tmp_path, capsys):
    write_run(tmp_path / "a", what="failed", error="DataError: " + "very " * 40 + "long")
    (row,) = [line for line in shown(capsys, tmp_path).split("\n") if line.startswith("a ")]
    assert row.rstrip().endswith("very long"), "a pipe gets whole lines"


def test_states_filter_the_lines_but_not_the_summary(tmp_path, capsys):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", what="finished")
    text = shown(capsys, tmp_path, states=[State.finished])
    assert "\nb " in text
    assert "\na " not in text
    assert "2 runs: 1 running, 1 finished" in text
    assert shown(capsys, tmp_path, states=[State.failed]) == "2 runs: 1 running, 1 finished\n"


def test_json_is_a_list_of_runs(tmp_path, capsys):
    write_run(tmp_path / "a", what="finished")
    (run,) = json.loads(shown(capsys, tmp_path, format=OutputFormat.json))
    assert (run["state"], run["step"], run["attempts"]) == ("finished", 50, 1)


def test_no_runs_is_said_with_what_makes_them(tmp_path, capsys):
    assert "no runs at or below" in shown(capsys, tmp_path)
    assert shown(capsys, tmp_path, format=OutputFormat.json) == "[]\n"


def test_names_cannot_steer_the_terminal(tmp_path, capsys):
    write_run(tmp_path / "a\x1b[31m[bold]x", what="failed", error="\x1b]0;title\x07")
    text = shown(capsys, tmp_path)
    assert "a?[31m[bold]x" in text
    assert "\x1b" not in text
    assert "\x07" not in text


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        show(StatusConfig(folder=str(tmp_path / "none")))


def test_a_limit_of_no_time_is_refused():
    with pytest.raises(ConfigError, match=r"silent_after_s=0 must be above 0 seconds"):
        StatusConfig(silent_after_s=0)


def test_the_verb_takes_its_settings_from_the_command_line(tmp_path):
    write_run(tmp_path / "a", what="finished")
    program = "from llmtrain.cli.status import main; main()"
    command = [sys.executable, "-c", program, f"folder={tmp_path}", "states=[finished]", "format=json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path)
    assert [run["state"] for run in json.loads(done.stdout)] == ["finished"]
    command[-2] = "states=[ended]"
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "states[0]: Invalid value 'ended', expected one of [running, waiting" in done.stderr
