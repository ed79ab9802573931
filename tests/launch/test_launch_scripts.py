"""The torchrun scripts, with a torchrun that only tells how it was called."""

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "launch"
MULTI = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500", "NPROC": "4"}


@pytest.fixture
def launch(tmp_path):
    """Run a script from a copy of the project whose .venv holds the telling torchrun."""
    shutil.copytree(SCRIPTS, tmp_path / "launch")
    tools = tmp_path / ".venv/bin"
    tools.mkdir(parents=True)
    write_tool(tools / "torchrun", 'echo "threads=$OMP_NUM_THREADS $*"')
    write_tool(
        tools / "python", 'echo "error: as told, for $WORLD_SIZE ranks: $*" >&2; exit ${CHECK_STATUS:-0}'
    )

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
        "--standalone --shutdown-timeout 120 --nproc-per-node 2 "
        "-m llmtrain.cli.main train +experiment=demo run.name=x"
    )


def test_a_mistake_is_told_once_and_starts_no_rank(launch):
    done = launch("single_node.sh", "+experiment=demo", CHECK_STATUS="2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: as told, for 2 ranks: -m llmtrain.cli.main train +experiment=demo check_only=true\n"
    )


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


def test_a_taken_port_is_an_error_before_anything_starts(launch, taken_port):
    done = launch("single_node.sh", MASTER_PORT=taken_port)
    assert done.returncode == 2
    assert (
        f"error: MASTER_PORT={taken_port} is taken on this machine; name another, or unset it" in done.stderr
    )
    assert done.stdout == ""
    done = launch("multi_node.sh", **(MULTI | {"NODE_RANK": "0", "MASTER_PORT": taken_port}))
    assert done.returncode == 2
    assert f"error: MASTER_PORT={taken_port} is taken on this machine; name another, the same" in done.stderr


def test_multi_node_passes_its_place_on(launch):
    done = launch("multi_node.sh", "+experiment=demo", **MULTI)
    _, _, arguments = done.stdout.strip().partition(" ")
    assert arguments == (
        "--shutdown-timeout 120 --nnodes 2 --node-rank 1 --nproc-per-node 4 "
        "--master-addr node0 --master-port 29500 "
        "-m llmtrain.cli.main train +experiment=demo"
    )


def test_multi_node_takes_the_gpus_of_its_machine(launch):
    places = {name: value for name, value in MULTI.items() if name != "NPROC"}
    assert "--nproc-per-node 8 " in launch("multi_node.sh", num_gpus=8, **places).stdout
    none = launch("multi_node.sh", **places)
    assert none.returncode == 2
    assert "error: nvidia-smi lists no GPU on this machine; set NPROC" in none.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"NNODES": "", "MASTER_ADDR": ""}, "error: set NNODES MASTER_ADDR; for example: NNODES=2"),
        ({"NODE_RANK": "first"}, "error: NODE_RANK=first must be a number"),
        ({"NODE_RANK": "2"}, "error: NODE_RANK=2 must be below NNODES=2: machines are numbered from 0"),
        ({"NPROC": "0"}, "error: NPROC=0 must be a number of processes, 1 or more"),
    ],
)
def test_multi_node_says_what_is_missing_or_wrong(launch, changes, message):
    done = launch("multi_node.sh", **(MULTI | changes))
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""


def test_single_node_refuses_a_bad_count(launch):
    done = launch("single_node.sh", NPROC="two")
    assert done.returncode == 2
    assert "error: NPROC=two must be a number of processes, 1 or more" in done.stderr


@pytest.mark.parametrize("script", ["single_node.sh", "multi_node.sh"])
def test_without_torchrun_it_says_how_to_get_one(launch, tmp_path, script):
    (tmp_path / ".venv/bin/torchrun").unlink()
    done = launch(script, **MULTI)
    assert done.returncode == 2
    assert "error: no torchrun in" in done.stderr
    assert "make setup" in done.stderr
