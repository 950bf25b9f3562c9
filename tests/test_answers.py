"""What a test measures of every operating point, against torchmetrics and by hand."""

import csv
from pathlib import Path
from typing import Any

import methods
import pytest
import torch
from pytorch_lightning import LightningDataModule
from quiet import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
)

from callbacks import Table
from datamodules import DigitsDataModule
from lightning_modules import ImageClassifier, LitResNet, PointAnswers
from networks import recalibrate
from running import OperatingPoints
from running.result import COLUMNS, show_points


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def some_logits(num_classes: int, num_images: int = 400) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(num_classes, (num_images,))
    logits = 3 * torch.randn(num_images, num_classes)
    return logits.scatter_add(1, labels[:, None], torch.full((num_images, 1), 2.0)), labels


@pytest.mark.parametrize("num_classes", [2, 5, 10, 100])
def test_measures_are_those_of_torchmetrics(num_classes: int) -> None:
    logits, labels = some_logits(num_classes)
    answers = PointAnswers.of(logits, labels)
    probs = logits.softmax(1)
    ece = multiclass_calibration_error(probs, labels, num_classes, n_bins=15, norm="l1")
    assert answers.ece == pytest.approx(ece.item(), abs=1e-6)
    top = min(5, num_classes)
    top5 = multiclass_accuracy(logits, labels, num_classes, average="micro", top_k=top)
    assert answers.top5 == pytest.approx(top5.item())
    expected = multiclass_confusion_matrix(logits, labels, num_classes)
    assert answers.confusion(num_classes).equal(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_certain_answers_are_calibrated_by_their_accuracy(dtype: torch.dtype) -> None:
    answers = PointAnswers.of(1e3 * torch.eye(4, dtype=dtype), torch.tensor([0, 1, 2, 0]))
    assert answers.confidences.tolist() == [1, 1, 1, 1]
    assert answers.confidences.dtype == torch.float32
    assert answers.ece == pytest.approx(0.25)


@pytest.fixture(scope="module")
def data() -> DigitsDataModule:
    return DigitsDataModule(eval_batch_size=100)


def trained_by_chance(method: str, data: LightningDataModule, folder: Path) -> ImageClassifier:
    """Returns a method with random weights after a validation, if it has thresholds, and a test."""
    torch.manual_seed(0)
    module = methods.build(methods.METHODS[method])
    for parameter in module.net.parameters():
        if parameter.dim() == 2:  # a classifier: surer, and no longer of one mind
            nn.init.normal_(parameter, std=2.0)
    trainer = quiet_trainer(folder, callbacks=[OperatingPoints()])
    if method in methods.OF_ANY_WIDTH:
        runs = module.calibration_runs(module.evaluated_points())
        recalibrate(module.net, [torch.randn(64, 1, 32, 32)], runs)
    if method in methods.WITH_EXITS:
        trainer.validate(module, data, verbose=False)
    trainer.test(module, data, verbose=False)
    return module


def by_hand(module: ImageClassifier, name: str, data: DigitsDataModule) -> tuple[Tensor, Tensor]:
    """Returns the logits and labels of a test, by what a user runs."""
    logits, labels = [], []
    for batch in data.test_dataloader():
        images, truth = data.on_after_batch_transfer(batch, 0)
        with torch.no_grad():
            logits.append(module.operating_points()[name](images))
        labels.append(truth)
    return torch.cat(logits), torch.cat(labels)


MANY_POINTS = pytest.param("slimmable_exits", marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "method", [MANY_POINTS if m == "slimmable_exits" else m for m in methods.METHODS]
)
def test_every_point_of_every_method(method: str, data: DigitsDataModule, tmp_path: Path) -> None:
    module = trained_by_chance(method, data, tmp_path)
    points = {row["name"]: row for row in rows(tmp_path / "operating_points.csv")}
    assert points.keys() == module.operating_points().keys() == module.test_answers.keys()
    for name, row in points.items():
        logits, labels = by_hand(module.eval(), name, data)
        top5 = multiclass_accuracy(logits, labels, 10, average="micro", top_k=5)
        assert float(row["test_top5"]) == pytest.approx(top5.item(), abs=1e-6)
        ece = multiclass_calibration_error(logits.softmax(1), labels, 10, n_bins=15, norm="l1")
        assert float(row["ece"]) == pytest.approx(ece.item(), abs=1e-4)
        expected = multiclass_confusion_matrix(logits, labels, 10)
        assert confusion(tmp_path, name, 10).equal(expected)
        classes = [r for r in rows(tmp_path / "class_accuracy.csv") if r["point"] == name]
        assert [r["class"] for r in classes] == data.class_names
        assert [int(r["num_images"]) for r in classes] == expected.sum(1).tolist()
        recall = expected.diag() / expected.sum(1)
        torch.testing.assert_close(torch.tensor([float(r["acc"]) for r in classes]), recall)
        right = sum(float(r["acc"]) * int(r["num_images"]) for r in classes)
        assert right / 360 == pytest.approx(float(row["test_acc"]))


def confusion(folder: Path, point: str, num_classes: int) -> Tensor:
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.long)
    for row in rows(folder / "confusion.csv"):
        if row["point"] == point:
            assert int(row["num_images"]) > 0
            matrix[int(row["true"]), int(row["predicted"])] = int(row["num_images"])
    return matrix


