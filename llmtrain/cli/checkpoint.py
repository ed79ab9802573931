"""What `llmtrain checkpoint reshard`, `merge`, `average` and `convert` print at the end."""

from __future__ import annotations

from llmtrain.checkpoint.rewrite import Made
from llmtrain.units import format_bytes


def tell(made: Made) -> None:
    num_files = f"{made.num_files:,} file{'s' if made.num_files > 1 else ''}"
    print(f"{made.path}: step {made.step}, {made.num_tensors:,} tensors of {', '.join(made.kinds)}")
    print(f"{num_files}, {format_bytes(made.num_bytes)}, manifest {made.manifest_sha256}")
