"""What an operating point costs: multiply-accumulates, parameters, and time on a device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def count_macs(function: Callable[[Tensor], Any], images: Tensor) -> int:
    """Runs `function` on `images` and counts multiply-accumulates of convolution and linear layers.

    BN, ReLU, pooling, biases and additions count 0, the convention of the papers (which say
    "FLOPs"). Only what is executed is counted: a closed gate, a narrow width or an early exit costs
    what it costs. Works on the meta device. Put the network in evaluation mode first, else its BN
    statistics take part.

    Args:
        function: a network, or one of its operating points.
        images: (N, C, H, W).

    Returns:
        MACs of the whole batch.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(images)
    return counter.get_total_flops() // 2


def wait_for(device: torch.device) -> None:
    """Returns when a GPU has done what it was given, as every measurement of time has to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_params(network: nn.Module) -> int:
    """Counts the learnable numbers: BN scales and shifts included, running statistics not."""
    return sum(parameter.numel() for parameter in network.parameters())


def count_params_run(network: nn.Module, function: Callable[[Tensor], Any], images: Tensor) -> int:
    """Counts the learnable numbers of the layers of `network` that `function` runs on `images`."""
    used = set()
    hooks = [
        module.register_forward_pre_hook(
            lambda module, _: used.update(module.parameters(recurse=False))
        )
        for module in network.modules()
    ]
    try:
        with torch.no_grad():
            function(images)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(parameter.numel() for parameter in used)
