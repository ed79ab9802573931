"""Clusters: GPUs, the links between them, the network between nodes, and the price.

Numbers are rows of tables/cost/gpus.csv and nodes.csv, each with its source; conf/cluster only names them. A
user's own numbers (`cluster.network_gbps=400`) stand in place of a row's.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from llmtrain.errors import ConfigError, unknown_name
from llmtrain.planner import hardware

GPUS_TABLE = Path(__file__).parents[1] / "tables" / "cost" / "gpus.csv"
NODES_TABLE = Path(__file__).parents[1] / "tables" / "cost" / "nodes.csv"
THIS_MACHINE, CUSTOM = "this_machine", "custom"
PRECISIONS = ("bf16", "fp16", "fp8", "fp32")
PROCESS_LINK_SHARE = 0.25
"""Of the memory bandwidth, what two processes of one machine exchange in one direction: each byte is written
and read twice. Assumed, not measured."""


@dataclass(kw_only=True)
class ClusterConfig:
    """`cluster=NAME` and what is to differ from that row of the tables; null: the row's."""

    name: str
    """A row of tables/cost/nodes.csv; this_machine: the CPU this runs on, measured; custom: all from
    below."""
    nodes: int = 1
    gpus_per_node: int | None = None
    """On this_machine: the ranks that share its cores and memory; null: 1."""
    gpu: str | None = None
    """A row of tables/cost/gpus.csv."""
    network_gbps: float | None = None
    """1e9 bits a second that leave a node in one direction, over all its network cards."""
    peak_tflops: float | None = None
    """1e12 FLOP/s of one GPU's dense matrix products, in whatever precision the layout has."""
    mem_gib: float | None = None
    """Memory of one GPU that a program can get, GiB."""
    mem_gbs: float | None = None
    """Memory bandwidth of one GPU, 1e9 bytes a second."""
    link_gbs: float | None = None
    """1e9 bytes a second between GPUs of a node, one direction, over all links of a GPU."""
    num_multiprocessors: int | None = None
    price_usd_per_gpu_hour: float | None = None
    price_date: str | None = None
    """When the price was found: a year and a month, or a day."""
    goodput: float = 0.9
    """Part of the hours that goes into steps that count; the rest are restarts, lost steps, checkpoints,
    failed nodes. More than 0.9 in 54 days of Llama 3 on 16,384 GPUs (arXiv:2407.21783, section 3.3.4);
    elsewhere assumed."""

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "num_multiprocessors"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"cluster.{name}={value} must be at least 1")
        for name in ("network_gbps", "peak_tflops", "mem_gib", "mem_gbs", "link_gbs"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"cluster.{name}={value} must be above 0, or null for what the tables say")
        price = self.price_usd_per_gpu_hour
        if price is not None and not (math.isfinite(price) and price >= 0):
            raise ConfigError(
                f"cluster.price_usd_per_gpu_hour={price} must be at least 0, or null if unknown"
            )
        if not 0 < self.goodput <= 1:
            raise ConfigError(f"cluster.goodput={self.goodput} must be above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One device: what one rank runs on."""

    name: str
    peak_flops: Mapping[str, float]
    """FLOP/s of dense matrix products by precision; only those it has."""
    mem_bytes: float
    """What a program can get at most."""
    mem_bytes_s: float
    link_bytes_s: float
    """To other GPUs of its node, one direction, as printed."""
    num_multiprocessors: int
    source: str
    unverified: tuple[str, ...] = ()
    """Columns of gpus.csv that are from memory."""

    def peak(self, precision: str) -> float:
        """FLOP/s in `precision`. ConfigError where it has none."""
        if precision not in self.peak_flops:
            raise ConfigError(
                f"{self.name} has no matrix products in {precision}; it has {', '.join(self.peak_flops)}. "
                "Choose one of those, or give cluster.peak_tflops"
            )
        return self.peak_flops[precision]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    name: str
    gpu: Gpu
    gpus_per_node: int
    num_nodes: int
    node_bytes_s: float
    """Leave a node in one direction over all its network cards, as printed. Of a single node without a
    network: link_bytes_s, which nothing uses."""
    price_usd_per_gpu_hour: float | None
    price_date: str | None
    price_source: str
    goodput: float
    source: str

    @property
    def num_gpus(self) -> int:
        return self.gpus_per_node * self.num_nodes


def columns(cluster: Cluster, precision: str = "bf16") -> dict[str, float]:
    """The cluster as keywords of `candidates()`; `precision` is the layout's."""
    return {
        "peak_flops": cluster.gpu.peak(precision),
        "mem_bytes_s": cluster.gpu.mem_bytes_s,
        "num_multiprocessors": float(cluster.gpu.num_multiprocessors),
        "gpus_per_node": float(cluster.gpus_per_node),
        "link_bytes_s": cluster.gpu.link_bytes_s,
        "node_bytes_s": cluster.node_bytes_s,
    }


def gpu_names() -> list[str]:
    """Names of tables/cost/gpus.csv."""
    return list(_rows(GPUS_TABLE))


def cluster_names() -> list[str]:
    """Names of tables/cost/nodes.csv, and the two that need no row."""
    return [*_rows(NODES_TABLE), THIS_MACHINE, CUSTOM]


def find_gpu(name: str) -> Gpu:
    """A row of tables/cost/gpus.csv. ConfigError for an unknown name, with the nearest known one first."""
    rows = _rows(GPUS_TABLE)
    if name not in rows:
        raise ConfigError(
            f"{unknown_name('GPU', name, rows)}. For another one give cluster.peak_tflops, mem_gib, "
            "mem_gbs, link_gbs and num_multiprocessors with cluster=custom, or add a row to "
            "llmtrain/planner/tables/cost/gpus.csv"
        )
    row = rows[name]
    sources = [row[column] for column in ("flops_source", "bandwidth_source") if row[column]]
    return Gpu(
        name=name,
        peak_flops={p: float(row[f"{p}_tflops"]) * 1e12 for p in PRECISIONS if row[f"{p}_tflops"]},
        mem_bytes=float(row["mem_gib"]) * 2**30,
        mem_bytes_s=float(row["mem_gbs"]) * 1e9,
        link_bytes_s=float(row["link_gbs"]) * 1e9,
        num_multiprocessors=int(row["num_multiprocessors"]),
        source="; ".join(dict.fromkeys("; ".join(sources).split("; "))) or "from memory, unverified",
        unverified=tuple(row["unverified"].split()),
    )


def find_cluster(name: str, num_nodes: int = 1, **overrides: int | float | str | None) -> Cluster:
    """`num_nodes` nodes of a row of tables/cost/nodes.csv; `overrides` are fields of `ClusterConfig`.

    this_machine is measured by the call, which takes a few seconds.

    Raises:
        ConfigError: An unknown cluster, GPU or field (the nearest known name first), or a value that cannot
        be.
    """
    known = [each.name for each in fields(ClusterConfig) if each.name not in ("name", "nodes")]
    for given in overrides:
        if given not in known:
            raise ConfigError(unknown_name("field of a cluster", given, known))
    return resolve_cluster(ClusterConfig(name=name, nodes=num_nodes, **overrides))  # type: ignore[arg-type]


def resolve_cluster(cfg: ClusterConfig) -> Cluster:
    """The cluster that a config means. Raises as `find_cluster` does."""
    rows = _rows(NODES_TABLE)
    if cfg.name == THIS_MACHINE:
        row = {"gpus_per_node": "1", "source": "measured here"}
        gpu = this_cpu(cfg.gpus_per_node or 1)
    elif cfg.name == CUSTOM:
        row = {"gpus_per_node": "", "source": "given"}
        gpu = find_gpu(cfg.gpu) if cfg.gpu is not None else _given_gpu(cfg)
    elif cfg.name in rows:
        row = rows[cfg.name]
        gpu = find_gpu(cfg.gpu or row["gpu"])
    else:
        raise ConfigError(
            f"{unknown_name('cluster', cfg.name, cluster_names())}. For another one give cluster=custom with "
            "cluster.gpu, gpus_per_node and network_gbps, or add a row to "
            "llmtrain/planner/tables/cost/nodes.csv"
        )
    gpu = _overridden(gpu, cfg)
    gpus_per_node = cfg.gpus_per_node or int(row["gpus_per_node"] or 0)
    network_gbps = cfg.network_gbps or float(row.get("network_gbps") or 0)
    if not gpus_per_node:
        raise ConfigError(f"cluster={cfg.name} needs cluster.gpus_per_node: how many GPUs a node has")
    if not network_gbps and cfg.nodes > 1:
        raise ConfigError(
            f"cluster={cfg.name} with cluster.nodes={cfg.nodes} needs cluster.network_gbps: what leaves a "
            "node in one direction, over all its network cards"
        )
    is_own_price = cfg.price_usd_per_gpu_hour is not None
    price = cfg.price_usd_per_gpu_hour if is_own_price else _number(row.get("price_usd_per_gpu_hour"))
    return Cluster(
        name=cfg.name,
        gpu=gpu,
        gpus_per_node=gpus_per_node,
        num_nodes=cfg.nodes,
        node_bytes_s=network_gbps / 8 * 1e9 if network_gbps else gpu.link_bytes_s,
        price_usd_per_gpu_hour=price,
        price_date=cfg.price_date if is_own_price else row.get("price_date") or None,
        price_source="given" if is_own_price else row.get("price_source", ""),
        goodput=cfg.goodput,
        source=row["source"],
    )


def _overridden(gpu: Gpu, cfg: ClusterConfig) -> Gpu:
    """What the user gave in place of the row's."""
    if cfg.peak_tflops is not None:
        gpu = replace(gpu, peak_flops=dict.fromkeys(PRECISIONS, cfg.peak_tflops * 1e12))
    if cfg.mem_gib is not None:
        gpu = replace(gpu, mem_bytes=cfg.mem_gib * 2**30)
    if cfg.mem_gbs is not None:
        gpu = replace(gpu, mem_bytes_s=cfg.mem_gbs * 1e9)
    if cfg.link_gbs is not None:
        gpu = replace(gpu, link_bytes_s=cfg.link_gbs * 1e9)
    if cfg.num_multiprocessors is not None:
        gpu = replace(gpu, num_multiprocessors=cfg.num_multiprocessors)
    return gpu


def _given_gpu(cfg: ClusterConfig) -> Gpu:
    needed = ("peak_tflops", "mem_gib", "mem_gbs", "link_gbs", "num_multiprocessors")
    missing = [f"cluster.{name}" for name in needed if getattr(cfg, name) is None]
    if missing:
        raise ConfigError(
            f"cluster={cfg.name} without cluster.gpu needs {', '.join(missing)}; or name a GPU of "
            "llmtrain/planner/tables/cost/gpus.csv: cluster.gpu=h100_sxm"
        )
    unset = Gpu(
        name=CUSTOM,
        peak_flops={},
        mem_bytes=0.0,
        mem_bytes_s=0.0,
        link_bytes_s=0.0,
        num_multiprocessors=0,
        source="given",
    )
    return _overridden(unset, cfg)


def this_cpu(num_ranks: int, *, threads_per_rank: int | None = None) -> Gpu:
    """One of `num_ranks` ranks that share this machine's cores, memory and bandwidth, measured while all of
    them work. None: the machine's threads, spread evenly."""
    threads = threads_per_rank or max(1, hardware.num_threads() // num_ranks)
    speed = hardware.measure_ranks(num_ranks, threads_per_rank=threads)
    return Gpu(
        name=THIS_MACHINE,
        peak_flops={"fp32": speed.flops},
        mem_bytes=_memory_bytes() / num_ranks,
        mem_bytes_s=speed.copied_bytes_s,
        link_bytes_s=speed.copied_bytes_s * PROCESS_LINK_SHARE,
        num_multiprocessors=threads,
        source=speed.source,
    )


def _memory_bytes() -> int:
    """Of the machine, or of the control group if that is less."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
    return min(found, int(text)) if text.isdigit() else found


def _number(cell: str | None) -> float | None:
    return float(cell) if cell else None


def _rows(table: Path) -> dict[str, dict[str, str]]:
    lines = table.read_text(encoding="utf-8").splitlines()
    return {row["name"]: row for row in csv.DictReader(line for line in lines if not line.startswith("#"))}
