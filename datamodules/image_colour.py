"""All arithmetic on the pixels of large images: a batch at a time, on the device.

Brightness, contrast and saturation all mix an image x with another one: with black, with the mean
of its grey, and with its grey (fb.resnet.torch, torchvision). So each is, with a factor f,

    x <- clamp(f x + a grey(x) + b mean(grey(x)))        brightness a = b = 0
                                                         contrast   a = 0, b = 1 - f
                                                         saturation a = 1 - f, b = 0

and images of one batch, each with an order and factors of its own, need no masks: the order is in
their coefficients. The numbers of an image, which travel with the batch, are in this order: whether
it is flipped (0 or 1); what is added to its red, green and blue at last; and (f, a, b) for each of
its steps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Krizhevsky et al. 2012: principal components of ImageNet's colours in 0..1, one per column.
PCA_STD = torch.tensor([0.2175, 0.0188, 0.0045])
PCA_COMPONENTS = torch.tensor(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)
BRIGHTNESS, CONTRAST, SATURATION = range(3)
NUM_FIRST = 4  # the flip and the three colours


def colour_numbers(flip: bool, normal: Tensor, jitter: Sequence[tuple[int, float]] = ()) -> Tensor:
    """Returns the numbers of one image, see the head of this file.

    Args:
        flip: whether it is mirrored.
        normal: (3,) draws of N(0, 1); by a tenth of each all colours shift along ImageNet's
            principal components (PCA).
        jitter: which of BRIGHTNESS, CONTRAST and SATURATION happens, and its factor, in order.

    Returns:
        float32 (4 + 3 * len(jitter),).
    """
    shift = PCA_COMPONENTS @ (PCA_STD * normal * 0.1) * 255
    steps = [
        (factor, (1 - factor) * (kind == SATURATION), (1 - factor) * (kind == CONTRAST))
        for kind, factor in jitter
    ]
    return torch.tensor([flip, *shift.tolist(), *(value for step in steps for value in step)])


class ColourTransform(nn.Module):
    """Normalises batches of bytes; in training it flips and recolours each image first.

    Args:
        mean: of each channel, in bytes.
        std: of each channel, in bytes.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
        self.register_buffer("scale", 1 / std)
        self.register_buffer("shift", -mean / std)

    def forward(self, images: Tensor, numbers: Tensor | None = None) -> Tensor:
        """Recolours, clamping to 0..255 after every step, and normalises.

        Grey images are recoloured as if they had three channels, and are made grey again.

        Args:
            images: uint8 (N, 3, H, W), or (N, 1, H, W) of grey, in any memory format.
            numbers: float32 (N, 4 + 3 * number of steps); None: normalises alone.

        Returns:
            float32 of the shape of the images, contiguous.
        """
        images = images.contiguous()
        if numbers is None:
            pixels = images.float()
        else:
            columns = numbers[:, :, None, None, None].unbind(1)  # each (N, 1, 1, 1)
            # Flipping all and choosing asks nothing of a GPU, as finding those to flip would.
            pixels = torch.where(columns[0] > 0, images.flip(3), images).float()
            if images.shape[1] == 1:
                pixels = pixels.repeat(1, 3, 1, 1)
            for step in range(NUM_FIRST, len(columns), 3):
                jitter(pixels, *columns[step : step + 3])
            pixels.add_(numbers[:, 1:NUM_FIRST, None, None]).clamp_(0, 255)
            if images.shape[1] == 1:
                pixels = grey_of(pixels)
        return torch.addcmul(self.shift, pixels, self.scale, out=pixels)


def grey_of(pixels: Tensor) -> Tensor:
    """Returns the grey (N, 1, H, W) of float32 (N, 3, H, W)."""
    red, green, blue = pixels.split(1, dim=1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def jitter(pixels: Tensor, factor: Tensor, of_grey: Tensor, of_mean: Tensor) -> None:
    """Takes one step, see the head of this file, in place: a new tensor costs more than the step.

    Args:
        pixels: float32 (N, 3, H, W) in 0..255.
        factor, of_grey, of_mean: f, a and b, each (N, 1, 1, 1).
    """
    grey = grey_of(pixels)
    mean = grey.mean((1, 2, 3), keepdim=True)
    base = torch.addcmul(mean * of_mean, grey, of_grey)
    torch.addcmul(base, pixels, factor, out=pixels).clamp_(0, 255)
