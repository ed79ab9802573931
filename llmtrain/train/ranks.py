"""The ranks of a run: how they meet, and the few things that they tell each other at every step."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from enum import IntEnum

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from llmtrain.errors import LaunchError, LLMTrainError
from llmtrain.loader.ledger import MASK_64
from llmtrain.parallel.groups import Groups

_LOW_32 = 2**32 - 1


class Agreement(IntEnum):
    """What a rank brings; the highest of all ranks decides for all."""

    go_on = 0
    stop = 1
    failed = 2


class RankFailedError(LLMTrainError):
    """A rank could not go on; the message is its own, with its number, on every rank."""


def join_ranks(*, timeout_s: float) -> torch.device:
    """Join the process group that torchrun (or nobody: then a group of one) set up, and return this rank's
    device.

    Raises:
        LaunchError: the rendezvous port is taken, or not every rank arrived in time.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise LaunchError(
                f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}; "
                f"start no more processes than GPUs (NPROC)"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if "WORLD_SIZE" not in os.environ:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        at = f"MASTER_ADDR={os.environ.get('MASTER_ADDR')} MASTER_PORT={os.environ.get('MASTER_PORT')}"
        try:
            dist.init_process_group(backend, timeout=timeout)
        except (dist.DistNetworkError, dist.DistStoreError, ValueError) as error:
            if "EADDRINUSE" in str(error) or "in use" in str(error):
                raise LaunchError(
                    f"the rendezvous port is in use: {at}; choose another MASTER_PORT"
                ) from error
            raise LaunchError(f"ranks could not meet at {at}: {str(error).splitlines()[0]}") from error
    return device


def agree(groups: Groups, device: torch.device, *, level: int, tokens_hash: int = 0) -> tuple[int, int]:
    """The highest level that any rank brings, and the sum of all hashes modulo 2^64, in one collective.

    Args:
        level: an `Agreement`.
        tokens_hash: of this rank's rows; ranks that work on the same rows count once. Its halves are summed
            apart: nothing overflows below 2^31 ranks.
    """
    mine = tokens_hash if groups.replica.rank == 0 else 0
    if dist.get_world_size() == 1:
        return level, mine
    brought = [int(level == each) for each in range(3)]
    told = torch.tensor([*brought, mine & _LOW_32, mine >> 32], device=device)
    dist.all_reduce(told)
    *counts, low, high = told.tolist()
    worst = max(each for each in range(3) if counts[each])
    return worst, (low + (high << 32)) & MASK_64


def failure_of_all(mine: LLMTrainError | None) -> RankFailedError:
    """The failures of all ranks, each with its number. Every rank calls this once one has failed."""
    texts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, None if mine is None else str(mine))
    told = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None)
    return RankFailedError(told)


def warn_once(log: logging.Logger, text: str, *args: object) -> None:
    """A warning that every rank has: rank 0 speaks."""
    log.log(logging.WARNING if dist.get_rank() == 0 else logging.DEBUG, text, *args)


def sum_once(groups: Groups, device: torch.device, *values: float, loss_rank: int = 0) -> list[float]:
    """Sums over all tokens of a step. Of the ranks that compute the same one speaks.

    Args:
        loss_rank: along pp, where losses are.
    """
    if dist.get_world_size() == 1:
        return list(values)
    speaks = groups.tp.rank == 0 and groups.pp.rank == loss_rank
    total = torch.tensor(values if speaks else [0.0] * len(values), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    found: list[float] = total.tolist()
    return found
