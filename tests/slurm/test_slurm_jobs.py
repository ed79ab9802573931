"""Jobs of `llmtrain submit` on a real Slurm: whatever happens to one, it ends as an undisturbed run does."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from data_folder import train_arguments

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
    "slurm.cpus_per_rank": 1,
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


def wait_for_step(cluster: Cluster, run: Path, step: int) -> None:
    def is_there() -> bool:
        path = run / "metrics.jsonl"
        return path.exists() and any(
            line["kind"] == "step" and line["step"] >= step for line in read_lines(path)
        )

    cluster.wait_until(is_there)


def check_same_run(run: Path, undisturbed: Path) -> None:
    """Every step's loss to the last bit, and every row once."""
    assert losses(run) == losses(undisturbed)
    assert list(contradictions(read_ledger(run / LEDGER_NAME))) == []


def said(run: Path, job: int) -> str:
    return (run / f"slurm/{job}.out").read_text()


def pid_of_rank_0(run: Path) -> int:
    holder = re.match(r"pid (\d+) ", (run / ".lock").read_text())
    assert holder is not None
    return int(holder[1])


@dataclass
class Ended:
    """What a drill leaves."""

    run: Path
    facts: list[dict[str, str]]
    """What Slurm says of the job, of each task of an array."""
    text: str = ""


def after(*drills: Callable[[Cluster, Path, Path], Ended]) -> Any:
    """For a test of what `drills` leave."""
    return pytest.mark.parametrize("drill", [drills], ids=[drills[-1].__name__], indirect=True)


# -- the drills: what is done to a job


def nothing(cluster: Cluster, data: Path, folder: Path) -> Ended:
    run = folder / "run"
    job = submit(cluster, folder, *train_words(data, run))
    cluster.wait_for(job, "COMPLETED")
    return Ended(run, cluster.facts(job), said(run, job))


def requeue(cluster: Cluster, data: Path, folder: Path) -> Ended:
    run = folder / "run"
    job = submit(cluster, folder, *train_words(data, run))
    wait_for_step(cluster, run, DISTURBED_FROM)
    cluster.ask("scontrol", "requeue", str(job))
    cluster.wait_for(job, "COMPLETED")
    return Ended(run, cluster.facts(job), said(run, job))


