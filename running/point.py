"""An operating point of a trained network, and its answers for images of any kind."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from lightning_modules import ImageClassifier
from networks import early_exit, early_exit_stream

if TYPE_CHECKING:  # data sets take long to import
    from datamodules import ImageFormat

CLASSIFY_BATCH_SIZE = 64


class Classified(NamedTuple):
    """What a network says about images; on the CPU."""

    probabilities: Tensor
    """(N, num_classes)."""
    labels: Tensor
    """(N,) int64, the most probable class of each image."""
    exits: Tensor | None
    """(N,) int64, the exit that each image took, from 1; None if the point leaves none early."""


class Point(NamedTuple):
    """An operating point of a trained network.

    Attributes:
        name: "full", "w0.5", "exit1", ...
        run: from normalized images (N, C, H, W) to logits (N, num_classes).
        image_format: what images must become first.
        module: the LightningModule that the network is part of.
        thresholds: with which images leave early, one per exit but the last; None if none does.
    """

    name: str
    run: Callable[[Tensor], Tensor]
    image_format: "ImageFormat"
    module: ImageClassifier
    thresholds: list[float] | None = None

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the labels; their numbers if they have none."""
        return class_names(self.image_format, self.module.net.num_classes)

    def classify(
        self,
        images: Tensor | Iterable[Image.Image | str | Path],
        batch_size: int = CLASSIFY_BATCH_SIZE,
    ) -> Classified:
        """Classifies images, on the device where the network is.

        Args:
            images: uint8 (N, C, H, W); or Pillow's images or paths of files, which are prepared as
                evaluation prepared those of the data set (see `ImageFormat.prepare`). A warning
                says how many had other sizes.
            batch_size: images that are computed together.

        Raises:
            ValueError: no images, or those of another type or shape, a file that cannot be decoded,
                or a network in training mode.
            FloatingPointError: answers that are not finite.
        """
        if not isinstance(images, Tensor):
            images = self._prepare_all(images)
        self._check(images)
        parts = [self._answer(part) for part in images.split(batch_size)]
        probs, labels, exits = zip(*parts, strict=True)
        taken = None if self.thresholds is None else torch.cat(exits)
        return Classified(torch.cat(probs), torch.cat(labels), taken)

    def classify_stream(
        self, batches: Iterable[Tensor], batch_size: int = CLASSIFY_BATCH_SIZE
    ) -> Iterator[Classified]:
        """Yields the answers to each batch, in order.

        Where images leave early, those that stay wait for others, so that batches stay full: the
        answers then come late (see `networks.early_exit_stream`).

        Args:
            batches: uint8 (N, C, H, W) each.
            batch_size: images on which a stage of the network runs.

        Raises:
            ValueError, FloatingPointError: see `classify`.
        """
        if self.thresholds is None:
            yield from map(self._answer, batches)
            return
        self._check_mode()
        criterion = self.module.exit_criterion
        normalized = map(self._normalize, batches)
        for logits, index in early_exit_stream(
            self.module.answering_net, normalized, self.thresholds, criterion, batch_size
        ):
            yield self._classified(logits, index + 1)

    def _prepare_all(self, images: Iterable[Image.Image | str | Path]) -> Tensor:
        from datamodules import prepare_images  # slow to import

        if isinstance(images, str | Path | Image.Image):
            images = [images]
        return prepare_images(images, self.image_format)

    def _check(self, images: Tensor) -> None:
        shape = self.image_format.image_shape
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != shape:
            raise ValueError(
                f"the images are {tuple(images.shape)} of {images.dtype}: give torch.uint8 of (N, "
                f"{', '.join(map(str, shape))}), or Pillow's images or paths, which may have any "
                "size"
            )
        if len(images) == 0:
            raise ValueError("no images: give one or more")

    def _check_mode(self) -> None:
        if self.module.net.training:
            raise ValueError("the network is in training mode: call net.eval()")

    def _normalize(self, images: Tensor) -> Tensor:
        return self.image_format.normalize(images.to(self.module.device))

    @torch.no_grad()
    def _answer(self, images: Tensor) -> Classified:
        self._check_mode()
        pixels = self._normalize(images)
        if self.thresholds is None:
            return self._classified(self.run(pixels), None)
        logits, index = early_exit(
            self.module.answering_net, pixels, self.thresholds, self.module.exit_criterion
        )
        return self._classified(logits, index + 1)

    def _classified(self, logits: Tensor, exits: Tensor | None) -> Classified:
        probs = logits.softmax(1).cpu()
        if not probs.isfinite().all():
            raise FloatingPointError(
                f"the answers of {self.name} are not finite: check the weights of the checkpoint"
            )
        return Classified(probs, probs.argmax(1), None if exits is None else exits.cpu())


