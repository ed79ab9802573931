"""kill -9 at random moments of a process that saves all the time: nothing committed is ever lost."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from llmtrain.checkpoint.find import list_checkpoints, newest_checkpoint
from llmtrain.checkpoint.read import CheckpointReader

NUM_KILLS = 20
KEEP = 2

SAVE_FOR_EVER = """
import sys
from pathlib import Path
import numpy as np
from llmtrain.checkpoint.find import newest_checkpoint
from llmtrain.checkpoint.format import Piece
from llmtrain.checkpoint.read import CheckpointReader
from llmtrain.checkpoint.config import SaveConfig
from llmtrain.checkpoint.write import ALONE, save_checkpoint

folder = Path(sys.argv[1])
newest = newest_checkpoint(folder)
step = CheckpointReader(newest).step if newest else 0
print("ready", flush=True)
while True:
    step += 1
    pieces = [
        Piece(kind, f"blocks.{layer}", (100, 500), 0, np.full(50_000, step + layer, dtype=np.float32))
        for kind in ("weight", "exp_avg")
        for layer in range(4)
    ]
    save_checkpoint(
        folder, step=step, pieces=pieces, state={"position": 8 * step}, ranks=ALONE,
        config=SaveConfig(keep_last=int(sys.argv[2])),
    )
    print(step, flush=True)
"""


def test_sigkill_at_20_random_moments_never_loses_a_committed_step(tmp_path: Path) -> None:
    moments = random.Random(0)
    committed = 0
    num_leftovers = 0
    for _ in range(NUM_KILLS):
        saver = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path), str(KEEP)], stdout=subprocess.PIPE, text=True
        )
        assert saver.stdout is not None
        with saver.stdout as output:
            assert output.readline() == "ready\n"
            time.sleep(moments.uniform(0, 0.15))
            saver.kill()
            reported = [int(line) for line in output.read().split("\n")[:-1]]
        assert saver.wait() == -9
        committed = max([committed, *reported])
        num_leftovers += any(tmp_path.glob("step-*/UNFINISHED"))

        newest = newest_checkpoint(tmp_path)
        if newest is None:
            assert committed == 0
            continue
        reader = CheckpointReader(newest)
        assert committed <= reader.step <= committed + 1  # killed between the commit and the report
        committed = reader.step
        assert list_checkpoints(tmp_path)[-1] == reader.step
        assert len(list_checkpoints(tmp_path)) <= KEEP + 1  # killed between the commit and the retention
        assert reader.state == {"position": 8 * reader.step}
        for layer in range(4):
            assert (reader.read("exp_avg", f"blocks.{layer}") == np.float32(reader.step + layer)).all()
    assert committed > NUM_KILLS, "the process was killed before it could save anything"
    assert num_leftovers > NUM_KILLS // 4, "no kill fell into a save, so the test has shown nothing"
