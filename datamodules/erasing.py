"""Random erasing (Zhong et al., arXiv 1708.04896): a box of a training image shows one colour.

With probability p a box of 2 to 33% of the image, of aspect 0.3 to 3.3, as `RandomErasing` of
torchvision draws it: up to ten tries until one is smaller than the image. Boxes of many images are
drawn at once, and filled after normalisation, on the device, with 0: the mean colour, where the
normalisation subtracts it, otherwise black.
"""

import math

import torch
from torch import Generator, Tensor

SHARES = (0.02, 0.33)
ASPECTS = (0.3, 3.3)
NUM_TRIES = 10


def draw_boxes(count: int, size: tuple[int, int], prob: float, chance: Generator) -> Tensor:
    """Draws what is erased of each of `count` images.

    Args:
        count: number of images.
        size: their height and width, in pixels.
        prob: how likely an image has a box.
        chance: draws the same, whatever `prob` is.

    Returns:
        int64 (count, 4): top, bottom, left and right; all 0 where nothing is erased.
    """
    height, width = size
    draws = torch.rand(count, 2 * NUM_TRIES + 3, dtype=torch.float64, generator=chance)
    coin, row, column, *tries = draws.unbind(1)
    low, high = SHARES
    areas = (low + (high - low) * torch.stack(tries[::2], 1)) * height * width
    low, high = map(math.log, ASPECTS)
    aspects = (low + (high - low) * torch.stack(tries[1::2], 1)).exp()
    heights, widths = (areas * aspects).sqrt().round(), (areas / aspects).sqrt().round()
    fits = (heights < height) & (widths < width)
    first = fits.byte().argmax(1, keepdim=True)  # the first that does
    tall, wide = (values.gather(1, first)[:, 0] for values in (heights, widths))
    top, left = (row * (height - tall + 1)).floor(), (column * (width - wide + 1)).floor()
    boxes = torch.stack([top, top + tall, left, left + wide], 1)
    return (boxes * ((coin < prob) & fits.any(1))[:, None]).long()


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Fills boxes with 0, in place.

    Args:
        images: normalised, (N, C, H, W).
        boxes: (N, 4), see `draw_boxes`.
    """
    rows, columns = (torch.arange(side, device=images.device) for side in images.shape[2:])
    top, bottom, left, right = boxes.unsqueeze(2).unbind(1)  # each (N, 1)
    is_row = (rows >= top) & (rows < bottom)
    is_column = (columns >= left) & (columns < right)
    return images.masked_fill_((is_row[:, :, None] & is_column[:, None, :])[:, None], 0)
