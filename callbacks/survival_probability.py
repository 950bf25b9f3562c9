"""What the coins of Stochastic Depth did: planned and realised depth, block by block."""

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.outlets import Table, log_metrics, log_panels


class SurvivalProbabilityLogger(Callback):
    """Logs p_l and the survival rate of each block, and how many blocks were active.

    Every epoch: `stochastic_depth/active_blocks` (mean over the epoch's steps) beside
    `stochastic_depth/expected_active_blocks`, and in `survival.csv` of the run folder survival
    probability and survival rate so far of every block. In W&B that is a plot, at the end of a fit.

    Reads of the module: `survival_probs`, and `gates`, those of the latest step, (L,) or (L, N).

    Raises:
        ValueError: the module has no `survival_probs`.
    """

    only_observes = True

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
        log_metrics(trainer, means)
        if trainer.is_global_zero:
            self.blocks(pl_module).write(Path(trainer.default_root_dir, "survival.csv"))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.num_steps:
            log_panels(trainer, lambda wandb: panels(wandb, self.blocks(pl_module)))

    def blocks(self, module: LightningModule) -> Table:
        """Returns survival probability and survival rate so far of every block."""
        rates = (self.open_gates / self.num_steps).tolist()
        numbers = range(1, len(rates) + 1)
        rows = zip(numbers, module.survival_probs, rates, strict=True)
        return Table(("block", "survival_prob", "survival_rate"), rows)

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


def panels(wandb: Any, table: Table) -> dict[str, Any]:
    """Returns a plot of survival probability and rate against the number of the block."""
    blocks, *lines = zip(*table.rows, strict=True)
    plot = wandb.plot.line_series(
        xs=blocks,
        ys=lines,
        keys=table.keys[1:],
        title="survival of each block",
        xname="block",
    )
    return {"stochastic_depth/survival": plot}
