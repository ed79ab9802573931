"""What is made of the answers of hosts, and what this machine answers."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from llmtrain.errors import ConfigError, DataError
from llmtrain.launch.preflight import host as host_module
from llmtrain.launch.preflight.config import PreflightConfig
from llmtrain.launch.preflight.findings import (
    AllReduce,
    Answers,
    Clock,
    Details,
    Group,
    Level,
    Link,
    Needs,
    RankAnswer,
    Report,
    hosts_of,
    spans,
    wrong,
)
from llmtrain.launch.preflight.gpus import Gpu, Gpus, list_gpus
from llmtrain.launch.preflight.host import (
    Data,
    Folder,
    FolderAsked,
    Host,
    Lookup,
    Network,
    Place,
    Scheduler,
    Speed,
    ask_host,
    code_hashes,
    measure_reading,
    measure_storage,
    remove_token,
    sees,
    within,
    write_token,
)
from llmtrain.launch.preflight.judge import judge
from llmtrain.launch.preflight.network import before_meeting, interfaces_of, slow_links

GIB = 1 << 30
FAST = Speed(num_bytes=16 << 20, seconds=0.02)


def place(rank: int, host: str, *, ranks_per_host: int, world_size: int) -> Place:
    return Place(
        host=host,
        machine=f"machine of {host}",
        rank=rank,
        world_size=world_size,
        local_rank=rank % ranks_per_host,
        local_world_size=ranks_per_host,
        agent=None,
        has_launcher=True,
        master_addr="a",
        agent_keeps_store=False,
        scheduler=None,
    )


def network(at: int, host: str) -> Network:
    return Network(
        interfaces={"lo": ("127.0.0.1",), "eth0": (f"10.0.0.{at + 1}",), "docker0": ("172.17.0.1",)},
        own=Lookup(name=host, addresses=(f"10.0.0.{at + 1}",), seconds=0.001),
        master=Lookup(name="a", addresses=("10.0.0.1",), seconds=0.001),
        chosen={},
    )


def gpu(index: int, host: str) -> Gpu:
    return Gpu(
        index=index,
        uuid=f"GPU-{host}{index}",
        name="NVIDIA H100 80GB HBM3",
        driver="550.54.15",
        memory_bytes=80 * GIB,
        used_bytes=GIB,
        celsius=30,
        uncorrected_errors=0,
        repair_is_pending=False,
        repair_failed=False,
        throttled=(),
    )


def answers(hosts: str = "abc", ranks_per_host: int = 2) -> Answers:
    """Healthy ones: GPUs, a shared run folder, a data folder, all measured."""
    world_size = len(hosts) * ranks_per_host
    ranks = [
        RankAnswer(
            place=place(rank, host, ranks_per_host=ranks_per_host, world_size=world_size),
            preflight=PreflightConfig(),
            code="c0de" * 16,
            versions={"python": "3.11.9", "torch": "2.13.0"},
            config="cf9" * 21,
            expected_ranks=world_size,
            gpu=f"{host}{rank % ranks_per_host}",
            max_open_files=65536,
        )
        for rank, host in enumerate(host for host in hosts for _ in range(ranks_per_host))
    ]
    told = {
        at * ranks_per_host: Host(
            network=network(at, name),
            folders=[
                Folder(
                    setting="run.folder",
                    path="runs/x",
                    looked_at="/shared/runs",
                    free_bytes=900 * GIB,
                    free_inodes=10**8,
                    sees_token=True,
                    write=FAST,
                    read=FAST,
                )
            ],
            data=[
                Data(
                    setting="data.folder",
                    path="data/x",
                    manifest_hash="d" * 64,
                    tokenizer="e" * 64,
                    read=FAST,
                )
            ],
            gpus=Gpus(gpus=tuple(gpu(index, name) for index in range(ranks_per_host))),
            free_shared_memory_bytes=64 * GIB,
            free_memory_bytes=512 * GIB,
            num_cores=64,
            max_locked_bytes=None,
            has_infiniband=True,
        )
        for at, name in enumerate(hosts)
    }
    links = [
        Link(source=source, target=target, speed=Speed(num_bytes=1 << 26, seconds=0.002))
        for source in range(world_size)
        for target in range(world_size)
        if source != target
    ]
    return Answers(
        ranks=ranks,
        hosts=told,
        needs=Needs(checkpoint_bytes=100 * GIB, open_files=400, uses_gpus=True),
        clocks={rank: Clock(ahead_s=0.0004, bound_s=0.001) for rank in told},
        all_reduce=[AllReduce(num_bytes=1 << 26, seconds=0.004, num_wrong=0)] * world_size,
        links=links,
    )


def with_rank(told: Answers, rank: int, **changes: object) -> Answers:
    ranks = list(told.ranks)
    ranks[rank] = replace(ranks[rank], **changes)
    return replace(told, ranks=ranks)


def with_place(told: Answers, at: int, **changes: object) -> Answers:
    return with_rank(told, at, place=replace(told.ranks[at].place, **changes))


def under_torchrun(told: Answers, scheduler: Scheduler) -> Answers:
    """One torchrun a host, of two ranks each."""
    for rank in range(len(told.ranks)):
        told = with_place(told, rank, agent=str(rank // 2), scheduler=scheduler)
    return told


def with_host(told: Answers, rank: int, **changes: object) -> Answers:
    return replace(told, hosts={**told.hosts, rank: replace(told.hosts[rank], **changes)})


def with_folder(told: Answers, rank: int, **changes: object) -> Answers:
    return with_host(told, rank, folders=[replace(told.hosts[rank].folders[0], **changes)])


def with_data(told: Answers, rank: int, **changes: object) -> Answers:
    return with_host(told, rank, data=[replace(told.hosts[rank].data[0], **changes)])


def with_network(told: Answers, rank: int, **changes: object) -> Answers:
    return with_host(told, rank, network=replace(told.hosts[rank].network, **changes))


def with_gpu(told: Answers, rank: int, index: int, **changes: object) -> Answers:
    gpus = list(told.hosts[rank].gpus.gpus)
    gpus[index] = replace(gpus[index], **changes)
    return with_host(told, rank, gpus=Gpus(gpus=tuple(gpus)))


def own_name(host: str, *addresses: str) -> Lookup:
    return Lookup(name=host, addresses=addresses, seconds=0.001, error=None if addresses else "unknown")


def bad(told: Answers, **settings: object) -> list[tuple[str, str]]:
    """(level, text) of everything that is not good."""
    found = judge(told, PreflightConfig(**settings))
    assert all(each.remedy for each in found if each.level is not Level.ok), "no remedy"
    return [(each.level.name, str(each)) for each in found if each.level is not Level.ok]


@pytest.mark.parametrize(("hosts", "ranks_per_host"), [("a", 1), ("a", 4), ("ab", 1), ("abcdefgh", 8)])
def test_nothing_is_wrong_with_healthy_hosts(hosts: str, ranks_per_host: int) -> None:
    assert bad(answers(hosts, ranks_per_host)) == []


def test_good_findings_carry_the_figures() -> None:
    said = "\n".join(map(str, judge(answers("ab"), PreflightConfig())))
    for part in (
        "4 ranks on 2 hosts",
        "a (ranks 0-1): run.folder=runs/x: 900 GiB free, writes 839 MB/s, reads 839 MB/s",
        "b (ranks 2-3): data.folder=data/x: reads 839 MB/s",
        "a (ranks 0-1): 2 x NVIDIA H100 80GB HBM3, driver 550.54.15",
        "all-reduce of 64 MiB in 4 ms: 16.8 GB/s, bus 25.2 GB/s",  # 2 * 3 / 4 of it
        "clocks differ by at most 1 ms",
    ):
        assert part in said


SLURM = Scheduler(nodes=3, tasks=None, node="a")
WRONG = {
    "a rank twice": (
        lambda told: with_place(told, 3, rank=2),
        "error",
        ["b: 2 of 6 processes have RANK=2, and nobody has RANK 3"],
    ),
    "another world size": (
        lambda told: with_place(told, 5, world_size=8),
        "error",
        ["c (rank 5): WORLD_SIZE=8, and 6 ranks are there"],
    ),
    "fewer ranks than said": (
        lambda told: with_place(with_place(told, 4, local_world_size=8), 5, local_world_size=8),
        "error",
        ["c (ranks 4-5): 2 ranks there, and LOCAL_WORLD_SIZE=8", "--nproc-per-node"],
    ),
    "idle nodes": (
        lambda told: with_place(told, 0, scheduler=replace(SLURM, nodes=4)),
        "error",
        ["Slurm gave 4 nodes, and 6 ranks run on 3 hosts: a, b, c", "preflight.idle_nodes=true"],
    ),
    "tasks": (
        lambda told: with_place(told, 0, scheduler=replace(SLURM, tasks=12)),
        "error",
        ["srun started 12 tasks, and this run has 6 ranks", "llmtrain submit"],
    ),
    "tasks of torchrun": (
        lambda told: under_torchrun(told, replace(SLURM, tasks=6)),
        "error",
        ["srun started 6 tasks x 2 processes, and this run has 6 ranks"],
    ),
    "another plan": (
        lambda told: with_rank(told, 0, expected_ranks=16),
        "error",
        ["parallel.world_size=16, but 6 ranks were launched; launch 16, or set parallel.world_size=null"],
    ),
    "one GPU for two": (
        lambda told: with_rank(told, 3, gpu="b0"),
        "error",
        ["b (ranks 2-3): 2 ranks use the same GPU, b0", "CUDA_VISIBLE_DEVICES"],
    ),
    "other code": (
        lambda told: with_rank(told, 3, code="badc" * 16),
        "error",
        ["b (rank 3): other files of llmtrain than elsewhere (hash badcbadcbadc)", "one shared folder"],
    ),
    "another version": (
        lambda told: with_rank(told, 4, versions={"python": "3.11.9", "torch": "2.12.0"}),
        "error",
        ["c (rank 4): torch 2.12.0, and 2.13.0 elsewhere", "install the same versions"],
    ),
    "other settings": (
        lambda told: with_rank(told, 2, config="0dd" * 21),
        "error",
        ["b (rank 2): other settings than elsewhere (hash 0dd0dd0dd0dd)", "the same command line"],
    ),
    "other data": (
        lambda told: with_data(told, 2, manifest_hash="f" * 64),
        "error",
        ["b (ranks 2-3): manifest.json of data.folder=data/x has the hash ffffffffffff, and dddddddddddd"],
    ),
    "no data": (
        lambda told: with_data(told, 4, manifest_hash=None, tokenizer=None),
        "error",
        ["c (ranks 4-5): data.folder=data/x has no manifest.json, and has one elsewhere", "mount"],
    ),
    "another tokenizer": (
        lambda told: with_data(told, 2, manifest_hash="f" * 64, tokenizer="0" * 64),
        "error",
        ["b (ranks 2-3): the tokenizer of data.folder=data/x has the fingerprint 000000000000"],
    ),
    "a dead file system": (
        lambda told: with_host(told, 2, failures={"run.folder=/shared": "no answer in 30 s"}),
        "error",
        ["b (ranks 2-3): run.folder=/shared: no answer in 30 s", "mounted"],
    ),
    "a driver that hangs": (
        lambda told: with_host(told, 2, failures={"GPUs": "no answer in 30 s"}, gpus=None),
        "warning",
        ["b (ranks 2-3): GPUs: no answer in 30 s", "llmtrain doctor"],
    ),
    "MASTER_ADDR is loopback": (
        lambda told: with_network(told, 0, master=own_name("a", "127.0.1.1")),
        "error",
        ["a (ranks 0-1): MASTER_ADDR=a is 127.0.1.1, the host itself", "/etc/hosts (127.0.1.1"],
    ),
    "MASTER_ADDR is another host": (
        lambda told: with_network(told, 4, master=own_name("a", "10.0.0.2")),
        "error",
        ["c (ranks 4-5): MASTER_ADDR=a is 10.0.0.2 there, b's, and rank 0 runs on a"],
    ),
    "MASTER_ADDR is nobody": (
        lambda told: with_network(told, 4, master=own_name("a", "10.9.9.9")),
        "warning",
        ["c (ranks 4-5): MASTER_ADDR=a is 10.9.9.9 there, no address of any host", "forwards it"],
    ),
    "MASTER_ADDR is unknown": (
        lambda told: with_network(told, 4, master=own_name("a")),
        "error",
        ["c (ranks 4-5): MASTER_ADDR=a does not resolve: unknown", "a name that every host knows"],
    ),
    "own name is loopback": (
        lambda told: with_network(told, 2, own=own_name("b", "127.0.1.1")),
        "error",
        ["b (ranks 2-3): its own name, b, is 127.0.1.1: gloo would use loopback", "GLOO_SOCKET_IFNAME=eth0"],
    ),
    "own name is unknown": (
        lambda told: with_network(told, 2, own=own_name("b")),
        "error",
        ["b (ranks 2-3): its own name, b, is no address (unknown): gloo would use loopback"],
    ),
    "own name is another host's": (
        lambda told: with_network(told, 2, own=own_name("b", "10.0.0.9")),
        "error",
        ["b (ranks 2-3): its own name, b, is 10.0.0.9: gloo would use loopback"],
    ),
    "an interface that is not there": (
        lambda told: with_network(told, 2, chosen={"NCCL_SOCKET_IFNAME": "ib"}),
        "error",
        ["b (ranks 2-3): NCCL_SOCKET_IFNAME=ib names no interface", "there are lo eth0 docker0"],
    ),
    "the loopback interface": (
        lambda told: with_network(told, 2, chosen={"GLOO_SOCKET_IFNAME": "lo"}),
        "error",
        ["b (ranks 2-3): GLOO_SOCKET_IFNAME=lo names the loopback interface"],
    ),
    "slow names": (
        lambda told: with_network(
            told, 2, own=Lookup(name="b", addresses=("10.0.0.2",), seconds=10.04, error=None)
        ),
        "warning",
        ["b (ranks 2-3): resolving b took 10.0 s", "/etc/resolv.conf"],
    ),
    "a clock ahead": (
        lambda told: replace(told, clocks={**told.clocks, 2: Clock(ahead_s=3.2, bound_s=0.004)}),
        "warning",
        ["b (ranks 2-3): its clock is 3.200 s (±0.004) ahead of that of rank 0's host", "chrony"],
    ),
    "a clock behind": (
        lambda told: replace(told, clocks={**told.clocks, 4: Clock(ahead_s=-2, bound_s=0.5)}),
        "warning",
        ["c (ranks 4-5): its clock is 2.000 s (±0.500) behind"],
    ),
    "a folder of its own": (
        lambda told: with_folder(told, 2, sees_token=False, looked_at="/local"),
        "error",
        [
            "b (ranks 2-3): run.folder=runs/x is not the folder that rank 0 sees",
            "does not appear in /local; put run.folder on a file system that all hosts share",
        ],
    ),
    "a folder that cannot be written": (
        lambda told: with_folder(told, 2, is_writable=False),
        "error",
        ["b (ranks 2-3): run.folder=runs/x cannot be written: /shared/runs"],
    ),
    "a full disk": (
        lambda told: with_folder(told, 0, free_bytes=90 * GIB),
        "error",
        ["a (ranks 0-1): run.folder=runs/x has 90 GiB free, and one checkpoint takes 100 GiB"],
    ),
    "no inodes": (
        lambda told: with_folder(told, 2, free_inodes=12),
        "warning",
        ["b (ranks 2-3): run.folder=runs/x can take 12 more files", "df -i"],
    ),
    "slow writing": (
        lambda told: with_folder(told, 4, write=Speed(num_bytes=5 << 20, seconds=0.5)),
        "warning",
        ["c (ranks 4-5): writing to run.folder goes at 10 MB/s (5 MiB in 500 ms), and 800 MiB/s is the"],
    ),
    "slower reading than elsewhere": (
        lambda told: with_data(told, 4, read=Speed(num_bytes=16 << 20, seconds=0.2)),
        "warning",
        ["c (ranks 4-5): reading from data.folder goes at 84 MB/s (16 MiB in 200 ms), and 800 MiB/s is"],
    ),
    "few open files": (
        lambda told: with_rank(told, 3, max_open_files=256),
        "warning",
        ["b (ranks 2-3): a process may open 256 files, and a rank may need 400", "ulimit -n"],
    ),
    "fewer open files than ranks": (
        lambda told: with_rank(told, 3, max_open_files=4),
        "error",
        ["b (ranks 2-3): a process may open 4 files"],
    ),
    "a container's shared memory": (
        lambda told: with_host(told, 2, free_shared_memory_bytes=64 << 20),
        "warning",
        ["b (ranks 2-3): /dev/shm has 64 MiB free for 2 ranks", "--shm-size"],
    ),
    "locked memory": (
        lambda told: with_host(told, 2, max_locked_bytes=8 << 20),
        "warning",
        ["b (ranks 2-3): a process may lock 8 MiB of memory, and InfiniBand", "ulimit -l unlimited"],
    ),
    "one core": (
        lambda told: with_host(told, 2, num_cores=1),
        "warning",
        ["b (ranks 2-3): 2 ranks share 1 core", "slurm.cpus_per_rank"],
    ),
    "a lost GPU": (
        lambda told: with_host(told, 2, gpus=Gpus(gpus=(gpu(0, "b"),))),
        "error",
        ["b (ranks 2-3): 1 GPU for 2 ranks", "nvidia-smi -L"],
    ),
    "a broken driver": (
        lambda told: with_host(told, 2, gpus=Gpus(gpus=(), missing="nvidia-smi fails: x", is_broken=True)),
        "warning",
        ["b (ranks 2-3): nvidia-smi fails: x; reload the driver"],
    ),
    "memory errors": (
        lambda told: with_gpu(told, 2, 1, uncorrected_errors=3),
        "error",
        ["b (ranks 2-3): GPU 1 (GPU-b1) had 3 uncorrected memory errors", "nvidia-smi -r"],
    ),
    "a repair that failed": (
        lambda told: with_gpu(told, 2, 1, repair_failed=True, repair_is_pending=True),
        "error",
        ["b (ranks 2-3): GPU 1 (GPU-b1) could not replace a broken row", "have the GPU replaced"],
    ),
    "a repair to come": (
        lambda told: with_gpu(told, 2, 0, repair_is_pending=True),
        "warning",
        ["b (ranks 2-3): GPU 0 (GPU-b0) will replace a broken row"],
    ),
    "heat": (
        lambda told: with_gpu(told, 2, 1, celsius=88),
        "warning",
        ["b (ranks 2-3): GPU 1 (GPU-b1) is at 88 °C", "cooling"],
    ),
    "throttling": (
        lambda told: with_gpu(told, 2, 1, throttled=("slowed down by hardware", "too hot")),
        "warning",
        ["b (ranks 2-3): GPU 1 (GPU-b1) is slowed down by hardware and too hot", "PERFORMANCE"],
    ),
    "someone else": (
        lambda told: with_gpu(told, 2, 1, used_bytes=40 * GIB),
        "warning",
        ["b (ranks 2-3): GPU 1 (GPU-b1) has 40 GiB of its memory in use", "fuser"],
    ),
    "another GPU": (
        lambda told: with_gpu(told, 4, 0, name="NVIDIA A100"),
        "warning",
        ["c (ranks 4-5): NVIDIA A100, and NVIDIA H100 80GB HBM3 elsewhere", "slurm.constraint"],
    ),
    "another driver": (
        lambda told: with_gpu(with_gpu(told, 4, 0, driver="535"), 4, 1, driver="535"),
        "warning",
        ["c (ranks 4-5): driver 535, and 550.54.15 elsewhere", "one driver"],
    ),
    "a wrong sum": (
        lambda told: replace(
            told, all_reduce=[*told.all_reduce[:5], AllReduce(num_bytes=64, seconds=1, num_wrong=7)]
        ),
        "error",
        ["c (rank 5): an all-reduce gave 7 wrong elements of 64 B", "take the host out"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_with_host_and_remedy(case: str) -> None:
    change, level, parts = WRONG[case]
    found = bad(change(answers()))
    assert len(found) == 1, found
    assert found[0][0] == level
    for part in parts:
        assert part in found[0][1]


def test_a_host_in_the_minority_is_the_odd_one_even_if_it_is_rank_0s() -> None:
    told = with_rank(with_rank(answers(), 0, config="0dd" * 21), 1, config="0dd" * 21)
    assert [text.partition(":")[0] for _, text in bad(told)] == ["a (ranks 0-1)"]
    of_two = answers("ab")
    of_two = with_rank(with_rank(of_two, 2, config="0dd" * 21), 3, config="0dd" * 21)
    assert [text.partition(":")[0] for _, text in bad(of_two)] == ["b (ranks 2-3)"], "rank 0 decides a draw"


def test_data_that_most_hosts_lack_is_missed_there() -> None:
    told = answers()
    for rank in (0, 2):
        told = with_data(told, rank, manifest_hash=None, tokenizer=None)
    assert [text.partition(":")[0] for _, text in bad(told)] == ["a (ranks 0-1)", "b (ranks 2-3)"]
    nowhere = with_data(told, 4, manifest_hash=None, tokenizer=None)
    assert bad(nowhere) == [], "said when it is opened"


def test_details_name_settings_and_files() -> None:
    told = with_rank(with_rank(answers("ab"), 3, config="0dd"), 2, code="bad")
    details = [Details(settings={"train.total_tokens": 8, "seed": 1}, files={"a.py": "1", "b.py": "1"})] * 4
    details[3] = Details(settings={"train.total_tokens": 9, "seed": 1}, files={"a.py": "1", "b.py": "1"})
    details[2] = Details(
        settings={"train.total_tokens": 8, "seed": 1}, files={"a.py": "1", "b.py": "2", "c.py": "1"}
    )
    code, config = (text for _, text in bad(replace(told, details=details)))
    assert "b (rank 2): other files of llmtrain than elsewhere (hash bad): b.py, c.py; install" in code
    assert (
        "b (rank 3): other settings than elsewhere (hash 0dd): train.total_tokens=9, elsewhere 8;" in config
    )


def test_errors_of_several_hosts_are_told_at_once() -> None:
    told = with_folder(with_data(answers(), 4, manifest_hash="f" * 64), 2, sees_token=False)
    assert [text.partition(" ")[0] for _, text in bad(told)] == ["c", "b"]


def test_what_slurm_says_is_compared_with_nodes_and_tasks() -> None:
    """torchrun is one task a node; without it each rank is a task; some may stay idle when that is meant."""
    assert bad(under_torchrun(answers(), replace(SLURM, tasks=3))) == []
    assert bad(with_place(answers(), 0, scheduler=replace(SLURM, tasks=6))) == []
    assert bad(under_torchrun(answers(), replace(SLURM, nodes=4, tasks=4)), idle_nodes=True) == []
    alone = with_place(
        answers("a", 1), 0, scheduler=Scheduler(nodes=1, tasks=2, node="a"), has_launcher=False
    )
    [(level, text)] = bad(alone)
    assert level == "error"
    assert "srun started 2 tasks, and this run has 1 rank: each task is a run of its own" in text


def test_two_launchers_on_one_host_are_two_times_their_ranks() -> None:
    told = answers("a", 2)
    for rank in (0, 1):
        told = with_place(told, rank, agent=str(rank), local_world_size=1)
    assert bad(told) == []


def test_hosts_of_one_name_are_told_apart() -> None:
    places = [
        place(0, "vm", ranks_per_host=1, world_size=3),
        replace(place(1, "vm", ranks_per_host=1, world_size=3), machine="another"),
        place(2, "vm", ranks_per_host=1, world_size=3),
    ]
    assert hosts_of(places) == [Group("vm", (0, 2)), Group("vm of rank 1", (1,))]


def test_loopback_is_fine_where_all_ranks_are() -> None:
    """Two nodes of Slurm on one machine, too."""
    told = answers("a", 2)
    told = with_network(told, 0, own=own_name("a", "127.0.0.1"), master=own_name("a", "127.0.0.1"))
    assert bad(told) == []
    told = answers("ab", 1)
    for rank in (0, 1):
        told = with_place(told, rank, machine="one")
        told = with_network(told, rank, master=own_name("a", "127.0.0.1"), own=own_name("a", "127.0.0.1"))
    assert bad(told) == []


def test_gloos_interface_makes_the_hosts_name_unimportant() -> None:
    loopback = with_network(answers(), 2, own=own_name("b", "127.0.1.1"))
    chosen = replace(loopback.hosts[2].network, chosen={"GLOO_SOCKET_IFNAME": "eth0"})
    assert bad(with_host(loopback, 2, network=chosen)) == []


def test_a_rendezvous_of_torchrun_may_be_on_any_host() -> None:
    told = answers()
    for rank in (0, 2, 4):
        told = with_network(told, rank, master=own_name("b", "10.0.0.2"))
    assert len(bad(told)) == 3
    assert bad(with_place(told, 0, agent_keeps_store=True)) == []


def test_what_is_small_or_uncertain_is_not_judged() -> None:
    told = with_folder(answers(), 2, write=Speed(num_bytes=1000, seconds=1), free_inodes=None)
    told = replace(told, clocks={**told.clocks, 2: Clock(ahead_s=1.5, bound_s=0.6)})
    assert bad(told) == []


def test_little_room_is_a_warning_where_no_checkpoint_is_known() -> None:
    told = replace(with_folder(answers(), 0, free_bytes=GIB // 2), needs=Needs())
    [(level, text)] = bad(told)
    assert level == "warning"
    assert "has 512 MiB free, less than preflight.min_free_gib=1" in text


def test_only_gpus_of_the_run_are_judged() -> None:
    told = answers("a", 2)
    spare = replace(gpu(7, "a"), uncorrected_errors=9, name="other")
    assert bad(with_host(told, 0, gpus=Gpus(gpus=(*told.hosts[0].gpus.gpus, spare)))) == []


def test_a_bound_for_the_fabric_is_an_error() -> None:
    assert bad(answers(), min_bus_gb_per_s=20) == []
    slow = [*answers().all_reduce]
    slow[3] = AllReduce(num_bytes=1 << 26, seconds=0.4, num_wrong=0)
    [(level, text)] = bad(replace(answers(), all_reduce=slow), min_bus_gb_per_s=20)
    assert level == "error"
    assert "b (rank 3): an all-reduce of 64 MiB has 0.28 GB/s of bus bandwidth, less than" in text


def links(rate: dict[tuple[int, int], float], hosts: list[Group]) -> list[str]:
    """What is said of links of so many GB/s."""
    told = [
        Link(source=source, target=target, speed=Speed(num_bytes=10**9, seconds=1 / gigabytes))
        for (source, target), gigabytes in rate.items()
    ]
    return [f"{each.host} {each.found}" for each in slow_links(told, hosts, ratio=5)]


def all_pairs(num_ranks: int, rate: float) -> dict[tuple[int, int], float]:
    return {(a, b): rate for a in range(num_ranks) for b in range(num_ranks) if a != b}


@pytest.mark.parametrize("num_hosts", [3, 4, 8])
def test_a_slow_host_is_named_and_not_those_who_talk_to_it(num_hosts: int) -> None:
    hosts = [Group(f"h{at}", (at,)) for at in range(num_hosts)]
    rate = {pair: 0.1 if 1 in pair else 10.0 for pair in all_pairs(num_hosts, 10)}
    assert [text[:22] for text in links(rate, hosts)] == ["h1 (rank 1) sends at 0", "h1 (rank 1) receives a"]
    outgoing = {pair: 0.1 if pair[0] == 1 else 10.0 for pair in all_pairs(num_hosts, 10)}
    [text] = links(outgoing, hosts)
    assert text == ("h1 (rank 1) sends at 0.1 GB/s at best, and the median rank at 10 GB/s, between hosts")


def test_a_slow_link_is_named_where_both_ends_are_well() -> None:
    hosts = [Group(f"h{at}", (at,)) for at in range(4)]
    [text] = links(all_pairs(4, 10) | {(2, 0): 0.5}, hosts)
    assert text == "h2 (rank 2) to h0 (rank 0) 0.5 GB/s, and the median link has 10 GB/s"


def test_links_within_hosts_are_compared_with_each_other() -> None:
    """Fast ones inside do not make those between hosts slow, and ranks of one slow host are told together."""
    hosts = [Group(f"h{at}", (2 * at, 2 * at + 1)) for at in range(3)]
    rate = {pair: 200.0 if pair[0] // 2 == pair[1] // 2 else 10.0 for pair in all_pairs(6, 10)}
    assert links(rate, hosts) == []
    rate |= {pair: 0.1 for pair in rate if (pair[0] // 2 == 2) is not (pair[1] // 2 == 2)}
    assert [text.partition(" at")[0] for text in links(rate, hosts)] == [
        "h2 (ranks 4-5) sends",
        "h2 (ranks 4-5) receives",
    ]


def test_names_of_interfaces_as_gloo_and_nccl_read_them() -> None:
    there = ["lo", "eth0", "eth1", "ib0", "ib01"]
    for variable, wanted, chosen in (
        ("GLOO_SOCKET_IFNAME", "eth0,ib0", ["eth0", "ib0"]),
        ("GLOO_SOCKET_IFNAME", "eth", []),
        ("NCCL_SOCKET_IFNAME", "eth", ["eth0", "eth1"]),
        ("NCCL_SOCKET_IFNAME", "=ib0", ["ib0"]),
        ("NCCL_SOCKET_IFNAME", "^eth,lo", ["ib0", "ib01"]),
        ("NCCL_SOCKET_IFNAME", "^=ib0", ["lo", "eth0", "eth1", "ib01"]),
    ):
        assert interfaces_of(variable, wanted, there) == chosen


def test_a_host_that_cannot_meet_the_others_says_so_alone() -> None:
    second = place(2, "b", ranks_per_host=2, world_size=4)
    lost = replace(network(1, "b"), master=own_name("a", "127.0.0.1"))
    [found] = before_meeting(second, lost)
    assert found.level is Level.warning, "the others may be on this machine"
    assert "b: unless all ranks are on this machine: MASTER_ADDR=a is 127.0.0.1, the host itself" in str(
        found
    )
    [found] = before_meeting(second, replace(network(1, "b"), own=own_name("b", "127.0.1.1")))
    assert found.level is Level.warning
    assert "GLOO_SOCKET_IFNAME=eth0" in found.remedy
    [found] = before_meeting(second, replace(network(1, "b"), master=own_name("a")))
    assert found.level is Level.error
    assert "b: MASTER_ADDR=a does not resolve: unknown; give an address" in str(found)
    first = place(0, "a", ranks_per_host=2, world_size=4)
    assert before_meeting(first, lost) == [], "rank 0 listens there, whatever it calls itself"
    assert before_meeting(replace(second, local_world_size=4), lost) == []
    assert before_meeting(second, network(1, "b")) == []


def test_a_report_keeps_each_attempt(tmp_path: Path) -> None:
    path = tmp_path / "preflight.json"
    told = with_gpu(answers(), 2, 1, celsius=88)
    report = Report(judge(told, PreflightConfig()), measured={"hosts": {}}, seconds=1.5)
    report.write(path, attempt=1)
    report.write(path, attempt=2)
    kept = json.loads(path.read_text())["attempts"]
    assert [each["attempt"] for each in kept] == [1, 2]
    [hot] = [each for each in kept[1]["findings"] if each["level"] == "warning"]
    assert hot["host"] == "b (ranks 2-3)"
    assert hot["topic"] == "GPUs"
    assert report.summary() == (
        "preflight, 1.5 s: 6 ranks on 3 hosts; all-reduce of 64 MiB in 4 ms: 16.8 GB/s, bus 28 GB/s; "
        "a (ranks 0-1): run.folder=runs/x: 900 GiB free, writes 839 MB/s, reads 839 MB/s; 1 warning"
    )
    path.write_text("{")
    with pytest.raises(DataError, match=r"preflight.json is damaged .*; move it away"):
        report.write(path, attempt=3)


def test_words_of_counts() -> None:
    assert spans([4, 0, 1, 2, 7]) == "0-2, 4, 7"
    assert wrong([]) == "nothing is wrong"
    assert wrong(judge(with_folder(answers(), 2, sees_token=False), PreflightConfig())) == "1 error"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"answer_s": 0}, r"preflight.answer_s=0 must be above 0 seconds"),
        ({"storage_mib": -1}, r"preflight.storage_mib=-1 and .* must be at least 0"),
        ({"slow_ratio": 1}, r"preflight.slow_ratio=1 must be above 1"),
    ],
)
def test_settings_that_cannot_be_right(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PreflightConfig(**settings)


def test_a_place_is_what_launcher_and_scheduler_say(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Place.here({})
    assert (alone.host, alone.rank, alone.world_size) == (socket.gethostname(), 0, 1)
    assert not alone.has_launcher
    assert alone.scheduler is None
    environ = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}
    environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "node0"}
    environ |= {"SLURM_NNODES": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2"}
    told = Place.here(environ | {"SLURMD_NODENAME": "node1"})
    assert (told.host, told.rank, told.world_size) == ("node1", 3, 4)
    assert (told.local_rank, told.local_world_size, told.agent) == (1, 2, "1")
    assert told.scheduler == Scheduler(nodes=2, tasks=2, node="node1")
    assert told.agent_keeps_store
    assert told.machine == alone.machine


def test_this_host_answers(tmp_path: Path) -> None:
    """Real interfaces, a real measurement, nothing left behind."""
    asked = FolderAsked(
        setting="run.folder", path=tmp_path / "not" / "yet", token=None, measured_bytes=3 << 20
    )
    told = ask_host(
        [asked],
        {"data.folder": tmp_path / "no data"},
        environ={"MASTER_ADDR": "127.0.0.1", "NCCL_SOCKET_IFNAME": "eth0"},
        asks_gpus=False,
        read_bytes=1 << 20,
        measured_s=5,
        limit_s=30,
    )
    assert told.failures == {}
    [folder] = told.folders
    assert folder.looked_at == str(tmp_path)
    assert folder.free_bytes > 0
    assert folder.write.num_bytes == folder.read.num_bytes == 3 << 20
    assert folder.write.seconds > 0
    assert list(tmp_path.iterdir()) == []
    assert told.data[0].manifest_hash is None
    assert "127.0.0.1" in {address for of_one in told.network.interfaces.values() for address in of_one}
    assert told.network.master.addresses == ("127.0.0.1",)
    assert told.network.chosen == {"NCCL_SOCKET_IFNAME": "eth0"}
    assert told.num_cores == len(os.sched_getaffinity(0))


def test_a_data_folder_answers_with_its_hashes_and_a_speed(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "train-00000.bin").write_bytes(bytes(5 << 20))
    manifest = {"shards": {"folder": "shards"}, "tokenizer": {"fingerprint": "f1"}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    arguments = {"environ": None, "asks_gpus": False, "measured_s": 5, "limit_s": 30}
    [data] = ask_host([], {"data.folder": tmp_path}, read_bytes=2 << 20, **arguments).data
    assert data.tokenizer == "f1"
    assert data.read.num_bytes == 2 << 20
    assert len(data.manifest_hash) == 64
    (tmp_path / "manifest.json").write_text("{}")
    [data] = ask_host([], {"data.folder": tmp_path}, read_bytes=2 << 20, **arguments).data
    assert len(data.manifest_hash) == 64
    assert (data.tokenizer, data.read) == (None, None), "whoever opens it says what is wrong"
    shutil.rmtree(tmp_path / "shards")
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    told = ask_host([], {"data.folder": tmp_path}, read_bytes=2 << 20, **arguments)
    assert told.data == []
    assert "FileNotFoundError" in told.failures[f"data.folder={tmp_path}"]


def test_measurements_end_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(host_module.time, "monotonic", lambda: float(next(clock)))
    write, read = measure_storage(tmp_path, num_bytes=1 << 30, limit_s=4)
    assert write.num_bytes == 4 << 20, "a second a block by this clock"
    assert read.num_bytes == 4 << 20
    path = tmp_path / "shard.bin"
    path.write_bytes(bytes(3 << 20))
    assert measure_reading(path, num_bytes=1 << 30, limit_s=2).num_bytes == 2 << 20


def test_a_token_is_seen_by_who_shares_the_folder(tmp_path: Path) -> None:
    token = write_token(tmp_path / "runs" / "x")
    assert token.folder == str(tmp_path)
    assert sees(token, tmp_path)
    (tmp_path / "other").mkdir()
    assert not sees(token, tmp_path / "other", wait_s=0.1)
    (tmp_path / "other" / token.name).write_text("somebody else's")
    assert not sees(token, tmp_path / "other", wait_s=0.1)
    remove_token(token)
    assert not sees(token, tmp_path, wait_s=0)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_who_does_not_answer_is_left_behind() -> None:
    def fail() -> None:
        raise PermissionError(13, "Permission denied", "/x")

    started = time.monotonic()
    answers, failures = within(0.3, {"hangs": lambda: time.sleep(60), "fails": fail, "works": lambda: 7})
    assert time.monotonic() - started < 20
    assert answers == {"works": 7}
    assert failures == {
        "hangs": "no answer in 0.3 s",
        "fails": "PermissionError: [Errno 13] Permission denied: '/x'",
    }


def test_the_hash_of_the_code_covers_every_file() -> None:
    told = code_hashes()
    assert {"train/loop.py", "launch/preflight/host.py", "__init__.py"} <= told.keys()
    assert all(len(value) == 64 for value in told.values())


SMI = """#!{python}
import sys
query = next(word for word in sys.argv if word.startswith("--query-gpu="))
fields = query.partition("=")[2].split(",")
known = {known!r}
unknown = [name for name in fields if name not in known]
if unknown:
    print(f'Field "{{unknown[0]}}" is not a valid field to query.')
    sys.exit(2)
