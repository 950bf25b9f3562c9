"""What every method's training starts from, what it changes, and its optimizer."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_modules.fitting import check_network
from lightning_modules.schedules import Interval, check_schedule, make
from lightning_modules.tuning import (
    PLAIN,
    Tuning,
    check_ratios,
    freeze,
    norms_and_biases,
    parameter_groups,
    scale_rates,
)
from lightning_modules.weight_files import read_weight_file
from networks import SlimmableBatchNorm2d, check_choice, load_weights

OptimizerFactory = Callable[[Iterable], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]


def sgd(params: Iterable) -> Optimizer:
    """SGD with learning rate 0.1, momentum 0.9, weight decay 1e-4: where most papers start."""
    return SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-4)


class TunedModule(pl.LightningModule):
    """Base of `ImageClassifier`, whose arguments these are.

    Attributes:
        read_weights: from `tuning.weights` to a state dict; files alone, unless another is set.
    """

    read_weights: Callable[[str], dict[str, Any]] = staticmethod(read_weight_file)

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerFactory = sgd,
        lr_scheduler: SchedulerFactory | None = None,
        lr_interval: Interval = "epoch",
        tuning: Tuning = PLAIN,
    ):
        super().__init__()
        check_network(net, type(self))
        check_choice("lr_interval", lr_interval, Interval)
        self.net = net
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        self.tuning = tuning
        self._starts_from = tuning.weights
        self._frozen = freeze(net, tuning.freeze) if tuning.freeze else set()

    # --- weights ----------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        if self._starts_from is None:
            return
        try:
            loaded = load_weights(self.net, self.read_weights(self._starts_from))
        except ValueError as error:
            if self._starts_from in str(error):
                raise
            raise ValueError(f"{self._starts_from}: {error}") from error
        rank_zero_info(f"weights of {self._starts_from}: {loaded.describe()}")
        self._starts_from = None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._starts_from = None  # a run that goes on has weights of its own

    # --- what is frozen ---------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuses what would move the statistics of a frozen BN, or lacks those it needs."""
        if stage != "fit" or not self._frozen:
            return
        norms = {
            name: module
            for name, module in self.net.named_modules()
            if name in self._frozen and isinstance(module, _BatchNorm | SlimmableBatchNorm2d)
        }
        remedy = "leave it out of tuning.freeze"
        for name, norm in norms.items():
            if isinstance(norm, SlimmableBatchNorm2d):
                raise ValueError(
                    f"{name} is frozen, and has no statistics of the widths that a step draws: "
                    f"{remedy}"
                )
            if any(getattr(each, "recalibrates", False) for each in self.trainer.callbacks):
                raise ValueError(
                    f"{name} is frozen, and BNRecalibration would replace its statistics: "
                    f"{remedy}, or remove the callback"
                )

    def on_train_start(self) -> None:
        self._rest()  # now, since Lightning has just warned of modules that do not train

    def train(self, mode: bool = True) -> "TunedModule":
        super().train(mode)
        self._rest()
        return self

    def _rest(self) -> None:
        """Has what is frozen in evaluation mode."""
        if self._frozen:
            # Looked up by name: Lightning may replace a BN by one that synchronises ranks.
            for name, module in self.net.named_modules():
                if name in self._frozen:
                    module.training = False

    # --- optimizer --------------------------------------------------------------------------------

    def spared_by_method(self) -> set[nn.Parameter]:
        """Returns the parameters that the method's paper trains without weight decay."""
        return set()

    def optimized_parameters(self) -> list[dict[str, Any]]:
        """Returns groups of parameters, as torch's optimizers take them; see `Tuning`."""
        decays = self.tuning.decay_norm_and_bias
        spared = set() if decays else self.spared_by_method()
        if decays is False:
            spared = spared | norms_and_biases(self.net)
        return parameter_groups(self.net, self.tuning.lr_factors or {}, spared)

    def configure_optimizers(self) -> Any:
        optimizer = make("optimizer", self.optimizer, self.optimized_parameters())
        if optimizer.defaults.get("capturable") and self.device.type == "cpu":
            raise ValueError("capturable of the optimizer needs a GPU: leave it out")
        factors = scale_rates(optimizer)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = make("lr_scheduler", self.lr_scheduler, optimizer)
        check_schedule(scheduler, self.training_length, self.lr_interval)
        check_ratios(scheduler, factors)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": self.lr_interval},
        }

    @property
    def training_length(self) -> float | None:
        """How often the scheduler is stepped; infinite without an end, None if not known."""
        trainer = self.trainer
        if self.lr_interval == "epoch" and trainer.max_steps == -1:
            return math.inf if trainer.max_epochs == -1 else trainer.max_epochs
        if any(isinstance(each, GradientAccumulationScheduler) for each in trainer.callbacks):
            return None
        steps = trainer.estimated_stepping_batches
        if steps == -1:  # of data whose length is not known
            return None
        if self.lr_interval == "step" or math.isinf(steps):
            return steps
        trainer.fit_loop.setup_data()  # which knows the number of batches
        steps_per_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
        if not 0 < steps_per_epoch < math.inf:
            return None
        return math.ceil(steps / math.ceil(steps_per_epoch))
