"""The real W&B client: its files read back, what it sends to a server in memory, and servers that fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_folder import wait_for
from wandb_file import records_of
from wandb_stub import WandbStub

from llmtrain.tracking.config import TrackingConfig, WandbMode
from llmtrain.tracking.metrics import read_lines
from llmtrain.tracking.recorder import RunRecorder
from llmtrain.tracking.wandb import node_sink, wandb_id

WANDB = Path(sys.executable).with_name("wandb")
SHA = "0123456789abcdef" * 4
KEY = "f00dfeed" * 5


def tracking(mode, **settings):
    chosen = {"wandb_init_timeout_s": 60.0, "wandb_finish_timeout_s": 60.0, "wandb_project": "p", **settings}
    return TrackingConfig(wandb=mode, **chosen)


def attempt(folder, number, steps, config, *, ending="finished", **more):
    """One start of a run, with one of everything that a run records."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("model: {d_model: 256}\n")
    (folder / "plan.json").write_text("{}")
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data/manifest.json").write_text('{"shards": []}')
    run_config = {
        "model": {"d_model": 256},
        "run": {"plan": str(folder / "plan.json")},
        "data": {"folder": str(folder / "data"), "sources": None},
        "save": {"folder": None},
    }
    with RunRecorder(
        config,
        metrics=folder / "metrics.jsonl",
        attempt=number,
        start_step=steps[0] - 1,
        total_steps=30,
        run_name="demo",
        run_config=run_config,
        **more,
    ) as told:
        told.event("start" if steps[0] == 1 else "resume", steps[0] - 1, mfu_convention="causal")
        for step in steps:
            told.step(step, loss=1 / step, tokens=step * 100, step_s=0.01, tokens_per_s=1e4)
            if step == steps[0]:
                told.event("first_step", step, start_up_s={"total": 2.0})
        told.evaluation(steps[-1], eval_loss=2.5, eval_s=0.1)
        told.event("spike", steps[-1], action="skip", reason="loss 9.0", rows=[40, 47])
        place = folder / f"checkpoints/step-{steps[-1]:08d}"
        place.mkdir(parents=True)
        (place / "manifest.json").write_text("{}")
        (place / "COMMITTED").write_text(f"{SHA}  manifest.json\n")
        told.checkpoint(steps[-1], save_s=0.1, wait_s=0.0, copy_s=0.01)
        told.event(ending, steps[-1], **({"signal": "SIGUSR1"} if ending == "stopped" else {}))


