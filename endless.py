"""Whether what a file says ever ends; this module imports the standard library alone.

Aliases make a YAML file of a few lines a tree without end, or of more values than any memory holds.
A pipe ends when somebody closes it, a device never.
"""

import os
import stat
from collections.abc import Mapping
from typing import Any

MAX_SIZE = 10**6
"""Values of a tree, written out; a long text counts as several."""
MAX_BITS = 10**4
"""Of a whole number: Python refuses to print those that are much larger."""


def is_endless(tree: Any) -> bool:
    """Tells whether a tree, written out, exceeds `MAX_SIZE`, or a number in it `MAX_BITS`."""
    size, waiting = 0, [tree]
    while waiting and size <= MAX_SIZE:
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += value
        elif isinstance(value, int) and value.bit_length() > MAX_BITS:
            return True
        size += 1 + len(value) // 100 if isinstance(value, str) else 1
    return size > MAX_SIZE


def is_special(path: str | os.PathLike) -> bool:
    """Tells whether a path leads to a pipe, a device or a socket: neither a file nor a folder."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # there is none, or no path can be called that
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
