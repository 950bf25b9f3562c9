"""Rows that wait for a stage of a network with exits, and news of them for the host."""

from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from networks.early_exit import State
from networks.rows import write_rows


class Queue:
    """Rows that wait for a stage: a ring of blocks, each as large as a batch, and a spare row.

    The device knows where the next row goes, the host who waits: it learns that later.

    Args:
        example: a state as it will be put; of any number of rows.
        batch_size: rows of a block.
        num_blocks: of the ring.
    """

    def __init__(self, example: State, batch_size: int, num_blocks: int):
        self.batch_size, self.capacity = batch_size, num_blocks * batch_size
        tensors, self._structure = pytree.tree_flatten(example)
        device = next(leaf.device for leaf in tensors if isinstance(leaf, Tensor))
        with torch.inference_mode(False):  # so that it may be written to in any mode
            self._leaves = [self._room(leaf) for leaf in tensors]
            self.rows = torch.zeros(self.capacity + 1, dtype=torch.int64, device=device)
            self._last = torch.full((), -1, device=device)  # place of the latest row
        self._asks = device.type == "cpu"  # where the answer is there at once
        self.start = 0  # of the block that is next
        self.waiting = torch.empty(0, dtype=torch.int64)  # numbers of the images, on the host

    def _room(self, leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        shape = (self.capacity + 1, *leaf.shape[1:])
        place = {"dtype": leaf.dtype, "device": leaf.device, "memory_format": memory_format(leaf)}
        room = torch.empty(shape, **place)
        # Rows that fill a batch up are computed; elsewhere none is read before it was written.
        return room.zero_() if leaf.is_cuda else room

    def block(self, num_rows: int) -> State:
        """Returns the first rows of the next block, where they lie."""
        rows = slice(self.start, self.start + num_rows)
        parts = [leaf[rows] if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return pytree.tree_unflatten(parts, self._structure)

    def put(self, state: State, rows: Tensor, staying: Tensor) -> None:
        """Adds the rows that stay; a GPU is not asked how many.

        Args:
            state: of N rows.
            rows: (N,) where their answers belong.
            staying: (N,) bool.
        """
        if self._asks:
            self._put_chosen(state, rows, staying.nonzero().flatten())
            return
        places = staying.cumsum(0).add_(self._last)
        self._last.copy_(places[-1])
        places = places.remainder_(self.capacity).masked_fill_(~staying, self.capacity)
        for own, new in self._pairs(state, rows):
            write_rows(own, places, new)

    def _put_chosen(self, state: State, rows: Tensor, chosen: Tensor) -> None:
        while len(chosen):
            place = (int(self._last) + 1) % self.capacity
            part, chosen = chosen.tensor_split([self.capacity - place])
            for own, new in self._pairs(state, rows):
                torch.index_select(new, 0, part, out=own[place : place + len(part)])
            self._last += len(part)

    def _pairs(self, state: State, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields each tensor of the queue beside what is put there, both as they lie in memory."""
        yield self.rows, rows
        for own, new in zip(self._leaves, pytree.tree_leaves(state), strict=True):
            if not isinstance(own, Tensor):
                continue
            if memory_format(own) == torch.channels_last:
                own, new = own.permute(0, 2, 3, 1), new.permute(0, 2, 3, 1)
            yield own, new

    def put_images(self, images: Tensor, rows: Tensor, first: int) -> None:
        """Adds images to the queue of the first stage; they fit in the block that is being filled.

        Args:
            images: (N, C, H, W).
            rows: (N,) where their answers belong.
            first: number of the first of them.
        """
        place = (self.start + len(self.waiting)) % self.capacity
        self._leaves[0][place : place + len(images)].copy_(images, non_blocking=True)
        self.rows[place : place + len(images)].copy_(rows)
        self.waiting = torch.cat([self.waiting, torch.arange(first, first + len(images))])

    @property
    def num_missing(self) -> int:
        """Rows that the block that is being filled has room for."""
        return self.batch_size - len(self.waiting) % self.batch_size

    def take(self, num_rows: int) -> Tensor:
        """Returns the numbers of the images in the next block, which then is free."""
        images, self.waiting = self.waiting.tensor_split([num_rows])
        self.start = (self.start + self.batch_size) % self.capacity
        return images

    def restart(self) -> None:
        """Aligns an empty queue with its blocks again, after one that was not full."""
        self.start = 0
        self._last.fill_(-1)


class Reader:
    """Copies small tensors to the host without waiting for them, a fixed number at a time."""

    def __init__(self, device: torch.device, size: int, num_slots: int):
        self._device = device
        self._slots = deque(
            (torch.empty(size, dtype=torch.bool, pin_memory=True), torch.cuda.Event())
            for _ in range(num_slots if device.type == "cuda" else 0)
        )

    def read(self, values: Tensor) -> Callable[[], Tensor]:
        """Returns what waits for the copy and returns it."""
        if not self._slots:
            return values.cpu
        self._slots.rotate()
        slot, event = self._slots[0]
        slot[: len(values)].copy_(values, non_blocking=True)
        event.record(torch.cuda.current_stream(self._device))

        def wait() -> Tensor:
            event.synchronize()
            return slot[: len(values)]

        return wait


def memory_format(tensor: Tensor) -> torch.memory_format:
    """Returns channels_last for a tensor (N, C, H, W) that is laid out so, else the default."""
    is_image = tensor.dim() == 4 and not tensor.is_contiguous()
    if is_image and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
