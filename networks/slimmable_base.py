"""What all networks of any width share: narrow networks that are kept, and BN statistics by width.

Papers, and differences from the released code: see `networks.slimmable`.
"""

from collections.abc import Sequence
from reprlib import repr as shown

import torch
from torch import Tensor, nn

from networks.narrow import KeptWidths
from networks.rows import numbers_of
from networks.slimmable_layers import SlimmableBatchNorm2d, Width, WidthMult

BlockGates = Sequence[float] | Tensor
"""One per residual block, on the CPU."""


def check_width(width_mult: WidthMult) -> None:
    """Raises ValueError unless a width is a number, or several."""
    is_tensor = isinstance(width_mult, Tensor) and width_mult.dim() == 1
    if isinstance(width_mult, Sequence) or is_tensor:
        fits = all(isinstance(ratio, float | int | Tensor) for ratio in width_mult)
    else:
        fits = isinstance(width_mult, float | int)
    if not fits:
        raise ValueError(f"width is {shown(width_mult)}: give a number, or one per group")


def block_gates(gates: BlockGates) -> list[float]:
    """Returns gates as numbers.

    Raises:
        ValueError: they are not one per block.
    """
    if isinstance(gates, Tensor) and gates.dim() > 1:
        raise ValueError("the gates of a slimmable network are one per block, not per sample")
    return numbers_of(gates)


class Slimmable(nn.Module):
    """Base of networks of any width; a subclass says what a width is, and cuts it out.

    Attributes:
        in_channels: channels of the images.
        width_mults, width_mult_range: see `SlimmableNetwork`.
        num_groups: number of ratios that a non-uniform width has.
        num_blocks: number of residual blocks, which gates close.
    """

    in_channels: int
    width_mults: tuple[float, ...] | None
    width_mult_range: tuple[float, float] | None
    num_groups: int
    num_blocks: int

    def __init__(self) -> None:
        super().__init__()
        self._kept = KeptWidths()

    def width(self, width_mult: WidthMult) -> Width:
        """Resolves a width, see `SlimmableNetwork`."""
        raise NotImplementedError("each kind of network has widths of its own")

    def cut_out(self, width: Width, gates: BlockGates | None = None) -> nn.Module:
        """Returns an ordinary network of one width, made of slices of this one's memory.

        It is in evaluation mode. The gates are in it.
        """
        raise NotImplementedError("each kind of network is cut in its own way")

    @property
    def widest(self) -> float:
        """The widest of the widths."""
        return max(self.width_mults or self.width_mult_range)

    def kept(self, width_mult: WidthMult, gates: BlockGates | None) -> nn.Module | None:
        """Returns a narrow network that is kept until this one changes, see `KeptWidths`.

        None: this one has to run layer by layer, since it trains, needs gradients or is recorded.
        """
        # A captured graph would go on reading copies of weights that have changed.
        is_cuda = next(self.parameters()).is_cuda
        captures = is_cuda and torch.cuda.is_current_stream_capturing()
        if self.training or torch.is_grad_enabled() or captures:
            return None
        check_width(width_mult)
        is_number = isinstance(width_mult, float | int)
        key = width_mult if is_number else tuple(map(float, width_mult))
        gates = None if gates is None else tuple(block_gates(gates))

        def make() -> tuple[str, nn.Module]:
            width = self.width(width_mult)
            return width.name, self.cut_out(width, gates)

        return self._kept.get(self, (key, gates), make)

    def is_calibrated(self, width_mult: WidthMult) -> bool:
        """Tells whether every BN has statistics for a width."""
        name = self.width(width_mult).name
        return all(
            name in norm.statistics
            for norm in self.modules()
            if isinstance(norm, SlimmableBatchNorm2d)
        )

    def train(self, mode: bool = True) -> "Slimmable":
        self._kept.clear()
        return super().train(mode)

    def forget_statistics(self) -> None:
        """Drops the BN statistics of all widths, which a training step outdates."""
        for norm in self.modules():
            if isinstance(norm, SlimmableBatchNorm2d) and norm.statistics:
                norm.statistics = {}
