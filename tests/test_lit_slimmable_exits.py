"""Training at many widths and exits, and their evaluation: every number computed another way."""

import csv
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Trainer, seed_everything
from quiet import quiet_trainer
from test_lit_slimmable import Gradients, all_test_batches, first_batches, gradients_of
from torch import Tensor

from callbacks import BNRecalibration
from datamodules import DigitsDataModule
from lightning_modules import (
    LitSlimmableExits,
    LitStochasticDepth,
    zero_missing_gradients,
)
from networks import (
    CifarResNet,
    SlimmableCifarResNet,
    SlimmableMobileNetV1,
    SlimmableWithExits,
    count_exit_macs,
    count_macs,
    count_params,
    count_params_run,
    early_exit,
    extract,
    run_to_exit,
)
from running import OperatingPoints

RANGE = {"width_mult_range": (0.25, 1.0)}
SWITCHES = {"width_mults": (0.25, 0.5, 1.0)}
SURVIVAL = [5 / 6, 2 / 3, 0.5]


def network(exits_after=(0, 2), **widths) -> SlimmableWithExits:
    seed_everything(3, verbose=False)
    return SlimmableWithExits(
        SlimmableCifarResNet(8, in_channels=1, **(widths or RANGE)), exits_after
    )


def make_trainer(folder: Path, **arguments) -> Trainer:
    defaults = {"limit_train_batches": 6, "callbacks": [BNRecalibration(256)]}
    return quiet_trainer(folder, **(defaults | arguments))


class Seen(Gradients, LitSlimmableExits):
    """Sees the gradients of what has run, and no zeros for the rest."""

    def on_before_optimizer_step(self, optimizer) -> None:
        zero_missing_gradients(self.net.parameters())
        super().on_before_optimizer_step(optimizer)


# --- a step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["last_exit", "same_exit", "labels"])
@pytest.mark.parametrize("widths", [RANGE, SWITCHES], ids=["range", "switches"])
@pytest.mark.parametrize("survival", [1.0, 0.5])
def test_a_step_is_the_sum_over_widths_and_exits(
    teacher: str, widths: dict, survival: float, tmp_path: Path
) -> None:
    """Of losses written out, in float64; with gates, those of the step at every width."""
    weights = [0.5, 1.0, 2.0]
    module = Seen(
        network(**widths),
        teacher=teacher,
        exit_loss_weights=weights,
        final_survival_prob=survival,
        seed=2,
    )
    seen = gradients_of(module, tmp_path)
    assert module.widths[0] == 1.0
    assert 0.25 in module.widths
    gates = module.gates.tolist()
    assert (0.0 in gates) == (survival < 1)
    net = network(**widths).double().train()
    ((images, labels),) = first_batches(1, batch_size=16)
    total = torch.zeros((), dtype=torch.float64)
    for number, width in enumerate(module.widths):
        log_probs = [z.log_softmax(1) for z in net(images.double(), width, gates)]
        if number == 0:
            taught = [log_prob.detach().exp() for log_prob in log_probs]
        for k, log_prob in enumerate(log_probs):
            target = F.one_hot(labels, 10).double()
            if number and teacher != "labels":
                target = taught[k if teacher == "same_exit" else 2]
            total = total - weights[k] * (target * log_prob).sum(1).mean()
    total.backward()
    for name, parameter in net.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(seen[name], expected, rtol=1e-9, atol=1e-12)


def test_gates_are_those_of_stochastic_depth(tmp_path: Path) -> None:
    """Of the same seed and step."""
    other = LitStochasticDepth(CifarResNet(8, in_channels=1), final_survival_prob=0.5, seed=4)
    module = LitSlimmableExits(network(), final_survival_prob=0.5, seed=4)
    assert module.survival_probs == other.survival_probs == pytest.approx(SURVIVAL)
    drawn: list[Tensor] = []
    for each in (module, other):
        each.on_train_batch_end = lambda *_, each=each: drawn.append(each.gates)
        arguments = {"limit_train_batches": 4, "limit_val_batches": 0}
        make_trainer(tmp_path, **arguments).fit(each, datamodule=DigitsDataModule(batch_size=16))
    assert len(drawn) == 8
    assert all(map(torch.equal, drawn[:4], drawn[4:]))
    assert len({tuple(gates.tolist()) for gates in drawn}) > 1
    assert module.eval_gates == module.survival_probs
    assert LitSlimmableExits(network()).eval_gates is None


def test_closed_blocks_still_decay(tmp_path: Path) -> None:
    """As in Stochastic Depth: their gradient is 0, and not absent."""
    sgd = partial(torch.optim.SGD, lr=1.0, weight_decay=0.1)
    module = LitSlimmableExits(network(), final_survival_prob=0.5, seed=2, optimizer=sgd)
    before = {name: p.clone() for name, p in module.net.named_parameters()}
    arguments = {"limit_train_batches": 1, "limit_val_batches": 0}
    make_trainer(tmp_path, **arguments).fit(module, datamodule=DigitsDataModule(batch_size=16))
    closed = [number for number, gate in enumerate(module.gates.tolist(), start=1) if gate == 0]
    assert closed
    for name, parameter in module.net.named_parameters():
        for number in closed:
            if name.startswith(f"trunk.units.{number}.layers.") and "conv" in name:
                torch.testing.assert_close(parameter, 0.9 * before[name])


