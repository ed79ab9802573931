"""Whether a layout computes what one process computes: a small copy of a config, run on as many CPU ranks as
its layout needs, held against plain torch step by step and weight by weight.

The reference knows nothing of engines, ranks or micro batches: the whole model, the whole batch of a step,
`torch.optim.AdamW`. What it shares with the ranks is the model's code, rows and initial weights. So a mistake
in the model itself does not show here; tests/parity holds that against Hugging Face.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import llmtrain
from llmtrain import files
from llmtrain.errors import LaunchError
from llmtrain.loader.batches import Batch
from llmtrain.model.dropout import token_keys
from llmtrain.model.init import build_transformer
from llmtrain.model.transformer import Transformer
from llmtrain.parallel.config import EngineKind
from llmtrain.parent import PARENT_VARIABLE
from llmtrain.train import certificate
from llmtrain.train.config import OptimizerConfig, OptimizerKind, TrainRoot
from llmtrain.train.shrink import Shrunk
from llmtrain.train.verify_rank import (
    CASES_FILE,
    NUM_HELD_OUT,
    Case,
    Told,
    Values,
    held_out_batch,
    rate_of,
    read_told,
    rows_of_step,
    start_weight,
    step_batch,
)

RANK_COMMAND = (sys.executable, "-m", "llmtrain.train.verify_rank")
POLL_S = 0.05
LAST_LINES = 12

LOSS_BOUND = 2e-6
"""Relative: fp32 sums over some hundred targets in another order."""
NORM_BOUND = 1e-5
"""Relative: a sum of squares over all weights in another order."""
GRADIENT_BOUND = 1e-5
"""Of a weight's largest gradient."""
SMALL_GRADIENT = 1e-2
"""A weight whose largest gradient is below this part of the model's largest is held against that part: of
gpt2's key biases, whose gradient is 0 on paper, only rounding is there."""
WEIGHT_BOUND = 2e-4
"""Of the learning rates so far, which is about as far as AdamW moves a weight. A gradient below eps
has its rounding in the update, too."""
MUON_BOUND = 2e-3
"""The same for matrices that Muon updates: its iteration multiplies small singular values, and
their rounding, by up to 3.4445^5 = 485."""


@dataclass(frozen=True)
class Check:
    name: str
    worst: float
    """Largest deviation that was found; not finite where a number was not."""
    bound: float
    """Largest that passes."""
    where: str
    """Of the largest deviation."""

    @property
    def passed(self) -> bool:
        return self.worst <= self.bound  # a NaN does not pass

    def sentence(self) -> str:
        """What went wrong."""
        if self.bound == 0:
            return f"{self.name}: {self.worst:.3g} where 0 is allowed, at {self.where}"
        return f"{self.name} is off by {self.worst:.1e} at {self.where}; allowed is {self.bound:.0e}"


@dataclass(frozen=True)
class Verified:
    checks: list[Check]
    seconds: float

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def verify(small: Shrunk, *, command: Sequence[str] = RANK_COMMAND) -> Verified:
    """Run the small config on its ranks and in one process, and compare.

    Raises:
        LaunchError: a rank died or the ranks took too long.
    """
    start = time.monotonic()
    case = Case(small.cfg, small.cfg.verify.num_steps)
    with tempfile.TemporaryDirectory(prefix="llmtrain-verify-") as temporary:
        folder = Path(temporary)
        with ranks_at_work(folder, {"run": case}, num_ranks=small.num_ranks, command=command) as wait:
            expected = reference(case, num_ranks=small.num_ranks)
            wait()
        told = [read_told(folder / "run", rank) for rank in range(small.num_ranks)]
    return Verified(compare(case, told, expected), time.monotonic() - start)


