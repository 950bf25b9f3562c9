"""What operating points answered to the images of a test, and what is measured of that."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

TOP = 5
NUM_BINS = 15


class PointAnswers(NamedTuple):
    """What one operating point made of the images of a test, (N,) each."""

    labels: Tensor
    classes: Tensor
    """Those that were predicted."""
    confidences: Tensor
    """Their probabilities, float32."""
    in_top5: Tensor
    """bool: whether the label is among the five classes of the largest logits, or of fewer all."""

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> "PointAnswers":
        """Returns the answers that logits (N, num_classes) are, on their device, without a wait."""
        confidences, classes = logits.float().softmax(1).max(1)
        best = logits.topk(min(TOP, logits.shape[1])).indices
        # Rounding may put a certain answer above 1, and that would be taken for a logit.
        return cls(labels, classes, confidences.clamp(max=1), (best == labels[:, None]).any(1))

    @property
    def top5(self) -> float:
        """Top-5 accuracy."""
        return self.in_top5.double().mean().item()

    @property
    def ece(self) -> float:
        """Expected calibration error: L1, 15 bins of equal width (Guo et al. 2017).

        Of the class with the largest probability it is that of "right or wrong" with two classes.
        """
        right = (self.classes == self.labels).long()
        confidences = self.confidences.double()
        return binary_calibration_error(confidences, right, NUM_BINS, norm="l1").item()

    def confusion(self, num_classes: int) -> Tensor:
        """Returns how many images of each class were taken for each, (true, predicted)."""
        # torchmetrics' needs N x num_classes^2 numbers where algorithms have to be deterministic.
        pairs = self.labels * num_classes + self.classes
        return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def gather_points(
    batches: Sequence[Mapping[str, PointAnswers]], world_size: int
) -> dict[str, PointAnswers]:
    """Returns the answers by point of all batches of all ranks, rank after rank, on the CPU.

    Raises:
        FloatingPointError: one is not finite.
    """
    ranks = [_join(batches)]
    if world_size > 1:
        own, ranks = ranks[0], [{}] * world_size
        torch.distributed.all_gather_object(ranks, own)
    points = _join(ranks)
    for name, answers in points.items():
        if not answers.confidences.isfinite().all():
            raise FloatingPointError(
                f"answers of the operating point {name} are not finite: check the weights of the "
                "checkpoint and the images"
            )
    return points


def _join(parts: Sequence[Mapping[str, PointAnswers]]) -> dict[str, PointAnswers]:
    """Returns the answers of several batches or ranks as those of one, on the CPU."""
    return {
        name: PointAnswers(
            *(torch.cat(v).cpu() for v in zip(*(part[name] for part in parts), strict=True))
        )
        for name in parts[0]
    }


def choose_exits(exits: Sequence[PointAnswers], taken: Tensor) -> PointAnswers:
    """Returns for each image the answer of the exit that it takes.

    Args:
        exits: their answers, shallow to deep.
        taken: (N,), from 0.
    """
    fields = (torch.stack(values, 1) for values in zip(*exits, strict=True))
    return PointAnswers(*(values.gather(1, taken[:, None]).squeeze(1) for values in fields))
