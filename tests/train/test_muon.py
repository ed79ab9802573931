"""Muon in one process: its mathematics, whose weights are whose, and who would work on what."""

from __future__ import annotations

import math
import shutil
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from data_folder import train_arguments
from torch import Tensor

from llmtrain.errors import EXIT_FAILED, ConfigError
from llmtrain.model.config import Family, ModelConfig
from llmtrain.model.init import build_transformer
from llmtrain.tracking.metrics import read_metrics
from llmtrain.train.config import OptimizerConfig, OptimizerKind
from llmtrain.train.muon import Muon, Range, orthogonal, plan
from llmtrain.train.optimizer import build_optimizer

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Launcher

SHAPE = {"vocab_size": 40, "num_layers": 2, "d_model": 16, "num_heads": 4, "num_kv_heads": 2, "ffn_width": 40}
LLAMA = ModelConfig(**SHAPE)
GPT2 = ModelConfig(**SHAPE, family=Family.gpt2, max_positions=8, tie_embeddings=True)
CFG = OptimizerConfig(peak_lr=0.02, kind=OptimizerKind.muon, weight_decay=0.2, momentum=0.9)


def random_matrix(rows: int, columns: int, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def iterated(values: Tensor) -> Tensor:
    """What five steps of the published polynomial make of singular values."""
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return values


# -- the iteration


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 8), (1, 9)])
def test_singular_values_come_near_1_and_vectors_stay(shape: tuple[int, int]) -> None:
    matrix = random_matrix(*shape).double()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    found = left.mT @ orthogonal(matrix) @ right.mT
    assert found.shape == (min(shape), min(shape))
    assert 0.68 < found.diagonal().min() <= found.diagonal().max() < 1.21
    torch.testing.assert_close(found, torch.diag(iterated(values / values.norm())), rtol=0, atol=1e-6)


def test_the_polynomial_ends_between_068_and_121_from_0002_on() -> None:
    values = iterated(torch.logspace(math.log10(0.002), 0, 10_000, dtype=torch.float64))
    assert 0.68 < values.min() < 0.69
    assert 1.20 < values.max() < 1.21


def test_fp32_is_near_float64_and_bf16_near_fp32() -> None:
    matrix = random_matrix(48, 80)
    exact = orthogonal(matrix.double())
    assert (orthogonal(matrix) - exact).norm() < 1e-5 * exact.norm()  # measured: 1e-6
    narrow = orthogonal(matrix.bfloat16())
    assert narrow.dtype == torch.bfloat16
    assert (narrow - exact).norm() < 3e-2 * exact.norm()  # measured: 1.5e-2; bf16 keeps 8 bits


def test_a_transposed_matrix_gives_the_transposed_update() -> None:
    """So a weight stored as [in, out] is no other case."""
    matrix = random_matrix(12, 30)
    assert torch.equal(orthogonal(matrix.mT), orthogonal(matrix).mT)


def test_the_size_of_the_gradient_does_not_matter_and_none_gives_none() -> None:
    matrix = random_matrix(12, 30)
    torch.testing.assert_close(orthogonal(1000 * matrix), orthogonal(matrix), rtol=0, atol=1e-5)
    assert torch.equal(orthogonal(torch.zeros(3, 4)), torch.zeros(3, 4))


# -- the optimizer


def plain_steps(weight: Tensor, gradients: list[Tensor]) -> Tensor:
    """The published description, a line each, in float64."""
    weight, momentum = weight.double(), torch.zeros_like(weight).double()
    for gradient in gradients:
        momentum = CFG.momentum * momentum + gradient
        nesterov = gradient + CFG.momentum * momentum
        left, values, right = torch.linalg.svd(nesterov, full_matrices=False)
        update = (left * iterated(values / values.norm())) @ right
        update *= 0.2 * math.sqrt(max(weight.shape))
        weight = weight - CFG.peak_lr * (update + CFG.weight_decay * weight)
    return weight


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_matrices_follow_the_published_description_and_the_rest_follows_adamw(model: ModelConfig) -> None:
    transformer = build_transformer(model, seed=1)
    start = {name: weight.detach().clone() for name, weight in transformer.named_parameters()}
    gradients = {
        name: [0.1 * random_matrix(1, weight.numel(), seed=step).view_as(weight) for step in range(3)]
        for name, weight in start.items()
    }
    optimizer = build_optimizer(transformer, CFG)
    for step in range(3):
        for name, weight in transformer.named_parameters():
            weight.grad = gradients[name][step].clone()
        optimizer.step()
    num_matrices = 0
    for name, weight in transformer.named_parameters():
        if name.startswith("blocks.") and weight.ndim == 2:
            num_matrices += 1
            expected = plain_steps(start[name], gradients[name]).float()
        else:
            copy = torch.nn.Parameter(start[name].clone())
            decay = CFG.weight_decay if weight.ndim == 2 else 0.0
            adamw = torch.optim.AdamW([copy], lr=CFG.peak_lr, betas=(0.9, 0.95), weight_decay=decay)
            for gradient in gradients[name]:
                copy.grad = gradient
                adamw.step()
            expected = copy.detach()
        np.testing.assert_allclose(weight.detach(), expected, rtol=1e-5, atol=1e-6, err_msg=name)
    assert num_matrices == 2 * (7 if model is LLAMA else 6)


