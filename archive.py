"""Whether a file that torch has saved is whole.

`torch.load` reads tensors whose bytes have rotted as if they were right. The files are archives
with a checksum of every entry; this module imports the standard library alone.
"""

import struct
import zlib
from pathlib import Path
from zipfile import BadZipFile, ZipFile

# What Python's reader raises depends on which byte is wrong.
DAMAGES = (BadZipFile, OSError, EOFError, RuntimeError, ValueError, struct.error, zlib.error)


def is_intact(path: Path) -> bool:
    """Tells whether a file is an archive, as torch saves it, all of whose checksums hold."""
    try:
        with ZipFile(path) as archive:
            # An entry with attributes may be a folder to torch, which then reads nothing, silently.
            is_plain = not any(entry.external_attr for entry in archive.infolist())
            return is_plain and archive.testzip() is None
    except DAMAGES:
        return False
