"""How the answers of all ranks and hosts are judged before a run loads anything.

Functions of the answers alone. Each finding names a host, what was found there, and what to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import median
from typing import TypeVar

from llmtrain.launch.preflight.config import PreflightConfig
from llmtrain.launch.preflight.findings import (
    Answers,
    Finding,
    Group,
    Level,
    RankAnswer,
    count,
    error,
    hosts_of,
    ok,
    some,
    spans,
    warning,
)
from llmtrain.launch.preflight.gpus import Gpu
from llmtrain.launch.preflight.host import Place, Speed
from llmtrain.launch.preflight.network import clocks, names, transfers
from llmtrain.units import format_bytes, format_duration

MIN_JUDGED_BYTES = 1 << 20
"""A speed of less is that of a round trip."""
GIB = 1 << 30

Value = TypeVar("Value")


def judge(answers: Answers, cfg: PreflightConfig) -> list[Finding]:
    """Every finding, good ones too."""
    hosts = hosts_of([rank.place for rank in answers.ranks])
    return [
        *_ranks(answers, hosts, cfg),
        *_same(answers, hosts),
        *_failures(answers, hosts),
        *names(answers, hosts, cfg),
        *clocks(answers, hosts, cfg),
        *_folders(answers, hosts, cfg),
        *_speeds(answers, hosts, cfg),
        *_limits(answers, hosts, cfg),
        *_gpus(answers, hosts, cfg),
        *transfers(answers, hosts, cfg),
    ]


def _ranks(answers: Answers, hosts: list[Group], cfg: PreflightConfig) -> Iterator[Finding]:
    """Nodes times tasks is the world, and each rank is there once."""
    places = [rank.place for rank in answers.ranks]
    num_ranks = len(places)
    owner = {rank: group for group in hosts for rank in group.ranks}
    said: dict[int, list[int]] = {}
    for at, place in enumerate(places):
        said.setdefault(place.rank, []).append(at)
    missing = [rank for rank in range(num_ranks) if rank not in said]
    for rank, claimed in said.items():
        if len(claimed) > 1 or rank >= num_ranks:
            where = " and ".join(dict.fromkeys(owner[at].name for at in claimed))
            lacking = f", and nobody has RANK {spans(missing)}" if missing else ""
            yield error(
                "ranks",
                where,
                f"{len(claimed)} of {num_ranks} processes have RANK={rank}{lacking}",
                "give each process a RANK of its own, from 0 on: torchrun or srun does",
            )
    for group, ranks, told in _odd([place.world_size for place in places], hosts, usual=num_ranks):
        yield error(
            "ranks",
            group.label(ranks),
            f"WORLD_SIZE={told}, and {num_ranks} ranks are there",
            "launch all with the same number of nodes and of processes a node",
        )
    yield from _ranks_on_hosts(places, hosts)
    yield from _scheduled(places, hosts, cfg)
    expected = answers.ranks[0].expected_ranks
    if expected is not None and expected != num_ranks:
        yield error(
            "ranks",
            "",
            f"parallel.world_size={expected}, but {num_ranks} ranks were launched",
            f"launch {expected}, or set parallel.world_size=null to take what comes",
        )
    users: dict[str, list[int]] = {}
    for at, answer in enumerate(answers.ranks):
        if answer.gpu is not None:
            users.setdefault(answer.gpu, []).append(at)
    for gpu, shared in users.items():
        if len(shared) > 1:
            yield error(
                "ranks",
                owner[shared[0]].label(shared),
                f"{len(shared)} ranks use the same GPU, {gpu}",
                "start one process a GPU, with a LOCAL_RANK and devices (CUDA_VISIBLE_DEVICES) of its own",
            )
    yield ok("ranks", "", f"{count(num_ranks, 'rank')} on {count(len(hosts), 'host')}")


def _ranks_on_hosts(places: list[Place], hosts: list[Group]) -> Iterator[Finding]:
    for group in hosts:
        by_agent: dict[str | None, list[int]] = {}
        for rank in group.ranks:
            by_agent.setdefault(places[rank].agent, []).append(rank)
        for ranks in by_agent.values():
            told = {places[rank].local_world_size for rank in ranks if places[rank].has_launcher} - {None}
            if told and told != {len(ranks)}:
                yield error(
                    "ranks",
                    group.label(ranks),
                    f"{count(len(ranks), 'rank')} there, and LOCAL_WORLD_SIZE="
                    f"{' and '.join(map(str, sorted(filter(None, told))))}",
                    "start as many processes on it as LOCAL_WORLD_SIZE says (--nproc-per-node), and give no "
                    "two hosts the same name",
                )


def _scheduled(places: list[Place], hosts: list[Group], cfg: PreflightConfig) -> Iterator[Finding]:
    scheduler = places[0].scheduler
    if scheduler is None or cfg.idle_nodes:
        return
    num_ranks, per_task = len(places), 1
    if places[0].agent is not None:
        per_task = places[0].local_world_size or 1
    if scheduler.nodes != len(hosts):
        yield error(
            "ranks",
            "",
            f"Slurm gave {count(scheduler.nodes, 'node')}, and {count(num_ranks, 'rank')} run on "
            f"{count(len(hosts), 'host')}: {some([group.name for group in hosts])}",
            "start processes on all of them (`llmtrain submit` does), ask for fewer, or, if some may be "
            "idle, set preflight.idle_nodes=true",
        )
    elif scheduler.tasks is not None and scheduler.tasks * per_task != num_ranks:
        how = f"{count(scheduler.tasks, 'task')}" + (f" x {per_task} processes" if per_task > 1 else "")
        alone = "" if places[0].has_launcher else ": each task is a run of its own, as none has a WORLD_SIZE"
        yield error(
            "ranks",
            "",
            f"srun started {how}, and this run has {count(num_ranks, 'rank')}{alone}",
            "let torchrun start the ranks in one task a node (`llmtrain submit` does), or export RANK, "
            "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT",
        )


def _same(answers: Answers, hosts: list[Group]) -> Iterator[Finding]:
    """Code, settings, data and tokenizer."""
    ranks = answers.ranks
    for group, odd, value in _odd([rank.code for rank in ranks], hosts):
        yield error(
            "code",
            group.label(odd),
            f"other files of llmtrain than elsewhere (hash {value[:12]}){_which_files(answers, odd[0])}",
            "install the same on every host, from one shared folder or one image",
        )
    for name in sorted({name for rank in ranks for name in rank.versions}):
        own = [rank.versions.get(name) for rank in ranks]
        common = _usual(own)
        for group, odd, version in _odd(own, hosts):
            yield error(
                "code",
                group.label(odd),
                f"{name} {version}, and {common} elsewhere",
                "install the same versions on every host, from one shared folder or one image",
            )
    for group, odd, value in _odd([rank.config for rank in ranks], hosts):
        yield error(
            "config",
            group.label(odd),
            f"other settings than elsewhere (hash {value[:12]}){_which_settings(answers, odd[0])}",
            "launch all with the same command line and the same conf/",
        )
    settings = sorted({data.setting for host in answers.hosts.values() for data in host.data})
    for setting in settings:
        yield from _same_data(answers, hosts, setting)
    told = [f"llmtrain {ranks[0].code[:12]}", *map(" ".join, ranks[0].versions.items())]
    yield ok("code", "", ", ".join(told))
    if ranks[0].config:
        yield ok("config", "", f"hash {ranks[0].config[:12]}")


def _same_data(answers: Answers, hosts: list[Group], setting: str) -> Iterator[Finding]:
    there = {
        group.ranks[0]: data
        for group in hosts
        if group.ranks[0] in answers.hosts
        for data in answers.hosts[group.ranks[0]].data
        if data.setting == setting
    }
    hashes = [data.manifest_hash for data in there.values() if data.manifest_hash is not None]
    if not hashes:
        return  # said when it is opened
    by_rank = {group.ranks[0]: group for group in hosts}
    usual = _usual(hashes)
    usual_tokenizer = _usual([data.tokenizer for data in there.values() if data.manifest_hash is not None])
    for rank, data in there.items():
        label = by_rank[rank].label()
        if data.manifest_hash is None:
            yield error(
                "data",
                label,
                f"{setting}={data.path} has no manifest.json, and has one elsewhere",
                "copy or mount the data there",
            )
        elif data.tokenizer is not None and data.tokenizer != usual_tokenizer:
            yield error(
                "data",
                label,
                f"the tokenizer of {setting}={data.path} has the fingerprint {str(data.tokenizer)[:12]}, "
                f"and {str(usual_tokenizer)[:12]} elsewhere: its ids would mean other words",
                "give all hosts the same data folder",
            )
        elif data.manifest_hash != usual:
            yield error(
                "data",
                label,
                f"manifest.json of {setting}={data.path} has the hash {data.manifest_hash[:12]}, and "
                f"{usual[:12]} elsewhere",
                "give all hosts the same data folder",
            )
    yield ok("data", "", f"{setting}: manifest {usual[:12]}, tokenizer {str(usual_tokenizer)[:12]}")


def _which_settings(answers: Answers, odd: int) -> str:
    if answers.details is None:
        return ""
    own, other = (answers.details[rank].settings for rank in (odd, _model(answers.ranks, "config")))
    differing = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
    return ": " + some([f"{name}={own.get(name)}, elsewhere {other.get(name)}" for name in differing], "; ")


def _which_files(answers: Answers, odd: int) -> str:
    if answers.details is None:
        return ""
    own, other = (answers.details[rank].files for rank in (odd, _model(answers.ranks, "code")))
    return ": " + some(sorted(path for path in own.keys() | other.keys() if own.get(path) != other.get(path)))


def _model(ranks: Sequence[RankAnswer], what: str) -> int:
    """The first rank that has what is usual."""
    hashes = [getattr(rank, what) for rank in ranks]
    return hashes.index(_usual(hashes))


def _failures(answers: Answers, hosts: list[Group]) -> Iterator[Finding]:
    for group, host in answers.by_host(hosts):
        for what, why in host.failures.items():
            is_folder = "=" in what
            yield Finding(
                level=Level.error if is_folder else Level.warning,
                topic="storage" if is_folder else "host",
                host=group.label(),
                found=f"{what}: {why}",
                remedy="see whether its file system is mounted and answers (`ls`, `df`)"
                if is_folder
                else "look at that host with `llmtrain doctor`",
            )


def _folders(answers: Answers, hosts: list[Group], cfg: PreflightConfig) -> Iterator[Finding]:
    """Room, and whether all hosts see the same."""
    need = answers.needs.checkpoint_bytes
    for group, host in answers.by_host(hosts):
        for folder in host.folders:
            what = f"{folder.setting}={folder.path}"
            free = format_bytes(folder.free_bytes)
            if not folder.is_writable:
                yield error(
                    "storage",
                    group.label(),
                    f"{what} cannot be written: {folder.looked_at} is not a folder that you may write to",
                    "choose another, or have its owner changed",
                )
            if folder.sees_token is False:
                yield error(
                    "storage",
                    group.label(),
                    f"{what} is not the folder that rank 0 sees: what it wrote there does not appear in "
                    f"{folder.looked_at}",
                    f"put {folder.setting} on a file system that all hosts share, by an absolute path",
                )
            if folder.free_bytes < need:
                yield error(
                    "storage",
                    group.label(),
                    f"{what} has {free} free, and one checkpoint takes {format_bytes(need)}",
                    "make room, or choose another folder",
                )
            elif folder.free_bytes < cfg.min_free_gib * GIB:
                yield warning(
                    "storage",
                    group.label(),
                    f"{what} has {free} free, less than preflight.min_free_gib={cfg.min_free_gib:g}",
                    "make room, or choose another folder",
                )
            if folder.free_inodes is not None and folder.free_inodes < cfg.min_free_inodes:
                yield warning(
                    "storage",
                    group.label(),
                    f"{what} can take {folder.free_inodes:,} more files (free inodes, `df -i`)",
                    "delete files there, or choose another folder",
                )
            speeds = [
                f"{verb} {_rate(speed)}"
                for verb, speed in (("writes", folder.write), ("reads", folder.read))
                if speed is not None
            ]
            yield ok("storage", group.label(), ", ".join([f"{what}: {free} free", *speeds]))
        for data in host.data:
            if data.read is not None:
                yield ok("storage", group.label(), f"{data.setting}={data.path}: reads {_rate(data.read)}")


def _speeds(answers: Answers, hosts: list[Group], cfg: PreflightConfig) -> Iterator[Finding]:
    """Storage that is slow, or much slower than elsewhere."""
    measured: dict[tuple[str, str], dict[Group, Speed]] = {}
    for group, host in answers.by_host(hosts):
        for folder in host.folders:
            for verb, speed in (("writing to", folder.write), ("reading from", folder.read)):
                if speed is not None:
                    measured.setdefault((folder.setting, verb), {})[group] = speed
        for data in host.data:
            if data.read is not None:
                measured.setdefault((data.setting, "reading from"), {})[group] = data.read
    for (setting, verb), speeds in measured.items():
        middle = median(speed.bytes_per_s for speed in speeds.values())
        for group, speed in speeds.items():
            if speed.num_bytes < MIN_JUDGED_BYTES:
                continue
            is_odd = len(speeds) > 2 and speed.bytes_per_s * cfg.slow_ratio < middle
            if is_odd or speed.bytes_per_s < cfg.min_storage_mb_per_s * 1e6:
                than = f", and {format_bytes(middle)}/s is the median of the hosts" if is_odd else ""
                yield warning(
                    "storage",
                    group.label(),
                    f"{verb} {setting} goes at {_rate(speed)} ({format_bytes(speed.num_bytes)} in "
                    f"{format_duration(speed.seconds)}){than}",
                    "look at that host's mount and network, or choose another file system",
                )


def _limits(answers: Answers, hosts: list[Group], cfg: PreflightConfig) -> Iterator[Finding]:
    """What a host lets a process have."""
    num_ranks, needs = len(answers.ranks), answers.needs
    for group in hosts:
        fewest = min(answers.ranks[rank].max_open_files for rank in group.ranks)
        if fewest < max(needs.open_files, num_ranks):
            yield Finding(
                level=Level.error if fewest < num_ranks else Level.warning,
                topic="limits",
                host=group.label(),
                found=f"a process may open {fewest:,} files, and a rank may need {needs.open_files:,} with "
                f"its connections to {count(num_ranks, 'rank')}",
                remedy="raise it: `ulimit -n`, LimitNOFILE of the service that starts jobs, --ulimit of a "
                "container",
            )
    for group, host in answers.by_host(hosts):
        shared, here = host.free_shared_memory_bytes, len(group.ranks)
        num_gpus = len(host.gpus.gpus) if host.gpus is not None else 0
        talking = here if needs.uses_gpus else num_gpus if here == 1 else 0  # one rank: of a run to come
        least = cfg.min_shared_memory_mib * 2**20 * talking
        if talking > 1 and shared is not None and shared < least:
            yield warning(
                "limits",
                group.label(),
                f"/dev/shm has {format_bytes(shared)} free for {talking} ranks, and NCCL talks through it; "
                f"preflight.min_shared_memory_mib={cfg.min_shared_memory_mib:g} a rank asks for "
                f"{format_bytes(least)}",
                "give the container more (--shm-size), or delete what lies there",
            )
        if host.has_infiniband and host.max_locked_bytes is not None:
            yield warning(
                "limits",
                group.label(),
                f"a process may lock {format_bytes(host.max_locked_bytes)} of memory, and InfiniBand needs "
                "its buffers locked",
                "set `ulimit -l unlimited` for jobs (LimitMEMLOCK, --ulimit memlock=-1)",
            )
        if host.num_cores < here:
            yield warning(
                "limits",
                group.label(),
                f"{here} ranks share {count(host.num_cores, 'core')}",
                "give the job more cores (slurm.cpus_per_rank, --cpus-per-task), or look who binds it",
            )
        told = "" if shared is None else f", {format_bytes(shared)} of /dev/shm"
        yield ok(
            "limits",
            group.label(),
            f"{count(host.num_cores, 'core')}, {format_bytes(host.free_memory_bytes)} of memory{told} free, "
            f"{min(answers.ranks[rank].max_open_files for rank in group.ranks):,} open files",
        )


def _gpus(answers: Answers, hosts: list[Group], cfg: PreflightConfig) -> Iterator[Finding]:
    used: dict[Group, list[Gpu]] = {}
    for group, host in answers.by_host(hosts):
        if host.gpus is None:
            continue
        if host.gpus.missing is not None:
            remedy = "reload the driver, or take the host out of the run"
            if host.gpus.is_broken:
                yield warning("GPUs", group.label(), host.gpus.missing, remedy)
            else:
                yield ok("GPUs", group.label(), f"not looked at: {host.gpus.missing}")
            continue
        there = host.gpus.gpus
        if answers.needs.uses_gpus and len(there) < len(group.ranks):
            yield error(
                "GPUs",
                group.label(),
                f"{count(len(there), 'GPU')} for {count(len(group.ranks), 'rank')}",
                "start no more processes than GPUs, or see which are lost (`nvidia-smi -L`, `dmesg`)",
            )
        own = [answers.ranks[rank].gpu for rank in group.ranks]
        mine = [gpu for gpu in there if any(uuid and gpu.uuid.endswith(uuid) for uuid in own)]
        used[group] = mine or list(there)
        for gpu in used[group]:
            yield from _gpu(gpu, group, cfg)
        told = Counter(f"{gpu.name}, driver {gpu.driver}" for gpu in used[group])
        yield ok("GPUs", group.label(), "; ".join(f"{count} x {what}" for what, count in told.items()))
    for what in ("name", "driver"):
        kinds = [{getattr(gpu, what) for gpu in of_host} for of_host in used.values()]
        usual = _usual([kind for of_host in kinds for kind in sorted(of_host)]) if any(kinds) else None
        for group, of_host in zip(used, kinds, strict=True):
            for kind in sorted(of_host - {usual}):
                yield warning(
                    "GPUs",
                    group.label(),
                    f"{kind if what == 'name' else f'driver {kind}'}, and {usual} elsewhere",
                    "all ranks wait for the slowest: ask for one kind of node (slurm.constraint, gpu_type)"
                    if what == "name"
                    else "bring all hosts to one driver",
                )


def _gpu(gpu: Gpu, group: Group, cfg: PreflightConfig) -> Iterator[Finding]:
    where, what = group.label(), f"GPU {gpu.index} ({gpu.uuid})"
    if gpu.uncorrected_errors is not None and gpu.uncorrected_errors > cfg.max_gpu_memory_errors:
        yield error(
            "GPUs",
            where,
            f"{what} had {count(gpu.uncorrected_errors, 'uncorrected memory error')} since its driver was "
            "loaded",
            "drain the host and reset the GPU (`nvidia-smi -r`); if they come back, have it replaced",
        )
    if gpu.repair_failed:
        yield error(
            "GPUs",
            where,
            f"{what} could not replace a broken row of its memory",
            "take the host out of the run and have the GPU replaced",
        )
    elif gpu.repair_is_pending:
        yield warning(
            "GPUs",
            where,
            f"{what} will replace a broken row of its memory at the next reset",
            "drain the host and reset the GPU (`nvidia-smi -r`) soon",
        )
    if gpu.celsius is not None and gpu.celsius > cfg.max_gpu_celsius:
        yield warning(
            "GPUs",
            where,
            f"{what} is at {gpu.celsius} °C before it has anything to do",
            "look at fans, cooling and what else runs there",
        )
    if gpu.throttled:
        yield warning(
            "GPUs",
            where,
            f"{what} is {' and '.join(gpu.throttled)}",
            "look at cooling and power supply: `nvidia-smi -q -d PERFORMANCE`",
        )
    if gpu.used_bytes is not None and gpu.used_bytes > cfg.max_gpu_used_gib * GIB:
        yield warning(
            "GPUs",
            where,
            f"{what} has {format_bytes(gpu.used_bytes)} of its memory in use before anything is loaded",
            "end what is left of other runs there: `nvidia-smi` lists processes, `fuser -v /dev/nvidia*` too",
        )


def _usual(values: Sequence[Value]) -> Value:
    """The most frequent; of equally frequent ones the first, which is rank 0's."""
    return Counter(values).most_common(1)[0][0]


def _odd(
    values: Sequence[Value], hosts: list[Group], *, usual: Value | None = None
) -> Iterator[tuple[Group, list[int], Value]]:
    """(host, its ranks, their value) for each value that is not the usual one. By rank."""
    usual = _usual(values) if usual is None else usual
    for group in hosts:
        by_value: dict[Value, list[int]] = {}
        for rank in group.ranks:
            if values[rank] != usual:
                by_value.setdefault(values[rank], []).append(rank)
        for value, ranks in by_value.items():
            yield group, ranks, value


def _rate(speed: Speed) -> str:
    if speed.num_bytes < MIN_JUDGED_BYTES:
        return f"{format_bytes(speed.num_bytes)} in {format_duration(speed.seconds)}"
    return f"{speed.bytes_per_s / 1e6:,.0f} MB/s"
