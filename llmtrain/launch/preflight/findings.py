"""What ranks and hosts answer before a run, and what is found in it: the words of `judge.py`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from llmtrain import files
from llmtrain.errors import DataError
from llmtrain.launch.preflight.config import PreflightConfig
from llmtrain.launch.preflight.host import Host, Place, Speed
from llmtrain.units import format_duration

FORMAT_VERSION = 1
"""Of preflight.json."""
MAX_NAMED = 5
"""Settings, files or ranks that a message lists; the rest is a number."""


class Level(Enum):
    ok = "ok"
    warning = "warning"
    error = "error"
    """The run does not start."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    level: Level
    topic: str
    host: str
    """With its ranks, where there are several; empty: all hosts."""
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        told = f"{self.host}: {self.found}" if self.host else self.found
        return f"{told}; {self.remedy}" if self.remedy else told


@dataclass(frozen=True, kw_only=True)
class RankAnswer:
    place: Place
    preflight: PreflightConfig
    code: str
    """Hash of the package's files."""
    versions: dict[str, str]
    config: str
    """Hash of the settings that must be the same everywhere."""
    expected_ranks: int | None
    """parallel.world_size."""
    gpu: str | None
    """The end of its UUID, as torch tells it."""
    max_open_files: int


@dataclass(frozen=True, kw_only=True)
class Details:
    """What a rank adds when hashes differ."""

    settings: dict[str, Any]
    files: dict[str, str]
    """Hash of each."""


@dataclass(frozen=True, kw_only=True)
class Clock:
    """How far a host is ahead of rank 0's host, at most `bound_s` off."""

    ahead_s: float
    bound_s: float


@dataclass(frozen=True, kw_only=True)
class AllReduce:
    """One rank's."""

    num_bytes: int
    seconds: float
    num_wrong: int
    """Elements that are not the sum."""

    @property
    def bytes_per_s(self) -> float:
        return self.num_bytes / max(self.seconds, 1e-9)

    def bus_bytes_per_s(self, num_ranks: int) -> float:
        """What each rank's connection carries in a ring: 2 (n - 1) / n of the bytes, as nccl-tests count."""
        return self.bytes_per_s * 2 * (num_ranks - 1) / num_ranks


@dataclass(frozen=True, kw_only=True)
class Link:
    """From one rank to another, the best of a few times."""

    source: int
    target: int
    speed: Speed


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Of the run."""

    checkpoint_bytes: int = 0
    open_files: int = 0
    """Of a rank."""
    uses_gpus: bool = False


@dataclass(frozen=True, kw_only=True)
class Answers:
    ranks: Sequence[RankAnswer]
    """In the order of the process group."""
    hosts: Mapping[int, Host]
    """By the first rank of each host."""
    needs: Needs = Needs()
    details: Sequence[Details] | None = None
    clocks: Mapping[int, Clock] = field(default_factory=dict)
    """By the first rank of each host."""
    all_reduce: Sequence[AllReduce] = ()
    """By rank."""
    links: Sequence[Link] = ()

    def by_host(self, hosts: Iterable[Group]) -> Iterator[tuple[Group, Host]]:
        """Each host that answered."""
        for group in hosts:
            if group.ranks[0] in self.hosts:
                yield group, self.hosts[group.ranks[0]]


@dataclass(frozen=True)
class Group:
    """The ranks of a host."""

    name: str
    ranks: tuple[int, ...]

    def label(self, ranks: Sequence[int] | None = None) -> str:
        """'b (ranks 4-7)': of all its ranks, or of some."""
        chosen = self.ranks if ranks is None else ranks
        return f"{self.name} ({'rank' if len(chosen) == 1 else 'ranks'} {spans(chosen)})"


@dataclass(frozen=True)
class Report:
    """What was found, and the figures behind it."""

    findings: list[Finding]
    measured: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def of(self, level: Level) -> list[Finding]:
        return [finding for finding in self.findings if finding.level is level]

    def summary(self) -> str:
        """One line for the log."""
        told = wrong(self.findings)
        facts = [finding.found for finding in self.of(Level.ok) if finding.topic in ("ranks", "network")]
        storage = [finding for finding in self.of(Level.ok) if finding.topic == "storage"]
        facts += [str(storage[0])] if storage else []
        return f"preflight, {format_duration(self.seconds)}: {'; '.join(facts)}; {told}"

    def write(self, path: Path, *, attempt: int) -> None:
        """Add this start to the file. A start that was refused is no attempt, and is not in it."""
        earlier = []
        if path.exists():
            try:
                earlier = files.read_json(path)["attempts"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path} is damaged ({error!r}); move it away") from error
        own = {
            "attempt": attempt,
            "time": time.time(),
            "seconds": round(self.seconds, 3),
            "findings": [asdict(finding) | {"level": finding.level.name} for finding in self.findings],
            "measured": self.measured,
        }
        files.write_json(path, {"format_version": FORMAT_VERSION, "attempts": [*earlier, own]})


def hosts_of(places: Sequence[Place]) -> list[Group]:
    """Hosts in the order of their first ranks. Of several with one name, the later ones' say which."""
    members: dict[tuple[str, str], list[int]] = {}
    for rank, place in enumerate(places):
        members.setdefault((place.host, place.machine), []).append(rank)
    taken: set[str] = set()
    groups = []
    for (host, _), ranks in members.items():
        name = host if host not in taken else f"{host} of rank {ranks[0]}"
        taken.add(host)
        groups.append(Group(name, tuple(ranks)))
    return groups


def spans(ranks: Iterable[int]) -> str:
    """'0-3, 6'."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    return some([f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts])


def some(names: Sequence[str], mark: str = ", ") -> str:
    shown = mark.join(names[:MAX_NAMED])
    return shown if len(names) <= MAX_NAMED else f"{shown} and {len(names) - MAX_NAMED} more"


def count(number: int, what: str) -> str:
    """'1 rank', '2 ranks'."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def wrong(findings: Sequence[Finding]) -> str:
    """'1 error, 2 warnings'."""
    levels = Counter(finding.level for finding in findings)
    told = [count(levels[level], level.name) for level in (Level.error, Level.warning) if levels[level]]
    return ", ".join(told) or "nothing is wrong"


def error(topic: str, host: str, found: str, remedy: str) -> Finding:
    return Finding(level=Level.error, topic=topic, host=host, found=found, remedy=remedy)


def warning(topic: str, host: str, found: str, remedy: str) -> Finding:
    return Finding(level=Level.warning, topic=topic, host=host, found=found, remedy=remedy)


def ok(topic: str, host: str, found: str) -> Finding:
    return Finding(level=Level.ok, topic=topic, host=host, found=found)


def network_rate(bytes_per_s: float) -> str:
    """In GB/s of 10^9 bytes, or MB/s where there are few, as network bandwidths are told."""
    return f"{bytes_per_s / 1e9:.3g} GB/s" if bytes_per_s >= 1e8 else f"{bytes_per_s / 1e6:.3g} MB/s"
