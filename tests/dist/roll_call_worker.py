"""One rank of test_roll_call: comes, and then lives, dies, or stops without dying, as its argument says."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch.distributed as dist

from llmtrain.log import setup_logging
from llmtrain.train.ranks import join_ranks
from llmtrain.train.roll_call import RollCall

if __name__ == "__main__":
    fate = sys.argv[1].split(",")[int(os.environ["RANK"])]
    setup_logging()
    with RollCall(silence_s=float(sys.argv[2])) as roll_call:
        join_ranks(timeout_s=100)
        if fate == "dies":
            time.sleep(1.5)
            os._exit(7)
        if fate == "hangs":
            time.sleep(1.5)
            os.kill(os.getpid(), signal.SIGSTOP)
        if fate == "works":  # longer than the silence that is taken for death
            time.sleep(5)
        if fate == "waits":
            time.sleep(60)
        roll_call.end()
    dist.destroy_process_group()
