"""How networks draw their weights: layer by layer, in the order of definition."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn


def draw_weights(
    network: nn.Module,
    mode: Literal["fan_in", "fan_out"],
    nonlinearity: Literal["linear", "relu"] = "relu",
    draw_linear: Callable[[Tensor], object] | None = None,
    zero_linear_biases: bool = True,
) -> None:
    """Draws convolutions from He's normal distribution N(0, 2 / fan) and zeroes their biases.

    Args:
        network: any part of a network.
        mode: the fan: inputs of an output ("fan_in"), or outputs of an input.
        nonlinearity: "linear" draws convolutions from N(0, 1 / fan).
        draw_linear: draws the weights of a linear layer; None: they keep torch's default.
        zero_linear_biases: False: they, too, keep torch's default.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode=mode, nonlinearity=nonlinearity)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Linear):
            if draw_linear is not None:
                draw_linear(layer.weight)
            if zero_linear_biases:
                nn.init.zeros_(layer.bias)
