"""Callbacks of Lightning that a run cannot have, and what to use in their place."""

from collections.abc import Sequence

from pytorch_lightning import Callback
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    StochasticWeightAveraging,
    Timer,
)

from running.checkpoint import guess_mode

TUNES = (
    "{} changes what the YAML says, and a run that goes on would not know: try values in folders "
    "of their own (--run_dir, or a sweep), and write the best into the YAML"
)
REFUSED = {
    Timer: "the callback Timer ends a training in the middle of an epoch, for good: use "
    "trainer.max_time, after which the same command goes on",
    StochasticWeightAveraging: "StochasticWeightAveraging changes the weights after the last "
    "checkpoint, so what is tested and kept is not the average: use "
    "pytorch_lightning.callbacks.EMAWeightAveraging, whose average is in every checkpoint",
    LearningRateFinder: TUNES.format("LearningRateFinder"),
    BatchSizeFinder: TUNES.format("BatchSizeFinder"),
}


def check_callbacks(given: Sequence[Callback]) -> None:
    """Raises ValueError if a run cannot have one of these, with the remedy."""
    for each in given:
        for kind, reason in REFUSED.items():
            if isinstance(each, kind):
                raise ValueError(reason)
        if isinstance(each, EarlyStopping):
            check_direction(each)


def check_direction(callback: EarlyStopping) -> None:
    """Raises ValueError if a training would be stopped because it gets better."""
    mode = guess_mode(callback.monitor)
    if mode and mode != callback.mode:
        raise ValueError(
            f"EarlyStopping would stop when {callback.monitor} gets better (mode "
            f"{callback.mode}): set its mode to {mode}"
        )
