"""What the methods with early exits share: evaluation of every exit, and leaving early."""

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_modules.base import (
    PLAIN,
    Batch,
    OptimizerFactory,
    SchedulerFactory,
    Tuning,
)
from lightning_modules.exit_outputs import (
    ExitState,
    FoundThresholds,
    halves,
)
from lightning_modules.exit_points import ExitPoints
from lightning_modules.metrics import FULL
from lightning_modules.recipe import NONE, Recipe
from lightning_modules.schedules import Interval
from networks import (
    Answers,
    Criterion,
    ExitStream,
    MultiExitNetwork,
    check_criterion,
    check_numbers,
    check_thresholds,
    early_exit,
    join_answers,
)

NEEDS_VALIDATION = (
    "needs what a validation finds: hold out validation images, and give a checkpoint of a fit "
    "that validates with it"
)


class MultiExitClassifier(ExitPoints):
    """Evaluates every exit, finds thresholds on validation data, and leaves early with them.

    Each validation ends with a search for thresholds, and the checkpoint that is saved then holds
    those that fit its weights; one that is saved later holds the latest, and their use warns. Tests
    and predictions use them; without any, every image goes to the last exit.

    With `calibrate_exits` each validation first fits a temperature to every exit, and the
    thresholds are those of calibrated scores. A test and all that follows answers with them; what a
    validation logs of exits and ensembles, and `val/loss`, are those without. With
    `max_accuracy_drop` there is one more operating point, "accuracy_budget", the cheapest of the
    curve that is accurate enough on the validation images. With `halve_validation` temperatures and
    thresholds are found on images 0, 2, 4, ... of the validation data, and what is logged of them
    (`val/acc_<point>`, `val/macs_<point>`) is of images 1, 3, 5, ...

    Subclasses write `training_step` and `find_thresholds`; one that trains the last exit alone says
    so in `exit_names`.

    Args:
        net: a network with exits, two or more.
        exit_criterion: see `networks.early_exit`.
        exit_thresholds: one per exit but the last, to be used instead of those that are found.
        calibrate_exits: divide the logits of each exit by a temperature.
        max_accuracy_drop: by how much leaving early may be less accurate than the last exit; 0.01
            is one image of 100. None: no such point.
        halve_validation: report on other validation images than thresholds were found on.
        optimizer, lr_scheduler, lr_interval, seed, tuning, recipe: see `ImageClassifier`.

    Attributes:
        exit_names: operating points of the trained exits, shallow to deep: "exit1", ..., "full".
        exit_states: what evaluations tell of the exits, by group of `exit_networks`.
        exit_thresholds: of the whole network, as all that follows; by operating point; empty until
            they are found.
        exit_curve: thresholds from cheap to expensive.
        exit_outputs: those of the latest evaluation, all ranks together; of a validation with
            `halve_validation` those of the images to report on.
        exit_costs: MACs of stages and exits; known from the first evaluation on.
        answering_net: see `answering`.

    Raises:
        ValueError: wrong thresholds, an unknown criterion, a drop that is no share, a network
            without early exits; or, when it fits, no validation images where these need them.
    """

    needs_exits = True

    def __init__(
        self,
        net: MultiExitNetwork,
        exit_criterion: Criterion,
        exit_thresholds: Sequence[float] | None,
        calibrate_exits: bool,
        max_accuracy_drop: float | None,
        halve_validation: bool,
        optimizer: OptimizerFactory,
        lr_scheduler: SchedulerFactory | None,
        lr_interval: Interval,
        seed: int,
        tuning: Tuning = PLAIN,
        recipe: Recipe = NONE,
    ):
        super().__init__(net, optimizer, lr_scheduler, lr_interval, seed, tuning, recipe)
        if net.num_exits < 2 and self.needs_exits:
            raise ValueError("the network has no early exit: give it one, or use LitResNet")
        check_criterion(exit_criterion)
        if exit_thresholds is not None and net.num_exits > 1:
            check_thresholds(exit_thresholds, net.num_exits, exit_criterion)
        if max_accuracy_drop is not None:
            check_numbers("[0, 1)", max_accuracy_drop=max_accuracy_drop)
        self.calibrate_exits = calibrate_exits
        self.max_accuracy_drop = max_accuracy_drop
        self.halve_validation = halve_validation
        self.exit_criterion = exit_criterion
        self.given_thresholds = exit_thresholds and list(exit_thresholds)
        self.exit_names = [*(f"exit{k}" for k in range(1, net.num_exits)), FULL]
        self.exit_states = {"": ExitState()}
        self._stream: ExitStream | None = None  # of the present prediction
        self._thresholds_step = 0  # optimizer steps before the thresholds were found
        self._stale_steps = 0  # and from then until the checkpoint that holds them

    def needs_validation(self) -> list[str]:
        """Returns the arguments that are given and that need validation images."""
        given = self.calibrate_exits, self.max_accuracy_drop is not None, self.halve_validation
        names = "calibrate_exits", "max_accuracy_drop", "halve_validation"
        return [name for name, is_given in zip(names, given, strict=True) if is_given]

    def on_fit_start(self) -> None:
        """Raises ValueError if there are too few validation images for what is asked of them."""
        super().on_fit_start()
        if self.needs_validation() and not self.validates:
            raise ValueError(f"{self.needs_validation()[0]} {NEEDS_VALIDATION}")
        data = self.trainer.datamodule
        if hasattr(data, "num_samples"):
            halves(data.num_samples("val"), self.halve_validation)

    def on_test_start(self) -> None:
        self._warn_about_thresholds()

    def on_predict_start(self) -> None:
        self._stream = None
        self._warn_about_thresholds()

    def _warn_about_thresholds(self) -> None:
        if not self.has_early_exits:
            return
        self.check_found()
        lacking = [
            f" for {group}" if group else ""
            for group, state in self.exit_states.items()
            if not self.thresholds_of(group) and not state.found.curve
        ]
        if lacking:
            rank_zero_warn(
                f"no thresholds of the {self.exit_criterion} were found{lacking[0]} before this "
                "checkpoint, by a validation of trained exits, so no image leaves early: give "
                "exit_thresholds"
            )
        elif self._stale_steps:
            rank_zero_warn(
                f"the exit thresholds were found {self._stale_steps} steps before this checkpoint "
                "and may not fit it: validate at the end of training, or give exit_thresholds"
            )

    def check_found(self) -> None:
        """Raises ValueError if the checkpoint lacks what is asked for and a validation finds."""
        found = [state.found for state in self.exit_states.values()]
        has_all = all(each.temperatures for each in found)
        if self.calibrate_exits and self.has_early_exits and not has_all:
            raise ValueError(f"calibrate_exits {NEEDS_VALIDATION}")
        if self.max_accuracy_drop is not None and not all(each.accuracies for each in found):
            raise ValueError(f"max_accuracy_drop {NEEDS_VALIDATION}")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor | tuple[Tensor, Tensor]:
        """Leaves early; returns class probabilities (N, num_classes) and exits (N,), from 1.

        The thresholds are those given, or those the method prefers. Without any, the last exit
        answers and the exits are not returned. With `capture`, the answers come in the order of the
        images, but later: with the last batch all that are left.
        """
        if not self.exit_thresholds:
            return super().predict_step(batch, batch_idx)
        thresholds = next(iter(self.exit_thresholds.values()))
        if self.capture == "none":
            answers = early_exit(self.answering_net, batch[0], thresholds, self.exit_criterion)
        else:
            answers = self._next_answers(batch[0], thresholds)
        return answers.logits.softmax(1), answers.exit_index + 1

    def _next_answers(self, images: Tensor, thresholds: Sequence[float]) -> Answers:
        """Gives images to the stream of this prediction and returns what it knows by now."""
        if self._stream is None:
            self._stream = ExitStream(
                self.answering_net, thresholds, self.exit_criterion, len(images), self.capture
            )
        parts = [self._stream.push(images)]
        if self.trainer.predict_loop.batch_progress.is_last_batch:
            parts.append(self._stream.finish())
            self._stream = None
        if parts := [part for part in parts if part is not None]:
            return join_answers(parts)
        logits = images.new_empty(0, self.net.num_classes)
        return Answers(logits, images.new_empty(0, dtype=torch.int64))

    # --- checkpoints ------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        groups = {group: state.found._asdict() for group, state in self.exit_states.items()}
        checkpoint["exit_thresholds"] = {
            "criterion": self.exit_criterion,
            "step": self._thresholds_step,
            **groups.pop(""),
            "groups": groups,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        stored = checkpoint.get("exit_thresholds", {})
        is_same = stored.get("criterion") == self.exit_criterion
        for group, state in self.exit_states.items():
            found = stored.get("groups", {}).get(group, {}) if group else stored
            temperatures = found.get("temperatures", [])
            is_as_asked = bool(temperatures) == self.calibrate_exits and self.has_early_exits
            fields = {name: found[name] for name in FoundThresholds._fields if name in found}
            if not is_as_asked:
                fields = {}
            elif not is_same:  # temperatures are those of any criterion
                fields = {"temperatures": temperatures}
            state.found = FoundThresholds(**fields)
        if is_same:
            self._thresholds_step = stored["step"]
            step = checkpoint["global_step"] - stored["step"]
            self._stale_steps = step if self.found.curve else 0
