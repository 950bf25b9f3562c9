"""Weights of elsewhere: what is loaded, what stays, and what is refused, against torch and timm."""

import copy
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from lightning_modules import read_weight_file
from networks import (
    CifarResNet,
    DenseNet,
    LoadedWeights,
    ResNet,
    ResNetWithExits,
    load_weights,
)
from running import read_weights

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def state_of(network: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(network.state_dict())


FOREIGN = {
    "torchvision resnet18": (lambda: torchvision.models.resnet18(), lambda n: ResNet(18, n), "fc"),
    "timm resnet18": (lambda: timm.create_model("resnet18"), lambda n: ResNet(18, n), "fc"),
    "torchvision densenet121": (
        lambda: torchvision.models.densenet121(),
        lambda n: DenseNet(121, n),
        "classifier",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("num_classes", [1000, 7])
def test_weights_of_torchvision_and_timm_load_as_they_are(name: str, num_classes: int) -> None:
    make_source, make, head = FOREIGN[name]
    source, network = make_source().eval(), make(num_classes).eval()
    before, given = state_of(network), source.state_dict()
    report = load_weights(network, given)
    names = [f"{head}.weight", f"{head}.bias"] if num_classes != 1000 else []
    assert report == LoadedWeights([k for k in given if k not in names], names, [], names)
    for key, value in network.state_dict().items():
        assert torch.equal(value, (before if key in names else given)[key]), key
    # Features, as a network of somebody else computes them; and its answers.
    if num_classes == 1000:
        torch.testing.assert_close(network(IMAGES), source(IMAGES), rtol=1e-4, atol=1e-5)
    else:
        setattr(network, head, nn.Identity())
        setattr(source, head, nn.Identity())
        torch.testing.assert_close(network(IMAGES), source(IMAGES), rtol=1e-4, atol=1e-5)


def test_every_exit_gets_a_new_classifier() -> None:
    source = ResNetWithExits(CifarResNet(8, num_classes=100), [1, 2])
    network = ResNetWithExits(CifarResNet(8, num_classes=10), [1, 2])
    report = load_weights(network, source.state_dict())
    layers = ("early_exits.0.2", "early_exits.1.2", "trunk.fc")
    assert sorted(report.head) == sorted(f"{x}.{y}" for x in layers for y in ("weight", "bias"))
    assert not report.exits
    assert "new, for another number of classes: trunk.fc.weight, trunk.fc.bias" in report.describe()
    assert "and 3 more" in report.describe()
    assert torch.equal(network.trunk.conv1.weight, source.trunk.conv1.weight)


def test_trunk_of_other_classes_joins_exits() -> None:
    network = ResNetWithExits(CifarResNet(8, num_classes=10), [1, 2])
    before, source = state_of(network), CifarResNet(8, num_classes=100)
    report = load_weights(network, source.state_dict())
    assert report.head == ["trunk.fc.weight", "trunk.fc.bias"]
    assert report.exits == [key for key in before if key.startswith("early_exits.")]
    assert report.unused == report.head
    assert torch.equal(network.trunk.layer3[0].conv1.weight, source.layer3[0].conv1.weight)
    assert torch.equal(network.trunk.fc.weight, before["trunk.fc.weight"])


def test_files_of_before_count_no_batches() -> None:
    source, network = CifarResNet(8), CifarResNet(8)
    given = {k: v for k, v in source.state_dict().items() if "num_batches_tracked" not in k}
    assert load_weights(network, given).loaded == list(given)
    with pytest.raises(ValueError, match=r"bn1\.running_mean is absent there"):
        load_weights(network, {k: v for k, v in given.items() if k != "bn1.running_mean"})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: CifarResNet(14), "36 tensors differ (layer1.1.conv1.weight is (16, 16, 3, 3) th"),
        (lambda: CifarResNet(8, in_channels=1), "conv1.weight is (16, 1, 3, 3) there and (16, 3"),
        # 64 channels of the last layer are no classes.
        (lambda: CifarResNet(8, preactivation=True), "tensors differ ("),
        (lambda: nn.Linear(1, 1), "conv1.weight is absent there"),
    ],
)
def test_other_networks_are_refused_and_change_nothing(
    source: Callable[[], nn.Module], message: str
) -> None:
    network = CifarResNet(8)
    before = state_of(network)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_weights(network, source().state_dict())
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_tensors_that_differ_otherwise_are_no_head() -> None:
    """16 classes here, as many as the channels of the stem; there 32 channels and 10 classes."""
    network = CifarResNet(8, num_classes=16)
    given = state_of(CifarResNet(8, num_classes=10))
    given["conv1.weight"] = torch.zeros(32, 3, 3, 3)
    with pytest.raises(ValueError, match=r"conv1.weight is \(32, 3, 3, 3\) there"):
        load_weights(network, given)


