"""Some samples of a batch, in the memory format of the batch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """The samples of a batch that keep a residual branch, and what scales it."""

    index: Tensor | None
    """Their numbers, int64 (n,), on the device of the batch; None: all samples."""
    scale: float | Tensor
    """One number, or one per such sample, (n,)."""


def numbers_of(gates: Sequence[float] | Tensor) -> list[float]:
    """Returns gates, one per block, as numbers.

    Raises:
        ValueError: they are none, or a number alone.
    """
    try:
        if isinstance(gates, Tensor):
            return [*gates.double().tolist()]
        return [float(gate) for gate in gates]
    except TypeError as error:
        raise ValueError(f"gates is {gates}: give one number per block") from error


def split_rows(gates: Tensor, device: torch.device) -> list[Rows | float]:
    """Returns the gate of every block: its rows, or 0 where no sample keeps the branch.

    Args:
        gates: one per block and sample, (num_blocks, N), on the CPU.
        device: where the batch is; the numbers of all blocks travel there together.
    """
    if gates.shape[1] == 0:
        return [0.0] * len(gates)
    is_open = gates != 0
    counts = is_open.sum(1).tolist()
    indices = send(is_open.nonzero()[:, 1], device).split(counts)
    largest = gates.amax(1, keepdim=True)
    if ((gates == largest) | ~is_open).all():
        scales = largest.flatten().tolist()
    else:
        scales = send(gates[is_open], device).split(counts)
    return [
        Rows(None if count == gates.shape[1] else index, scale) if count else 0.0
        for index, scale, count in zip(indices, scales, counts, strict=True)
    ]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Moves a tensor from the CPU to a device, and does not wait for it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Returns ``x[rows]`` of x (N, ...), in its memory format."""
    # index_select and index_add, and their gradients, answer in the default format.
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
    return x.index_select(0, rows)


def add_rows(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """Returns x (N, ...), in its memory format, with `values` added to ``x[rows]``."""
    if x.is_contiguous(memory_format=torch.channels_last):
        values = values.permute(0, 2, 3, 1)
        return AddRows.apply(x.permute(0, 2, 3, 1), rows, values).permute(0, 3, 1, 2)
    return AddRows.apply(x, rows, values)


class AddRows(torch.autograd.Function):
    """`index_add`; torch's keeps the values for backward, of which it reads the shape alone."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, values: Tensor):
        ctx.save_for_backward(rows)
        return x.index_add(0, rows, values)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (rows,) = ctx.saved_tensors
        return gradient, None, gradient.index_select(0, rows)


def put_rows(x: Tensor, rows: Tensor, values: Tensor) -> None:
    """Writes `values` into ``x[rows]`` of x (N, ...); no number is twice in `rows`."""
    if x.is_contiguous(memory_format=torch.channels_last):
        x, values = x.permute(0, 2, 3, 1), values.permute(0, 2, 3, 1)
    write_rows(x, rows, values)


def write_rows(target: Tensor, places: Tensor, values: Tensor) -> None:
    """Writes rows of `values` (N, ...) to N places of `target`; only of a spare row there are more.

    So the order does not matter. Torch, told to be deterministic, does not know that, sorts the
    places and asks the device for the largest of them, which no recording may.
    """
    if not (target.is_cuda and torch.are_deterministic_algorithms_enabled()):
        target.index_copy_(0, places, values)
        return
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        target.index_copy_(0, places, values)
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warn_only)
