"""Prints a script that completes commands, options, files and classes: for bash, zsh or tcsh.

    python main.py completion bash > completion.sh
    source completion.sh
    ./main.py fit -c experiments/<TAB>

What a class takes depends on the class, and is not completed: see `fit --model.help LitResNet`.
"""

import argparse
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import datamodules
import lightning_modules
from running.cli import ExperimentCLI
from running.commands import LOOKING, parser_of

EXTRA = "completion needs one more package: pip install -e '.[completion]'"
FILES = {"--config", "--ckpt_path"}
FOLDERS = {"--run_dir", "--run", "--images", "--out", "--dir", "runs", "folder"}
CLASSES = {
    "--model": [name for name in lightning_modules.__all__ if name.startswith("Lit")],
    "--data": [name for name in datamodules.__all__ if name.endswith("DataModule")],
}


class _Found(Exception):
    """Ends Lightning's constructor where the parsers are made."""


class _Parsers(ExperimentCLI):
    def parse_arguments(self, *_: Any) -> None:
        raise _Found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))


def run(arguments: argparse.Namespace) -> None:
    try:
        import shtab
    except ImportError as error:
        raise ValueError(EXTRA) from error
    whole = argparse.ArgumentParser(prog="main.py")
    subparsers = whole.add_subparsers()
    kinds = {"file": shtab.FILE, "folder": shtab.DIRECTORY}
    for name, actions in known_actions().items():
        # Without a help shtab takes a command for hidden.
        parser = subparsers.add_parser(name, add_help=False, help=name)
        for action in actions:
            copied = say_again(action, parser)
            if kind := takes(action):
                copied.complete = kinds[kind]
    print(shtab.complete(whole, arguments.shell))


def say_again(action: argparse.Action, parser: argparse.ArgumentParser) -> argparse.Action:
    """Adds what a shell needs of an option; those of jsonargparse cannot be copied."""
    if action.nargs == 0:
        return parser.add_argument(*action.option_strings, action="store_true")
    names = action.option_strings or [action.dest]
    choices = CLASSES.get(names[-1], action.choices)
    return parser.add_argument(*names, choices=choices, nargs=action.nargs)


def takes(action: argparse.Action) -> str:
    """Returns "file" or "folder" if the value of an option is one, otherwise nothing."""
    if FILES & set(action.option_strings):
        return "file"
    return "folder" if FOLDERS & {*action.option_strings, action.dest} else ""


def known_actions() -> Mapping[str, Sequence[argparse.Action]]:
    """Returns the options and arguments of every command, by its name."""
    cli = _Parsers.__new__(_Parsers)
    with contextlib.suppress(_Found):
        cli.__init__([])
    known = {name: parser_of(name)._actions for name in (*LOOKING, "predict")}
    for name, parser in cli._subcommand_parsers.items():
        other = known.get(name, [])  # `predict` is two commands
        there = {word for action in other for word in action.option_strings}
        known[name] = other + [a for a in parser._actions if not there & {*a.option_strings}]
    return known
