"""Where a training starts from, what of a network it changes, and how fast; for every method."""

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import launch
import methods
import pytest
import timm.optim
import torch
import yaml
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from quiet import quiet_trainer
from test_cli import assert_one_line, change
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, MultiStepLR, OneCycleLR

from callbacks import BNRecalibration, GradientMagnitudeLogger
from datamodules import DigitsDataModule
from lightning_modules import ImageClassifier, LitBranchyNet, LitResNet, LitStochasticDepth, Tuning
from networks import CifarResNet, ResNetWithExits
from running.experiment import evaluated, trained

FIRST = {
    "densenet": "features",
    "msdnet": "stem",
    "branchynet": "trunk.layer1",
    "branchynet_calibrated": "trunk.layer1",
    "convnext": "features.1",
    "slimmable": "units.1",
    "universally_slimmable": "units.1",
    "slimmable_exits": "trunk.units.0",
    "vision_transformer": "encoder.layers.encoder_layer_0",
    "with_exits": "network.blocks.0",
}
"""A part of each method's network, with a BN if it has any; `layer1` of the others."""


WITH_BN = methods.METHODS.keys() - {"vision_transformer", "convnext"}


def part_of(method: str) -> str:
    return FIRST.get(method, "layer1")


def module_of(method: str, **tuning: Any) -> ImageClassifier:
    seed_everything(7, verbose=False)
    spec = copy.deepcopy(methods.METHODS[method])
    spec["init_args"]["tuning"] = Tuning(**tuning)
    return methods.build(spec)


def state_of(module: ImageClassifier) -> dict[str, Any]:
    return copy.deepcopy(dict(module.net.state_dict()))


def fit(module: ImageClassifier, folder: Path, **arguments: Any) -> Trainer:
    defaults = {"limit_train_batches": 3, "limit_val_batches": 0}
    trainer = quiet_trainer(folder, **(defaults | arguments))
    ckpt_path = arguments.get("ckpt_path")
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=32), ckpt_path=ckpt_path)
    return trainer


# --- frozen ---------------------------------------------------------------------------------------

FREEZABLE = [name for name in methods.METHODS if name not in methods.OF_ANY_WIDTH]


@pytest.mark.parametrize("method", FREEZABLE)
@pytest.mark.parametrize("capture", ["none", "graphs"])
def test_what_is_frozen_stays_and_the_rest_moves(method: str, capture: str, tmp_path: Path) -> None:
    """Weights, momentum, weight decay and statistics; on a CPU a capture calls the parts again."""
    part = part_of(method)
    module = module_of(method, freeze=[part])
    module.capture = capture
    before = state_of(module)
    trainer = fit(module, tmp_path, limit_val_batches=1)
    frozen = [key for key in before if key.startswith(f"{part}.")]
    assert any("running_mean" in key for key in frozen) or method not in WITH_BN
    for key, value in module.net.state_dict().items():
        assert key not in frozen or torch.equal(value, before[key]), key
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    for name, parameter in module.net.named_parameters():
        assert (id(parameter) in optimized) == (name not in frozen), name
        assert name in frozen or not torch.equal(parameter, before[name]), name
    if capture != "none":
        assert any(run.chain is not None for run in module._recorded.values())


@pytest.mark.parametrize("method", FREEZABLE)
def test_frozen_modules_are_still_whatever_is_asked(method: str, tmp_path: Path) -> None:
    part = part_of(method)
    module = module_of(method, freeze=[part])
    module.eval().train()
    for name, each in module.net.named_modules():
        assert each.training == (name != part and not name.startswith(f"{part}.")), name

    class Looks(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_) -> None:
            assert not pl_module.net.get_submodule(part).training
            assert pl_module.net.training
            seen.append(trainer.current_epoch)

    seen: list[int] = []
    for each in module.modules():
        each.training = True  # as it is made
    fit(module, tmp_path, max_epochs=2, limit_val_batches=1, callbacks=[Looks()])
    assert seen == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("method", ["resnet", "stochastic_depth", "branchynet", "slimmable"])
def test_capture_of_a_network_with_frozen_parts_is_eager_code(method: str, tmp_path: Path) -> None:
    """The stem, whose part has no parameters then; or all that one of the exits is made of."""
    part = {"branchynet": "trunk", "slimmable": "units.0"}.get(method, "conv1")
    results = []
    for capture in ("none", "graphs"):
        module = module_of(method, freeze=[part])
        module.capture = capture
        fit(module, tmp_path)
        results.append(state_of(module))
        if capture != "none":
            assert all(run.chain is not None for run in module._recorded.values())
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_gradients_of_what_is_not_frozen_are_those_of_frozen_statistics() -> None:
    """By torch alone: a network whose BNs were set to evaluate by hand."""
    module = module_of("resnet", freeze=["layer1", "*.bn2"])
    module.train()
    by_hand = copy.deepcopy(module.net).train()
    for name, each in by_hand.named_modules():
        if name.startswith("layer1") or name.endswith(".bn2"):
            each.eval()
    images = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module.net(images), by_hand(images))
    module.net(images).sum().backward()
    for name, parameter in module.net.named_parameters():
        is_frozen = name.startswith("layer1") or ".bn2." in name
        assert (parameter.grad is None) == is_frozen, name


