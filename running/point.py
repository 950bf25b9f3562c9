"""An operating point of a trained network, and its answers for images of any kind."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from lightning_modules import ImageClassifier
from networks import MultiExitNetwork, TemperatureScaled, early_exit, early_exit_stream

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
            self._net, normalized, self.thresholds, criterion, batch_size
        ):
            yield self._classified(logits, index + 1)

    @property
    def _net(self) -> MultiExitNetwork | TemperatureScaled:
        """The network whose images leave early."""
        return self.module.network_of(self.name)

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
        criterion = self.module.exit_criterion
        logits, index = early_exit(self._net, pixels, self.thresholds, criterion)
        return self._classified(logits, index + 1)

    def _classified(self, logits: Tensor, exits: Tensor | None) -> Classified:
        probs = logits.softmax(1).cpu()
        if not probs.isfinite().all():
            raise FloatingPointError(
                f"the answers of {self.name} are not finite: check the weights of the checkpoint"
            )
        return Classified(probs, probs.argmax(1), None if exits is None else exits.cpu())


def class_names(image_format: "ImageFormat", num_classes: int) -> list[str]:
    """Returns the names of classes; their numbers, if not each of them has one."""
    names = image_format.class_names or []
    return names if len(names) == num_classes else [str(number) for number in range(num_classes)]