# --- files ----------------------------------------------------------------------------------------


def save_legacy(weights: dict[str, Tensor], path: Path) -> None:
    torch.save(weights, path, _use_new_zipfile_serialization=False)


def save_safely(weights: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(weights, path)


FILES: dict[str, tuple[str, Callable[[dict[str, Tensor], Path], None]]] = {
    "state dict": ("w.pt", torch.save),
    "before archives": ("w.pth", save_legacy),
    "wrapped": ("w.pth", lambda weights, path: torch.save({"state_dict": weights, "n": 1}, path)),
    "ours": (
        "w.ckpt",
        lambda weights, path: torch.save(
            {"state_dict": {f"net.{k}": v for k, v in weights.items()} | {"other": 1}}, path
        ),
    ),
    "safetensors": ("w.safetensors", save_safely),
}


@pytest.mark.parametrize("name", FILES)
def test_files(name: str, tmp_path: Path) -> None:
    file, save = FILES[name]
    weights = state_of(CifarResNet(8))
    save(weights, tmp_path / file)
    for read in (read_weight_file, read_weights):
        torch.testing.assert_close(read(str(tmp_path / file)), weights, rtol=0, atol=0)


@pytest.mark.parametrize("content", [torch.zeros(3), {"state_dict": [1]}, {"a": 1}, 7, re.compile])
def test_file_without_weights(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="is not a file of weights"):
        read_weight_file(str(tmp_path / "w.pt"))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_damaged_file(name: str, damage: str, tmp_path: Path) -> None:
    file, save = FILES[name]
    path = tmp_path / file
    save(state_of(CifarResNet(8)), path)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "text": b"a: 1\n", "empty": b""}[damage])
    with pytest.raises(ValueError, match="is not a file of weights"):
        read_weight_file(str(path))


def test_rotten_bytes_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(state_of(CifarResNet(8)), path)
    rotten = bytearray(path.read_bytes())
    rotten[len(rotten) // 2] ^= 1
    path.write_bytes(rotten)
    with pytest.raises(ValueError, match="is not a file of weights"):
        read_weight_file(str(path))


def test_safetensors_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ValueError, match="needs the package safetensors: pip install it"):
        read_weight_file(str(tmp_path / "w.safetensors"))


# --- run folders, torchvision ---------------------------------------------------------------------


def write_run(folder: Path, select: str | None) -> Path:
    folder.mkdir()
    checkpoint = f"checkpoint: {{select: {select}}}\n" if select else ""
    (folder / "config.yaml").write_text(f"model: {{class_path: x}}\n{checkpoint}")
    for name in ("best", "last"):
        torch.save({"state_dict": {f"net.{name}": torch.zeros(1)}}, folder / f"{name}.ckpt")
    return folder


@pytest.mark.parametrize(("select", "name"), [("best", "best"), ("last", "last"), (None, "last")])
def test_run_folder_gives_its_selected_checkpoint(
    select: str | None, name: str, tmp_path: Path
) -> None:
    folder = write_run(tmp_path / "run", select)
    assert list(read_weights(str(folder))) == [name]
    (folder / f"{name}.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match=rf"holds no {name}\.ckpt: choose checkpoint"):
        read_weights(str(folder))
    with pytest.raises(FileNotFoundError, match=r"is no run folder.*give one of those in it: run"):
        read_weights(str(tmp_path))


def test_names_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From torch.hub's folder, where a download would have put the file; with names of before."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    source = state_of(torchvision.models.densenet121())
    old = {
        re.sub(r"(denselayer\d+\.\w+?)(\d)\.", r"\1.\2.", key): value
        for key, value in source.items()
        if "num_batches_tracked" not in key
    }
    assert old.keys() != source.keys()
    weights = torchvision.models.DenseNet121_Weights.IMAGENET1K_V1
    torch.save(old, tmp_path / "hub/checkpoints" / weights.url.rsplit("/", 1)[-1])
    state = torch.get_rng_state()
    torch.testing.assert_close(read_weights(str(weights)), source, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_torchvision_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("<urlopen error [Errno -2] Name or service\n not known>")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fail)
    with pytest.raises(OSError, match=r"cannot be had .*resnet18-f37072fd\.pth") as error:
        read_weights("ResNet18_Weights.IMAGENET1K_V1")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"no weights ResNet18_Weights\.IMAGENET_V1: use Res"):
        read_weights("ResNet18_Weights.IMAGENET_V1")
