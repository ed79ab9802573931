"""One run on two hosts, and what networks and machines do to it: it goes on, or ends with an error and is
resumed; in the end it is the undisturbed run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from data_folder import train_arguments

from llmtrain.loader.ledger import LEDGER_NAME, read_ledger
from llmtrain.tracking.metrics import read_lines, read_metrics

if TYPE_CHECKING:
    from conftest import Hosts, Launched

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(900)]

NUM_STEPS, ROWS, SEQ_LEN = 40, 32, 32
DISTURBED_FROM = 7
"""Step after which a test does its harm: past the first save, and long before the end."""
TIMEOUT_S = 60
"""Of a collective; ranks look for the odd one after a quarter of it."""
END_S = 300.0
"""For anything to end on a busy machine; a run takes a tenth of it."""
BOUND_S = 120.0
"""For survivors of a cut: TIMEOUT_S, and what a busy machine adds."""
TRAIN = {
    "model.d_model": 128,
    "model.num_layers": 4,
    "model.ffn_width": 256,
    "train.total_tokens": NUM_STEPS * ROWS * SEQ_LEN,
    "train.global_batch_rows": ROWS,
    "train.micro_batch_rows": 16,
    "train.eval_every_steps": 0,
    "train.process_group_timeout_s": TIMEOUT_S,
    "save.every_steps": 5,
    "data.max_epochs": 100,
    "parallel.engine": "accelerate",
    "parallel.zero_stage": 0,
}
FIXED = {"NNODES": "2", "AGENT_SILENCE_S": "20"}
ELASTIC = {"NNODES": "1:2", "AGENT_SILENCE_S": "20", "RDZV_CONF": "last_call_timeout=5"}


def words(data: Path, run: Path, *more: str) -> list[str]:
    settings = [f"{name}={value}" for name, value in TRAIN.items()]
    return [*train_arguments(data, run)[1:], *settings, *more]


def start_both(hosts: Hosts, data: Path, run: Path, *more: str) -> list[Launched]:
    return [hosts.start(name, "multi_node.sh", *words(data, run, *more), **FIXED) for name in "ab"]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "step"]


def last_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = read_lines(path) if path.exists() else []
    return max((line["step"] for line in lines if line["kind"] == "step"), default=0)


def check_every_row_once(run: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llmtrain.cli.main", "inspect", "ledger", f"run={run}", "recompute=true"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{NUM_STEPS} steps were read again and compared" in done.stdout


def pid_of_rank_0(run: Path) -> int:
    holder = re.match(r"pid (\d+) ", (run / ".lock").read_text())
    assert holder is not None
    return int(holder[1])


def num_ranks(run: Path) -> list[int]:
    """Of each attempt."""
    return [attempt.world_size for attempt in read_ledger(run / LEDGER_NAME).attempts]


@pytest.fixture(scope="session")
def undisturbed(
    make_hosts: Callable[[str], Hosts], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a run that nothing happened to."""
    run, hosts = tmp_path_factory.mktemp("undisturbed") / "run", make_hosts("ab")
    for launched in start_both(hosts, data, run):
        assert launched.wait(within_s=END_S) == 0, launched.text
    assert len(losses(run)) == NUM_STEPS
    assert losses(run)[-1] < losses(run)[0] - 0.5
    assert num_ranks(run) == [2]
    return run


def check_same_run(run: Path, undisturbed: Path) -> None:
    """On as many ranks: the loss of every step to the last bit."""
    assert losses(run) == losses(undisturbed)
    check_every_row_once(run)


def check_equal_run(run: Path, undisturbed: Path) -> None:
    """On other numbers of ranks in between."""
    np.testing.assert_allclose(losses(run), losses(undisturbed), rtol=2e-5)  # other sums over ranks
    check_every_row_once(run)


