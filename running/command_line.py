"""One command line: which command it is, and how a mistake ends."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from jsonargparse import ArgumentError
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch.distributed import DistError

import preemption
from running.arguments import one_line, told
from running.cli import ExperimentCLI
from running.commands import looks, run_command

# Mistakes of a user, each told in one line. Anything else is ours and shows its traceback.
USER_ERRORS = (ArgumentError, MisconfigurationException, ValueError, OSError, FloatingPointError)


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit status.

    0; 2 after a mistake; 75, or 143 after SIGTERM, if a scheduler's warning came and the same
    command goes on; 130 after Ctrl+C; 1 if another process of the run has ended.
    """
    silence_lightning()
    words = sys.argv[1:] if args is None else list(args)
    try:
        if looks(words):
            run_command(words)
        else:
            ExperimentCLI(args)
    except USER_ERRORS as error:
        if os.environ.get("TRACEBACK"):
            raise
        print(f"error: {told(error)} (TRACEBACK=1 shows where)", file=sys.stderr)
        return 2
    except preemption.Preempted as warning:
        rank_zero_info("saved after a signal: repeat the command to go on")
        return warning.code
    except RuntimeError as error:
        if is_mistake(error) and not os.environ.get("TRACEBACK"):
            print(f"error: {told(error)} (TRACEBACK=1 shows where)", file=sys.stderr)
            return 2
        if not is_loss_of_a_rank(error) or os.environ.get("TRACEBACK"):
            raise
        print(
            f"error: another process of this run has ended, so this one does ({one_line(error)}): "
            "see what it printed, then repeat the command to go on",
            file=sys.stderr,
        )
        return 1
    except SIGTERMException:
        # Lightning alone would exit with 0, and a scheduler would take the run for done.
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


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


def is_mistake(error: RuntimeError) -> bool:
    """Tells whether Lightning has refused what a user has said; it has no class for that."""
    return str(error).startswith(
        ("Early stopping conditioned on metric", "Found more than one stateful callback")
    )


def is_loss_of_a_rank(error: RuntimeError) -> bool:
    """Tells whether a collective operation failed; gloo has no class for that."""
    return isinstance(error, DistError) or "gloo" in str(error)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage()
