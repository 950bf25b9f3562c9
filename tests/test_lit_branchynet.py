"""Training with exits, and what becomes of the thresholds: every number computed another way."""

import csv
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import wandb
from PIL import Image
from pytorch_lightning import LightningDataModule, LightningModule, Trainer, seed_everything
from quiet import quiet_trainer
from torch import Tensor
from torch.distributions import Categorical

from callbacks import ExitStatistics, exit_statistics
from callbacks.exit_images import write_exit_images
from callbacks.exit_statistics import curve_rows, entropy_rows, panels, path_to, trunk_only
from datamodules import DigitsDataModule
from lightning_modules import LitBranchyNet, LitResNet, PointAnswers, Tuning
from lightning_modules.exit_outputs import ExitOutputs
from networks import CifarResNet, EarlyExit, ResNetWithExits, count_macs, count_params, early_exit
from networks.early_exit import ExitCosts
from running import CSVHistory, OperatingPoints, PredictionWriter


def network() -> ResNetWithExits:
    seed_everything(3, verbose=False)
    return ResNetWithExits(CifarResNet(8, in_channels=1), exits_after=[0, 2])


def make_trainer(folder: Path, num_epochs: int = 1, **arguments) -> Trainer:
    callbacks = [ExitStatistics(), OperatingPoints(), PredictionWriter()]
    defaults = {"max_epochs": num_epochs, "limit_train_batches": 8, "callbacks": callbacks}
    return quiet_trainer(folder, **(defaults | arguments))


def all_of(data: DigitsDataModule, split: str) -> tuple[Tensor, Tensor]:
    batches = [
        data.on_after_batch_transfer(batch, 0) for batch in getattr(data, f"{split}_dataloader")()
    ]
    return tuple(torch.cat(column) for column in zip(*batches, strict=True))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LitBranchyNet]:
    """Fits and tests once; the folder also holds `last.ckpt`."""
    folder = tmp_path_factory.mktemp("run")
    module = LitBranchyNet(network(), exit_thresholds=[2.1, 1.0])
    trainer = make_trainer(folder, num_epochs=3)
    data = DigitsDataModule(batch_size=64)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(folder / "last.ckpt")
    trainer.test(module, datamodule=data, verbose=False)
    return folder, module.eval()


def test_loss_is_the_weighted_sum_of_the_exits(tmp_path: Path) -> None:
    weights = [1.0, 0.3, 0.5]
    net = network().double()
    data = DigitsDataModule(batch_size=16)
    data.setup("fit")
    images, labels = all_of(data, "val")
    images = images[:16].double()
    seen = []
    module = LitBranchyNet(net, exit_loss_weights=weights)
    module.log_training = lambda loss, logits, labels, batch_idx: seen.append(logits)
    loss = module.training_step((images, labels[:16]), 0)
    loss.backward()
    joint = {name: p.grad.clone() for name, p in net.named_parameters()}

    total = {name: torch.zeros_like(grad) for name, grad in joint.items()}
    losses = [F.cross_entropy(logits, labels[:16]) for logits in net(images)]
    for weight, one in zip(weights, losses, strict=True):
        net.zero_grad()
        one.backward(retain_graph=True)
        for name, parameter in net.named_parameters():
            if parameter.grad is not None:
                total[name] += weight * parameter.grad
    expected = sum(weight * one.item() for weight, one in zip(weights, losses, strict=True))
    assert loss.item() == pytest.approx(expected)
    for name, grad in joint.items():
        torch.testing.assert_close(grad, total[name], rtol=1e-10, atol=1e-12)
    assert torch.equal(seen[0], net(images)[-1])  # the accuracy logged is that of the last exit


