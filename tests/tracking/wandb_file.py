"""Records of a .wandb file: LevelDB's log format behind a header of 7 bytes, with wandb's own messages in
it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from wandb.proto import wandb_internal_pb2

BLOCK_BYTES = 32768
HEADER = struct.Struct("<IHB")
FULL, LAST = 1, 4


def messages(path: Path) -> list[bytes]:
    """Every record's bytes, put together of its parts."""
    content = path.read_bytes()
    assert content.startswith(b":W&B"), f"{path} is no file of W&B's"
    at, found, parts = 7, [], b""
    while at + HEADER.size <= len(content):
        left = BLOCK_BYTES - at % BLOCK_BYTES
        if left < HEADER.size:
            at += left
            continue
        _, length, part = HEADER.unpack_from(content, at)
        at += HEADER.size
        if at + length > len(content):
            break  # it is being written
        parts += content[at : at + length]
        at += length
        if part in (FULL, LAST):
            found.append(parts)
            parts = b""
    return found


def records_of(path: Path, kind: str) -> list[dict[str, Any]]:
    """Records of one kind; their lists of keys and JSON become dictionaries."""
    found = []
    for message in messages(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(message)
        if record.WhichOneof("record_type") == kind:
            value = MessageToDict(getattr(record, kind), preserving_proto_field_name=True)
            if "item" in value:
                value["item"] = {
                    item.get("key") or ".".join(item["nested_key"]): json.loads(item["value_json"])
                    for item in value["item"]
                }
            found.append(value)
    return found
