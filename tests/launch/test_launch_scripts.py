"""The launch scripts, with a python that only tells how it was called. tests/hosts runs them for real."""

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "launch"
MULTI = {"NNODES": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29500", "NPROC": "4"}
STATIC = MULTI | {"NODE_RANK": "1"}
ELASTIC = MULTI | {"NNODES": "2:4"}
PYTHON = """
case $2 in
    llmtrain.cli.launcher) echo "threads=$OMP_NUM_THREADS ${*:3}" ;;
    *) echo "error: as told, for ${WORLD_SIZE:-no} ranks: $*" >&2; exit ${CHECK_STATUS:-0} ;;
esac
"""


@pytest.fixture
def launch(tmp_path):
    """Run a script from a copy of the project whose .venv holds the telling python."""
    shutil.copytree(SCRIPTS, tmp_path / "launch")
    tools = tmp_path / ".venv/bin"
    tools.mkdir(parents=True)
    write_tool(tools / "torchrun", "exit 9")
    write_tool(tools / "python", PYTHON)

    def run(script, *arguments, num_gpus=0, **environment):
        path = tmp_path / "bin"
        path.mkdir(exist_ok=True)
        write_tool(path / "nvidia-smi", f"for i in $(seq {num_gpus}); do echo GPU $i: fake; done")
        kept = {name: value for name, value in os.environ.items() if name in ("HOME", "LANG")}
        return subprocess.run(
            [tmp_path / "launch" / script, *arguments],
            env=kept | {"PATH": f"{path}:/usr/bin:/bin"} | environment,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )

    return run


def write_tool(path, body):
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def taken_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield str(listener.getsockname()[1])


def test_single_node_without_a_gpu_starts_two_processes(launch):
    done = launch("single_node.sh", "+experiment=demo", "run.name=x")
    _, _, arguments = done.stdout.strip().partition(" ")
    assert arguments == (
        "torch.distributed.run --shutdown-timeout 120 --standalone --nproc-per-node 2 "
        "-m llmtrain.cli.main train +experiment=demo run.name=x"
    )


def test_a_mistake_is_told_once_and_starts_no_rank(launch):
    done = launch("single_node.sh", "+experiment=demo", CHECK_STATUS="2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: as told, for 2 ranks: -m llmtrain.cli.main train +experiment=demo check_only=true\n"
    )


def test_one_gpu_is_one_process_whatever_is_there(launch):
    done = launch("one_gpu.sh", "+experiment=demo", num_gpus=8)
    assert "--standalone --nproc-per-node 1 -m llmtrain.cli.main train +experiment=demo" in done.stdout


def test_single_node_starts_a_process_a_gpu(launch):
    assert "--nproc-per-node 8 " in launch("single_node.sh", num_gpus=8).stdout


def test_single_node_obeys_nproc_before_gpus(launch):
    assert "--nproc-per-node 3 " in launch("single_node.sh", num_gpus=8, NPROC="3").stdout


def test_processes_times_threads_never_exceed_the_cores_unless_there_are_more_processes(launch):
    cores = len(os.sched_getaffinity(0))
    for num_processes in (1, 2, 64):
        done = launch("single_node.sh", NPROC=str(num_processes))
        assert f"threads={max(1, cores // num_processes)} " in done.stdout


def test_threads_that_the_user_sets_are_kept(launch):
    assert "threads=7 " in launch("single_node.sh", OMP_NUM_THREADS="7").stdout


def test_an_argument_with_spaces_arrives_whole(launch):
    done = launch("single_node.sh", "run.name='a b'")
    assert "train run.name='a b'" in done.stdout


def test_single_node_takes_a_port(launch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    done = launch("single_node.sh", MASTER_PORT=port)
    assert f"--nnodes 1 --master-addr 127.0.0.1 --master-port {port} " in done.stdout


@pytest.mark.parametrize(
    ("script", "environment"),
    [("single_node.sh", {}), ("multi_node.sh", STATIC | {"NODE_RANK": "0"})],
)
def test_a_taken_port_is_an_error_before_anything_starts(launch, taken_port, script, environment):
    done = launch(script, **(environment | {"MASTER_PORT": taken_port}))
    assert done.returncode == 2
    assert f"error: MASTER_PORT={taken_port} is taken on this machine; name another, " in done.stderr
    assert done.stdout == ""


def test_multi_node_is_the_same_line_on_every_machine(launch):
    done = launch("multi_node.sh", "+experiment=demo", **MULTI)
    _, _, arguments = done.stdout.strip().partition(" ")
    assert arguments == (
        "torch.distributed.run --shutdown-timeout 120 --nnodes 2 "
        "--rdzv-backend c10d --rdzv-endpoint node0:29500 --rdzv-id llmtrain --nproc-per-node 4 "
        "-m llmtrain.cli.main train +experiment=demo"
    )
    named = launch("multi_node.sh", RUN_ID="second", LOCAL_ADDR="10.0.0.7", **MULTI).stdout
    assert "--rdzv-id second --local-addr 10.0.0.7 " in named


def test_multi_node_takes_a_number_for_this_machine(launch):
    done = launch("multi_node.sh", "+experiment=demo", **STATIC)
    assert (
        "--nnodes 2 --node-rank 1 --master-addr node0 --master-port 29500 --nproc-per-node 4 " in done.stdout
    )


@pytest.mark.parametrize(
    ("script", "environment"), [("multi_node.sh", MULTI), ("multi_node.sh", STATIC), ("elastic.sh", ELASTIC)]
)
def test_of_many_machines_each_takes_its_own_gpus(launch, script, environment):
    places = {name: value for name, value in environment.items() if name != "NPROC"}
    assert "--nproc-per-node 8 " in launch(script, num_gpus=8, **places).stdout
    none = launch(script, **places)
    assert none.returncode == 2
    assert "error: nvidia-smi lists no GPU on this machine; set NPROC" in none.stderr


def test_elastic_checks_every_number_of_machines_and_then_starts(launch):
    done = launch("elastic.sh", "+experiment=demo", RDZV_CONF="last_call_timeout=9", **ELASTIC)
    words = "+experiment=demo run.intent=fresh_or_resume"
    assert f"for no ranks: -m llmtrain.cli.elastic 2:4 4 {words}\n" in done.stderr
    _, _, arguments = done.stdout.strip().partition(" ")
    assert arguments == (
        "--rejoin torch.distributed.run --shutdown-timeout 120 --nnodes 2:4 --rdzv-backend c10d "
        "--rdzv-endpoint node0:29500 --rdzv-id llmtrain --rdzv-conf last_call_timeout=9 --max-restarts 100 "
        f"--nproc-per-node 4 -m llmtrain.cli.main train {words}"
    )
    refused = launch("elastic.sh", "+experiment=demo", CHECK_STATUS="2", **ELASTIC)
    assert (refused.returncode, refused.stdout) == (2, "")


def test_accelerate_on_one_machine_and_on_many(launch):
    done = launch("accelerate.sh", "+experiment=demo")
    _, _, arguments = done.stdout.strip().partition(" ")
    assert arguments == (
        "accelerate.commands.launch --multi_gpu --num_machines 1 --main_process_port 0 --num_processes 2 "
        "--mixed_precision no --dynamo_backend no -m llmtrain.cli.main train +experiment=demo"
    )
    many = launch("accelerate.sh", **STATIC).stdout
    assert "--num_machines 2 --machine_rank 1 --main_process_ip node0 --main_process_port 29500 " in many
    assert "--num_processes 8 " in many


@pytest.mark.parametrize(
    ("script", "environment", "message"),
    [
        ("multi_node.sh", {"NNODES": "", "MASTER_ADDR": ""}, "error: set NNODES MASTER_ADDR; for example"),
        ("multi_node.sh", {"NODE_RANK": "first"}, "error: NODE_RANK=first must be a number, 0 or more"),
        ("multi_node.sh", {"NODE_RANK": "2"}, "error: NODE_RANK=2 must be below NNODES=2: machines"),
        ("multi_node.sh", {"NNODES": "1:2"}, "error: NNODES=1:2 must be a number, 1 or more"),
        ("multi_node.sh", {"NPROC": "0"}, "error: NPROC=0 must be a number, 1 or more"),
        ("single_node.sh", {"NPROC": "two"}, "error: NPROC=two must be a number, 1 or more"),
        ("elastic.sh", {"NNODES": "2"}, "error: NNODES=2 must be MIN:MAX, as in 2:4"),
        ("elastic.sh", {"NNODES": "1:2", "MAX_RESTARTS": "x"}, "error: MAX_RESTARTS=x must be a number"),
        ("accelerate.sh", {"NODE_RANK": ""}, "error: set NODE_RANK; for example: NNODES=2 NODE_RANK=0"),
        ("accelerate.sh", {"NNODES": "1", "NPROC": "1"}, "error: NPROC=1 leaves accelerate nothing to"),
    ],
)  # fmt: skip
def test_a_script_says_what_is_missing_or_wrong(launch, script, environment, message):
    environment = MULTI | environment
    if script == "single_node.sh":
        environment.pop("MASTER_PORT")
    done = launch(script, **environment)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""


def test_elastic_sets_the_intent_itself(launch):
    done = launch("elastic.sh", "run.intent=fresh", **ELASTIC)
    assert done.returncode == 2
    assert "error: leave run.intent out: elastic runs start with run.intent=fresh_or_resume" in done.stderr


@pytest.mark.parametrize("script", ["single_node.sh", "multi_node.sh", "elastic.sh", "accelerate.sh"])
def test_without_torchrun_it_says_how_to_get_one(launch, tmp_path, script):
    (tmp_path / ".venv/bin/torchrun").unlink()
    done = launch(script, **MULTI)
    assert done.returncode == 2
    assert "error: no torchrun in" in done.stderr
    assert "make setup" in done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck: apt-get install shellcheck")
def test_shellcheck_finds_nothing():
    scripts = sorted(SCRIPTS.glob("*.sh"))
    done = subprocess.run(
        ["shellcheck", "-x", *scripts], cwd=SCRIPTS.parent, capture_output=True, text=True, check=False
    )
    assert done.stdout == ""