def test_parameters_are_frozen_one_by_one() -> None:
    """A BN rests only if all that it learns is frozen."""
    net = module_of("resnet", freeze=["layer1.0.bn1.weight", "layer1.0.bn2.*"]).train().net
    names = {name for name, p in net.named_parameters() if not p.requires_grad}
    assert names == {"layer1.0.bn1.weight", "layer1.0.bn2.weight", "layer1.0.bn2.bias"}
    assert [name for name, each in net.named_modules() if not each.training] == ["layer1.0.bn2"]


def test_closed_blocks_move_and_frozen_ones_do_not(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    module = LitStochasticDepth(
        CifarResNet(8, in_channels=1), 0.01, "uniform", tuning=Tuning(freeze=["layer2"])
    )
    before = state_of(module)
    fit(module, tmp_path)
    after = module.net.state_dict()
    assert torch.equal(after["layer2.0.conv1.weight"], before["layer2.0.conv1.weight"])
    # Weight decay alone, in blocks that hardly ever run.
    assert not torch.equal(after["layer3.0.conv1.weight"], before["layer3.0.conv1.weight"])


BAD = {
    "everything": ({"freeze": ["*"]}, "every part of the network is frozen: leave one out"),
    "unknown part": (
        {"freeze": ["layer9"]},
        "tuning.freeze names 'layer9', which no part of CifarResNet is called: use layer",
    ),
    "unknown part with a rate": (
        {"lr_factors": {"head": 0.1}},
        "tuning.lr_factors names 'head', which no part of CifarResNet is called: use ",
    ),
    "factor of 0": (
        {"lr_factors": {"fc": 0.0}},
        "tuning.lr_factors of fc is 0.0: give a number above 0, or name it in tuning.freeze",
    ),
    "two factors": (
        {"lr_factors": {"layer1.*": 0.1, "layer1": 0.2}},
        "give layer1.0.conv1.weight two factors: drop one",
    ),
    "no file": ({"weights": "no.ckpt"}, "there is no file of weights no.ckpt: correct tuning.wei"),
    "no weights": ({"weights": "experiment.yaml"}, "experiment.yaml is not a file of weights"),
    "no run": ({"weights": "."}, ". is no run folder: it holds no config.yaml"),
    "unknown name": (
        {"weights": "ResNet_Weights.IMAGENET1K_V1"},
        "torchvision has no weights ResNet_Weights.IMAGENET1K_V1: use ResNe",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_mistake_is_one_line(name: str, tmp_path: Path) -> None:
    tuning, message = BAD[name]
    experiment(tmp_path, tuning=tuning)
    assert_one_line(*launch.run(COMMAND, tmp_path), message)
    assert not (tmp_path / "run/last.ckpt").exists()


def test_statistics_that_are_frozen_are_not_recalibrated(tmp_path: Path) -> None:
    module = module_of("resnet", freeze=["layer1"])
    with pytest.raises(ValueError, match=r"layer1\.0\.bn1 is frozen, and BNRecalibration would"):
        fit(module, tmp_path, callbacks=[BNRecalibration()])
    module = module_of("universally_slimmable", freeze=["units.1"])
    with pytest.raises(ValueError, match=r"units\.1\..* is frozen, and has no statistics of"):
        fit(module, tmp_path)
    fit(module_of("universally_slimmable", freeze=["*.conv.weight"]), tmp_path)
    with pytest.raises(ValueError, match="the first convolution, which is frozen: remove it"):
        fit(module_of("resnet", freeze=["conv1"]), tmp_path, callbacks=[GradientMagnitudeLogger()])


# --- rates and decay ------------------------------------------------------------------------------


def optimizer_of(module: ImageClassifier, scheduler: Any = None) -> Any:
    module.optimizer = partial(SGD, lr=0.4, weight_decay=1e-4)
    module.lr_scheduler = scheduler
    module._trainer = Trainer(max_epochs=4, logger=False, enable_checkpointing=False)
    made = module.configure_optimizers()
    return made["optimizer"] if isinstance(made, dict) else made


def rates(module: ImageClassifier, optimizer: Any) -> dict[str, tuple[float, float]]:
    of = {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    return {name: of[id(p)] for name, p in module.net.named_parameters() if id(p) in of}


@pytest.mark.parametrize("method", methods.METHODS)
def test_parts_have_rates_of_their_own(method: str) -> None:
    part = part_of(method)
    plain = module_of(method)
    before = rates(plain, optimizer_of(plain))
    module = module_of(method, lr_factors={"*": 0.5, part: 0.25})
    optimizer = optimizer_of(module)
    for name, (rate, decay) in rates(module, optimizer).items():
        assert rate == (0.1 if name.startswith(f"{part}.") else 0.2), name
        assert decay == before[name][1], name
    assert not any("lr_factor" in group for group in optimizer.param_groups)
    assert len(optimizer.param_groups) == (4 if "slimmable" in method else 2)


@pytest.mark.parametrize("factors", [{"*": 0.5, "layer1": 0.1}, {"layer1": 0.1, "*": 0.5}])
def test_order_of_factors_is_none(factors: dict[str, float]) -> None:
    """A YAML may be written down in another order."""
    module = module_of("resnet", lr_factors=factors)
    assert rates(module, optimizer_of(module))["layer1.0.conv1.weight"][0] == pytest.approx(0.04)


def test_schedules_keep_the_ratios() -> None:
    for make in (partial(MultiStepLR, milestones=[1]), partial(CosineAnnealingLR, T_max=4)):
        module = module_of("resnet", lr_factors={"fc": 3.0})
        optimizer = optimizer_of(module, make)
        scheduler = module.configure_optimizers()["lr_scheduler"]["scheduler"]
        optimizer = scheduler.optimizer
        for _ in range(3):
            optimizer.step()
            scheduler.step()
            slow, fast = (group["lr"] for group in optimizer.param_groups)
            assert fast == pytest.approx(3 * slow)
            assert 0 < slow < 0.4


@pytest.mark.parametrize(
    "make",
    [
        partial(OneCycleLR, max_lr=0.1, total_steps=4),
        partial(CyclicLR, base_lr=0.1, max_lr=0.2),
        partial(CosineAnnealingLR, T_max=4, eta_min=0.01),
    ],
)
def test_schedules_that_level_rates_are_refused(make: Any) -> None:
    module = module_of("resnet", lr_factors={"fc": 3.0})
    with pytest.raises(ValueError, match=r"whatever tuning\.lr_factors say: "):
        optimizer_of(module, make)
    optimizer_of(module_of("resnet"), make)  # without factors it is right


@pytest.mark.parametrize("method", methods.METHODS)
def test_norms_and_biases_without_decay_are_those_of_timm(method: str) -> None:
    module = module_of(method, decay_norm_and_bias=False)
    decays = {name: decay for name, (_, decay) in rates(module, optimizer_of(module)).items()}
    spared, decayed = timm.optim.param_groups_weight_decay(module.net, 1e-4)
    by_timm = {id(p) for p in decayed["params"]}
    names = {name for name, p in module.net.named_parameters() if id(p) in by_timm}
    assert {name for name, decay in decays.items() if decay} == names
    assert spared["params"]
    everything = module_of(method, decay_norm_and_bias=True)
    assert {d for _, d in rates(everything, optimizer_of(everything)).values()} == {1e-4}


# --- runs -----------------------------------------------------------------------------------------

COMMAND = ["fit", "-c", "experiment.yaml", "--run_dir", "run"]


def experiment(folder: Path, method: str = "resnet", **init: Any) -> None:
    config = methods.config(method)
    config["model"]["init_args"] |= init
    config["trainer"] |= {"callbacks": None, "max_epochs": 2}
    folder.mkdir(exist_ok=True)
    (folder / "experiment.yaml").write_text(yaml.safe_dump(config))


TRUNK = {"depth": 8, "num_classes": 10, "in_channels": 1}
EXITS = {
    "class_path": "networks.ResNetWithExits",
    "init_args": {
        "trunk": {"class_path": "networks.CifarResNet", "init_args": TRUNK},
        "exits_after": [0, 2],
    },
}


def weights_in(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "run/last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.slow
def test_exits_on_a_frozen_trunk_are_a_yaml(tmp_path: Path) -> None:
    """From a run's folder; killed and gone on with, after that folder is gone, to the same bits."""
    experiment(tmp_path / "trunk")
    assert launch.run(COMMAND, tmp_path / "trunk")[0] == 0
    best = torch.load(tmp_path / "trunk/run/best.ckpt", weights_only=True)["state_dict"]
    tuning = {"weights": "../trunk/run", "freeze": ["trunk"], "lr_factors": {"early_exits.0": 0.5}}
    for name in ("whole", "broken"):
        experiment(tmp_path / name, "branchynet", net=EXITS, tuning=tuning)
    status, output = launch.run(COMMAND, tmp_path / "whole")
    assert status == 0, output
    assert "weights of ../trunk/run: 44 tensors loaded; new early exits: early_exits.0.2" in output
    after = weights_in(tmp_path / "whole")
    for key, value in best.items():
        assert torch.equal(after[key.replace("net.", "net.trunk.")], value), key

    assert launch.kill_after_save(COMMAND, tmp_path / "broken")
    (tmp_path / "trunk").rename(tmp_path / "gone")
    status, output = launch.run(COMMAND, tmp_path / "broken")
    assert status == 0, output
    assert "weights of" not in output
    torch.testing.assert_close(weights_in(tmp_path / "broken"), after, rtol=0, atol=0)

    # What it starts from is part of the experiment, and nothing that a test needs.
    other = "--model.init_args.tuning.weights=elsewhere.pt"
    status, output = launch.run([*COMMAND, other], tmp_path / "broken")
    assert_one_line(status, output, "tuning.weights is ../trunk/run there and elsewhere.pt here")
    assert launch.run(["test", *COMMAND[1:], other], tmp_path / "broken")[0] == 0
    # A checkpoint of nobody goes on, or weights start anew.
    (tmp_path / "broken/run/last.ckpt").rename(tmp_path / "broken/alone.ckpt")
    command = [*COMMAND[:-1], "run2", "--ckpt_path=alone.ckpt"]
    status, output = launch.run(command, tmp_path / "broken")
    assert_one_line(status, output, "--ckpt_path alone.ckpt goes on from there, and tuning.weights")


def test_two_ranks_tune_alike(tmp_path: Path) -> None:
    torch.save(CifarResNet(8, num_classes=7, in_channels=1).state_dict(), tmp_path / "w.pt")
    tuning = {"weights": "w.pt", "freeze": ["conv1", "layer1"], "lr_factors": {"fc": 2.0}}
    experiment(tmp_path, "stochastic_depth", tuning=tuning)
    config = yaml.safe_load((tmp_path / "experiment.yaml").read_text())
    change(config, "trainer.callbacks", [{"class_path": "ddp_probe.RanksAgree"}])
    config["trainer"] |= {"devices": 2, "strategy": "ddp_fork_find_unused_parameters_true"}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(config))
    status, output = launch.run(COMMAND, tmp_path)
    assert status == 0, output
    assert '"same_weights": true' in (tmp_path / "run/agreement.json").read_text()
    assert output.count("new, for another number of classes: fc.weight, fc.bias") == 1
    given, after = torch.load(tmp_path / "w.pt"), weights_in(tmp_path)
    for key, value in given.items():
        is_frozen = key.startswith(("conv1", "layer1"))
        if key.endswith("weight") and not key.startswith("fc"):
            assert torch.equal(after[f"net.{key}"], value) == is_frozen, key


def test_weights_are_read_once_and_never_by_a_run_that_goes_on(tmp_path: Path) -> None:
    torch.save(CifarResNet(8, in_channels=1).state_dict(), tmp_path / "w.pt")
    seen = []

    def read(source: str) -> dict[str, Tensor]:
        seen.append(source)
        return torch.load(source)

    module = LitResNet(CifarResNet(8, in_channels=1), tuning=Tuning(str(tmp_path / "w.pt")))
    module.read_weights = read
    trainer = fit(module, tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert len(seen) == 1
    after = state_of(module)
    fit(module, tmp_path, max_epochs=0)
    torch.testing.assert_close(state_of(module), after, rtol=0, atol=0)
    resumed = LitResNet(CifarResNet(8, in_channels=1), tuning=Tuning(str(tmp_path / "w.pt")))
    resumed.read_weights = read
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=3)
    trainer.fit(resumed, DigitsDataModule(batch_size=32), ckpt_path=tmp_path / "last.ckpt")
    assert len(seen) == 1
    torch.testing.assert_close(state_of(resumed), after, rtol=0, atol=0)


def test_unfit_weights_name_their_file(tmp_path: Path) -> None:
    torch.save(CifarResNet(14, in_channels=1).state_dict(), tmp_path / "w.pt")
    module = LitBranchyNet(
        ResNetWithExits(CifarResNet(8, in_channels=1), [1]), tuning=Tuning(str(tmp_path / "w.pt"))
    )
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/w.pt: the weights are of another")):
        fit(module, tmp_path)


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_takes_it_from_a_yaml(method: str, tmp_path: Path) -> None:
    """And says it in what is compared, of a training alone."""
    from lightning_modules import ImageClassifier
    from running.loading import build

    config = methods.config(method)
    tuning = {
        "weights": "w.pt",
        "freeze": None,
        "lr_factors": {part_of(method): 0.5},
        "decay_norm_and_bias": False,
    }
    config["model"]["init_args"]["tuning"] = tuning
    assert vars(build("model", ImageClassifier, config, tmp_path).tuning) == tuning
    assert trained(config)["model.init_args.tuning.weights"] == "w.pt"
    assert not any("tuning" in key for key in evaluated(config))
    assert isinstance(build("model", ImageClassifier, config, tmp_path).net, nn.Module)
