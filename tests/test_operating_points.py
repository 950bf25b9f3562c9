"""Metrics and tables are made of operating points, whatever a method calls them."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
import wandb
from pytorch_lightning import Trainer
from torch import Tensor, nn

from callbacks.outlets import Table
from datamodules import DigitsDataModule
from lightning_modules import LitResNet
from running import OperatingPoints
from running.result import COLUMNS, panels


class Shrinking(nn.Module):
    """A linear classifier that may look at the first rows of the image only."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32 * 32, 10)

    def forward(self, images: Tensor, num_rows: int = 32) -> Tensor:
        size = 32 * num_rows
        return nn.functional.linear(images.flatten(1)[:, :size], self.fc.weight[:, :size])


class LitShrinking(LitResNet):
    def operating_points(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        return {"full": self.net, "w0.25": partial(self.net, num_rows=8)}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_every_point_is_measured(precision: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = LitShrinking(Shrinking())
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=tmp_path,
        logger=False,
        precision=precision,
        callbacks=[OperatingPoints()],
        enable_progress_bar=False,
    )
    data = DigitsDataModule()
    trainer.test(module, datamodule=data, verbose=False)
    lines = (tmp_path / "operating_points.csv").read_text().splitlines()
    assert lines[0] == "name,test_acc,macs,params,ms_per_image,test_top5,ece"
    points = {line.split(",")[0]: line.split(",")[1:] for line in lines[1:]}
    assert [int(points[name][1]) for name in ("full", "w0.25")] == [10240, 2560]

    context = trainer.precision_plugin.forward_context
    for name, num_rows in (("full", 32), ("w0.25", 8)):
        right = 0
        for batch in data.test_dataloader():
            images, labels = data.on_after_batch_transfer(batch, 0)
            with torch.no_grad(), context():
                right += (module.net(images, num_rows).argmax(1) == labels).sum().item()
        suffix = "" if name == "full" else f"_{name}"
        assert trainer.callback_metrics[f"test/acc{suffix}"] == pytest.approx(right / 360)
        assert float(points[name][0]) == pytest.approx(right / 360)


def test_panels_show_the_table_and_the_curve() -> None:
    """A line through one point would be no curve."""
    rows = [("w0.25", 0.5, 10, 5, 0.1, 0.9, 0.1), ("full", 0.75, 40, 20, 0.2, 1.0, 0.2)]
    for count, names in ((1, {"operating_points"}), (2, {"operating_points", "acc_against_macs"})):
        logged = panels(wandb, Table(COLUMNS, rows[:count]))
        assert logged.keys() == names
        assert logged["operating_points"].data == [list(row) for row in rows[:count]]
    assert logged["acc_against_macs"].table.columns[1:3] == ["test_acc", "macs"]
