"""One of two ranks of test_deepspeed_rules: small modules under DeepSpeed itself, none of our engine.

Two linear layers and a squared error: what one process with plain PyTorch gets is `reference`. SGD with
clipping shows a wrong scale of gradients, which AdamW would hide; AdamW shows a wrong count of steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from deepspeed.utils import groups, safe_get_full_fp32_param
from torch import Tensor, nn

WIDTH, ROWS, STEPS, CLIP = 8, 8, 4, 0.05
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.5),
    "adamw": partial(torch.optim.AdamW, lr=0.02),
    "the gradient": partial(torch.optim.SGD, lr=1.0),
}


def layers() -> list[nn.Module]:
    """The same weights on every rank, whichever it keeps; the second layer's gradient is much the larger."""
    torch.manual_seed(0)
    first, second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    with torch.no_grad():
        second.weight.mul_(0.3)
    return [first, nn.Tanh(), second]


def data() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, WIDTH, generator=random), torch.randn(ROWS, WIDTH, generator=random)


def reference(optimizer: str) -> dict[str, list[float]]:
    """The run in plain PyTorch: one process, one batch."""
    model = nn.Sequential(*layers())
    update = OPTIMIZERS[optimizer](model.parameters())
    x, y = data()
    losses, norms = [], []
    for _ in range(STEPS):
        update.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        update.step()
        losses.append(loss.item())
    return {"loss": losses, "norm": norms}


def config(stage: int, *, gas: int = 1, clip: float = CLIP, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": ROWS // 2,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        **more,
    }


def start(model: nn.Module, settings: dict[str, Any], *, optimizer: str = "sgd", mpu: Any = None) -> Any:
    """DeepSpeed's engine, as if nothing had run before in this process."""
    groups.mpu = groups.mesh_device = None
    client = OPTIMIZERS[optimizer](model.parameters())
    return deepspeed.initialize(model=model, optimizer=client, config=settings, mpu=mpu)[0]


def message(run: Callable[[], Any]) -> str:
    """What the exception says that `run` ends in; empty when it does not."""
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# -- rules


def pipeline(stage: int) -> dict[str, Any]:
    module = PipelineModule(
        layers(), num_stages=2, loss_fn=nn.functional.mse_loss, partition_method="uniform"
    )
    engine = start(module, config(stage, gas=2))
    x, y = data()
    half = ROWS // 2

    def micro_batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in repeat(None):
            yield x[:half], y[:half]
            yield x[half:], y[half:]

    batches = micro_batches()
    return {"loss": [float(engine.train_batch(batches)) for _ in range(STEPS)]}


def dual_pipe_v(gas: int, *, later: int | None = None) -> float:
    """A step, with `later` micro batches in place of the number that the config says."""
    module = DualPipeVModule(
        [*layers(), nn.Identity()], num_stages=2, loss_fn=nn.functional.mse_loss, partition_method="uniform"
    )
    engine = start(module, config(1, gas=gas))
    engine.micro_batches = later or gas
    x, y = data()
    half = ROWS // 2
    return float(engine.train_batch(repeat((x[:half], y[:half]))))


def data_parallel(stage: int, precision: str, optimizer: str = "sgd") -> dict[str, Any]:
    """Each of two ranks has half the rows."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    half = {} if precision == "fp32" else {precision: {"enabled": True}}
    engine = start(nn.Sequential(*layers()), config(stage, **half), optimizer=optimizer)
    x, y = (each.chunk(2)[dist.get_rank()] for each in data())
    losses, norms = [], []
    for _ in range(STEPS):
        loss = nn.functional.mse_loss(engine(x.to(dtype)).float(), y)
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / 2)
        norms.append(engine.get_global_grad_norm())
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)  # the client's, in DeepSpeed's
    counts = {float(state["step"]) for state in inner.state.values() if "step" in state}
    return {"loss": losses, "norm": [norm and float(norm) for norm in norms], "counts": sorted(counts)}


def fp16_where_the_cpu_has_none() -> str:
    """DeepSpeed asks oneDNN; here the answer is no, whatever this machine's CPU."""
    kind = type(get_accelerator())
    asked = kind.is_fp16_supported
    kind.is_fp16_supported = lambda self: False
    try:
        return message(lambda: data_parallel(1, "fp16"))
    finally:
        kind.is_fp16_supported = asked


def shapes_at_zero_3() -> dict[str, Any]:
    """What the optimizer is handed, and what PyTorch's Muon says to it."""
    engine = start(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)), config(3))
    handed = engine.optimizer.fp32_partitioned_groups_flat
    return {
        "shapes": [list(piece.shape) for piece in handed],
        "muon": message(lambda: torch.optim.Muon(handed, lr=0.1)),
    }


# -- facts that the engine and the table of keys rely on


def unknown_keys() -> dict[str, Any]:
    silent = {"zero_optimisation": {"stage": 3}, "gradient_cliping": 0.2, "pipeline": {"stagez": 2}}
    settings = config(0, **silent)
    del settings["gradient_clipping"], settings["zero_optimization"]
    engine = start(nn.Linear(WIDTH, WIDTH), settings)
    loud = config(1) | {"zero_optimization": {"stagee": 2}}
    return {
        "stage": int(engine.zero_optimization_stage()),
        "clip": engine.gradient_clipping(),
        "in a checked section": message(lambda: start(nn.Linear(WIDTH, WIDTH), loud)),
    }


def moved(engine: Any, run: Callable[[], None]) -> Tensor:
    """By how much a step changes the only weight."""

    def weight() -> Tensor:
        parameter = next(engine.module.parameters())
        whole = parameter if engine.zero_optimization_stage() == 0 else safe_get_full_fp32_param(parameter)
        copy: Tensor = whole.detach().clone()
        return copy

    before = weight()
    run()
    return before - weight()


