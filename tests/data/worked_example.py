"""The folder of docs/data_format.md's worked example, written by the real writers, as its hex dump."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from llmtrain.data.config import Packing
from llmtrain.data.pack import write_plan
from llmtrain.data.shards import ShardWriter

DOCUMENTS = [[5, 300, 8, 1], [7, 1], [9, 9, 1]]
EOS_ID, VOCAB_SIZE, SEQ_LEN = 1, 1000, 6


def example() -> str:
    """Two documents that share a row, and one that has its own: .bin, .idx, .sums, and the two files of a
    best-fit pack."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writer = ShardWriter(folder / "train-00000", "uint16", VOCAB_SIZE, eos_id=EOS_ID)
        for document in DOCUMENTS:
            writer.add(np.array(document))
        writer.close()
        lengths = np.array([len(document) for document in DOCUMENTS])
        write_plan(folder, "pack", "train", SEQ_LEN, Packing.best_fit, [lengths])
        parts = []
        for path in ("train-00000.bin", "train-00000.idx", "train-00000.sums"):
            parts += [path, *dump((folder / path).read_bytes())]
        for path in ("train.rows.npy", "train.spans.npy"):
            content = (folder / "pack" / path).read_bytes()
            begin = content.index(b"\n") + 1  # behind the head of an .npy file
            parts += [f"{path} from byte {begin}", *dump(content[begin:])]
    return "\n".join(f"    {part}" for part in parts)


def dump(content: bytes) -> list[str]:
    return [f"  {at:04x}  {content[at : at + 16].hex(' ')}" for at in range(0, len(content), 16)]


if __name__ == "__main__":
    print(example())
