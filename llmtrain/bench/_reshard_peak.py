"""Memory that `llmtrain checkpoint reshard` takes beyond what it starts with, in a process of its own.

    python -m llmtrain.bench._reshard_peak FOLDER NUM_TENSORS TENSOR_BYTES COMMAND

writes a checkpoint in FOLDER, runs COMMAND on it (reshard, merge, average, diff, to_torch_dcp,
from_torch_dcp, to_deepspeed_universal, from_deepspeed_universal) and prints, as JSON, how many times the
largest tensor the peak was above the start.
Measured as the peak of the resident set, which Linux lets a process set back.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from llmtrain.checkpoint import rewrite
from llmtrain.checkpoint.config import SaveConfig
from llmtrain.checkpoint.diff import compare
from llmtrain.checkpoint.format import Piece
from llmtrain.checkpoint.storage import Place
from llmtrain.checkpoint.write import write_checkpoint

NUM_SOURCE_FILES = 5
NUM_FILES = 7
"""As that of the source, no divisor of what there is: tensors are cut."""


def measure(folder: Path, *, num_tensors: int, tensor_bytes: int, command: str = "reshard") -> float:
    """(peak - start) / largest tensor, of `command` in a process of its own."""
    program = [sys.executable, "-m", "llmtrain.bench._reshard_peak", str(folder)]
    done = subprocess.run(
        [*program, str(num_tensors), str(tensor_bytes), command],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    ratio: float = json.loads(done.stdout.splitlines()[-1])["ratio"]
    return ratio


def write_source(folder: Path, *, num_tensors: int, tensor_bytes: int, seed: int = 0) -> Place:
    """One tensor in memory at a time, cut over files; zeros but for a few numbers."""
    numel = tensor_bytes // 4
    cuts = [numel * at // NUM_SOURCE_FILES for at in range(NUM_SOURCE_FILES + 1)]
    files = []
    for at in range(NUM_SOURCE_FILES):
        values = np.zeros(cuts[at + 1] - cuts[at], np.float32)
        values[:1000] = np.random.default_rng([seed, at]).standard_normal(1000)[: values.size]
        names = [f"blocks.{number}.weight" for number in range(num_tensors)]
        files.append([Piece("weight", name, (numel,), cuts[at], values) for name in names])
    state = {"num_optimizer_steps": 1}
    return write_checkpoint(folder, step=1, files=files, state=state, config=SaveConfig())


def _prepared(folder: Path, command: str, *, num_tensors: int, tensor_bytes: int) -> Callable[[], object]:
    """`command` on a checkpoint of its own in `folder`, still to be done."""
    source = write_source(folder / "source", num_tensors=num_tensors, tensor_bytes=tensor_bytes)
    other, out = folder / "other", folder / "out"
    if command in ("average", "diff"):
        write_source(other, num_tensors=num_tensors, tensor_bytes=tensor_bytes, seed=1)
    if command == "reshard":
        return partial(rewrite.reshard, source, out, num_files=NUM_FILES)
    if command == "merge":
        return partial(rewrite.merge, source, out, kinds="weight")
    if command == "average":
        return partial(rewrite.average, [source, other], out, weights=None)
    if command == "diff":
        return partial(compare, source, other, state=True)
    # Imported here: torch takes a second, and the others do not need it.
    from llmtrain.convert.convert import Format, export, import_  # noqa: PLC0415

    if command.startswith("to_"):
        return partial(export, source, out, to=Format[command.removeprefix("to_")])
    source_format = Format[command.removeprefix("from_")]
    export(source, other, to=source_format)
    return partial(import_, other, out, source_format=source_format, num_files=NUM_FILES)


def _status_bytes(what: str) -> int:
    found = re.search(rf"{what}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, f"Linux tells {what}"
    return 1024 * int(found[1])


def main() -> None:
    folder, command = Path(sys.argv[1]), sys.argv[4]
    num_tensors, tensor_bytes = int(sys.argv[2]), int(sys.argv[3])
    # A small one first: what is imported and started once is no memory of a checkpoint.
    _prepared(folder / "small", command, num_tensors=1, tensor_bytes=1 << 12)()
    work = _prepared(folder / "large", command, num_tensors=num_tensors, tensor_bytes=tensor_bytes)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident
    start = _status_bytes("VmRSS")
    work()
    extra = _status_bytes("VmHWM") - start
    print(json.dumps({"ratio": extra / tensor_bytes, "extra_bytes": extra}))


if __name__ == "__main__":
    main()
