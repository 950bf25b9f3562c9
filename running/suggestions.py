"""What a user may have meant: classes by their short names, and the nearest name that exists."""

import ast
import contextlib
import dataclasses
import difflib
import importlib
import inspect
import re
from argparse import Action
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

EXPERIMENTS = "experiments"
KINDS = {
    "model": ("lightning_modules",),
    "data": ("datamodules",),
    "net": ("networks",),
    "network": ("networks",),
    "callbacks": ("callbacks", "pytorch_lightning.callbacks"),
    "optimizer": ("torch.optim",),
    "lr_scheduler": ("lightning_modules", "torch.optim.lr_scheduler"),
}
"""Where the classes are that an argument may name; ours come first."""
UNNAMED = (
    *("ImageClassifier", "MultiExitClassifier", "MultiExitNetwork", "SlimmableNetwork"),
    *("ImageDataModule", "InMemoryDataModule", "ResidualNetwork", "AtWidth", "NarrowWithExits"),
)
"""Of these, bases and what others make, no YAML can name one."""
LIKE = 0.6
"""How alike two names have to be, of 1."""


# --- short names ----------------------------------------------------------------------------------


def long_name(kind: str, name: Any) -> Any:
    """Returns the import path of a class that was named without one; anything else as it is.

    Args:
        kind: name of the argument, a key of `KINDS`, or another, which knows no short names.
        name: what was given.
    """
    if isinstance(name, str) and re.fullmatch(r"[A-Z]\w*", name):
        for package in KINDS.get(kind, ()):
            if name in exported(package):
                return f"{package}.{name}"
    return name


def with_long_names(tree: Any, kind: str = "") -> Any:
    """Returns what a YAML text says, with the import paths of all classes."""
    if isinstance(tree, list):
        return [with_long_names(each, kind) for each in tree]
    if not isinstance(tree, dict):
        return long_name(kind, tree)
    return {
        key: long_name(kind, value) if key == "class_path" else with_long_names(value, str(key))
        for key, value in tree.items()
    }


def arguments_with_long_names(args: Sequence[str]) -> list[str]:
    """Returns a command line with the import paths of all classes."""
    long, kind = [], ""
    for arg in args:
        option, equals, value = arg.partition("=")
        if not arg.startswith("-"):
            long.append(long_name(kind, arg))
        else:
            kind = re.sub(r"(\.class_path|\.help)?\+?$", "", option).rsplit(".", 1)[-1].lstrip("-")
            long.append(f"{option}={long_name(kind, value)}" if equals else arg)
    return long


def exported(package: str) -> list[str]:
    """Returns the names of the classes of a package."""
    module = importlib.import_module(package)
    return [name for name, value in vars(module).items() if inspect.isclass(value)]


# --- the nearest name -----------------------------------------------------------------------------


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """Returns the names that are most like a word, at most two; none if nothing is alike.

    Of dotted names the last part counts as well: the end of a word is what people remember.
    """
    scores = {name: _likeness(word, name) for name in dict.fromkeys(known)}
    best = max(scores.values(), default=0.0)
    alike = [name for name, score in scores.items() if score >= max(LIKE, best - 0.05)]
    return sorted(alike, key=lambda name: (-scores[name], len(name)))[:2]


