"""Which rank a hanging run waits for, found in the beats of all ranks. Pure: no files, no torch.

In this order, since each would hide those after it: ranks that are no more, that are stopped, or that left
with an error of their own; ranks that others wait for and that wait for nobody; the first collective that
ranks do not have in common; ranks that are behind; hosts that do not reach each other.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from llmtrain.tracking.beats import Beat, Collective
from llmtrain.tracking.run_events import printable, shortened
from llmtrain.units import format_duration

SHOWN_FRAMES = 6
SHOWN_RANKS = 8
MAX_LINES = 64
"""Of a text with one for each rank."""


class Condition(Enum):
    """Of a rank's process."""

    alive = "alive"
    gone = "gone"
    """There is no such process on this machine any more."""
    stopped = "stopped"
    stuck = "stuck"
    """It is there, and its threads do not run Python."""
    in_kernel = "in_kernel"
    unheard = "unheard"
    """On another machine: its beat stands still while others go on."""
    absent = "absent"
    """It never had a beat in this launch."""


@dataclass(frozen=True)
class Odd:
    """A rank that the others wait for."""

    rank: int
    reason: str
    """A predicate: 'is stopped ...'."""
    host: str | None = None
    pid: int | None = None
    step: int | None = None
    micro_step: int | None = None
    phase: str | None = None
    rows: tuple[int, int] | None = None
    """First and last row of its step."""
    collective: str | None = None
    """Its newest."""
    stack: list[str] = field(default_factory=list)
    """Of its main thread, the innermost line last."""


@dataclass(frozen=True)
class Difference:
    """The first collective of a group that its ranks do not have in common."""

    group: str
    in_group: int
    calls: dict[str, list[int]]
    """What was called there -> the ranks that called it."""


