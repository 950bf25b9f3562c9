"""Multi-Scale Dense Networks: Huang, Chen, Li, Wu, van der Maaten, Weinberger (ICLR 2018,
arXiv 1703.09844).

    loss = sum_k CE(logits_k, label);    leave at the first k where max softmax(logits_k) >= T_k
    T: a share q^k / sum_j q^j of the validation images leaves at exit k

Differences from the released code:
    * Thresholds are found on validation images without augmentation; the loader of the PyTorch code
      augments them.
    * An image that has left is not computed any further; there, every exit is run for every image.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_modules.base import PLAIN, Batch, OptimizerFactory, SchedulerFactory, Tuning, sgd
from lightning_modules.exit_outputs import ExitOutputs, FoundThresholds
from lightning_modules.multi_exit import MultiExitClassifier
from lightning_modules.recipe import NONE, Recipe
from lightning_modules.schedules import Interval
from networks import (
    TIMED_BATCH_SIZE,
    ExitCosts,
    MultiExitNetwork,
    Staged,
    check_budget,
    check_numbers,
    count_exit_macs,
    geometric_fractions,
    run_all_exits,
    thresholds_for_budget,
    thresholds_for_fractions,
    time_exits,
    try_thresholds,
)

RATIOS = (*(number / 20 for number in range(1, 40)), 2.5, 4.0, 8.0, 1e6)
"""Of the shares of two exits in a row: the paper's, and four that leave ever more images to the
last exit, so that all of a budget can be spent."""
NO_THRESHOLDS = (
    "a budget needs thresholds, which a validation finds: hold out validation images, and give a "
    "checkpoint of a fit that validates"
)


class LitMSDNet(MultiExitClassifier):
    """Trains a network with exits by the sum of their losses; spends a budget on many images.

    Anytime prediction: every exit is an operating point, and so is the mean of the probabilities of
    the exits up to it ("ensemble2", ...). Budgeted batch classification: the points "budget_exit2"
    and so on leave early, by confidence, and cost on average what the exit costs that they are
    named after; a curve has 43 sets of thresholds.

    Args:
        net: a network with exits.
        budget_macs: mean multiply-accumulates per image that a test or a prediction may spend; adds
            the operating point "adaptive", which `predict` then uses.
        budget_ms: the same in milliseconds per image, in a batch of 64.
        exit_thresholds: one per exit but the last, shallow to deep, for "adaptive".
        calibrate_exits, max_accuracy_drop, halve_validation: see `MultiExitClassifier`; the
            accuracy budget is kept to by one of the 43, and `predict` uses it unless there is
            "adaptive". Temperatures far below 1 make many confidences exactly 1, in single
            precision: these images leave together, and budgets are not all spent.
        optimizer, lr_scheduler, lr_interval, seed, tuning, recipe: see `ImageClassifier`.

    Raises:
        ValueError: more than one of both budgets and thresholds, or a budget outside what the exits
            cost (as soon as that is known).
    """

    def __init__(
        self,
        net: MultiExitNetwork,
        budget_macs: float | None = None,
        budget_ms: float | None = None,
        exit_thresholds: Sequence[float] | None = None,
        calibrate_exits: bool = False,
        max_accuracy_drop: float | None = None,
        halve_validation: bool = False,
        optimizer: OptimizerFactory = sgd,
        lr_scheduler: SchedulerFactory | None = None,
        lr_interval: Interval = "epoch",
        seed: int = 0,
        tuning: Tuning = PLAIN,
        recipe: Recipe = NONE,
    ):
        super().__init__(
            *(net, "confidence", exit_thresholds),
            *(calibrate_exits, max_accuracy_drop, halve_validation),
            *(optimizer, lr_scheduler, lr_interval, seed, tuning, recipe),
        )
        if sum(value is not None for value in (budget_macs, budget_ms, exit_thresholds)) > 1:
            raise ValueError("give one of budget_macs, budget_ms and exit_thresholds")
        for name, budget in (("budget_macs", budget_macs), ("budget_ms", budget_ms)):
            if budget is not None:
                check_numbers("(0, inf)", **{name: budget})
        self.budget_macs = budget_macs
        self.budget_ms = budget_ms

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = self.mixed(batch, batch_idx)
        exits = self.trained_net(images)
        loss = sum(self.label_loss(logits, targets) for logits in exits)
        self.log_training(loss, exits[-1], targets, batch_idx)
        return loss

    # --- anytime prediction -----------------------------------------------------------------------

    def evaluated_points(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """Returns the exits, and the ensembles of the exits up to each.

        As in the paper, either runs the exits before it, too: they have answered by then.
        """
        counts = range(1, self.net.num_exits + 1)
        exits = {
            name: partial(self.answer, count, False)
            for name, count in zip(self.exit_names, counts, strict=True)
        }
        ensembles = {f"ensemble{count}": partial(self.answer, count, True) for count in counts[1:]}
        return {**exits, **ensembles}

    def answer(self, count: int, ensemble: bool, images: Tensor) -> Tensor:
        """Returns the logits of an exit, or the logarithm of the mean probabilities up to it."""
        network = self.answering_net
        logits = run_all_exits(Staged(network.stages[:count], network.exits[:count]), images)
        return mean_log_probs(logits)[-1] if ensemble else logits[-1]

    def evaluate(self, images: Tensor) -> dict[str, Tensor]:
        """Returns the logits of exits and ensembles, from one pass."""
        exits = super().evaluate(images)
        means = mean_log_probs(exits.values())
        return {**exits, **{f"ensemble{k}": mean for k, mean in enumerate(means[1:], start=2)}}

    # --- budgeted batch classification ------------------------------------------------------------

    def find_thresholds(self, outputs: ExitOutputs, costs: ExitCosts) -> FoundThresholds:
        scores, leaving = outputs.scores, costs.leaving
        points = {
            f"budget_exit{index + 1}": thresholds_for_budget(scores, leaving, leaving[index])
            for index in reversed(range(1, self.net.num_exits - 1))
        }
        curve = [
            thresholds_for_fractions(scores, geometric_fractions(ratio, self.net.num_exits))
            for ratio in RATIOS
        ]
        return FoundThresholds.of(points, try_thresholds(scores, outputs.correct, leaving, curve))

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.budget_macs is None and self.budget_ms is None:
            return
        if not self.validates:
            raise ValueError(NO_THRESHOLDS)
        data = self.trainer.datamodule
        if data is not None:
            images = torch.zeros(TIMED_BATCH_SIZE, *data.image_shape, device=self.device)
            check_budget(*self.budget_and_costs(copy.deepcopy(self.net).eval(), images))

    def on_test_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx == 0:
            self.keep_to_budget(batch[0])

    def on_predict_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx == 0:
            self.keep_to_budget(batch[0])

    def budget_and_costs(
        self, network: MultiExitNetwork, images: Tensor
    ) -> tuple[float, list[float]]:
        """Returns the budget, and what the exits cost in its unit."""
        if self.budget_macs is not None:
            return self.budget_macs, count_exit_macs(network, images[:1]).leaving
        trainer = self._trainer
        if trainer is None:  # of a network that was loaded to answer
            return self.budget_ms, time_exits(network, images[:TIMED_BATCH_SIZE]).leaving
        with trainer.precision_plugin.forward_context():
            times = time_exits(network, images[:TIMED_BATCH_SIZE]).leaving
        # Ranks must not differ about thresholds.
        return self.budget_ms, trainer.strategy.broadcast(times)

    def keep_to_budget(self, images: Tensor) -> None:
        """Gives "adaptive" the thresholds of the curve that spend most of the budget."""
        if self.budget_macs is None and self.budget_ms is None:
            return
        budget, costs = self.budget_and_costs(self.net, images)
        check_budget(budget, costs)
        if not self.found.curve:
            raise ValueError(NO_THRESHOLDS)
        means = (
            torch.tensor(self.found.shares) @ torch.tensor(costs, dtype=torch.float32)
        ).tolist()
        affordable = [index for index, mean in enumerate(means) if mean <= budget]
        # Below the cheapest of the curve all images leave at the first exit.
        thresholds = [0.0] * (self.net.num_exits - 1)
        if affordable:
            thresholds = self.found.curve[max(affordable, key=means.__getitem__)]
        self.given_thresholds = thresholds


def mean_log_probs(logits: Sequence[Tensor]) -> Tensor:
    """Returns log(mean of the softmax of the first k logits), (K, N, C), for K logits (N, C)."""
    sums = torch.stack(list(logits)).log_softmax(2).logcumsumexp(0)
    counts = torch.arange(1, len(logits) + 1, device=sums.device)
    return sums - counts.log()[:, None, None]
