"""Training at many widths, and their evaluation: every number computed another way."""

import copy
import csv
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.plugins import MixedPrecision
from quiet import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from callbacks import BNRecalibration, RecalibrationSweep
from datamodules import DigitsDataModule
from lightning_modules import LitSlimmable, LitStochasticDepth, LitUniversallySlimmable
from networks import CifarResNet, SlimmableCifarResNet, count_macs, count_params, extract
from networks import recalibrate as recalibrate_by_hand
from running import AtomicCheckpointIO, OperatingPoints, RunCheckpoint

RANGE = (0.25, 1.0)


def network(**widths) -> SlimmableCifarResNet:
    seed_everything(3, verbose=False)
    return SlimmableCifarResNet(8, in_channels=1, **(widths or {"width_mult_range": RANGE}))


def make_trainer(folder: Path, **arguments) -> Trainer:
    defaults = {"limit_train_batches": 6, "callbacks": [BNRecalibration(256)]}
    return quiet_trainer(folder, **(defaults | arguments))


class Gradients(LightningModule):
    """Mixed into a method: keeps the gradients of each optimizer step, and leaves the weights."""

    def on_before_optimizer_step(self, optimizer) -> None:
        self.seen = {name: p.grad.clone() for name, p in self.net.named_parameters()}
        optimizer.zero_grad()


class DoubleDigits(DigitsDataModule):
    def on_after_batch_transfer(self, batch, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        images, labels = super().on_after_batch_transfer(batch, dataloader_idx)
        return images.double(), labels


class SeenSlimmable(Gradients, LitSlimmable):
    pass


class SeenUniversally(Gradients, LitUniversallySlimmable):
    pass


def first_batches(count: int, **arguments) -> list[tuple[Tensor, Tensor]]:
    data = DigitsDataModule(**arguments)
    data.setup("fit")
    batches = list(data.train_dataloader())[:count]
    return [data.on_after_batch_transfer(batch, 0) for batch in batches]


def all_test_batches() -> list[tuple[Tensor, Tensor]]:
    data = DigitsDataModule()
    data.setup("test")
    return [data.on_after_batch_transfer(batch, 0) for batch in data.test_dataloader()]


def gradients_of(module, folder: Path, accumulate: int = 1, **arguments) -> dict[str, Tensor]:
    trainer = make_trainer(
        folder,
        precision="64-true",
        limit_train_batches=accumulate,
        accumulate_grad_batches=accumulate,
        limit_val_batches=0,
        callbacks=[],
        **arguments,
    )
    trainer.fit(module, datamodule=DoubleDigits(batch_size=16))
    return module.seen


@pytest.mark.parametrize("distill", [True, False])
@pytest.mark.parametrize("nonuniform", [True, False])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_sandwich_step_is_the_sum_of_separate_ones(
    distill: bool, nonuniform: bool, accumulate: int, tmp_path: Path
) -> None:
    module = SeenUniversally(network(), inplace_distill=distill, nonuniform=nonuniform)
    seen = gradients_of(module, tmp_path, accumulate)
    widths = module.widths
    assert widths[:2] == [1.0, 0.25]
    assert len(widths) == 4
    net = network().double().train()
    total = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for images, labels in first_batches(accumulate, batch_size=16):
        images = images.double()
        teacher = net(images, 1.0).softmax(1).detach()
        for number, width in enumerate(widths):
            net.zero_grad()
            log_probs = net(images, width).log_softmax(1)
            if number and distill:
                loss = -(teacher * log_probs).sum(1).mean()
            else:
                loss = F.nll_loss(log_probs, labels)
            (loss / accumulate).backward()
            for name, parameter in net.named_parameters():
                total[name] += parameter.grad
    for name, grad in seen.items():
        torch.testing.assert_close(grad, total[name], rtol=1e-9, atol=1e-12)


def test_slimmable_step_is_the_sum_over_switches(tmp_path: Path) -> None:
    widths = {"width_mults": [0.25, 0.5, 1.0]}
    seen = gradients_of(SeenSlimmable(network(**widths)), tmp_path)
    net = network(**widths).double().train()
    ((images, labels),) = first_batches(1, batch_size=16)
    loss = sum(F.cross_entropy(net(images.double(), w), labels) for w in (1.0, 0.5, 0.25))
    loss.backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("accumulate", "capture"), [(1, "none"), (3, "graphs")])
