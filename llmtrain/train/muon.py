"""Muon for the matrices of blocks, AdamW for everything else, whatever ranks hold.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) makes a matrix's momentum nearly
orthogonal before it is applied:

    momentum <- mu * momentum + gradient
    weight   <- weight - lr * (0.2 * sqrt(max(rows, columns)) * O(gradient + mu * momentum) + decay * weight)

The factor gives updates the root mean square that AdamW's have, and decay is decoupled (Liu et al. 2025,
arXiv:2502.16982, section 2.2), so a rate and a decay found for AdamW carry over.

All but O works on single elements, so ranks do it on whatever pieces they hold: parts by tensor parallelism,
ranges of those by ZeRO-1 and 2. O wants the whole matrix. One rank of the pipeline stage owns each: it gets
the pieces, makes the matrix orthogonal, and sends the result to everyone who holds a piece. What is held
twice is computed once, so copies stay equal to the last bit.

Numbers travel and multiply in bf16 on CUDA, as the authors publish it, and in fp32 on a CPU. Momentum and
master weights are fp32 always.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from llmtrain.parallel.groups import Axis, Groups
from llmtrain.train.config import OptimizerConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of x, x^3, x^5 on singular values (Jordan et al. 2024): steep at 0 rather than exact at 1."""
NUM_ITERATIONS = 5
"""Jordan et al. 2024. Singular values come out between 0.68 and 1.21 where they were at least 0.002 of the
matrix's norm (computed), and smaller ones are multiplied by up to 3.4445^5 = 485."""
MIN_NORM = 1e-7
"""Added to a matrix's norm, in its code; a gradient of zeros gives an update of zeros."""
RMS_OF_ADAMW = 0.2
"""Liu et al. 2025, equation 4: what AdamW's updates have in common runs, 0.2 to 0.4."""
MAX_ROUND_BYTES = 256 << 20
"""Of matrices that an owner works on between two exchanges, or one matrix if that is larger."""


def orthogonal(update_RC: Tensor) -> Tensor:
    """U V^T of the singular value decomposition U S V^T, roughly, by Newton and Schulz's iteration."""
    x = update_RC.mT if update_RC.shape[0] > update_RC.shape[1] else update_RC  # the smaller Gram matrix
    # The Frobenius norm: no singular value is larger.
    norm = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
    x = x / (norm + MIN_NORM)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if update_RC.shape[0] > update_RC.shape[1] else x


# -- who does what: arithmetic


@dataclass(frozen=True)
class Range:
    """The elements [start, end) of a flattened whole matrix, on a rank of the axis."""

    rank: int
    start: int
    end: int


@dataclass(frozen=True)
class Task:
    """A matrix that one rank makes orthogonal."""

    name: str
    shape: tuple[int, int]
    owner: int
    sources: tuple[Range, ...]
    """Who sends what to the owner: every element once."""
    holders: tuple[Range, ...]
    """Who gets what back: everyone who holds some."""

    @property
    def size(self) -> int:
        """Elements of the largest buffer that the owner needs for it."""
        return max(math.prod(self.shape), sum(held.end - held.start for held in self.holders))


def plan(
    shapes: Mapping[str, tuple[int, int]],
    held: Sequence[Mapping[str, Sequence[tuple[int, int]]]],
    *,
    max_size: int,
) -> list[list[Task]]:
    """Give every matrix an owner, the work spread evenly, and cut the work into rounds.

    Args:
        shapes: of whole matrices, the same order on every rank.
        held: of every rank, by matrix the (start, end) of what it holds.
        max_size: elements that an owner works on in a round, unless one matrix has more.
    """
    holders: dict[str, list[Range]] = defaultdict(list)
    for rank, mine in enumerate(held):
        for name, ranges in mine.items():
            holders[name] += [Range(rank, start, end) for start, end in ranges]
    load = [0] * len(held)
    tasks = {}
    for name in sorted(shapes, key=lambda name: -_cost(shapes[name])):  # the largest first, else in order
        here = {each.rank for each in holders[name]}
        owner = min(range(len(held)), key=lambda rank: (load[rank], rank not in here, rank))
        load[owner] += _cost(shapes[name])
        sources = _cover(holders[name], math.prod(shapes[name]), near=owner, num_ranks=len(held))
        tasks[name] = Task(name, shapes[name], owner, sources, tuple(holders[name]))
    rounds: list[list[Task]] = []
    at, filled = [0] * len(held), [0] * len(held)  # of each owner: its round, and what is in that
    for name in shapes:
        task = tasks[name]
        owner = task.owner
        if filled[owner] and filled[owner] + task.size > max_size:
            at[owner], filled[owner] = at[owner] + 1, 0
        filled[owner] += task.size
        if at[owner] == len(rounds):
            rounds.append([])
        rounds[at[owner]].append(task)
    return rounds


