"""The file in which W&B keeps what a run logs: records in the format of LevelDB's log."""

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

START = 7
"""Bytes before the first record."""
BLOCK_SIZE = 2**15
"""Bytes; a record that does not fit into a block goes on in the next one."""
FULL, FIRST, LAST = 1, 2, 4
"""What a part is of its record; 3 is one in the middle."""

_head = struct.Struct("<IHB")  # checksum, number of bytes and kind of the part that follows


def read_records(path: Path, start: int = START) -> Iterator[tuple[Any, int]]:
    """Yields the records from a byte on, up to the first that is not whole.

    Args:
        path: the file, which may still be written.
        start: the byte where a record starts.

    Yields:
        a `wandb_internal_pb2.Record`, and the byte where the next one starts.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # slow

    with path.open("rb") as file:
        file.seek(start)
        data = file.read()
    record, at = b"", 0
    while True:
        left_in_block = BLOCK_SIZE - (start + at) % BLOCK_SIZE
        if left_in_block < _head.size:  # filled with zeros
            at += left_in_block
        if at + _head.size > len(data):
            return
        checksum, length, kind = _head.unpack_from(data, at)
        at += _head.size
        part = data[at : at + length]
        if len(part) < length or checksum != zlib.crc32(part, zlib.crc32(bytes([kind]))):
            return
        at += length
        record = part if kind in (FULL, FIRST) else record + part
        if kind in (FULL, LAST):
            yield Record.FromString(record), start + at


def can_be_uploaded(folder: Path) -> bool:
    """Tells whether the folder of an attempt has a file that says which run it is of.

    `wandb sync` uploads the records of such a file up to the first that is damaged.
    """
    files = folder.glob("*.wandb")
    return any(record.HasField("run") for path in files for record, _ in read_records(path))


def cut_half_record(path: Path) -> bool:
    """Cuts off what follows the last whole record, and keeps the file that had it as `*.cut`.

    `wandb sync` uploads the records before it, but of the same run no file that comes later.

    Returns:
        whether there was anything.
    """
    end = START
    for _, after in read_records(path):
        end = after
    content = path.read_bytes()
    if not content[end:].strip(b"\0"):  # nothing, or the zeros that fill a block
        return False
    part = path.with_suffix(".part")
    part.write_bytes(content[:end])
    os.replace(path, path.with_suffix(".wandb.cut"))
    os.replace(part, path)
    return True
