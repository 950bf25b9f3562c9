"""In which order, and on which rank, the samples of a split are visited. Pure functions."""

import torch
from torch import Tensor

from chance import generator


def num_training_batches(
    num_samples: int, batch_size: int, world_size: int = 1, drop_last: bool = False
) -> int:
    """Returns how many batches `training_batches` gives to every rank."""
    if drop_last:
        return num_samples // (batch_size * world_size)
    return -(-num_samples // (batch_size * world_size))


def training_batches(
    num_samples: int,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool = False,
) -> tuple[Tensor, ...]:
    """Deals one permutation, a function of (seed, epoch), out to the ranks like cards.

    Global batch b is ``order[b * B * W : (b + 1) * B * W]`` for batch size B and W ranks, and rank
    r holds its elements r, r + W, ...: the ranks together see the batches that one process with
    batch size B * W sees. The order wraps around until all ranks have the same number of samples.

    Returns:
        The batches of this rank, each (n,) of int64 with n <= `batch_size`.
    """
    order = torch.randperm(num_samples, generator=generator("order", seed, epoch))
    if drop_last:
        order = order[: num_samples - num_samples % (batch_size * world_size)]
    else:
        order = torch.cat([order, order[: -num_samples % world_size]])
    return order[rank::world_size].split(batch_size) if len(order) else ()


def evaluation_batches(
    num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> tuple[Tensor, ...]:
    """Deals the samples out in their stored order: none twice, none lost.

    Returns:
        The batches of this rank, each (n,) of int64. Ranks may differ by one sample.
    """
    indices = torch.arange(rank, num_samples, world_size)
    return indices.split(batch_size) if len(indices) else ()
