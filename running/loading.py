"""From the folder of a run to its network: weights, operating points, and what its answers mean."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from jsonargparse import ArgumentError
from pytorch_lightning.cli import LightningArgumentParser
from torch import Tensor, nn

from datamodules import ImageFormat
from lightning_modules import ImageClassifier
from running.checkpoint import BEST, LAST
from running.checkpoint_io import AtomicCheckpointIO


class Point(NamedTuple):
    """An operating point of a trained network.

    Attributes:
        name: "full", "w0.5", "exit1", ...
        run: from normalized images (N, C, H, W) to logits (N, num_classes).
        image_format: what images must become first.
    """

    name: str
    run: Callable[[Tensor], Tensor]
    image_format: ImageFormat


class LoadedRun(NamedTuple):
    """A trained network, as its run folder has it.

    Attributes:
        folder: of the run.
        module: its LightningModule, in evaluation mode, without a trainer.
        image_format: how images reach the network, and the names of its classes.
        checkpoint: the file that the weights are from.
    """

    folder: Path
    module: ImageClassifier
    image_format: ImageFormat
    checkpoint: Path

    @property
    def net(self) -> nn.Module:
        return self.module.net

    @property
    def points(self) -> list[str]:
        """Names of the operating points."""
        return list(self.module.operating_points())

    def point(self, name: str = "full") -> Point:
        """Returns an operating point.

        Raises:
            ValueError: there is none of that name; names those there are.
        """
        points = self.module.operating_points()
        if name not in points:
            raise ValueError(f"{self.folder} has no operating point {name!r}: {', '.join(points)}")
        return Point(name, points[name], self.image_format)


def load_run(folder: str | Path) -> LoadedRun:
    """Loads the network of a run: of the checkpoint that its paper's rule selects.

    Nothing but the run folder is read; the training data may be gone.

    Args:
        folder: of the run.

    Raises:
        FileNotFoundError: it is no run folder, or holds no checkpoint.
        ValueError: its checkpoint does not fit, or is of another version of this project.
    """
    folder = Path(folder)
    config = read_config(folder)
    select = (config.get("checkpoint") or {}).get("select", "last")
    path = folder / (BEST if select == "best" else LAST)
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no {path.name} yet: train it first (fit)")
    checkpoint = AtomicCheckpointIO().load_checkpoint(path)
    if "images" not in checkpoint:
        raise ValueError(
            f"{path} does not say what images it takes: it is of an older version of this project, "
            "or of data that is none of its data modules"
        )
    module = build_module(config["model"], folder)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    return LoadedRun(folder, module.eval(), ImageFormat.from_checkpoint(checkpoint["images"]), path)


def read_config(folder: Path) -> dict[str, Any]:
    """Returns what was trained in a folder.

    Raises:
        FileNotFoundError: it is no run folder.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no run folder: it holds no config.yaml")
    return yaml.safe_load(path.read_text())


def build_module(config: dict[str, Any], folder: Path) -> ImageClassifier:
    """Builds the LightningModule that a configuration describes, with random weights."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(ImageClassifier, "model", subclass_mode=True)
    try:
        parsed = parser.parse_object({"model": config})
    except ArgumentError as error:
        raise ValueError(f"{folder / 'config.yaml'} does not fit this version: {error}") from error
    with torch.random.fork_rng(devices=[]):
        return parser.instantiate_classes(parsed).model
