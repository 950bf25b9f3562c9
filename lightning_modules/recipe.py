"""What a training step makes of a batch: images that are mixed, labels that are softened.

    mixup   (Zhang et al., arXiv 1710.09412)   x <- lam x + (1 - lam) x'
    cutmix  (Yun et al., arXiv 1905.04899)     x <- x' within a box, x around it
    both                                       y <- lam y + (1 - lam) y',  lam ~ Beta(alpha, alpha)
    label smoothing (Szegedy et al., arXiv 1512.00567)   y <- (1 - e) y + e / num_classes

x' is the image before x in its batch. The arithmetic is that of torchvision's `MixUp` and `CutMix`
and of torch's `cross_entropy`. Of a box that reaches beyond the image, what is within counts, and
lam is the share of x that is left.

One coin, one lam and one box are drawn per batch, keyed by (seed, step, batch): the same on all
ranks, so that the batches of a step that ranks share are mixed like one. Each rank pairs the images
that it has. They are Python numbers on the host, so nothing waits for a device.
"""

import math
import random
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, arange

from chance import key_to_seed
from networks import check_numbers


class Mix(NamedTuple):
    """How a batch is mixed."""

    lam: float
    """The share of an image that is its own."""
    box: tuple[int, int, int, int] | None
    """Top, bottom, left and right of what another image fills; None: both are blended."""


@dataclass(frozen=True)
class Recipe:
    """How training batches are mixed and their labels softened; by default not at all.

    Validation and test are not concerned: their images and losses are plain. `train/acc` counts the
    label with the larger share of a mixed image, the one of lower number if the shares are equal.

    Args:
        label_smoothing: share of every label that is spread evenly over all classes.
        mixup_alpha: of the Beta distribution whose draw blends two images; None: no mixup.
        cutmix_alpha: of the Beta distribution whose draw is the share of an image that a box leaves
            of it; None: no cutmix.
        mix_prob: how likely a batch is mixed.
        cutmix_prob: how likely a mixed batch is cut rather than blended, if both are given.

    Raises:
        ValueError: a number that is out of range, or that would change nothing.
    """

    label_smoothing: float = 0.0
    mixup_alpha: float | None = None
    cutmix_alpha: float | None = None
    mix_prob: float = 1.0
    cutmix_prob: float = 0.5

    def __post_init__(self) -> None:
        alphas = [n for n in ("mixup_alpha", "cutmix_alpha") if getattr(self, n) is not None]
        for interval, names in (
            ("[0, 1)", ["label_smoothing"]),
            ("(0, inf)", alphas),
            ("[0, 1]", ["mix_prob", "cutmix_prob"]),
        ):
            check_numbers(interval, **{f"recipe.{name}": getattr(self, name) for name in names})
        if self.mix_prob != 1 and not self.mixes:
            raise ValueError(
                "recipe.mix_prob is given and nothing is mixed: give recipe.mixup_alpha or "
                "recipe.cutmix_alpha"
            )
        if self.cutmix_prob != 0.5 and None in (self.mixup_alpha, self.cutmix_alpha):
            raise ValueError(
                "recipe.cutmix_prob chooses between two: give recipe.mixup_alpha and "
                "recipe.cutmix_alpha, or drop it"
            )

    @property
    def mixes(self) -> bool:
        """Whether any batch may be mixed."""
        return self.mixup_alpha is not None or self.cutmix_alpha is not None

    def draw(self, height: int, width: int, *key: int) -> Mix | None:
        """Draws how a batch is mixed, a function of the key; None: it is not.

        Args:
            height, width: of its images, in pixels.
            key: for example (seed, step, batch).
        """
        chance = random.Random(key_to_seed("mix", *key))
        is_mixed, is_cut = (chance.random() < prob for prob in (self.mix_prob, self.cutmix_prob))
        if not self.mixes or not is_mixed:
            return None
        if self.cutmix_alpha is None or (self.mixup_alpha is not None and not is_cut):
            return Mix(chance.betavariate(self.mixup_alpha, self.mixup_alpha), None)
        lam = chance.betavariate(self.cutmix_alpha, self.cutmix_alpha)
        return cut(lam, chance.randrange(height), chance.randrange(width), height, width)


NONE = Recipe()


def cut(lam: float, row: int, column: int, height: int, width: int) -> Mix:
    """Returns a box around a pixel, with the share 1 - lam of the image if all of it is inside."""
    half = 0.5 * math.sqrt(1 - lam)
    half_height, half_width = int(half * height), int(half * width)
    top, bottom = max(row - half_height, 0), min(row + half_height, height)
    left, right = max(column - half_width, 0), min(column + half_width, width)
    share = (bottom - top) * (right - left) / (height * width)
    return Mix(1 - share, (top, bottom, left, right))


def mix_images(images: Tensor, mix: Mix) -> Tensor:
    """Returns the images (N, C, H, W), each mixed with the one before it."""
    if mix.box is None:
        return images.roll(1, 0).mul_(1 - mix.lam).add_(images * mix.lam)
    top, bottom, left, right = mix.box
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images[..., top:bottom, left:right].roll(1, 0)
    return mixed


def mix_labels(labels: Tensor, mix: Mix, num_classes: int) -> Tensor:
    """Returns the classes' shares (N, num_classes), float32, of mixed images with labels (N,)."""
    # torch's one_hot would read the labels.
    shares = (labels[:, None] == arange(num_classes, device=labels.device)).float()
    return shares.roll(1, 0).mul_(1 - mix.lam).add_(shares * mix.lam)
