"""The dashboard as code: the JSON that W&B is sent, one view a project, and only names that are logged."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from wandb_stub import ENTITY, WandbStub
from wandb_table import unit_of

from llmtrain.errors import LLMTrainError
from llmtrain.tracking import dashboard
from llmtrain.tracking.dashboard import SECTIONS, Chart, save, spec_of, view_name, workspace_of

pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style")  # wandb-workspaces' own
GOLDEN = Path(__file__).parent / "golden/dashboard.json"
CHARTS = [item for items in SECTIONS.values() for item in items if isinstance(item, Chart)]


@pytest.fixture
def server(monkeypatch):
    with WandbStub() as stub:
        for name, value in stub.environment.items():
            monkeypatch.setenv(name, value)
        yield stub


def without_ids(value):
    """Without what is drawn anew at each call."""
    if isinstance(value, dict):
        return {key: without_ids(inner) for key, inner in value.items() if key not in ("__id__", "id")}
    return [without_ids(inner) for inner in value] if isinstance(value, list) else value


def llmtrain(*arguments, **environment):
    command = [sys.executable, "-m", "llmtrain.cli.main", "dashboard", *arguments]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=120
    )


def test_what_is_sent_is_the_golden_file_and_what_dry_run_prints(server):
    done = llmtrain("project=p", f"entity={ENTITY}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"created {server.url}/{ENTITY}/p?nw={view_name(ENTITY, 'p')}\n"
    (sent,) = server.views
    assert (sent["projectName"], sent["entityName"], sent["type"]) == ("p", ENTITY, "project-view")
    assert sent["displayName"] == "llmtrain"
    assert without_ids(json.loads(sent["spec"])) == json.loads(GOLDEN.read_text())
    printed = llmtrain("project=p", "dry_run=true", WANDB_API_KEY="")
    assert printed.returncode == 0, printed.stderr
    assert without_ids(json.loads(printed.stdout)) == json.loads(GOLDEN.read_text())
    assert server.unknown == []


def test_a_second_time_the_same_view_is_updated_and_a_project_has_its_own(server):
    first, again = save(entity=ENTITY, project="p"), save(entity=None, project="p")
    other = save(entity=ENTITY, project="q")
    assert (first.is_new, again.is_new, other.is_new) == (True, False, True)
    assert first.url == again.url != other.url
    assert len(server.views) == 3
    assert sorted(view["projectName"] for view in server.saved.values()) == ["p", "q"]


def test_a_view_that_people_changed_is_put_back(server):
    save(entity=ENTITY, project="p")
    (view,) = server.saved.values()
    spec = json.loads(view["spec"])
    spec["section"]["panelBankConfig"]["sections"] = []
    view["spec"] = json.dumps(spec)
    assert not save(entity=ENTITY, project="p").is_new
    (view,) = server.saved.values()
    assert without_ids(json.loads(view["spec"])) == json.loads(GOLDEN.read_text())


def test_a_project_that_is_not_there_is_named(server, monkeypatch):
    monkeypatch.setattr(type(server), "_View", lambda self, asked: {"project": None})
    with pytest.raises(LLMTrainError, match=f"W&B has no project {ENTITY}/p; its first run makes it"):
        save(entity=ENTITY, project="p")


def test_a_refused_key_is_one_line(server):
    server.fail = 401
    done = llmtrain("project=p", f"entity={ENTITY}")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: W&B did not take the dashboard of p: ")


def test_without_a_key_nobody_is_asked(server, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(LLMTrainError, match="WANDB_API_KEY is not set"):
        save(entity=ENTITY, project="p")
    assert server.operations == []


def test_an_empty_project_is_refused():
    done = llmtrain("project=''")
    assert done.returncode == 2
    assert "project is empty" in done.stderr


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.title)
def test_a_chart_shows_what_is_logged_and_says_its_unit(chart):
    units = {unit_of(name) for name in chart.names}
    assert len(units) == 1, f"one axis, one unit: {units}"
    (unit,) = units
    assert unit == "–" or f"({unit})" in chart.title
    assert unit_of(chart.x)


def test_titles_are_each_there_once():
    titles = [chart.title for chart in CHARTS]
    assert len(set(titles)) == len(titles)


def test_mfu_names_the_convention_of_training():
    source = (Path(dashboard.__file__).parents[1] / "train/loop.py").read_text()
    (convention,) = re.findall(r'^MFU_CONVENTION = "(\w+)"', source, re.MULTILINE)
    (chart,) = [chart for chart in CHARTS if chart.names == ("train/mfu",)]
    assert f"MFU, {convention}:" in chart.title


def test_the_spec_is_the_same_for_any_entity():
    assert without_ids(spec_of(workspace_of("a", "p"))) == without_ids(spec_of(workspace_of("b", "q")))