def test_gradient_is_clipped_once_and_as_a_whole(
    accumulate: int, capture: str, tmp_path: Path
) -> None:
    """Of all widths and batches of a step, recorded or not, as `test_sandwich_step` sums them."""
    module = SeenUniversally(network())
    whole = gradients_of(module, tmp_path, accumulate)
    norm = torch.cat([grad.flatten() for grad in whole.values()]).norm()

    class Clipped(SeenUniversally):
        def on_before_zero_grad(self, optimizer) -> None:
            """Lightning clips after `on_before_optimizer_step`."""

        def on_before_optimizer_step(self, optimizer) -> None:
            pass

        def configure_gradient_clipping(self, optimizer, *args, **kwargs) -> None:
            super().configure_gradient_clipping(optimizer, *args, **kwargs)
            self.seen = {name: p.grad.clone() for name, p in self.net.named_parameters()}

    module = Clipped(network())
    module.capture = capture
    clipped = gradients_of(module, tmp_path, accumulate, gradient_clip_val=float(norm / 2))
    assert any(run.chain is not None for run in module._recorded.values()) == (capture != "none")
    for name, grad in whole.items():
        torch.testing.assert_close(clipped[name], grad / 2, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_losses_of_mixed_precision_are_scaled_alike(precision: str, tmp_path: Path) -> None:
    """Each backward has to scale its loss, all of them by the factor that is then divided out."""
    whole = gradients_of(SeenUniversally(network()), tmp_path)
    module = SeenUniversally(network())
    scaler = torch.amp.GradScaler("cpu", init_scale=4096) if precision == "16-mixed" else None
    make_trainer(
        tmp_path,
        limit_train_batches=1,
        limit_val_batches=0,
        callbacks=[],
        plugins=[AtomicCheckpointIO(), MixedPrecision(precision, "cpu", scaler)],
    ).fit(module, datamodule=DigitsDataModule(batch_size=16))
    exact, rounded = (
        torch.cat([grad.flatten() for grad in grads.values()]) for grads in (whole, module.seen)
    )
    # No loss is left out, doubled, or scaled by another factor.
    assert (rounded - exact).norm() / exact.norm() < 0.1


def test_widths_are_drawn_by_seed_and_step() -> None:
    drawn = []
    for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0)):
        module = LitUniversallySlimmable(network(), num_widths=6, seed=seed)
        type(module).global_step = step
        drawn.append(module.draw_widths())
    del type(module).global_step
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert drawn[0] != drawn[3]
    assert all(len(widths) == 6 and all(0.25 <= w <= 1 for w in widths) for widths in drawn)


def test_random_widths_are_uniform_over_the_range() -> None:
    module = LitUniversallySlimmable(
        network(), num_widths=2, width_rule="random", inplace_distill=False, nonuniform=True
    )
    widths = []
    for step in range(300):
        type(module).global_step = step
        widths += [ratio for width in module.draw_widths() for ratio in width]
    del type(module).global_step
    widths = torch.tensor(widths).sub(0.25).div(0.75).sort().values
    uniform = torch.linspace(0, 1, len(widths))
    # Kolmogorov-Smirnov at a level of about 1e-4.
    assert (widths - uniform).abs().max() < 2.2 / len(widths) ** 0.5


def test_weight_decay_spares_bn_biases_and_depthwise() -> None:
    decayed, spared = LitUniversallySlimmable(network()).optimized_parameters()
    net = LitUniversallySlimmable(network()).net
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(decayed["params"]) == len(convs) + 1
    assert "weight_decay" not in decayed
    assert spared["weight_decay"] == 0
    assert all(parameter.dim() == 1 for parameter in spared["params"])
    total = sum(p.numel() for group in (decayed, spared) for p in group["params"])
    assert total == count_params(net)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LitUniversallySlimmable]:
    folder = tmp_path_factory.mktemp("run")
    module = LitUniversallySlimmable(network(), eval_widths=[0.25, 0.6, 1.0])
    data = DigitsDataModule(batch_size=64)
    trainer = make_trainer(folder)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(folder / "last.ckpt")
    make_trainer(folder, callbacks=[OperatingPoints()]).test(module, datamodule=data, verbose=False)
    return folder, module.eval()


def test_statistics_of_a_fit_are_those_of_training_images(trained) -> None:
    _, module = trained
    net = network()
    net.load_state_dict(module.net.state_dict())
    data = DigitsDataModule(batch_size=64)
    data.setup("fit")
    # The first 256 of the epoch, augmented.
    images = [data.on_after_batch_transfer(batch, 0)[0] for batch in list(data.train_epoch(0))[:4]]
    runs = [partial(net, width_mult=width) for width in (0.25, 0.6, 1.0)]
    recalibrate_by_hand(net, images, runs)
    for one, other in zip(net.modules(), module.net.modules(), strict=True):
        for name, values in getattr(one, "statistics", {}).items():
            torch.testing.assert_close(values, other.statistics[name], rtol=1e-3, atol=1e-4)


