"""Temperatures, accuracy budgets and halves of the validation data, each computed another way."""

import copy
import csv
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import methods
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning import seed_everything
from quiet import quiet_trainer
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error

from callbacks import ExitStatistics
from datamodules import DigitsDataModule
from lightning_modules import LitBranchyNet, LitMSDNet, MultiExitClassifier
from lightning_modules.exit_outputs import (
    ExitLogits,
    ExitOutputs,
    calibrations,
    gather_outputs,
    halves,
    held_out,
    paired_interval,
)
from networks import (
    CifarResNet,
    EarlyExit,
    ExitStream,
    MultiExitNetwork,
    ResNetWithExits,
    TemperatureScaled,
    cheapest_within,
    count_exit_macs,
    early_exit,
    fit_temperature,
    geometric_fractions,
    join_answers,
    run_to_exit,
    scale_logits,
    screen_thresholds,
    thresholds_for_fractions,
    try_thresholds,
)
from running import OperatingPoints, PredictionWriter

# --- temperatures ---------------------------------------------------------------------------------


def draw(num_images: int, num_classes: int, scale: float, right: float, seed: int = 0):
    """Returns logits, and labels of which about a share are the largest logit's."""
    chance = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(num_images, num_classes, generator=chance)
    labels = torch.randint(num_classes, (num_images,), generator=chance)
    is_right = torch.rand(num_images, generator=chance) < right
    return logits, torch.where(is_right, logits.argmax(1), labels)


@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
@pytest.mark.parametrize(("num_images", "num_classes"), [(20, 2), (500, 10), (300, 100)])
def test_temperature_is_scipys(num_images: int, num_classes: int, scale: float) -> None:
    logits, labels = draw(num_images, num_classes, scale, 0.6)
    z, y = logits.double().numpy(), labels.numpy()

    def loss(log_temperature: float) -> float:
        scaled = z / np.exp(log_temperature)
        return float(np.mean(logsumexp(scaled, 1) - scaled[np.arange(len(y)), y]))

    bounds = (math.log(0.01), math.log(100))
    best = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-9})
    temperature = fit_temperature(logits, labels)
    assert loss(math.log(temperature)) <= best.fun + 1e-12
    assert math.log(temperature) == pytest.approx(best.x, abs=1e-5)


@given(share=st.integers(51, 99), gap=st.floats(0.2, 40))
@settings(max_examples=50, deadline=None)
def test_temperature_of_two_classes_in_closed_form(share: int, gap: float) -> None:
    """Of images that are equally sure, so many of a hundred right, that share is the confidence."""
    logits = torch.tensor([[gap, 0.0]], dtype=torch.float64).expand(100, 2)
    labels = (torch.arange(100) >= share).long()
    expected = gap / math.log(share / (100 - share))
    assert fit_temperature(logits, labels) == pytest.approx(min(expected, 100), rel=1e-6)


def test_temperatures_without_a_minimum() -> None:
    eye, labels = torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4)
    assert fit_temperature(eye, labels) == 1.0  # all are right: surer is always better
    assert fit_temperature(torch.zeros(12, 3), labels) == 1.0
    assert fit_temperature(torch.empty(0, 3), torch.empty(0, dtype=torch.long)) == 1.0
    assert fit_temperature(eye, (labels + 1) % 3) == pytest.approx(100)  # all are wrong
    one_class = draw(200, 4, 3.0, 0.5)[0], torch.zeros(200, dtype=torch.long)
    assert 1 < fit_temperature(*one_class) <= 100
    nearly = torch.tensor([[0.0, 1e-9]] + [[0.05, 0.0]] * 30)
    assert fit_temperature(nearly, torch.zeros(31, dtype=torch.long)) == pytest.approx(0.01)
    logits, labels = draw(100, 5, 3.0, 0.5)
    bad = torch.full((2, 5), torch.nan)
    bad[1] = -torch.inf
    both = torch.cat([logits, bad]), torch.cat([labels, torch.zeros(2, dtype=torch.long)])
    assert fit_temperature(*both) == fit_temperature(logits, labels)


def network() -> ResNetWithExits:
    seed_everything(3, verbose=False)
    return ResNetWithExits(CifarResNet(8, in_channels=1), exits_after=[0, 2])


def small_msdnet() -> MultiExitNetwork:
    seed_everything(3, verbose=False)
    return methods.build(methods.METHODS["msdnet"]["init_args"]["net"])