def test_stage_1_is_the_training_of_the_bare_trunk(tmp_path: Path) -> None:
    seed_everything(3, verbose=False)
    alone = LitResNet(CifarResNet(8, in_channels=1))
    stage_1 = LitBranchyNet(network(), exit_loss_weights=[0, 0, 1], optimizer=alone.optimizer)
    before = {name: value.clone() for name, value in stage_1.net.early_exits.state_dict().items()}
    trainers = []
    for module in (alone, stage_1):
        trainers.append(make_trainer(tmp_path, callbacks=[OperatingPoints()]))
        trainers[-1].fit(module, datamodule=DigitsDataModule(batch_size=64))
    for name, value in alone.net.state_dict().items():
        assert torch.equal(value, stage_1.net.trunk.state_dict()[name]), name
    for name, value in stage_1.net.early_exits.state_dict().items():
        assert torch.equal(value, before[name]), name
    # Plain DDP would wait for the gradients of what asks for them and is not run.
    assert not any(parameter.requires_grad for parameter in stage_1.net.early_exits.parameters())

    # Its table holds the trunk, and nothing of exits that are not trained.
    trainers[-1].test(stage_1, datamodule=DigitsDataModule(batch_size=64), verbose=False)
    (point,) = rows(tmp_path / "operating_points.csv")
    assert point["name"] == "full"
    assert int(point["params"]) == count_params(alone.net)
    assert int(point["macs"]) == count_macs(alone.net.eval(), torch.zeros(1, 1, 32, 32))


@pytest.mark.parametrize("stage_1", ["exits", "bare"])
def test_stage_2_starts_from_the_trunk(stage_1: str, tmp_path: Path) -> None:
    seed_everything(5, verbose=False)
    bare = CifarResNet(8, in_channels=1)
    source: LightningModule = LitResNet(bare)
    if stage_1 == "exits":
        source = LitBranchyNet(ResNetWithExits(bare, [0, 2]), exit_loss_weights=[0, 0, 1])
    trainer = make_trainer(tmp_path, callbacks=[])
    trainer.fit(source, datamodule=DigitsDataModule(batch_size=64))
    trainer.save_checkpoint(tmp_path / "trunk.ckpt")

    module = LitBranchyNet(network(), tuning=Tuning(str(tmp_path / "trunk.ckpt")))
    fresh = {name: value.clone() for name, value in module.net.early_exits.state_dict().items()}
    trainer = make_trainer(tmp_path, num_epochs=0, callbacks=[])
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=64))
    for name, value in bare.state_dict().items():
        assert torch.equal(value, module.net.trunk.state_dict()[name]), name
    # Those of stage 1 come along, though they have learnt nothing.
    expected = source.net.early_exits.state_dict() if stage_1 == "exits" else fresh
    for name, value in module.net.early_exits.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_resumed_run_does_not_look_at_the_trunk_again(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[])
    trainer.fit(
        LitResNet(CifarResNet(8, in_channels=1)), datamodule=DigitsDataModule(batch_size=64)
    )
    trunk = tmp_path / "trunk.ckpt"
    trainer.save_checkpoint(trunk)
    module = LitBranchyNet(network(), tuning=Tuning(str(trunk)))
    trainer = make_trainer(tmp_path, callbacks=[])
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=64))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trunk.unlink()
    resumed = LitBranchyNet(network(), tuning=Tuning(str(trunk)))
    trainer = make_trainer(tmp_path, num_epochs=2, callbacks=[])
    trainer.fit(
        resumed, datamodule=DigitsDataModule(batch_size=64), ckpt_path=tmp_path / "last.ckpt"
    )
    assert trainer.global_step == 16


def test_checkpoint_holds_the_thresholds_of_its_weights(trained) -> None:
    """The grid, tried point by point on the validation data, by images that really leave."""
    folder, module = trained
    data = DigitsDataModule()
    data.setup("fit")
    images, labels = all_of(data, "val")
    stored = torch.load(folder / "last.ckpt", weights_only=True)["exit_thresholds"]
    assert stored["points"].keys() == {"adaptive_lossless", "adaptive_knee", "adaptive_best"}
    assert stored["points"] == {k: v for k, v in module.exit_thresholds.items() if k != "adaptive"}

    def try_out(thresholds: list[float]) -> tuple[float, float]:
        logits, taken = early_exit(module.net, images, thresholds)
        cost = torch.tensor(module.exit_costs.leaving, dtype=torch.float64)[taken].mean().item()
        return (logits.argmax(1) == labels).double().mean().item(), cost

    curve = [try_out(thresholds) for thresholds in stored["curve"]]
    assert curve == sorted(curve)  # dearer is more accurate
    last = (module(images).argmax(1) == labels).double().mean().item()
    lossless = try_out(stored["points"]["adaptive_lossless"])
    assert lossless[0] >= last
    assert stored["points"]["adaptive_best"] == stored["curve"][-1]
    # Nothing in the whole grid is better than the front.
    grid = (0, 1e-4, 5e-4, 1e-3, 5e-3, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2, 3)
    for first in grid[::3]:
        for second in grid:
            accuracy, cost = try_out([first, second])
            assert any(a >= accuracy and c <= cost for a, c in curve)
            assert accuracy < last or cost >= lossless[1]


