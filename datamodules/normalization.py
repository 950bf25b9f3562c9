"""The papers' four ways of normalising images, as one pair: a mean image and a std.

    normalized = (image - mean) / std        image in bytes, 0..255; mean (C, H, W); std (C, 1, 1)

"pixel_mean"             (He et al. 2015) mean per pixel, std 255.
"pixel_mean_scalar_std"  (Huang et al. 2016, Stochastic Depth) mean per pixel, and one std over all
                         raw pixels: the released code takes it before it subtracts the mean, so
                         that its images have a variance below 1.
"channel"                (DenseNet, MSDNet) mean and std per channel.
"scale"                  mean 0, std 255: images in 0..1.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Normalization = Literal["pixel_mean", "pixel_mean_scalar_std", "channel", "scale"]


def statistics(
    normalization: Normalization, images: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes mean and std over ``images[indices]``, exactly: sums of integers, rounded once.

    Args:
        normalization: see the head of this file.
        images: uint8 (N, C, H, W).
        indices: (n,) the images to use: those of the training split, never of validation or test.

    Returns:
        The mean (C, H, W) and the std (C, 1, 1), in bytes, float32.
    """
    _, channels, height, width = images.shape
    byte_range = torch.full((channels, 1, 1), 255.0)
    if normalization == "scale":
        return torch.zeros(channels, height, width), byte_range

    pixel_sum = torch.zeros(channels, height, width, dtype=torch.int64)
    square_sum = torch.zeros(channels, dtype=torch.int64)
    for chunk in indices.split(1024):  # bounds the memory of the wider integers
        part = images.index_select(0, chunk)
        pixel_sum += part.sum(0, dtype=torch.int64)
        square_sum += part.int().square_().sum((0, 2, 3))
    pixel_mean = (pixel_sum.double() / len(indices)).float()
    channel_sum = pixel_sum.sum((1, 2))
    num_values = len(indices) * height * width

    if normalization == "pixel_mean":
        return pixel_mean, byte_range
    if normalization == "pixel_mean_scalar_std":
        std = _std(channel_sum.sum().item(), square_sum.sum().item(), num_values * channels)
        return pixel_mean, torch.full((channels, 1, 1), std)
    totals, squares = channel_sum.tolist(), square_sum.tolist()
    means = [total / num_values for total in totals]
    stds = [_std(*sums, num_values) for sums in zip(totals, squares, strict=True)]
    return per_channel(means, stds, height, width)


def per_channel(
    means: Sequence[float], stds: Sequence[float], height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Returns the mean (C, H, W) and std (C, 1, 1) for one mean and std per channel, in bytes."""
    mean = torch.tensor(means).view(-1, 1, 1).expand(-1, height, width).contiguous()
    return mean, torch.tensor(stds).view(-1, 1, 1)


def _std(total: int, squares: int, count: int) -> float:
    """The sample standard deviation, from Python's unbounded integers: nothing cancels."""
    return ((count * squares - total * total) / (count * (count - 1))) ** 0.5