def time_limit(cluster: Cluster, data: Path, folder: Path) -> Ended:
    run = folder / "run"
    job = submit(cluster, folder, *train_words(data, run))
    waiting = ["--output=/dev/null", f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"]
    follower = cluster.ask("sbatch", "--parsable", *waiting, "--wrap=true").strip()
    wait_for_step(cluster, run, DISTURBED_FROM)
    # Slurm looks at time limits twice a minute, and the run would be over: rank 0 makes it wait.
    rank_0 = pid_of_rank_0(run)
    os.kill(rank_0, signal.SIGSTOP)
    hours, minutes, _ = map(int, cluster.facts(job)[0]["RunTime"].split(":"))
    nearer = hours * 60 + minutes + 2  # than slurm.signal_lead_s
    cluster.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={nearer}")
    cluster.wait_until(lambda: "USR1: telling the ranks" in said(run, job), within_s=300)
    os.kill(rank_0, signal.SIGCONT)
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=20")
    cluster.wait_for(job, "COMPLETED")
    cluster.wait_for(follower, "COMPLETED")
    assert cluster.facts(follower)[0]["StartTime"] >= cluster.facts(job)[0]["EndTime"]
    return Ended(run, cluster.facts(job), said(run, job))


def node_dies(cluster: Cluster, data: Path, folder: Path) -> Ended:
    run = folder / "run"
    job = submit(cluster, folder, *train_words(data, run))
    wait_for_step(cluster, run, DISTURBED_FROM)
    dead = nodes_of(cluster, job)[1]
    cluster.kill_node(dead)
    try:
        cluster.wait_until(lambda: cluster.facts(job)[0]["Restarts"] != "0", within_s=300)
        cluster.wait_for(job, "COMPLETED")
        assert dead not in nodes_of(cluster, job)
    finally:
        cluster.start_node(dead)
    return Ended(run, cluster.facts(job), said(run, job))


def nodes_of(cluster: Cluster, job: int) -> list[str]:
    return cluster.ask("scontrol", "show", "hostnames", cluster.facts(job)[0]["NodeList"]).split()


def rank_dies(cluster: Cluster, data: Path, folder: Path) -> Ended:
    run = folder / "run"
    job = submit(cluster, folder, *train_words(data, run))
    wait_for_step(cluster, run, DISTURBED_FROM)
    os.kill(pid_of_rank_0(run), signal.SIGKILL)
    cluster.wait_for(job, "COMPLETED")
    return Ended(run, cluster.facts(job), said(run, job))


def rank_leaves(cluster: Cluster, data: Path, folder: Path) -> Ended:
    """The run ends with status 75, and nobody has told the script anything."""
    run = folder / "run"
    job = submit(cluster, folder, *train_words(data, run))
    wait_for_step(cluster, run, DISTURBED_FROM)
    os.kill(pid_of_rank_0(run), signal.SIGTERM)
    cluster.wait_for(job, "COMPLETED")
    return Ended(run, cluster.facts(job), said(run, job))


def same_failure(cluster: Cluster, data: Path, folder: Path) -> Ended:
    """A run that may fail once ends with status 78 when it is started again."""
    run = folder / "run"
    job = submit(cluster, folder, *train_words(data, run, "run.max_same_failures=1"))
    wait_for_step(cluster, run, DISTURBED_FROM)
    os.kill(pid_of_rank_0(run), signal.SIGKILL)
    cluster.wait_for(job, "FAILED")
    return Ended(run, cluster.facts(job), said(run, job))


def cancel(cluster: Cluster, data: Path, folder: Path) -> Ended:
    run = folder / "run"
    job = submit(cluster, folder, *train_words(data, run))
    wait_for_step(cluster, run, DISTURBED_FROM)
    cluster.ask("scancel", str(job))
    cluster.wait_for(job, "CANCELLED")
    cluster.wait_until(lambda: bool(events(run, "stopped")))
    return Ended(run, cluster.facts(job), said(run, job))


def sweep(cluster: Cluster, data: Path, folder: Path) -> Ended:
    run = folder / "run"
    words = train_words(data, run, "-m", "optimizer.peak_lr=0.01,0.005", "slurm.max_array_tasks=1")
    job = submit(cluster, folder, *words)
    cluster.wait_for(job, "COMPLETED")
    return Ended(run, cluster.facts(job))


def submitit(cluster: Cluster, data: Path, folder: Path) -> Ended:
    """A sweep whose runs Hydra hands to Slurm, one process each. Its `text` is what the launcher printed."""
    run = folder / "run"
    own = {"timeout_min": 20, "cpus_per_task": 1, "mem_gb": 1}
    words = [
        "train",
        "-m",
        *train_arguments(data, run)[1:],
        *(f"{name}={value}" for name, value in TRAIN.items()),
        "hydra/launcher=submitit_slurm",
        *(f"hydra.launcher.{name}={value}" for name, value in own.items()),
        "optimizer.peak_lr=0.01,0.005",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "llmtrain.cli.main", *words],
        cwd=folder,
        env=os.environ | cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    names = (path.name.partition("_")[0] for path in (run / ".submitit").iterdir())
    (job,) = {name for name in names if name.isdigit()}
    return Ended(run, cluster.facts(job), done.stdout)


def chain(cluster: Cluster, data: Path, folder: Path) -> Ended:
    """Its `facts` are of three jobs, its `text` is what the last one printed. It makes its own data."""
    (folder / "texts").mkdir()
    for number in range(40):
        text = " ".join(f"the {(number * at) % 17} otters sleep by river {at % 13}." for at in range(200))
        (folder / f"texts/{number}.txt").write_text(text)
    own = [f"{name}={value}" for name, value in NODES.items()]
    made = ["corpus=text", "corpus.paths=[texts/*.txt]", "out=made", "tokenizer.vocab_size=300"]
    made += ["pack.seq_lens=[32]", "engine=inline", "held_out.fraction=0.2"]
    first = submit(cluster, folder, "data", *made, *own, "slurm.nodes=1")
    run = folder / "run"
    settings = ["model.vocab_size=300", "train.total_tokens=8192", "train.eval_rows=null"]
    words = train_words(Path("made"), run, *settings, f"slurm.after=[{first}]")
    second = submit(cluster, folder, *words)
    last = ["evaluate", f"checkpoint={run}", *own, "slurm.nodes=1", f"slurm.after=[{second}]"]
    third = submit(cluster, folder, *last)
    assert cluster.states(third) == ["PENDING"]
    cluster.wait_for(third, "COMPLETED")
    facts = [cluster.facts(job)[0] for job in (first, second, third)]
    return Ended(run, facts, (folder / f"logs/slurm/{third}.0.out").read_text())


# -- what must hold then


@after(nothing)
def test_a_job_on_two_nodes_trains_to_the_end(drill: list[Ended]) -> None:
    run = drill[0].run
    assert len(losses(run)) == NUM_STEPS
    assert losses(run)[-1] < losses(run)[0] - 0.5
    (first,) = events(run, "start")
    assert first["world_size"] == 2
    assert "the run is over" in drill[0].text
    logs = sorted(path.name.split(".", 1)[1] for path in (run / "slurm").glob("*.out"))
    assert logs == ["0.out", "1.out", "out"]


@after(nothing)
def test_no_file_of_a_run_holds_a_secret_that_its_job_has(drill: list[Ended]) -> None:
    files = [path for path in drill[0].run.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


@after(nothing, requeue)
def test_a_requeued_job_goes_on(drill: list[Ended]) -> None:
    undisturbed, ended = drill
    assert ended.facts[0]["Restarts"] == "1"
    assert len(events(ended.run, "resume")) == 1
    check_same_run(ended.run, undisturbed.run)


@after(nothing, time_limit)
def test_before_its_time_limit_a_job_saves_and_stands_in_the_queue_again(drill: list[Ended]) -> None:
    undisturbed, ended = drill
    assert ended.facts[0]["Restarts"] == "1"
    (stopped,) = events(ended.run, "stopped")
    assert stopped["signal"] == "SIGUSR1"
    (resumed,) = events(ended.run, "resume")
    assert resumed["step"] == stopped["step"], "no step is done twice"
    check_same_run(ended.run, undisturbed.run)


@after(nothing, node_dies)
def test_a_job_whose_node_dies_goes_on_elsewhere(drill: list[Ended]) -> None:
    undisturbed, ended = drill
    assert ended.facts[0]["Restarts"] == "1"
    check_same_run(ended.run, undisturbed.run)


@after(nothing, rank_dies)
def test_a_run_that_fails_is_started_again_on_the_same_nodes(drill: list[Ended]) -> None:
    undisturbed, ended = drill
    assert ended.facts[0]["Restarts"] == "0"
    assert "srun returned " in ended.text
    check_same_run(ended.run, undisturbed.run)


@after(nothing, rank_leaves)
def test_a_run_that_leaves_by_itself_stands_in_the_queue_again(drill: list[Ended]) -> None:
    undisturbed, ended = drill
    assert ended.facts[0]["Restarts"] == "1"
    assert "the run left before its time was over; asking Slurm to start this job again" in ended.text
    check_same_run(ended.run, undisturbed.run)


@after(same_failure)
def test_a_run_that_says_never_again_is_over_although_it_may_fail_twice(drill: list[Ended]) -> None:
    ended = drill[0]
    assert ended.facts[0]["ExitCode"] == "78:0"
    assert ended.facts[0]["Restarts"] == "0"
    assert ended.text.count("ranks meet at") == 2
    assert "the run says that starting it again is no use" in ended.text


@after(cancel)
def test_a_cancelled_job_saves_and_stays_away(drill: list[Ended]) -> None:
    ended = drill[0]
    (stopped,) = events(ended.run, "stopped")
    assert stopped["signal"] == "SIGTERM"
    assert lines(ended.run, "checkpoint")[-1]["step"] == stopped["step"]
    assert ended.facts[0]["Restarts"] == "0"


@after(nothing, sweep)
def test_a_sweep_is_an_array_with_a_folder_for_each_run(drill: list[Ended]) -> None:
    undisturbed, ended = drill
    assert len(ended.facts) == 2
    check_same_run(ended.run / "0", undisturbed.run)
    assert len(losses(ended.run / "1")) == NUM_STEPS
    assert losses(ended.run / "1") != losses(undisturbed.run)


@pytest.mark.skipif(find_spec("submitit") is None, reason="no submitit: pip install llmtrain[submitit]")
@after(nothing, submitit)
def test_hydras_own_launcher_hands_a_sweep_to_slurm(drill: list[Ended]) -> None:
    undisturbed, ended = drill
    assert [facts["JobState"] for facts in ended.facts] == ["COMPLETED", "COMPLETED"]
    for number in "01":
        assert len(losses(ended.run / number)) == NUM_STEPS
        assert list(contradictions(read_ledger(ended.run / number / LEDGER_NAME))) == []
    assert losses(ended.run / "0") == pytest.approx(losses(undisturbed.run), rel=1e-5)  # one rank, not two
    assert losses(ended.run / "1") != losses(ended.run / "0")


@after(chain)
def test_data_train_and_evaluate_wait_for_each_other(drill: list[Ended]) -> None:
    ended = drill[0]
    for before, later in itertools.pairwise(ended.facts):
        assert before["EndTime"] <= later["StartTime"]
    assert f"{lines(ended.run, 'eval')[-1]['eval_loss']:.4f}" in ended.text
