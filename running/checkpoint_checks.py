"""What is refused before a training begins: a checkpoint without a part, a best that never comes.

torch and Lightning load what fits by name, and go on with the rest as it is: with the rates of
another optimizer, or from the first epoch. Everything that a training goes on from is held against
what this one would save.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer

PARTS = {
    "": ("callbacks", "state_dict", "optimizer_states", "lr_schedulers", "loops", "train_metrics"),
    "loops.fit_loop": ("epoch_progress", "epoch_loop.batch_progress"),
    "callbacks.RunCheckpoint": ("best_score",),
    "run": (
        *("images_per_step", "num_history_rows", "callback_metrics", "should_stop"),
        "accumulate_grad_batches",
    ),
}
"""Keys of a checkpoint, by where they are."""
CHANGING = ("params", "lr", "momentum", "betas", "foreach", "fused", "capturable", "differentiable")
"""Of a group of an optimizer: what a schedule changes, and how a machine computes it."""
LIKE_WEIGHTS = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg")
"""What an optimizer keeps of a weight, in the shape of that weight; others keep other things."""


def check_parts(checkpoint: Mapping[str, Any], name: str) -> None:
    """Raises ValueError if a checkpoint lacks what a training goes on from.

    Args:
        checkpoint: what a file holds.
        name: of the file.
    """
    for place, keys in PARTS.items():
        part: Any = checkpoint
        for key in filter(None, place.split(".")):
            part = part.get(key) if isinstance(part, Mapping) else None
        missing = [key for key in keys if not isinstance(part, Mapping) or key not in part]
        if missing:
            where = f"{place}.{missing[0]}".lstrip(".")
            _refuse(name, f"it holds no {where}")
    for key in ("global_step", "epoch"):
        number = checkpoint.get(key)
        if not isinstance(number, int) or number < 0:
            _refuse(name, f"its {key} is {number}")


def check_structure(
    checkpoint: Mapping[str, Any], trainer: Trainer, module: LightningModule, name: str
) -> None:
    """Raises ValueError if a checkpoint is of another optimizer, schedule or type of weights.

    Args:
        checkpoint: what a file holds; see `check_parts`.
        trainer: has the optimizers and schedules of this training.
        module: has its weights.
        name: of the file.
    """
    here = module.state_dict()
    for key, value in checkpoint["state_dict"].items():
        types = [getattr(each, "dtype", None) for each in (value, here.get(key))]
        if types[0] != types[1]:
            _refuse(name, f"{key} is of {types[0]} there and {types[1]} here")
    kinds = [type(optimizer).__name__ for optimizer in trainer.optimizers]
    kinds_there = checkpoint.get("run", {}).get("optimizers", kinds)  # earlier ones do not say
    if kinds_there != kinds:
        _refuse(name, f"its optimizers are {kinds_there}, and those of this training {kinds}")
    saved = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    for what, there, now in zip(
        ("optimizers", "schedules"), saved, (trainer.optimizers, schedulers), strict=True
    ):
        if not isinstance(there, list) or len(there) != len(now):
            _refuse(name, f"it has not as many {what} as this training, {len(now)}")
    differences = [
        *(each for pair in zip(saved[0], trainer.optimizers, strict=True) for each in _of(*pair)),
        *(
            f"it is of another schedule than {type(scheduler).__name__}"
            for state, scheduler in zip(saved[1], schedulers, strict=True)
            if _public(state) != _public(scheduler.state_dict())
        ),
    ]
    if differences:
        _refuse(name, differences[0])


def _of(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Iterator[str]:
    """Yields how the saved state of an optimizer differs from that optimizer."""
    kind, groups = type(optimizer).__name__, state["param_groups"]
    sizes = [len(group["params"]) for group in groups]
    if sizes != [len(group["params"]) for group in optimizer.param_groups]:
        yield f"its groups of parameters are not those of {kind}"
        return
    for there, here in zip(groups, optimizer.param_groups, strict=True):
        for key in sorted((there.keys() & here.keys()) - set(CHANGING)):
            if there[key] != here[key]:
                yield f"{key} of {kind} is {there[key]} there and {here[key]} here"
        # Another version of torch has more keys than this one, or fewer.
        missing, unknown = (
            sorted(one.keys() - other.keys() - set(CHANGING))
            for one, other in ((here, there), (there, here))
        )
        if missing and unknown:
            yield f"it is of another optimizer than {kind}: it has no {missing[0]}"
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    numbers = [each for group in groups for each in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        buffers = state["state"].get(number, {})
        for key in LIKE_WEIGHTS:
            value = buffers.get(key)
            if isinstance(value, torch.Tensor) and value.shape != parameter.shape:
                yield f"{key} of {kind} is of shape {tuple(value.shape)}, its weight of another"


def _public(state: Mapping[str, Any]) -> set[str]:
    """Returns the keys of a schedule's state that every version of torch has."""
    return {key for key in state if not key.startswith("_")} - {"verbose"}


def _refuse(name: str, reason: str) -> None:
    raise ValueError(
        f"{name} is of another training, or was changed: {reason}: use the YAML and the file that "
        "belong together, or start anew by another --run_dir"
    )


def check_validated(trainer: Trainer) -> None:
    """Raises ValueError if a training ends before its first validation."""
    per_epoch, every = trainer.num_training_batches, trainer.check_val_every_n_epoch
    first = trainer.val_check_batch + ((every or 1) - 1) * per_epoch
    last = per_epoch * trainer.max_epochs if (trainer.max_epochs or -1) > 0 else math.inf
    if trainer.max_steps > 0:
        last = min(last, trainer.max_steps * trainer.accumulate_grad_batches)
    if first > last:
        raise ValueError(
            f"checkpoint.select is best, but the first validation comes after {first} batches and "
            f"the training ends after {last}: validate sooner (trainer.check_val_every_n_epoch, "
            "trainer.val_check_interval), train longer, or set checkpoint.select to last"
        )
