"""The text of a job's script: whole, sound for bash and shellcheck, and what it does under a srun that only
tells how it was called."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from llmtrain.cli.submit import SubmitRoot
from llmtrain.launch.config import After, ContainerConfig, ContainerKind, SlurmConfig
from llmtrain.launch.sbatch import Job, render

PROJECT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
SITES = sorted(path.stem for path in (PROJECT / "conf/slurm").glob("*.yaml"))

TRAIN = Job(
    verb="train",
    runs=[["--config-dir", "plans", "+experiment=planned", "data.folder=data/mine"]],
    again=["run.intent=fresh_or_resume"],
    name="planned",
    folder=Path("/home/me/llmtrain"),
    log_folder=Path("/home/me/llmtrain/runs/planned/slurm"),
    python="/home/me/llmtrain/.venv/bin/python",
)
VARIANTS = {
    PROJECT / "slurm/train.sbatch": (TRAIN, SlurmConfig(nodes=2, partition="gpu")),
    GOLDEN / "everything.sbatch": (
        replace(TRAIN, runs=[["a=1", "b='x y'"], ["a=2", "b='x y'"]], python="python3", again=[]),
        SlurmConfig(
            nodes=4,
            gpus_per_node=4,
            gpu_type="h100",
            cpus_per_rank=None,
            memory="0",
            exclusive=True,
            time="12:00:00",
            partition="gpu",
            account="proj",
            qos="high",
            constraint="nvlink",
            exclude="gpu[003,017]",
            reservation="week",
            directives=["--mail-type=END"],
            container=ContainerConfig(
                kind=ContainerKind.pyxis, image="/images/it's new.sqsh", mounts=["/data", "/a b:/c"]
            ),
            modules=["cuda/12.4", "gcc"],
            scripts=["/opt/site/nccl env.sh"],
            environment={"NCCL_DEBUG": "WARN", "MESSAGE": "two words, $(none) run"},
            pass_environment=["WANDB_API_KEY", "HOME"],
            signal_lead_s=600,
            max_restarts=3,
            max_failures=0,
            after=[11, 12],
            singleton=True,
            max_array_tasks=1,
        ),
    ),
    GOLDEN / "evaluate.sbatch": (
        replace(TRAIN, verb="evaluate", runs=[["checkpoint=runs/planned"]], again=[], name="evaluate"),
        SlurmConfig(
            after=[7],
            after_end=After.any,
            container=ContainerConfig(
                kind=ContainerKind.apptainer, image="/images/llmtrain.sif", mounts=["/data"]
            ),
        ),
    ),
    GOLDEN / "data.sbatch": (
        replace(TRAIN, verb="data", runs=[["corpus=python_docs"]], again=[], name="data"),
        SlurmConfig(gpus_per_node=0, cpu_ranks_per_node=8, cpus_per_rank=2, requeue=False),
    ),
}


@pytest.mark.parametrize("path", VARIANTS, ids=lambda path: path.stem)
def test_a_script_is_its_golden_text_from_the_first_line_to_the_last(path):
    assert render(*VARIANTS[path]) == path.read_text(encoding="utf-8"), (
        f"if that is meant: {sys.executable} {Path(__file__)} writes the texts anew"
    )


def site(name):
    ConfigStore.instance().store(name="submit_schema", node=SubmitRoot)
    with initialize_config_dir(version_base="1.3", config_dir=str(PROJECT / "conf")):
        root = OmegaConf.to_object(compose("submit", [f"slurm={name}"]))
    assert isinstance(root, SubmitRoot)
    return root.slurm


def scripts():
    return [*(path.stem for path in VARIANTS), *SITES]


def script_of(name):
    for path, variant in VARIANTS.items():
        if path.stem == name:
            return render(*variant)
    return render(TRAIN, site(name))


@pytest.mark.parametrize("name", scripts())
def test_bash_reads_every_script_to_its_end(name):
    done = subprocess.run(["bash", "-n"], input=script_of(name), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck: apt-get install shellcheck")
@pytest.mark.parametrize("name", scripts())
def test_shellcheck_finds_nothing(name):
    done = subprocess.run(
        ["shellcheck", "-"], input=script_of(name), capture_output=True, text=True, check=False
    )
    assert done.stdout == ""


@pytest.mark.parametrize("name", scripts())
def test_lines_for_sbatch_stand_before_the_first_command_and_nowhere_else(name):
    lines = script_of(name).splitlines()
    first = next(at for at, line in enumerate(lines) if not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])
    assert sum(line.startswith("#SBATCH --") for line in lines) >= 10
    assert max(map(len, lines)) <= 250


@pytest.mark.parametrize("name", SITES)
def test_every_site_says_where_its_settings_come_from(name):
    text = (PROJECT / f"conf/slurm/{name}.yaml").read_text(encoding="utf-8")
    comment = " ".join(line[2:] for line in text.splitlines() if line.startswith("# "))
    assert not site(name).environment or re.search(r"github\.com/.*commit [0-9a-f]{7}", comment)


# -- what a script does; srun, scontrol and python only tell how they were called


@pytest.fixture
def world(tmp_path):
    """A folder with a fake srun, scontrol and python, and how to run a script there."""
    return World(tmp_path)


SRUN = """#!{python}
import json, os, sys, time, signal
words = sys.argv[1:]
command = next(at for at, word in enumerate(words) if not word.startswith("--"))
with open({record!r}, "a") as file:
    file.write(json.dumps(["srun", *words]) + "\\n")
