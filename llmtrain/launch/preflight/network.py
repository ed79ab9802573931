"""How names, addresses, clocks and transfers between hosts are judged: the part of `judge.py` about the
network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from statistics import median

from llmtrain.launch.preflight.config import PreflightConfig
from llmtrain.launch.preflight.findings import (
    Answers,
    Finding,
    Group,
    Level,
    Link,
    error,
    network_rate,
    ok,
    warning,
)
from llmtrain.launch.preflight.host import Lookup, Network, Place, is_loopback
from llmtrain.units import format_bytes, format_duration


def before_meeting(place: Place, network: Network) -> list[Finding]:
    """What keeps the ranks of this host from those of others, by what it knows alone. Loopback is a warning:
    the others may be on this machine too."""
    if place.local_world_size is None or place.world_size <= place.local_world_size:
        return []
    found = list(_own_name(place.host, network))
    if place.rank >= place.local_world_size:  # rank 0 may call its own host what it likes
        found += _master_here(place.host, network)
    is_unknown = network.master is not None and network.master.error is not None
    return [
        each
        if is_unknown and each.topic == "MASTER_ADDR"
        else warning(
            each.topic, each.host, f"unless all ranks are on this machine: {each.found}", each.remedy
        )
        for each in found
    ]


def names(answers: Answers, hosts: list[Group], cfg: PreflightConfig) -> Iterator[Finding]:
    """Addresses, once ranks have met."""
    places = [rank.place for rank in answers.ranks]
    several = len({place.machine for place in places}) > 1
    networks = [(group, host.network) for group, host in answers.by_host(hosts) if host.network is not None]
    for group, network in networks:
        for lookup in filter(None, (network.own, network.master)):
            if lookup.seconds > cfg.max_lookup_s:
                yield warning(
                    "names",
                    group.label(),
                    f"resolving {lookup.name} took {format_duration(lookup.seconds)}",
                    "put the hosts' names into /etc/hosts, or mend the name servers of /etc/resolv.conf",
                )
        own = list(_own_name(group.label(), network))
        if several:
            yield from own
            yield from _master_here(group.label(), network)
        elif not places[0].has_launcher:
            yield from (warning(each.topic, each.host, each.found, each.remedy) for each in own)
        facts = ", ".join(
            f"{name} {' '.join(addresses)}" for name, addresses in network.interfaces.items() if addresses
        )
        known = [f"{lookup.name} is {_told(lookup)}" for lookup in (network.own, network.master) if lookup]
        yield ok("names", group.label(), f"{', '.join(known)}; {facts}")
    if several:
        yield from _master_owner(places, networks)


def _own_name(host: str, network: Network) -> Iterator[Finding]:
    """What gloo and NCCL would bind to: gloo takes the first address of the host's own name that it can."""
    for variable, wanted in network.chosen.items():
        chosen = interfaces_of(variable, wanted, network.interfaces)
        addresses = [address for name in chosen for address in network.interfaces[name]]
        there = " ".join(name for name in network.interfaces)
        if not addresses or all(map(is_loopback, addresses)):
            what = "names no interface with an address" if not addresses else "names the loopback interface"
            yield error(
                "names",
                host,
                f"{variable}={wanted} {what}; there are {there}",
                f"set {variable} to the one that reaches the other hosts, or unset it",
            )
    if "GLOO_SOCKET_IFNAME" in network.chosen:
        return
    every = {address for of_one in network.interfaces.values() for address in of_one}
    usable = [address for address in network.own.addresses if is_loopback(address) or address in every]
    if usable and not is_loopback(usable[0]):
        return
    names = [
        name
        for name, addresses in network.interfaces.items()
        if addresses and not all(map(is_loopback, addresses))
    ]
    yield error(
        "names",
        host,
        f"its own name, {network.own.name}, is {_told(network.own)}: gloo would use loopback, where no other "
        "host reaches it",
        f"set GLOO_SOCKET_IFNAME={names[0] if names else 'INTERFACE'} there, or mend the name's line in "
        "/etc/hosts",
    )


def _master_here(host: str, network: Network) -> Iterator[Finding]:
    master = network.master
    if master is None:
        return
    if master.error is not None:
        yield error(
            "MASTER_ADDR",
            host,
            f"MASTER_ADDR={master.name} does not resolve: {master.error}",
            "give an address, or a name that every host knows",
        )
    elif all(map(is_loopback, master.addresses)):
        yield error(
            "MASTER_ADDR",
            host,
            f"MASTER_ADDR={master.name} is {_told(master)}, the host itself, and ranks are on several hosts",
            "set MASTER_ADDR to an address of rank 0's host that the others reach, or mend the name's line "
            "in /etc/hosts (127.0.1.1 there is the usual cause)",
        )


def _master_owner(places: list[Place], networks: list[tuple[Group, Network]]) -> Iterator[Finding]:
    """Whose address MASTER_ADDR is, as each host resolves it."""
    for group, network in networks:
        master = network.master
        if master is None or master.error is not None or all(map(is_loopback, master.addresses)):
            continue
        owners = [each for each, its in networks if not its.addresses.isdisjoint(master.addresses)]
        if any(0 in owner.ranks for owner in owners) or not any(0 in each.ranks for each, _ in networks):
            continue
        if owners and places[0].agent_keeps_store:
            continue  # torchrun listens where its rendezvous is, which need not be rank 0's host
        whose = f"{owners[0].name}'s" if owners else "no address of any host of the run"
        yield Finding(
            level=Level.error if owners else Level.warning,  # the ranks did meet: somebody forwards it
            topic="MASTER_ADDR",
            host=group.label(),
            found=f"MASTER_ADDR={master.name} is {_told(master)} there, {whose}, and rank 0 runs on "
            f"{places[0].host}",
            remedy="set it to an address of rank 0's host"
            + ("" if owners else ", unless something between forwards it"),
        )