def two_backwards(stage: int) -> dict[str, Any]:
    """Two backward passes and one step at gradient_accumulation_steps=1: how far the update is from the last
    gradient, and from the sum of both."""
    engine = start(nn.Linear(WIDTH, 1, bias=False), config(stage, clip=0.0), optimizer="the gradient")
    x, _ = data()

    def run() -> None:
        for row in (0, 1):
            engine.backward(engine(x[row]).sum())
        engine.step()

    update = moved(engine, run).flatten()
    return {"last": float((update - x[1]).norm()), "both": float((update - x[0] - x[1]).norm())}


class TwoContextParallelRanks:
    """An mpu: both ranks share the positions of the same rows, as Ulysses has it."""

    def get_sequence_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_sequence_parallel_world_size(self) -> int:
        return 2

    def get_sequence_parallel_group(self) -> Any:
        return dist.group.WORLD

    get_sequence_data_parallel_rank = get_sequence_parallel_rank
    get_sequence_data_parallel_world_size = get_sequence_parallel_world_size
    get_sequence_data_parallel_group = get_sequence_parallel_group

    def initialize_sequence_parallel(self) -> None:
        """DeepSpeed tells such an mpu from others by this name."""


def context_parallel(stage: int, told_by: str) -> dict[str, Any]:
    """How far the update is from multiples of the gradient of the mean over all positions, when DeepSpeed is
    told that the ranks share positions, and from twice that of this rank's own."""
    settings, mpu = config(stage, clip=0.0), None
    if told_by == "mpu":
        mpu = TwoContextParallelRanks()
    elif told_by == "mesh":
        settings |= {"sequence_parallel_size": 2, "data_parallel_size": 1}
    engine = start(nn.Linear(WIDTH, 1, bias=False), settings, optimizer="the gradient", mpu=mpu)
    x, _ = data()
    mine = x.chunk(2)[dist.get_rank()]

    def run() -> None:
        engine.backward(engine(mine).mean())
        engine.step()

    update = moved(engine, run).flatten()
    return {
        "once": float((update - x.mean(0)).norm()),
        "twice": float((update - 2 * x.mean(0)).norm()),
        "own twice": float((update - 2 * mine.mean(0)).norm()),
    }


class TwoTensorParallelRanks:
    """An mpu: both ranks are one tensor-parallel group, and each is alone in its data-parallel one."""

    def __init__(self) -> None:
        self.alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_model_parallel_world_size(self) -> int:
        return 2

    def get_model_parallel_group(self) -> Any:
        return dist.group.WORLD

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return 0

    def get_data_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_group(self) -> Any:
        return self.alone


class Halves(nn.Module):
    """A weight of which each rank holds half, and one that both hold. Its gradient is `x` on all weights."""

    def __init__(self, *, marked: bool) -> None:
        super().__init__()
        self.split = nn.Parameter(torch.zeros(WIDTH))
        self.whole = nn.Parameter(torch.zeros(WIDTH))
        if marked:
            self.split.tensor_model_parallel = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return (x[dist.get_rank()] * self.split + x[2] * self.whole).sum()


def tensor_parallel(stage: int, *, marked: bool) -> dict[str, Any]:
    engine = start(Halves(marked=marked), config(stage), mpu=TwoTensorParallelRanks())
    x, _ = data()
    engine.backward(engine(x))
    engine.step()
    return {
        "norm": float(engine.get_global_grad_norm()),
        "whole": float(x[:3].norm()),
        "without rank 1's half": float(x[::2][:2].norm()),
    }


def cases() -> dict[str, Callable[[], Any]]:
    return {
        "reference/sgd": lambda: reference("sgd"),
        "reference/adamw": lambda: reference("adamw"),
        "fp32/sgd/1": lambda: data_parallel(1, "fp32"),
        "bf16/adamw/0": lambda: data_parallel(0, "bf16", "adamw"),
        "bf16/adamw/1": lambda: data_parallel(1, "bf16", "adamw"),
        "fp16": lambda: message(lambda: data_parallel(1, "fp16")),
        "fp16 where the CPU has none": fp16_where_the_cpu_has_none,
        "shapes": shapes_at_zero_3,
        "keys": unknown_keys,
        **{f"two backwards/{stage}": partial(two_backwards, stage) for stage in range(4)},
        "context/none/1": lambda: context_parallel(1, "nobody"),
        **{f"context/mpu/{stage}": partial(context_parallel, stage, "mpu") for stage in range(4)},
        **{f"context/mesh/{stage}": partial(context_parallel, stage, "mesh") for stage in range(4)},
        **{f"tensor/marked/{stage}": partial(tensor_parallel, stage, marked=True) for stage in (1, 3)},
        **{f"tensor/unmarked/{stage}": partial(tensor_parallel, stage, marked=False) for stage in (1, 3)},
        # last: ZeRO-3 numbers modules from a counter of the process, and stages leave it at other numbers
        "pipeline/0": lambda: pipeline(0),
        "pipeline/1": lambda: pipeline(1),
        "pipeline/2": lambda: message(lambda: pipeline(2)),
        "pipeline/3": lambda: message(lambda: pipeline(3)),
        "dual_pipe_v/enough": lambda: dual_pipe_v(4),
        "dual_pipe_v/too few": lambda: message(lambda: dual_pipe_v(3)),
        "dual_pipe_v/too few later": lambda: message(lambda: dual_pipe_v(4, later=3)),
    }


if __name__ == "__main__":
    # else DeepSpeed compiles a shared-memory all-reduce with g++ at the first start of every machine
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("gloo")
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    print(json.dumps({name: run() for name, run in cases().items()}))
    dist.destroy_process_group()
