"""W&B's process, with a fake wandb that misbehaves: the run goes on at full speed, says so, and loses nothing
that metrics.jsonl has."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time

import pytest

from llmtrain.tracking import wandb as sink_module
from llmtrain.tracking.config import TrackingConfig, WandbMode
from llmtrain.tracking.metrics import MetricsFile
from llmtrain.tracking.wandb import MAX_RESTARTS, WandbSink, wandb_id

FAKE = """
import json, os, time

class Settings:
    def __init__(self, **settings): pass

class Artifact:
    def __init__(self, name, type, metadata): pass
    def add_file(self, path): pass
    def add_reference(self, uri, name, checksum): pass

class Run:
    step = 0
    summary = {{}}
    def define_metric(self, *names, **settings): pass
    def alert(self, **settings): pass
    def log_artifact(self, artifact): pass
    def log(self, fields, step, commit):
        {log}
        with open(os.environ["FAKE_WANDB_OUT"], "a") as out:
            out.write(json.dumps([step, fields["step"], fields["attempt"]]) + "\\n")
    def finish(self, exit_code):
        {finish}

def init(mode, id, **settings):
    {init}
    return Run()
"""


@pytest.fixture
def reports():
    return []


@pytest.fixture
def start(tmp_path, monkeypatch, reports):
    """Make a run's metrics file and a sink on it, whose W&B process imports a fake wandb."""
    sinks = []

    def make(source=None, *, online=False, attempt=1, init_timeout_s=0.5, finish_timeout_s=5.0, **behaviour):
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
        metrics = MetricsFile(tmp_path / "run" / "metrics.jsonl", attempt=attempt)
        sink = WandbSink(
            config, metrics.path, attempt=attempt, run_name="r", run_config={"a": 1}, report=reports.append
        )
        sinks.append(sink)
        return metrics, sink

    yield make
    for sink in sinks:
        sink.finish()


def write_steps(metrics, steps):
    for step in steps:
        metrics.write("step", step, loss=1 / step, tokens=step * 100)


def logged(tmp_path):
    """Every row that the fake was given: W&B's step, ours, attempt."""
    path = tmp_path / "logged"
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def steps_logged(tmp_path):
    return [step for _, step, _ in logged(tmp_path)]


def finish_in(sink, seconds):
    begin = time.monotonic()
    sink.finish()
    assert time.monotonic() - begin < seconds


def relay_until(sink, claim, timeout_s=30.0):
    limit = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < limit, "waited in vain"
        sink.relay()
        time.sleep(0.01)


def taken(tmp_path):
    return json.loads((tmp_path / "run/wandb/taken.json").read_text())["num_records"]


def test_every_record_arrives_in_order_however_many_come_at_once(start, tmp_path, reports):
    metrics, sink = start()
    write_steps(metrics, range(1, 20_001))
    finish_in(sink, 20)
    assert logged(tmp_path) == [(step - 1, step, 1) for step in range(1, 20_001)]
    assert reports == [f"offline, run {wandb_id(tmp_path / 'run')} of project llmtrain"]
    assert taken(tmp_path) == 20_000


def test_records_arrive_while_the_run_goes_on(start, tmp_path):
    metrics, sink = start()
    write_steps(metrics, [1])
    relay_until(sink, lambda: steps_logged(tmp_path) == [1])
    write_steps(metrics, [2])
    relay_until(sink, lambda: steps_logged(tmp_path) == [1, 2])


def test_a_record_of_any_length_arrives(start, tmp_path):
    metrics, sink = start()
    metrics.write("step", 1, text="x" * 100_000)
    finish_in(sink, 10)
    assert steps_logged(tmp_path) == [1]


def test_a_wandb_that_cannot_be_imported_does_not_stop_the_run(start, reports):
    _, sink = start("raise ImportError('broken install')")
    relay_until(sink, lambda: sink._process is None)
    assert reports == ["not started (ImportError: broken install); the run goes on without it"]


def test_an_init_that_raises_does_not_stop_the_run(start, reports):
    _, sink = start(init="raise RuntimeError('no luck')")
    finish_in(sink, 10)
    assert reports == ["not started (RuntimeError: no luck); the run goes on without it"]


