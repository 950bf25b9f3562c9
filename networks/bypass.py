"""Which of torch's modules may be left out, and the functions that they call be called instead.

A module costs Python's time per call, and a BN one kernel more, which adds 1 to the number of
batches; many such numbers can be raised by one kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.watch import has_hooks


def is_simple_conv(conv: nn.Module) -> bool:
    """Tells whether the module is torch's convolution, without bias, and nobody listens to it."""
    is_conv = type(conv) is nn.Conv2d and conv.bias is None and conv.padding_mode == "zeros"
    return is_conv and not isinstance(conv.padding, str) and not has_hooks(conv)


def is_simple_norm(norm: nn.Module) -> bool:
    """Tells whether the module is torch's BN in training mode, and nobody listens to it.

    Its running statistics move by a constant share, so that it never reads the number of batches.
    """
    is_norm = type(norm) is nn.BatchNorm2d and norm.training and not has_hooks(norm)
    return is_norm and not (
        norm.weight is None or norm.running_mean is None or norm.momentum is None
    )


class ConvLayer(nn.Sequential):
    """A convolution, a BN and a ReLU; more may follow."""

    def forward(self, x: Tensor, counters: list[Tensor]) -> Tensor:
        """In training, calls no module that can be left out.

        Args:
            x: (N, C, H, W).
            counters: receives the number of batches of a BN that was left out: see `count_batch`.
        """
        conv, norm, relu, *others = self
        is_simple_relu = type(relu) is nn.ReLU and not has_hooks(relu)
        if is_simple_conv(conv) and is_simple_norm(norm) and is_simple_relu:
            geometry = conv.stride, conv.padding, conv.dilation, conv.groups
            x = F.conv2d(x, conv.weight, None, *geometry)
            statistics = norm.running_mean, norm.running_var
            x = F.batch_norm(x, *statistics, norm.weight, norm.bias, True, norm.momentum, norm.eps)
            x = torch.relu_(x)
            counters.append(norm.num_batches_tracked)
        else:
            x = relu(norm(conv(x)))
        for layer in others:
            x = layer(x)
        return x


def count_batch(counters: list[Tensor]) -> None:
    """Adds 1 to each number of batches, in one kernel instead of one for each BN."""
    if counters:
        torch._foreach_add_(counters, 1)