class FewClasses(LightningDataModule):
    """20 images of 3 classes, of which the last has none."""

    def __init__(self) -> None:
        super().__init__()
        self.images = torch.randn(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def test_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.images, torch.arange(20) % 2), batch_size=8)


def test_few_classes_have_no_top5_and_perhaps_no_images(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    net.num_classes = 3
    trainer = quiet_trainer(tmp_path, callbacks=[OperatingPoints()])
    trainer.test(LitResNet(net), FewClasses(), verbose=False)
    (point,) = rows(tmp_path / "operating_points.csv")
    assert list(point) == ["name", "test_acc", "macs", "params", "ms_per_image", "ece"]
    classes = rows(tmp_path / "class_accuracy.csv")
    assert [row["class"] for row in classes] == ["0", "1", "2"]
    assert [row["num_images"] for row in classes] == ["10", "10", "0"]
    assert classes[2]["acc"] == ""


def test_answers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """Of an exit, say, while the loss of the last one is fine."""
    module = methods.build(methods.METHODS["branchynet"])
    with torch.no_grad():
        next(module.net.exits[0].parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="the operating point exit1 are not finite"):
        quiet_trainer(tmp_path).test(module, DigitsDataModule(), verbose=False)


@pytest.mark.parametrize(
    ("name", "extra_is_shown"), [("full", True), ("w0.25", True), ("adaptive_lossless", False)]
)
def test_table_leaves_out_extras_rather_than_shorten_names(
    name: str, extra_is_shown: bool, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "operating_points.csv"
    row = [name, 0.98765, 4_089_184_256, 25_557_032, 0.1834, 1.0, 0.01234]
    Table([each.key for each in COLUMNS], [row]).write(path)
    show_points(path)
    printed = capsys.readouterr().out
    for text in (name, "98.77%", "4,089,184,256", "25,557,032", "0.183", "accuracy", "parameters"):
        assert text in printed
    for text in ("100.00%", "0.012"):
        assert (text in printed) == extra_is_shown
    assert ("in the file, too: top-5, ECE" in printed) != extra_is_shown
    assert max(map(len, printed.splitlines())) <= 80


def test_table_of_an_older_run_is_shown(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "operating_points.csv"
    path.write_text("name,test_acc,macs,params,ms_per_image\nfull,0.5,10,20,0.25\n")
    show_points(path)
    printed = capsys.readouterr().out
    assert "50.00%" in printed
    assert "ECE" not in printed