def test_online_that_fails_goes_on_offline_and_loses_no_record(start, reports, tmp_path):
    metrics, sink = start(online=True, init="assert mode == 'offline', 'service is down'")
    write_steps(metrics, range(1, 51))
    finish_in(sink, 10)
    assert reports[0] == "online does not work (AssertionError: service is down); going on offline"
    assert reports[1].startswith("offline, run ")
    assert steps_logged(tmp_path) == list(range(1, 51))


def test_online_that_hangs_goes_on_offline_and_loses_no_record(start, reports, tmp_path):
    metrics, sink = start(
        online=True, init_timeout_s=0.3, init="time.sleep(0 if mode == 'offline' else 1000)"
    )
    write_steps(metrics, range(1, 51))
    finish_in(sink, 10)
    assert reports[0] == "online does not work (no answer in 0.3 s); going on offline"
    assert steps_logged(tmp_path) == list(range(1, 51))


def test_an_init_that_hangs_is_given_up_and_not_tried_again(start, reports):
    _, sink = start(init_timeout_s=0.2, init="time.sleep(1000)")
    relay_until(sink, lambda: sink._process is None)
    assert reports == ["did not start in 0.2 s; the run goes on without it"]


def test_training_never_waits_for_a_wandb_that_hangs(start, reports):
    metrics, sink = start(log="time.sleep(1000)", finish_timeout_s=0.2)
    took = []
    for step in range(1, 2001):
        metrics.write("step", step, loss=1.0)
        begin = time.perf_counter()
        sink.relay()
        took.append(time.perf_counter() - begin)
    assert statistics.median(took) < 1e-3  # the rest is the machine doing other things
    finish_in(sink, 5)


def test_a_wandb_that_hangs_over_a_record_is_started_again_and_goes_on(start, reports, tmp_path, monkeypatch):
    monkeypatch.setattr(sink_module, "STALL_LIMIT_S", 0.3)
    once = f"""
        if not os.path.exists({str(tmp_path / "hung")!r}):
            open({str(tmp_path / "hung")!r}, "w")
            time.sleep(1000)"""
    metrics, sink = start(log=once)
    write_steps(metrics, range(1, 11))
    relay_until(sink, lambda: steps_logged(tmp_path) == list(range(1, 11)))
    assert reports[1:3] == ["took no record for 0.3 s", "its process ended with status 1; starting it again"]


def test_a_process_that_is_killed_is_started_again_and_no_record_is_lost(start, reports, tmp_path):
    metrics, sink = start()
    write_steps(metrics, range(1, 6))
    relay_until(sink, lambda: len(logged(tmp_path)) == 5)
    for _ in range(MAX_RESTARTS + 1):
        process = sink._process
        process.send_signal(signal.SIGKILL)
        process.wait()
        sink.relay()
    assert reports.count("its process ended with status -9; starting it again") == MAX_RESTARTS
    assert reports[-1] == (
        "its process ended with status -9 again; the run goes on without it, metrics.jsonl has every record"
    )
    assert sink._process is None
    write_steps(metrics, range(6, 9))
    # A later attempt sends what the killed ones had no time to note as taken, and what they never saw.
    (tmp_path / "logged").unlink()
    noted = {"run_id": wandb_id(tmp_path / "run"), "num_records": 3, "shift": 0}
    (tmp_path / "run/wandb/taken.json").write_text(json.dumps(noted))
    metrics, sink = start(attempt=2)
    metrics.write("event", 8, what="resume")
    finish_in(sink, 10)
    assert logged(tmp_path) == [(step - 1, step, 1) for step in range(4, 9)] + [(8, 8, 2)]


def test_a_process_started_again_goes_on_behind_what_was_noted(start, tmp_path, reports, monkeypatch):
    monkeypatch.setattr(sink_module, "TAKEN_EVERY_S", 0.01)
    metrics, sink = start()
    write_steps(metrics, [1, 2, 3])
    relay_until(sink, lambda: (tmp_path / "run/wandb/taken.json").exists() and taken(tmp_path) == 3)
    sink._process.send_signal(signal.SIGKILL)
    sink._process.wait()
    write_steps(metrics, [4])
    relay_until(sink, lambda: len(logged(tmp_path)) >= 4)
    assert steps_logged(tmp_path) == [1, 2, 3, 4]