@pytest.mark.parametrize("make", [network, small_msdnet])
@pytest.mark.parametrize("kind", ["as it is", "copied"])
def test_scaled_network_is_a_network_with_exits(make: Callable[[], nn.Module], kind: str) -> None:
    """Whoever leaves early answers as the full pass does, with logits over the temperatures."""
    inner = make().eval()
    temperatures = [0.5, 2.0, 4.0]
    scaled = TemperatureScaled(inner, temperatures)
    if kind == "copied":
        other = copy.deepcopy(scaled)
        for parameter in inner.parameters():
            parameter.data.fill_(torch.nan)
        inner, scaled = other.network, other
    images = torch.randn(12, 1, 32, 32)
    with torch.no_grad():
        expected = [z / t for z, t in zip(inner(images), temperatures, strict=True)]
        assert all(map(torch.equal, scaled(images), expected))
        assert torch.equal(run_to_exit(scaled, 1, images), expected[1])
    scores = [-(z.softmax(1) * z.log_softmax(1)).sum(1) for z in expected]
    limits = [each.quantile(0.4).item() for each in scores[:2]]
    answers = early_exit(scaled, images, limits)
    sure = [(scores[0] < limits[0]).tolist(), (scores[1] < limits[1]).tolist()]
    taken = [0 if a else 1 if b else 2 for a, b in zip(*sure, strict=True)]
    assert answers.exit_index.tolist() == taken
    rows = torch.stack([expected[k][n] for n, k in enumerate(taken)])
    torch.testing.assert_close(answers.logits, rows, rtol=1e-4, atol=1e-5)
    assert count_exit_macs(scaled, images[:1]) == count_exit_macs(inner, images[:1])
    for capture in ("none", "graphs"):
        stream = ExitStream(scaled, limits, batch_size=4, capture=capture)
        parts = [part for part in (stream.push(images), stream.finish()) if part is not None]
        assert join_answers(parts).exit_index.tolist() == taken
        alone = EarlyExit(scaled, limits, capture=capture)
        assert [alone(image[None]).exit_index.item() for image in images] == taken
    scaled.train()
    with pytest.raises(ValueError, match="evaluation mode"):
        early_exit(scaled, images, limits)


@pytest.mark.parametrize("temperatures", [[1.0, 1.0], [1.0, 0.0, 1.0], [1.0, math.nan, 1.0]])
def test_temperatures_that_do_not_fit_are_refused(temperatures: list[float]) -> None:
    with pytest.raises(ValueError, match="for 3 exits: give a positive number for each"):
        TemperatureScaled(network(), temperatures)


def test_half_precision_keeps_every_answer() -> None:
    logits = torch.randn(500, 10).bfloat16()
    values = scale_logits(logits, 3.0)
    assert values.dtype == torch.float32
    assert torch.equal(values.argmax(1), logits.argmax(1))


# --- accuracy budgets -----------------------------------------------------------------------------


