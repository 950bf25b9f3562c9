"""A callback that notes what a run is doing; tests name it in their YAML, see `chaos.py`."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from callbacks import BNRecalibration
from running import RunCheckpoint


class PhaseProbe(Callback):
    """Appends a line to `phases.txt` in the working directory when a phase begins: when, and which.

    What was written outlives a killed process.
    """

    def __init__(self) -> None:
        self.phase = "start-up"

    def enter(self, phase: str) -> None:
        self.phase = phase
        with Path("phases.txt").open("a") as file:
            file.write(f"{time.monotonic():.6f} {phase}\n")

    def within(self, phase: str, function: Callable[..., None]) -> Callable[..., None]:
        def wrapped(*arguments: Any) -> None:
            before = self.phase
            self.enter(phase)
            function(*arguments)
            self.enter(before)

        return wrapped

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "test":
            self.enter("test")
            return
        # No hook tells when another callback begins and ends.
        for callback in trainer.callbacks:
            if isinstance(callback, RunCheckpoint):
                callback.save = self.within("checkpoint", callback.save)
            if isinstance(callback, BNRecalibration):
                callback.run = self.within("recalibration", callback.run)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.enter("training")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.enter("validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.enter("training")