def test_operating_points_are_what_leaving_early_gives(trained) -> None:
    folder, module = trained
    data = DigitsDataModule()
    data.setup("test")
    images, labels = all_of(data, "test")
    points = {row["name"]: row for row in rows(folder / "operating_points.csv")}
    assert list(points)[:4] == ["exit1", "exit2", "full", "adaptive"]
    assert list(points)[4:] == ["adaptive_lossless", "adaptive_knee", "adaptive_best"]
    for name, thresholds in module.exit_thresholds.items():
        # One image after the other, each with a counter of its own.
        right, macs = 0, 0
        for image, label in zip(images.split(1), labels, strict=True):
            answers = []
            macs += count_macs(
                lambda x, t=thresholds, a=answers: a.append(early_exit(module.net, x, t)), image
            )
            right += int(answers[0].logits.argmax() == label)
        assert float(points[name]["test_acc"]) == pytest.approx(right / len(labels))
        assert int(points[name]["macs"]) == round(macs / len(labels))
        assert int(points[name]["params"]) == count_params(module.net)
    for index, name in enumerate(("exit1", "exit2", "full")):
        right = (module.net(images)[index].argmax(1) == labels).double().mean().item()
        assert float(points[name]["test_acc"]) == pytest.approx(right)
    # exit1: stem 16x9 + BN, linear 16x10; the other exits and stages are not there.
    assert int(points["exit1"]["params"]) == 16 * 9 + 2 * 16 + 16 * 10 + 10
    assert int(points["exit1"]["macs"]) == 16 * 9 * 32 * 32 + 160
    assert int(points["full"]["params"]) == count_params(module.net.trunk)


def test_statistics_of_the_exits(trained) -> None:
    folder, module = trained
    data = DigitsDataModule()
    data.setup("test")
    images, labels = all_of(data, "test")
    exits = module.net(images)
    exit_rows = rows(folder / "exits.csv")
    for name, thresholds in module.exit_thresholds.items():
        logits, taken = early_exit(module.net, images, thresholds)
        here = [row for row in exit_rows if row["point"] == name]
        assert [row["exit"] for row in here] == ["exit1", "exit2", "full"]
        for index, row in enumerate(here):
            left = taken == index
            assert float(row["share"]) == pytest.approx(left.double().mean().item())
            if left.any():
                right = (logits[left].argmax(1) == labels[left]).double().mean().item()
                assert float(row["acc"]) == pytest.approx(right)

    histogram = rows(folder / "exit_entropy.csv")
    assert float(histogram[-1]["to"]) == pytest.approx(math.log(10))
    for name, logits in zip(("exit1", "exit2", "full"), exits, strict=True):
        entropies = Categorical(logits=logits).entropy().detach()
        counts, _ = torch.histogram(entropies, bins=20, range=(0, math.log(10)))
        assert [float(row[name]) for row in histogram] == counts.tolist()

    speed = rows(folder / "exit_speed.csv")
    assert [row["branches"] for row in speed] == ["", *["run", "free"] * 4]
    trunk = count_macs(module.net.trunk, images[:1])
    right = (exits[-1].argmax(1) == labels).double().mean().item()
    assert float(speed[0]["test_acc"]) == pytest.approx(right)
    assert float(speed[0]["macs"]) == trunk
    for row in speed[1:]:
        thresholds = module.exit_thresholds[row["point"]]
        logits, taken = early_exit(module.net, images, thresholds)
        right = (logits.argmax(1) == labels).double().mean().item()
        assert float(row["test_acc"]) == pytest.approx(right)
        # 16 channels of 32x32 pixels: the stem, 2 blocks, then the trunk; exits are 16 to 10.
        stem, blocks = 16 * 9 * 32**2, 16 * 16 * 9 * 32**2 * 2 + (16 + 32) * 32 * 9 * 16**2
        paths = torch.tensor([stem, stem + blocks, trunk], dtype=torch.float64)
        if row["branches"] == "run":
            paths += torch.tensor([160, 160 + 320, 160 + 320])
        assert float(row["macs"]) == pytest.approx(paths[taken].mean().item())
        assert float(row["macs_gain"]) == pytest.approx(trunk / paths[taken].mean().item())
        assert float(row["ms_gain"]) == pytest.approx(
            float(speed[0]["ms_per_image"]) / float(row["ms_per_image"])
        )
    curve = rows(folder / "exit_curve.csv")
    for row, thresholds in zip(curve, module.exit_curve, strict=True):
        assert [float(row["threshold_exit1"]), float(row["threshold_exit2"])] == thresholds
        logits, taken = early_exit(module.net, images, thresholds)
        right = (logits.argmax(1) == labels).double().mean().item()
        assert float(row["test_acc"]) == pytest.approx(right)