for index in (0, 1):
    row = dict(known, index=index, uuid=f"GPU-{{index}}")
    print(", ".join(str(row[name]) for name in fields))
"""
KNOWN = {
    "index": "",
    "uuid": "",
    "name": "NVIDIA H100 80GB HBM3",
    "driver_version": "550.54.15",
    "memory.total": 81559,
    "memory.used": 531,
    "temperature.gpu": 34,
    "ecc.errors.uncorrected.volatile.total": 2,
    "remapped_rows.pending": "Yes",
    "remapped_rows.failure": "No",
    "clocks_event_reasons.active": "0x0000000000000068",
}


def fake_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    tools = tmp_path / "bin"
    tools.mkdir(exist_ok=True)
    (tools / "nvidia-smi").write_text(text)
    (tools / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))


def test_gpus_are_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(tmp_path, monkeypatch, SMI.format(python=sys.executable, known=KNOWN))
    told = list_gpus(limit_s=60)
    assert [each.uuid for each in told.gpus] == ["GPU-0", "GPU-1"]
    first = told.gpus[0]
    assert (first.name, first.driver) == ("NVIDIA H100 80GB HBM3", "550.54.15")
    assert (first.memory_bytes, first.used_bytes, first.celsius) == (81559 << 20, 531 << 20, 34)
    assert first.uncorrected_errors == 2
    assert first.repair_is_pending
    assert not first.repair_failed
    assert first.throttled == (
        "slowed down by hardware",
        "too hot, slowed down by software",
        "too hot, slowed down by hardware",
    )


def test_older_drivers_and_smaller_gpus_tell_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = {name: value for name, value in KNOWN.items() if not name.startswith("clocks_")}
    older["clocks_throttle_reasons.active"] = "0x0000000000000001"
    older["ecc.errors.uncorrected.volatile.total"] = "[N/A]"
    fake_smi(tmp_path, monkeypatch, SMI.format(python=sys.executable, known=older))
    told = list_gpus(limit_s=60)
    assert [(each.uncorrected_errors, each.throttled) for each in told.gpus] == [(None, ())] * 2
    oldest = {name: value for name, value in older.items() if not name.startswith(("remapped", "clocks"))}
    fake_smi(tmp_path, monkeypatch, SMI.format(python=sys.executable, known=oldest))
    told = list_gpus(limit_s=60)
    assert [each.repair_is_pending for each in told.gpus] == [False, False]


def test_a_broken_or_absent_nvidia_smi_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    told = list_gpus(limit_s=60)
    assert (told.gpus, told.missing, told.is_broken) == ((), "there is no nvidia-smi on PATH", False)
    fake_smi(tmp_path, monkeypatch, "#!/bin/sh\necho couldn\\'t communicate with the driver\nexit 9\n")
    told = list_gpus(limit_s=60)
    assert told.is_broken
    assert told.missing == "nvidia-smi fails: couldn't communicate with the driver"
    fake_smi(tmp_path, monkeypatch, f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    assert list_gpus(limit_s=0.5).missing == "nvidia-smi gave no answer in 0.5 s"
    fake_smi(tmp_path, monkeypatch, "no program")
    assert list_gpus(limit_s=60).is_broken


def test_hosts_without_nvidia_smi_are_skipped_and_it_is_said() -> None:
    told = with_host(answers("a"), 0, gpus=Gpus(gpus=(), missing="there is no nvidia-smi on PATH"))
    said = [str(each) for each in judge(told, PreflightConfig()) if each.topic == "GPUs"]
    assert said == ["a (ranks 0-1): not looked at: there is no nvidia-smi on PATH"]
    assert bad(told) == []