def test_a_cut_link_ends_both_hosts_with_an_error_and_the_run_is_resumed(
    hosts: Hosts, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    both = start_both(hosts, data, run)
    wait_until(lambda: last_step(run) >= DISTURBED_FROM, both)
    hosts.link("b", "down")
    for launched in both:
        assert launched.wait(within_s=BOUND_S) not in (0, 75, 78)
        assert "lost the network: no carrier on eth0" in launched.text
    hosts.link("b", "up")
    for launched in start_both(hosts, data, run, "run.intent=resume"):
        assert launched.wait(within_s=END_S) == 0, launched.text
    assert num_ranks(run) == [2, 2]
    check_same_run(run, undisturbed)


def test_a_link_that_is_down_for_a_moment_costs_time_only(
    hosts: Hosts, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    both = start_both(hosts, data, run)
    wait_until(lambda: last_step(run) >= DISTURBED_FROM, both)
    hosts.link("b", "down")
    time.sleep(4)
    before = last_step(run)
    hosts.link("b", "up")
    assert before < NUM_STEPS, "the run was over before the link was down"
    for launched in both:
        assert launched.wait(within_s=END_S) == 0, launched.text
    assert num_ranks(run) == [2]
    check_same_run(run, undisturbed)


def test_a_slow_link_costs_time_only(hosts: Hosts, data: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in "ab":
        hosts.slow(name, "100mbit")
    for launched in start_both(hosts, data, run):
        assert launched.wait(within_s=END_S) == 0, launched.text
    steps = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "step"]
    # 599k gradients of 4 bytes leave each host once: 0.19 s at that rate, whatever the machine does.
    assert min(line["step_s"] for line in steps) > 0.15
    check_same_run(run, undisturbed)


def test_an_elastic_run_that_loses_a_host_goes_on_without_it(
    hosts: Hosts, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    both = [hosts.start(name, "elastic.sh", *words(data, run), **ELASTIC) for name in "ab"]
    wait_until(lambda: last_step(run) >= DISTURBED_FROM, both)
    hosts.link("b", "down")
    hosts.kill("b")
    assert both[0].wait(within_s=END_S) == 0, both[0].text
    assert num_ranks(run) == [2, 1]
    check_equal_run(run, undisturbed)


def test_an_elastic_run_takes_in_a_host_that_comes_later(
    hosts: Hosts, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = hosts.start("a", "elastic.sh", *words(data, run), **ELASTIC)
    wait_until(lambda: last_step(run) >= DISTURBED_FROM, [first])
    rank_0 = pid_of_rank_0(run)
    os.kill(rank_0, signal.SIGSTOP)  # or the run would be over before the second host has imported torch
    second = hosts.start("b", "elastic.sh", *words(data, run), **ELASTIC)
    wait_until(lambda: "closing signal SIGTERM" in first.text, [first, second])
    os.kill(rank_0, signal.SIGCONT)
    for launched in (first, second):
        assert launched.wait(within_s=END_S) == 0, launched.text
    assert num_ranks(run) == [1, 2]
    assert len(read_ledger(run / LEDGER_NAME).steps) == NUM_STEPS, "no step is done twice"
    check_equal_run(run, undisturbed)


def test_an_elastic_run_lets_a_host_go_that_is_told_to_leave(
    hosts: Hosts, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    staying, leaving = (hosts.start(name, "elastic.sh", *words(data, run), **ELASTIC) for name in "ab")
    wait_until(lambda: last_step(run) >= DISTURBED_FROM, [staying, leaving])
    leaving.send(signal.SIGTERM)
    assert leaving.wait(within_s=END_S) == 75, leaving.text
    assert staying.wait(within_s=END_S) == 0, staying.text
    assert num_ranks(run) == [2, 1]
    assert len(read_ledger(run / LEDGER_NAME).steps) == NUM_STEPS, "no step is done twice"
    check_equal_run(run, undisturbed)


def wait_until(claim: Callable[[], bool], watched: list[Launched]) -> None:
    deadline = time.monotonic() + END_S
    while not claim():
        for each in watched:
            assert each.process.poll() is None, f"{each.host} ended too early:\n{each.text[-3000:]}"
        logs = "\n".join(f"== {each.host}\n{each.text[-3000:]}" for each in watched)
        assert time.monotonic() < deadline, f"waited in vain\n{logs}"
        time.sleep(0.05)