if words[command:] == ["true"]:
    sys.exit(int(os.environ.get("PROBE", "0")))
does = os.environ.get("SRUN", "run").split(",")
count = sum(json.loads(line)[:1] == ["srun"] and json.loads(line)[-1] != "true" for line in open({record!r}))
do = does[min(count, len(does)) - 1]
if do in ("again", "never"):
    with open(os.environ["LLMTRAIN_EXIT_FILE"], "w") as file:
        file.write({{"again": "75 SIGTERM\\n", "never": "78\\n"}}[do])
    sys.exit(0 if do == "again" else 1)
if do == "run":
    os.environ["SLURMD_NODENAME"] = "node-a"
    os.execvp(words[command], words[command:])
if do in ("wait", "stay"):
    if do == "wait":
        signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    else:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    open({ready!r}, "w").close()
    time.sleep(60)
sys.exit(int(do))
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf '%s\\n' ${{HOSTS:-node-a node-b}}; exit; fi
{python} -c 'import json, sys; print(json.dumps(["scontrol", *sys.argv[1:]]))' "$@" >> {record}
exit "${{SCONTROL:-0}}"
"""
PYTHON = """#!{python}
import json, os, signal, sys
numbers = (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP)
world = dict(ignored=[each.name for each in numbers if signal.getsignal(each) == signal.SIG_IGN])
world |= dict(threads=os.environ.get("OMP_NUM_THREADS"), said=os.environ.get("MESSAGE"))
with open({record!r}, "a") as file:
    file.write(json.dumps(["python", *sys.argv[1:], world]) + "\\n")