@dataclass(frozen=True)
class Verdict:
    attempt: int
    step: int
    """That most ranks are in."""
    world_size: int
    cause: str
    """What raised the alarm."""
    odd: list[Odd]
    difference: Difference | None
    waits: list[str]
    """Who waits for what."""
    sentence: str
    """All of it in one."""
    ranks: dict[int, str]
    """Every rank in a line."""
    hosts: list[str] = field(default_factory=list)
    """What is known of the network between them."""
    stack: list[str] = field(default_factory=list)
    """Where no rank is odd: the first one's."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """For people, in lines."""
        lines = [self.sentence, "", f"alarm: {shortened(printable(self.cause))}"]
        for odd in self.odd:
            lines += ["", f"rank {odd.rank} {odd.reason}"]
            micro = f", micro-step {odd.micro_step}" if odd.micro_step else ""
            lines += [f"  it was at step {odd.step}{micro}, {odd.phase}"] if odd.step is not None else []
            lines += [f"  rows {odd.rows[0]:,} to {odd.rows[1]:,} of the run"] if odd.rows else []
            lines += [f"  its newest collective: {odd.collective}"] if odd.collective else []
            lines += [f"    {line}" for line in odd.stack]
        lines += ["", *(f"    {line}" for line in self.stack)] if self.stack else []
        if self.difference is not None:
            found = self.difference
            lines += ["", f"first difference: collective {found.in_group} of group {found.group}"]
            lines += [f"  {names(ranks)}: {call}" for call, ranks in found.calls.items()]
        lines += ["", *self.waits] if self.waits else []
        lines += ["", *self.hosts] if self.hosts else []
        lines.append("")
        odd_ones = {odd.rank for odd in self.odd}
        is_long = len(self.ranks) > MAX_LINES
        lines += [
            f"rank {rank}: {line}"
            for rank, line in sorted(self.ranks.items())
            if not is_long or rank in odd_ones
        ]
        lines += [f"the other {len(self.ranks) - len(odd_ones)} ranks are in the .json"] if is_long else []
        return "\n".join(lines) + "\n"


def judge(
    beats: Mapping[int, Beat], conditions: Mapping[int, Condition], *, world_size: int, cause: str
) -> Verdict:
    """
    Args:
        beats: of this launch, by rank, the newest.
        conditions: of every rank.
        cause: what raised the alarm.
    """
    alive = {
        rank: beat
        for rank, beat in beats.items()
        if conditions[rank] is Condition.alive and beat.end in (None, "collective")
    }
    waits = _waits(alive, beats)
    difference = first_difference(beats)
    lost = _not_here(beats, conditions, world_size)
    if difference is not None and all(
        _fell_in_collective(beats.get(rank), conditions[rank]) for rank in lost
    ):
        lost = {}  # gloo ends a process that is sent what it does not expect
    odd = (
        lost
        or _alone(alive, world_size)
        or _waited_for(alive, waits)
        or _differing(beats, difference)
        or _behind(alive)
        or _cut_off(alive)
        or _elsewhere(alive)
    )
    steps = Counter(beat.step for beat in (alive or beats).values())
    step = max(steps, key=lambda step: (steps[step], step), default=0)
    return Verdict(
        attempt=max((beat.attempt for beat in beats.values()), default=0),
        step=step,
        world_size=world_size,
        cause=cause,
        odd=[_describe(beats.get(rank), rank, reason) for rank, reason in sorted(odd.items())],
        difference=difference,
        waits=_say_waits(alive, waits),
        sentence=_sentence(beats, odd, step, world_size),
        ranks={rank: _line(beats.get(rank), conditions[rank]) for rank in range(world_size)},
        hosts=_say_hosts(alive),
        stack=[] if odd or not alive else _main_stack(alive[min(alive)]),
    )


# -- who is odd: rank -> reason


def _not_here(
    beats: Mapping[int, Beat], conditions: Mapping[int, Condition], world_size: int
) -> dict[int, str]:
    """An error comes first: a rank that leaves with one may end others."""
    left = {rank: f"left with an error: {beat.error}" for rank, beat in beats.items() if beat.end == "error"}
    if left:
        return left
    found = {}
    for rank in range(world_size):
        beat, condition = beats.get(rank), conditions[rank]
        if beat is not None and beat.end == "well":
            found[rank] = "has left the run"
        elif condition is not Condition.alive:
            found[rank] = _REASONS[condition]
    return found


def _alone(alive: Mapping[int, Beat], world_size: int) -> dict[int, str]:
    return {rank: f"stands still at {_at(beat)}" for rank, beat in alive.items()} if world_size == 1 else {}


def _fell_in_collective(beat: Beat | None, condition: Condition) -> bool:
    return condition is Condition.gone and beat is not None and beat.waiting is not None


_REASONS = {
    Condition.gone: "is gone without a word: killed from outside, or for want of memory",
    Condition.stopped: "is stopped (SIGSTOP or a debugger)",
    Condition.stuck: "runs no Python any more: its process is there, and something holds the interpreter",
    Condition.in_kernel: "is in the kernel (state D): a disk or a network file system does not answer",
    Condition.unheard: "is not heard any more: its host is lost or cut off, or its process killed or stopped",
    Condition.absent: "has told nothing in this launch: it never got so far, or sees another run folder",
}


def _waits(alive: Mapping[int, Beat], beats: Mapping[int, Beat]) -> dict[int, tuple[Collective, list[int]]]:
    """Rank -> the collective that it is in, and the ranks that have not come there."""
    found = {}
    missing: dict[tuple[str, int], list[int]] = {}
    for rank, beat in alive.items():
        entry = stands_in(beat)
        if entry is None:
            continue
        if entry.peer is not None:
            found[rank] = entry, [entry.peer] if entry.peer >= 0 else []
            continue
        if (entry.group, entry.in_group) not in missing:
            members = _members(entry.group, beats)
            missing[entry.group, entry.in_group] = [
                at for at in members if _count(beats.get(at), entry.group) < entry.in_group
            ]
        found[rank] = entry, missing[entry.group, entry.in_group]
    return found


def _waited_for(
    alive: Mapping[int, Beat], waits: Mapping[int, tuple[Collective, list[int]]]
) -> dict[int, str]:
    """Ranks that others wait for, and that are in no collective themselves."""
    waiting_for: dict[int, list[int]] = defaultdict(list)
    for rank, (_, missing) in waits.items():
        for at in missing:
            waiting_for[at].append(rank)
    found = {}
    for rank, others in waiting_for.items():
        if rank in alive and rank not in waits:
            found[rank] = f"is at {_at(alive[rank])}, and {names(others)} {_verb(others, 'wait')} for it"
    return found


def first_difference(beats: Mapping[int, Beat]) -> Difference | None:
    """Of every group the first number at which its ranks called something else; of these, that which came
    first on the rank that was there first."""
    by_group: dict[str, dict[int, dict[int, Collective]]] = defaultdict(lambda: defaultdict(dict))
    for rank, beat in beats.items():
        for entry in beat.last:
            if not entry.is_between_two:
                by_group[entry.group][entry.in_group][rank] = entry
    found: list[tuple[int, Difference]] = []
    for group, calls in by_group.items():
        for number in sorted(calls):
            here = calls[number]
            alike: dict[object, list[int]] = defaultdict(list)
            for rank, entry in sorted(here.items()):
                alike[entry.step, entry.signature].append(rank)
            if len(alike) > 1:
                told = {_call(here[ranks[0]]): ranks for ranks in alike.values()}
                first = min(entry.number for entry in here.values())
                found.append((first, Difference(_label(group, beats), number, told)))
                break
    return min(found, key=lambda each: each[0])[1] if found else None


def _differing(beats: Mapping[int, Beat], difference: Difference | None) -> dict[int, str]:
    """The minority at the first difference; of two halves, those whose step is not like the ones before."""
    if difference is None:
        return {}
    *others, usual = sorted(difference.calls.values(), key=len)
    odd = sorted(rank for side in others for rank in side)
    if len(others[-1]) == len(usual):
        everyone = sorted([*odd, *usual])
        odd = [rank for rank in everyone if not is_like_before(beats[rank])]
        like_before = [side for side in difference.calls.values() if not set(side) & set(odd)]
        if not odd or len(like_before) != 1:
            return {
                rank: f"called {call} where {names([at for at in everyone if at not in side])} did not, and "
                "which is right cannot be seen"
                for call, side in difference.calls.items()
                for rank in side
            }
        usual = like_before[0]
    called = {rank: call for call, side in difference.calls.items() for rank in side}
    where = f"as collective {difference.in_group} of {difference.group}"
    return {
        rank: f"called {called[rank]} {where}, where {names(usual)} called {called[usual[0]]}"
        for rank in odd
        if rank not in usual
    }


def is_like_before(beat: Beat) -> bool:
    """Whether the collectives of this rank's step so far begin one of its earlier steps, too: who has left
    one out does not."""
    steps: dict[int, list[tuple[str, str, int | None]]] = defaultdict(list)
    for entry in beat.last:
        steps[entry.step].append((entry.group, *entry.signature))
    *before, now = sorted(steps) or [0]
    whole = before[1:]  # the oldest may have lost its beginning
    if not whole:
        return True
    begins = any(steps[step][: len(steps[now])] == steps[now] for step in whole)
    ended = len(whole) < 2 or any(steps[step] == steps[whole[-1]] for step in whole[:-1])
    return begins and ended


def _behind(alive: Mapping[int, Beat]) -> dict[int, str]:
    """Ranks that have issued fewer collectives in a group than its others: on a GPU nobody is seen to
    wait."""
    behind: dict[int, str] = {}
    for group in sorted({name for beat in alive.values() for name in beat.groups}):
        counts = {rank: beat.groups[group].num_issued for rank, beat in alive.items() if group in beat.groups}
        most = max(counts.values())
        for rank, count in counts.items():
            if count < most:
                behind[rank] = (
                    f"is at {_at(alive[rank])}, and has joined {count} collectives of "
                    f"{_label(group, alive)}, of which others have joined {most}"
                )
    if not behind:
        return {}
    first_step = min(alive[rank].step for rank in behind)
    return {rank: reason for rank, reason in behind.items() if alive[rank].step == first_step}


def _cut_off(alive: Mapping[int, Beat]) -> dict[int, str]:
    """Ranks of hosts that lost a link, else those outside the largest part of hosts that reach each other."""
    lost = {
        rank: f"lives, and its host lost the network: no carrier on {', '.join(beat.links_down)}"
        for rank, beat in alive.items()
        if beat.links_down
    }
    if lost:
        return lost
    parts = _parts(alive)
    if len(parts) < 2:
        return {}
    largest = max(parts, key=lambda part: (len(part), -min(part)))
    return {
        rank: f"lives, and its host ({alive[rank].host}) and that of {names(sorted(largest))} do not reach "
        "each other"
        for part in parts
        if part is not largest
        for rank in part
    }


def _elsewhere(alive: Mapping[int, Beat]) -> dict[int, str]:
    """Ranks that are not as far in their step as others of the same work: what DistributedDataParallel and
    GPUs wait for is not seen."""
    found: dict[int, str] = {}
    for work in {beat.work for beat in alive.values()}:
        peers = {rank: beat for rank, beat in alive.items() if beat.work == work}
        furthest = max(peers.values(), key=_progress)
        last = min(map(_progress, peers.values()))
        if last < _progress(furthest):
            found |= {
                rank: f"is at {_at(beat)}, where others are at {_at(furthest)}"
                for rank, beat in peers.items()
                if _progress(beat) == last
            }
    return found


def _progress(beat: Beat) -> tuple[int, int, int, int]:
    """How far in the run: step, part of the step, micro-step, phase in it."""
    part = {"data": 0, "agree": 0, "forward": 1, "backward": 1, "exchange": 1}.get(beat.phase, 2)
    order = ("data", "agree", "forward", "backward", "exchange", "update", "record", "evaluate", "save")
    at = order.index(beat.phase) if beat.phase in order else len(order)
    return beat.step, part, beat.micro_step, at


def _parts(alive: Mapping[int, Beat]) -> list[set[int]]:
    """Ranks that reach each other, directly or by others; those that nobody asked for are with their host."""
    if not any(beat.reached for beat in alive.values()):
        return [set(alive)]
    by_host: dict[str, set[int]] = defaultdict(set)
    for rank, beat in alive.items():
        by_host[(beat.address or (beat.host,))[0]].add(rank)
    part_of = {rank: part for part in by_host.values() for rank in part}
    for rank, beat in alive.items():
        for at in (int(at) for at, is_reached in beat.reached.items() if is_reached):
            mine, other = part_of[rank], part_of.get(at)
            if other is not None and other is not mine:
                mine |= other
                part_of |= dict.fromkeys(other, mine)
    return list({id(part): part for part in part_of.values()}.values())


# -- how it is said


def stands_in(beat: Beat) -> Collective | None:
    """The collective that a rank waits in, or that failed under it."""
    if beat.waiting is not None:
        return beat.waiting
    if beat.end == "collective" and beat.last and beat.last[-1].state == "failed":
        return beat.last[-1]
    return None


def names(ranks: Sequence[int]) -> str:
    """'rank 3', 'ranks 0, 2 and 3', 'ranks 0 to 62 and 64', cut where it gets long."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][-1] + 1:
            spans[-1].append(rank)
        else:
            spans.append([rank])
    told = [
        text
        for span in spans
        for text in ([f"{span[0]} to {span[-1]}"] if len(span) > 2 else [str(rank) for rank in span])
    ]
    more = len(told) - SHOWN_RANKS
    if more > 0:
        told = [*told[:SHOWN_RANKS], f"{more} more"]
    return f"ranks {' and '.join([', '.join(told[:-1]), told[-1]] if len(told) > 1 else told)}"