def _likeness(word: str, name: str) -> float:
    word, name = word.lower(), name.lower()
    if word == name:
        return 1.0
    whole = difflib.SequenceMatcher(None, word, name).ratio()
    last_word, last = word.rsplit(".", 1)[-1], name.rsplit(".", 1)[-1]
    if "." in name or "." in word:
        # Where the parents are not the same, they are at least to be alike.
        parents = difflib.SequenceMatcher(None, word[: -len(last_word)], name[: -len(last)]).ratio()
        ending = difflib.SequenceMatcher(None, last_word, last).ratio()
        whole = max(whole, ending * (0.9 + 0.1 * parents))
    begins = len(word) > 2 and (name.startswith(word) or last_word in last.split("_"))
    return max(whole, 0.9) if begins else whole


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Returns the end of a message: the nearest names, if there are any."""
    names = nearest(word, known)
    return f": did you mean {' or '.join(prefix + name for name in names)}?" if names else ""


def nearest_file(path: Path) -> str:
    """Returns the end of a message about a YAML file that is not there."""
    beside = path.parent.glob("*.y*ml") if path.parent.is_dir() else []
    files = [*beside, *Path(EXPERIMENTS).glob("**/*.yaml")]
    dotted = {".".join(file.with_suffix("").parts): str(file) for file in files if file.is_file()}
    names = nearest(".".join(path.with_suffix("").parts), dotted)
    return f": did you mean {' or '.join(dotted[name] for name in names)}?" if names else ""


# --- what jsonargparse says -----------------------------------------------------------------------


def hint(message: str, actions: Sequence[Action], given: Mapping[str, str]) -> str:
    """Returns the end of a line that tells of a mistake: what may have been meant.

    Args:
        message: of jsonargparse.
        actions: of its parser, which know the options and subcommands.
        given: dotted keys that the YAML files of the command have, and which file has them.
    """
    options = [*_options(actions), *given]
    if found := re.search(r"unrecognized arguments: --([^\s=]+)", message):
        return did_you_mean(found[1].rstrip("+"), options, "--")
    if found := re.search(r"'([\w.]+)': Group '(\w+)' does not accept option '(\w+)'", message):
        return did_you_mean(found[3], _fields(found[1], found[2]))
    if found := re.search(r"does not accept option '([\w.]+)'", message):
        place = f" (in {given[found[1]]})" if found[1] in given else ""
        return place + did_you_mean(found[1], [name for name in options if name != found[1]])
    if found := re.search(r"class_path .*Option '([\w.]+)' is not accepted", message):
        classes = re.findall(r"class_path '([\w.]+)'", message)
        names = [name for each in reversed(classes) for name in _arguments(each)]
        return did_you_mean(found[1], names)
    if found := re.search(r"does not correspond to a subclass of (\w+)", message):
        return _classes_of(found[1])
    if found := re.search(r"(?:no class |no attribute '|No module named ')([\w.]+)", message):
        keys = re.findall(r"(?:Parser key \"|--)([\w.]+?)(?:\.help)?[\":]", message)
        return _nearest_class(found[1], keys)
    if found := re.search(r"\[('[^\]]*')\]\. Got value: (\S+)", message):
        return did_you_mean(found[2], ast.literal_eval(f"[{found[1]}]"))
    if found := re.search(r"invalid choice: '(\S+)' \(choose from ([^)]*)\)", message):
        return did_you_mean(found[1], re.findall(r"[\w-]+", found[2]))
    if found := re.search(r"does not exist: '(.*?)'$", message):
        return nearest_file(_from_here(Path(found[1])))
    if re.match(r"the following arguments are required: \w+\.(data|model)\b", message):
        return f": name an experiment by -c ({EXPERIMENTS}/ holds some)"
    return ""


def keys_of(tree: Any, prefix: str = "") -> list[str]:
    """Returns the dotted keys of what a YAML file says."""
    if not isinstance(tree, dict):
        return []
    keys = [f"{prefix}{key}" for key in tree]
    return [*keys, *(each for k, v in tree.items() for each in keys_of(v, f"{prefix}{k}."))]


def _options(actions: Sequence[Action]) -> list[str]:
    """Returns the options of a parser and of its subcommands."""
    names = []
    for action in actions:
        if isinstance(action.choices, dict):
            for parser in action.choices.values():
                names += _options(parser._actions)
        elif action.option_strings:
            names += [name[2:] for name in action.option_strings if name.startswith("--")]
    return list(dict.fromkeys(names))


def _arguments(class_path: str) -> list[str]:
    """Returns the names of the arguments of a class, of its bases too: those of `**kwargs`."""
    module, _, name = class_path.rpartition(".")
    value = getattr(importlib.import_module(module), name)
    constructors = [vars(each).get("__init__") for each in getattr(value, "__mro__", ())]
    functions = [each for each in constructors if inspect.isfunction(each)] or [value]
    return [name for each in functions for name in inspect.signature(each).parameters]


def _fields(class_path: str, argument: str) -> list[str]:
    """Returns the names of the fields of an argument of a class that is a dataclass."""
    module, _, name = class_path.rpartition(".")
    constructor = getattr(importlib.import_module(module), name).__init__
    with contextlib.suppress(KeyError, NameError, TypeError):  # of a class of the user's
        return [each.name for each in dataclasses.fields(get_type_hints(constructor)[argument])]
    return []


def _nearest_class(name: str, keys: Sequence[str]) -> str:
    kinds = [part for key in reversed(keys) for part in reversed(key.split(".")) if part in KINDS]
    packages = KINDS[kinds[0]] if kinds else KINDS["model"] + KINDS["net"] + KINDS["callbacks"]
    paths = {known: f"{package}.{known}" for package in packages for known in exported(package)}
    names = nearest(name.rsplit(".", 1)[-1], paths)
    return f": did you mean {' or '.join(paths[each] for each in names)}?" if names else ""


def _classes_of(base: str) -> str:
    """Returns the end of a message: the classes to name for a base, if it is one of ours."""
    for package in dict.fromkeys(package for packages in KINDS.values() for package in packages):
        module = importlib.import_module(package)
        kind = getattr(module, base, None)
        if inspect.isclass(kind) and hasattr(module, "__all__"):
            values = {name: getattr(module, name) for name in module.__all__}
            ours = [name for name, value in values.items() if inspect.isclass(value)]
            fitting = [name for name in ours if issubclass(values[name], kind)]
            return f": give one of {', '.join(each for each in fitting if each not in UNNAMED)}"
    return ""


def _from_here(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