def test_panels_show_the_curve_and_the_histograms(trained) -> None:
    _, module = trained
    curve, histogram = curve_rows(module), entropy_rows(module)
    logged = panels(wandb, module.exit_names, curve, [(0.5, 100.0, 2.0)], histogram)
    names = [f"exits/entropy_histogram_{name}" for name in ("exit1", "exit2", "full")]
    assert logged.keys() == {"exits/acc_against_macs", "exits/acc_against_ms", *names}
    assert logged["exits/acc_against_ms"].table.data == [[2.0, 0.5]]
    for column, name in enumerate(names, start=2):
        assert list(logged[name].histogram) == [row[column] for row in histogram]
    table = logged["exits/acc_against_macs"].table
    assert table.data == [[row[-1], row[-2]] for row in curve]


def test_trunk_alone_asks_no_exit_but_the_last(trained) -> None:
    _, module = trained
    seen = []
    hooks = [
        part.register_forward_hook(lambda *_, name=name: seen.append(name))
        for name, part in {
            "stem": module.net.trunk.conv1,
            "block": module.net.trunk.layer1[0],
            "last block": module.net.trunk.layer3[0],
            "exit": module.net.early_exits[0],
            "head": module.net.trunk.fc,
        }.items()
    ]
    paths = [path_to(module.net, index) for index in range(3)]
    trunk_only(paths, torch.tensor([0, 1, 2]))(torch.zeros(3, 1, 32, 32))
    for hook in hooks:
        hook.remove()
    assert seen == ["stem", "stem", "block", "stem", "block", "last block", "head"]


def test_shares_are_logged_after_every_validation(tmp_path: Path) -> None:
    data = DigitsDataModule(batch_size=64)
    module = LitBranchyNet(network())
    trainer = make_trainer(tmp_path, callbacks=[ExitStatistics()], num_sanity_val_steps=1)
    trainer.loggers = [CSVHistory(tmp_path / "metrics.csv")]
    trainer.fit(module, datamodule=data)
    (row,) = [row for row in rows(tmp_path / "metrics.csv") if row["exits/share_exit1"]]
    images, labels = all_of(data, "val")
    module.eval()
    logits, taken = early_exit(module.net, images, module.exit_thresholds["adaptive_lossless"])
    for index, (name, values) in enumerate(
        zip(("exit1", "exit2", "full"), module.net(images), strict=True)
    ):
        left = taken == index
        assert float(row[f"exits/share_{name}"]) == pytest.approx(left.double().mean().item())
        mean = Categorical(logits=values).entropy().mean().item()
        assert float(row[f"exits/entropy_{name}"]) == pytest.approx(mean, rel=1e-5)
        if left.any():
            right = (logits[left].argmax(1) == labels[left]).double().mean().item()
            assert float(row[f"exits/acc_{name}"]) == pytest.approx(right)
    assert row["step"] == "7"


