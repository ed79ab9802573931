"""`llmtrain bench`: topics are found by their files, rows go to a table and to a file."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import types

import pytest
from rich.console import Console

import llmtrain.bench
from llmtrain.bench.table import BenchConfig, Row, format_figure, run_topic, table_of, topics
from llmtrain.cli.bench import with_topic_named
from llmtrain.errors import ConfigError


@pytest.fixture
def topic(tmp_path, monkeypatch):
    """A topic of its own, in a folder beside the package's."""
    source = '"""How fast nothing is.\n\nMore."""\nfrom llmtrain.bench.table import Row\n'
    source += (
        'def run(config):\n    return [Row(name="nothing", value=2.0, unit="s", rival=4.0, limit=1.0)]\n'
    )
    (tmp_path / "nothing_at_all.py").write_text(source)
    (tmp_path / "_helper.py").write_text('"""Not a topic."""')
    monkeypatch.setattr(llmtrain.bench, "__path__", [*llmtrain.bench.__path__, str(tmp_path)])
    yield "nothing_at_all"
    sys.modules.pop("llmtrain.bench.nothing_at_all", None)


def test_topics_are_modules_with_the_first_line_of_their_docstring(topic):
    known = topics()
    assert known[topic] == "How fast nothing is."
    assert "tracking" in known
    assert "table" not in known
    assert "_helper" not in known
    assert all(purpose for purpose in known.values()), "a topic without a docstring explains nothing"


def test_listing_topics_imports_none_of_them():
    program = (
        "import sys; from llmtrain.bench.table import topics; topics(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_rows_are_written_with_exactly_the_agreed_keys(topic, tmp_path):
    out = tmp_path / "deep" / "rows.json"
    rows = run_topic(BenchConfig(topic=topic, out=str(out)))
    expected = {"name": "nothing", "value": 2.0, "unit": "s", "rival": 4.0, "ratio": 0.5, "limit": 1.0}
    assert json.loads(out.read_text()) == [expected] == [row.as_json() for row in rows]


def test_the_ratio_is_to_the_rival_else_to_the_limit_else_absent():
    assert Row(name="x", value=3.0, unit="s", rival=2.0, limit=1.0).ratio == 1.5
    assert Row(name="x", value=3.0, unit="s", limit=1.5).ratio == 2.0
    assert Row(name="x", value=3.0, unit="s").ratio is None
    assert Row(name="x", value=3.0, unit="s", limit=0.0).ratio is None


def test_an_unknown_topic_names_the_nearest(topic):
    with pytest.raises(ConfigError, match="unknown topic 'trackin'; did you mean 'tracking'"):
        run_topic(BenchConfig(topic="trackin"))


def test_a_bare_first_word_is_the_topic():
    assert with_topic_named(["data", "out=x"]) == ["topic=data", "out=x"]
    assert with_topic_named(["out=x", "data"]) == ["out=x", "data"]
    assert with_topic_named(["--help"]) == ["--help"]
    assert with_topic_named([]) == []


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_measures_nothing_is_refused(scale):
    with pytest.raises(ConfigError, match=r"scale=.* must be above 0"):
        BenchConfig(scale=scale)


def test_scaling_never_goes_under_the_least():
    assert BenchConfig(scale=0.01).scaled(1000) == 10
    assert BenchConfig(scale=0.01).scaled(10, least=3) == 3


def test_options_keep_their_type_and_unknown_ones_are_refused():
    config = BenchConfig(topic="data", options={"num_workers": 2, "share": 1})
    assert config.option("num_workers", 1) == 2
    assert isinstance(config.option("share", 0.5), float)
    assert config.option("other", "default") == "default"
    with pytest.raises(ConfigError, match=r"options.num_workers=2 must be of type str"):
        config.option("num_workers", "two")
    config.only_options("num_workers", "share")
    with pytest.raises(
        ConfigError, match=r"unknown option 'options.num_workers'; did you mean 'options.num_worker'"
    ):
        config.only_options("num_worker", "share")
    with pytest.raises(ConfigError, match=r"topic data takes no options, got options\.num_workers"):
        config.only_options()


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0"), (1234.5, "1,234"), (0.5, "0.5"), (1e-9, "1e-09"), (3.2e7, "3.2e+07")],
)
def test_figures_are_short(value, text):
    assert format_figure(value) == text


def test_the_table_shows_every_row():
    out = io.StringIO()
    rows = [Row(name=f"row {n}", value=n, unit="s") for n in range(3)]
    Console(file=out, width=100).print(table_of(rows, title="bench x"))
    assert "bench x" in out.getvalue()
    assert all(row.name in out.getvalue() for row in rows)


def run_command(*arguments):
    command = [sys.executable, "-m", "llmtrain.cli.main", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_alone_lists_topics():
    done = run_command()
    assert done.returncode == 0
    assert "tracking  " in done.stdout


def test_the_command_measures_and_writes(tmp_path):
    done = run_command("tracking", "scale=0.01", f"out={tmp_path / 'rows.json'}")
    assert done.returncode == 0, done.stderr
    names = [row["name"] for row in json.loads((tmp_path / "rows.json").read_text())]
    assert "metrics.jsonl, one line, median" in names
    assert "W&B offline, finish" in names
    assert "bench tracking" in done.stdout


def test_the_command_refuses_an_unknown_topic_with_status_2():
    done = run_command("trackng")
    assert done.returncode == 2
    assert "error: unknown topic 'trackng'; did you mean 'tracking'" in done.stderr
    assert isinstance(llmtrain.bench, types.ModuleType)
