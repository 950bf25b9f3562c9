"""What the coins of Stochastic Depth did: planned and realised depth, block by block."""

import csv
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import WandbLogger
from torch import Tensor


class SurvivalProbabilityLogger(Callback):
    """Logs p_l and the survival rate of each block, and how many blocks were active.

    Every epoch: `stochastic_depth/active_blocks` (mean over the epoch's steps) beside
    `stochastic_depth/expected_active_blocks`. In W&B, and as `survival.csv` in the run folder:
    survival probability and survival rate so far of every block.

    Reads of the module: `survival_probs`, and `gates`, those of the latest step, (L,) or (L, N).

    Raises:
        ValueError: the module has no `survival_probs`.
    """

    def __init__(self) -> None:
        self.open_gates: Tensor | None = None
        self.num_steps = 0
        self.epoch_active = 0.0
        self.epoch_steps = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not hasattr(pl_module, "survival_probs"):
            raise ValueError(
                f"SurvivalProbabilityLogger has nothing to log of {type(pl_module).__name__}: "
                "remove it from trainer.callbacks"
            )
        if self.open_gates is None:
            self.open_gates = torch.zeros(len(pl_module.survival_probs), dtype=torch.float64)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        is_open = (pl_module.gates != 0).double()
        if is_open.dim() == 2:
            is_open = is_open.mean(1)
        self.open_gates += is_open
        self.num_steps += 1
        self.epoch_active += is_open.sum().item()
        self.epoch_steps += 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        means = {
            "stochastic_depth/active_blocks": self.epoch_active / max(1, self.epoch_steps),
            "stochastic_depth/expected_active_blocks": sum(pl_module.survival_probs),
        }
        self.epoch_active, self.epoch_steps = 0.0, 0
        for logger in trainer.loggers:
            logger.log_metrics({**means, "epoch": trainer.current_epoch}, trainer.global_step - 1)
        if trainer.is_global_zero:
            self.log_blocks(trainer, pl_module.survival_probs)

    def log_blocks(self, trainer: Trainer, survival_probs: list[float]) -> None:
        rates = (self.open_gates / self.num_steps).tolist()
        columns = ["block", "survival_prob", "survival_rate"]
        rows = [
            [block, prob, rate]
            for block, (prob, rate) in enumerate(zip(survival_probs, rates, strict=True), start=1)
        ]
        with Path(trainer.default_root_dir, "survival.csv").open("w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                from wandb import plot  # wandb is slow to import, and only those who log to it pay

                lines = plot.line_series(
                    xs=[row[0] for row in rows],
                    ys=[survival_probs, rates],
                    keys=columns[1:],
                    title="survival of each block",
                    xname="block",
                )
                logger.log_metrics({"stochastic_depth/survival": lines})

    def state_dict(self) -> dict[str, Any]:
        # Not vars(self): Lightning hangs methods of the module on every callback.
        return {
            "open_gates": self.open_gates,
            "num_steps": self.num_steps,
            "epoch_active": self.epoch_active,
            "epoch_steps": self.epoch_steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)
