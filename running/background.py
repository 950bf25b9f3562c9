"""Command lines that run beside each other, in processes that start in a blink.

Importing torch and Lightning takes many seconds: a fork server imports them once, before any thread
is started, and every command is a fork of it.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["running", "datamodules", "sklearn.datasets"])


def start(args: Sequence[str], log: Path, num_threads: int) -> BaseProcess:
    """Starts ``python main.py ARGS``; when the process that calls this ends, however, so does it.

    Args:
        args: the command line.
        log: file to which it prints.
        num_threads: cores that it may use.
    """
    process = _processes.Process(target=_run, args=(list(args), log, num_threads))
    process.start()
    return process


def _run(args: list[str], log: Path, num_threads: int) -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()
    # Ctrl+C goes to all processes of a terminal: the one that shows something answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["main.py", *args]

    import torch

    from running.command_line import main

    torch.set_num_threads(num_threads)
    sys.exit(main())


def _die_with_parent() -> None:
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGKILL)  # which no run minds: its command goes on
