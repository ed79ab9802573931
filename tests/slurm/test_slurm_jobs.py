"""Jobs of `llmtrain submit` on a real Slurm: whatever happens to one, it ends as an undisturbed run does."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from data_folder import train_arguments
from slurm_cluster import wait_until

from llmtrain.loader.ledger import LEDGER_NAME, contradictions, read_ledger
from llmtrain.tracking.metrics import read_lines, read_metrics

if TYPE_CHECKING:
    from conftest import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1800)]

SECRET = "planted-secret-of-a-test"
COMMAND = [sys.executable, "-c", "from llmtrain.cli.submit import main; main()"]
NUM_STEPS, ROWS, SEQ_LEN = 24, 32, 32
DISTURBED_FROM = 6
"""Step after which a test does its harm: past the first save, and long before the end."""
TRAIN = {  # a step takes less than 0.1 s of two quiet cores
    "model.d_model": 128,
    "model.num_layers": 4,
    "model.ffn_width": 256,
    "train.total_tokens": NUM_STEPS * ROWS * SEQ_LEN,
    "train.global_batch_rows": ROWS,
    "train.micro_batch_rows": 16,
    "train.eval_every_steps": 0,
    "save.every_steps": 5,
    "data.max_epochs": 100,
    "parallel.engine": "accelerate",
    "parallel.zero_stage": 0,
}
NODES = {
    "slurm": "local",
    "slurm.nodes": 2,
    "slurm.cpu_ranks_per_node": 1,
    "slurm.cpus_per_rank": 2,
    "slurm.time": "0:20:00",
    "slurm.signal_lead_s": 120,
}


def submit(cluster: Cluster, folder: Path, *words: str) -> int:
    """The id of the job."""
    environment = os.environ | cluster.environment | {"WANDB_API_KEY": SECRET}
    done = subprocess.run(
        [*COMMAND, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    match = re.search(r"^job +(\d+)", done.stdout, re.MULTILINE)
    assert match is not None, done.stdout
    return int(match[1])


def train_words(data: Path, run: Path, *more: str) -> list[str]:
    settings = [f"{name}={value}" for name, value in (TRAIN | NODES).items()]
    return [*train_arguments(data, run), *settings, *more]


def lines(run: Path, kind: str) -> list[dict[str, object]]:
    return [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == kind]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run, "step")]


def events(run: Path, name: str) -> list[dict[str, object]]:
    return [line for line in lines(run, "event") if line["what"] == name]


def wait_for_step(run: Path, step: int) -> None:
    def is_there() -> bool:
        path = run / "metrics.jsonl"
        return path.exists() and any(
            line["kind"] == "step" and line["step"] >= step for line in read_lines(path)
        )

    wait_until(is_there, within_s=600)


def check_same_run(run: Path, undisturbed: Path) -> None:
    """Every step's loss to the last bit, and every row once."""
    assert losses(run) == losses(undisturbed)
    assert list(contradictions(read_ledger(run / LEDGER_NAME))) == []


def said(run: Path, job: int) -> str:
    return (run / f"slurm/{job}.out").read_text()


@pytest.fixture(autouse=True)
def cancelled_after(cluster: Cluster) -> Iterator[None]:
    """What a test that failed leaves running would slow the others down."""
    yield
    cluster.ask("scancel", "--user=root")


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = submit(cluster, folder, *train_words(data, folder / "run"))
    cluster.wait_for(job, "COMPLETED")
    return folder / "run"


def test_a_job_on_two_nodes_trains_to_the_end(undisturbed: Path) -> None:
    assert len(losses(undisturbed)) == NUM_STEPS
    assert losses(undisturbed)[-1] < losses(undisturbed)[0] - 0.5
    (first,) = events(undisturbed, "start")
    assert first["world_size"] == 2
    logs = sorted(path.name.split(".", 1)[1] for path in (undisturbed / "slurm").glob("*.out"))
    assert logs == ["0.out", "1.out", "out"]


