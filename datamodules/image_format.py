"""What an image must become before a network that was trained can answer: kept with its weights."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


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
    """

    data: str
    image_shape: tuple[int, int, int]
    scale: Tensor
    shift: Tensor
    class_names: list[str] | None
    is_cropped: bool

    def normalize(self, images: Tensor) -> Tensor:
        """Returns float32 (N, C, H, W) of uint8 (N, C, H, W): what the steps receive."""
        scale, shift = (values.to(images.device) for values in (self.scale, self.shift))
        return torch.addcmul(shift, images.float(), scale)

    def to_checkpoint(self) -> dict[str, Any]:
        """Returns tensors and plain data."""
        return asdict(self) | {"image_shape": list(self.image_shape)}

    @classmethod
    def from_checkpoint(cls, content: dict[str, Any]) -> "ImageFormat":
        return cls(**content | {"image_shape": tuple(content["image_shape"])})
