"""Residual branches with a gate each, in networks whose modules keep the names of torchvision.

    x_b = x_{b-1} + gate_b * branch_b(x_{b-1})

What is gated is a branch, as timm's drop path has it: a ViT's layer has two, of which either may be
closed. Its modules lie where torchvision names them, so a branch holds none: it is a view, made
when it is asked for, and always of the modules that are there.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from networks.residual_blocks import Gate, add_gated


@dataclass(frozen=True)
class Branch:
    """Modules in a row, added to what they read where the gate is open.

    No layer mixes samples, so a branch on the surviving samples alone answers what it would have
    answered to them among all.
    """

    layers: tuple[nn.Module, ...]
    last: nn.Linear
    """Inside `layers`; scaling it scales the branch."""
    before: nn.Module | None = None
    """Changes the shape first, whether the gate is open or not."""

    @property
    def closes_by_sample(self) -> bool:
        """Whether the closed branch leaves a sample as it is; `before` learns from all of them."""
        return self.before is None

    def residual(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def last_layer(self) -> nn.Linear:
        """Returns the layer whose output is the branch's output: scaling it scales the branch."""
        return self.last

    def modules(self) -> Iterator[nn.Module]:
        own = self.layers if self.before is None else (self.before, *self.layers)
        return itertools.chain.from_iterable(layer.modules() for layer in own)

    def parameters(self) -> Iterator[nn.Parameter]:
        return itertools.chain.from_iterable(
            module.parameters(recurse=False) for module in self.modules()
        )

    def __call__(self, x: Tensor, gate: Gate = None) -> Tensor:
        if self.before is not None:
            x = self.before(x)
        return add_gated(x, self.residual, x, gate)
