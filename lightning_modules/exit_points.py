"""Networks with exits as operating points: every exit, and leaving early by thresholds."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_modules.answers import PointAnswers, choose_exits
from lightning_modules.base import Batch, Cost, ImageClassifier
from lightning_modules.exit_outputs import (
    EarlyPoint,
    ExitLogits,
    ExitOutputs,
    ExitState,
    FoundThresholds,
    calibrations,
    gather_outputs,
    halves,
    held_out,
    point_name,
    take,
)
from lightning_modules.metrics import accuracy_name
from networks import (
    Criterion,
    ExitCosts,
    MultiExitNetwork,
    TemperatureScaled,
    cheapest_within,
    count_exit_macs,
    count_macs,
    count_params,
    count_params_run,
    early_exit,
    exits_taken,
    fit_temperature,
    run_to_exit,
    scale_logits,
)

GIVEN = "adaptive"
"""Name of the operating point of thresholds that the user gave."""
WITHIN = "accuracy_budget"
"""Name of that of `max_accuracy_drop`."""


class ExitPoints(ImageClassifier):
    """Operating points of networks with exits. `MultiExitClassifier` documents the attributes."""

    calibrate_exits: bool
    max_accuracy_drop: float | None
    halve_validation: bool
    exit_criterion: Criterion
    given_thresholds: list[float] | None
    exit_names: list[str]
    exit_states: dict[str, ExitState]
    _thresholds_step: int

    def find_thresholds(self, outputs: ExitOutputs, costs: ExitCosts) -> FoundThresholds:
        """Finds thresholds on the outputs of the validation data."""
        raise NotImplementedError("each paper has its own rule")

    def exit_networks(self) -> Mapping[str, MultiExitNetwork]:
        """Returns the networks with exits that are evaluated, by group; see `point_name`.

        The key "" is the whole network. All networks have the same number of exits.
        """
        return {"": self.net}

    def answering(self, group: str) -> MultiExitNetwork | TemperatureScaled:
        """Returns the network whose scores its thresholds are for: with temperatures, if any."""
        network = self.exit_networks()[group]
        temperatures = self.exit_states[group].found.temperatures
        return TemperatureScaled(network, temperatures) if temperatures else network

    def thresholds_of(self, group: str) -> dict[str, list[float]]:
        """Returns the thresholds of a network, by the name of the point without its group."""
        found = self.exit_states[group].found
        points = {} if self.given_thresholds is None else {GIVEN: self.given_thresholds}
        if self.max_accuracy_drop is not None and found.accuracies:
            enough = found.last_accuracy - self.max_accuracy_drop
            cheapest = cheapest_within(found.accuracies, found.macs, enough)
            points[WITHIN] = found.curve[cheapest]
        return points | found.points

    def early_points(self) -> dict[str, EarlyPoint]:
        """Returns the operating points whose images leave early, by name."""
        return {
            point_name(group, name): EarlyPoint(group, thresholds)
            for group in self.exit_states
            for name, thresholds in self.thresholds_of(group).items()
        }

    def names_of(self, group: str) -> list[str]:
        """Returns the operating points of the trained exits of a network, shallow to deep."""
        return [point_name(group, name) for name in self.exit_names]

    def network_of(self, point: str) -> MultiExitNetwork | TemperatureScaled:
        """Returns the network with exits that an operating point is of, as it answers."""
        return self.answering(self.group_of(point))

    def group_of(self, point: str) -> str:
        """Returns the group of the network that an operating point is of."""
        early = self.early_points()
        if point in early:
            return early[point].group
        return next((group for group in self.exit_states if point in self.names_of(group)), "")

    # --- the whole network ------------------------------------------------------------------------

    @property
    def exit_thresholds(self) -> dict[str, list[float]]:
        return self.thresholds_of("")

    @property
    def exit_outputs(self) -> ExitOutputs | None:
        return self.exit_states[""].outputs

    @property
    def exit_costs(self) -> ExitCosts | None:
        return self.exit_states[""].costs

    @property
    def found(self) -> FoundThresholds:
        return self.exit_states[""].found

    @found.setter
    def found(self, found: FoundThresholds) -> None:
        self.exit_states[""].found = found

    @property
    def exit_curve(self) -> list[list[float]]:
        return self.found.curve

    @property
    def answering_net(self) -> MultiExitNetwork | TemperatureScaled:
        return self.answering("")

    @property
    def has_early_exits(self) -> bool:
        """Whether exits other than the last are trained, and evaluated."""
        return len(self.exit_names) > 1

    # --- operating points -------------------------------------------------------------------------

    def evaluated_points(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """Returns the exits: each runs the stages up to it, and no other exit."""
        first = self.net.num_exits - len(self.exit_names)
        return {
            name: partial(run_to_exit, self.answering(group), index)
            for group in self.exit_states
            for index, name in enumerate(self.names_of(group), start=first)
        }

    def operating_points(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """Returns the exits, and leaving early with every pair (or more) of thresholds."""
        adaptive = {
            name: partial(self.leave_early, point) for name, point in self.early_points().items()
        }
        return {**self.evaluated_points(), **adaptive}

    def leave_early(self, point: EarlyPoint, images: Tensor) -> Tensor:
        network = self.answering(point.group)
        return early_exit(network, images, point.thresholds, self.exit_criterion).logits

    def costs(self, images: Tensor) -> dict[str, Cost]:
        """Returns the costs; those of adaptive points are means over the latest evaluation."""
        costs = {
            name: Cost(count_macs(run, images), count_params_run(self.net, run, images))
            for name, run in self.evaluated_points().items()
        }
        for name, (group, thresholds) in self.early_points().items():
            _, macs = self.measure(thresholds, group)
            costs[name] = Cost(macs, count_params(self.net))
        return costs

    def measure(self, thresholds: Sequence[float], group: str = "") -> tuple[float, float]:
        """Returns accuracy and mean MACs of thresholds over the latest evaluation's images."""
        taken, state = self.exits_taken(thresholds, group), self.exit_states[group]
        right = state.outputs.correct.gather(1, taken[:, None]).double().mean()
        macs = torch.tensor(state.costs.leaving, dtype=torch.float64)[taken].mean()
        return right.item(), macs.item()

    def exits_taken(self, thresholds: Sequence[float], group: str = "") -> Tensor:
        """Returns the exit, from 0, that each image of the latest evaluation takes, (N,)."""
        scores = self.exit_states[group].outputs.scores
        return exits_taken(scores, thresholds, self.exit_criterion)

    # --- evaluation -------------------------------------------------------------------------------

    def evaluate(self, images: Tensor) -> dict[str, Tensor]:
        """Returns the logits of every exit, from one pass of each network."""
        if not self.has_early_exits:
            return super().evaluate(images)
        logits: dict[str, Tensor] = {}
        for group, plain in self.exit_networks().items():
            network = plain if self._fits_temperatures else self.answering(group)
            logits |= zip(self.names_of(group), network(images), strict=True)
        return logits

    @property
    def _fits_temperatures(self) -> bool:
        """Whether the present evaluation does."""
        return self.calibrate_exits and self._trainer is not None and self.trainer.validating

    def eval_step(self, batch: Batch) -> dict[str, Tensor]:
        images, labels = batch
        logits = super().eval_step(batch)
        for group, network in self.exit_networks().items() if self.has_early_exits else ():
            state = self.exit_states[group]
            if state.costs is None:
                state.costs = count_exit_macs(network, images[:1])
            exits = [logits[name] for name in self.names_of(group)]
            state.batches.append(ExitOutputs.of(exits, labels, self.exit_criterion))
            if self._fits_temperatures:
                state.logits.append(ExitLogits(torch.stack(exits, 1).cpu(), labels.cpu()))
        return logits

    def finish_evaluation(self, split: str) -> dict[str, Tensor]:
        metrics = super().finish_evaluation(split)
        if not self.has_early_exits:
            return metrics
        finds = split == "val" and not self.trainer.sanity_checking
        for group, state in self.exit_states.items():
            state.outputs, order = gather_outputs(state.batches, self.trainer.world_size)
            if finds:
                self._find(group, order)
            state.batches, state.logits = [], []
        if finds:
            self._thresholds_step = self.global_step
        for name, (group, thresholds) in self.early_points().items():
            accuracy, macs = self.measure(thresholds, group)
            metrics[accuracy_name(split, name)] = torch.tensor(accuracy)
            metrics[f"{split}/macs_{name}"] = torch.tensor(macs)
        return metrics

    def _find(self, group: str, order: Tensor) -> None:
        """Finds temperatures and thresholds of a network on the validation images.

        Args:
            group: of the network.
            order: of the images in the outputs, see `gather_outputs`.
        """
        state = self.exit_states[group]
        fit, rest = halves(len(order), self.halve_validation)
        # In the order of the data, so that no sum depends on the number of ranks.
        outputs, known = take(state.outputs, order), {}
        if self.calibrate_exits:
            logits = take(gather_outputs(state.logits, self.trainer.world_size)[0], order)
            columns, labels = logits.logits.unbind(1), logits.labels
            temperatures = [fit_temperature(each[fit], labels[fit]) for each in columns]
            scaled = map(scale_logits, columns, temperatures)
            outputs = ExitOutputs.of(scaled, labels, self.exit_criterion)
            rows = calibrations(
                self.names_of(group), temperatures, take(logits, rest), self.halve_validation
            )
            known = {"temperatures": temperatures, "calibration": [row._asdict() for row in rows]}
        fitted, state.outputs = take(outputs, fit), take(outputs, rest)
        last = fitted.correct[:, -1].double().mean().item()
        found = self.find_thresholds(fitted, state.costs)
        state.found = found._replace(last_accuracy=last, **known)
        if self.halve_validation:
            sets = [*self.thresholds_of(group).values(), *found.curve]
            costs = state.costs.leaving
            rows = [held_out(state.outputs, each, costs, self.exit_criterion) for each in sets]
            state.found = state.found._replace(held_out=[row._asdict() for row in rows])

    def gather_answers(self) -> dict[str, PointAnswers]:
        answers = super().gather_answers()
        for name, (group, thresholds) in self.early_points().items():
            exits = [answers[exit_name] for exit_name in self.names_of(group)]
            answers[name] = choose_exits(exits, self.exits_taken(thresholds, group))
        return answers
