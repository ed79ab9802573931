"""The summed cross entropy in chunks equals torch's, and its gradients too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmtrain.model.loss import NO_TARGET, linear_sum_cross_entropy, sum_cross_entropy


def inputs(
    num: int = 37, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(num, 24, generator=generator).to(dtype).requires_grad_()
    weight_VD = torch.randn(101, 24, generator=generator).to(dtype).requires_grad_()
    targets_T = torch.randint(0, 101, (num,), generator=generator)
    targets_T[::5] = NO_TARGET
    return x_TD, weight_VD, targets_T


@pytest.mark.parametrize("rows_at_once", [1, 7, 36, 37, 100, None])
def test_chunks_do_not_change_loss_or_gradients(rows_at_once: int | None) -> None:
    x_TD, weight_VD, targets_T = inputs()
    ours = linear_sum_cross_entropy(x_TD, weight_VD, targets_T, rows_at_once=rows_at_once)
    reference = F.cross_entropy((x_TD @ weight_VD.T).double(), targets_T, reduction="sum")
    grads = torch.autograd.grad(ours * 0.37, (x_TD, weight_VD))
    expected = torch.autograd.grad(reference * 0.37, (x_TD, weight_VD))
    torch.testing.assert_close(ours, reference.float())
    torch.testing.assert_close(grads, expected, atol=1e-5, rtol=1e-5)


def test_bf16_gradients_are_as_close_to_exact_as_torchs() -> None:
    x_TD, weight_VD, targets_T = inputs(dtype=torch.bfloat16)
    scale = 1 / 3  # not a power of two: a scale rounded to bf16 would show
    exact_x, exact_weight = (
        x_TD.detach().double().requires_grad_(),
        weight_VD.detach().double().requires_grad_(),
    )
    exact_loss = F.cross_entropy(exact_x @ exact_weight.T, targets_T, reduction="sum")
    exact = torch.autograd.grad(exact_loss * scale, (exact_x, exact_weight))
    loss = linear_sum_cross_entropy(x_TD, weight_VD, targets_T, rows_at_once=8)
    ours = torch.autograd.grad(loss * scale, (x_TD, weight_VD))
    plain_loss = F.cross_entropy((x_TD @ weight_VD.T).float(), targets_T, reduction="sum")
    plain = torch.autograd.grad(plain_loss * scale, (x_TD, weight_VD))
    assert loss.item() == pytest.approx(exact_loss.item(), rel=2e-3)  # logits are rounded to bf16
    for our, their, truth in zip(ours, plain, exact, strict=True):
        error, plain_error = (our - truth).norm() / truth.norm(), (their - truth).norm() / truth.norm()
        assert error < 1.2 * plain_error


def test_without_targets_the_loss_is_zero_and_so_are_the_gradients() -> None:
    x_TD, weight_VD, targets_T = inputs()
    loss = linear_sum_cross_entropy(x_TD, weight_VD, torch.full_like(targets_T, NO_TARGET), rows_at_once=8)
    grads = torch.autograd.grad(loss, (x_TD, weight_VD))
    assert loss.item() == 0.0
    assert all(not grad.any() for grad in grads)


def test_it_needs_no_gradients_to_give_the_loss() -> None:
    x_TD, weight_VD, targets_T = inputs()
    with torch.no_grad():
        loss = linear_sum_cross_entropy(x_TD, weight_VD, targets_T)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, sum_cross_entropy(x_TD @ weight_VD.T, targets_T))


def test_a_loss_may_be_taken_backward_twice() -> None:
    x_TD, weight_VD, targets_T = inputs()
    loss = linear_sum_cross_entropy(x_TD, weight_VD, targets_T)
    first = torch.autograd.grad(loss, (x_TD, weight_VD), retain_graph=True)
    second = torch.autograd.grad(loss * 2, (x_TD, weight_VD))
    torch.testing.assert_close([2 * grad for grad in first], list(second))