def outputs(num_images: int = 60, num_exits: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns scores and answers of exits that are the surer the more right, and ever better."""
    chance = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_images, num_exits, generator=chance)
    chances = (0.6 + 0.15 * torch.arange(num_exits)) * (1.2 - scores)
    return scores, torch.rand(num_images, num_exits, generator=chance) < chances


def by_hand(scores: Tensor, correct: Tensor, costs: list[float], limits: list[float], below: bool):
    """Returns accuracy, cost and shares, one image at a time."""
    right, cost, counts = 0, 0.0, [0] * len(costs)
    for image, row in enumerate(scores.tolist()):
        sure = [
            (s < limit) if below else (s >= limit) for s, limit in zip(row, limits, strict=False)
        ]
        index = [*sure, True].index(True)
        right += bool(correct[image, index])
        cost += costs[index]
        counts[index] += 1
    return right / len(scores), cost / len(scores), [count / len(scores) for count in counts]


@pytest.mark.parametrize("criterion", ["entropy", "confidence"])
def test_thresholds_are_tried_as_by_hand(criterion: str) -> None:
    scores, correct = outputs()
    costs, limits = [1.0, 3.0, 7.0], [[0.1, 0.4], [0.5, 0.5], [0.9, 0.2], [1.0, 1.0], [0.0, 0.0]]
    tried = try_thresholds(scores, correct, costs, limits, criterion)
    expected = [by_hand(scores, correct, costs, each, criterion == "entropy") for each in limits]
    for index, (accuracy, cost, shares) in enumerate(expected):
        assert tried.accuracy[index].item() == pytest.approx(accuracy)
        assert tried.cost[index].item() == pytest.approx(cost)
        assert tried.shares[index].tolist() == pytest.approx(shares)
    assert tried.thresholds.tolist() == limits
    grid = screen_thresholds(scores, correct, costs, criterion)
    again = try_thresholds(scores, correct, costs, grid.thresholds.tolist(), criterion)
    assert all(map(torch.equal, grid[:5], again[:5]))
    assert again.knee == grid.knee


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("drop", [0.0, 0.05, 0.1, 0.3])
@pytest.mark.parametrize("method", ["branchynet", "msdnet"])
def test_accuracy_budget_is_the_cheapest_of_all(method: str, drop: float, seed: int) -> None:
    scores, correct = outputs(seed=seed)
    spec = {**methods.METHODS[method]["init_args"], "max_accuracy_drop": drop}
    module = methods.build({**methods.METHODS[method], "init_args": spec})
    assert "accuracy_budget" not in module.exit_thresholds
    costs = count_exit_macs(module.net.eval(), torch.zeros(1, 1, 32, 32))
    found = module.find_thresholds(ExitOutputs(scores, scores, correct), costs)
    last = correct[:, -1].double().mean().item()
    module.found = found._replace(last_accuracy=last)

    below = method == "branchynet"
    if below:
        candidates = screen_thresholds(scores, correct, costs.leaving).thresholds.tolist()
    else:
        ratios = [*(number / 20 for number in range(1, 40)), 2.5, 4.0, 8.0, 1e6]
        candidates = [
            thresholds_for_fractions(scores, geometric_fractions(ratio, 3)) for ratio in ratios
        ]
    tried = [by_hand(scores, correct, costs.leaving, each, below) for each in candidates]
    num_right = math.ceil(round(60 * (last - drop), 6))
    good = [cost for accuracy, cost, _ in tried if round(60 * accuracy) >= num_right]
    chosen = module.exit_thresholds["accuracy_budget"]
    accuracy, cost, _ = by_hand(scores, correct, costs.leaving, chosen, below)
    assert round(60 * accuracy) >= num_right
    assert cost == pytest.approx(min(good))
    # `predict` uses the first.
    assert next(iter(module.exit_thresholds)) == "accuracy_budget"
    if below and drop == 0:
        lossless = module.exit_thresholds["adaptive_lossless"]
        assert by_hand(scores, correct, costs.leaving, lossless, below)[1] == pytest.approx(cost)


def test_cheapest_within() -> None:
    accuracy, cost = [0.7, 0.9, 0.8, 0.95], [1.0, 3.0, 1.0, 2.0]
    assert cheapest_within(accuracy, cost, 0.5) == 2  # of those that cost the same
    assert cheapest_within(accuracy, cost, 0.85) == 3
    assert cheapest_within([0.7], [1.0], 0.8 - 0.1) == 0  # 0.7000000000000001
    with pytest.raises(ValueError, match=r"reach an accuracy of 0\.96: the best is 0\.95"):
        cheapest_within(accuracy, cost, 0.96)


# --- halves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_images", [2, 3, 180])
def test_halves_are_apart_and_all(num_images: int) -> None:
    numbers = torch.arange(num_images)
    fit, rest = (numbers[each].tolist() for each in halves(num_images, True))
    assert sorted(fit + rest) == numbers.tolist()
    assert 0 <= len(fit) - len(rest) <= 1
    assert [numbers[each].tolist() for each in halves(num_images, False)] == [numbers.tolist()] * 2


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_are_put_in_the_order_of_the_data(world_size: int, monkeypatch) -> None:
    whole = torch.arange(11)[:, None]
    ranks = [ExitOutputs(*[whole[rank::world_size]] * 3) for rank in range(world_size)]

    def all_gather(parts: list, own: ExitOutputs) -> None:
        parts[:] = ranks

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather)
    joined, order = gather_outputs([ranks[0]], world_size)
    assert torch.equal(joined.scores[order], whole)
    assert joined.scores[: len(ranks[0].scores)].equal(ranks[0].scores)


@pytest.mark.parametrize(("gained", "lost", "total"), [(3, 9, 90), (0, 0, 50), (20, 1, 400)])
def test_interval_is_that_of_the_paper(gained: int, lost: int, total: int) -> None:
    """Agresti and Min, of the table with half an image more in each cell."""
    both = (total - gained - lost) / 2
    table = np.array([[both, gained], [lost, total - both - gained - lost]]) + 0.5
    p = table / table.sum()
    difference = p[0, 1] - p[1, 0]
    error = math.sqrt((p[0, 1] + p[1, 0] - difference**2) / table.sum())
    low, high = paired_interval(gained, lost, total)
    assert (low + high) / 2 == pytest.approx(difference)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=1e-4)
    assert low < difference < high


def test_interval_covers_the_truth() -> None:
    chance = np.random.RandomState(0)
    tables = chance.multinomial(300, [0.9, 0.02, 0.05, 0.03], 2000)
    bounds = np.array([paired_interval(gained, lost, 300) for _, gained, lost, _ in tables])
    inside = (bounds[:, 0] <= -0.03) & (bounds[:, 1] >= -0.03)
    assert 0.93 < inside.mean() < 0.98


def test_who_has_no_score_is_not_calibrated() -> None:
    logits, labels = draw(40, 5, 3.0, 0.5)
    logits = torch.stack([logits, logits], 1)
    known = calibrations(["exit1", "full"], [2.0, 0.5], ExitLogits(logits, labels), True)
    poison = torch.cat([logits, torch.full((3, 2, 5), torch.nan)])
    poison[:, 1].nan_to_num_(0.0)
    truth = torch.cat([labels, torch.zeros(3, dtype=torch.long)])
    first, last = calibrations(["exit1", "full"], [2.0, 0.5], ExitLogits(poison, truth), True)
    assert first == known[0]
    assert (known[1].num_images, last.num_images) == (40, 43)
    (none,) = calibrations(["exit1"], [1.0], ExitLogits(poison[40:, :1], truth[40:]), True)
    assert none.num_images == 0


def test_held_out_is_counted_by_hand() -> None:
    scores, correct = outputs()
    row = held_out(ExitOutputs(scores, scores, correct), [0.2, 0.6], [1.0, 3.0, 7.0], "entropy")
    accuracy, cost, shares = by_hand(scores, correct, [1.0, 3.0, 7.0], [0.2, 0.6], True)
    assert (row.acc, row.macs, row.shares) == (pytest.approx(accuracy), pytest.approx(cost), shares)
    assert row.change == pytest.approx(accuracy - correct[:, -1].double().mean().item())
    assert row.change_low < row.change_high


# --- runs -----------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def all_of(split: str) -> tuple[Tensor, Tensor]:
    data = DigitsDataModule()
    data.setup("test")
    loader = getattr(data, f"{split}_dataloader")()
    batches = [data.on_after_batch_transfer(batch, 0) for batch in loader]
    return tuple(torch.cat(column) for column in zip(*batches, strict=True))


def make(method: str, **arguments) -> MultiExitClassifier:
    if method == "branchynet":
        return LitBranchyNet(network(), **arguments)
    return LitMSDNet(small_msdnet(), **arguments)


SETTINGS = {"calibrate_exits": True, "max_accuracy_drop": 0.05, "halve_validation": True}


@pytest.fixture(
    scope="module", params=["branchynet", pytest.param("msdnet", marks=pytest.mark.slow)]
)
def trained(request, tmp_path_factory) -> tuple[Path, MultiExitClassifier]:
    folder = tmp_path_factory.mktemp(request.param)
    module = make(request.param, **SETTINGS)
    callbacks = [ExitStatistics(), OperatingPoints(), PredictionWriter()]
    trainer = quiet_trainer(folder, max_epochs=2, limit_train_batches=10, callbacks=callbacks)
    data = DigitsDataModule(batch_size=64, eval_batch_size=50)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(folder / "last.ckpt")
    trainer.test(module, datamodule=data, verbose=False)
    trainer.predict(module, datamodule=data)
    return folder, module.eval()


def test_temperatures_and_thresholds_are_those_of_one_half(trained) -> None:
    folder, module = trained
    images, labels = all_of("val")
    with torch.no_grad():
        raw = [logits.double() for logits in module.net(images)]
    stored = torch.load(folder / "last.ckpt", weights_only=True)["exit_thresholds"]
    assert stored["temperatures"] == module.answering_net.temperatures
    for row, logits, temperature in zip(
        read(folder / "exit_calibration.csv"), raw, stored["temperatures"], strict=True
    ):

        def loss(scale: float, logits: Tensor = logits) -> float:
            return F.cross_entropy(logits[::2] / math.exp(scale), labels[::2]).item()

        best = minimize_scalar(loss, bounds=(-4.6, 4.6), method="bounded", options={"xatol": 1e-9})
        assert math.log(temperature) == pytest.approx(best.x, abs=1e-4)
        assert float(row["temperature"]) == temperature
        assert (row["num_images"], row["held_out"]) == ("90", "True")
        for when, scale in (("before", 1.0), ("after", temperature)):
            others = logits[1::2] / scale
            ece = multiclass_calibration_error(others.softmax(1), labels[1::2], 10, 15, "l1")
            assert float(row[f"ece_{when}"]) == pytest.approx(ece.item(), abs=1e-4)
            nll = F.cross_entropy(others, labels[1::2]).item()
            assert float(row[f"nll_{when}"]) == pytest.approx(nll, rel=1e-4)

    scaled = [z / t for z, t in zip(raw, stored["temperatures"], strict=True)]
    fitted = ExitOutputs.of([z[::2].float() for z in scaled], labels[::2], module.exit_criterion)
    again = module.find_thresholds(fitted, module.exit_costs)
    assert again.points == {
        name: pytest.approx(limits, abs=1e-5) for name, limits in stored["points"].items()
    }
    rest = ExitOutputs.of([z[1::2].float() for z in scaled], labels[1::2], module.exit_criterion)
    rows = {row["point"]: row for row in read(folder / "exit_held_out.csv")}
    assert rows.keys() == module.exit_thresholds.keys()
    assert next(iter(rows)) == "accuracy_budget"
    below = module.exit_criterion == "entropy"
    for name, limits in module.exit_thresholds.items():
        costs = module.exit_costs.leaving
        accuracy, cost, shares = by_hand(rest.scores, rest.correct, costs, limits, below)
        assert float(rows[name]["acc"]) == pytest.approx(accuracy, abs=1.5 / 90)
        assert float(rows[name]["macs"]) == pytest.approx(cost, rel=0.02)
        assert float(rows[name]["share_exit1"]) == pytest.approx(shares[0], abs=1.5 / 90)
        assert float(rows[name]["change_low"]) <= float(rows[name]["change"])


def test_test_and_prediction_answer_with_temperatures(trained) -> None:
    folder, module = trained
    images, labels = all_of("test")
    with torch.no_grad():
        scaled = [z / t for z, t in zip(module.net(images), module.found.temperatures, strict=True)]
    points = {row["name"]: row for row in read(folder / "operating_points.csv")}
    for name, logits in zip(module.exit_names, scaled, strict=True):
        ece = multiclass_calibration_error(logits.softmax(1), labels, 10, 15, "l1")
        assert float(points[name]["ece"]) == pytest.approx(ece.item(), abs=1e-4)
        torch.testing.assert_close(module.operating_points()[name](images), logits)
    if "ensemble2" in points:
        mean = torch.stack(scaled[:2]).softmax(2).mean(0)
        torch.testing.assert_close(module.operating_points()["ensemble2"](images).exp(), mean)
        ece = multiclass_calibration_error(mean, labels, 10, 15, "l1")
        assert float(points["ensemble2"]["ece"]) == pytest.approx(ece.item(), abs=1e-4)
    limits = module.exit_thresholds["accuracy_budget"]
    probabilities = torch.stack(scaled, 1).softmax(2)
    scores = torch.distributions.Categorical(probs=probabilities).entropy()
    if module.exit_criterion == "confidence":
        scores = probabilities.amax(2)
    for image, row in enumerate(read(folder / "predictions.csv")):
        assert row["point"] == "accuracy_budget"
        index = int(row["exit"]) - 1
        below = module.exit_criterion == "entropy"
        early = [s < t if below else s >= t for s, t in zip(scores[image], limits, strict=False)]
        assert index == ([*early, True].index(True))
        best = probabilities[image, index].max().item()
        assert float(row["probability"]) == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("method", ["branchynet", "msdnet"])
def test_no_weight_and_no_answer_changes(method: str, tmp_path: Path) -> None:
    """And the metrics of exits that a validation logs are those of a run without."""
    runs = []
    for arguments in ({}, SETTINGS):
        trainer = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=5)
        module = make(method, **arguments)
        trainer.fit(module, datamodule=DigitsDataModule(batch_size=64))
        logged = dict(trainer.callback_metrics)
        trainer.test(module, DigitsDataModule(), verbose=False)
        runs.append((module, logged, dict(trainer.callback_metrics)))
    (plain, logged, tested), (other, other_logged, other_tested) = runs
    assert not plain.found.temperatures
    assert plain.answering_net is plain.net
    assert plain.state_dict().keys() == other.state_dict().keys()
    assert all(map(torch.equal, plain.state_dict().values(), other.state_dict().values()))
    for name in ("val/loss", "val/acc", *(f"val/acc_{each}" for each in plain.exit_names[:-1])):
        assert torch.equal(logged[name], other_logged[name])
    for name in ("test/acc", *(f"test/acc_{each}" for each in plain.exit_names[:-1])):
        assert torch.equal(tested[name], other_tested[name])


@pytest.mark.parametrize("eval_batch_size", [7, 180])
def test_halves_do_not_depend_on_batches(eval_batch_size: int, trained, tmp_path: Path) -> None:
    _, module = trained
    other = make("branchynet" if isinstance(module, LitBranchyNet) else "msdnet", **SETTINGS)
    other.load_state_dict(module.state_dict())
    data = DigitsDataModule(eval_batch_size=eval_batch_size)
    quiet_trainer(tmp_path).validate(other, datamodule=data, verbose=False)
    assert other.found.temperatures == pytest.approx(module.found.temperatures, rel=1e-4)
    images, labels = all_of("val")
    with torch.no_grad():
        right = [z.argmax(1) == labels for z in other.eval().net(images)]
    assert torch.equal(other.exit_outputs.correct, torch.stack(right, 1)[1::2])


def test_checkpoint_brings_temperatures_along(trained) -> None:
    folder, module = trained
    content = torch.load(folder / "last.ckpt", weights_only=True)
    name = "branchynet" if isinstance(module, LitBranchyNet) else "msdnet"
    same = make(name, **SETTINGS)
    same.on_load_checkpoint(content)
    assert same.found == module.found
    same.check_found()
    # Thresholds of calibrated scores are none of others, nor the other way round.
    without = make(name)
    without.on_load_checkpoint(content)
    assert without.exit_thresholds == {}
    assert without.answering_net is without.net
    plain = pickle.loads(pickle.dumps(content))
    for key in ("temperatures", "calibration", "held_out", "accuracies", "macs", "last_accuracy"):
        del plain["exit_thresholds"][key]  # as an older version wrote it
    calibrated = make(name, calibrate_exits=True)
    calibrated.on_load_checkpoint(plain)
    assert calibrated.exit_thresholds == {}
    with pytest.raises(ValueError, match="calibrate_exits needs what a validation finds"):
        calibrated.on_test_start()
    budget = make(name, max_accuracy_drop=0.1)
    budget.on_load_checkpoint(plain)
    assert budget.exit_thresholds
    with pytest.raises(ValueError, match="max_accuracy_drop needs what a validation finds"):
        budget.on_predict_start()
    if name == "branchynet":  # temperatures are those of any criterion
        arguments = {"exit_criterion": "confidence", "exit_thresholds": [0.9, 0.8]}
        other = make(name, calibrate_exits=True, **arguments)
        other.on_load_checkpoint(content)
        assert other.found.temperatures == module.found.temperatures
        assert list(other.exit_thresholds) == ["adaptive"]


@pytest.mark.parametrize("name", SETTINGS)
def test_without_validation_images_a_fit_is_refused(name: str, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    module = make("branchynet", **{name: SETTINGS[name]})
    with pytest.raises(ValueError, match=f"{name} needs what a validation finds: hold out"):
        trainer.fit(module, datamodule=DigitsDataModule(val_size=0))
    weights = {"exit_loss_weights": [0, 0, 1], name: SETTINGS[name]}
    with pytest.raises(ValueError, match=f"{name} need exits that are trained"):
        make("branchynet", **weights)


def test_one_image_has_no_halves(tmp_path: Path) -> None:
    module = make("msdnet", halve_validation=True)
    with pytest.raises(ValueError, match="2 validation images or more, and there are 1: hold out"):
        quiet_trainer(tmp_path).fit(module, datamodule=DigitsDataModule(val_size=1))


@pytest.mark.parametrize("drop", [-0.1, 1.0, math.nan])
def test_drop_that_is_no_share_is_refused(drop: float) -> None:
    with pytest.raises(ValueError, match=r"give a number in \[0, 1\)"):
        make("msdnet", max_accuracy_drop=drop)
