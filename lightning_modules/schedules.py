"""Learning rate schedules that torch does not have as one class."""

from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmupMultiStepLR(LambdaLR):
    """A tenth of the optimizer's rate at first, then all of it, divided by 10 at each milestone.

    Epochs or optimizer steps, according to the module's `lr_interval`, counted from 0. He et al.
    warm ResNet-110 up at a tenth of the rate for about 400 steps; Huang et al. the 1202 layers for
    10 epochs.

    Args:
        optimizer: holds the base rate.
        milestones: where the rate falls.
        warmup: length of the warm-up.
    """

    def __init__(self, optimizer: Optimizer, milestones: Sequence[int], warmup: int):
        def factor(time: int) -> float:
            if time < warmup:
                return 0.1
            return 0.1 ** sum(time >= milestone for milestone in milestones)

        super().__init__(optimizer, factor)
