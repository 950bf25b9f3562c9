"""A scheduler's warning that this process has to go, kept until there is a good moment to obey.

SLURM and its kin send a signal some time before they kill. Saving inside a signal handler saves the
middle of a step, and waits for ranks that are elsewhere. So the handler only remembers;
`running.RunCheckpoint` asks after every batch, saves on all ranks together, and raises
`Preempted`. This module imports nothing heavy: it has to be there while torch is imported.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

GOES_ON = 75
"""Exit status (EX_TEMPFAIL) of a run that a repeated command goes on with; see slurm.sh."""
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)

_received = 0


class Preempted(SystemExit):
    """Raised at the good moment: exit status `GOES_ON`, or after SIGTERM its usual one."""

    def __init__(self, warning: int):
        super().__init__(128 + warning if warning == signal.SIGTERM else GOES_ON)


class TimeIsOver(SystemExit):
    """Raised at the same moment when `trainer.max_time` has passed."""


def listen() -> None:
    """Remembers warnings from now on; again, if somebody else has installed handlers since."""
    if threading.current_thread() is threading.main_thread():
        for warning in WARNINGS:
            signal.signal(warning, _remember)


def received() -> int:
    """Returns the number of the first warning, 0 if there was none."""
    return _received


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Lets warnings wait; processes that are started meanwhile begin their lives like that."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, WARNINGS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlive_warnings() -> None:
    """For a loader worker, which gets the same signals: its trainer needs it until it has saved.

    Only a SIGTERM of its trainer ends it: so Python ends the children that are left.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, WARNINGS)
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_wait_for_the_trainer, daemon=True).start()
    else:  # macOS does not tell who has sent a signal
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def _remember(number: int, frame: FrameType | None) -> None:
    global _received
    _received = _received or number


def _wait_for_the_trainer() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
