"""How large images are augmented: which part of one is shown, and the numbers of its colours.

What is drawn here for one image is a pure function of (its size, key). `datamodules.image_files`
cuts the part out, and `datamodules.image_colour` does all that is left, on the device. The draws
are those of torchvision's transforms, in their order: from torch's global generator, which is set
to the key's state for one image and then restored.

"resize_crop"  (He et al. 2015) short side random in [256, 480], random crop of 224, flip, and a
               shift of colour along the principal components (PCA).
"inception"    (fb.resnet.torch: Stochastic Depth, DenseNet) random crop of 8-100% of the area with
               aspect 3/4-4/3; brightness, contrast and saturation by up to 0.4 in random order;
               PCA colour, flip.
"mobile"       (Slimmable) the same with 25-100% of the area.
"randaugment"  (Cubuk et al. 2020) random crop of 8-100% of the area, flip, then two of the 14
               operations of torchvision's `RandAugment` (shear, posterize, equalize, ...) at
               strength 9 of 30. No jitter, no PCA colour.
"trivialaugment"  (Mueller and Hutter 2021) the same with one operation of any strength, of
               torchvision's `TrivialAugmentWide`.
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

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from chance import generator
from datamodules.image_colour import colour_numbers
from datamodules.image_files import Box

Augmentation = Literal[
    "resize_crop", "inception", "mobile", "randaugment", "trivialaugment", "none"
]
Draw = Callable[[Image.Image], tuple[Box, Tensor]]
"""From an image, of which only the size is looked at, to the part to show and colour numbers."""

Policy = Callable[[Image.Image], Image.Image]

JITTER = (0.6, 1.4)  # brightness, contrast and saturation by up to 0.4
ASPECTS = (3 / 4, 4 / 3)


def evaluation_transform(image_size: int) -> Callable[[Image.Image], Image.Image]:
    """Resizes the short side and takes the centre."""
    return transforms.Compose(
        [transforms.Resize(evaluation_side(image_size)), transforms.CenterCrop(image_size)]
    )


def evaluation_side(image_size: int) -> int:
    """Returns the pixels of the short side before the centre is taken: 256 for 224."""
    return round(image_size * 256 / 224)


def draw_resize_crop(image: Image.Image, image_size: int) -> tuple[Box, Tensor]:
    low, high = round(image_size * 256 / 224), round(image_size * 480 / 224)
    short = _random_integer(low, high)
    # The image, resized, has these sides, and shows a square of them.
    width, height = (int(short * side / min(image.size)) for side in image.size)
    top, left = (_random_integer(0, side - image_size) for side in (height, width))
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, (left + image_size) * across, (top + image_size) * down)
    flip = bool(torch.rand(1) < 0.5)
    return box, colour_numbers(flip, torch.randn(3))


def draw_resized_crop(image: Image.Image, smallest: float) -> tuple[Box, Tensor]:
    top, left, height, width = transforms.RandomResizedCrop.get_params(
        image, [smallest, 1.0], list(ASPECTS)
    )
    order, *factors, _ = transforms.ColorJitter.get_params(JITTER, JITTER, JITTER, None)
    jitter = [(kind, factors[kind]) for kind in order.tolist() if kind < len(factors)]
    normal = torch.randn(3)
    flip = bool(torch.rand(1) < 0.5)
    return (left, top, left + width, top + height), colour_numbers(flip, normal, jitter)


def draw_crop(image: Image.Image) -> tuple[Box, Tensor]:
    top, left, height, width = transforms.RandomResizedCrop.get_params(
        image, [0.08, 1.0], list(ASPECTS)
    )
    return (left, top, left + width, top + height), colour_numbers(False, torch.zeros(3))


def training_policy(augmentation: Augmentation) -> Policy | None:
    """Returns what happens to the part of an image that was cut out, before it goes to the device.

    It draws from torch's global generator, after what `training_draw` draws.
    """
    policies = {
        "randaugment": transforms.RandAugment,
        "trivialaugment": transforms.TrivialAugmentWide,
    }
    if augmentation not in policies:
        return None
    policy = policies[augmentation](interpolation=transforms.InterpolationMode.BILINEAR)
    return transforms.Compose([transforms.RandomHorizontalFlip(), policy])


def training_draw(augmentation: Augmentation, image_size: int) -> Draw | None:
    """Returns what draws for one training image, from torch's global generator.

    None stands for "none": the transform of evaluation.
    """
    draws = {
        "resize_crop": partial(draw_resize_crop, image_size=image_size),
        "inception": partial(draw_resized_crop, smallest=0.08),
        "mobile": partial(draw_resized_crop, smallest=0.25),
        "randaugment": draw_crop,
        "trivialaugment": draw_crop,
        "none": None,
    }
    return draws[augmentation]


@contextmanager
def keyed(*key: int | str) -> Iterator[None]:
    """Draws from torch's global generator are, meanwhile, a function of the key."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator(*key).get_state())
        yield


def _random_integer(low: int, high: int) -> int:
    """Draws from low to high, both included."""
    return int(torch.randint(low, high + 1, ()))