def _cost(shape: tuple[int, int]) -> int:
    """Multiplications of an iteration."""
    few, many = sorted(shape)
    return few * few * (2 * many + few)


def _cover(holders: Sequence[Range], numel: int, *, near: int, num_ranks: int) -> tuple[Range, ...]:
    """Every element once, from the rank `near` or the next after it that has it."""
    found = []
    done = 0
    while done < numel:
        here = [each for each in holders if each.start <= done < each.end]
        assert here, f"nobody holds element {done} of {numel}"
        best = min(here, key=lambda each: (each.rank - near) % num_ranks)
        found.append(Range(best.rank, done, best.end))
        done = best.end
    return tuple(found)


# -- the optimizer


@dataclass(frozen=True)
class Held:
    """A piece of a weight, and the tensor in which this rank's optimizer finds it."""

    name: str
    start: int
    """In the flattened whole weight."""
    length: int
    master: Tensor
    begin: int
    """In the flattened master."""

    @property
    def end(self) -> int:
        return self.start + self.length

    def of(self, flat: Tensor, start: int, end: int) -> Tensor:
        """The elements [start, end) of the whole weight, in a tensor laid out as the master."""
        first = self.begin + start - self.start
        return flat.view(-1)[first : first + end - start]


@dataclass(frozen=True)
class _Message:
    """A range of a matrix on its way. Ranks are those of the axis."""

    source: int
    destination: int
    task: Task
    range: Range

    @property
    def length(self) -> int:
        return self.range.end - self.range.start

    def of(self, flat: Tensor) -> Tensor:
        """Its elements in the flattened whole matrix."""
        return flat[self.range.start : self.range.end]


def _whole(named: Mapping[str, Tensor]) -> list[Held]:
    return [Held(name, 0, weight.numel(), weight, 0) for name, weight in named.items()]


