"""What of a configuration decides the result of a run, compared whenever it is used again."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from pytorch_lightning import callbacks as lightning_callbacks

from running.checkpoint import best_mode
from trainer_keys import LIMITS, TRAINER

CHECKPOINT = ("select", "monitor", "mode")
# The images of a step, `batch_size` of every process, must stay as many: see `RunCheckpoint`.
LOGISTICS = ("data_dir", "batch_size", "eval_batch_size", "num_workers", "predict_dir")
# How a network runs, not what it computes.
MACHINE = ("lazy", "memory_efficient")
# Chooses what is evaluated, or matters in training alone.
NOT_EVALUATED = (
    *("eval_widths", "exit_thresholds", "exit_criterion", "budget_macs", "budget_ms"),
    *("max_accuracy_drop", "halve_validation"),
    *("optimizer", "lr_scheduler", "lr_interval", "tuning", "seed", "recipe"),
    *("teacher", "num_widths", "width_rule", "inplace_distill", "nonuniform"),
    *("row_counts", "update_dropped_blocks"),
    *("random_erasing", "augmentation", "crop_padding", "horizontal_flip", "drop_last"),
)
OBSERVERS = (
    lightning_callbacks.DeviceStatsMonitor,
    lightning_callbacks.LearningRateMonitor,
    lightning_callbacks.ModelCheckpoint,
    lightning_callbacks.ModelSummary,
    lightning_callbacks.RichModelSummary,
    lightning_callbacks.RichProgressBar,
    lightning_callbacks.TQDMProgressBar,
)
PRECISIONS = {None: "32-true", 64: "64-true", 32: "32-true", 16: "16-mixed", "bf16": "bf16-mixed"}

Config = Mapping[str, Any]


def trained(config: Config) -> dict[str, Any]:
    """Returns, by dotted key, what decides the weights and the result of a training."""
    trainer = {key: (config.get("trainer") or {}).get(key) for key in TRAINER}
    precision = trainer["precision"]
    if str(precision).isdigit():
        precision = int(precision)
    trainer["precision"] = PRECISIONS.get(precision, precision)
    trainer["gradient_clip_algorithm"] = trainer["gradient_clip_algorithm"] or "norm"
    for name, default in LIMITS.items():
        number = default if trainer[name] is None else trainer[name]
        trainer[name] = f"{number} batches" if isinstance(number, int) else number
    trainer["callbacks"] = _callbacks_that_train((config.get("trainer") or {}).get("callbacks"))
    checkpoint = {key: (config.get("checkpoint") or {}).get(key) for key in CHECKPOINT}
    if checkpoint["mode"] == "auto":
        checkpoint["mode"] = best_mode(checkpoint["monitor"])
    parts = {"model": config.get("model"), "data": _without(config.get("data"), LOGISTICS)}
    return _flatten({**parts, "trainer": trainer, "checkpoint": checkpoint})


def evaluated(config: Config) -> dict[str, Any]:
    """Returns, by dotted key, what decides what a checkpoint answers."""
    model = _without(config.get("model"), NOT_EVALUATED)
    data = _without(config.get("data"), (*LOGISTICS, *NOT_EVALUATED))
    return _flatten({"model": model, "data": data})


def renamed(config: Config) -> Config:
    """Returns the configuration of an earlier attempt with the arguments that have new names."""
    model = config.get("model")
    init_args = dict((model.get("init_args") if isinstance(model, Mapping) else None) or {})
    if "trunk_checkpoint" not in init_args:
        return config
    tuning = {"weights": init_args.pop("trunk_checkpoint")}
    return {**config, "model": {**model, "init_args": {**init_args, "tuning": tuning}}}


def first_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """Returns the first key whose values differ, with both of them; None if there is none."""
    for key in sorted(there.keys() | here.keys()):
        if there.get(key) != here.get(key):
            return f"{key} is {there.get(key)} there and {here.get(key)} here"
    return None


def _without(section: Config | None, arguments: Sequence[str]) -> dict[str, Any]:
    """Returns a section, a class and its arguments, without some of them."""
    section = dict(section or {})
    init_args = section.get("init_args") or {}
    section["init_args"] = {k: v for k, v in init_args.items() if k not in arguments}
    return section


def _callbacks_that_train(given: Sequence[Config] | Config | None) -> dict[str, Any]:
    """Returns the callbacks that may change what is trained, by class, with their arguments."""
    callbacks = [given] if isinstance(given, Mapping) else given or []
    trains = [each for each in callbacks if not _observes(each["class_path"])]
    names = [each["class_path"].rsplit(".", 1)[-1] for each in trains]
    return {
        f"{name}{names[:index].count(name) or ''}": {"class": each["class_path"]}
        | {key: str(value) for key, value in (each.get("init_args") or {}).items()}
        for index, (name, each) in enumerate(zip(names, trains, strict=True))
    }


def _observes(class_path: str) -> bool:
    """Tells whether a callback is known to leave a training as it is.

    One of the user's own says so by an attribute `only_observes`.
    """
    module, name = class_path.rsplit(".", 1)
    try:
        callback = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):  # gone since that attempt
        return False
    if not isinstance(callback, type):
        return False
    # Of this class itself: one that is derived from it may do more.
    return vars(callback).get("only_observes", False) or callback in OBSERVERS


def _flatten(tree: Config, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif key not in MACHINE:
            flat[prefix + key] = value
    return flat
