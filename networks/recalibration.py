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

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from networks.slimmable_layers import SlimmableBatchNorm2d

BatchNorm = _BatchNorm | SlimmableBatchNorm2d


class Running:
    """Mean and variance of one BN at one width, over all images so far; BN itself updates them.

    Args:
        values: mean and variance, (C,) each.
    """

    def __init__(self, values: Sequence[Tensor]):
        self.mean, self.variance = values
        self.num_images = 0

    def momentum(self, num_images: int) -> float:
        """Counts a batch, and returns its share of all images."""
        self.num_images += num_images
        return num_images / max(1, self.num_images)


class Zeros:
    """Hands out zeros; filling a tensor for each BN and width would take as long as a BN does."""

    CHUNK = 4096  # numbers; statistics that are saved take a whole number of chunks

    def __init__(self) -> None:
        self.rest = torch.empty(0)

    def take(self, count: int, like: Tensor) -> Tensor:
        """Returns (2, count) of the type of a tensor, and on its device."""
        fits = (self.rest.dtype, self.rest.device) == (like.dtype, like.device)
        if not fits or self.rest.numel() < 2 * count:
            self.rest = like.new_zeros(max(self.CHUNK, 2 * count))
        taken, self.rest = self.rest[: 2 * count], self.rest[2 * count :]
        return taken.view(2, count)


@torch.no_grad()
def recalibrate(
    network: nn.Module,
    batches: Iterable[Tensor],
    runs: Sequence[Callable[[Tensor], object]] | None = None,
    merge: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Replaces the statistics of every BN that runs; changes no weight.

    BN alone is in training mode meanwhile; dropout is not. A BN that no run reaches keeps what it
    has.

    Args:
        network: any network with BN, on the device of the images.
        batches: training images, (N, C, H, W), augmented as in training.
        runs: what to run on every batch, in one pass over them: of a slimmable network
            ``[partial(network, width_mult=width) for width in widths]``. None: the network.
        merge: sums a tensor over all ranks, each of which has images of its own; called once.
            None: there is one rank.

    Raises:
        ValueError: no images, or no BN.
    """
    norms = [module for module in network.modules() if isinstance(module, BatchNorm)]
    zeros, found = Zeros(), []
    endings = [watch(norm, zeros, found) for norm in norms]
    num_batches, is_done = 0, False
    try:
        with training_alone(network, norms):
            for images in batches:
                if len(images) == 0:  # whose mean is no number
                    continue
                num_batches += 1
                for run in [network] if runs is None else runs:
                    run(images)
        if num_batches == 0:
            raise ValueError("no training images to recalibrate with: give at least one batch")
        if not found:
            raise ValueError("no BN was run, so there is nothing to recalibrate")
        if merge is not None:
            merge_ranks(found, merge)
        is_done = True
    finally:
        for end in endings:
            end(is_done)


@contextlib.contextmanager
def training_alone(network: nn.Module, parts: Sequence[nn.Module]) -> Iterator[None]:
    """Has these parts of a network in training mode, and no others."""
    flags = {module: module.training for module in network.modules()}
    network.eval()
    for part in parts:
        part.train()
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def merge_ranks(found: Sequence[Running], merge: Callable[[Tensor], Tensor]) -> None:
    """Replaces statistics by those of the images of all ranks, which meet once for it."""
    values = list(chain.from_iterable((one.mean, one.variance) for one in found))
    flat = torch.cat(values)
    dtype = torch.promote_types(flat.dtype, torch.float32)  # half a float cannot count images
    counts = [one.num_images for one in found]
    lengths = torch.tensor([2 * len(one.mean) for one in found], device=flat.device)
    spread = {"repeats": lengths, "output_size": len(flat)}
    images = torch.tensor(counts, device=flat.device, dtype=dtype)
    merged = merge(torch.cat([flat * images.repeat_interleave(**spread), images]))
    means = merged[: len(flat)] / merged[len(flat) :].repeat_interleave(**spread)
    for value, mean in zip(values, means.split([len(v) for v in values]), strict=True):
        value.copy_(mean)


def watch(norm: BatchNorm, zeros: Zeros, found: list[Running]) -> Callable[[bool], None]:
    """Makes a BN gather statistics, by width, and add them to `found`.

    Returns:
        What ends that, and keeps the new statistics or puts back the old ones.
    """
    if isinstance(norm, SlimmableBatchNorm2d):
        return watch_shared(norm, zeros, found)
    state = {name: value.clone() for name, value in norm.named_buffers()}
    norm.reset_running_stats()  # 0 times what is not a number would stay so
    momentum = norm.momentum
    own: list[Running] = []

    def weigh(_: nn.Module, inputs: tuple[Tensor]) -> None:
        if not own:
            own.append(Running([norm.running_mean, norm.running_var]))
            found.append(own[0])
        norm.momentum = own[0].momentum(len(inputs[0]))

    hook = norm.register_forward_pre_hook(weigh)

    def end(keep: bool) -> None:
        hook.remove()
        norm.momentum = momentum
        for name, value in norm.named_buffers():
            if not (keep and own and name.startswith("running_")):
                value.copy_(state[name])

    return end


def watch_shared(
    norm: SlimmableBatchNorm2d, zeros: Zeros, found: list[Running]
) -> Callable[[bool], None]:
    """Does so with a BN that has statistics for each width."""
    gathered: dict[str, Tensor] = {}
    running: dict[str, Running] = {}

    def record(name: str, x: Tensor) -> tuple[Tensor, Tensor, float]:
        if name not in running:
            # Lightning evaluates in inference mode, whose tensors autograd refuses later.
            with torch.inference_mode(False):
                gathered[name] = zeros.take(x.shape[1], norm.weight.detach())
                running[name] = Running(gathered[name].unbind())
            found.append(running[name])
        one = running[name]
        return one.mean, one.variance, one.momentum(len(x))

    def end(keep: bool) -> None:
        norm.record = None
        if keep:
            norm.statistics.update(gathered)

    norm.record = record
    return end