def test_no_file_of_a_run_holds_a_secret_that_its_job_has(undisturbed: Path) -> None:
    files = [path for path in undisturbed.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_a_requeued_job_goes_on(cluster: Cluster, data: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(cluster, tmp_path, *train_words(data, run))
    wait_for_step(run, DISTURBED_FROM)
    cluster.ask("scontrol", "requeue", str(job))
    cluster.wait_for(job, "COMPLETED")
    assert cluster.facts(job)[0]["Restarts"] == "1"
    assert len(events(run, "resume")) == 1
    check_same_run(run, undisturbed)


def test_before_its_time_limit_a_job_saves_and_stands_in_the_queue_again(
    cluster: Cluster, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    submitted = time.time()
    job = submit(cluster, tmp_path, *train_words(data, run))
    waiting = ["--output=/dev/null", f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"]
    follower = cluster.ask("sbatch", "--parsable", *waiting, "--wrap=true").strip()
    wait_for_step(run, DISTURBED_FROM)
    # Slurm looks at time limits twice a minute, and the run would be over: rank 0 makes it wait.
    rank_0 = pid_of_rank_0(run)
    os.kill(rank_0, signal.SIGSTOP)
    minutes = int((time.time() - submitted) // 60 + 2)  # nearer than slurm.signal_lead_s
    cluster.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    wait_until(lambda: "USR1: telling the ranks" in said(run, job), within_s=120)
    os.kill(rank_0, signal.SIGCONT)
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=20")
    cluster.wait_for(job, "COMPLETED")
    assert cluster.facts(job)[0]["Restarts"] == "1"
    (stopped,) = events(run, "stopped")
    assert stopped["signal"] == "SIGUSR1"
    (resumed,) = events(run, "resume")
    assert resumed["step"] == stopped["step"], "no step is done twice"
    check_same_run(run, undisturbed)
    cluster.wait_for(follower, "COMPLETED")
    assert cluster.facts(follower)[0]["StartTime"] >= cluster.facts(job)[0]["EndTime"]


def test_a_job_whose_node_dies_goes_on_elsewhere(
    cluster: Cluster, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(cluster, tmp_path, *train_words(data, run))
    wait_for_step(run, DISTURBED_FROM)
    dead = cluster.ask("scontrol", "show", "hostnames", cluster.facts(job)[0]["NodeList"]).split()[1]
    cluster.kill_node(dead)
    try:
        wait_until(lambda: cluster.facts(job)[0]["Restarts"] != "0", within_s=300)
        cluster.wait_for(job, "COMPLETED")
        now = cluster.ask("scontrol", "show", "hostnames", cluster.facts(job)[0]["NodeList"]).split()
        assert dead not in now
    finally:
        cluster.start_node(dead)
    check_same_run(run, undisturbed)


def test_a_run_that_fails_is_started_again_on_the_same_nodes(
    cluster: Cluster, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(cluster, tmp_path, *train_words(data, run))
    wait_for_step(run, DISTURBED_FROM)
    os.kill(pid_of_rank_0(run), signal.SIGKILL)
    cluster.wait_for(job, "COMPLETED")
    assert cluster.facts(job)[0]["Restarts"] == "0"
    assert "srun returned " in said(run, job)
    check_same_run(run, undisturbed)


def pid_of_rank_0(run: Path) -> int:
    holder = re.match(r"pid (\d+) ", (run / ".lock").read_text())
    assert holder is not None
    return int(holder[1])


def test_a_cancelled_job_saves_and_stays_away(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(cluster, tmp_path, *train_words(data, run))
    wait_for_step(run, DISTURBED_FROM)
    cluster.ask("scancel", str(job))
    cluster.wait_for(job, "CANCELLED")
    wait_until(lambda: bool(events(run, "stopped")))
    (stopped,) = events(run, "stopped")
    assert stopped["signal"] == "SIGTERM"
    assert lines(run, "checkpoint")[-1]["step"] == stopped["step"]
    assert cluster.facts(job)[0]["Restarts"] == "0"


def test_a_sweep_is_an_array_with_a_folder_for_each_run(
    cluster: Cluster, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = train_words(data, run, "-m", "optimizer.peak_lr=0.01,0.005", "slurm.max_array_tasks=1")
    job = submit(cluster, tmp_path, *words)
    cluster.wait_for(job, "COMPLETED")
    assert len(cluster.states(job)) == 2
    check_same_run(run / "0", undisturbed)
    assert len(losses(run / "1")) == NUM_STEPS
    assert losses(run / "1") != losses(undisturbed)


def test_data_train_and_evaluate_wait_for_each_other(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(40):
        text = " ".join(f"the {(number * at) % 17} otters sleep by river {at % 13}." for at in range(200))
        (tmp_path / f"texts/{number}.txt").write_text(text)
    own = [f"{name}={value}" for name, value in NODES.items()]
    made = ["corpus=text", "corpus.paths=[texts/*.txt]", "out=made", "tokenizer.vocab_size=300"]
    made += ["pack.seq_lens=[32]", "engine=inline", "held_out.fraction=0.2"]
    first = submit(cluster, tmp_path, "data", *made, *own, "slurm.nodes=1")
    run = tmp_path / "run"
    settings = ["model.vocab_size=300", "train.total_tokens=8192", "train.eval_rows=null"]
    words = train_words(Path("made"), run, *settings, f"slurm.after=[{first}]")
    second = submit(cluster, tmp_path, *words)
    third = submit(
        cluster, tmp_path, "evaluate", f"checkpoint={run}", *own, "slurm.nodes=1", f"slurm.after=[{second}]"
    )
    assert cluster.states(third) == ["PENDING"]
    cluster.wait_for(third, "COMPLETED")
    ends = [cluster.facts(job)[0] for job in (first, second, third)]
    for before, after in itertools.pairwise(ends):
        assert before["EndTime"] <= after["StartTime"]
    found = (tmp_path / f"logs/slurm/{third}.0.out").read_text()
    assert f"{lines(run, 'eval')[-1]['eval_loss']:.4f}" in found
