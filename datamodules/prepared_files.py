"""Images of any kind and size, as a trained network takes them."""

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from chance import generator
from datamodules.image_files import list_all, opened, readable
from datamodules.image_folder import start_worker
from datamodules.image_format import ImageFormat


def prepare_images(images: Iterable[Image.Image | str | Path], image_format: ImageFormat) -> Tensor:
    """Returns uint8 (N, C, H, W) of Pillow's images and of paths; see `ImageFormat.prepare`.

    Warns, once, of images of other sizes.

    Raises:
        ValueError: something is no image, cannot be decoded, or there are none.
    """
    prepared, num_unlike = [], 0
    for number, image in enumerate(images):
        if isinstance(image, str | Path):
            with opened(os.fspath(image)) as found:
                fits, pixels = image_format.fits(found), image_format.prepare(found)
        elif isinstance(image, Image.Image):
            try:
                fits, pixels = image_format.fits(image), image_format.prepare(image)
            except (OSError, ValueError) as error:
                raise ValueError(f"image {number} cannot be used: {error}") from error
        else:
            raise ValueError(
                f"image {number} is of {type(image).__name__}: give Pillow's images or paths, or "
                "all images as one tensor"
            )
        prepared.append(pixels)
        num_unlike += not fits
    if not prepared:
        raise ValueError("no images: give one or more")
    if num_unlike:
        warnings.warn(tell_unlike(num_unlike, len(prepared), image_format), stacklevel=4)
    return torch.stack(prepared)


def tell_unlike(num_unlike: int, num_images: int, image_format: ImageFormat) -> str:
    """Returns a line about images that are of other sizes than those of the data set."""
    _, height, width = image_format.image_shape
    return (
        f"{num_unlike} of {num_images} images are not of {width} x {height} pixels, as those of "
        f"{image_format.data} are: their centre was resized"
    )


class PreparedBatch(NamedTuple):
    """Files, as a network takes them."""

    images: Tensor
    """uint8 (n, C, H, W), of the files that could be decoded."""
    errors: list[str | None]
    """Of every file: why it could not be decoded, or None."""
    num_unlike: int
    """How many have another size than the images of the data set."""


class ImagesToClassify(Dataset):
    """An image, or all below a folder: sorted, without what is hidden.

    Args:
        path: of a file or folder.
        image_format: what they become.

    Raises:
        FileNotFoundError: there is none.
        ValueError: two paths lead to one folder, or the network takes no images of files.
    """

    def __init__(self, path: Path, image_format: ImageFormat):
        image_format.check_channels()
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}: give an image or a folder of images")
        self.root = path.parent if path.is_file() else path
        found = [str(path)] if path.is_file() else list_all(path)
        # One array instead of a million Python objects, see `ImageFiles`.
        self.paths = np.array([os.fsencode(each) for each in found])
        self.image_format = image_format

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Returns a path below the folder; bytes that are no UTF-8 are escaped."""
        return readable(os.path.relpath(self.paths[index], os.fsencode(self.root)))

    def holder(self, index: int) -> str:
        """Returns the name of the folder that holds a file: its class, if it is named like one."""
        return readable(os.path.basename(os.path.dirname(os.path.abspath(self.paths[index]))))

    def __getitem__(self, index: int) -> tuple[Tensor | None, str | None, bool]:
        """Returns the image uint8 (C, H, W), why there is none, and whether its size fits."""
        path = os.fsdecode(self.paths[index])
        try:
            with opened(path) as image:
                return self.image_format.prepare(image), None, self.image_format.fits(image)
        except ValueError as error:
            reason = str(error.__cause__).replace(f" {path!r}", "")
            return None, readable(os.fsencode(" ".join(reason.split()))), True

    def batches(self, batch_size: int, num_workers: int, pins: bool = False) -> DataLoader:
        """Returns what yields a `PreparedBatch` for so many files, decoded by worker processes.

        Args:
            batch_size: files per batch.
            num_workers: processes; 0 decodes in this one.
            pins: whether the images shall be in memory that a GPU reads fast.
        """
        return DataLoader(
            self,
            batch_size,
            num_workers=num_workers,
            collate_fn=self._collate,
            worker_init_fn=start_worker,
            pin_memory=pins,
            # Otherwise it would draw a seed from the global one.
            generator=generator("workers", 0),
        )

    def _collate(self, samples: list[tuple[Tensor | None, str | None, bool]]) -> PreparedBatch:
        images = [image for image, _, _ in samples if image is not None]
        empty = torch.empty(0, *self.image_format.image_shape, dtype=torch.uint8)
        return PreparedBatch(
            torch.stack(images) if images else empty,
            [error for _, error, _ in samples],
            sum(not fits for _, _, fits in samples),
        )