def _verb(ranks: Sequence[int], verb: str) -> str:
    return f"{verb}s" if len(ranks) == 1 else verb


def _at(beat: Beat) -> str:
    return f"{beat.at} since {format_duration(beat.age_s)}"


def _call(entry: Collective) -> str:
    what = f"{entry.kind} of {entry.elements:,} elements" if entry.elements else entry.kind
    micro = f", micro-step {entry.micro_step}" if entry.micro_step else ""
    return f"{what} in step {entry.step}{micro}, {entry.phase}"


def _label(group: str, beats: Mapping[int, Beat]) -> str:
    return next((beat.groups[group].label for beat in beats.values() if group in beat.groups), group)


def _members(group: str, beats: Mapping[int, Beat]) -> list[int]:
    for beat in beats.values():
        if group in beat.groups and beat.groups[group].ranks is not None:
            return list(beat.groups[group].ranks or ())
    return [rank for rank, beat in beats.items() if group in beat.groups]


def _count(beat: Beat | None, group: str) -> int:
    return beat.groups[group].num_issued if beat is not None and group in beat.groups else 0


def _say_waits(alive: Mapping[int, Beat], waits: Mapping[int, tuple[Collective, list[int]]]) -> list[str]:
    alike: dict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
    for rank, (entry, missing) in sorted(waits.items()):
        over = f" over {_label(entry.group, alive)} (number {entry.in_group} there)"
        with_peer = f" with rank {entry.peer}" if entry.is_between_two else over
        verb = "failed in" if entry.state == "failed" else "in"
        alike[f"{verb} {_call(entry)}{with_peer}", tuple(missing)].append(rank)
    return [
        f"{names(ranks)}: {what}" + (f", where {names(missing)} did not come" if missing else "")
        for (what, missing), ranks in alike.items()
    ]