def test_an_attempt_sends_no_line_of_those_before_it(start, tmp_path):
    metrics, sink = start()
    write_steps(metrics, range(1, 11))
    finish_in(sink, 10)
    metrics, sink = start(attempt=2)
    metrics.write("event", 6, what="resume")
    write_steps(metrics, range(7, 9))
    finish_in(sink, 10)
    assert logged(tmp_path) == [(step - 1, step, 1) for step in range(1, 11)] + [
        (10, 6, 2),
        (11, 7, 2),
        (12, 8, 2),
    ]


def test_without_its_folder_an_attempt_begins_with_its_own_first_record(start, tmp_path):
    earlier = MetricsFile(tmp_path / "run" / "metrics.jsonl", attempt=1)
    write_steps(earlier, range(1, 6))
    metrics, sink = start(attempt=2)
    metrics.write("event", 5, what="resume")
    finish_in(sink, 10)
    assert logged(tmp_path) == [(5, 5, 2)]


def test_behind_what_the_server_has_rows_go_on_after_it(start, tmp_path):
    """wandb/ and metrics.jsonl are gone, and the server has a hundred rows of the run."""
    metrics, sink = start(init="Run.step = 100")
    write_steps(metrics, [1, 2])
    finish_in(sink, 10)
    metrics, sink = start(attempt=2)
    write_steps(metrics, [3])
    finish_in(sink, 10)
    assert logged(tmp_path) == [(100, 1, 1), (101, 2, 1), (102, 3, 2)]


def test_an_attempt_sends_what_one_that_could_not_start_left_out(start, tmp_path):
    metrics, sink = start("raise ImportError('broken install')")
    write_steps(metrics, [1, 2])
    finish_in(sink, 10)
    metrics, sink = start(attempt=2)
    write_steps(metrics, [3])
    finish_in(sink, 10)
    assert logged(tmp_path) == [(0, 1, 1), (1, 2, 1), (2, 3, 2)]


def test_a_finish_that_could_not_send_all_says_what_is_left_to_do(start, reports):
    _, sink = start(finish="raise TimeoutError")
    finish_in(sink, 10)
    assert reports[-1].startswith("not all was sent in 5 s; `wandb sync ")


@pytest.mark.parametrize(
    ("marker", "said"),
    [(None, "No such file or directory"), ("something else", "COMMITTED is not llmtrain's")],
)
def test_a_last_checkpoint_that_is_none_is_said(start, reports, tmp_path, marker, said):
    metrics, sink = start()
    place = tmp_path / "run/checkpoints/step-00000002"
    place.mkdir(parents=True)
    if marker is not None:
        (place / "COMMITTED").write_text(marker)
    metrics.write("checkpoint", 2, save_s=1.0)
    finish_in(sink, 10)
    assert reports[-1].startswith("no checkpoint logged: ")
    assert said in reports[-1]


def test_a_metrics_file_that_is_replaced_ends_it(start, tmp_path, reports):
    metrics, sink = start()
    write_steps(metrics, range(1, 11))
    relay_until(sink, lambda: len(logged(tmp_path)) == 10)
    os.truncate(metrics.path, 0)
    relay_until(sink, lambda: sink._process is None)
    assert reports[-1] == f"{metrics.path} was cut or replaced; the run goes on without W&B"


def test_a_metrics_file_that_cannot_be_read_is_said_once_and_read_later(start, tmp_path, reports):
    path = tmp_path / "run" / "metrics.jsonl"
    metrics, sink = start()
    path.rename(tmp_path / "kept")
    path.mkdir()
    relay_until(sink, lambda: len(reports) == 2)
    assert f"{path} cannot be read: Is a directory" in reports[1]
    path.rmdir()
    (tmp_path / "kept").rename(path)
    write_steps(metrics, [1])
    relay_until(sink, lambda: steps_logged(tmp_path) == [1])
    assert len(reports) == 2


