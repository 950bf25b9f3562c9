"""From the folder of a run to its network: weights, operating points, and what its answers mean.

    from running import load_run

    run = load_run("runs/slimmable/digits_us/seed0")  # its network, its weights, its points
    point = run.point("w0.5")
    answers = point.classify(["a.png", "b.jpg"])  # or Pillow's images, or uint8 (N, C, H, W)
    print([point.class_names[label] for label in answers.labels], answers.probabilities.amax(1))

Nothing but the run folder is read. Classes of the user's own, named in its config.yaml, are
imported from where Python finds them (PYTHONPATH). The network computes in float32, whatever
precision it was trained in.
"""

import difflib
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch
from jsonargparse import ArgumentError
from pytorch_lightning.cli import LightningArgumentParser
from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn

from lightning_modules import FULL, ImageClassifier, LitMSDNet, MultiExitClassifier, check_data
from networks import TIMED_BATCH_SIZE, check_choice
from running.arguments import one_line
from running.checkpoint import BEST, FORMAT, LAST, Select
from running.checkpoint_io import AtomicCheckpointIO
from running.experiment import renamed
from running.folder import read_yaml
from running.point import Point, class_names
from running.suggestions import did_you_mean

if TYPE_CHECKING:  # data sets take long to import
    from datamodules import ImageFormat

Built = TypeVar("Built")


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
    image_format: "ImageFormat"
    checkpoint: Path

    @property
    def net(self) -> nn.Module:
        """The plain network, which takes normalized images (`image_format.normalize`).

        With temperatures, if its exits have any (of several widths those of the widest). What a
        point does with it, widths and gates, is in `point`.
        """
        is_scaled = isinstance(self.module, MultiExitClassifier) and self.module.found.temperatures
        return self.module.answering_net if is_scaled else self.module.net

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the labels; their numbers if they have none."""
        return class_names(self.image_format, self.net.num_classes)

    @property
    def points(self) -> list[str]:
        """Names of the operating points."""
        return list(self.module.operating_points())

    @property
    def thresholds(self) -> dict[str, list[float]]:
        """Thresholds of the points whose images leave early, by name."""
        if not isinstance(self.module, MultiExitClassifier):
            return {}
        return {name: point.thresholds for name, point in self.module.early_points().items()}

    def point(self, name: str = FULL) -> Point:
        """Returns an operating point.

        Warns if its thresholds were found long before the weights were saved.

        Raises:
            ValueError: there is none of that name (names those there are, the most alike first), or
                its BN statistics or temperatures were never computed.
        """
        points = self.module.operating_points()
        if name not in points:
            alike = partial(difflib.SequenceMatcher, None, name)
            known = sorted(points, key=lambda each: -alike(each).ratio())
            raise ValueError(f"{self.folder} has no operating point {name!r}: {', '.join(known)}")
        if name in self.module.uncalibrated_points():
            raise ValueError(
                f"{self.checkpoint} has no BN statistics of the point {name}: train with "
                "callbacks.BNRecalibration, or choose another point"
            )
        thresholds = self.thresholds.get(name)
        if thresholds is not None:
            self.module.on_predict_start()
        elif isinstance(self.module, MultiExitClassifier):
            self.module.check_found()
        return Point(name, points[name], self.image_format, self.module, thresholds)


def load_run(
    folder: str | Path, checkpoint: Select | None = None, device: str | torch.device = "cpu"
) -> LoadedRun:
    """Loads the network of a run, which may still be training.

    Weights that a callback averages (`EMAWeightAveraging`) are what a checkpoint calls its weights,
    and are what answers. Random states, the default dtype and the default device of the caller
    neither matter nor change.

    Args:
        folder: of the run.
        checkpoint: "best" or "last"; None: the one that the paper's rule selects, as the test did.
        device: where the network shall be.

    Raises:
        FileNotFoundError: it is no run folder, or holds no checkpoint.
        ValueError: its checkpoint is damaged, does not fit or is of another version of this
            project, a class is missing, or there is no such device.
    """
    folder, device = Path(folder), check_device(device)
    config = read_config(folder)
    path = find_checkpoint(folder, checkpoint or selection(config))
    content = AtomicCheckpointIO().load_checkpoint(path)
    check_content(content, path)
    from datamodules import ImageFormat  # slow to import

    with isolate_rng(include_cuda=False), _torch_as_it_was():
        module = build("model", ImageClassifier, config, folder)
        with _refused_if_unfit(path):
            image_format = ImageFormat.from_checkpoint(content["images"])
            module.on_load_checkpoint(content)
            module.load_state_dict(content["state_dict"])
            names = image_format.class_names
            image_format.normalize(torch.zeros(1, *image_format.image_shape, dtype=torch.uint8))
            check_data(module.net, names and len(names), image_format.image_shape)
        module.eval().to(device)
        if isinstance(module, LitMSDNet):
            shape = (TIMED_BATCH_SIZE, *image_format.image_shape)
            with torch.no_grad():
                module.keep_to_budget(torch.zeros(shape, device=device))
    return LoadedRun(folder, module, image_format, path)


def read_config(folder: Path) -> dict[str, Any]:
    """Returns what was trained in a folder.

    Raises:
        FileNotFoundError: it is no run folder; names those below it.
        ValueError: its configuration is damaged.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        if not folder.is_dir():
            beside = folder.parent.glob("*/") if folder.parent.is_dir() else []
            meant = did_you_mean(folder.name, {each.name: each for each in beside})
            raise FileNotFoundError(f"there is no folder {folder}: give that of a run{meant}")
        below = sorted(each.parent.name for each in folder.glob("*/config.yaml"))
        remedy = f", give one of those in it: {', '.join(below[:5])}" if below else ""
        raise FileNotFoundError(f"{folder} is no run folder: it holds no config.yaml{remedy}")
    config = renamed(read_yaml(path))
    if not isinstance(config.get("model"), dict):
        raise ValueError(f"{path} names no model: it is not the configuration of a run")
    if not isinstance(config.setdefault("checkpoint", {}), dict | None):
        raise ValueError(f"{path}: checkpoint holds no keys and values: correct it")
    return config