"""


class World:
    def __init__(self, folder):
        self.folder = folder / "it's a folder"
        self.tools = folder / "bin"
        self.record = folder / "record.jsonl"
        self.ready = folder / "ready"
        for path in (self.folder, self.tools, folder / "logs"):
            path.mkdir()
        names = {"python": sys.executable, "record": str(self.record), "ready": str(self.ready)}
        for path, text in (
            (self.tools / "srun", SRUN),
            (self.tools / "scontrol", SCONTROL),
            (self.folder / "python 3", PYTHON),
        ):
            path.write_text(text.format(**names))
            path.chmod(0o755)

    def job(self, *runs, **changes):
        own = {"folder": self.folder, "log_folder": self.folder.parent / "logs"}
        return replace(TRAIN, runs=list(runs), python=str(self.folder / "python 3"), **own | changes)

    def start(self, job, cfg, *words, **environment):
        variables = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2"}
        variables |= {"SLURM_CPUS_ON_NODE": "16", "SLURM_CPUS_PER_TASK": "16", "SLURMD_NODENAME": "node-a"}
        variables |= {"PATH": f"{self.tools}:/usr/bin:/bin", "HOME": "/root"}
        script = self.folder.parent / "script.sbatch"
        script.write_text(render(job, cfg))
        return subprocess.Popen(
            ["bash", script, *words],
            env=variables | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, job, cfg, *words, **environment):
        process = self.start(job, cfg, *words, **environment)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def calls(self, program):
        if not self.record.exists():
            return []
        return [
            call[1:] for call in map(json.loads, self.record.read_text().splitlines()) if call[0] == program
        ]

    def wait(self):
        limit = time.monotonic() + 30
        while not self.ready.exists():
            assert time.monotonic() < limit, "waited in vain"
            time.sleep(0.02)


CPU = SlurmConfig(nodes=2, gpus_per_node=0, cpu_ranks_per_node=2, cpus_per_rank=8, max_failures=2)
HOSTILE_WORDS = [
    "run.name=two words",
    "run.name='it''s \"quoted\"'",
    "x=$(touch planted)",
    "x=`touch planted`",
    "x=${HOME};touch planted",
    "x=a\nb\n#SBATCH --nodes=99\ntouch planted",
    "x=*",
    "x=\\",
    "x=!!&&|<>",
    "-x",
    "",
    "grüße=ß",
]


def test_hostile_words_reach_the_verb_as_they_are_and_run_nothing(world):
    status, output = world.run(world.job(HOSTILE_WORDS), CPU, PATH_OF_RUN="x")
    assert status == 0, output
    (call,) = world.calls("python")
    at = call.index("llmtrain.cli.main")
    assert call[at - 1 : at + 2] == ["-m", "llmtrain.cli.main", "train"]
    assert call[at + 2 : -1] == HOSTILE_WORDS
    assert not list(world.folder.parent.rglob("planted"))


def test_hostile_words_of_an_array_reach_their_own_task(world):
    job = world.job(["x=0"], HOSTILE_WORDS)
    status, output = world.run(job, CPU, SLURM_ARRAY_JOB_ID="40", SLURM_ARRAY_TASK_ID="1")
    assert status == 0, output
    assert world.calls("python")[0][-len(HOSTILE_WORDS) - 1 : -1] == HOSTILE_WORDS
    assert f"--output={world.folder.parent}/logs/40_1.%t.out" in world.calls("srun")[0]
    status, output = world.run(job, CPU, SLURM_ARRAY_JOB_ID="40", SLURM_ARRAY_TASK_ID="2")
    assert (status, output) == (2, "error: no run 2 in this script\n")
    status, output = world.run(job, CPU)
    assert status != 0
    assert "SLURM_ARRAY_TASK_ID: is set in an array of jobs" in output


def test_torchrun_meets_on_the_first_node_and_leaves_usr1_and_term_to_the_ranks(world):
    world.run(world.job(["x=1"]), CPU)
    (call,) = world.calls("python")
    assert call[:4] == ["-m", "torch.distributed.run", "--local-addr", "node-a"]
    assert {"--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d", "--max-restarts=0"} <= set(call[4:-1])
    assert "--rdzv-endpoint=node-a:24242" in call
    assert "--rdzv-id=42.0.0" in call
    ignored = ["SIGUSR1", "SIGTERM"]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup all are born with that
        ignored.append("SIGHUP")
    assert call[-1] == {"ignored": ignored, "threads": "8", "said": None}
    (srun,) = world.calls("srun")
    assert srun[:4] == ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=16", "--cpu-bind=none"]
    assert f"--output={world.folder.parent}/logs/42.%t.out" in srun


def test_a_start_that_is_not_the_first_goes_on_and_meets_elsewhere(world):
    world.run(world.job(["x=1"]), CPU)
    world.run(world.job(["x=1"]), CPU, SLURM_RESTART_COUNT="3")
    world.run(world.job(["x=1"]), CPU, "again")
    first, later, by_hand = world.calls("python")
    assert by_hand[-3:-1] == ["x=1", "run.intent=fresh_or_resume"]
    assert first[-2] == "x=1"
    assert later[-3:-1] == ["x=1", "run.intent=fresh_or_resume"]
    assert "--rdzv-endpoint=node-a:24275" in later
    assert "--rdzv-id=42.3.0" in later


def test_nodes_that_scontrol_does_not_name_end_the_job(world):
    status, output = world.run(world.job(["x=1"]), CPU, HOSTS="node-a")
    assert status == 2
    assert "error: node-[a-b] is 2 nodes, and scontrol names 1" in output
    assert world.calls("srun") == []


def test_after_usr1_the_ranks_leave_and_the_job_stands_in_the_queue(world):
    process = world.start(world.job(["x=1"]), CPU, SRUN="wait")
    world.wait()
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert world.calls("scontrol") == [["requeue", "42"]]
    assert "told to leave; asking Slurm to start this job again" in output
    assert len(world.calls("srun")) == 1


def test_after_term_the_job_ends_and_does_not_come_back(world):
    process = world.start(world.job(["x=1"]), CPU, SRUN="wait")
    world.wait()
    process.send_signal(signal.SIGTERM)
    for pid in children(process.pid):  # Slurm signals the steps itself
        os.kill(pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "ended by Slurm or its user" in output
    assert world.calls("scontrol") == []


def children(pid):
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed if b"srun" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.slow
def test_ranks_that_do_not_leave_in_time_are_left_behind(world):
    process = world.start(world.job(["x=1"]), replace(CPU, signal_lead_s=30), SRUN="stay")
    world.wait()
    process.send_signal(signal.SIGUSR1)
    limit = time.monotonic() + 60
    while not world.calls("scontrol"):
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.1)
    for pid in children(process.pid):
        os.kill(pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert "the run did not leave in time; asking Slurm to start this job again" in output


def test_a_run_that_fails_is_tried_again_and_then_its_status_is_the_jobs(world):
    status, output = world.run(world.job(["x=1"]), CPU, SRUN="7,9,7")
    assert status == 7
    runs = [call for call in world.calls("srun") if call[-1] != "true"]
    assert [call[-1] for call in runs] == ["x=1", "run.intent=fresh_or_resume", "run.intent=fresh_or_resume"]
    assert output.count("srun returned") == 3
    assert [word for call in runs for word in call if word.startswith("--rdzv-id")] == [
        "--rdzv-id=42.0.0",
        "--rdzv-id=42.0.1",
        "--rdzv-id=42.0.2",
    ]
    assert world.calls("scontrol") == []


def test_a_run_that_fails_once_and_then_ends_well_is_a_success(world):
    status, output = world.run(world.job(["x=1"]), CPU, SRUN="1,0")
    assert status == 0
    assert "the run is over" in output


def test_a_run_that_left_stands_in_the_queue_again_within_its_budget(world):
    status, output = world.run(world.job(["x=1"]), CPU, SRUN="again")
    assert status == 0
    assert "the run left before its time was over; asking Slurm to start this job again" in output
    assert world.calls("scontrol") == [["requeue", "42"]]
    status, output = world.run(world.job(["x=1"]), CPU, SRUN="again", SLURM_RESTART_COUNT="100")
    assert status == 1
    assert "not again: it was started again 100 times, and max_restarts=100" in output


def test_a_run_that_says_never_again_ends_the_job(world):
    status, output = world.run(world.job(["x=1"]), CPU, SRUN="never")
    assert status == 78
    assert "the run says that starting it again is no use" in output
    assert len(world.calls("srun")) == 1
    assert world.calls("scontrol") == []


def test_what_one_start_of_the_run_said_is_forgotten_at_the_next(world):
    (world.folder.parent / "logs/42.status").write_text("78\n")
    status, output = world.run(world.job(["x=1"]), CPU, SRUN="1,0")
    assert status == 0
    assert "the run is over" in output


def test_a_node_that_does_not_answer_after_a_failure_sends_the_job_back_to_the_queue(world):
    status, output = world.run(world.job(["x=1"]), CPU, SRUN="143", PROBE="1")
    assert status == 0
    assert "a node does not answer; asking Slurm to start this job again" in output
    assert world.calls("scontrol") == [["requeue", "42"]]


def test_restarts_have_a_budget(world):
    cfg = replace(CPU, max_restarts=2)
    status, output = world.run(world.job(["x=1"]), cfg, SRUN="143", PROBE="1", SLURM_RESTART_COUNT="2")
    assert status == 1
    assert "a node does not answer; not again: it was started again 2 times, and max_restarts=2" in output
    assert world.calls("scontrol") == []
    status, output = world.run(world.job(["x=1"]), cfg, SLURM_RESTART_COUNT="3")
    assert status == 1
    assert "not again: Slurm started it again 3 times, and max_restarts=2" in output
    assert len(world.calls("srun")) == 2, "nothing was started this time"


def test_without_requeue_the_job_ends_with_the_status_of_a_temporary_failure(world):
    cfg = replace(CPU, requeue=False)
    status, output = world.run(world.job(["x=1"]), cfg, SRUN="143", PROBE="1")
    assert status == 75
    assert "a node does not answer; slurm.requeue=false: `sbatch THIS_SCRIPT again` goes on" in output
    assert world.calls("scontrol") == []


@pytest.mark.slow
def test_a_slurm_that_does_not_take_the_job_back_is_asked_again_and_then_told(world):
    status, output = world.run(world.job(["x=1"]), CPU, SRUN="143", PROBE="1", SCONTROL="1")
    assert status == 75
    assert "Slurm does not take the job back; `sbatch THIS_SCRIPT again` goes on" in output
    assert world.calls("scontrol") == [["requeue", "42"]] * 6


def test_other_verbs_are_one_process_and_get_their_words(world):
    for verb in ("data", "evaluate"):
        job = world.job(HOSTILE_WORDS, verb=verb, again=[])
        status, output = world.run(job, replace(CPU, nodes=1), SLURM_JOB_NUM_NODES="1")
        assert status == 0, output
        assert world.calls("python")[-1][:-1] == ["-m", "llmtrain.cli.main", verb, *HOSTILE_WORDS]


def test_variables_and_scripts_of_the_site_arrive_and_a_missing_script_ends_the_job(world):
    hostile = "two words; $(touch planted) 'x' \"y\""
    site_script = world.folder / "site's.sh"
    site_script.write_text('export OMP_PROC_BIND=$UNSET_SO_FAR MESSAGE="$MESSAGE!"\nfalse\n')
    cfg = replace(CPU, environment={"MESSAGE": hostile}, scripts=[str(site_script)])
    status, output = world.run(world.job(["x=1"]), cfg)
    assert status != 0, "its last command failed"
    site_script.write_text('export OMP_PROC_BIND=$UNSET_SO_FAR MESSAGE="$MESSAGE!"\n')
    status, output = world.run(world.job(["x=1"]), cfg)
    assert status == 0, output
    assert world.calls("python")[-1][-1]["said"] == hostile + "!"
    site_script.unlink()
    status, output = world.run(world.job(["x=1"]), cfg)
    assert status == 1
    assert "No such file" in output
    assert not list(world.folder.parent.rglob("planted"))


def test_a_container_gets_the_project_and_what_is_mounted(world):
    image = "/images/it's $(touch planted).sqsh"
    mounts = ["/a b:/c", "/d;touch planted"]
    kinds = {kind: ContainerConfig(kind=kind, image=image, mounts=mounts) for kind in list(ContainerKind)[1:]}
    world.run(world.job(["x=1"]), replace(CPU, container=kinds[ContainerKind.pyxis]))
    (srun,) = world.calls("srun")
    assert f"--container-image={image}" in srun
    assert f"--container-workdir={world.folder}" in srun
    assert f"--container-mounts={world.folder}:{world.folder},/a b:/c,/d;touch planted" in srun
    (world.tools / "apptainer").symlink_to("/bin/true")
    world.run(world.job(["x=1"]), replace(CPU, container=kinds[ContainerKind.apptainer]))
    srun = world.calls("srun")[-1]
    at = srun.index("apptainer")
    assert srun[at : at + 7] == [
        "apptainer", "exec", "--pwd", str(world.folder), "--bind",
        f"{world.folder}:{world.folder},/a b:/c,/d;touch planted", image,
    ]  # fmt: skip
    assert not list(world.folder.parent.rglob("planted"))


def test_a_gpu_job_in_apptainer_sees_the_gpus():
    cfg = SlurmConfig(container=ContainerConfig(kind=ContainerKind.apptainer, image="/x.sif"))
    assert "apptainer exec --nv " in render(TRAIN, cfg)


def test_the_modules_of_a_site_are_loaded_in_order(world, tmp_path):
    cfg = replace(CPU, modules=["cuda/12.4", "a b"])
    text = render(world.job(["x=1"]), cfg)
    loads = [
        shlex.split(line.removesuffix(" || exit 1"))
        for line in text.splitlines()
        if line.startswith("module ")
    ]
    assert loads == [["module", "load", "cuda/12.4", "a b"]]
    status, output = world.run(world.job(["x=1"]), cfg)
    assert status == 1, "there is no `module` here"
    assert "module: command not found" in output


if __name__ == "__main__":
    for golden, drawn in VARIANTS.items():
        golden.write_text(render(*drawn), encoding="utf-8")
