"""W&B beside a run: whatever it does, the run goes on at full speed and says what was lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from llmtrain.tracking.config import TrackingConfig, WandbMode
from llmtrain.tracking.wandb import WandbSink, wandb_fields

FAKE = """
import json, os, sys, time

class Settings:
    def __init__(self, **settings):
        self.settings = settings

class Run:
    def define_metric(self, *names, **settings): pass
    def log(self, fields):
        {log}
        with open(os.environ["FAKE_WANDB_OUT"], "a") as out:
            out.write(json.dumps(fields) + "\\n")
    def finish(self):
        {finish}

def init(mode, id, **settings):
    {init}
    return Run()
"""


@pytest.fixture
def reports():
    return []


@pytest.fixture
def sink_with(tmp_path, monkeypatch, reports):
    """Make a sink whose W&B process imports a fake wandb module with the given behaviour."""
    sinks = []

    def make(source=None, *, online=False, init_timeout_s=0.5, finish_timeout_s=5.0, **behaviour):
        filled = source or FAKE.format(**{"log": "pass", "finish": "pass", "init": "pass", **behaviour})
        fake = tmp_path / "fake"
        fake.mkdir(exist_ok=True)
        (fake / "wandb.py").write_text(filled)
        monkeypatch.setenv("PYTHONPATH", str(fake))
        monkeypatch.setenv("FAKE_WANDB_OUT", str(tmp_path / "logged"))
        if online:
            monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        config = TrackingConfig(
            wandb=WandbMode.online if online else WandbMode.offline,
            wandb_init_timeout_s=init_timeout_s,
            wandb_finish_timeout_s=finish_timeout_s,
        )
        run = tmp_path / "run"
        sinks.append(WandbSink(config, run, run_name="r", run_config={"a": 1}, report=reports.append))
        return sinks[-1]

    yield make
    for sink in sinks:
        sink.finish()


def step_record(step, **fields):
    return {
        "kind": "step",
        "step": step,
        "attempt": 1,
        "time": 1.0,
        "tokens": step * 100,
        "loss": 1 / step,
        **fields,
    }


def logged(tmp_path):
    path = tmp_path / "logged"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def finish_in(sink, seconds):
    begin = time.monotonic()
    sink.finish()
    assert time.monotonic() - begin < seconds


def test_every_record_arrives_in_order(sink_with, tmp_path, reports):
    sink = sink_with()
    for step in range(1, 501):
        sink.log(step_record(step))
    finish_in(sink, 10)
    assert logged(tmp_path) == list(range(1, 501))
    assert sink.num_dropped == 0
    spec = json.loads((tmp_path / "run" / "wandb" / "llmtrain.json").read_text())
    assert reports == [f"offline, run {spec['run_id']} of project llmtrain"]


def test_a_wandb_that_cannot_be_imported_does_not_stop_the_run(sink_with, reports):
    sink = sink_with("raise ImportError('broken install')")
    sink.log(step_record(1))
    finish_in(sink, 10)
    assert reports[0] == "not started (ImportError: broken install); the run goes on without it"


def test_an_init_that_raises_does_not_stop_the_run(sink_with, reports):
    sink = sink_with(init="raise RuntimeError('no luck')")
    sink.log(step_record(1))
    finish_in(sink, 10)
    assert reports[0] == "not started (RuntimeError: no luck); the run goes on without it"


def test_online_that_fails_goes_on_offline_and_loses_no_record(sink_with, reports, tmp_path):
    sink = sink_with(online=True, init="assert mode == 'offline', 'service is down'")
    for step in range(1, 51):
        sink.log(step_record(step))
    finish_in(sink, 10)
    assert reports[0] == "online does not work (AssertionError: service is down); going on offline"
    assert reports[1].startswith("offline, run ")
    assert logged(tmp_path) == list(range(1, 51))


def test_online_that_hangs_goes_on_offline_and_loses_no_record(sink_with, reports, tmp_path):
    sink = sink_with(online=True, init_timeout_s=0.3, init="time.sleep(0 if mode == 'offline' else 1000)")
    for step in range(1, 51):
        sink.log(step_record(step))
    finish_in(sink, 10)
    assert reports[0] == "online does not work (no answer in 0.3 s); going on offline"
    assert logged(tmp_path) == list(range(1, 51))


def test_an_init_that_hangs_is_given_up(sink_with, reports):
    sink = sink_with(init_timeout_s=0.2, init="time.sleep(1000)")
    deadline = time.monotonic() + 10
    while sink.num_dropped < 2 and time.monotonic() < deadline:
        sink.log(step_record(1))
        time.sleep(0.02)
    assert "did not start in 0.2 s; the run goes on without it" in reports
    finish_in(sink, 5)


def test_logging_never_waits_for_a_wandb_that_hangs_and_drops_are_reported(sink_with, reports):
    sink = sink_with(log="time.sleep(1000)", finish_timeout_s=0.2)
    took = []
    for step in range(1, 20_001):
        begin = time.perf_counter()
        sink.log(step_record(step))
        took.append(time.perf_counter() - begin)
    assert sorted(took)[int(0.99 * len(took))] < 1e-3  # the rest is the machine doing other things
    assert 10_000 < sink.num_dropped < 20_000
    finish_in(sink, 5)
    assert "not keeping up, records are being dropped; all of them are in metrics.jsonl" in reports
    assert f"{sink.num_dropped} records were dropped; metrics.jsonl has all of them" in reports


def test_a_finish_that_hangs_is_ended_at_its_limit(sink_with, reports):
    sink = sink_with(finish="time.sleep(1000)", finish_timeout_s=0.2)
    sink.log(step_record(1))
    finish_in(sink, 5)


def test_a_process_that_ignores_every_limit_is_killed(sink_with, reports, tmp_path):
    """It stops its own timers, as a W&B that holds the interpreter's lock would."""
    no_timers = "import threading; threading.Timer.start = lambda self: None"
    sink = sink_with(init=no_timers, finish="time.sleep(1000)", finish_timeout_s=0.2)
    sink.log(step_record(1))
    finish_in(sink, 5)
    folder = tmp_path / "run" / "wandb"
    assert reports[-1] == (
        f"did not finish in 0.2 s and was ended; `wandb sync {folder}` sends what is on disk"
    )


