"""What becomes of memory that a step on a CPU has used.

glibc gives large blocks back to the system as soon as they are freed. The next step gets them page
by page, each by a fault and filled with zeros: some 100,000 in a step of a dense network.
"""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h."""
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")
"""Variables by which a user has decided otherwise; GLIBC_TUNABLES is another."""


def keep_freed_memory() -> bool:
    """Lets this process keep what it frees, for the next step; no number changes.

    Returns:
        Whether it does. It does not where there is no glibc, or where the environment already says
        what glibc shall do.
    """
    if any(name in os.environ for name in (*SETTINGS, "GLIBC_TUNABLES")):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Nothing is trimmed, and no block is a mapping of its own.
    return bool(mallopt(M_TRIM_THRESHOLD, -1) and mallopt(M_MMAP_MAX, 0))