class Muon(Optimizer):
    """One process with whole weights, until `attach` says otherwise.

    A group of parameters has a role: "matrices" or "others". An engine may put flat pieces in their place,
    and may call `step` for one group at a time. It must not leave a group empty on some ranks.
    """

    def __init__(
        self,
        *,
        matrices: Mapping[str, Tensor],
        decayed: Mapping[str, Tensor],
        vectors: Mapping[str, Tensor],
        cfg: OptimizerConfig,
    ) -> None:
        """
        Args:
            matrices: by canonical name. Muon's, the rest is AdamW's.
            decayed: embeddings and head.
            vectors: norms and biases: not decayed.
        """
        self.cfg = cfg
        groups: list[dict[str, Any]] = [
            {"params": list(matrices.values()), "role": "matrices"},
            # One group: every pipeline stage has vectors and not every one a decayed weight, and stages that
            # differ in their groups make other collectives.
            {"params": [*decayed.values(), *vectors.values()], "role": "others"},
        ]
        super().__init__(groups, {"lr": cfg.peak_lr})
        alone = Axis(0, 1, (0,), None)
        shapes = {name: tuple(weight.shape) for name, weight in matrices.items()}
        self._attach(_whole(matrices), _whole(decayed), shapes=shapes, axis=alone)

    def attach(self, held: Iterable[Held], groups: Groups, shapes: Mapping[str, Sequence[int]]) -> None:
        """Say which pieces of what weights are here. Every rank calls this.

        Args:
            held: all weights of this rank, in canonical order.
            shapes: by canonical name, of the whole weights.
        """
        held = list(held)
        matrices, decayed = set(self._shapes), {each.name for each in self._decayed}
        self._attach(
            [each for each in held if each.name in matrices],
            [each for each in held if each.name in decayed],
            shapes={name: tuple(shapes[name]) for name in self._shapes},
            axis=_stage_axis(groups),
        )

    def _attach(
        self, matrices: list[Held], decayed: list[Held], *, shapes: Mapping[str, Any], axis: Axis
    ) -> None:
        self._shapes, self._decayed, self._axis = dict(shapes), decayed, axis
        self._held: dict[str, list[Held]] = defaultdict(list)
        for each in matrices:
            self._held[each.name].append(each)
        mine = {name: [(each.start, each.end) for each in some] for name, some in self._held.items()}
        everyones: list[Any] = [mine]
        if axis.group is not None:
            everyones = [None] * axis.size
            dist.all_gather_object(everyones, mine, group=axis.group)
        self._masters = [master for group in self.param_groups for master in group["params"]]
        self._device = self.param_groups[0]["params"][0].device
        self._dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        self._rounds = plan(self._shapes, everyones, max_size=MAX_ROUND_BYTES // self._dtype.itemsize)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "a step here has its gradients"
        for group in self.param_groups:
            masters = [master for master in group["params"] if master.grad is not None]
            known = {id(master) for master in self._masters}
            if any(id(master) not in known for master in masters):
                # One of DeepSpeed's optimizers, BF16_Optimizer, makes its states by a step before `attach`.
                assert not any(master.grad.any() for master in masters), "call `attach` before a step"
                continue
            update = {"matrices": self._update_matrices, "others": self._update_others}[group["role"]]
            update(masters, lr=group["lr"])

    def _update_others(self, masters: Sequence[Tensor], *, lr: float) -> None:
        for master in masters:
            state = self.state[master]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
        for held in self._decayed:
            held.of(held.master, held.start, held.end).mul_(1 - lr * self.cfg.weight_decay)
        adamw(
            list(masters),
            [_gradient(master) for master in masters],
            [self.state[master]["exp_avg"] for master in masters],
            [self.state[master]["exp_avg_sq"] for master in masters],
            [],
            [self.state[master]["step"] for master in masters],
            fused=True,
            amsgrad=False,
            beta1=self.cfg.beta1,
            beta2=self.cfg.beta2,
            lr=lr,
            weight_decay=0.0,
            eps=self.cfg.eps,
            maximize=False,
        )

    def _update_matrices(self, masters: Sequence[Tensor], *, lr: float) -> None:
        for master in masters:
            state = self.state[master]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(master)
            state["momentum"].mul_(self.cfg.momentum).add_(_gradient(master))
            master.mul_(1 - lr * self.cfg.weight_decay)
        for tasks in self._rounds:
            self._run_round(tasks, lr=lr)

    def _run_round(self, tasks: Sequence[Task], *, lr: float) -> None:
        mine = [task for task in tasks if task.owner == self._axis.rank]
        wholes = {task.name: self._buffer(math.prod(task.shape)) for task in mine}
        self._exchange(
            [_Message(each.rank, task.owner, task, each) for task in tasks for each in task.sources],
            read=self._nesterov,
            write=lambda message, values: message.of(wholes[message.task.name]).copy_(values),
        )
        for task in mine:
            wholes[task.name] = orthogonal(wholes[task.name].view(task.shape)).flatten()
        self._exchange(
            [_Message(task.owner, each.rank, task, each) for task in tasks for each in task.holders],
            read=lambda message: message.of(wholes[message.task.name]),
            write=lambda message, values: self._apply(message, values, lr=lr),
        )

    def _nesterov(self, message: _Message) -> Tensor:
        held = self._find(message)
        gradient, momentum = _gradient(held.master), self.state[held.master]["momentum"]
        start, end = message.range.start, message.range.end
        return torch.add(
            held.of(gradient, start, end), held.of(momentum, start, end), alpha=self.cfg.momentum
        )

    def _apply(self, message: _Message, values: Tensor, *, lr: float) -> None:
        held = self._find(message)
        scale = RMS_OF_ADAMW * math.sqrt(max(message.task.shape))
        held.of(held.master, message.range.start, message.range.end).add_(values, alpha=-lr * scale)

    def _find(self, message: _Message) -> Held:
        (found,) = (
            each for each in self._held[message.task.name] if each.start <= message.range.start < each.end
        )
        return found

    def _exchange(
        self,
        messages: Sequence[_Message],
        *,
        read: Callable[[_Message], Tensor],
        write: Callable[[_Message, Tensor], object],
    ) -> None:
        """Send what this rank is the source of, and take what it is the destination of: one collective.

        Both ends of a pair of ranks go through its messages in the order given.
        """
        me, size = self._axis.rank, self._axis.size
        outgoing = sorted((each for each in messages if each.source == me), key=lambda each: each.destination)
        incoming = sorted((each for each in messages if each.destination == me), key=lambda each: each.source)
        num_sent, num_received = [0] * size, [0] * size
        for each in outgoing:
            num_sent[each.destination] += each.length
        for each in incoming:
            num_received[each.source] += each.length
        sent = self._buffer(sum(num_sent))
        at = 0
        for each in outgoing:
            sent[at : at + each.length].copy_(read(each))
            at += each.length
        received = sent
        if self._axis.group is not None:
            received = self._buffer(sum(num_received))
            dist.all_to_all_single(received, sent, num_received, num_sent, group=self._axis.group)
        at = 0
        for each in incoming:
            write(each, received[at : at + each.length])
            at += each.length

    def _buffer(self, numel: int) -> Tensor:
        return torch.empty(numel, dtype=self._dtype, device=self._device)


def _gradient(master: Tensor) -> Tensor:
    assert master.grad is not None, "every matrix of a block enters the loss"
    return master.grad


def _stage_axis(groups: Groups) -> Axis:
    """The ranks that hold the weights of this rank's pipeline stage. Every rank calls this."""
    mine = Axis(0, 1, (dist.get_rank(),), None)
    for ranks in groups.topology.groups("dp", "cp", "tp"):
        if len(ranks) == 1:
            continue
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            mine = Axis(ranks.index(dist.get_rank()), len(ranks), tuple(ranks), group)
    return mine
