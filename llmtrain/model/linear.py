"""The layer that ends a region of a split model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class InputSplitLinear(nn.Module):
    """x @ weight + bias, with the weight as [in, out], the transpose of nn.Linear's.

    Under tensor parallelism each rank holds some of the inputs. Stored this way every split weight of the
    model is split along its first dimension, so a rank's part is one range of the flattened tensor, in
    memory, in an optimizer's flat partition and in a checkpoint (GPT-2's own files keep matrices so).
    """

    def __init__(
        self, num_inputs: int, num_outputs: int, *, bias: bool, leave: Callable[[Tensor], Tensor]
    ) -> None:
        """`leave` sums the ranks' products; the bias is added once, after it."""
        super().__init__()
        self.leave = leave
        self.weight = nn.Parameter(torch.empty(num_inputs, num_outputs))
        self.bias = nn.Parameter(torch.empty(num_outputs)) if bias else None

    def forward(self, x_BSF: Tensor) -> Tensor:
        out_BSD = self.leave(x_BSF @ self.weight)
        return out_BSD if self.bias is None else out_BSD + self.bias
