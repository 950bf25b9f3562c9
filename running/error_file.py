"""Where the traceback of an error is kept: a line on a terminal is lost after a day of training."""

import datetime
import shlex
import traceback
from collections.abc import Sequence
from pathlib import Path

from pytorch_lightning.utilities.rank_zero import rank_zero_only

from running.masking import masked_words, without_secrets

NAME = "error.txt"


class ErrorFile:
    """`error.txt` of a run folder: one entry per error, with date, command and process.

    Args:
        words: the command.

    Attributes:
        folder: of the run; None until there is one.
    """

    def __init__(self, words: Sequence[str]):
        self.words = words
        self.folder: Path | None = None

    def keep(self, error: BaseException) -> Path | None:
        """Adds an entry, and returns the file; None without a folder that can be written."""
        if self.folder is None:
            return None
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        command = shlex.join(["main.py", *masked_words(self.words)])
        trace = without_secrets("".join(traceback.format_exception(error)), self.words)
        path = self.folder / NAME
        try:
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{now}, process {rank_zero_only.rank}: {command}\n{trace}\n")
        except OSError:  # what has stopped the run may be the disk
            return None
        return path
