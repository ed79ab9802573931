"""Seconds of collectives: rings with a latency and a bandwidth, inside a node and across nodes.

A group of `size` ranks has `per_node` of them on each node. Inside a node it moves bytes at the speed of the
GPU's links. Across nodes a node's network cards are shared by all groups that use them at once: a group with
2 of 8 GPUs on each node gets a quarter of the node's bytes a second (DeepSpeed's and Megatron's grids run all
groups of an axis at once).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CALL_S = 41e-6
HOP_S = 2.0e-6
LINK_EFFICIENCY = 0.71
"""Start of a call, one hop of a ring, and bytes moved over the bytes that NVLink could (300 GB/s a
direction): fitted to nccl-tests all_reduce on 2 to 8 A100 from 1 MiB to 1 GiB, VIA-Research/vTrain@f8dda84
trace/*/AR_GPU*_LUT, 77 rows, median error 5%. The V100 rows of that table are not of this form: their links
differ from pair to pair."""
NODE_HOP_S = 8e-6
"""A hop over the network: assumed, not measured."""


@dataclass(frozen=True, kw_only=True)
class Links:
    """Of one cluster, or one a row: arrays broadcast."""

    gpus_per_node: np.ndarray
    link_bytes_s: np.ndarray
    """Bytes a second and direction between GPUs of a node, as moved, not as printed."""
    node_bytes_s: np.ndarray
    """Bytes a second and direction that leave a node, over all its network cards."""
    call_s: float = CALL_S
    """Start of a call."""


def ranks_per_node(links: Links, *, size: np.ndarray, stride: np.ndarray) -> np.ndarray:
    """How many ranks of a group that takes every `stride`-th rank lie on one node."""
    found: np.ndarray = np.clip(np.floor(links.gpus_per_node / stride), 1, size)
    return found


def ring_bytes_s(links: Links, *, size: np.ndarray, stride: np.ndarray) -> np.ndarray:
    """Bytes a second that one rank of the ring sends."""
    per_node = ranks_per_node(links, size=size, stride=stride)
    shared = links.node_bytes_s * per_node / np.minimum(links.gpus_per_node, per_node * stride)
    bandwidth: np.ndarray = np.where(
        size > per_node, np.minimum(links.link_bytes_s, shared), links.link_bytes_s
    )
    return bandwidth


def all_reduce_s(num_bytes: np.ndarray, links: Links, *, size: np.ndarray, stride: np.ndarray) -> np.ndarray:
    """2 (n - 1) / n of the bytes go through each rank (ring); `num_bytes` is the whole buffer."""
    return 2 * _half_ring_s(num_bytes, links, size=size, stride=stride)


def all_gather_s(num_bytes: np.ndarray, links: Links, *, size: np.ndarray, stride: np.ndarray) -> np.ndarray:
    """Also of a reduce-scatter. `num_bytes` is the whole buffer, not one rank's part."""
    return _half_ring_s(num_bytes, links, size=size, stride=stride)


def _half_ring_s(num_bytes: np.ndarray, links: Links, *, size: np.ndarray, stride: np.ndarray) -> np.ndarray:
    per_node = ranks_per_node(links, size=size, stride=stride)
    num_nodes = size / per_node
    latency = (
        links.call_s / 2 + (size - num_nodes) * HOP_S + np.where(num_nodes > 1, num_nodes, 0) * NODE_HOP_S
    )
    wire = (size - 1) / size * num_bytes / ring_bytes_s(links, size=size, stride=stride)
    found: np.ndarray = np.where(size > 1, latency + wire, 0.0)
    return found


def all_to_all_s(
    num_bytes: np.ndarray,
    links: Links,
    *,
    size: np.ndarray,
    stride: np.ndarray,
    outside_share: np.ndarray | float = 1.0,
) -> np.ndarray:
    """`num_bytes` is what one rank sends in all, its own part included. What stays in the node goes over
    links, the rest over the rank's share of the node's network cards; `outside_share` of the latter, where
    copies are spared."""
    per_node = ranks_per_node(links, size=size, stride=stride)
    inside = (per_node - 1) / size * num_bytes / links.link_bytes_s
    share = links.node_bytes_s / np.minimum(links.gpus_per_node, per_node * stride)
    outside = (size - per_node) / size * num_bytes * outside_share / share
    found: np.ndarray = np.where(size > 1, links.call_s + np.maximum(inside, outside), 0.0)
    return found


def send_s(num_bytes: np.ndarray, links: Links, *, stride: np.ndarray) -> np.ndarray:
    """To the neighbour `stride` ranks on, while every other rank of the node does the same."""
    is_inside = stride < links.gpus_per_node
    share = links.node_bytes_s / links.gpus_per_node
    found: np.ndarray = links.call_s + num_bytes / np.where(is_inside, links.link_bytes_s, share)
    return found
