"""Augmentation of large images, one at a time, as a pure function of (image, key).

The transforms are torchvision's. They draw from torch's global generator, which is set to the key's
state for the duration of one image and then restored.

"resize_crop"  (He et al. 2015) short side random in [256, 480], random crop of 224, flip, and a
               shift of colour along the principal components (PCA).
"inception"    (fb.resnet.torch: Stochastic Depth, DenseNet) random crop of 8-100% of the area with
               aspect 3/4-4/3; brightness, contrast and saturation by up to 0.4 in random order;
               PCA colour, flip.
"mobile"       (Slimmable) the same with 25-100% of the area.
"none"         resize and centre crop, as in evaluation.

Sizes are for `image_size` 224 and scale with it.

Differences from the released code:
    * fb.resnet.torch draws the aspect w / h uniformly in 3/4-4/3, and swaps w and h half of the
      time; here it is log-uniform in the same range, as in torchvision and the Slimmable code.
      It resizes bicubically; here bilinear with antialiasing.
    * He et al. subtract a mean per pixel; here every way has ImageNet's mean and std per channel.
    * MSDNet's PyTorch code takes the crop and the flip of "inception" without its colours; its
      Torch code takes all, and so do our experiments.
    * The Slimmable code adds the PCA colour, computed for pixels in 0..1, to pixels in 0..255,
      where it is invisible; here it has its full size.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

from chance import generator

Augmentation = Literal["resize_crop", "inception", "mobile", "none"]
Transform = Callable[[Image.Image], Image.Image]

# Krizhevsky et al. 2012: principal components of ImageNet's colours in 0..1, one per column.
PCA_STD = torch.tensor([0.2175, 0.0188, 0.0045])
PCA_COMPONENTS = torch.tensor(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)


def add_pca_colour(image: Image.Image) -> Image.Image:
    """Shifts all colours along ImageNet's principal components, by N(0, 0.1) of each."""
    shift = PCA_COMPONENTS @ (PCA_STD * torch.randn(3) * 0.1) * 255
    pixels = np.asarray(image, dtype=np.float32) + shift.numpy()
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


class RandomShortSide:
    """Resizes so that the short side is random in [low, high] pixels."""

    def __init__(self, low: int, high: int):
        self.low = low
        self.high = high

    def __call__(self, image: Image.Image) -> Image.Image:
        return functional.resize(image, int(torch.randint(self.low, self.high + 1, ())))


def evaluation_transform(image_size: int) -> Transform:
    """Resizes the short side to 256 (for 224) and takes the centre."""
    return transforms.Compose(
        [transforms.Resize(round(image_size * 256 / 224)), transforms.CenterCrop(image_size)]
    )


def training_transform(augmentation: Augmentation, image_size: int) -> Transform:
    """Returns a transform that draws from torch's global generator.

    Raises:
        ValueError: `augmentation` is not one of the four.
    """
    flip = transforms.RandomHorizontalFlip()
    if augmentation == "none":
        return evaluation_transform(image_size)
    if augmentation == "resize_crop":
        low, high = round(image_size * 256 / 224), round(image_size * 480 / 224)
        crop = transforms.RandomCrop(image_size)
        return transforms.Compose([RandomShortSide(low, high), crop, flip, add_pca_colour])
    smallest = {"inception": 0.08, "mobile": 0.25}
    if augmentation not in smallest:
        raise ValueError(
            f"augmentation is {augmentation!r}: give resize_crop, inception, mobile or none"
        )
    crop = transforms.RandomResizedCrop(image_size, scale=(smallest[augmentation], 1))
    jitter = transforms.ColorJitter(0.4, 0.4, 0.4)
    return transforms.Compose([crop, jitter, add_pca_colour, flip])


def apply_keyed(transform: Transform, image: Image.Image, *key: int | str) -> Image.Image:
    """Applies a random transform as a function of (image, key)."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator(*key).get_state())
        return transform(image)