def test_widths_are_operating_points(trained) -> None:
    folder, module = trained
    images, labels = (torch.cat(column) for column in zip(*all_test_batches(), strict=True))
    with (folder / "operating_points.csv").open(newline="") as file:
        points = {row["name"]: row for row in csv.DictReader(file)}
    assert list(points) == ["w0.25", "w0.6", "full"]
    for name, width in (("w0.25", 0.25), ("w0.6", 0.6), ("full", 1.0)):
        narrow = extract(module.net, width)
        right = (narrow(images).argmax(1) == labels).double().mean().item()
        assert float(points[name]["test_acc"]) == pytest.approx(right)
        assert int(points[name]["macs"]) == count_macs(narrow, images[:1])
        assert int(points[name]["params"]) == count_params(narrow)


def test_network_of_a_checkpoint_can_be_cut(trained) -> None:
    """As the README does it."""
    folder, module = trained
    state = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    net = network()
    net.load_state_dict({key.removeprefix("net."): value for key, value in state.items()})
    images = torch.randn(4, 1, 32, 32)
    torch.testing.assert_close(
        extract(net, 0.25)(images), extract(module.net, 0.25)(images), rtol=0, atol=0
    )


def test_width_that_was_not_calibrated(trained, tmp_path: Path) -> None:
    """Without the callback an error that says what to do; with it, it is done."""
    folder, _ = trained
    data = DigitsDataModule(batch_size=64)
    arguments = {"datamodule": data, "ckpt_path": folder / "last.ckpt"}
    module = LitUniversallySlimmable(network(), eval_widths=[0.3, 1.0])
    with pytest.raises(ValueError, match=r"width 0\.3 has no BN statistics"):
        make_trainer(tmp_path, callbacks=[]).test(module, **arguments, verbose=False)
    assert module.uncalibrated_points() == ["w0.3"]
    full = module.net.units[0].norm.statistics["1"].clone()
    make_trainer(tmp_path).test(module, **arguments, verbose=False)
    assert module.uncalibrated_points() == []
    assert torch.equal(module.net.units[0].norm.statistics["1"], full)


def test_widths_besides_the_evaluated_ones(tmp_path: Path) -> None:
    """As many batches as asked for; the checkpoint can run widths that were never evaluated."""
    module = LitUniversallySlimmable(network(), eval_widths=[1.0, 0.25, 1.0])
    assert module.eval_widths == [0.25, 1.0]
    data = DigitsDataModule(batch_size=64)
    callbacks = [BNRecalibration(num_batches=2, widths=[0.4])]
    make_trainer(tmp_path, callbacks=callbacks).fit(module, datamodule=data)
    net = network()
    net.load_state_dict(module.net.state_dict())
    images = [data.on_after_batch_transfer(batch, 0)[0] for batch in list(data.train_epoch(0))[:2]]
    for width in (0.25, 0.4, 1.0):
        recalibrate_by_hand(net, images, [partial(net, width_mult=width)])
        for one, other in zip(net.modules(), module.net.modules(), strict=True):
            if hasattr(one, "statistics"):
                values = [norm.statistics[f"{width:g}"] for norm in (one, other)]
                torch.testing.assert_close(*values, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: LitUniversallySlimmable(network()), "width 0.1 is outside the range 0.25 to 1"),
        (lambda: LitStochasticDepth(CifarResNet(8, in_channels=1)), "and this is a CifarResNet"),
    ],
)
def test_widths_that_the_network_does_not_have(module, message: str, tmp_path: Path) -> None:
    callbacks = [BNRecalibration(widths=[0.1])]
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, callbacks=callbacks).fit(module(), datamodule=DigitsDataModule())