def test_updates_are_those_of_pytorchs_muon_but_for_its_bf16() -> None:
    """torch.optim.Muon runs the iteration in bf16 on every device."""
    start = random_matrix(24, 40, seed=9)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    bias = torch.nn.Parameter(torch.zeros(1))
    one = Muon(matrices={"w": ours}, decayed={}, vectors={"b": bias}, cfg=CFG)
    other = torch.optim.Muon(
        [theirs],
        lr=CFG.peak_lr,
        weight_decay=CFG.weight_decay,
        momentum=CFG.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    for step in range(4):
        gradient = random_matrix(24, 40, seed=step)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        one.step()
        other.step()
    moved, expected = (ours - start).detach(), (theirs - start).detach()
    assert (moved - expected).norm() < 2e-2 * expected.norm()  # measured: 6e-3


def test_an_update_has_the_root_mean_square_that_adamws_has() -> None:
    weight = torch.nn.Parameter(torch.zeros(64, 256))
    optimizer = Muon(matrices={"w": weight}, decayed={}, vectors={}, cfg=CFG)
    weight.grad = random_matrix(64, 256)
    optimizer.step()
    # 0.2 times the rate, times what the iteration leaves of singular values of 1: 0.7 to 1.2
    assert weight.detach().square().mean().sqrt() == pytest.approx(0.2 * CFG.peak_lr, rel=0.3)


def test_a_step_on_zeros_before_attach_changes_nothing_and_any_other_is_refused() -> None:
    """What DeepSpeed's BF16_Optimizer does when it is made: tensors of its own, gradients of zeros."""
    weight = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = Muon(matrices={"w": weight}, decayed={}, vectors={}, cfg=CFG)
    flat = torch.nn.Parameter(torch.ones(6))
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.zeros(6)
    optimizer.step()
    assert torch.equal(flat, torch.ones(6))
    flat.grad = torch.ones(6)
    with pytest.raises(AssertionError, match="call `attach` before a step"):
        optimizer.step()


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_momentum_is_below_1(momentum: float) -> None:
    with pytest.raises(ConfigError, match=rf"optimizer.momentum={momentum} must be in \[0, 1\)"):
        OptimizerConfig(peak_lr=1.0, momentum=momentum)


# -- who works on what


def random_holdings(
    seed: int,
) -> tuple[dict[str, tuple[int, int]], list[dict[str, list[tuple[int, int]]]]]:
    """Matrices, and ranks that hold them in pieces: some twice, some in part twice, some ranks nothing."""
    random = np.random.default_rng(seed)
    shapes = {f"m{n}": (int(random.integers(1, 9)), int(random.integers(1, 9))) for n in range(12)}
    held: list[dict[str, list[tuple[int, int]]]] = [{} for _ in range(int(random.integers(1, 6)))]
    for name, shape in shapes.items():
        numel = math.prod(shape)
        for _ in range(int(random.integers(1, 3))):  # copies
            cuts = sorted({0, numel, *random.integers(0, numel, 2).tolist()})
            for start, end in pairwise(cuts):
                held[int(random.integers(len(held)))].setdefault(name, []).append((start, end))
    return shapes, held


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_sends_every_element_once_and_returns_it_to_all_who_hold_it(seed: int) -> None:
    shapes, held = random_holdings(seed)
    max_size = 100
    rounds = plan(shapes, held, max_size=max_size)
    tasks = [task for tasks in rounds for task in tasks]
    assert sorted(task.name for task in tasks) == sorted(shapes)
    for task in tasks:
        ends = [0, *(source.end for source in task.sources)]
        assert [source.start for source in task.sources] == ends[:-1]
        assert ends[-1] == math.prod(shapes[task.name])
        for source in task.sources:
            ranges = held[source.rank][task.name]
            assert any(start <= source.start and source.end <= end for start, end in ranges)
        returned = {(each.rank, each.start, each.end) for each in task.holders}
        assert returned == {
            (rank, start, end) for rank, mine in enumerate(held) for start, end in mine.get(task.name, [])
        }
    for some in rounds:
        for owner in range(len(held)):
            sizes = [task.size for task in some if task.owner == owner]
            assert len(sizes) <= 1 or sum(sizes) <= max_size


def test_equal_matrices_are_spread_evenly_and_an_owner_is_its_own_first_source() -> None:
    shapes = {f"m{n}": (4, 6) for n in range(8)}
    everything = {name: [(0, 24)] for name in shapes}
    tasks = [task for tasks in plan(shapes, [everything] * 4, max_size=10**9) for task in tasks]
    assert [sum(task.owner == rank for task in tasks) for rank in range(4)] == [2, 2, 2, 2]
    assert all(task.sources == (Range(task.owner, 0, 24),) for task in tasks)


# -- whole runs


def test_a_run_learns_and_resumes_bit_for_bit(launcher: Launcher, data: Path, tmp_path: Path) -> None:
    def losses(folder: Path) -> list[float]:
        return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "step"]

    arguments = train_arguments(data, tmp_path / "run", "optimizer.kind=muon", "save.keep_last=9")
    status, text = launcher.run(arguments)
    assert status == 0, text
    expected = losses(tmp_path / "run")
    assert expected[-1] < expected[0] - 0.5
    for step in (8, 12):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")

    status, text = launcher.run([*arguments, "optimizer.kind=adamw", "run.intent=resume"])
    assert status == EXIT_FAILED, text
    assert "the checkpoint has the state of the other optimizer" in text
    status, text = launcher.run([*arguments, "run.intent=resume"])
    assert status == 0, text
    assert "step 4, 32 rows consumed" in text
    assert losses(tmp_path / "run")[-8:] == expected[-8:]
