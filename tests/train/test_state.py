"""What checkpoints and engines have between them: sources that are counted, numbers that lie elsewhere."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from llmtrain.checkpoint.config import SaveConfig
from llmtrain.checkpoint.format import Piece
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.checkpoint.saver import Saver
from llmtrain.checkpoint.write import ALONE
from llmtrain.errors import CheckpointError
from llmtrain.train.state import CountedSource, OnDevice, fill, for_checkpoint, host_memory


def ones(kind: str, name: str, start: int, into: Any) -> None:
    into[:] = 1


def piece(name: str, start: int, length: int) -> Piece:
    return Piece("weight", name, (10,), start, np.zeros(length, np.float32))


def test_a_piece_that_was_not_filled_is_named() -> None:
    source = CountedSource(ones)
    held = torch.zeros(6)
    fill(held, source, "weight", "a", 2)
    assert held.tolist() == [1.0] * 6
    assert source.count([piece("a", 2, 6), piece("a", 3, 2)]) == {"weight": 8}
    for missing in (piece("a", 1, 3), piece("a", 5, 4), piece("b", 0, 1)):
        end = missing.start + missing.values.size
        where = re.escape(f"weight {missing.name}[{missing.start}:{end}] was not loaded")
        with pytest.raises(CheckpointError, match=where):
            source.count([missing])


def test_numbers_that_are_not_contiguous_are_filled_too() -> None:
    held = torch.zeros(8)[::2]
    fill(held, ones, "weight", "a", 0)
    assert held.tolist() == [1.0] * 4


@pytest.mark.parametrize("in_background", [False, True])
def test_numbers_on_a_device_are_saved_like_those_on_the_host(tmp_path: Any, in_background: bool) -> None:
    """The device is this CPU: what is tested is the way that numbers on a GPU take."""
    values = torch.arange(10, dtype=torch.float32)
    pieces = [
        Piece("weight", "a", (10,), 0, OnDevice(values[:4])),
        Piece("weight", "a", (10,), 4, for_checkpoint(values[4:].to(torch.bfloat16))),
    ]
    saver = Saver(tmp_path, ALONE, SaveConfig(in_background=in_background))
    saver.save(1, pieces, {})
    saver.finish()
    read = CheckpointReader(tmp_path / "step-00000001").read("weight", "a")
    assert read.tolist() == values.tolist()


@pytest.mark.gpu
def test_host_memory_for_a_gpu_is_pinned_and_takes_its_numbers() -> None:
    device = torch.device("cuda")
    buffer = host_memory(40, device=device)
    assert torch.from_numpy(buffer).is_pinned()
    OnDevice(torch.arange(10, dtype=torch.float32, device=device)).copy_into(buffer.view(np.float32))
    assert buffer.view(np.float32).tolist() == list(range(10))