def test_a_process_that_is_killed_is_noticed_and_the_run_goes_on(sink_with, reports):
    sink = sink_with()
    sink._process.send_signal(signal.SIGKILL)
    sink._process.wait()
    for step in range(1, 11):
        sink.log(step_record(step))
    finish_in(sink, 5)
    assert sink.num_dropped == 10
    assert reports[-1] == "10 records were dropped; metrics.jsonl has all of them"


def test_a_record_too_long_for_one_write_is_dropped_and_counted(sink_with, tmp_path):
    sink = sink_with()
    sink.log(step_record(1, text="x" * 5000))
    sink.log(step_record(2))
    finish_in(sink, 10)
    assert sink.num_dropped == 1
    assert logged(tmp_path) == [2]


def test_a_folder_that_cannot_be_written_does_not_stop_the_run(tmp_path, reports):
    (tmp_path / "run").write_text("a file where the folder should be")
    config = TrackingConfig(wandb=WandbMode.offline)
    sink = WandbSink(config, tmp_path / "run", run_name="r", run_config={}, report=reports.append)
    sink.log(step_record(1))
    sink.finish()
    assert reports[0].startswith("not started (")
    assert reports[0].endswith("the run goes on without it")


def test_online_without_a_key_says_that_it_is_offline(tmp_path, monkeypatch, reports):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (tmp_path / "run").write_text("")
    config = TrackingConfig(wandb=WandbMode.online)
    WandbSink(config, tmp_path / "run", run_name="r", run_config={}, report=reports.append)
    assert reports[0] == "tracking.wandb=online, but WANDB_API_KEY is not set; going on offline"


