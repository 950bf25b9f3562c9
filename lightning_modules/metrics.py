"""What is measured of an operating point, and what it is called."""

import torch
from torch import Tensor
from torchmetrics import Metric

FULL = "full"
"""Name of the operating point that is the whole network; its metrics carry no suffix."""


def accuracy_name(split: str, point: str = FULL) -> str:
    """Returns the name under which the accuracy of an operating point is logged.

    Args:
        split: "val" or "test".
        point: name of the operating point.
    """
    return f"{split}/acc" if point == FULL else f"{split}/acc_{point}"


class MeanOverImages(Metric):
    """The mean of a value over images, from its sums over batches of any size.

    torchmetrics' `MeanMetric` either ignores the weights or looks for NaN in every update, for
    which a GPU has to wait; its accuracy runs a dozen kernels where three will do.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "num_images"):
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, total: Tensor | float, num_images: int) -> None:
        """Counts images, over which `total` is the sum of the value."""
        self.total += total
        self.num_images += num_images

    def compute(self) -> Tensor:
        """Returns the mean, NaN of no images."""
        return self.total / self.num_images


def answers_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns which of the labels (N,) have the largest of the logits (N, num_classes)."""
    return logits.argmax(1) == labels