def test_a_finish_that_hangs_is_ended_at_its_limit(start, reports):
    metrics, sink = start(finish="time.sleep(1000)", finish_timeout_s=0.2)
    write_steps(metrics, [1])
    finish_in(sink, 5)
    assert reports[-1].startswith("was ended before it had finished, after 0.2 s; `wandb sync ")


def test_a_process_that_ignores_every_limit_is_killed(start, reports, tmp_path):
    """It stops its own timers, as a W&B that holds the interpreter's lock would."""
    no_timers = "import threading; threading.Timer.start = lambda self: None"
    _, sink = start(init=no_timers, finish="time.sleep(1000)", finish_timeout_s=0.2)
    finish_in(sink, 5)
    folder = tmp_path / "run" / "wandb"
    assert reports[-1] == (
        f"was ended before it had finished, after 0.2 s; `wandb sync {folder}/*run-*` sends what is on disk"
    )


def test_a_forked_child_that_holds_the_pipe_does_not_keep_the_run_open(start, tmp_path):
    metrics, sink = start()
    held = os.dup(sink._process.stdin.fileno())
    write_steps(metrics, [1])
    finish_in(sink, 5)
    os.close(held)
    assert taken(tmp_path) == 1


def test_a_folder_that_cannot_be_written_does_not_stop_the_run(tmp_path, reports):
    (tmp_path / "run").write_text("a file where the folder should be")
    config = TrackingConfig(wandb=WandbMode.offline)
    sink = WandbSink(
        config,
        tmp_path / "run/metrics.jsonl",
        attempt=1,
        run_name="r",
        run_config={},
        report=reports.append,
    )
    sink.relay()
    sink.finish()
    assert reports[0].startswith("not started (")
    assert reports[0].endswith("the run goes on without it")


def sink_of(folder, mode, reports, **more):
    return WandbSink(
        TrackingConfig(wandb=mode),
        folder / "metrics.jsonl",
        attempt=1,
        run_name="r",
        run_config={},
        report=reports.append,
        **more,
    )


def test_online_without_a_key_says_that_it_is_offline(tmp_path, monkeypatch, reports):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (tmp_path / "run").write_text("")
    sink_of(tmp_path / "run", WandbMode.online, reports)
    assert reports[0] == "tracking.wandb=online, but WANDB_API_KEY is not set; going on offline"


def test_off_starts_no_process(tmp_path, reports):
    sink = sink_of(tmp_path / "run", WandbMode.off, reports)
    sink.relay()
    sink.finish()
    assert not (tmp_path / "run").exists()
    assert reports == []


def test_the_id_is_the_folders_else_the_checkpoints_else_new(start, tmp_path):
    _, sink = start()
    sink.finish()
    of_folder = wandb_id(tmp_path / "run")
    sink_of(tmp_path / "run", WandbMode.offline, [], run_id="fromckpt").finish()
    assert wandb_id(tmp_path / "run") == of_folder
    sink_of(tmp_path / "other", WandbMode.offline, [], run_id="fromckpt").finish()
    assert wandb_id(tmp_path / "other") == "fromckpt"
    sink_of(tmp_path / "third", WandbMode.offline, []).finish()
    assert wandb_id(tmp_path / "third") not in (None, of_folder, "fromckpt")


def test_a_killed_training_leaves_a_process_that_reads_to_the_end(start, tmp_path):
    start()[1].finish()  # writes the fake module
    program = f"""
import os, signal
from pathlib import Path
from llmtrain.tracking.config import TrackingConfig, WandbMode
from llmtrain.tracking.metrics import MetricsFile
from llmtrain.tracking.wandb import WandbSink
metrics = MetricsFile(Path({str(tmp_path / "killed/metrics.jsonl")!r}), attempt=1)
config = TrackingConfig(wandb=WandbMode.offline)
WandbSink(config, metrics.path, attempt=1, run_name="r", run_config={{}}, report=print)
for step in range(1, 101):
    metrics.write("step", step, loss=1.0)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", program], check=False)
    assert killed.returncode == -signal.SIGKILL
    limit = time.monotonic() + 30
    while len(logged(tmp_path)) < 100 and time.monotonic() < limit:
        time.sleep(0.05)
    assert steps_logged(tmp_path) == list(range(1, 101))