@pytest.mark.slow
def test_sweep_tells_what_recalibration_is_worth(tmp_path: Path) -> None:
    module = LitUniversallySlimmable(network(), eval_widths=[0.25, 0.6, 1.0])
    data = DigitsDataModule(batch_size=64)
    make_trainer(tmp_path, max_epochs=3, limit_train_batches=1.0).fit(module, datamodule=data)
    before = copy.deepcopy(module.net.state_dict())
    callbacks = [RecalibrationSweep(num_images=[96])]
    make_trainer(tmp_path, callbacks=callbacks).test(module, datamodule=data, verbose=False)
    after = module.net.state_dict()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0)

    net = network()
    net.load_state_dict(before)
    images, labels = (torch.cat(column) for column in zip(*all_test_batches(), strict=True))

    def accuracies() -> list[float]:
        narrow = [extract(net, width) for width in (0.25, 0.6, 1.0)]
        return [(run(images).argmax(1) == labels).double().mean().item() for run in narrow]

    for norm in net.modules():
        if hasattr(norm, "statistics"):
            for name in ("0.25", "0.6"):
                channels = norm.statistics[name].shape[1]
                norm.statistics[name] = norm.statistics["1"][:, :channels]
    expected = {"of the widest": accuracies()}
    assert expected["of the widest"][0] < expected["of the widest"][2] - 0.1
    first = [data.on_after_batch_transfer(batch, 0)[0] for batch in data.train_epoch(0)][:2]
    batches = [first[0], first[1][:32]]
    recalibrate_by_hand(net, batches, [partial(net, width_mult=w) for w in (0.25, 0.6, 1.0)])
    expected["96 images"] = accuracies()
    with (tmp_path / "recalibration.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["w0.25", "w0.6", "full"]
    for title, values in expected.items():
        assert [float(row[title]) for row in rows] == pytest.approx(values, abs=1.5 / 360)


def test_full_is_the_whole_network() -> None:
    """Whichever widths are asked for: a narrow one is never called full."""
    module = LitUniversallySlimmable(network(), eval_widths=[0.3, 0.6])
    assert list(module.operating_points()) == ["w0.3", "w0.6", "full"]
    module = LitSlimmable(network(width_mults=[0.25, 0.5]), eval_widths=[0.25])
    assert module.eval_widths == [0.25, 0.5]


def test_sweep_needs_shared_bns(tmp_path: Path) -> None:
    module = LitSlimmable(network(width_mults=[0.5, 1.0]))
    trainer = make_trainer(tmp_path, callbacks=[RecalibrationSweep()])
    with pytest.raises(ValueError, match="nothing to recalibrate of LitSlimmable: remove it"):
        trainer.test(module, datamodule=DigitsDataModule(), verbose=False)


@pytest.mark.parametrize("num_images", [[], [0], [64, -1]])
def test_sweep_needs_images(num_images: list[int]) -> None:
    """Statistics of no images are NaN."""
    with pytest.raises(ValueError, match=r"give (one number|whole numbers)"):
        RecalibrationSweep(num_images)


def test_without_validation_the_last_checkpoint_is_calibrated(tmp_path: Path) -> None:
    module = LitUniversallySlimmable(network(), eval_widths=[0.5, 1.0])
    callbacks = [BNRecalibration(256), RunCheckpoint(select="last")]
    trainer = make_trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=64, val_size=0))
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    net = network()
    net.load_state_dict({key.removeprefix("net."): value for key, value in state.items()})
    assert net.is_calibrated(0.5)
    assert net.is_calibrated(1.0)


def test_recalibrated_network_can_be_differentiated(trained) -> None:
    """Statistics that were gathered in Lightning's inference mode are ordinary tensors."""
    _, module = trained
    module.net(torch.zeros(1, 1, 32, 32), 0.25).sum().backward()


def test_other_networks_are_recalibrated_too(tmp_path: Path) -> None:
    """Stochastic depth: with all blocks, scaled by their survival probabilities."""
    seed_everything(3, verbose=False)
    module = LitStochasticDepth(CifarResNet(8, in_channels=1))
    data = DigitsDataModule(batch_size=64)
    make_trainer(tmp_path, limit_val_batches=1).fit(module, datamodule=data)
    net = CifarResNet(8, in_channels=1)
    net.load_state_dict(module.net.state_dict())
    images = [data.on_after_batch_transfer(batch, 0)[0] for batch in list(data.train_epoch(0))[:4]]
    recalibrate_by_hand(net, images, [partial(net, gates=module.survival_probs)])
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, module.net.state_dict()[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: LitUniversallySlimmable(network(), num_widths=1),
            "num_widths is 1: give a",
        ),
        (
            lambda: LitUniversallySlimmable(network(), width_rule="random"),
            "inplace_distill needs the widest width",
        ),
        (lambda: LitUniversallySlimmable(network(), eval_widths=[0.1]), "width 0.1 is outside"),
        (lambda: LitSlimmable(network()), "needs the network's width_mults"),
        (
            lambda: LitUniversallySlimmable(network(width_mults=[0.5, 1.0])),
            "needs the network's width_mult_range",
        ),
        (
            lambda: LitSlimmable(network(width_mults=[0.5, 1.0]), eval_widths=[0.7]),
            "width 0.7 is none of 0.5, 1",
        ),
        (lambda: LitUniversallySlimmable(network(), eval_widths=[]), "eval_widths is empty"),
        (lambda: BNRecalibration(0), "num_images is 0: give a whole number"),
        (lambda: BNRecalibration(num_batches=-1), "num_batches is -1: give a whole number"),
        (lambda: BNRecalibration(64, 1), "num_images or num_batches: give one of them"),
    ],
)
def test_mistakes_are_named(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_no_data_module_is_named(tmp_path: Path) -> None:
    module = LitUniversallySlimmable(network())
    images = TensorDataset(torch.zeros(8, 1, 32, 32), torch.zeros(8, dtype=torch.long))
    with pytest.raises(ValueError, match="needs training images: give a data module"):
        make_trainer(tmp_path).validate(module, DataLoader(images), verbose=False)