def test_easiest_and_hardest_images_of_the_exits(trained) -> None:
    """Of those that leave there; their pixels are those that the steps got."""
    folder, module = trained
    data = DigitsDataModule()
    data.setup("test")
    images, labels = all_of(data, "test")
    thresholds = next(iter(module.exit_thresholds.values()))
    with torch.no_grad():
        logits, taken = early_exit(module.net, images, thresholds)
    entropies = Categorical(logits=logits).entropy()
    shown = rows(folder / "exit_images.csv")
    assert {row["file"] for row in shown} == {
        str(path.relative_to(folder)) for path in folder.glob("exit_images/*")
    }
    for index, name in enumerate(("exit1", "exit2", "full")):
        here = (taken == index).nonzero().flatten().tolist()
        here.sort(key=lambda image: entropies[image].item())
        num_easy = min(8, (len(here) + 1) // 2)
        num_hard = min(8, len(here) // 2)
        expected = {"easiest": here[:num_easy], "hardest": here[::-1][:num_hard]}
        for kind, chosen in expected.items():
            of_kind = [row for row in shown if (row["exit"], row["kind"]) == (name, kind)]
            assert [row["rank"] for row in of_kind] == [str(k + 1) for k in range(len(chosen))]
            for row, image in zip(of_kind, chosen, strict=True):
                assert float(row["score"]) == pytest.approx(entropies[image].item(), abs=1e-5)
                assert row["true"] == str(labels[image].item())
                assert row["predicted"] == str(logits[image].argmax().item())
                pixels = torch.from_numpy(np.array(Image.open(folder / row["file"])))[None, None]
                assert data.image_format.normalize(pixels)[0].equal(images[image])
    assert len(shown) >= 16


def test_images_of_the_exits_in_colour(tmp_path: Path) -> None:
    """Of two that one exit answers, the surer one is easiest; rank 0 has every second image."""
    pictures = torch.randint(256, (5, 3, 4, 6), dtype=torch.uint8)
    data = SimpleNamespace(
        image_shape=(3, 4, 6),
        class_names=["cat", "dog"],
        load_eval=lambda batches, split: iter([(pictures[batches[0]], None)]),
    )
    scores = torch.tensor([[0.6, 1.0], [0.9, 1.0], [0.0, 1.0], [0.0, 1.0]])
    labels, classes = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 0])
    answers = PointAnswers(labels, classes, scores[:, 0], labels == classes)
    module = SimpleNamespace(
        exit_thresholds={"adaptive": [0.5]},
        exits_taken=lambda thresholds: (scores[:, 0] < thresholds[0]).long(),
        exit_names=["exit1", "full"],
        exit_outputs=SimpleNamespace(scores=scores),
        exit_criterion="confidence",
        test_answers={"exit1": answers, "full": answers},
        net=SimpleNamespace(num_classes=2),
    )
    trainer = SimpleNamespace(datamodule=data, world_size=2)
    (tmp_path / "exit_images").mkdir()
    (tmp_path / "exit_images/old.png").touch()
    write_exit_images(trainer, module, 2, tmp_path / "exit_images.csv")
    easy, hard = rows(tmp_path / "exit_images.csv")
    assert list(easy.values())[:3] == ["exit1", "easiest", "1"]
    assert list(hard.values())[:3] == ["exit1", "hardest", "1"]
    assert (easy["true"], easy["predicted"], easy["score"]) == (
        "cat",
        "dog",
        str(scores[1, 0].item()),
    )
    for row, number in ((easy, 2), (hard, 0)):
        pixels = torch.from_numpy(np.array(Image.open(tmp_path / row["file"])))
        assert pixels.equal(pictures[number].movedim(0, 2))
    assert len(list(tmp_path.glob("exit_images/*"))) == 2


def test_images_of_data_that_knows_no_numbers_are_left_out(tmp_path: Path, caplog) -> None:
    trainer = SimpleNamespace(datamodule=LightningDataModule(), world_size=1)
    with caplog.at_level("INFO"):
        write_exit_images(trainer, None, 2, tmp_path / "exit_images.csv")
    assert "exit_images.csv is left out: LightningDataModule has no load_eval" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_testing_again_leaves_the_statistics_of_the_fit(trained, tmp_path: Path) -> None:
    folder, _ = trained
    fresh = LitBranchyNet(network(), exit_thresholds=[2.0, 2.0])
    trainer = make_trainer(tmp_path)
    for callback in trainer.callbacks:
        callback.again = True  # as the command `test` does
    trainer.test(
        fresh, datamodule=DigitsDataModule(), ckpt_path=folder / "last.ckpt", verbose=False
    )
    names = ("exits", "exit_entropy", "exit_curve", "exit_speed", "exit_images")
    assert all((tmp_path / f"{name}_again.csv").exists() for name in names)
    assert not any((tmp_path / f"{name}.csv").exists() for name in names)
    assert list(tmp_path.glob("exit_images_again/*.png"))
    assert not (tmp_path / "exit_images").exists()