def clocks(answers: Answers, hosts: list[Group], cfg: PreflightConfig) -> Iterator[Finding]:
    worst = 0.0
    for group in hosts:
        clock = answers.clocks.get(group.ranks[0])
        if clock is None:
            continue
        worst = max(worst, abs(clock.ahead_s) + clock.bound_s)
        if abs(clock.ahead_s) - clock.bound_s > cfg.max_clock_skew_s:
            way = "ahead of" if clock.ahead_s > 0 else "behind"
            yield warning(
                "clock",
                group.label(),
                f"its clock is {abs(clock.ahead_s):.3f} s (±{clock.bound_s:.3f}) {way} that of rank 0's host",
                "run chrony or another NTP client there: logs, leases and time limits go by the clock",
            )
    if answers.clocks:
        yield ok("clock", "", f"clocks differ by at most {format_duration(worst)}")


def transfers(answers: Answers, hosts: list[Group], cfg: PreflightConfig) -> Iterator[Finding]:
    """Sums that are wrong, and slow ranks and links."""
    told, num_ranks = answers.all_reduce, len(answers.ranks)
    if not told:
        return
    owner = {rank: group for group in hosts for rank in group.ranks}
    for group in hosts:
        wrong = [rank for rank in group.ranks if told[rank].num_wrong]
        if wrong:
            yield error(
                "network",
                group.label(wrong),
                f"an all-reduce gave {told[wrong[0]].num_wrong:,} wrong elements of "
                f"{format_bytes(told[wrong[0]].num_bytes)}",
                "take the host out of the run; test its memory, GPUs and network card",
            )
    slowest = max(range(num_ranks), key=lambda rank: told[rank].seconds)
    bus = told[slowest].bus_bytes_per_s(num_ranks)
    if cfg.min_bus_gb_per_s is not None and bus < cfg.min_bus_gb_per_s * 1e9:
        yield error(
            "network",
            owner[slowest].label([slowest]),
            f"an all-reduce of {format_bytes(told[slowest].num_bytes)} has {network_rate(bus)} of bus "
            f"bandwidth, less than preflight.min_bus_gb_per_s={cfg.min_bus_gb_per_s:g}",
            "look at the fabric, and which interface is used (NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME)",
        )
    yield from slow_links(answers.links, hosts, ratio=cfg.slow_ratio)
    first = told[slowest]
    yield ok(
        "network",
        "",
        f"all-reduce of {format_bytes(first.num_bytes)} in {format_duration(first.seconds)}: "
        f"{network_rate(first.bytes_per_s)}, bus {network_rate(bus)}",
    )


def slow_links(links: Sequence[Link], hosts: Sequence[Group], *, ratio: float) -> Iterator[Finding]:
    """Who is `ratio` times slower than others of its kind: links within hosts and between them are two kinds.

    A rank is as fast as its best link: one bad rank makes slow links for all that talk to it, but leaves each
    of them a fast one to somebody else.
    """
    owner = {rank: group for group in hosts for rank in group.ranks}
    for is_within in (True, False):
        kind = [link for link in links if (owner[link.source] is owner[link.target]) is is_within]
        blamed: set[int] = set()
        for verb, end in (("sends", "source"), ("receives", "target")):
            best: dict[int, float] = {}
            for link in kind:
                rank = getattr(link, end)
                best[rank] = max(best.get(rank, 0.0), link.speed.bytes_per_s)
            if len(best) < 3:
                continue
            middle = median(best.values())
            slow = [rank for rank in sorted(best) if best[rank] * ratio < middle]
            blamed.update(slow)
            for group in hosts:
                if own := [rank for rank in group.ranks if rank in slow]:
                    worst = min(best[rank] for rank in own)
                    yield warning(
                        "network",
                        group.label(own),
                        f"{verb} at {network_rate(worst)} at best, and the median rank at "
                        f"{network_rate(middle)}, {'within its host' if is_within else 'between hosts'}",
                        "look at its network card, cable, PCIe link and what else runs there",
                    )
        rest = [link for link in kind if link.source not in blamed and link.target not in blamed]
        middle = median(link.speed.bytes_per_s for link in kind) if kind else 0.0
        for link in rest:
            if link.speed.bytes_per_s * ratio < middle:
                yield warning(
                    "network",
                    f"{owner[link.source].label([link.source])} to {owner[link.target].label([link.target])}",
                    f"{network_rate(link.speed.bytes_per_s)}, and the median link has {network_rate(middle)}",
                    "look at the path between them: cable, switch port, routing",
                )


def interfaces_of(variable: str, wanted: str, interfaces: Iterable[str]) -> list[str]:
    """Interfaces that the variable chooses. NCCL's holds beginnings of names, `=` before them for whole names
    and `^` for all but these (its user guide, NCCL_SOCKET_IFNAME); gloo's holds whole names."""
    is_exact = variable.startswith("GLOO")
    is_negated = False
    if not is_exact:
        is_negated = wanted.startswith("^")
        wanted = wanted.removeprefix("^")
        is_exact = wanted.startswith("=")
        wanted = wanted.removeprefix("=")
    names = [name for name in wanted.split(",") if name]

    def is_named(interface: str) -> bool:
        return any(interface == name if is_exact else interface.startswith(name) for name in names)

    return [interface for interface in interfaces if is_named(interface) is not is_negated]


def _told(lookup: Lookup) -> str:
    return " ".join(lookup.addresses) if lookup.addresses else f"no address ({lookup.error})"
