"""All axes in one network: exits (Teerapittayanon et al., arXiv 1709.01686), widths (Yu and Huang,
arXiv 1903.05134; Yu et al., arXiv 1812.08928) and depth (Huang et al., arXiv 1603.09382).

    loss = sum_k c_k CE(f_{1,k}(x), y) + sum_w sum_k c_k CE(f_{w,k}(x), softmax(f_{1,K}(x)))
    w over the narrowest and n - 2 random widths (or all switches),  k = 1..K over the exits,
    f_{w,k} with the same gates b_l ~ Bernoulli(p_l) at every width

The last exit of the widest width teaches every exit of the others. It is the best that a step has
computed; inplace distillation (Yu and Huang) takes it for the last exit, and from the last exit all
exits learn in Phuong and Lampert, Distillation-Based Training for Multi-Exit Architectures (ICCV
2019). The widest itself learns from the labels, at all exits.

Differences from these papers:
    * They have one axis each; none says what exits of a narrow width learn. `teacher` has the
      alternatives: exit k learns from exit k of the widest, or from the labels.
    * Gates are those of the step, not of a width: teacher and students have the same depth.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import mul
from typing import Literal

import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_modules.base import (
    PLAIN,
    Batch,
    Cost,
    OptimizerFactory,
    SchedulerFactory,
    Tuning,
    sgd,
)
from lightning_modules.exit_outputs import (
    ExitOutputs,
    ExitState,
    FoundThresholds,
    check_num_exits,
    check_weights,
    point_name,
    screened_points,
)
from lightning_modules.multi_exit import MultiExitClassifier
from lightning_modules.recipe import NONE, Recipe
from lightning_modules.sandwich import (
    MAX_WIDTHS,
    SandwichTraining,
    draw_widths,
    evaluated_widths,
    zero_of,
)
from lightning_modules.schedules import Interval
from lightning_modules.stochastic_depth import (
    Decay,
    draw_open,
    survival_probabilities,
    zero_missing_gradients,
)
from networks import (
    AtWidth,
    Criterion,
    ExitCosts,
    SlimmableWithExits,
    check_choice,
    check_counts,
    check_numbers,
    count_macs,
    count_params,
    count_params_run,
    extract,
    run_to_exit,
)

Teacher = Literal["last_exit", "same_exit", "labels"]


class LitSlimmableExits(SandwichTraining, MultiExitClassifier):
    """Trains a network of any width, with exits and, on request, stochastic depth.

    Operating points are pairs: "w0.5_exit1", "w0.5" (its last exit), and of the widest width
    "exit1", ..., "full". Every width has temperatures and thresholds of its own, those that
    `LitBranchyNet` finds: "w0.5_lossless", "w0.5_knee", "w0.5_best", and of the widest
    "adaptive_lossless" (`predict` uses it) and so on.

    Args:
        net: a slimmable network with exits; with `exits_after` empty it has the last one alone.
        eval_widths: widths that are evaluated beside the widest; None: all `width_mults`, or both
            ends of the `width_mult_range`.
        num_widths: of a `width_mult_range`, widths per step, the widest and the narrowest included;
            None: 4. All `width_mults` are in every step.
        teacher: of the widths below the widest: its "last_exit" or its "same_exit", as they are in
            the same step, or the "labels".
        exit_loss_weights: one per exit, shallow to deep; None: 1 each.
        final_survival_prob: p_L, the probability that the last residual block is open; 1: depth is
            constant.
        decay: how p_l falls from 1 to p_L, see `survival_probabilities`.
        exit_criterion: see `networks.early_exit`.
        exit_thresholds: one per exit but the last, shallow to deep, for all widths; adds
            "adaptive", "w0.5_adaptive" and so on.
        calibrate_exits, max_accuracy_drop, halve_validation: see `MultiExitClassifier`.
        optimizer, lr_scheduler, lr_interval, seed, tuning, recipe: see `ImageClassifier`. Weight
            decay is applied to ordinary convolutions and linear weights alone, unless `tuning` has
            `decay_norm_and_bias` true.

    Attributes:
        eval_widths: those that are evaluated, narrow to wide.
        widths: those of the latest step, in the order in which they ran.
        survival_probs: p_1..p_L.
        gates: those of the latest step, (num_blocks,).

    Raises:
        ValueError: fewer than two widths per step, or their number beside `width_mults`, a width
            that the network does not have, wrong weights or thresholds, what needs early exits
            where there is none, survival without residual blocks, or a fit that validates shared
            BNs without recalibration.
    """

    needs_exits = False

    def __init__(
        self,
        net: SlimmableWithExits,
        eval_widths: Sequence[float] | None = None,
        num_widths: int | None = None,
        teacher: Teacher = "last_exit",
        exit_loss_weights: Sequence[float] | None = None,
        final_survival_prob: float = 1.0,
        decay: Decay = "linear",
        exit_criterion: Criterion = "entropy",
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
            *(net, exit_criterion, exit_thresholds),
            *(calibrate_exits, max_accuracy_drop, halve_validation),
            *(optimizer, lr_scheduler, lr_interval, seed, tuning, recipe),
        )
        given = ["exit_thresholds"] if exit_thresholds is not None else []
        given += self.needs_validation()
        if given and net.num_exits == 1:
            raise ValueError(f"{given[0]} needs early exits: set the network's exits_after")
        check_num_exits(net.num_exits)
        check_choice("teacher", teacher, Teacher)
        if num_widths is not None and net.width_mults is not None:
            raise ValueError(
                f"num_widths is {num_widths}, but all width_mults are in every step: drop it, or "
                "give the network a width_mult_range"
            )
        self.num_widths, self.teacher = 4 if num_widths is None else num_widths, teacher
        check_counts(2, MAX_WIDTHS, num_widths=self.num_widths)
        self.exit_loss_weights = check_weights(exit_loss_weights, net.num_exits)
        check_numbers("(0, inf)", exit_loss_weights=self.exit_loss_weights)
        self._set_depth(final_survival_prob, decay)
        self._set_widths(self.steady_widths if eval_widths is None else eval_widths)
        self.widths: list[float] = []
        self.gates: Tensor | None = None

    def _set_widths(self, evaluated: Sequence[float]) -> None:
        self.eval_widths = evaluated_widths(self.net, evaluated)
        self.groups = {f"w{width:g}": width for width in self.eval_widths[:-1]}
        self.groups[""] = self.eval_widths[-1]
        self.exit_states = {group: ExitState() for group in self.groups}

    def _set_depth(self, final_survival_prob: float, decay: Decay) -> None:
        self.survival_probs = survival_probabilities(
            self.net.num_blocks, final_survival_prob, decay
        )
        self.closes_blocks = final_survival_prob < 1
        if self.closes_blocks and self.net.num_blocks == 0:
            raise ValueError(
                f"{type(self.net.trunk).__name__} has no residual blocks to close: leave "
                "final_survival_prob at 1"
            )

    # --- training ---------------------------------------------------------------------------------

    @property
    def steady_widths(self) -> Sequence[float]:
        return self.net.width_mults or self.net.width_mult_range

    def choose_widths(self) -> list[float]:
        """Returns the widths of a step, the widest first: the same on all ranks."""
        if self.net.width_mults is not None:
            return sorted(self.net.width_mults, reverse=True)
        low, high = self.net.width_mult_range
        shape = (self.num_widths - 2, 1)
        drawn = draw_widths((low, high), shape, self.seed, self.global_step)
        return [high, low, *(width for (width,) in drawn)]

    def teachers(self, widest: Sequence[Tensor]) -> list[Tensor] | None:
        """Returns what each exit of the other widths learns, if not the labels.

        Args:
            widest: logits of the exits of the widest width.
        """
        if self.teacher == "labels":
            return None
        teachers = widest if self.teacher == "same_exit" else [widest[-1]] * len(widest)
        return [logits.detach().softmax(1) for logits in teachers]

    def exit_loss(
        self, exits: Sequence[Tensor], targets: Tensor, teachers: Sequence[Tensor] | None
    ) -> Tensor:
        """Returns the weighted sum of the cross-entropies of all exits."""
        if teachers is None:
            losses = [self.label_loss(logits, targets) for logits in exits]
        else:
            losses = list(map(F.cross_entropy, exits, teachers))
        return sum(map(mul, self.exit_loss_weights, losses))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = self.mixed(batch, batch_idx)
        self.widths = self.choose_widths()
        probs = torch.tensor(self.survival_probs, dtype=torch.float64)
        self.gates = draw_open(probs, self.seed, self.global_step).float()
        gates = self.gates if self.closes_blocks else None
        total = torch.zeros((), device=self.device)
        teachers = None
        for number, width in enumerate(self.widths, start=1):
            exits = self.run_width(images, width, gates)
            loss = self.exit_loss(exits, targets, teachers)
            total += loss.detach()
            if number == 1:
                first, teachers = exits[-1].detach(), self.teachers(exits)
            if number < len(self.widths):
                self.backward_now(loss)
        self.log_training(total, first, targets, batch_idx)
        if self.trainer.world_size == 1:
            return loss
        # Neither closed blocks nor the BNs of other switches are in it.
        return loss + zero_of(p for p in self.net.parameters() if p.requires_grad)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.closes_blocks:  # whose weights decay all the same, as in Stochastic Depth
            zero_missing_gradients(self.net.parameters())

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.closes_blocks and self.capture != "none":
            rank_zero_warn(
                "blocks of a slimmable network that close are not recorded: it runs eagerly; set "
                "final_survival_prob to 1, or machine.capture to none"
            )

    # --- operating points -------------------------------------------------------------------------

    @property
    def eval_gates(self) -> list[float] | None:
        """The gates of an evaluation."""
        return self.survival_probs if self.closes_blocks else None

    def exit_networks(self) -> Mapping[str, AtWidth]:
        return {group: self.net.at(width, self.eval_gates) for group, width in self.groups.items()}

    def uncalibrated_points(self) -> list[str]:
        missing = [g for g, width in self.groups.items() if not self.net.is_calibrated(width)]
        early = [name for name, point in self.early_points().items() if point.group in missing]
        return [name for group in missing for name in self.names_of(group)] + early

    def calibration_runs(self, names: Iterable[str]) -> list[Callable[[Tensor], object]]:
        """Returns one pass per width: it reaches the BNs of all its exits."""
        wanted = {self.group_of(name) for name in names}
        return [
            partial(self.net, width_mult=width, gates=self.eval_gates)
            for group, width in self.groups.items()
            if group in wanted
        ]

    def costs(self, images: Tensor) -> dict[str, Cost]:
        """Returns the costs; the parameters are those of the network cut out, up to the exit."""
        costs: dict[str, Cost] = {}
        for group, width in self.groups.items():
            narrow = extract(self.net, width, gates=self.eval_gates)
            for index, name in enumerate(self.names_of(group)):
                path = partial(run_to_exit, narrow, index)
                params = count_params_run(narrow, path, images)
                costs[name] = Cost(count_macs(path, images), params)
            for name, thresholds in self.thresholds_of(group).items():
                _, macs = self.measure(thresholds, group)
                costs[point_name(group, name)] = Cost(macs, count_params(narrow))
        return costs

    def find_thresholds(self, outputs: ExitOutputs, costs: ExitCosts) -> FoundThresholds:
        return screened_points(outputs, costs, self.exit_criterion)
