"""What the methods that train several widths in a step share: one width after the other.

Differences from the released code: see `lightning_modules.slimmable`.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from chance import generator
from lightning_modules.base import Batch, ImageClassifier
from networks import Slimmable, WidthMult

MAX_WIDTHS = 1000
"""Per step: a step runs the network as often."""


class SandwichTraining(ImageClassifier):
    """Runs and differentiates widths one by one, and synchronises their gradients once.

    The `net` is a slimmable network. A fit that validates needs a callback that recalibrates (which
    says so by an attribute `recalibrates`) if the widths share their BNs.
    """

    net: Slimmable

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit" or self.net.width_mult_range is None or not self.validates:
            return
        callbacks = self.trainer.callbacks
        if not any(getattr(callback, "recalibrates", False) for callback in callbacks):
            raise ValueError(
                "validation needs BN statistics of the evaluated widths: add "
                "callbacks.BNRecalibration to trainer.callbacks"
            )

    @property
    def steady_widths(self) -> Sequence[float]:
        """The widths that every step runs: they can be recorded."""
        raise NotImplementedError("each method chooses its widths")

    def run_width(self, images: Tensor, width: WidthMult, gates: Tensor | None = None) -> Any:
        """Returns what the network returns of a width in a training step."""
        if self.capture == "none" or width not in self.steady_widths or gates is not None:
            return self.net(images, width_mult=width, gates=gates)
        self.net.forget_statistics()  # replayed layers do not
        return self.recorded(f"{width:g}", partial(self.net, width_mult=width))(images)

    # --- optimization -----------------------------------------------------------------------------

    def spared_by_method(self) -> set[nn.Parameter]:
        decayed = {
            module.weight
            for module in self.net.modules()
            if isinstance(module, nn.Linear)
            or (isinstance(module, nn.Conv2d) and module.groups == 1)
        }
        return set(self.net.parameters()) - decayed

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.trainer.optimizers[0].zero_grad()

    def optimizer_zero_grad(self, *args: Any) -> None:
        """Nothing: Lightning asks for it after `training_step`, whose gradients would be lost."""

    def backward_now(self, loss: Tensor) -> None:
        """Adds the gradients of a loss that is not the last of its step.

        Lightning does the same with the loss that `training_step` returns. DDP, whose forward we
        are in, does not synchronise before that.
        """
        with torch.autocast(self.device.type, enabled=False):
            loss = loss / self.trainer.accumulate_grad_batches
            self.backward(self.trainer.precision_plugin.pre_backward(loss, self))


def evaluated_widths(net: Slimmable, widths: Sequence[float]) -> list[float]:
    """Returns widths, and the widest of a network, narrow to wide; of one name there is one."""
    return sorted({float(net.width(width).name) for width in [*widths, net.widest]})


def zero_of(parameters: Iterable[Tensor]) -> Tensor:
    """Returns 0, as a function of parameters that the last width of a step may not have run.

    DDP synchronises the gradients of what the last backward reaches.
    """
    return 0 * torch.cat([parameter.flatten() for parameter in parameters]).sum()


def draw_widths(
    width_mult_range: tuple[float, float], shape: tuple[int, int], seed: int, step: int
) -> list[list[float]]:
    """Draws ratios of a step: the same on all ranks, and for all batches of the step.

    Args:
        width_mult_range: narrowest and widest.
        shape: number of widths, and of ratios of each.
        seed: of the run.
        step: the optimizer's.
    """
    low, high = width_mult_range
    chance = generator("widths", seed, step)
    draws = torch.rand(*shape, dtype=torch.float64, generator=chance)
    return (low + (high - low) * draws).tolist()
