"""What the methods with early exits share: evaluation of every exit, and leaving early."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_modules.answers import PointAnswers, choose_exits
from lightning_modules.base import (
    PLAIN,
    Batch,
    Cost,
    ImageClassifier,
    OptimizerFactory,
    SchedulerFactory,
    Tuning,
)
from lightning_modules.exit_outputs import (
    ExitLogits,
    ExitOutputs,
    FoundThresholds,
    calibrations,
    gather_outputs,
    halves,
    held_out,
    take,
)
from lightning_modules.metrics import FULL, accuracy_name
from lightning_modules.schedules import Interval
from networks import (
    Answers,
    Criterion,
    ExitCosts,
    ExitStream,
    MultiExitNetwork,
    TemperatureScaled,
    cheapest_within,
    check_criterion,
    check_numbers,
    check_thresholds,
    count_exit_macs,
    count_macs,
    count_params,
    count_params_run,
    early_exit,
    exits_taken,
    fit_temperature,
    join_answers,
    run_to_exit,
    scale_logits,
)

GIVEN = "adaptive"
"""Name of the operating point of thresholds that the user gave."""
WITHIN = "accuracy_budget"
"""Name of that of `max_accuracy_drop`."""
NEEDS_VALIDATION = (
    "needs what a validation finds: hold out validation images, and give a checkpoint of a fit "
    "that validates with it"
)


class MultiExitClassifier(ImageClassifier):
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
        optimizer, lr_scheduler, lr_interval, seed, tuning: see `ImageClassifier`.

    Attributes:
        exit_names: operating points of the trained exits, shallow to deep: "exit1", ..., "full".
        exit_thresholds: by operating point; empty until they are found.
        exit_curve: thresholds from cheap to expensive.
        exit_outputs: those of the latest evaluation, all ranks together; of a validation with
            `halve_validation` those of the images to report on.
        exit_costs: MACs of stages and exits; known from the first evaluation on.

    Raises:
        ValueError: wrong thresholds, an unknown criterion, a drop that is no share, a network
            without early exits; or, when it fits, no validation images where these need them.
    """

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
    ):
        super().__init__(net, optimizer, lr_scheduler, lr_interval, seed, tuning)
        if net.num_exits < 2:
            raise ValueError("the network has no early exit: give it one, or use LitResNet")
        check_criterion(exit_criterion)
        if exit_thresholds is not None:
            check_thresholds(exit_thresholds, net.num_exits, exit_criterion)
        if max_accuracy_drop is not None:
            check_numbers("[0, 1)", max_accuracy_drop=max_accuracy_drop)
        self.calibrate_exits = calibrate_exits
        self.max_accuracy_drop = max_accuracy_drop
        self.halve_validation = halve_validation
        self.exit_criterion = exit_criterion
        self.given_thresholds = exit_thresholds and list(exit_thresholds)
        self.exit_names = [*(f"exit{k}" for k in range(1, net.num_exits)), FULL]
        self.exit_outputs: ExitOutputs | None = None
        self.exit_costs: ExitCosts | None = None
        self._outputs: list[ExitOutputs] = []  # of the batches so far, where they were computed
        self._logits: list[ExitLogits] = []  # of a validation that fits temperatures; on the CPU
        self._stream: ExitStream | None = None  # of the present prediction
        self._thresholds_step = 0  # optimizer steps before the thresholds were found
        self._stale_steps = 0  # and from then until the checkpoint that holds them
        self.found = FoundThresholds()

    def find_thresholds(self, outputs: ExitOutputs, costs: ExitCosts) -> FoundThresholds:
        """Finds thresholds on the outputs of the validation data."""
        raise NotImplementedError("each paper has its own rule")

    @property
    def exit_thresholds(self) -> dict[str, list[float]]:
        given = {} if self.given_thresholds is None else {GIVEN: self.given_thresholds}
        return given | self._within_drop() | self.found.points

    def _within_drop(self) -> dict[str, list[float]]:
        """Returns the cheapest thresholds that are accurate enough, if that is asked and known."""
        found = self.found
        if self.max_accuracy_drop is None or not found.accuracies:
            return {}
        enough = found.last_accuracy - self.max_accuracy_drop
        return {WITHIN: found.curve[cheapest_within(found.accuracies, found.macs, enough)]}

    @property
    def exit_curve(self) -> list[list[float]]:
        return self.found.curve

    @property
    def answering_net(self) -> MultiExitNetwork | TemperatureScaled:
        """The network whose scores the thresholds are for: with the temperatures, if it has any."""
        temperatures = self.found.temperatures
        return TemperatureScaled(self.net, temperatures) if temperatures else self.net

    @property
    def has_early_exits(self) -> bool:
        """Whether exits other than the last are trained, and evaluated."""
        return len(self.exit_names) > 1

    # --- operating points -------------------------------------------------------------------------

    def evaluated_points(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """Returns the exits: each runs the stages up to it, and no other exit."""
        first = self.net.num_exits - len(self.exit_names)
        return {
            name: partial(run_to_exit, self.answering_net, index)
            for index, name in enumerate(self.exit_names, start=first)
        }

    def operating_points(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """Returns the exits, and leaving early with every pair (or more) of thresholds."""
        adaptive = {
            name: partial(self.leave_early, thresholds)
            for name, thresholds in self.exit_thresholds.items()
        }
        return {**self.evaluated_points(), **adaptive}

    def leave_early(self, thresholds: Sequence[float], images: Tensor) -> Tensor:
        return early_exit(self.answering_net, images, thresholds, self.exit_criterion).logits

    def costs(self, images: Tensor) -> dict[str, Cost]:
        """Returns the costs; those of adaptive points are means over the latest evaluation."""
        costs = {
            name: Cost(count_macs(run, images), count_params_run(self.net, run, images))
            for name, run in self.evaluated_points().items()
        }
        for name, thresholds in self.exit_thresholds.items():
            _, macs = self.measure(thresholds)
            costs[name] = Cost(macs, count_params(self.net))
        return costs

    def measure(self, thresholds: Sequence[float]) -> tuple[float, float]:
        """Returns accuracy and mean MACs of thresholds over the latest evaluation's images."""
        taken = self.exits_taken(thresholds)
        right = self.exit_outputs.correct.gather(1, taken[:, None]).double().mean()
        macs = torch.tensor(self.exit_costs.leaving, dtype=torch.float64)[taken].mean()
        return right.item(), macs.item()

    def exits_taken(self, thresholds: Sequence[float]) -> Tensor:
        """Returns the exit, from 0, that each image of the latest evaluation takes, (N,)."""
        return exits_taken(self.exit_outputs.scores, thresholds, self.exit_criterion)

    # --- evaluation -------------------------------------------------------------------------------

    def evaluate(self, images: Tensor) -> dict[str, Tensor]:
        """Returns the logits of every exit, from one pass."""
        if not self.has_early_exits:
            return super().evaluate(images)
        network = self.net if self._fits_temperatures else self.answering_net
        return dict(zip(self.exit_names, network(images), strict=True))

    @property
    def _fits_temperatures(self) -> bool:
        """Whether the present evaluation does."""
        return self.calibrate_exits and self._trainer is not None and self.trainer.validating

    def eval_step(self, batch: Batch) -> dict[str, Tensor]:
        images, labels = batch
        logits = super().eval_step(batch)
        if self.has_early_exits:
            if self.exit_costs is None:
                self.exit_costs = count_exit_macs(self.net, images[:1])
            exits = [logits[name] for name in self.exit_names]
            self._outputs.append(ExitOutputs.of(exits, labels, self.exit_criterion))
            if self._fits_temperatures:
                self._logits.append(ExitLogits(torch.stack(exits, 1).cpu(), labels.cpu()))
        return logits

    def finish_evaluation(self, split: str) -> dict[str, Tensor]:
        metrics = super().finish_evaluation(split)
        if not self.has_early_exits:
            return metrics
        self.exit_outputs, order = gather_outputs(self._outputs, self.trainer.world_size)
        self._outputs = []
        if split == "val" and not self.trainer.sanity_checking:
            self._find(order)
            self._thresholds_step = self.global_step
        self._logits = []
        for name, thresholds in self.exit_thresholds.items():
            accuracy, macs = self.measure(thresholds)
            metrics[accuracy_name(split, name)] = torch.tensor(accuracy)
            metrics[f"{split}/macs_{name}"] = torch.tensor(macs)
        return metrics

    def _find(self, order: Tensor) -> None:
        """Finds temperatures and thresholds on the validation images.

        Args:
            order: of the images in the outputs, see `gather_outputs`.
        """
        fit, rest = halves(len(order), self.halve_validation)
        # In the order of the data, so that no sum depends on the number of ranks.
        outputs, known = take(self.exit_outputs, order), {}
        if self.calibrate_exits:
            logits = take(gather_outputs(self._logits, self.trainer.world_size)[0], order)
            columns, labels = logits.logits.unbind(1), logits.labels
            temperatures = [fit_temperature(each[fit], labels[fit]) for each in columns]
            scaled = map(scale_logits, columns, temperatures)
            outputs = ExitOutputs.of(scaled, labels, self.exit_criterion)
            rows = calibrations(
                self.exit_names, temperatures, take(logits, rest), self.halve_validation
            )
            known = {"temperatures": temperatures, "calibration": [row._asdict() for row in rows]}
        fitted, self.exit_outputs = take(outputs, fit), take(outputs, rest)
        last = fitted.correct[:, -1].double().mean().item()
        found = self.find_thresholds(fitted, self.exit_costs)
        self.found = found._replace(last_accuracy=last, **known)
        if self.halve_validation:
            sets = [*self.exit_thresholds.values(), *found.curve]
            costs = self.exit_costs.leaving
            rows = [held_out(self.exit_outputs, each, costs, self.exit_criterion) for each in sets]
            self.found = self.found._replace(held_out=[row._asdict() for row in rows])

    def gather_answers(self) -> dict[str, PointAnswers]:
        answers = super().gather_answers()
        exits = [answers[name] for name in self.exit_names]
        adaptive = {
            name: choose_exits(exits, self.exits_taken(thresholds))
            for name, thresholds in self.exit_thresholds.items()
        }
        return answers | adaptive

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
        if not self.exit_thresholds and not self.found.curve:
            rank_zero_warn(
                f"no thresholds of the {self.exit_criterion} were found before this checkpoint, by "
                "a validation of trained exits, so no image leaves early: give exit_thresholds"
            )
        elif self._stale_steps:
            rank_zero_warn(
                f"the exit thresholds were found {self._stale_steps} steps before this checkpoint "
                "and may not fit it: validate at the end of training, or give exit_thresholds"
            )

    def check_found(self) -> None:
        """Raises ValueError if the checkpoint lacks what is asked for and a validation finds."""
        if self.calibrate_exits and self.has_early_exits and not self.found.temperatures:
            raise ValueError(f"calibrate_exits {NEEDS_VALIDATION}")
        if self.max_accuracy_drop is not None and not self.found.accuracies:
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
        parts = [part for part in parts if part is not None]
        if not parts:
            logits = images.new_empty(0, self.net.num_classes)
            return Answers(logits, images.new_empty(0, dtype=torch.int64))
        return join_answers(parts)

    # --- checkpoints ------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["exit_thresholds"] = {
            "criterion": self.exit_criterion,
            "step": self._thresholds_step,
            **self.found._asdict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        found = checkpoint.get("exit_thresholds", {})
        temperatures = found.get("temperatures", [])
        is_as_asked = bool(temperatures) == self.calibrate_exits and self.has_early_exits
        if found.get("criterion") != self.exit_criterion or not is_as_asked:
            # Temperatures are those of any criterion.
            self.found = FoundThresholds(temperatures=temperatures if is_as_asked else [])
            return
        fields = {name: found[name] for name in FoundThresholds._fields if name in found}
        self.found = FoundThresholds(**fields)
        self._thresholds_step = found["step"]
        self._stale_steps = checkpoint["global_step"] - found["step"] if self.found.curve else 0
