"""One of two ranks that open what they take for one checkpoint: argv is a folder a rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from llmtrain.errors import LLMTrainError
from llmtrain.train.assemble import _open_alike
from llmtrain.train.ranks import join_ranks

join_ranks(timeout_s=60)
told = "the same"
try:
    _open_alike(Path(sys.argv[1 + dist.get_rank()]))
except LLMTrainError as error:
    told = str(error)
except SystemExit:
    told = "left"
print(json.dumps(told))
dist.destroy_process_group()
