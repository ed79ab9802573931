"""The loss is a sum over valid targets by their global number: no split of a batch can change it."""

from __future__ import annotations

from itertools import pairwise

import torch
from engine_worker import MODELS, ROWS, batch_of
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.model.init import build_transformer
from llmtrain.model.transformer import Transformer


def loss_and_gradients(model: Transformer, edges: list[int]) -> tuple[float, list[torch.Tensor]]:
    """Accumulate over micro batches of rows [edges[i], edges[i+1]), as the engine does."""
    batches = [batch_of(3, first, last) for first, last in pairwise(edges)]
    num_valid = sum(batch.num_valid for batch in batches)
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss_sum = model(batch.tokens_BS, batch.positions_BS, batch.segments_BS, batch.targets_BS)
        (loss_sum / num_valid).backward()
        total += float(loss_sum.detach())
    return total / num_valid, [parameter.grad.clone() for parameter in model.parameters()]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sets(st.integers(1, ROWS - 1)))
def test_any_split_into_micro_batches_gives_the_same_loss_and_gradients(cuts: set[int]) -> None:
    model = build_transformer(MODELS["llama"], seed=1)
    whole_loss, whole = loss_and_gradients(model, [0, ROWS])
    loss, gradients = loss_and_gradients(model, [0, *sorted(cuts), ROWS])
    assert abs(loss - whole_loss) < 1e-5 * whole_loss
    for gradient, expected in zip(gradients, whole, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)  # fp32 sums in another order


def test_the_mean_of_micro_batch_means_would_be_another_number() -> None:
    """The bug that this guards against must show on these batches."""
    model = build_transformer(MODELS["llama"], seed=1)
    means = []
    for row in range(ROWS):
        batch = batch_of(3, row, row + 1)
        loss_sum = model(batch.tokens_BS, batch.positions_BS, batch.segments_BS, batch.targets_BS)
        means.append(float(loss_sum.detach()) / batch.num_valid)
    assert abs(sum(means) / ROWS - loss_and_gradients(model, [0, ROWS])[0]) > 1e-4