def _say_hosts(alive: Mapping[int, Beat]) -> list[str]:
    return [
        f"rank {rank} on {beat.host} could not reach {names([int(at) for at in lost])}"
        for rank, beat in sorted(alive.items())
        if (lost := [at for at, is_reached in beat.reached.items() if not is_reached])
    ]


def _sentence(beats: Mapping[int, Beat], odd: Mapping[int, str], step: int, world_size: int) -> str:
    if not odd:
        errors = [beat.error for beat in beats.values() if beat.error]
        told = f"; {shortened(printable(errors[0]))}" if errors else ""
        if not any(map(stands_in, beats.values())):
            place = Counter(beat.at for beat in beats.values()).most_common(1)[0][0]
            return f"step {step}: all {world_size} ranks live and stand still, at {place}{told}"
        return (
            f"step {step}: all {world_size} ranks live and stand at the same collective: the network between "
            f"them, or what is below the collectives{told}"
        )
    told = "; ".join(
        f"{beats[rank].who if rank in beats else f'rank {rank}'} {reason}"
        for rank, reason in sorted(odd.items())[:SHOWN_RANKS]
    )
    more = len(odd) - SHOWN_RANKS
    return f"step {step}: {told}" + (f"; and {more} more ranks" if more > 0 else "")


def _describe(beat: Beat | None, rank: int, reason: str) -> Odd:
    if beat is None:
        return Odd(rank, reason)
    return Odd(
        rank,
        reason,
        host=beat.host,
        pid=beat.pid,
        step=beat.step,
        micro_step=beat.micro_step,
        phase=beat.phase,
        rows=(beat.position, beat.position + beat.num_rows - 1) if beat.num_rows else None,
        collective=_call(beat.last[-1]) if beat.last else None,
        stack=_main_stack(beat),
    )


def _main_stack(beat: Beat) -> list[str]:
    return next((lines for name, lines in beat.stacks if name == "main thread"), [])[-SHOWN_FRAMES:]


def _line(beat: Beat | None, condition: Condition) -> str:
    if beat is None:
        return condition.name
    entry = stands_in(beat)
    where = f", {entry.state} in {_call(entry)}" if entry is not None else ""
    end = f", left: {shortened(printable(beat.error or beat.end))}" if beat.end else ""
    return f"{condition.name} on {beat.host}, process {beat.pid}: {_at(beat)}{where}{end}"
