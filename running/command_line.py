"""One command line: which command it is, and how a mistake ends."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence

import torch
from jsonargparse import ArgumentError
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch.distributed import DistError

import preemption
from running.arguments import one_line, told
from running.cli import ExperimentCLI
from running.commands import LOOKING, looks, run_command
from running.error_file import ErrorFile
from running.suggestions import nearest

# Mistakes of a user, each told in one line. Anything else is ours and shows its traceback.
USER_ERRORS = (ArgumentError, MisconfigurationException, ValueError, OSError, FloatingPointError)
RUNS = ("fit", "validate", "test", "predict")
OTHER_NAMES = {"train": "fit", "eval": "test", "evaluate": "test", "infer": "predict", "ls": "runs"}
START = """\
python main.py fit -c experiments/quickstart.yaml           trains on handwritten digits, then tests
python main.py fit -c experiments/quickstart.yaml --help    everything that can be set
python main.py tour                                         six methods in five minutes

Experiments are the YAML files in experiments/<method>/, machines those in experiments/machines/.
Commands that look: runs, report, profile, predict --run, export, each with its --help.
<TAB> completes after: source <(python main.py completion bash); then ./main.py fit -c ..."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit status.

    0; 2 after a mistake; 75, or 143 after SIGTERM, if a scheduler's warning came and the same
    command goes on; 130 after Ctrl+C; 1 if another process of the run has ended.
    """
    silence_lightning()
    words = sys.argv[1:] if args is None else list(args)
    errors = ErrorFile(words)
    try:
        check_command(words)
        if looks(words):
            run_command(words)
        else:
            ExperimentCLI(args, errors)
    except preemption.Preempted as warning:
        rank_zero_info("saved after a signal: repeat the command to go on")
        return warning.code
    except SIGTERMException:
        # Lightning alone would exit with 0, and a scheduler would take the run for done.
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        if errors.folder is not None:
            rank_zero_info("stopped: the same command goes on from what was saved last")
        return 128 + signal.SIGINT
    except Exception as error:
        return tell(error, errors)
    return 0


def check_command(words: Sequence[str]) -> None:
    """Raises ValueError if a command line names no command, or a command alone."""
    if not words or list(words) in [[name] for name in RUNS]:
        print(START, file=sys.stderr)
        missing = "experiment: give one by -c" if words else "command: begin with one of these"
        raise ValueError(f"the command line names no {missing}")
    known = [*RUNS, *LOOKING]
    if not words[0].startswith("-") and words[0] not in known:
        names = {name: name for name in known} | OTHER_NAMES
        meant = [f": did you mean {names[name]}?" for name in nearest(words[0], names)[:1]]
        raise ValueError("".join([f"{words[0]!r} is none of {', '.join(known)}", *meant]))


def tell(error: Exception, errors: ErrorFile) -> int:
    """Prints the line of an error and returns the exit status; keeps the traceback.

    Raises:
        Exception: the same, if it is no mistake of the user's, or if TRACEBACK is set.
    """
    kept = errors.keep(error)
    where = f"{kept} shows where" if kept else "TRACEBACK=1 shows where"
    if os.environ.get("TRACEBACK"):
        raise
    if is_out_of_memory(error):
        remedy = "lower batch_size, or make the network or the images smaller"
        print(f"error: out of memory ({one_line(error)}): {remedy} ({where})", file=sys.stderr)
        return 2
    if isinstance(error, USER_ERRORS) or is_mistake(error):
        print(f"error: {told(error)} ({where})", file=sys.stderr)
        return 2
    if not is_loss_of_a_rank(error):
        if kept:
            print(
                f"this is no mistake of yours: {where}, and which command it was", file=sys.stderr
            )
        raise
    print(
        f"error: another process of this run has ended, so this one does ({one_line(error)}): "
        f"see what it printed, then repeat the command to go on ({where})",
        file=sys.stderr,
    )
    return 1


def silence_lightning() -> None:
    """Hides advice that does not fit this project."""
    # Our small sets are in memory and have no worker processes.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # The metrics have been reduced over the ranks when they are logged.
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated.*")
    # With SLURM's srun installed but not used, every Trainer would say so.
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(_is_no_advertisement)


def is_mistake(error: Exception) -> bool:
    """Tells whether Lightning has refused what a user has said; it has no class for that."""
    return isinstance(error, RuntimeError) and str(error).startswith(
        ("Early stopping conditioned on metric", "Found more than one stateful callback")
    )


def is_out_of_memory(error: Exception) -> bool:
    """Tells whether a device or the machine has no memory left; on a CPU torch has no class."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def is_loss_of_a_rank(error: Exception) -> bool:
    """Tells whether a collective operation failed; gloo has no class for that."""
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage()
