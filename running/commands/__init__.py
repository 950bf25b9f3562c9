"""Commands that look at what there is: none trains, none needs a YAML's Trainer.

Each is a file here with two functions: `add_arguments` says what the command line may hold, `run`
does it. A mistake is a ValueError or OSError, whose message is the line that the user reads.
"""

import argparse
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from running.suggestions import hint

LOOKING = ("runs", "report", "profile", "export", "tour", "completion")
"""By name; `predict` is one of them when it is given a run folder (`--run`) instead of a YAML."""


class CommandParser(argparse.ArgumentParser):
    """Raises instead of printing its usage before every mistake."""

    def check_options(self, args: Sequence[str]) -> None:
        """Raises ValueError for an unknown option; argparse would first ask for what is missing."""
        for option in (arg.partition("=")[0] for arg in args if arg.startswith("--")):
            if option not in self._option_string_actions:
                self.error(f"unrecognized arguments: {option}")

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}{hint(message, self._actions, {})}: see {self.prog} --help")


def looks(args: Sequence[str]) -> bool:
    """Tells whether a command line is one of these commands."""
    name, rest = (args[0], args[1:]) if args else ("", ())
    return name in LOOKING or (
        name == "predict" and any(arg == "--run" or arg.startswith("--run=") for arg in rest)
    )


def run_command(args: Sequence[str]) -> None:
    """Runs one of these commands.

    Raises:
        ValueError, OSError: a mistake of the user's.
    """
    name, *rest = args
    parser = parser_of(name)
    parser.check_options(rest)
    file_of(name).run(parser.parse_args(rest))


def parser_of(name: str) -> CommandParser:
    """Returns the parser of one of these commands."""
    command = file_of(name)
    parser = CommandParser(
        prog=f"main.py {name}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    return parser


def file_of(name: str) -> ModuleType:
    return importlib.import_module(f"running.commands.{name}")  # what one needs, others do not
