"""What drives a step, whoever does the work: the one interface of the engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from llmtrain.checkpoint.format import FlatSource, Piece
from llmtrain.loader.batches import Batch
from llmtrain.train.heartbeat import Mark
from llmtrain.train.measures import Memory
from llmtrain.train.placement import Placement

Judge = Callable[[float, float], bool]
"""Takes a step's loss and gradient norm, the same on every rank, and says whether to update."""


@dataclass(frozen=True)
class StepResult:
    """Numbers that every rank agrees on."""

    loss: float
    """Mean over the step's valid targets, in nats."""
    grad_norm: float
    """Global L2 norm before clipping."""
    num_valid: int
    is_skipped: bool = False
    """In fp16: the gradient overflowed, so nothing was updated and the loss scale fell. The norm is inf."""
    is_withheld: bool = False
    """Nothing was updated, and nothing else has changed: the judge said so, or the norm is not finite and the
    engine never updates then."""
    grad_norms: dict[str, float] | None = None
    """If measured: L2 norms before clipping by group of layers (`measures.GradientSquares`), where known."""
    memory: Memory | None = None
    """If measured: of this rank."""


class Engine(Protocol):
    """A model on its ranks with its optimizer. Weights are undefined until `load`."""

    device: torch.device
    placement: Placement
    num_optimizer_steps: int
    state_kinds: tuple[str, ...]
    """What the optimizer keeps beside the weights: kinds of pieces."""
    mark: Mark
    """Told what begins inside a step; at first by `no_mark`, which tells nobody."""

    @property
    def loss_scale(self) -> float | None:
        """What fp16's losses are multiplied with now; None in other precisions."""

    @loss_scale.setter
    def loss_scale(self, value: float) -> None: ...

    def train_step(
        self, micro_batches: list[Batch], *, lr: float, judge: Judge | None = None, measure: bool = False
    ) -> StepResult:
        """One optimizer update from this rank's micro batches. Every rank calls it with as many; another step
        may have another number.

        Args:
            judge: asked once, with the gradient's norm known and nothing changed yet. On False the gradient
                is dropped. It is not asked where fp16 overflows. None: every step updates.
            measure: whether gradient norms by group and memory are asked for: the same on every rank.
        """

    def held_out_sums(self, batches: Iterator[Batch]) -> tuple[float, int]:
        """Loss sum in nats and number of targets over all ranks. Every rank brings as many batches."""

    def pieces(self) -> Iterator[Piece]:
        """What this rank owns of weights and optimizer state: over all ranks, every element exactly once."""

    def load(self, source: FlatSource, *, num_optimizer_steps: int = 0) -> None:
        """Fill master weights, and with `num_optimizer_steps` > 0 the optimizer's state too, from `source`,
        which several threads call."""
