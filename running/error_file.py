"""Where the traceback of an error is kept: a line on a terminal is lost after a day of training."""

import datetime
import shlex
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities.rank_zero import rank_zero_only

from running.folder import read_yaml
from running.masking import hidden_in_words, hidden_texts, masked_words, without

NAME = "error.txt"


class ErrorFile:
    """`error.txt` of a run folder: one entry per error, with date, command and process.

    Secrets of the command, and of the YAML files that it names, are masked.

    Args:
        words: the command.

    Attributes:
        folder: of the run; None until there is one.
    """

    def __init__(self, words: Sequence[str]):
        self.words = words
        self.folder: Path | None = None
        # Now: a file that is edited during a training is not what it was called with.
        self.hidden = {*hidden_in_words(words), *hidden_texts([*_files(words)])}

    def keep(self, error: BaseException) -> Path | None:
        """Adds an entry, and returns the file; None without a folder that can be written."""
        if self.folder is None:
            return None
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        command = shlex.join(["main.py", *masked_words(self.words)])
        trace = without("".join(traceback.format_exception(error)), self.hidden)
        path = self.folder / NAME
        try:
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{now}, process {rank_zero_only.rank}: {command}\n{trace}\n")
        except OSError:  # what has stopped the run may be the disk
            return None
        return path


def _files(words: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields what the YAML files of a command hold; one that is none is refused by others."""
    for word in words:
        path = Path(word.rpartition("=")[2])
        if path.suffix in (".yaml", ".yml"):
            with suppress(OSError, ValueError):
                if path.is_file():
                    yield read_yaml(path)
