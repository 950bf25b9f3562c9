"""A residual block of ordinary layers."""

from torch import Tensor, nn


class Residual(nn.Module):
    """``activation(shortcut(x) + branch(x))``.

    Args:
        branch: any layers.
        shortcut: layers, or an empty `nn.Sequential`: the identity.
        activation: what follows the addition.
    """

    def __init__(self, branch: nn.Module, shortcut: nn.Module, activation: nn.Module):
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.branch(x) + self.shortcut(x))
