"""Reads W&B's file as strictly as `wandb sync` does, but stops where it ends in half a record."""

import json
import struct
import zlib
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

HEADER = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
BLOCK = 32768


def part(kind: int, content: bytes) -> bytes:
    """Returns what W&B writes: 1 is a whole record, 2 its first part, 4 its last."""
    return struct.pack("<IHB", zlib.crc32(bytes([kind]) + content), len(content), kind) + content


def parts(content: bytes) -> list[tuple[int, bytes]]:
    """Returns the kind and the bytes of every part of a record, blocks being 32 KiB long."""
    found = []
    for begin in range(0, len(content), BLOCK):
        block = content[begin : begin + BLOCK]
        at = len(HEADER) if begin == 0 else 0
        while at + 7 <= len(block):
            checksum, length, kind = struct.unpack("<IHB", block[at : at + 7])
            part = block[at + 7 : at + 7 + length]
            at += 7 + length
            if at > len(block):
                assert begin + BLOCK >= len(content), "a part is longer than its block"
                break
            assert zlib.crc32(bytes([kind]) + part) == checksum
            found.append((kind, part))
    return found


def records(folder: Path) -> list[Record]:
    """Returns the whole records of an attempt; raises AssertionError where W&B would refuse it."""
    (path,) = folder.glob("*.wandb")
    content = path.read_bytes()
    assert content.startswith(HEADER), f"{path} has no header"
    found, record = [], b""
    for kind, part in parts(content):
        assert (kind in (1, 2)) == (record == b""), "a record starts within another"
        record += part
        if kind in (1, 4):
            found.append(Record.FromString(record))
            record = b""
    assert any(record.HasField("run") for record in found), f"{path} does not say of which run"
    return found


def history(folder: Path) -> list[dict[str, Any]]:
    """Returns what an attempt has logged, a dictionary per call of `log`."""
    rows = [record.history.item for record in records(folder) if record.HasField("history")]
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row}
        for row in rows
    ]
