"""BranchyNet: Teerapittayanon, McDanel, Kung (ICPR 2016, arXiv 1709.01686).

    loss = sum_k w_k CE(logits_k, label);    leave at the first k where entropy(logits_k) < T_k

Differences from the released code:
    * One trunk, one optimizer (see `networks.branchynet`).
    * The joint training starts from the whole trained trunk, its last classifier included.
    * Thresholds are screened on validation data; the released code screens on the test set.
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Adam, Optimizer

from lightning_modules.base import PLAIN, Batch, OptimizerFactory, SchedulerFactory, Tuning
from lightning_modules.exit_outputs import (
    ExitOutputs,
    FoundThresholds,
    check_num_exits,
    check_weights,
    screened_points,
)
from lightning_modules.metrics import FULL
from lightning_modules.multi_exit import MultiExitClassifier
from lightning_modules.recipe import NONE, Recipe
from lightning_modules.schedules import Interval
from networks import (
    Criterion,
    ExitCosts,
    MultiExitNetwork,
    run_to_exit,
)


def adam(params: Iterable) -> Optimizer:
    """Adam with the paper's numbers."""
    return Adam(params, lr=0.001, betas=(0.99, 0.999))


class LitBranchyNet(MultiExitClassifier):
    """Trains a network with exits by the weighted sum of their losses.

    After every validation the paper's grid of thresholds is screened. Three points of its front
    become operating points: "adaptive_lossless" (the cheapest that is at least as accurate as the
    last exit; `predict` uses it), "adaptive_knee" and "adaptive_best" (the most accurate).

    Args:
        net: a network with exits.
        exit_loss_weights: one per exit, shallow to deep; None: 1 each. Zeros for all but the last
            train the trunk alone ("stage 1"): the other exits are not run and not reported.
        exit_criterion: "entropy" is the paper's.
        exit_thresholds: one per exit but the last, shallow to deep; adds the operating point
            "adaptive", which `predict` then uses.
        calibrate_exits, max_accuracy_drop, halve_validation: see `MultiExitClassifier`; `predict`
            uses "accuracy_budget", too, before "adaptive_lossless".
        optimizer, lr_scheduler, lr_interval, seed, tuning, recipe: see `ImageClassifier`. The
            paper's "stage 2" starts from `tuning.weights` of a trained trunk.

    Raises:
        ValueError: wrong weights or thresholds, more than 14 exits, or a run that goes on from a
            checkpoint of other weights of the losses.
    """

    def __init__(
        self,
        net: MultiExitNetwork,
        exit_loss_weights: Sequence[float] | None = None,
        exit_criterion: Criterion = "entropy",
        exit_thresholds: Sequence[float] | None = None,
        calibrate_exits: bool = False,
        max_accuracy_drop: float | None = None,
        halve_validation: bool = False,
        optimizer: OptimizerFactory = adam,
        lr_scheduler: SchedulerFactory | None = None,
        lr_interval: Interval = "epoch",
        seed: int = 0,
        tuning: Tuning = PLAIN,
        recipe: Recipe = NONE,
    ):
        super().__init__(
            *(net, exit_criterion, exit_thresholds),
            *(calibrate_exits, max_accuracy_drop, halve_validation),
            *(optimizer, lr_scheduler, lr_interval, seed, tuning, recipe),
        )
        check_num_exits(net.num_exits)
        weights = check_weights(exit_loss_weights, net.num_exits)
        all_train = all(0 < weight < math.inf for weight in weights)
        self.trains_trunk_only = not any(weights[:-1]) and 0 < weights[-1] < math.inf
        if not (all_train or self.trains_trunk_only):
            raise ValueError(
                f"exit_loss_weights {weights}: give positive numbers, or zeros for all but the "
                "last exit to train the trunk alone"
            )
        self.exit_loss_weights = weights
        if self.trains_trunk_only:
            self._train_trunk_only()

    def _train_trunk_only(self) -> None:
        given = ["exit_thresholds"] if self.given_thresholds is not None else []
        for name in given + self.needs_validation():
            raise ValueError(
                f"{name} need exits that are trained: drop them, or give every exit a weight in "
                "exit_loss_weights"
            )
        self.exit_names = [FULL]
        for name, parameter in self.net.named_parameters():
            if self.net.in_early_exit(name):
                parameter.requires_grad_(False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = self.mixed(batch, batch_idx)
        if self.trains_trunk_only:
            trunk = partial(run_to_exit, self.net, self.net.num_exits - 1)
            exits = [self.recorded("trunk", trunk)(images)]
        else:
            exits = self.trained_net(images)
        weights = self.exit_loss_weights[-len(exits) :]
        loss = sum(
            weight * self.label_loss(logits, targets)
            for weight, logits in zip(weights, exits, strict=True)
        )
        self.log_training(loss, exits[-1], targets, batch_idx)
        return loss

    def find_thresholds(self, outputs: ExitOutputs, costs: ExitCosts) -> FoundThresholds:
        return screened_points(outputs, costs, self.exit_criterion)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["exit_loss_weights"] = self.exit_loss_weights

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        weights = checkpoint.get("exit_loss_weights")
        if self.is_fitting and weights != self.exit_loss_weights:
            raise ValueError(
                f"the checkpoint is of a training with exit_loss_weights {weights}, not "
                f"{self.exit_loss_weights}: to start from its trunk, give it as tuning.weights"
            )
