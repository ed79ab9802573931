"""Signals from the first moment: importing a verb takes a second, in which they would end a run that is about
to go on as if it had failed."""

from __future__ import annotations

import os
from functools import cache

from llmtrain.launch.environment import job_end
from llmtrain.train.deadline import Deadline


@cache
def listening() -> Deadline:
    """The deadline of this process; it listens from the first call on."""
    return Deadline(end=job_end(os.environ))