def summary_of(path):
    """What W&B's own reader says of a file."""
    command = [str(WANDB), "leet", "inspect", "--json", "--summary", str(path)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def rows_of(path):
    return [record["item"] for record in records_of(path, "history")]


def run_files(folder):
    return sorted((folder / "wandb").glob("*run-*/*.wandb"))


def sync(paths, server, home):
    command = [
        str(WANDB),
        "sync",
        "--yes",
        "--include-online",
        *(str(Path(path).absolute()) for path in paths),
    ]
    environment = os.environ | server.environment | {"HOME": str(home)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False, cwd=home
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """The folder of a run that was stopped after step 20, and resumed from step 12."""
    folder = tmp_path_factory.mktemp("offline") / "run"
    config = tracking(
        WandbMode.offline,
        wandb_group="lr",
        wandb_job_type="train",
        wandb_tags=["a", "b"],
        wandb_entity="team",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", KEY)
        attempt(folder, 1, range(1, 21), config, ending="stopped")
        attempt(folder, 2, range(13, 31), config)
    return folder


def test_both_attempts_are_one_run(offline):
    files = run_files(offline)
    assert len(files) == 2
    summaries = [summary_of(path) for path in files]
    assert {each["run_id"] for each in summaries} == {wandb_id(offline)}
    assert [each["state"] for each in summaries] == ["finished", "finished"]
    assert [each["summary"]["step"] for each in summaries] == [20, 30]
    for each in summaries:
        assert each["config"]["model"] == {"d_model": 256}
        assert (each["name"], each["project"], each["tags"]) == ("demo", "p", ["a", "b"])
        assert each["summary"]["run/mfu_convention"] == "causal"
    (run,) = records_of(files[1], "run")
    assert (run["run_group"], run["job_type"]) == ("lr", "train")


def test_the_history_is_metrics_jsonl_with_its_axes(offline):
    """Every row once, and W&B's own step over both attempts is the line of metrics.jsonl."""
    lines = read_lines(offline / "metrics.jsonl")
    rows = [row for path in run_files(offline) for row in rows_of(path)]
    assert [row["_step"] for row in rows] == [
        number for number, line in enumerate(lines) if line.get("what") != "wandb"
    ]
    for row in rows:
        line = lines[row["_step"]]
        assert (row["step"], row["attempt"]) == (line["step"], line["attempt"])
        assert row["tokens"] == row["step"] * 100
        assert row["_timestamp"] == pytest.approx(line["time"])
        if line["kind"] == "step":
            assert row["train/loss"] == line["loss"]
    defined = {
        (each.get("name"), each.get("glob_name")) for each in records_of(run_files(offline)[0], "metric")
    }
    assert {glob for _, glob in defined if glob} == {
        f"{group}/*" for group in ("train", "eval", "checkpoint", "events", "run")
    }


def test_undone_steps_are_marked(offline):
    first, second = map(rows_of, run_files(offline))
    assert not any("run/went_back_from" in row for row in first)
    (marked,) = [row for row in second if "run/went_back_from" in row]
    assert (marked["run/went_back_from"], marked["run/went_back_to"], marked["attempt"]) == (20, 12, 2)


def test_people_are_told_of_spikes_stops_and_resumes(offline):
    alerts = [each for path in run_files(offline) for each in records_of(path, "alert")]
    assert [(each["title"], each["level"]) for each in alerts] == [
        ("demo: spike", "WARN"),
        ("demo: stopped", "INFO"),
        ("demo: resumed", "INFO"),
        ("demo: spike", "WARN"),
    ]
    assert alerts[1]["text"] == "step 20, attempt 1: by SIGUSR1"


def test_artifacts_are_names_and_hashes_never_data_or_weights(offline):
    found = {each["type"]: each for each in records_of(run_files(offline)[1], "artifact")}
    assert set(found) == {"config", "plan", "data", "checkpoint", "run_table"}
    metadata = {kind: json.loads(each.get("metadata") or "{}") for kind, each in found.items()}
    place = offline / "checkpoints/step-00000030"
    assert metadata["checkpoint"] == {"path": str(place), "step": 30, "manifest_sha256": SHA}
    assert metadata["data"]["data"]["path"] == str(offline / "data/manifest.json")
    for kind in ("data", "checkpoint"):
        for entry in found[kind]["manifest"]["contents"]:
            assert entry["ref"].startswith("file://")
            assert "local_path" not in entry, "nothing of it is uploaded"
    (config,) = found["config"]["manifest"]["contents"]
    assert Path(config["local_path"]).is_relative_to(offline / "wandb"), "a later sync must find it"
    table = found["run_table"]["manifest"]["contents"][0]["local_path"]
    rows = json.loads(Path(table).read_text())["data"]
    assert [row[4] for row in rows] == ["spike", "stopped", "resume", "spike", "finished"]
    assert "rows=[40, 47]" in rows[0][6]


def test_a_checkpoint_behind_a_url_is_named_by_it(tmp_path):
    """Nobody asks that place for anything."""
    with RunRecorder(
        tracking(WandbMode.offline),
        metrics=tmp_path / "metrics.jsonl",
        attempt=1,
        start_step=0,
        total_steps=1,
        run_name="demo",
        run_config={"save": {"folder": "s3://bucket/run"}},
    ) as told:
        told.checkpoint(1, save_s=0.1, wait_s=0.0, copy_s=0.0)
    (path,) = run_files(tmp_path)
    (found,) = [each for each in records_of(path, "artifact") if each["type"] == "checkpoint"]
    assert json.loads(found["metadata"]) == {"path": "s3://bucket/run/step-00000001", "step": 1}
    assert not found["manifest"].get("contents")


def test_other_nodes_are_runs_in_the_runs_group(tmp_path):
    said = []
    config = tracking(WandbMode.offline, wandb_node_metrics=True)
    with recorder(tmp_path, config) as told:
        told.step(1, loss=1.0)
        other = node_sink(config, tmp_path, node=1, run_name="demo", report=said.append)
        wait_for(lambda: any(records_of(path, "stats") for path in run_files(tmp_path / "wandb/node-1")))
        other.finish()
    run_id = wandb_id(tmp_path)
    assert said == [f"offline, run {run_id}-node-1 of project p"]
    (main,), (path,) = run_files(tmp_path), run_files(tmp_path / "wandb/node-1")
    (ours,), (node,) = records_of(main, "run"), records_of(path, "run")
    assert ours["run_group"] == run_id
    assert (node["run_id"], node["run_group"]) == (f"{run_id}-node-1", run_id)
    assert (node["job_type"], node["display_name"]) == ("node", "demo node 1")
    stats = records_of(path, "stats")
    assert "memory_percent" in stats[0]["item"]
    assert rows_of(path) == []
    (end,) = records_of(path, "exit")
    assert "exit_code" not in end, "it is 0"


def test_other_nodes_send_nothing_unless_asked_and_where_the_run_has_no_wandb(tmp_path):
    asked, report = tracking(WandbMode.offline, wandb_node_metrics=True), print
    assert node_sink(asked, tmp_path, node=1, run_name="demo", report=report) is None
    with recorder(tmp_path, tracking(WandbMode.offline)) as told:
        told.step(1, loss=1.0)
    assert node_sink(tracking(WandbMode.offline), tmp_path, node=1, run_name="demo", report=report) is None


def test_no_file_holds_the_key(offline):
    for path in offline.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path


def test_sync_delivers_both_attempts_as_one_run(offline, tmp_path):
    """To the server it is the same as a run that was online."""
    copy = tmp_path / "run"
    shutil.copytree(offline, copy, symlinks=True)  # sync notes what it has sent
    with WandbStub() as server:
        sync(sorted((copy / "wandb").glob("offline-run-*")), server, tmp_path)
        (run,) = server.runs.values()
        lines = read_lines(offline / "metrics.jsonl")
        told = [number for number, line in enumerate(lines) if line.get("what") != "wandb"]
        assert [row["_step"] for row in run.history] == told
        assert (run.group, run.job_type, run.tags) == ("lr", "train", ["a", "b"])
        assert server.alerts[0]["title"] == "demo: spike"
        committed = {each["type"]: each for each in server.artifacts if each["is_committed"]}
        assert set(committed) == {"config", "plan", "data", "checkpoint", "run_table"}
        assert committed["checkpoint"]["metadata"]["manifest_sha256"] == SHA
        assert server.unknown == []


def online(server, monkeypatch):
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)


def test_an_online_run_goes_on_where_it_was_even_without_its_folder(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with WandbStub() as server:
        online(server, monkeypatch)
        attempt(folder, 1, range(1, 21), tracking(WandbMode.online), ending="stopped")
        kept = wandb_id(folder)
        shutil.rmtree(folder / "wandb")
        attempt(folder, 2, range(13, 31), tracking(WandbMode.online), wandb_run_id=kept)
        assert wandb_id(folder) == kept
        assert list(server.runs) == [kept]
        history = server.runs[kept].history
        steps = [row["step"] for row in history if "train/loss" in row]
        assert steps == [*range(1, 21), *range(13, 31)]
        assert [row["_step"] for row in history] == sorted({row["_step"] for row in history})
        assert server.runs[kept].exit_code == 0
        assert server.unknown == []


def test_a_failed_run_is_one_at_the_server_too(tmp_path, monkeypatch):
    def fail():
        with recorder(tmp_path, tracking(WandbMode.online)) as told:
            told.step(1, loss=1.0)
            raise ValueError("boom")

    with WandbStub() as server:
        online(server, monkeypatch)
        with pytest.raises(ValueError, match="boom"):
            fail()
        (run,) = server.runs.values()
        assert run.exit_code == 1
        assert [each["severity"] for each in server.alerts] == ["ERROR"]
        assert server.alerts[0]["text"] == "step 1, attempt 1: ValueError: boom"


def recorder(folder, config):
    return RunRecorder(
        config,
        metrics=folder / "metrics.jsonl",
        attempt=1,
        start_step=0,
        total_steps=20,
        run_name="demo",
        run_config={},
    )


def test_a_killed_training_leaves_a_whole_run_that_failed(tmp_path):
    program = f"""
import os, signal
from pathlib import Path
from llmtrain.tracking.config import TrackingConfig, WandbMode
from llmtrain.tracking.recorder import RunRecorder
config = TrackingConfig(wandb=WandbMode.offline, wandb_finish_timeout_s=60)
more = dict(attempt=1, start_step=0, total_steps=100, run_name="demo", run_config={{}})
told = RunRecorder(config, metrics=Path({str(tmp_path / "metrics.jsonl")!r}), **more)
for step in range(1, 101):
    told.step(step, loss=1.0)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    limit, ends = time.monotonic() + 60, []
    while not ends and time.monotonic() < limit:
        time.sleep(0.1)
        ends = [
            end for path in run_files(tmp_path) if path.stat().st_size for end in records_of(path, "exit")
        ]
    assert [end["exit_code"] for end in ends] == [1]
    (path,) = run_files(tmp_path)
    assert [row["step"] for row in rows_of(path)] == list(range(1, 101))


def steps_alone(folder, config, *, num_steps=20):
    """A run that only makes steps."""
    with recorder(folder, config) as told:
        for step in range(1, num_steps + 1):
            told.step(step, loss=1.0, tokens=step)


def wandb_said(folder):
    return [line["text"] for line in read_lines(folder / "metrics.jsonl") if line.get("what") == "wandb"]


@pytest.mark.parametrize(
    "trouble",
    [
        "unreachable",
        "answers 500",
        pytest.param("refuses the key", marks=pytest.mark.slow),
        pytest.param("never answers", marks=pytest.mark.slow),
    ],
)
def test_a_server_in_trouble_leaves_a_whole_offline_run(tmp_path, monkeypatch, trouble):
    with WandbStub() as server:
        online(server, monkeypatch)
        if trouble == "unreachable":
            monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        elif trouble == "never answers":
            server.answering.clear()
        else:
            server.fail = 500 if trouble == "answers 500" else 401
        steps_alone(tmp_path, tracking(WandbMode.online, wandb_init_timeout_s=1.0))
    said = wandb_said(tmp_path)
    assert said[0].startswith("online does not work (")
    assert said[0].endswith("going on offline")
    assert said[1].startswith("offline, run ")
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert [row["step"] for row in rows_of(path)] == list(range(1, 21))


@pytest.mark.parametrize("status", [500, pytest.param(401, marks=pytest.mark.slow)])
def test_a_server_lost_in_the_middle_costs_the_end_its_limit_and_sync_delivers(tmp_path, monkeypatch, status):
    config = tracking(WandbMode.online, wandb_finish_timeout_s=3.0)
    folder = tmp_path / "run"
    with WandbStub() as server:
        online(server, monkeypatch)
        place = folder / "checkpoints/step-00000001"
        place.mkdir(parents=True)
        (place / "COMMITTED").write_text(f"{SHA}  manifest.json\n")
        told = recorder(folder, config)
        with told:
            limit = time.monotonic() + 60
            step = 0
            while not wandb_said(folder):
                assert time.monotonic() < limit, "W&B did not start"
                step += 1
                told.step(step, loss=1.0, tokens=step)
                time.sleep(0.05)
            server.fail = status
            told.event("spike", step)
            told.checkpoint(1, save_s=0.1, wait_s=0.0, copy_s=0.0)
            for later in range(step + 1, step + 11):
                told.step(later, loss=1.0, tokens=later)
            begin = time.monotonic()
        assert time.monotonic() - begin < 30, "the limit is 3 s, and what a busy machine adds"
        said = " ".join(wandb_said(folder))
        assert ("was ended before it had finished" if status == 500 else "Fatal error while upload") in said
        assert "`wandb sync" in said
        (run,) = server.runs.values()
        assert not run.is_complete
        server.fail = None
        sync((folder / "wandb").glob("run-*"), server, tmp_path)
        assert sorted({row["step"] for row in run.history}) == list(range(1, step + 11))