def class_names(self) -> list[str]:
        """Names of the classes, in the order of the labels; their numbers if they have none."""
        return class_names(self.image_format, self.module.net.num_classes)

    def classify(
        self,
        images: Tensor | Iterable[Image.Image | str | Path],
        batch_size: int = CLASSIFY_BATCH_SIZE,
    ) -> Classified:
        """Classifies images, on the device where the network is.

        Args:
            images: uint8 (N, C, H, W); or Pillow's images or paths of files, which are prepared as
                evaluation prepared those of the data set (see `ImageFormat.prepare`). A warning
                says how many had other sizes.
            batch_size: images that are computed together.

        Raises:
            ValueError: no images, or those of another type or shape, a file that cannot be decoded,
                or a network in training mode.
            FloatingPointError: answers that are not finite.
        """
        if not isinstance(images, Tensor):
            images = self._prepare_all(images)
        self._check(images)
        parts = [self._answer(part) for part in images.split(batch_size)]
        probs, labels, exits = zip(*parts, strict=True)
        taken = None if self.thresholds is None else torch.cat(exits)
        return Classified(torch.cat(probs), torch.cat(labels), taken)

    def classify_stream(
        self, batches: Iterable[Tensor], batch_size: int = CLASSIFY_BATCH_SIZE
    ) -> Iterator[Classified]:
        """Yields the answers to each batch, in order.

        Where images leave early, those that stay wait for others, so that batches stay full: the
        answers then come late (see `networks.early_exit_stream`).

        Args:
            batches: uint8 (N, C, H, W) each.
            batch_size: images on which a stage of the network runs.

        Raises:
            ValueError, FloatingPointError: see `classify`.
        """
        if self.thresholds is None:
            yield from map(self._answer, batches)
            return
        self._check_mode()
        criterion = self.module.exit_criterion
        normalized = map(self._normalize, batches)
        for logits, index in early_exit_stream(
            self.module.answering_net, normalized, self.thresholds, criterion, batch_size
        ):
            yield self._classified(logits, index + 1)

    def _prepare_all(self, images: Iterable[Image.Image | str | Path]) -> Tensor:
        from datamodules import prepare_images  # slow to import

        if isinstance(images, str | Path | Image.Image):
            images = [images]
        return prepare_images(images, self.image_format)

    def _check(self, images: Tensor) -> None:
        shape = self.image_format.image_shape
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != shape:
            raise ValueError(
                f"the images are {tuple(images.shape)} of {images.dtype}: give torch.uint8 of (N, "
                f"{', '.join(map(str, shape))}), or Pillow's images or paths, which may have any "
                "size"
            )
        if len(images) == 0:
            raise ValueError("no images: give one or more")

    def _check_mode(self) -> None:
        if self.module.net.training:
            raise ValueError("the network is in training mode: call net.eval()")

    def _normalize(self, images: Tensor) -> Tensor:
        return self.image_format.normalize(images.to(self.module.device))

    @torch.no_grad()
    def _answer(self, images: Tensor) -> Classified:
        self._check_mode()
        pixels = self._normalize(images)
        if self.thresholds is None:
            return self._classified(self.run(pixels), None)
        logits, index = early_exit(
            self.module.answering_net, pixels, self.thresholds, self.module.exit_criterion
        )
        return self._classified(logits, index + 1)

    def _classified(self, logits: Tensor, exits: Tensor | None) -> Classified:
        probs = logits.softmax(1).cpu()
        if not probs.isfinite().all():
            raise FloatingPointError(
                f"the answers of {self.name} are not finite: check the weights of the checkpoint"
            )
        return Classified(probs, probs.argmax(1), None if exits is None else exits.cpu())


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

        With temperatures, if its exits have any: `thresholds` are for what it answers.
        """
        is_early = isinstance(self.module, MultiExitClassifier)
        return self.module.answering_net if is_early else self.module.net

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
        is_early = isinstance(self.module, MultiExitClassifier)
        return self.module.exit_thresholds if is_early else {}

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
            raise FileNotFoundError(f"there is no folder {folder}: give that of a run")
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


def class_names(image_format: "ImageFormat", num_classes: int) -> list[str]:
    """Returns the names of classes; their numbers, if not each of them has one."""
    names = image_format.class_names or []
    return names if len(names) == num_classes else [str(number) for number in range(num_classes)]
