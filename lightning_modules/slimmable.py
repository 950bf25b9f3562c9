"""Slimmable and Universally Slimmable networks: Yu et al. (ICLR 2019, arXiv 1812.08928), Yu and
Huang (ICCV 2019, arXiv 1903.05134).

    Slimmable:              loss = sum_w CE(f_w(x), y),  w over all widths
    Universally Slimmable:  loss = CE(f_1(x), y) + sum_w CE(f_w(x), softmax(f_1(x))),
                            w over the narrowest and n - 2 random widths (the sandwich rule)

Differences from the released code:
    * Inplace distillation is on; the released configuration sets an option that nothing reads.
    * The random widths are drawn by a generator keyed by (seed, step), the same on all ranks.
    * Each width is run and differentiated before the next, as there, so that one width at a time is
      in memory; the gradients of all of them are synchronised once, with the last.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.base import (
    PLAIN,
    Batch,
    Cost,
    OptimizerFactory,
    SchedulerFactory,
    Tuning,
    sgd,
)
from lightning_modules.fitting import check_network
from lightning_modules.metrics import FULL
from lightning_modules.recipe import NONE, Recipe
from lightning_modules.sandwich import (
    MAX_WIDTHS,
    SandwichTraining,
    draw_widths,
    evaluated_widths,
    zero_of,
)
from lightning_modules.schedules import Interval
from networks import (
    SlimmableNetwork,
    SwitchableBatchNorm2d,
    WidthMult,
    check_choice,
    check_counts,
    count_macs,
    count_params,
    extract,
)

WidthRule = Literal["sandwich", "random"]


class SlimmableClassifier(SandwichTraining):
    """What both methods share: optimizer groups, widths as operating points, one synchronisation.

    Args:
        net: a slimmable network.
        eval_widths: widths that are evaluated, as the operating points "w0.25" and the like, beside
            the whole network, which is "full".
        optimizer, lr_scheduler, lr_interval, seed, tuning, recipe: see `ImageClassifier`. Weight
            decay is applied to ordinary convolutions and linear weights alone, unless `tuning` has
            `decay_norm_and_bias` true.
    """

    def __init__(
        self,
        net: SlimmableNetwork,
        eval_widths: Sequence[float],
        optimizer: OptimizerFactory,
        lr_scheduler: SchedulerFactory | None,
        lr_interval: Interval,
        seed: int,
        tuning: Tuning,
        recipe: Recipe,
    ):
        super().__init__(net, optimizer, lr_scheduler, lr_interval, seed, tuning, recipe)
        if len(eval_widths) == 0:
            raise ValueError("eval_widths is empty: give one width or more")
        self.eval_widths = evaluated_widths(net, eval_widths)

    # --- operating points -------------------------------------------------------------------------

    def operating_points(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        *narrow, widest = self.eval_widths
        points = {f"w{width:g}": partial(self.net, width_mult=width) for width in narrow}
        return {**points, FULL: partial(self.net, width_mult=widest)}

    def uncalibrated_points(self) -> list[str]:
        return [
            name
            for name, width in zip(self.operating_points(), self.eval_widths, strict=True)
            if not self.net.is_calibrated(width)
        ]

    def costs(self, images: Tensor) -> dict[str, Cost]:
        """Returns the costs; the parameters are those of the network cut out."""
        return {
            name: Cost(count_macs(run, images), count_params(extract(self.net, width)))
            for (name, run), width in zip(
                self.operating_points().items(), self.eval_widths, strict=True
            )
        }


class LitSlimmable(SlimmableClassifier):
    """Trains all switches of a slimmable network in every step, widest first; losses are summed.

    Args:
        net: a network with `width_mults`.
        eval_widths: widths that are evaluated; None: all of them.
        optimizer, lr_scheduler, lr_interval, seed, tuning, recipe: see `ImageClassifier`. Weight
            decay is applied to ordinary convolutions and linear weights alone, unless `tuning` has
            `decay_norm_and_bias` true.

    Raises:
        ValueError: a network without `width_mults`, or a width that is none of them.
    """

    def __init__(
        self,
        net: SlimmableNetwork,
        eval_widths: Sequence[float] | None = None,
        optimizer: OptimizerFactory = sgd,
        lr_scheduler: SchedulerFactory | None = None,
        lr_interval: Interval = "epoch",
        seed: int = 0,
        tuning: Tuning = PLAIN,
        recipe: Recipe = NONE,
    ):
        check_network(net, type(self))
        if net.width_mults is None:
            raise ValueError(
                "LitSlimmable needs the network's width_mults: set them, or use "
                "LitUniversallySlimmable"
            )
        widths = net.width_mults if eval_widths is None else eval_widths
        super().__init__(net, widths, optimizer, lr_scheduler, lr_interval, seed, tuning, recipe)
        self.widths = sorted(net.width_mults, reverse=True)

    @property
    def steady_widths(self) -> Sequence[float]:
        return self.widths

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = self.mixed(batch, batch_idx)
        total = torch.zeros((), device=self.device)
        for width in self.widths:
            logits = self.run_width(images, width)
            loss = self.label_loss(logits, targets)
            total += loss.detach()
            if width == self.widths[0]:
                widest = logits
            if width != self.widths[-1]:
                self.backward_now(loss)
        self.log_training(total, widest, targets, batch_idx)
        if self.trainer.world_size == 1:
            return loss
        switches = [norm for norm in self.net.modules() if isinstance(norm, SwitchableBatchNorm2d)]
        return loss + zero_of(p for norm in switches for p in norm.parameters())


class LitUniversallySlimmable(SlimmableClassifier):
    """Trains a network of any width: the widest, the narrowest and random widths in every step.

    Args:
        net: a network with a `width_mult_range`.
        eval_widths: widths that are evaluated.
        num_widths: widths per step, the widest and the narrowest included.
        width_rule: "sandwich", or "random": all of them are drawn, and learn from the labels.
        inplace_distill: the other widths learn from the widest one's predictions, as they are in
            the same step, instead of from the labels.
        nonuniform: the random widths are ratios of their own for every group of channels.
        optimizer, lr_scheduler, lr_interval, seed, tuning, recipe: see `ImageClassifier`. Weight
            decay is applied to ordinary convolutions and linear weights alone, unless `tuning` has
            `decay_norm_and_bias` true.

    Attributes:
        widths: those of the latest step, in the order in which they ran.

    Raises:
        ValueError: a network without `width_mult_range`, fewer than two widths per step,
            distillation without the widest, or a fit that validates without a callback that
            recalibrates (which says so by an attribute `recalibrates`).
    """

    def __init__(
        self,
        net: SlimmableNetwork,
        eval_widths: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
        num_widths: int = 4,
        width_rule: WidthRule = "sandwich",
        inplace_distill: bool = True,
        nonuniform: bool = False,
        optimizer: OptimizerFactory = sgd,
        lr_scheduler: SchedulerFactory | None = None,
        lr_interval: Interval = "step",
        seed: int = 0,
        tuning: Tuning = PLAIN,
        recipe: Recipe = NONE,
    ):
        check_network(net, type(self))
        if net.width_mult_range is None:
            raise ValueError(
                "LitUniversallySlimmable needs the network's width_mult_range: set it, or use "
                "LitSlimmable"
            )
        check_choice("width_rule", width_rule, WidthRule)
        check_counts(2, MAX_WIDTHS, num_widths=num_widths)
        if inplace_distill and width_rule == "random":
            raise ValueError(
                "inplace_distill needs the widest width in every step: set width_rule to sandwich, "
                "or inplace_distill to false"
            )
        super().__init__(
            net, eval_widths, optimizer, lr_scheduler, lr_interval, seed, tuning, recipe
        )
        self.num_widths = num_widths
        self.width_rule = width_rule
        self.inplace_distill = inplace_distill
        self.nonuniform = nonuniform
        self.widths: list[WidthMult] = []

    @property
    def steady_widths(self) -> Sequence[float]:
        return self.net.width_mult_range if self.width_rule == "sandwich" else ()

    def draw_widths(self) -> list[WidthMult]:
        """Draws the widths of a step: the same on all ranks, and for all batches of the step."""
        low, high = self.net.width_mult_range
        num_random = self.num_widths - (2 if self.width_rule == "sandwich" else 0)
        num_ratios = self.net.num_groups if self.nonuniform else 1
        shape = (num_random, num_ratios)
        ratios = draw_widths((low, high), shape, self.seed, self.global_step)
        widths = ratios if self.nonuniform else [ratio for (ratio,) in ratios]
        return [high, low, *widths] if self.width_rule == "sandwich" else widths

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = self.mixed(batch, batch_idx)
        self.widths = self.draw_widths()
        total = torch.zeros((), device=self.device)
        teacher = None
        for number, width in enumerate(self.widths, start=1):
            logits = self.run_width(images, width)
            if teacher is None:
                loss = self.label_loss(logits, targets)
            else:
                loss = F.cross_entropy(logits, teacher)
            total += loss.detach()
            if number == 1:
                first = logits.detach()
                if self.inplace_distill:
                    teacher = first.softmax(1)
            if number < len(self.widths):
                self.backward_now(loss)
        self.log_training(total, first, targets, batch_idx)
        return loss
