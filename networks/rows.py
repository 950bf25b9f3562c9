"""Some samples of a batch, in the memory format of the batch."""

import torch
from torch import Tensor


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
        return x.permute(0, 2, 3, 1).index_add(0, rows, values).permute(0, 3, 1, 2)
    return x.index_add(0, rows, values)