def write_certificate(path: Path, cfg: TrainRoot, num_ranks: int, small: Shrunk, found: Verified) -> None:
    """Say what was found, for people and for `llmtrain train`."""
    belongs_to = certificate.belongs_to(cfg, num_ranks)
    checks = [asdict(check) | {"passed": check.passed} for check in found.checks]
    told = {
        "format": "llmtrain certificate",
        "format_version": certificate.FORMAT_VERSION,
        "passed": found.passed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config_hash": files.hash_json(belongs_to),
        "config": belongs_to,
        "ranks_run": small.num_ranks,
        "num_steps": small.cfg.verify.num_steps,
        "shrunk": {name: {"from": before, "to": after} for name, (before, after) in small.changes.items()},
        "not_covered": small.not_covered,
        "checks": [_finite(check) for check in checks],
        "seconds": round(found.seconds, 1),
        "host": socket.gethostname(),
    }
    files.write_json(path, told)


def _finite(check: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    worst = check["worst"]
    return check | {"worst": worst if math.isfinite(worst) else str(worst)}


# -- ranks


@contextlib.contextmanager
def ranks_at_work(
    folder: Path, cases: Mapping[str, Case], *, num_ranks: int, command: Sequence[str] = RANK_COMMAND
) -> Iterator[Callable[[], None]]:
    """Start the ranks, each `command` with the folder added, and end them when the block does, however.

    Yields:
        What waits for all of them; it raises LaunchError that names a rank which failed, or those which are
        late.
    """
    (folder / CASES_FILE).write_bytes(pickle.dumps(dict(cases)))
    timeout_s = max(case.cfg.verify.timeout_s for case in cases.values())
    processes: list[subprocess.Popen[bytes]] = []
    environment = _environment(num_ranks)
    try:
        for rank in range(num_ranks):
            with open(_log_of(folder, rank), "wb") as log:
                process = subprocess.Popen(
                    [*command, str(folder)],
                    env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    process_group=0,  # Ctrl-C is ours alone, and what a rank starts ends with it
                )
            processes.append(process)
        yield lambda: _wait(processes, folder, timeout_s)
    finally:
        for process in processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _environment(num_ranks: int) -> dict[str, str]:
    """CPU ranks that meet on this machine, whatever launched us."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC_")}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    source = str(Path(llmtrain.__file__).parents[1])
    return ours | {
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        PARENT_VARIABLE: str(os.getpid()),
        "CUDA_VISIBLE_DEVICES": "",
        "HIP_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])),
    }


def _wait(processes: Sequence[subprocess.Popen[bytes]], folder: Path, timeout_s: float) -> None:
    limit = time.monotonic() + timeout_s
    while True:
        codes = [process.poll() for process in processes]
        failed = {rank: code for rank, code in enumerate(codes) if code}
        if failed:
            # The others fail when they miss it: who was killed, or does not speak of peers, was first.
            rank = min(failed, key=lambda rank: (failed[rank] > 0, "peer" in _tail(folder, rank), rank))
            code = failed[rank]
            how = f"exited with {code}" if code > 0 else f"was killed by signal {-code}"
            raise LaunchError(f"rank {rank} {how}; its last lines:\n{_tail(folder, rank)}")
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > limit:
            late = [str(rank) for rank, code in enumerate(codes) if code is None]
            raise LaunchError(
                f"ranks {', '.join(late)} are not done after verify.timeout_s={timeout_s:g} s; the last "
                f"lines of rank {late[0]}:\n{_tail(folder, int(late[0]))}"
            )
        time.sleep(POLL_S)


def _log_of(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.log"


def _tail(folder: Path, rank: int) -> str:
    lines = _log_of(folder, rank).read_text(errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in [line for line in lines if line.strip()][-LAST_LINES:])


# -- the reference


@dataclass(frozen=True)
class Reference:
    """What one process finds."""

    losses: list[float]
    grad_norms: list[float]
    held_out: tuple[float, int]
    gradients: dict[str, Values]
    """Of the first step, clipped, flat."""
    after_first: dict[str, Values]
    """Weights after the first update, flat."""
    at_end: dict[str, Values]
    muons: set[str]
    """Weights that Muon updates."""


def reference(case: Case, *, num_ranks: int) -> Reference:
    """The same steps in plain torch."""
    cfg, optimizer = case.cfg, case.cfg.optimizer
    model = build_transformer(cfg.model, seed=0)
    model.dropout = cfg.train.dropout
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in named.items():
            weight.copy_(torch.from_numpy(start_weight(name, weight.numel(), cfg.model)).view(weight.shape))
    has_muon = optimizer.kind is OptimizerKind.muon
    muons = {name for name in named if has_muon and name.startswith("blocks.") and named[name].ndim == 2}
    momenta = {name: torch.zeros_like(named[name]) for name in sorted(muons)}
    rest = [weight for name, weight in named.items() if name not in muons]
    adamw = torch.optim.AdamW(
        [
            {"params": [each for each in rest if each.ndim == 2], "weight_decay": optimizer.weight_decay},
            {"params": [each for each in rest if each.ndim == 1], "weight_decay": 0.0},
        ],
        lr=1.0,  # given at every step
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
    )
    losses, norms = [], []
    gradients: dict[str, Values] = {}
    after_first: dict[str, Values] = {}
    for step in range(case.num_steps):
        batch = step_batch(cfg, rows_of_step(cfg, step))
        loss = _loss_sum(model, batch, cfg.run.seed) / max(1, batch.num_valid)
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        most = cfg.train.grad_clip or math.inf
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), most)))
        losses.append(loss.item())
        if step == 0:
            gradients = {
                name: _flat(weight.grad) for name, weight in named.items() if weight.grad is not None
            }
        for group in adamw.param_groups:
            group["lr"] = rate_of(step)
        adamw.step()
        _muon_step(named, momenta, optimizer, lr=rate_of(step))
        if step == 0:
            after_first = {name: _flat(weight) for name, weight in named.items()}
    at_end = {name: _flat(weight) for name, weight in named.items()}
    return Reference(losses, norms, _held_out(model, cfg, num_ranks), gradients, after_first, at_end, muons)


def _loss_sum(model: Transformer, batch: Batch, seed: int) -> Tensor:
    keys_BS = None  # held-out rows have no places, and nothing is dropped
    if batch.places is not None:
        keys_BS = token_keys(seed, batch.places, batch.segments_BS.shape[1])
    logits_BSV = model(batch.tokens_BS, batch.positions_BS, batch.segments_BS, keys_BS=keys_BS)
    return F.cross_entropy(logits_BSV.flatten(0, 1), batch.targets_BS.flatten(), reduction="sum")


def _muon_step(
    named: Mapping[str, Tensor], momenta: Mapping[str, Tensor], cfg: OptimizerConfig, *, lr: float
) -> None:
    """Muon as its authors define it, with the five iterations on singular values, in float64."""
    with torch.no_grad():
        for name, momentum in momenta.items():
            weight = named[name]
            assert weight.grad is not None, f"{name} has no gradient"
            momentum.mul_(cfg.momentum).add_(weight.grad)
            nesterov = (weight.grad + cfg.momentum * momentum).double()
            left, values, right = torch.linalg.svd(nesterov, full_matrices=False)
            values = values / (values.norm() + 1e-7)
            for _ in range(5):
                values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
            update = (left * values) @ right * 0.2 * max(weight.shape) ** 0.5
            weight -= lr * (update.float() + cfg.weight_decay * weight)


def _held_out(model: Transformer, cfg: TrainRoot, num_ranks: int) -> tuple[float, int]:
    dp_size = dp_size_of(cfg, num_ranks)
    loss_sum, num_valid = 0.0, 0
    for dp_rank in range(dp_size):
        for number in range(NUM_HELD_OUT):
            batch = held_out_batch(cfg, dp_rank, number, dp_size=dp_size)
            with torch.no_grad():
                loss_sum += float(_loss_sum(model, batch, cfg.run.seed))
            num_valid += batch.num_valid
    return loss_sum, num_valid


def dp_size_of(cfg: TrainRoot, num_ranks: int) -> int:
    parallel = cfg.parallel
    return num_ranks // (parallel.pp_size * parallel.cp_size * parallel.tp_size)


def _flat(tensor: Tensor) -> Values:
    flat: Values = tensor.detach().flatten().numpy().copy()
    return flat


# -- the comparison


class _Worst:
    """The largest deviation so far, and where it was. Every NaN is the largest."""

    def __init__(self, name: str, bound: float) -> None:
        self.name, self.bound = name, bound
        self.ratio, self.worst, self.allowed, self.where = -1.0, 0.0, bound, "nothing"

    def add(self, deviation: float, where: str, *, bound: float | None = None) -> None:
        """`bound`: in place of the check's, where a number has one of its own."""
        allowed = self.bound if bound is None else bound
        ratio = deviation / allowed if allowed else (math.inf if deviation else 0.0)
        if math.isnan(deviation):
            ratio = math.inf
        if ratio > self.ratio or (math.isnan(deviation) and not math.isnan(self.worst)):
            self.ratio, self.worst, self.allowed, self.where = ratio, deviation, allowed, where

    def check(self) -> Check:
        return Check(self.name, self.worst, self.allowed, self.where)


def compare(case: Case, told: Sequence[Told], expected: Reference) -> list[Check]:
    """Everything that the ranks found against the reference."""
    return [
        _compare_scalars("loss", [each.losses for each in told], expected.losses, LOSS_BOUND),
        _compare_scalars(
            "gradient norm", [each.grad_norms for each in told], expected.grad_norms, NORM_BOUND
        ),
        *_compare_weights(case, told, expected),
        _compare_copies(told, expected),
        _compare_held_out(told, expected),
        *_compare_reload(case.cfg, told),
    ]


def _compare_scalars(
    name: str, found: Sequence[Sequence[float]], expected: Sequence[float], bound: float
) -> Check:
    worst = _Worst(name, bound)
    for rank, values in enumerate(found):
        for step, (value, wanted) in enumerate(zip(values, expected, strict=True), start=1):
            worst.add(_relative(value, wanted), f"step {step}, rank {rank}: {_beside(value, wanted)}")
    return worst.check()


def _compare_weights(case: Case, told: Sequence[Told], expected: Reference) -> Iterator[Check]:
    """Ownership, gradients, and weights after one update and at the end, by canonical name."""
    owned = _Worst("every element has one owner", 0)
    sizes = {name: values.size for name, values in expected.at_end.items()}
    first = [each.after_first for each in told]
    whole = {
        kind: _assemble(kind, first, sizes, owned)
        for kind in sorted({kind for pieces in first for kind, _, _ in pieces})
    }
    at_end = _assemble("weight", [each.at_end for each in told], sizes, owned)

    gradient = _Worst("gradient", GRADIENT_BOUND)
    floor = SMALL_GRADIENT * max(float(np.abs(values).max()) for values in expected.gradients.values())
    for name, wanted in expected.gradients.items():
        is_momentum = name in expected.muons  # of Muon, whose first momentum is the gradient
        kept = whole.get("momentum" if is_momentum else "exp_avg", {}).get(name)
        factor = 1.0 if is_momentum else 1.0 - case.cfg.optimizer.beta1
        scale = max(floor, float(np.abs(wanted).max()))
        deviation = math.nan if kept is None else float(np.abs(kept / factor - wanted).max()) / scale
        gradient.add(deviation, name)

    updates = []
    moves = (("after one update", whole["weight"], expected.after_first, rate_of(0)),)
    total = sum(rate_of(step) for step in range(case.num_steps))
    for what, found, wanted_by_name, rates in (
        *moves,
        (f"after {case.num_steps} updates", at_end, expected.at_end, total),
    ):
        update = _Worst(f"weights {what}", WEIGHT_BOUND)
        for name, wanted in wanted_by_name.items():
            deviation = float(np.abs(found[name] - wanted).max()) / rates
            update.add(deviation, name, bound=MUON_BOUND if name in expected.muons else None)
        updates.append(update.check())
    yield owned.check()
    yield gradient.check()
    yield from updates


def _assemble(
    kind: str,
    pieces: Sequence[Mapping[tuple[str, str, int], Values]],
    sizes: Mapping[str, int],
    owned: _Worst,
) -> dict[str, Values]:
    """Whole tensors of a kind, flat; NaN where nobody has an element. Counts wrong owners in `owned`."""
    names = {name for by_key in pieces for of_kind, name, _ in by_key if of_kind == kind}
    names |= sizes.keys() if kind == "weight" else set()
    owners = {name: np.zeros(sizes[name], np.int32) for name in names if name in sizes}
    whole = {name: np.full(sizes[name], np.nan, np.float32) for name in owners}
    for by_key in pieces:
        for (of_kind, name, start), values in by_key.items():
            if of_kind == kind:
                whole[name][start : start + values.size] = values
                owners[name][start : start + values.size] += 1
    for name, counts in owners.items():
        owned.add(float((counts != 1).sum()), f"{kind} {name}")
    return whole


def _compare_copies(told: Sequence[Told], expected: Reference) -> Check:
    """The weights that ranks compute with against those that somebody answers for, to the last bit."""
    worst = _Worst("copies agree", 0)
    whole: dict[str, Values] = {
        name: np.full(values.size, np.nan, np.float32) for name, values in expected.at_end.items()
    }
    for each in told:
        for (_, name, start), values in each.at_end.items():
            whole[name][start : start + values.size] = values
    for rank, each in enumerate(told):
        for (_, name, start), values in each.copies.items():
            if values.size:
                deviation = float(np.abs(values - whole[name][start : start + values.size]).max())
                worst.add(deviation, f"{name} on rank {rank}")
    return worst.check()


def _compare_held_out(told: Sequence[Told], expected: Reference) -> Check:
    worst = _Worst("held-out loss", LOSS_BOUND)
    wanted_sum, wanted_count = expected.held_out
    for rank, each in enumerate(told):
        loss_sum, num_valid = each.held_out
        if num_valid != wanted_count:
            worst.add(math.inf, f"rank {rank}, {num_valid} targets in place of {wanted_count}")
        worst.add(_relative(loss_sum, wanted_sum), f"rank {rank}: {_beside(loss_sum, wanted_sum)}")
    return worst.check()


def _compare_reload(cfg: TrainRoot, told: Sequence[Told]) -> Iterator[Check]:
    """What a checkpoint brings back, and the step after it, to the last bit.

    But with DDP on more than two ranks: after its first step it sends gradients in another order, so that
    step's sums over ranks are rounded otherwise than those of any later one.
    """
    is_ddp = cfg.parallel.engine is EngineKind.accelerate and cfg.parallel.zero_stage == 0
    state = _Worst("reload: state", 0)
    step = _Worst("reload: next step", LOSS_BOUND if is_ddp and len(told) > 2 else 0)
    for rank, each in enumerate(told):
        differs = each.reload_differs
        state.add(float(len(differs)), f"rank {rank}: {differs[0] if differs else 'all of it'}")
        wanted = (each.losses[-1], each.grad_norms[-1])
        for name, value, before in zip(("loss", "gradient norm"), each.reloaded, wanted, strict=True):
            place = f"rank {rank}, {name}: {value!r} here, {before!r} without the reload"
            step.add(_relative(value, before), place)
        deviation, what = each.reload_step
        step.add(deviation, f"rank {rank}, {what} after it")
    yield state.check()
    yield step.check()


def _beside(value: float, wanted: float) -> str:
    return f"{value:.9g} here, {wanted:.9g} in one process"


def _relative(value: float, wanted: float) -> float:
    return abs(value - wanted) / abs(wanted) if wanted else abs(value)
