"""A scheduler's warning that this process has to go, kept until there is a good moment to obey.

SLURM and its kin send a signal some time before they kill. Saving inside a signal handler saves the
middle of a step, and waits for ranks that are elsewhere. So the handler only remembers;
`callbacks.RunCheckpoint` asks after every batch, saves on all ranks together, and raises
`Preempted`. This module imports nothing heavy: it has to be there while torch is imported.
"""

import signal
import threading
from types import FrameType

AGAIN = 75
"""Exit status (EX_TEMPFAIL) of a run that a repeated command goes on with; see slurm.sh."""
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
PATIENCE = 30
"""Seconds for which a loader worker goes on after SIGTERM, so that its trainer can save."""

_received = 0


class Preempted(SystemExit):
    """Raised at the good moment. After SIGTERM, whose sender has other plans, not with `AGAIN`."""

    def __init__(self, warning: int):
        super().__init__(128 + warning if warning == signal.SIGTERM else AGAIN)


def listen() -> None:
    """Remembers warnings from now on; again, if somebody else has installed handlers since."""
    _install(_remember)


def stop_listening() -> None:
    """Lets warnings end the process, for commands that have nothing to save."""
    _install(signal.SIG_DFL)


def received() -> int:
    """Returns the number of the first warning, 0 if there was none."""
    return _received


def outlive_warnings() -> None:
    """For a loader worker, which gets the same signals: its trainer needs it to reach the end.

    It must not ignore SIGTERM, by which Python ends the children that are left.
    """
    for warning in WARNINGS:
        signal.signal(warning, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_soon)


def _install(handler) -> None:
    if threading.current_thread() is threading.main_thread():
        for warning in WARNINGS:
            signal.signal(warning, handler)


def _remember(number: int, frame: FrameType | None) -> None:
    global _received
    _received = _received or number


def _end_soon(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(PATIENCE)
