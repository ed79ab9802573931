"""What workers that go through named cases in one start have in common."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from llmtrain.train.ranks import join_ranks


def run_cases(run: Callable[[dict[str, Any]], Any]) -> None:
    """Be a rank: print, as one JSON object, what `run` returns for each case of the first argument."""
    join_ranks(timeout_s=120)
    # DeepSpeed refuses fp16 on a CPU without instructions for it; torch computes in it all the same.
    get_accelerator().is_fp16_supported = lambda: True
    results = {}
    for name, case in json.loads(sys.argv[1]).items():
        start = time.monotonic()
        try:
            results[name] = run(case)
        except Exception as error:
            raise RuntimeError(f"in the case {name}") from error
        print(f"{name}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    print(json.dumps(results))
    dist.destroy_process_group()
