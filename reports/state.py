"""Whether a run is at work, done, or how it ended."""

import fcntl
import os
import struct
import sys
from pathlib import Path

from reports.files import is_archive

RUNNING, FINISHED, RESUMABLE, BROKEN, EMPTY = "running", "finished", "resumable", "broken", "empty"
STATES = (RUNNING, FINISHED, RESUMABLE, BROKEN, EMPTY)

_IS_BSD = sys.platform == "darwin"
# struct flock: type, whence, start, length, process; the BSDs have the first two last.
_LAYOUT = "qqihh" if _IS_BSD else "hhqqi"


def is_locked(path: Path) -> bool:
    """Tells whether another process holds a lock that `fcntl.lockf` takes.

    It asks, and takes nothing: whoever would try the lock might make a run fail that starts at that
    moment. A process must not ask about its own lock: closing the file would let go of it.
    """
    fields = (0, 0, 0, fcntl.F_WRLCK, 0) if _IS_BSD else (fcntl.F_WRLCK, 0, 0, 0, 0)
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        answer = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(_LAYOUT, *fields))
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(file)
    return struct.unpack(_LAYOUT, answer)[3 if _IS_BSD else 0] != fcntl.F_UNLCK


def state_of(folder: Path, problem: str, is_running: bool) -> tuple[str, str]:
    """Returns the state of a run, and why it is so where that is not plain.

    Args:
        folder: of the run.
        problem: what is wrong with its files, in one line; "" if nothing is.
        is_running: whether a process trains there.
    """
    if is_running:
        return RUNNING, problem
    last, previous = (folder / f"{name}.ckpt" for name in ("last", "previous"))
    if last.exists() and not is_archive(last):
        if not is_archive(previous):
            return BROKEN, "last.ckpt is damaged"
        if not problem:
            return RESUMABLE, "last.ckpt is damaged: fit goes on from previous.ckpt"
    best = folder / "best.ckpt"
    if best.exists() and not is_archive(best):
        problem = problem or "best.ckpt is damaged"
    if problem:
        return BROKEN, problem
    if (folder / "finished.yaml").exists():
        return FINISHED, ""
    if last.exists():
        return RESUMABLE, ""
    return EMPTY, "no checkpoint yet"
