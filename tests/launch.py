"""Runs `main.py` in processes of their own that start in a blink and can be killed.

Importing torch and Lightning takes many seconds. A fork server imports them once, before any thread
is started, and every run is a fork of it.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["main", "datamodules", "sklearn.datasets"])


Environment = Mapping[str, str | None]
"""Variables of a run; None removes one."""
PATIENCE = 600
"""Seconds that a run may take, even on a busy machine."""
QUIET: Environment = {"WANDB_MODE": "disabled"}


def _run_main(args: Sequence[str], folder: Path, output: Path, environment: Environment) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(folder)
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    sys.argv = ["main.py", *args]
    # Tests that were started in the background ignore it, and what they start would, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Else the workers of a loader would wait for a fork server of their own.
    multiprocessing.set_start_method("fork", force=True)

    import torch

    import main

    if os.environ.get("KILLED_AFTER_SAVE"):
        _kill_after_save()
    torch.set_num_threads(1)
    sys.exit(main.main())


def start(
    args: Sequence[str], folder: Path, environment: Environment = QUIET
) -> multiprocessing.Process:
    """Starts ``python main.py ARGS`` in `folder`; it prints to `folder/output.txt`."""
    process = _processes.Process(
        target=_run_main, args=(args, folder, folder / "output.txt", environment)
    )
    process.start()
    return process


def run(args: Sequence[str], folder: Path, environment: Environment = QUIET) -> tuple[int, str]:
    """Runs a command line to its end and returns the exit status and what it printed."""
    output = folder / "output.txt"
    before = output.stat().st_size if output.exists() else 0
    process = start(args, folder, environment)
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"{' '.join(args)} hangs\n{output.read_text()}")
    return process.exitcode, output.read_bytes()[before:].decode(errors="backslashreplace")


def kill_after_save(args: Sequence[str], folder: Path, environment: Environment = QUIET) -> bool:
    """Starts a run that ends like a killed one once it has saved last.ckpt; False if it did not."""
    status, _ = run(args, folder, {**environment, "KILLED_AFTER_SAVE": "yes"})
    return status == -signal.SIGKILL


def _kill_after_save() -> None:
    from running.checkpoint import LAST, RunCheckpoint

    save = RunCheckpoint.save

    def save_and_die(self, trainer, name: str) -> None:
        save(self, trainer, name)
        if name == LAST:
            os.kill(os.getpid(), signal.SIGKILL)

    RunCheckpoint.save = save_and_die


def kill_when(
    condition: Callable[[], bool],
    args: Sequence[str],
    folder: Path,
    environment: Environment = QUIET,
) -> bool:
    """Starts a run, kills it (SIGKILL) when `condition` holds; False if it ended before."""
    process = start(args, folder, environment)
    while process.is_alive() and not condition():
        time.sleep(0.001)
    if not process.is_alive():
        return False
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return True
