"""What a run's configuration and folder say: which experiment it is of, and of what data."""

import re
import shlex
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from reports.files import part, text
from trainer_keys import LIMITS, TRAINER

LENGTH = ("max_epochs", "max_steps")
LOGISTICS = ("data_dir", "eval_batch_size", "num_workers", "predict_dir", "seed")
MACHINE = ("lazy", "memory_efficient", "seed")
OBSERVERS = ("Logger", "Monitor", "Statistics", "Sweep", "Summary", "ProgressBar", "Checkpoint")
FLAGS = ("-c", "--config")
LEAF = re.compile(r"seed(\d+)")


def settings(config: Any) -> dict[str, str]:
    """Returns, by dotted key, what makes an experiment: all but the seed, the machine, the logs."""
    callbacks = part(config, "trainer", "callbacks")
    trains = [
        each
        for each in (callbacks if isinstance(callbacks, list) else [])
        if not str(part(each, "class_path")).endswith(OBSERVERS)
    ]
    trainer = {key: part(config, "trainer", key) for key in (*TRAINER, *LENGTH)}
    for key, default in LIMITS.items():
        trainer[key] = default if trainer[key] is None else trainer[key]
    data = part(config, "data", "init_args")
    tree = {
        "model": part(config, "model"),
        "data": {
            "class_path": part(config, "data", "class_path"),
            "init_args": _without(data, LOGISTICS),
        },
        "trainer": trainer,
        "callbacks": {str(part(each, "class_path")): part(each, "init_args") for each in trains},
        "checkpoint": {key: part(config, "checkpoint", key) for key in ("select", "monitor")},
    }
    return _flatten(tree)


def data_set(config: Any) -> str:
    """Returns the name of a run's data set, for people; "unknown data" if nothing says it."""
    path = part(config, "data", "class_path")
    if not isinstance(path, str):
        return "unknown data"
    name = path.rsplit(".", 1)[-1].removesuffix("DataModule") or path
    folder = part(config, "data", "init_args", "data_dir")
    # Any folder of images has this class: only its place tells one set from another.
    return text(f"{name} {folder}" if name == "ImageFolder" and folder else name)


def experiment_of(folder: Path, config: Any, command: Any) -> str:
    """Returns ``<method>/<yaml stem>``: of the folder's path, else of the command, else its name.

    Args:
        folder: of the run; ``<method>/<stem>/seed<k>`` or ``<method>/<stem>/sweep-<id>/<run>``.
        config: the run's.
        command: that started it.
    """
    parts = folder.absolute().parts
    if len(parts) > 3 and LEAF.fullmatch(parts[-1]):
        return text("/".join(parts[-3:-1]))
    if len(parts) > 4 and parts[-2].startswith("sweep-"):
        return text("/".join(parts[-4:-2]))
    for file in _science_files(command):
        method = file.parent.name
        if method in ("", "experiments"):
            method = _snake_case(part(config, "model", "class_path"))
        return text("/".join(filter(None, (method, file.stem))))
    return text(folder.absolute().name)


def seed_of(folder: Path, config: Any) -> int | None:
    """Returns the seed that a run was trained with, if anything says it."""
    seed = part(config, "seed_everything")
    if isinstance(seed, int):
        return seed
    match = LEAF.fullmatch(folder.absolute().name)
    return int(match[1]) if match else None


def device_of(attempt: Any, config: Any) -> str:
    """Returns what a run was measured on; "" if nothing says it."""
    gpus = part(attempt, "gpus")
    is_cpu = part(config, "trainer", "accelerator") == "cpu"
    if isinstance(gpus, list) and gpus and not is_cpu:
        return text(gpus[0])
    return text(part(attempt, "cpu"))


def _science_files(command: Any) -> list[Path]:
    try:
        words = shlex.split(command) if isinstance(command, str) else []
    except ValueError:
        return []
    values = [after for word, after in pairwise(words) if word in FLAGS]
    values += [word.split("=", 1)[1] for word in words if word.startswith("--config=")]
    return [file for file in map(Path, values) if file.parent.name != "machines"]


def _snake_case(class_path: Any) -> str:
    name = str(class_path or "").rsplit(".", 1)[-1].removeprefix("Lit")
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _without(section: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    section = section if isinstance(section, Mapping) else {}
    return {key: value for key, value in section.items() if key not in keys}


def _flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif key not in MACHINE:
            flat[f"{prefix}{key}"] = str(value)
    return flat