def test_thresholds_of_another_criterion_are_not_used(trained, tmp_path: Path) -> None:
    folder, _ = trained
    fresh = LitBranchyNet(network(), exit_criterion="confidence")
    trainer = make_trainer(tmp_path)
    with pytest.warns(UserWarning, match="no thresholds of the confidence were found"):
        trainer.test(
            fresh, datamodule=DigitsDataModule(), ckpt_path=folder / "last.ckpt", verbose=False
        )
    assert fresh.exit_thresholds == {}


def test_trunk_alone_uses_no_thresholds_of_others(trained, tmp_path: Path) -> None:
    folder, _ = trained
    data = DigitsDataModule()
    trunk = LitBranchyNet(network(), exit_loss_weights=[0, 0, 1])
    arguments = {"datamodule": data, "ckpt_path": folder / "last.ckpt"}
    make_trainer(tmp_path).test(trunk, **arguments, verbose=False)
    (point,) = rows(tmp_path / "operating_points.csv")
    assert point["name"] == "full"
    make_trainer(tmp_path).predict(trunk, **arguments)
    assert not rows(tmp_path / "predictions.csv")[0]["exit"]


def test_stale_thresholds_warn(tmp_path: Path) -> None:
    data = DigitsDataModule(batch_size=64)
    module = LitBranchyNet(network())
    trainer = make_trainer(tmp_path, callbacks=[], val_check_interval=5)
    trainer.fit(module, datamodule=data)  # 8 steps, validated after 5
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer = make_trainer(tmp_path)
    with pytest.warns(UserWarning, match="were found 3 steps before this checkpoint"):
        trainer.predict(module, datamodule=data, ckpt_path=tmp_path / "last.ckpt")


def test_stage_1_is_not_resumed_as_stage_2(tmp_path: Path) -> None:
    data = DigitsDataModule(batch_size=64)
    trainer = make_trainer(tmp_path, callbacks=[])
    trainer.fit(LitBranchyNet(network(), exit_loss_weights=[0, 0, 1]), datamodule=data)
    trainer.save_checkpoint(tmp_path / "trunk.ckpt")
    trainer = make_trainer(tmp_path, num_epochs=2, callbacks=[])
    with pytest.raises(ValueError, match=r"give it as tuning\.weights"):
        trainer.fit(LitBranchyNet(network()), datamodule=data, ckpt_path=tmp_path / "trunk.ckpt")


def test_number_of_exits_is_limited_by_the_grid() -> None:
    """As many as are allowed are screened; one more is refused before the training."""
    trunk = CifarResNet(50)
    most = LitBranchyNet(ResNetWithExits(trunk, list(range(13))))
    outputs = ExitOutputs(torch.rand(50, 14), torch.rand(50, 14), torch.rand(50, 14) > 0.5)
    costs = ExitCosts([1] * 14, [1] * 14)
    assert len(most.find_thresholds(outputs, costs).points["adaptive_best"]) == 13
    with pytest.raises(ValueError, match="15 exits make a grid of thresholds that is too large"):
        LitBranchyNet(ResNetWithExits(trunk, list(range(14))))


def test_predict_says_which_exit_answered(trained, tmp_path: Path) -> None:
    folder, module = trained
    data = DigitsDataModule()
    data.setup("test")
    images, _ = all_of(data, "test")
    entropies = [Categorical(logits=logits).entropy() for logits in module.net(images)]
    halves = [values.median().item() for values in entropies[:2]]
    for given in (None, halves):
        fresh = LitBranchyNet(network(), exit_thresholds=given)
        trainer = make_trainer(tmp_path)
        trainer.predict(fresh, datamodule=data, ckpt_path=folder / "last.ckpt")
        thresholds = given or module.exit_thresholds["adaptive_lossless"]
        logits, taken = early_exit(module.net, images, thresholds)
        written = rows(tmp_path / "predictions.csv")
        assert [int(row["exit"]) for row in written] == (taken + 1).tolist()
        assert [int(row["class"]) for row in written] == logits.argmax(1).tolist()
        assert {row["point"] for row in written} == {"adaptive" if given else "adaptive_lossless"}
    assert taken.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("limit", [1.0, 3])