# --- operating points -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LitSlimmableExits, dict]:
    folder = tmp_path_factory.mktemp("run")
    module = LitSlimmableExits(
        network(),
        eval_widths=[0.6],
        num_widths=3,
        final_survival_prob=0.8,
        calibrate_exits=True,
        halve_validation=True,
    )
    data = DigitsDataModule(batch_size=64)
    trainer = make_trainer(folder, limit_train_batches=20)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(folder / "last.ckpt")
    # At the narrow width they part the images; at the other they need not.
    scores = module.exit_states["w0.6"].outputs.scores
    module.given_thresholds = scores[:, :-1].median(0).values.tolist()
    make_trainer(folder, callbacks=[OperatingPoints()]).test(module, datamodule=data, verbose=False)
    with (folder / "operating_points.csv").open(newline="") as file:
        points = {row["name"]: row for row in csv.DictReader(file)}
    return folder, module.eval(), points


ADAPTIVE = ("lossless", "knee", "best")


def test_points_are_pairs_of_width_and_exit(trained) -> None:
    _, module, points = trained
    narrow = ["w0.6_exit1", "w0.6_exit2", "w0.6"]
    early = ["w0.6_adaptive", *(f"w0.6_{name}" for name in ADAPTIVE)]
    early += ["adaptive", *(f"adaptive_{name}" for name in ADAPTIVE)]
    assert list(points) == [*narrow, "exit1", "exit2", "full", *early]
    assert module.eval_widths == [0.6, 1.0]
    assert set(module.exit_thresholds) == {"adaptive", *(f"adaptive_{name}" for name in ADAPTIVE)}


@pytest.mark.parametrize("width", [0.6, 1.0])
def test_every_point_is_what_the_narrow_network_does(width: float, trained) -> None:
    _, module, points = trained
    group = "w0.6" if width == 0.6 else ""
    images, labels = (torch.cat(column) for column in zip(*all_test_batches(), strict=True))
    narrow = extract(module.net, width, gates=module.survival_probs)
    for index, name in enumerate(module.names_of(group)):
        path = partial(run_to_exit, narrow, index)
        right = (path(images).argmax(1) == labels).double().mean().item()
        assert float(points[name]["test_acc"]) == pytest.approx(right)
        assert int(points[name]["macs"]) == count_macs(path, images[:1])
        assert int(points[name]["params"]) == count_params_run(narrow, path, images[:1])
    temperatures = module.exit_states[group].found.temperatures
    assert len(temperatures) == 3
    costs = torch.tensor(count_exit_macs(narrow, images[:1]).leaving, dtype=torch.float64)
    for name, thresholds in module.thresholds_of(group).items():
        point = f"w0.6_{name.removeprefix('adaptive_')}" if group else name
        answers = early_exit(module.network_of(point), images, thresholds, "entropy")
        assert len(answers.exit_index.unique()) == 3 or point != "w0.6_adaptive"
        right = (answers.logits.argmax(1) == labels).double().mean().item()
        assert float(points[point]["test_acc"]) == pytest.approx(right)
        mean = costs[answers.exit_index].mean().item()
        assert float(points[point]["macs"]) == pytest.approx(mean)
        assert int(points[point]["params"]) == count_params(narrow)
        scaled = [z / t for z, t in zip(narrow(images), temperatures, strict=True)]
        expected = torch.stack(scaled, 1)[torch.arange(len(images)), answers.exit_index]
        torch.testing.assert_close(answers.logits, expected, rtol=1e-3, atol=1e-4)


def test_widths_have_thresholds_of_their_own(trained) -> None:
    """Found on its validation images alone, by the rule of BranchyNet; kept in the checkpoint."""
    folder, module, _ = trained
    stored = torch.load(folder / "last.ckpt", weights_only=True)["exit_thresholds"]
    assert set(stored["groups"]) == {"w0.6"}
    fresh = LitSlimmableExits(network(), [0.6], final_survival_prob=0.8, calibrate_exits=True)
    fresh.on_load_checkpoint(torch.load(folder / "last.ckpt", weights_only=True))
    for group, state in module.exit_states.items():
        assert fresh.exit_states[group].found == state.found
        tried = [row["thresholds"] for row in state.found.held_out]
        assert tried == [*state.found.points.values(), *state.found.curve]
    narrow, wide = (module.exit_states[group].found.curve for group in ("w0.6", ""))
    assert narrow != wide


