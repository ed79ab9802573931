"""Look at ranks, hosts and the network between them before anything is loaded: the part that needs the ranks.

What each host says of itself is in `launch/preflight/host.py`, what is made of it in `judge.py`. Here ranks
exchange it, and measure what only several can: clocks, an all-reduce, links.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llmtrain import files
from llmtrain.errors import EXIT_FAILED, LaunchError
from llmtrain.launch.preflight.config import PreflightConfig
from llmtrain.launch.preflight.findings import (
    AllReduce,
    Answers,
    Clock,
    Details,
    Finding,
    Group,
    Level,
    Link,
    Needs,
    RankAnswer,
    Report,
    hosts_of,
)
from llmtrain.launch.preflight.host import (
    FolderAsked,
    Host,
    Place,
    Speed,
    Token,
    ask_host,
    ask_network,
    code_hashes,
    max_open_files,
    remove_token,
    versions,
    within,
    write_token,
)
from llmtrain.launch.preflight.judge import judge
from llmtrain.launch.preflight.network import before_meeting
from llmtrain.loader.dataset import MAX_OPEN_SHARDS
from llmtrain.model.size import num_params
from llmtrain.train.check import CHECKPOINT_BYTES_PER_PARAM
from llmtrain.train.config import TrainRoot
from llmtrain.train.ranks import join_ranks
from llmtrain.train.run_folder import run_folder

log = logging.getLogger(__name__)

MAY_DIFFER = re.compile(r"save\.memory_folder|data\.folder|data\.sources\..*\.folder")
"""Settings that hosts may have of their own: folders. What is in those of data is compared."""
REPORT_NAME = "preflight.json"
"""In the run's folder."""
ALL_REDUCE_MIB = {"cuda": 64, "cpu": 4}
CLOCK_ROUNDS = 3
ALL_REDUCE_ROUNDS = 4
LINK_ROUNDS = 2
MAX_ALL_LINKS = 8
MAX_LINKS_KEPT = 16
PATTERN = 97
"""Period of the numbers that are summed: the sum shows where an element came from."""
FILES_BESIDE = 256
"""That a rank has open, libraries and logs, besides shards and connections."""

Gather = Callable[[object], list[Any]]


def check_before_meeting(cfg: PreflightConfig) -> None:
    """Alone, before ranks try to meet: say what would let them wait for as long as the time-out.

    Raises:
        LaunchError: nothing here knows MASTER_ADDR; the host's ranks after the first leave by SystemExit.
    """
    place = Place.here(os.environ)
    if not cfg.enabled or place.local_world_size is None or place.world_size <= place.local_world_size:
        return
    answers, _ = within(cfg.answer_s, {"network": lambda: ask_network(os.environ)})
    found = before_meeting(place, answers["network"]) if "network" in answers else []
    errors = [finding for finding in found if finding.level is Level.error]
    if place.local_rank:
        if errors:
            sys.exit(EXIT_FAILED)  # the first of the host says why
        return
    for finding in found:
        if finding.level is Level.warning:
            log.warning("%s", finding)
    if errors:
        raise LaunchError("\n       ".join(map(str, errors)))


def run_preflight(
    cfg: TrainRoot, preflight: PreflightConfig, *, device: torch.device, gather: Gather
) -> Report | None:
    """Right after the ranks have met, on all of them; None where it is switched off.

    Args:
        preflight: of this rank; rank 0's is followed by all.
        gather: given a value, every rank's, in the order of ranks.

    Raises:
        LaunchError: on rank 0, with every error; the other ranks leave by SystemExit.
    """
    started = time.monotonic()
    rank, settings, code = dist.get_rank(), same_settings(files.plain(cfg)), code_hashes()
    own = RankAnswer(
        place=Place.here(os.environ),
        preflight=preflight,
        code=files.hash_json(code),
        versions=versions(),
        config=files.hash_json(settings),
        expected_ranks=cfg.parallel.world_size,
        gpu=_gpu_of(device),
        max_open_files=max_open_files(),
    )
    ranks: list[RankAnswer] = gather(own)  # always: who has it switched off must not leave the others alone
    preflight = ranks[0].preflight
    if not preflight.enabled:
        return None
    differ = len({answer.code for answer in ranks}) > 1 or len({answer.config for answer in ranks}) > 1
    details = gather(Details(settings=settings, files=code)) if differ else None
    hosts = hosts_of([answer.place for answer in ranks])
    answers = Answers(
        ranks=ranks,
        hosts=_ask_hosts(cfg, preflight, hosts, device=device, gather=gather),
        needs=Needs(
            checkpoint_bytes=_checkpoint_bytes(cfg),
            open_files=FILES_BESIDE + 2 * MAX_OPEN_SHARDS + 2 * len(ranks),
            uses_gpus=device.type == "cuda",
        ),
        details=details,
    )
    if len(ranks) > 1:
        clocks = measure_clocks(gather)
        all_reduce, links = _measure_network(preflight, hosts, device=device, gather=gather)
        answers = replace(
            answers,
            clocks={group.ranks[0]: clocks[group.ranks[0]] for group in hosts},
            all_reduce=all_reduce,
            links=links,
        )
    findings: list[Finding] = gather(judge(answers, preflight) if rank == 0 else None)[0]
    report = Report(findings, measured=_measured(answers, hosts), seconds=time.monotonic() - started)
    if rank == 0:
        log.info("%s", report.summary())
        for finding in report.of(Level.warning):
            log.warning("%s", finding)
    if errors := report.of(Level.error):
        if rank != 0:
            sys.exit(EXIT_FAILED)  # rank 0 says why
        raise LaunchError("\n       ".join(map(str, errors)))
    return report