def selection(config: dict[str, Any]) -> Select:
    """Returns which checkpoint the configuration of a run selects."""
    return (config.get("checkpoint") or {}).get("select", "last")


def find_checkpoint(folder: Path, select: Select) -> Path:
    """Returns the path of a checkpoint.

    Raises:
        FileNotFoundError: there is none; says which there is.
        ValueError: unknown `select`.
    """
    check_choice("checkpoint", select, Select)
    names: dict[str, Literal["best.ckpt", "last.ckpt"]] = {"best": BEST, "last": LAST}
    path = folder / names[select]
    if not path.is_file():
        there = [each for each, name in names.items() if (folder / name).is_file()]
        remedy = f"choose checkpoint {there[0]!r}" if there else "train it first (fit)"
        raise FileNotFoundError(f"{folder} holds no {path.name}: {remedy}")
    return path


def check_content(checkpoint: dict[str, Any], path: Path) -> None:
    """Raises ValueError if a checkpoint is of another version, or of data that we do not know."""
    run = checkpoint.get("run")
    version = run.get("format") if isinstance(run, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{path} is no checkpoint of a run of this project: train it here (fit)")
    if version != FORMAT:
        kind, remedy = ("a newer", "update") if version > FORMAT else ("an older", "use that one")
        raise ValueError(
            f"{path} was written by {kind} version of this project (its format is {version}, and "
            f"this one reads {FORMAT}): {remedy} (attempts.yaml names its commit)"
        )
    if "images" not in checkpoint:
        raise ValueError(
            f"{path} does not say what images it takes: it is of an older version of this project, "
            "or its data module has no image_format (a datamodules.ImageFormat)"
        )


def build(name: str, base: type[Built], config: dict[str, Any], folder: Path) -> Built:
    """Builds the "model", with random weights, or the "data" that a configuration describes.

    Raises:
        ValueError: a class or an argument is not there.
    """
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(base, name, subclass_mode=True)
    try:
        parsed = parser.parse_object({name: config[name]})
    except ArgumentError as error:
        raise ValueError(
            f"{folder / 'config.yaml'} does not fit this version ({one_line(error)}): use the "
            "version that trained it (attempts.yaml names its commit); classes of your own must be "
            "on PYTHONPATH"
        ) from error
    # Its new name, and the one that jsonargparse had before 4.49.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    return instantiate(parsed)[name]


def check_device(name: str | torch.device) -> torch.device:
    """Returns a device.

    Raises:
        ValueError: there is none of that name.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # "meta" has no numbers
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"there is no device {str(name)!r} ({reason}): use cpu") from error
    return device


@contextmanager
def _refused_if_unfit(path: Path) -> Iterator[None]:
    """Whatever a checkpoint lacks or has too much, it is of another network."""
    try:
        yield
    except (RuntimeError, TypeError, LookupError, AttributeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"{path} does not fit the config.yaml beside it ({textwrap.shorten(reason, 200)}): "
            "restore the file of the two that was changed"
        ) from error


@contextmanager
def _torch_as_it_was() -> Iterator[None]:
    """Networks are built as training has built them, whatever the caller has made the default."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(default)
