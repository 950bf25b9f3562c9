"""BN statistics of trained networks, gathered anew.

Yu and Huang, Universally Slimmable Networks (arXiv 1903.05134), section 3.2

    mean_w = sum_b n_b mean_b / sum_b n_b,    var_w = sum_b n_b var_b / sum_b n_b

The sums run over batches of n_b images, mean_b and var_b (unbiased) are those by which the batch
itself was normalised.

Differences from the released code:
    * That keeps BN's running statistics at 0 and 1: it switches a module to training whose flag is
      not the one that is read.
    * Batches count by their images, so that a last, smaller one does no harm, nor do several ranks.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from networks.slimmable_layers import SlimmableBatchNorm2d

BatchNorm = _BatchNorm | SlimmableBatchNorm2d


class Sums:
    """Weighted sums of the statistics of batches."""

    def __init__(self) -> None:
        self.statistics: Tensor | float = 0.0
        self.num_images = 0

    def add(self, statistics: Tensor, num_images: int) -> None:
        self.statistics = self.statistics + num_images * statistics
        self.num_images += num_images

    def mean(self, merge: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns the mean over images, of all ranks that `merge` sums over."""
        # One tensor, so that ranks meet once for it.
        count = self.statistics.new_full((1,), self.num_images)
        merged = merge(torch.cat([self.statistics.flatten(), count]))
        return (merged[:-1] / merged[-1]).view_as(self.statistics)


@torch.no_grad()
def recalibrate(
    network: nn.Module,
    batches: Iterable[Tensor],
    runs: Sequence[Callable[[Tensor], object]] | None = None,
    merge: Callable[[Tensor], Tensor] = torch.clone,
) -> None:
    """Replaces the statistics of every BN that runs; changes no weight.

    BN alone is in training mode meanwhile; dropout is not. A BN that no run reaches keeps what it
    has.

    Args:
        network: any network with BN, on the device of the images.
        batches: training images, (N, C, H, W), augmented as in training.
        runs: what to run on every batch, in one pass over them: of a slimmable network
            ``[partial(network, width_mult=width) for width in widths]``. None: the network.
        merge: sums a tensor over all ranks, each of which has images of its own.

    Raises:
        ValueError: no images, or no BN.
    """
    norms = [module for module in network.modules() if isinstance(module, BatchNorm)]
    sums: dict[BatchNorm, dict[str, Sums]] = {norm: {} for norm in norms}
    flags = {module: module.training for module in network.modules()}
    undo = [gather(norm, sums[norm]) for norm in norms]
    network.eval()
    for norm in norms:
        norm.train()
    num_batches = 0
    try:
        for images in batches:
            num_batches += 1
            for run in [network] if runs is None else runs:
                run(images)
    finally:
        for restore in undo:
            restore()
        for module, flag in flags.items():
            module.training = flag
    if num_batches == 0:
        raise ValueError("no training images to recalibrate with: give at least one batch")
    if not any(sums.values()):
        raise ValueError("no BN was run, so there is nothing to recalibrate")
    for norm in norms:
        for name, total in sums[norm].items():
            mean_and_var = total.mean(merge)
            if isinstance(norm, SlimmableBatchNorm2d):
                # Lightning evaluates in inference mode, whose tensors autograd refuses later.
                with torch.inference_mode(False):
                    norm.statistics[name] = mean_and_var.clone()
            else:
                norm.running_mean.copy_(mean_and_var[0])
                norm.running_var.copy_(mean_and_var[1])


def gather(norm: BatchNorm, sums: dict[str, Sums]) -> Callable[[], None]:
    """Makes a BN add its batches' statistics to `sums`, by width; returns what ends that."""
    if isinstance(norm, SlimmableBatchNorm2d):
        norm.record = lambda name, *batch: sums.setdefault(name, Sums()).add(*batch)
        return partial(setattr, norm, "record", None)

    state = {name: value.clone() for name, value in norm.named_buffers()}
    norm.reset_running_stats()  # 0 times what is not a number would stay so
    momentum, norm.momentum = norm.momentum, 1.0  # of one batch, and unbiased

    def add(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        statistics = torch.stack([norm.running_mean, norm.running_var])
        sums.setdefault("", Sums()).add(statistics, len(output))

    hook = norm.register_forward_hook(add)

    def restore() -> None:
        hook.remove()
        norm.momentum = momentum
        for name, value in norm.named_buffers():
            value.copy_(state[name])

    return restore
