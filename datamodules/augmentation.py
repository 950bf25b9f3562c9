"""Flip, pad, crop and normalise a whole batch of small images at once, on any device.

The papers pad with zeros *after* normalising (the border is the mean colour). Here bytes are padded
before, and the shift that normalises them is flipped, padded and cropped in the same way:

    view(image * scale + shift) = view(image) * scale + view(shift)
    view = crop(pad(flip(.)))    scale = 1 / std    shift = -mean / std

Where a view shows padding both terms are exactly 0. There are only 2 (2 padding + 1)^2 views, so
those of the shift are tabulated. It is fast because only bytes are moved around, and floats are
touched in three sweeps.
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
        self.padding = padding
        channels, height, width = (mean.shape[0], *(size + 2 * padding for size in mean.shape[1:]))
        offsets = torch.arange(2 * padding + 1)
        flip, top, left = torch.cartesian_prod(torch.arange(2), offsets, offsets).T.contiguous()
        # Where the rows of pixels of each view start in a padded image, (num_views, C * H).
        rows = torch.arange(channels * height).view(channels, height)[:, : mean.shape[1]].flatten()
        row_starts = (top * width + left)[:, None] + rows * width

        self.register_buffer("flip", flip)
        self.register_buffer("row_starts", row_starts)
        self.register_buffer("scale", 1 / std)
        self.register_buffer("shift", -mean / std)
        copies = self.shift.expand(len(flip), *mean.shape)
        self.register_buffer("shift_views", self._show(copies, torch.arange(len(flip))))

    def forward(self, images: Tensor, views: Tensor | None = None) -> Tensor:
        """Normalises, and takes views with zeros around the normalised image.

        Args:
            images: uint8 (N, C, H, W).
            views: (N,), one number per image; None shows the images themselves.

        Returns:
            float32 (N, C, H, W).
        """
        if views is None:
            return torch.addcmul(self.shift, images.float(), self.scale)
        shown = self._show(images, views).float()
        return self.shift_views.index_select(0, views).addcmul_(shown, self.scale)

    def _show(self, images: Tensor, views: Tensor) -> Tensor:
        """Returns the views, (N, C, H, W), of images of any type."""
        samples = torch.arange(len(images), device=images.device)

        # Flipping all and choosing is faster than finding those to flip, and no GPU has to wait.
        both = torch.cat([images, images.flip(3)])
        chosen = both.index_select(0, self.flip.index_select(0, views) * len(images) + samples)
        padded = F.pad(chosen, [self.padding] * 4)

        # Entry s of the overlapping view `rows` is the row of pixels that starts at pixel s of the
        # storage, so that a crop is a few copies of whole rows.
        width = images.shape[3]
        rows = padded.as_strided((padded.numel() - width + 1, width), (1, 1))
        starts = self.row_starts.index_select(0, views) + samples[:, None] * padded.stride(0)
        return rows.index_select(0, starts.flatten()).view(images.shape)