def test_predict_at_a_constant_batch_size(limit: float, trained, tmp_path: Path) -> None:
    """With `capture`, in the order of images, whatever comes when."""
    folder, module = trained
    data = DigitsDataModule(eval_batch_size=48)
    data.setup("test")
    images, labels = all_of(data, "test")
    images = images[: int(limit) * 48] if limit > 1 else images
    thresholds = [Categorical(logits=x).entropy().median().item() for x in module.net(images)[:2]]
    for _ in range(2):  # the second time with another stream
        fresh = LitBranchyNet(network(), exit_thresholds=thresholds)
        fresh.capture = "graphs"
        trainer = make_trainer(tmp_path, limit_predict_batches=limit)
        parts = trainer.predict(fresh, datamodule=data, ckpt_path=folder / "last.ckpt")
        logits, taken = early_exit(module.net, images, thresholds)
        written = rows(tmp_path / "predictions.csv")
        assert [int(row["exit"]) for row in written] == (taken + 1).tolist()
        assert [int(row["class"]) for row in written] == logits.argmax(1).tolist()
        assert [int(row["label"]) for row in written] == labels[: len(images)].tolist()
        probs = torch.cat([probs for probs, _ in parts])
        torch.testing.assert_close(probs, logits.softmax(1), rtol=1e-4, atol=1e-6)
        assert fresh._stream is None
    assert taken.unique().tolist() == [0, 1, 2]


def test_speed_is_measured_with_capture_too(trained, tmp_path: Path, monkeypatch) -> None:
    folder, _ = trained
    seen = []
    answer = EarlyExit.__call__
    monkeypatch.setattr(EarlyExit, "__call__", lambda *given: seen.append(1) or answer(*given))
    module = LitBranchyNet(network(), exit_thresholds=[2.1, 1.0])
    module.capture = "graphs"
    make_trainer(tmp_path).test(
        module, datamodule=DigitsDataModule(), ckpt_path=folder / "last.ckpt", verbose=False
    )
    assert len(seen) == (6 * 64 + 2) * 4  # rounds, images, two before, points
    columns = ("point", "branches", "test_acc", "macs")
    for old, new in zip(
        rows(folder / "exit_speed.csv"), rows(tmp_path / "exit_speed.csv"), strict=True
    ):
        assert [old[name] for name in columns] == [new[name] for name in columns]
        assert float(new["ms_per_image"]) > 0


def test_trunk_is_not_recorded_where_no_point_is(trained, monkeypatch) -> None:
    _, module = trained
    made = []
    recorded = exit_statistics.CapturedInference
    monkeypatch.setattr(
        exit_statistics, "CapturedInference", lambda *given: made.append(1) or recorded(*given)
    )
    monkeypatch.setattr(module, "capture", "graphs")
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert len(exit_statistics.speed_rows(module, images)) == 1 + 2 * 4
        assert len(made) == module.net.num_exits
        monkeypatch.setattr(LitBranchyNet, "exit_thresholds", {})
        assert len(exit_statistics.speed_rows(module, images)) == 1
    assert len(made) == module.net.num_exits


def test_without_validation_data_the_last_exit_answers(tmp_path: Path) -> None:
    data = DigitsDataModule(batch_size=64, val_size=0)
    module = LitBranchyNet(network())
    trainer = make_trainer(tmp_path)
    trainer.fit(module, datamodule=data)
    with pytest.warns(UserWarning, match="no thresholds of the entropy were found before this"):
        trainer.test(module, datamodule=data, verbose=False)
    names = [row["name"] for row in rows(tmp_path / "operating_points.csv")]
    assert names == ["exit1", "exit2", "full"]
    with pytest.warns(UserWarning, match="so no image leaves early: give exit_thresholds"):
        trainer.predict(module, datamodule=data)
    assert not rows(tmp_path / "predictions.csv")[0]["exit"]


def test_confidence_is_a_criterion_too(tmp_path: Path) -> None:
    data = DigitsDataModule(batch_size=64)
    module = LitBranchyNet(network(), exit_criterion="confidence")
    trainer = make_trainer(tmp_path)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    images, labels = all_of(data, "test")
    module.eval()
    for name, thresholds in module.exit_thresholds.items():
        logits, _ = early_exit(module.net, images, thresholds, "confidence")
        right = (logits.argmax(1) == labels).double().mean().item()
        assert trainer.callback_metrics[f"test/acc_{name}"].item() == pytest.approx(right)