def measure_clocks(gather: Gather) -> list[Clock]:
    """Of every rank, against rank 0's.

    Each reads its clock between two exchanges. Rank 0 reads its own before the first and after the second, so
    all readings lie between these two; the shortest of a few rounds bounds best.
    """
    best: list[Clock] | None = None
    gather(None)  # all are here
    for _ in range(CLOCK_ROUNDS):
        before = time.time()
        gather(None)
        readings: list[float] = gather(time.time())
        after = time.time()
        middle, bound = (before + after) / 2, (after - before) / 2
        if best is None or bound < best[0].bound_s:
            best = [Clock(ahead_s=reading - middle, bound_s=bound) for reading in readings]
    told: list[Clock] = gather(best)[0]
    return told


def measure_all_reduce(
    device: torch.device, num_bytes: int, *, limit_s: float, gather: Gather
) -> list[AllReduce]:
    """Sum a pattern over all ranks and compare each element with what it must be; then the best time of a few
    more, if the first one left time for them. By rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    pattern = (torch.arange(max(1, num_bytes // 4), device=device) % PATTERN).float()
    expected = pattern * world_size + world_size * (world_size - 1) / 2  # whole, exact up to 5,000 ranks
    summed = pattern + rank
    first_s = _timed(device, lambda: dist.all_reduce(summed))
    num_wrong = int((summed != expected).sum().item())
    best_s = first_s
    if max(gather(first_s)) < limit_s / ALL_REDUCE_ROUNDS:
        for _ in range(ALL_REDUCE_ROUNDS):
            summed.copy_(pattern)
            gather(None)
            best_s = min(best_s, _timed(device, lambda: dist.all_reduce(summed)))
    told: list[AllReduce] = gather(
        AllReduce(num_bytes=summed.numel() * 4, seconds=best_s, num_wrong=num_wrong)
    )
    return told


def measure_links(
    device: torch.device, num_bytes: int, *, ranks_per_host: int, limit_s: float, gather: Gather
) -> list[Link]:
    """One rank sends to another, many pairs at a time, no rank in two of them; the best time of each link.

    Up to MAX_ALL_LINKS ranks every link is tried, of more those to neighbours and to the next hosts, as long
    as `limit_s` lasts.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    buffer = torch.ones(max(1, num_bytes // 4), device=device)
    best: dict[tuple[int, int], float] = {}
    spent = 0.0
    gather(None)
    for shift in shifts(world_size, ranks_per_host) * LINK_ROUNDS:
        for pairs in rounds(world_size, shift):
            own = next(((source, target) for source, target in pairs if rank in (source, target)), None)
            took = None if own is None else _timed(device, partial(_pass_on, buffer, *own))
            times: list[float | None] = gather(took)
            for pair in pairs:
                seconds = times[pair[1]]
                assert seconds is not None, "every target has a time"
                best[pair] = min(best.get(pair, seconds), seconds)
            spent += max(each for each in times if each is not None)
            if spent > limit_s:
                return _links(best, buffer)
    return _links(best, buffer)


def _links(best: dict[tuple[int, int], float], buffer: torch.Tensor) -> list[Link]:
    size = buffer.numel() * 4
    return [
        Link(source=source, target=target, speed=Speed(num_bytes=size, seconds=seconds))
        for (source, target), seconds in sorted(best.items())
    ]


def _pass_on(buffer: torch.Tensor, source: int, target: int) -> None:
    is_source = dist.get_rank() == source
    operation = (
        dist.P2POp(dist.isend, buffer, target) if is_source else dist.P2POp(dist.irecv, buffer, source)
    )
    for work in dist.batch_isend_irecv([operation]):
        work.wait()


def rounds(world_size: int, shift: int) -> list[list[tuple[int, int]]]:
    """The links from each rank to the one `shift` further, in two or three rounds: in none of them has a rank
    two."""
    found: list[list[tuple[int, int]]] = [[], [], []]
    length = world_size // math.gcd(world_size, shift)
    for first in range(world_size // length):
        for step in range(length):
            source = (first + step * shift) % world_size
            is_odd_one = length % 2 == 1 and step == length - 1
            found[2 if is_odd_one else step % 2].append((source, (source + shift) % world_size))
    return [pairs for pairs in found if pairs]


def shifts(world_size: int, ranks_per_host: int) -> list[int]:
    """Which ranks are tried with which: distances between their numbers."""
    if world_size <= MAX_ALL_LINKS:
        return list(range(1, world_size))
    wanted = [1, ranks_per_host, world_size - 1, 2 * ranks_per_host, 2, 3 * ranks_per_host]
    return list(dict.fromkeys(shift % world_size for shift in wanted if shift % world_size))


def _measure_network(
    preflight: PreflightConfig, hosts: Sequence[Group], *, device: torch.device, gather: Gather
) -> tuple[list[AllReduce], list[Link]]:
    mib = ALL_REDUCE_MIB[device.type] if preflight.all_reduce_mib is None else preflight.all_reduce_mib
    if not mib:
        return [], []
    limit_s = preflight.network_s
    all_reduce = measure_all_reduce(device, mib << 20, limit_s=limit_s, gather=gather)
    links = measure_links(
        device, mib << 20, ranks_per_host=len(hosts[0].ranks), limit_s=limit_s, gather=gather
    )
    if device.type == "cuda":  # memory is as it was
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return all_reduce, links


def _ask_hosts(
    cfg: TrainRoot,
    preflight: PreflightConfig,
    hosts: Sequence[Group],
    *,
    device: torch.device,
    gather: Gather,
) -> dict[int, Host]:
    """The answer of each host, by its first rank, who gives it."""
    rank, world_size = dist.get_rank(), sum(len(group.ranks) for group in hosts)
    folders = {"run.folder": Path(cfg.run.folder)}
    checkpoints = run_folder(cfg).checkpoints
    if cfg.save.folder is not None and isinstance(checkpoints, Path):
        folders["save.folder"] = checkpoints
    data = {"data.folder": Path(cfg.data.folder)} if cfg.data.folder else {}
    data |= {f"data.sources.{name}.folder": Path(each.folder) for name, each in cfg.data.sources.items()}
    measured_bytes = min(preflight.storage_mib << 20, _checkpoint_bytes(cfg)) if world_size > 1 else 0
    tokens: dict[str, Token] = {}
    failures: dict[str, str] = {}
    if rank == 0 and len(hosts) > 1:
        tokens, failures = within(
            preflight.answer_s, {name: partial(write_token, path) for name, path in folders.items()}
        )
    try:
        shared: dict[str, Token] = gather(tokens)[0]
        own: Host | None = None
        if any(group.ranks[0] == rank for group in hosts):
            own = ask_host(
                [
                    FolderAsked(
                        setting=name, path=path, token=shared.get(name), measured_bytes=measured_bytes
                    )
                    for name, path in folders.items()
                ],
                data,
                environ=os.environ if world_size > 1 else None,
                asks_gpus=device.type == "cuda",
                read_bytes=measured_bytes,
                measured_s=preflight.storage_s,
                limit_s=preflight.answer_s,
            )
            own.failures.update({f"{name}={folders[name]}": why for name, why in failures.items()})
        told: list[Host | None] = gather(own)  # all have looked
    finally:
        for token in tokens.values():
            remove_token(token)
    return {at: host for at, host in enumerate(told) if host is not None}


def _measured(answers: Answers, hosts: Sequence[Group]) -> dict[str, Any]:
    """The figures, for preflight.json."""
    num_ranks = len(answers.ranks)
    slowest = sorted(answers.links, key=lambda link: link.speed.bytes_per_s)[:MAX_LINKS_KEPT]
    return {
        "hosts": {
            group.name: {"ranks": list(group.ranks)} | asdict(answers.hosts[group.ranks[0]])
            for group in hosts
        },
        "clocks": {
            group.name: asdict(answers.clocks[group.ranks[0]])
            for group in hosts
            if group.ranks[0] in answers.clocks
        },
        "all_reduce": [
            {
                "rank": rank,
                "num_bytes": each.num_bytes,
                "seconds": each.seconds,
                "bytes_per_s": each.bytes_per_s,
                "bus_bytes_per_s": each.bus_bytes_per_s(num_ranks),
            }
            for rank, each in enumerate(answers.all_reduce)
        ],
        "slowest_links": [
            {"source": link.source, "target": link.target, "bytes_per_s": link.speed.bytes_per_s}
            for link in slowest
        ],
    }


def same_settings(plain: dict[str, Any]) -> dict[str, Any]:
    """Those that must be the same on all ranks, by their dotted names."""
    flat = files.flatten(plain)
    return {name: value for name, value in flat.items() if not MAY_DIFFER.fullmatch(name)}


def _checkpoint_bytes(cfg: TrainRoot) -> int:
    return num_params(cfg.model) * CHECKPOINT_BYTES_PER_PARAM


def _gpu_of(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return None if uuid is None else str(uuid)


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds until it is done, on the device too."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def main() -> None:
    """A rank of `llmtrain doctor`: say what an all-reduce of so many bytes takes."""
    device = join_ranks(timeout_s=60.0)

    def gather(value: object) -> list[Any]:
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, value)
        return told

    told = measure_all_reduce(device, int(sys.argv[1]), limit_s=2.0, gather=gather)
    print(json.dumps([asdict(each) for each in told]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
