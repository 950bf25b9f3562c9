"""What an image must become before a network that was trained can answer: kept with its weights."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from datamodules.image_augmentation import evaluation_side, evaluation_transform
from datamodules.image_files import as_tensor, to_rgb

GREY, RGB = 1, 3  # channels


@dataclass(frozen=True)
class ImageFormat:
    """How images reach a network, and what its answers are called.

    normalized = image * scale + shift, image in bytes

    Args:
        data: name of the data module's class.
        image_shape: (C, H, W).
        scale: (C, 1, 1).
        shift: (C, H, W) or (C, 1, 1).
        class_names: in the order of the labels; None if they have none.
        is_cropped: whether images have any size, and their centre is cut out as in evaluation of
            image folders; otherwise they were of `image_shape` from the start.
        enlargement: sides of the square that a pixel of the data set's files became; see
            `DigitsDataModule`.
    """

    data: str
    image_shape: tuple[int, int, int]
    scale: Tensor
    shift: Tensor
    class_names: list[str] | None
    is_cropped: bool
    enlargement: int = 1

    def normalize(self, images: Tensor) -> Tensor:
        """Returns float32 (N, C, H, W) of uint8 (N, C, H, W): what the steps receive."""
        scale, shift = (values.to(images.device) for values in (self.scale, self.shift))
        return torch.addcmul(shift, images.contiguous().float(), scale)

    def fits(self, image: Image.Image) -> bool:
        """Tells whether an image has a size that those of the data set had."""
        _, height, width = self.image_shape
        sizes = {(width // times, height // times) for times in (1, self.enlargement)}
        return self.is_cropped or image.size in sizes

    def prepare(self, image: Image.Image) -> Tensor:
        """Returns uint8 (C, H, W) of an opened image, as evaluation made them of the data set's.

        An image folder's network sees the centre of the resized image; another one, if the image
        does not fit, the centre of the image at the smallest size that covers what is needed.
        16 bits and alpha are dealt with by `to_rgb`; colours become grey by Pillow's "L".

        Raises:
            ValueError: the network takes neither grey nor coloured images, or `to_rgb` refuses.
        """
        self.check_channels()
        channels, height, width = self.image_shape
        fits = self.fits(image)
        pixels = to_rgb(image)
        if channels == GREY:
            pixels = pixels.convert("L")
        if self.is_cropped:
            pixels = evaluation_transform(height)(pixels)
        elif not fits:
            pixels = ImageOps.fit(pixels, (width, height), Image.Resampling.BILINEAR)
        elif pixels.size != (width, height):
            pixels = pixels.resize((width, height), Image.Resampling.NEAREST)
        return as_tensor(pixels).view(height, width, channels).permute(2, 0, 1)

    @property
    def preparation(self) -> str:
        """What `normalize` takes, in words, for those who have files alone."""
        channels, height, width = self.image_shape
        colours = {GREY: "grey", RGB: "RGB"}.get(channels, f"{channels} channels")
        size = "of this size"
        if self.is_cropped:
            side = evaluation_side(height)
            size = f"the centre of an image whose short side was resized to {side} pixels"
        return f"uint8 (N, {channels}, {height}, {width}), {colours}, 0 to 255, {size}"

    def check_channels(self) -> None:
        """Raises ValueError if the network takes neither grey nor coloured images."""
        channels, height, width = self.image_shape
        if channels not in (GREY, RGB):
            raise ValueError(
                f"images of {channels} channels cannot be made of image files: give tensors, uint8 "
                f"(N, {channels}, {height}, {width})"
            )

    def to_checkpoint(self) -> dict[str, Any]:
        """Returns tensors and plain data."""
        return asdict(self) | {"image_shape": list(self.image_shape)}

    @classmethod
    def from_checkpoint(cls, content: dict[str, Any]) -> "ImageFormat":
        return cls(**content | {"image_shape": tuple(content["image_shape"])})
