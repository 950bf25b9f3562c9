"""What the methods with early exits share: evaluation of every exit, and leaving early."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

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
from lightning_modules.metrics import FULL, accuracy_name
from lightning_modules.schedules import Interval
from networks import (
    Answers,
    Criterion,
    ExitCosts,
    ExitStream,
    MultiExitNetwork,
    check_criterion,
    check_thresholds,
    count_exit_macs,
    count_macs,
    count_params,
    count_params_run,
    early_exit,
    exits_taken,
    join_answers,
    run_to_exit,
)
from networks import entropy as entropy_of
from networks import exit_score as score_of

GIVEN = "adaptive"
"""Name of the operating point of thresholds that the user gave."""


class ExitOutputs(NamedTuple):
    """What every exit (K of them) made of every image (N) of an evaluation; on the CPU."""

    scores: Tensor
    """(N, K), the criterion."""
    entropies: Tensor
    """(N, K), natural logarithm."""
    correct: Tensor
    """(N, K) bool."""


class FoundThresholds(NamedTuple):
    """What a method makes of its validation data; empty before that."""

    points: dict[str, list[float]] = {}  # noqa: RUF012 (never changed)
    """Thresholds of the operating points, by name; the first is the method's own choice."""
    curve: list[list[float]] = []  # noqa: RUF012
    """Thresholds from cheap to expensive, for a curve of accuracy against MACs."""
    shares: list[list[float]] = []  # noqa: RUF012
    """Of the validation images that leave at each exit, for each point of the curve."""


class MultiExitClassifier(ImageClassifier):
    """Evaluates every exit, finds thresholds on validation data, and leaves early with them.

    Each validation ends with a search for thresholds, and the checkpoint that is saved then holds
    those that fit its weights; one that is saved later holds the latest, and their use warns. Tests
    and predictions use them; without any, every image goes to the last exit.

    Subclasses write `training_step` and `find_thresholds`; one that trains the last exit alone says
    so in `exit_names`.

    Args:
        net: a network with exits, two or more.
        exit_criterion: see `networks.early_exit`.
        exit_thresholds: one per exit but the last, to be used instead of those that are found.
        optimizer, lr_scheduler, lr_interval, seed, tuning: see `ImageClassifier`.

    Attributes:
        exit_names: operating points of the trained exits, shallow to deep: "exit1", ..., "full".
        exit_thresholds: by operating point; empty until they are found.
        exit_curve: thresholds from cheap to expensive.
        exit_outputs: those of the latest evaluation, all ranks together.
        exit_costs: MACs of stages and exits; known from the first evaluation on.

    Raises:
        ValueError: wrong thresholds, an unknown criterion, or a network without early exits.
    """

    def __init__(
        self,
        net: MultiExitNetwork,
        exit_criterion: Criterion,
        exit_thresholds: Sequence[float] | None,
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
        self.exit_criterion = exit_criterion
        self.given_thresholds = exit_thresholds and list(exit_thresholds)
        self.exit_names = [*(f"exit{k}" for k in range(1, net.num_exits)), FULL]
        self.exit_outputs: ExitOutputs | None = None
        self.exit_costs: ExitCosts | None = None
        self._outputs: list[ExitOutputs] = []  # of the batches so far, where they were computed
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
        return given | self.found.points

    @property
    def exit_curve(self) -> list[list[float]]:
        return self.found.curve

    @property
    def has_early_exits(self) -> bool:
        """Whether exits other than the last are trained, and evaluated."""
        return len(self.exit_names) > 1

    # --- operating points -------------------------------------------------------------------------

    def evaluated_points(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """Returns the exits: each runs the stages up to it, and no other exit."""
        first = self.net.num_exits - len(self.exit_names)
        return {
            name: partial(run_to_exit, self.net, index)
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
        return early_exit(self.net, images, thresholds, self.exit_criterion).logits

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
        return dict(zip(self.exit_names, self.net(images), strict=True))

    def eval_step(self, batch: Batch) -> dict[str, Tensor]:
        images, labels = batch
        logits = super().eval_step(batch)
        if self.has_early_exits:
            if self.exit_costs is None:
                self.exit_costs = count_exit_macs(self.net, images[:1])
            exits = [logits[name] for name in self.exit_names]
            parts = (
                [score_of(values, self.exit_criterion) for values in exits],
                [entropy_of(values) for values in exits],
                [values.argmax(1) == labels for values in exits],
            )
            self._outputs.append(ExitOutputs(*(torch.stack(part, 1) for part in parts)))
        return logits

    def finish_evaluation(self, split: str) -> dict[str, Tensor]:
        metrics = super().finish_evaluation(split)
        if not self.has_early_exits:
            return metrics
        self._gather_outputs()
        if split == "val" and not self.trainer.sanity_checking:
            self.found = self.find_thresholds(self.exit_outputs, self.exit_costs)
            self._thresholds_step = self.global_step
        for name, thresholds in self.exit_thresholds.items():
            accuracy, macs = self.measure(thresholds)
            metrics[accuracy_name(split, name)] = torch.tensor(accuracy)
            metrics[f"{split}/macs_{name}"] = torch.tensor(macs)
        return metrics

    def _gather_outputs(self) -> None:
        """Puts the outputs of all batches and ranks together, as if one process had made them."""
        ranks = [join_outputs(self._outputs)]
        self._outputs = []
        if self.trainer.world_size > 1:
            own, ranks = ranks[0], [None] * self.trainer.world_size
            torch.distributed.all_gather_object(ranks, own)
        self.exit_outputs = join_outputs(ranks)

    def gather_answers(self) -> dict[str, PointAnswers]:
        answers = super().gather_answers()
        exits = [answers[name] for name in self.exit_names]
        adaptive = {
            name: choose_exits(exits, self.exits_taken(thresholds))
            for name, thresholds in self.exit_thresholds.items()
        }
        return answers | adaptive

    def on_test_start(self) -> None:
        self._warn_about_thresholds()

    def on_predict_start(self) -> None:
        self._stream = None
        self._warn_about_thresholds()

    def _warn_about_thresholds(self) -> None:
        if not self.has_early_exits:
            return
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
            answers = early_exit(self.net, batch[0], thresholds, self.exit_criterion)
        else:
            answers = self._next_answers(batch[0], thresholds)
        return answers.logits.softmax(1), answers.exit_index + 1

    def _next_answers(self, images: Tensor, thresholds: Sequence[float]) -> Answers:
        """Gives images to the stream of this prediction and returns what it knows by now."""
        if self._stream is None:
            self._stream = ExitStream(
                self.net, thresholds, self.exit_criterion, len(images), self.capture
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
        if found.get("criterion") != self.exit_criterion or not self.has_early_exits:
            self.found = FoundThresholds()
            return
        fields = {name: found[name] for name in FoundThresholds._fields if name in found}
        self.found = FoundThresholds(**fields)
        self._thresholds_step = found["step"]
        self._stale_steps = checkpoint["global_step"] - found["step"] if self.found.curve else 0


def join_outputs(parts: Sequence[ExitOutputs]) -> ExitOutputs:
    """Returns the outputs of several batches or ranks as those of one, on the CPU."""
    return ExitOutputs(*(torch.cat(tensors).cpu() for tensors in zip(*parts, strict=True)))
