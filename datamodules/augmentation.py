"""Flip, pad, crop and normalise a whole batch of small images at once, on any device.

The papers pad with zeros *after* normalising (the border is the mean colour). Here the shift that
normalises bytes is flipped, padded and cropped in the same way as they are:

    view(image * scale + shift) = view(image) * scale + view(shift)
    view = crop(pad(flip(.)))    scale = 1 / std    shift = -mean / std

Where a view shows padding both terms are exactly 0: what stands there in memory, the bytes before
or behind the row, is multiplied by 0. There are only 2 (2 padding + 1)^2 views, so those of the
shift and of where the image is are tabulated. It is fast because only bytes are moved around, and
floats are touched in three sweeps. A GPU waits for launches instead, so there the scale is
tabulated, too, which takes 8 kernels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chance import generator


def draw_views(
    num_samples: int, padding: int, horizontal_flip: bool, seed: int, epoch: int
) -> Tensor:
    """Draws which view of every training sample is shown in an epoch: a function of (seed, epoch).

    Returns:
        int64 (num_samples,): numbers of views, see `BatchTransform`.
    """
    num_crops = (2 * padding + 1) ** 2
    chance = generator("augmentation", seed, epoch)
    return torch.randint(num_crops * (1 + horizontal_flip), (num_samples,), generator=chance)


class BatchTransform(nn.Module):
    """Normalises batches of bytes; in training it shows a view of each image.

    View ``(flip * s + top) * s + left``, with s = 2 * padding + 1, has its upper left corner at
    pixel (top, left) of the flipped (flip = 1) or unflipped (flip = 0) image with `padding` zeros
    on each side.

    Args:
        mean: (C, H, W), in bytes.
        std: (C, 1, 1), in bytes.
        padding: zeros on each side, in pixels.
    """

    def __init__(self, mean: Tensor, std: Tensor, padding: int):
        super().__init__()
        channels, height, width = mean.shape
        num_pixels = channels * height * width
        # What lies on either side of an image and its mirror image, for views that reach beyond.
        margin = padding * (width + 1)
        offsets = torch.arange(2 * padding + 1)
        views = torch.cartesian_prod(torch.arange(2), offsets, offsets)
        flip, top, left = views.T
        # Where the rows of pixels of each view start, (num_views, C * H).
        first = margin + flip * num_pixels + (top - padding) * width + left - padding
        row_starts = first[:, None] + torch.arange(0, num_pixels, width)

        scale, shift = 1 / std, -mean / std
        both = torch.stack([scale.expand_as(shift), shift])
        padded = [F.pad(each, [padding] * 4) for each in (both, both.flip(3))]
        factors = [padded[f][..., y : y + height, x : x + width] for f, y, x in views.tolist()]
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.register_buffer("factors", torch.stack(factors, 1))  # (2, num_views, C, H, W)
        self.register_buffer("is_inside", (self.factors[0] != 0).byte())
        self.register_buffer("row_starts", row_starts)
        self.register_buffer("margin", torch.zeros(1, margin, dtype=torch.uint8))
        self.register_buffer("image_starts", torch.empty(0, 1, dtype=torch.int64))

    def forward(self, images: Tensor, views: Tensor | None = None) -> Tensor:
        """Normalises, and takes views with zeros around the normalised image.

        Args:
            images: uint8 (N, C, H, W).
            views: (N,), one number per image; None shows the images themselves.

        Returns:
            float32 (N, C, H, W).
        """
        if views is None:
            return torch.addcmul(self.shift, images, self.scale)
        blend = self.blend_in_few_kernels if images.is_cuda else self.blend_in_few_bytes
        return blend(self._show(images, views), views)

    def blend_in_few_kernels(self, shown: Tensor, views: Tensor) -> Tensor:
        # Each by itself: as halves of one tensor, the images would keep the scale in memory.
        scale, shift = (values.index_select(0, views) for values in self.factors)
        return shift.addcmul_(shown, scale)

    def blend_in_few_bytes(self, shown: Tensor, views: Tensor) -> Tensor:
        shown.mul_(self.is_inside.index_select(0, views))
        return self.factors[1].index_select(0, views).addcmul_(shown, self.scale)

    def _show(self, images: Tensor, views: Tensor) -> Tensor:
        """Returns the views, uint8 (N, C, H, W), with any bytes where they show padding."""
        count, width = len(images), images.shape[3]
        # Mirroring all is faster than finding those to flip, and no GPU has to wait.
        margin = self.margin.expand(count, -1)
        parts = margin, images.flatten(1), images.flip(3).flatten(1), margin
        both = torch.cat(parts, 1)
        if len(self.image_starts) < count:
            starts = torch.arange(count, device=images.device) * both.shape[1]
            self.image_starts = starts[:, None]

        # Entry s of the overlapping view `rows` is the row of pixels that starts at byte s, so that
        # a crop is a few copies of whole rows.
        rows = both.as_strided((both.numel() - width + 1, width), (1, 1))
        starts = self.row_starts.index_select(0, views) + self.image_starts[:count]
        return rows.index_select(0, starts.flatten()).view(images.shape)