def test_other_widths_are_calibrated_and_have_no_thresholds_yet(trained, tmp_path: Path) -> None:
    folder, *_ = trained
    module = LitSlimmableExits(network(), eval_widths=[0.3], final_survival_prob=0.8)
    assert module.uncalibrated_points() == [
        *("w0.3_exit1", "w0.3_exit2", "w0.3", "exit1", "exit2", "full")
    ]
    data, path = DigitsDataModule(), folder / "last.ckpt"
    with pytest.warns(UserWarning, match=r"no thresholds of the entropy were found for w0\.3"):
        make_trainer(tmp_path).test(module, datamodule=data, ckpt_path=path, verbose=False)
    assert module.uncalibrated_points() == []
    assert "w0.3" in module.test_answers
    asks = LitSlimmableExits(network(), [0.3], final_survival_prob=0.8, calibrate_exits=True)
    with pytest.raises(ValueError, match="calibrate_exits needs what a validation finds"):
        make_trainer(tmp_path).test(asks, datamodule=data, ckpt_path=path, verbose=False)


def test_recalibration_runs_each_width_once() -> None:
    module = LitSlimmableExits(network(), eval_widths=[0.25, 0.6], final_survival_prob=0.5)
    for names, widths in (
        (module.evaluated_points(), [0.25, 0.6, 1.0]),
        (["w0.6", "w0.6_exit1", "exit2"], [0.6, 1.0]),
        ([], []),
    ):
        runs = module.calibration_runs(names)
        assert [run.keywords["width_mult"] for run in runs] == widths
        assert all(run.keywords["gates"] == module.survival_probs for run in runs)
        assert all(run.func is module.net for run in runs)


def test_without_exits_widths_and_depth_are_trained(tmp_path: Path) -> None:
    module = LitSlimmableExits(network([]), eval_widths=[0.25], final_survival_prob=0.5)
    data = DigitsDataModule(batch_size=64)
    callbacks = [BNRecalibration(64, widths=[0.4]), OperatingPoints()]
    trainer = make_trainer(tmp_path, callbacks=callbacks)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    assert list(module.test_answers) == ["w0.25", "full"]
    assert module.net.is_calibrated(0.4)
    assert trainer.predict(module, datamodule=data)[0].shape[1] == 10


# --- what is refused ------------------------------------------------------------------------------


def mobilenet() -> SlimmableWithExits:
    return SlimmableWithExits(SlimmableMobileNetV1(10, 1, **RANGE), [2])


@pytest.mark.parametrize(
    ("net", "arguments", "message"),
    [
        (network, {"eval_widths": [0.1]}, "width 0.1 is outside the range 0.25 to 1"),
        (network, {"num_widths": 1}, "num_widths is 1: give a whole number from 2"),
        (partial(network, **SWITCHES), {"num_widths": 4}, "num_widths is 4, but all width_mults"),
        (network, {"exit_loss_weights": [1, 1]}, "2 exit_loss_weights for 3 exits: give one per"),
        (
            network,
            {"exit_loss_weights": [1, 0, 1]},
            r"exit_loss_weights is \[1, 0, 1\]: give numbers in \(0, inf\)",
        ),
        (network, {"exit_loss_weights": ["a", 1, 1]}, r"exit_loss_weights is \['a', 1, 1\]: give"),
        (network, {"exit_thresholds": [1.0]}, "1 exit thresholds for 3 exits: give 2"),
        (network, {"teacher": "best"}, "teacher"),
        (mobilenet, {"final_survival_prob": 0.5}, "has no residual blocks to close: leave final_"),
        (partial(network, []), {"calibrate_exits": True}, "calibrate_exits needs early exits: set"),
        (
            partial(network, []),
            {"exit_thresholds": [1.0]},
            "exit_thresholds needs early exits",
        ),
    ],
)
def test_what_does_not_fit_is_refused(net, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LitSlimmableExits(net(), **arguments)


def test_a_fit_that_validates_needs_recalibration(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"add callbacks\.BNRecalibration"):
        make_trainer(tmp_path, callbacks=[]).fit(
            LitSlimmableExits(network()), datamodule=DigitsDataModule()
        )


def test_a_recorded_step_is_eager_code(tmp_path: Path) -> None:
    """On a CPU a recording is a call: all exits of the widths that every step runs, bit for bit."""

    def weights(capture: str) -> list[Tensor]:
        module = LitSlimmableExits(network(), num_widths=3)
        module.capture = capture
        arguments = {"limit_train_batches": 3, "limit_val_batches": 0}
        make_trainer(tmp_path, **arguments).fit(module, datamodule=DigitsDataModule(batch_size=32))
        recorded = [name for name, run in module._recorded.items() if run.chain is not None]
        assert recorded == ([] if capture == "none" else ["1", "0.25"])
        return list(module.net.parameters())

    for one, two in zip(weights("none"), weights("graphs"), strict=True):
        assert torch.equal(one, two)