def test_off_starts_no_process(tmp_path, reports):
    config = TrackingConfig(wandb=WandbMode.off)
    sink = WandbSink(config, tmp_path / "run", run_name="r", run_config={}, report=reports.append)
    sink.log(step_record(1))
    sink.finish()
    assert not (tmp_path / "run").exists()
    assert reports == []


def test_names_say_the_group_and_axes_stand_alone():
    record = {"kind": "eval", "step": 5, "attempt": 2, "time": 1.0, "eval_loss": 2.5, "eval_s": 0.1}
    assert wandb_fields(record) == {"step": 5, "eval/loss": 2.5, "eval/s": 0.1}
    event = {"kind": "event", "step": 5, "attempt": 2, "time": 1.0, "what": "start", "world_size": 2}
    assert wandb_fields(event) == {"step": 5, "event/world_size": 2}
    assert wandb_fields(step_record(2)) == {"step": 2, "tokens": 200, "train/loss": 0.5}


# --- the real W&B, offline ---


def inspect(path, *options):
    wandb = Path(sys.executable).with_name("wandb")
    command = [str(wandb), "leet", "inspect", "--json", *options, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_an_offline_run_reads_back_and_a_resume_has_the_same_id(tmp_path, reports):
    for attempt in (1, 2):
        config = TrackingConfig(wandb=WandbMode.offline, wandb_project="p")
        run_config = {"model": {"d_model": 256}}
        sink = WandbSink(config, tmp_path, run_name="demo", run_config=run_config, report=reports.append)
        for step in range(attempt * 10, attempt * 10 + 5):
            sink.log(step_record(step, attempt=attempt))
        sink.log(
            {"kind": "eval", "step": attempt * 10 + 4, "attempt": attempt, "time": 1.0, "eval_loss": 2.5}
        )
        sink.finish()
        assert sink.num_dropped == 0
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({path.name for path in files}) == 1
    for attempt, path in enumerate(files, start=1):
        summary = json.loads(inspect(path, "--summary"))
        assert summary["state"] == "finished"
        assert summary["config"]["model"] == {"d_model": 256}
        assert summary["summary"]["step"] == attempt * 10 + 4
        assert summary["summary"]["tokens"] == (attempt * 10 + 4) * 100
        assert summary["summary"]["eval/loss"] == 2.5
        records = [json.loads(line) for line in inspect(path).splitlines()]
        text = json.dumps(records)
        assert text.count('"train/loss"') >= 5
        assert '"train/*"' in text  # the metric is defined on our step, because W&B's own restarts at 0


def test_a_killed_training_leaves_a_finished_offline_run(tmp_path):
    program = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from llmtrain.tracking.config import TrackingConfig, WandbMode
        from llmtrain.tracking.wandb import WandbSink
        config, run = TrackingConfig(wandb=WandbMode.offline), Path(sys.argv[1])
        sink = WandbSink(config, run, run_name="r", run_config={}, report=print)
        for step in range(1, 101):
            sink.log({"kind": "step", "step": step, "attempt": 1, "loss": 1.0})
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    summary = {}
    while summary.get("state") != "finished" and time.monotonic() < deadline:
        time.sleep(0.1)
        for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb"):
            summary = json.loads(inspect(path, "--summary"))
    assert summary["state"] == "finished"
    assert summary["summary"]["step"] == 100


def test_an_unreachable_service_falls_back_to_a_real_offline_run(tmp_path, monkeypatch, reports):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    config = TrackingConfig(wandb=WandbMode.online, wandb_init_timeout_s=0.5, wandb_finish_timeout_s=60.0)
    sink = WandbSink(config, tmp_path, run_name="r", run_config={}, report=reports.append)
    sink.log(step_record(1))
    finish_in(sink, 70)
    assert "going on offline" in reports[0]
    assert reports[1].startswith("offline, run ")
    paths = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert json.loads(inspect(paths[0], "--summary"))["summary"]["step"] == 1
