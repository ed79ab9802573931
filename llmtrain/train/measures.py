"""What a step is measured by beside its loss, when the loop asks: gradient norms by group of layers, and the
memory of weights, gradients and optimizer state on this rank."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.train.placement import Placement

KINDS = ("embedding", "attention", "mlp", "norm", "head")
"""Every weight is of one of them."""
THIRDS = ("blocks_first", "blocks_middle", "blocks_last")
"""By depth: every weight of a block, its norms too, is in one of them."""
GIB = 2**30


def groups_of(name: str, num_layers: int) -> tuple[str, ...]:
    """The groups that the weight with this canonical name is in: its kind, and in a block the third of the
    model's depth that the block's middle lies in."""
    first, *rest = name.split(".")
    if first == "blocks":
        index, layer = int(rest[0]), rest[1]
        kind = "norm" if layer.endswith("_norm") else layer
        return kind, THIRDS[3 * (2 * index + 1) // (2 * num_layers)]
    kinds = {
        "embedding": "embedding",
        "position_embedding": "embedding",
        "final_norm": "norm",
        "head": "head",
    }
    return (kinds[first],)


class GradientSquares:
    """Sums of squares of one step's gradient, by group, over what each rank answers for."""

    def __init__(self, placement: Placement, device: torch.device) -> None:
        self._placement = placement
        num_layers = placement.model.num_layers
        self._groups = {name: groups_of(name, num_layers) for name in placement.shapes}
        there = {group for groups in self._groups.values() for group in groups}
        self._sums = {
            group: torch.zeros((), dtype=torch.float64, device=device)
            for group in (*KINDS, *THIRDS)
            if group in there
        }
        self._num_elements = 0

    @torch.no_grad()
    def add(self, name: str, values: Tensor) -> None:
        """Elements of the gradient of the weight with this canonical name: no other call has them, on any
        rank."""
        # In fp32, as the whole norm is taken: a copy in fp64 would be twice as large as the gradient.
        square = torch.linalg.vector_norm(values.detach(), dtype=torch.float32).double() ** 2
        for group in self._groups[name]:
            self._sums[group] += square.to(self._sums[group].device)
        self._num_elements += values.numel()

    def norms(self, grad_norm: float) -> dict[str, float] | None:
        """L2 norms over all ranks by group. Every rank calls this, with one all-reduce.

        What was added may be scaled by any one factor, as by clipping: squares of the norms of KINDS add up
        to that of `grad_norm`.

        Returns:
            None where the norm is not finite, or the gradient is zero, or any element of it was not added.
        """
        told = torch.stack(
            [*self._sums.values(), torch.full_like(next(iter(self._sums.values())), self._num_elements)]
        )
        if self._placement.groups.topology.world_size > 1:
            dist.all_reduce(told)
        *squares, num_elements = told.tolist()
        by_group = dict(zip(self._sums, squares, strict=True))
        total = sum(by_group.get(kind, 0.0) for kind in KINDS)
        all_elements = sum(math.prod(shape) for shape in self._placement.shapes.values())
        is_known = num_elements == all_elements and math.isfinite(grad_norm) and 0 < total < math.inf
        if not is_known:
            return None
        return {group: grad_norm * math.sqrt(square / total) for group, square in by_group.items()}


@dataclass(frozen=True)
class Memory:
    """Bytes that tensors of one rank lie in on its device: what several share is counted once."""

    weights: int
    """Of the forward pass; and master weights, where they are the same tensors."""
    gradients: int
    """When the update began: after the step's last backward pass."""
    optimizer: int
    """Its state, and master weights apart."""

    def fields(self, *, peak_gib: float) -> dict[str, float]:
        """The peak by component, in GiB, which add up to it.

        Args:
            peak_gib: the most that the rank has held. What the components leave of it is activations,
                buffers, and what an allocator keeps; on a CPU the interpreter too.

        Returns:
            Nothing where the components are more than the peak: then not all were there at once. A first
            update makes an optimizer's state when some gradients have gone.
        """
        parts = {f"{name}_gib": num_bytes / GIB for name, num_bytes in asdict(self).items()}
        rest_gib = peak_gib - sum(parts.values())
        return {} if rest_gib < 0 else {**parts, "rest_gib": rest_gib}


def storages(tensors: Iterable[Tensor | None], device: torch.device) -> dict[int, int]:
    """Address to bytes of the memory on `device` that tensors lie in."""
    found = {}
    for tensor in tensors:
        if tensor is not None and tensor.device.type == device.type:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found


def memory_of(
    *,
    weights: Iterable[Tensor | None],
    optimizer: Iterable[Tensor | None],
    gradient_bytes: int,
    device: torch.device,
) -> Memory:
    """`gradient_bytes` was counted when the gradient was there."""
    of_weights, of_optimizer = storages(weights, device), storages(optimizer, device)
    apart = of_optimizer.keys() - of_weights.keys()
    return Memory(sum(of_weights.values()), gradient_bytes, sum(of_optimizer[at] for at in apart))
