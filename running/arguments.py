"""What a command line and its YAML files may say, more strictly than jsonargparse.

What it lets pass and a run would take for something else stops here, before anything is built:

    null where a value is needed   would take the other branch of an `if`
    an empty string                is a variable that nobody has set
    a key that a YAML gives twice  would lose the first of the two
    a linked argument              would give way to what decides it: model.seed to seed_everything
"""

import contextlib
import os
import re
import sys
import warnings
from argparse import Action
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, Namespace, get_loader, set_loader
from pytorch_lightning.cli import LightningArgumentParser

from endless import is_endless, is_special
from running.suggestions import arguments_with_long_names, hint, keys_of, with_long_names

NO_FILE = '"<unicode string>"'  # what PyYAML calls a text, and jsonargparse hands it nothing else
UNSAID = "Unable to serialize instance"  # what jsonargparse writes for a value
NESTED = (
    "SequentialLR and ChainedScheduler are made of other schedules, which no YAML can nest: use "
    "lightning_modules.WarmupMultiStepLR or WarmupCosineLR, or a class that takes the optimizer"
)
UNSET = "is a variable unset? give a value, or leave it out"

_load_yaml = get_loader("yaml")
_Composer = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class StrictParser(LightningArgumentParser):
    """Parses the command line, its YAML files, and the arguments of every class that they name.

    The signatures of jsonargparse's methods differ between its versions: arguments that are not
    needed here are handed on as they come.
    """

    def __init__(self, *rest: Any, **options: Any):
        # Those of classes are made without the options of the whole.
        super().__init__(*rest, **options | {"allow_abbrev": False})

    def parse_args(
        self, args: Sequence[str] | None = None, *rest: Any, **options: Any
    ) -> Namespace:
        words = arguments_with_long_names(sys.argv[1:] if args is None else args)
        refuse_empty(words)
        refuse_special(words)
        try:
            with _naming("what the command line gives"):
                return super().parse_args(words, *rest, **options)
        except (ArgumentError, ValueError) as error:
            line = one_line(error)
            # A parser calls those of its subcommands, which may have said it.
            if not re.search("did you mean|give one of", line):
                line += hint(line, self._actions, _keys_given(words))
            raise ArgumentError(None, line) from error

    def parse_path(self, path: str | os.PathLike, *rest: Any, **options: Any) -> Namespace:
        with _naming(f'"{path}"'):
            return super().parse_path(path, *rest, **options)

    def dump(self, *rest: Any, **options: Any) -> str:
        """Leaves out defaults that no YAML can say (torchvision's norm_layer: a partial function).

        They come back by themselves; what stands in their place in jsonargparse's text does not.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", f"\\s*{UNSAID}")
            text = super().dump(*rest, **options)
        if UNSAID not in text:
            return text
        return yaml.safe_dump(_without_unsaid(yaml.safe_load(text)), sort_keys=False)

    def link_arguments(self, source: str, target: str, *rest: Any, **options: Any) -> None:
        self.links = [*getattr(self, "links", []), (source, target)]
        super().link_arguments(source, target, *rest, **options)

    def _parse_common(self, cfg: Namespace, *rest: Any, **options: Any) -> Namespace:
        """Completes what was given, in one file or altogether, with defaults and links.

        This is the last place where a linked argument that was given can be told from its default.
        With the value that the link brings it is no mistake: config.yaml in a run folder holds all.

        Raises:
            ArgumentError: a linked argument has another value than what decides it.
        """
        for source, target in getattr(self, "links", []):
            if source in cfg and target in cfg:
                if cfg[target] != cfg[source]:
                    self.error(
                        f"{target} is {cfg[target]}, but {source} decides it, and is "
                        f"{cfg[source]}: use --{source}"
                    )
                del cfg[target]
        return super()._parse_common(cfg, *rest, **options)

    def validate(self, cfg: Namespace, *rest: Any, **options: Any) -> None:
        """Checks the values that a parser has read; jsonargparse passes over those that are None.

        Raises:
            TypeError: a value does not fit its argument.
        """
        for action in self._actions:
            # What is required has the default None, and jsonargparse misses it.
            if action.dest not in cfg or cfg[action.dest] == action.default:
                continue
            if _holds_empty(cfg[action.dest]):
                raise TypeError(f"{action.dest} is empty: {UNSET}")
            if cfg[action.dest] is None and not self._takes_null(action):
                needed = _describe(getattr(action, "_typehint", None))
                raise TypeError(
                    f"{action.dest} is null, but needs {needed}: give it, or remove the line"
                )
        super().validate(cfg, *rest, **options)

    def _takes_null(self, action: Action) -> bool:
        # A section has no type. Older versions of jsonargparse check no function.
        annotation = getattr(action, "_typehint", None)
        if annotation is None or get_origin(annotation) is Callable:
            return False
        null, skip_none, skip_required = Namespace(), False, True
        null[action.dest] = None
        try:
            super().validate(null, skip_none, skip_required)
        except TypeError:
            return False
        return True


def check_trainer(init: Namespace) -> None:
    """Raises ValueError for arguments of the Trainer that it takes, and that train nothing good."""
    least = {
        "accumulate_grad_batches": 1,
        "check_val_every_n_epoch": 1,
        "gradient_clip_val": 0,
        "log_every_n_steps": 1,
    }
    for name, limit in least.items():
        value = init[name]
        if value is not None and value < limit:
            raise ValueError(f"trainer.{name} is {value}: use {limit} or more")
    if init.devices is None:
        raise ValueError("trainer.devices is null: give a number, or auto")
    interval = init.val_check_interval
    if interval is not None and not (isinstance(interval, int | float) and interval > 0):
        raise ValueError(
            f"trainer.val_check_interval is {interval}: give a number of batches, or a share of an "
            "epoch; after a time, a run that goes on would validate elsewhere"
        )
    if str(init.precision) in ("16-true", "bf16-true", "64-true", "64", "transformer-engine"):
        raise ValueError(
            f"trainer.precision is {init.precision}, and images and metrics are of 32 bits: use "
            "32-true, 16-mixed or bf16-mixed"
        )


def refuse_empty(args: Sequence[str]) -> None:
    """Refuses ``--run_dir=`` and ``--run_dir ""`` on a command line.

    Raises:
        ValueError: names the first option without a value.
    """
    option = "an argument"
    for arg in args:
        name, equals, value = arg.partition("=") if arg.startswith("-") else (option, "=", arg)
        if equals and value.strip() in ("", '""', "''"):
            raise ValueError(f"{name} is empty: {UNSET}")
        option = name


def refuse_special(args: Sequence[str]) -> None:
    """Refuses pipes and devices on a command line: to read one is to wait, maybe forever.

    Raises:
        ValueError: names the first.
    """
    for arg in args:
        path = Path(arg.partition("=")[2] if arg.startswith("-") else arg)
        if is_special(path):
            raise ValueError(f"{path} is a pipe or a device: give a file")


def load_yaml(text: str) -> Any:
    """Reads a YAML text as jsonargparse does, and takes classes by their short names.

    Raises:
        ValueError: a key is given twice (names it, and both lines), or the text is without end.
    """
    # Not a YAMLError: after one of those jsonargparse takes the text for a string, and goes on.
    lines: dict[str, int] = {}
    if ":" in text:
        for key, line in _keys(yaml.compose(text, _Composer), "", set()):
            if key in lines:
                raise ValueError(
                    f"the key {key} is given twice in {NO_FILE}, on lines {lines[key]} and {line}: "
                    "keep one"
                )
            lines[key] = line
    content = _load_yaml(text)
    if is_endless(content):
        raise ValueError(f"{NO_FILE} refers to itself, or says too much: correct it")
    return with_long_names(content)


set_loader("yaml", load_yaml, (yaml.YAMLError,))


def _keys(node: yaml.Node | None, parent: str, seen: set[int]) -> Iterator[tuple[str, int]]:
    """Yields the dotted path and the line of every key below a node, of aliased ones once."""
    if id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _keys(item, f"{parent}{index}.", seen)
        return
    for key, value in node.value:
        path = f"{parent}{key.value}"
        yield path, key.start_mark.line + 1
        yield from _keys(value, f"{path}.", seen)


@contextlib.contextmanager
def _naming(place: str) -> Iterator[None]:
    """Says in errors about a YAML text where it stands."""
    try:
        yield
    except UnicodeError as error:
        raise ArgumentError(None, f"{place} is no text in UTF-8 ({error})") from error
    except (ArgumentError, ValueError) as error:
        if NO_FILE not in str(error):
            raise
        raise ArgumentError(None, str(error).replace(NO_FILE, place)) from error


def _keys_given(args: Sequence[str]) -> dict[str, str]:
    """Returns the dotted keys of the YAML files that a command line names, and which has them."""
    keys = {}
    for arg in args:
        file = arg.rpartition("=")[2]
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
            content = yaml.load(Path(file).read_text(encoding="utf-8"), _Composer)
            keys |= {} if is_endless(content) else dict.fromkeys(keys_of(content), file)
    return keys


def _without_unsaid(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        key: _without_unsaid(each)
        for key, each in value.items()
        if not (isinstance(each, str) and each.startswith(UNSAID))
    }


def _holds_empty(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_holds_empty, value))
    if isinstance(value, dict):
        return any(map(_holds_empty, value.values()))
    return isinstance(value, str) and not value.strip()


def _describe(annotation: Any) -> str:
    """Returns a type in words, if it has few."""
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(map(repr, get_args(annotation)))}"
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_describe, get_args(annotation))))
    if not isinstance(annotation, type):
        return "a value"
    name = annotation.__name__
    return f"an {name}" if name[0] in "AEIOUaeiou" else f"a {name}"


def one_line(error: Exception) -> str:
    """Returns an error's message without the types and values that jsonargparse wraps around."""
    message = " ".join(str(error).split())
    if re.search(r"key \"schedulers\"|Option 'schedulers'", message):
        return NESTED
    message = message.replace(
        "No supported gpu backend found!", "there is no GPU: use -c experiments/machines/cpu.yaml"
    )
    message = re.sub(
        r"Does not validate against any of the Union subtypes Subtypes: .*? Errors: - ", "", message
    )
    message = re.sub(
        r"Parser key \"paper\": (Problem with given class_path 'running.Paper': )?",
        "paper takes source, a text, and test_acc, accuracies by operating point: ",
        message,
    )
    message = re.sub(r"- Expected a path but \S+ either not accessible or invalid - ", "", message)
    message = re.sub(
        r"Expected a dot import path string: (\S+)( - .*)?", r"there is no class \1", message
    )
    message = re.sub(
        r"Not a valid subclass of (\w+) Subclass types expect one of:.*",
        r"give its class (of \1) by class_path, arguments below init_args, and nothing beside them",
        message,
    )
    message = re.sub(
        r"Type [\w.]*Callable\[.*? expects a function or a callable class: (.*?)"
        r"\. Got value: Namespace\(class_path='([\w.]+)'",
        r"Problem with given class_path '\2': \1. Got value: Namespace(",
        message,
    )
    message = re.sub(r" - Expected a <class 'NoneType'>.*", "", message)
    message = re.sub(r"\. Got value: Namespace\(.*", "", message)
    message = re.sub(r" - Not a valid subclass of Callback.*", "", message)
    return re.sub(r" Given value type: .*", "", message)


def told(error: Exception) -> str:
    """Returns the line that tells a user of a mistake, without what would garble a terminal."""
    if isinstance(error, OSError) and error.errno and error.filename is not None:
        # The system says what is wrong with a path, and not what to do.
        name, reason = os.fsdecode(error.filename), error.strerror
        message = f"cannot use {name} ({reason}): name another path, or correct that one"
    else:
        message = one_line(error)
    message = re.sub(r"\S{200,}", lambda word: f"{word[0][:60]}...{word[0][-60:]}", message)
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in message)
