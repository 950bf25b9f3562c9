"""A training step at the speed of the device: the network as a row of recorded parts.

A part (the whole network, or its stem, each block, its head) is a pair of recordings, and replaying
them is all that happens in a step.

Where blocks can be closed, the residual stream lies at one address from one change of shape to the
next: an open block reads it and writes it in place, so a closed one is a part that is left out. A
gate per sample runs the block on as many rows as it was recorded with.

One autograd function stands for all parts, so optimizers, clipping, accumulation, scaled losses and
DDP see ordinary gradients. Recording changes nothing that is computed: on a CPU the parts are
called again on the same buffers, with the result of eager code bit for bit.
"""

import contextlib
import gc
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from networks.captured import (
    Capture,
    Recorder,
    autocast_as_now,
    autocast_dtype,
    check_capture,
)
from networks.captured_once import Once
from networks.captured_parts import Buffer, Chain, Part, Replay, RowPart
from networks.residual_blocks import Gate
from networks.resnet import Gates, ResidualNetwork
from networks.rows import Rows, send
from networks.watch import Look, Watch

MAX_RECORDINGS = 4
"""Of one network; a batch that would need another one runs eagerly."""


class CapturedNetwork:
    """Calls a network; its training steps are recorded for one size of batch.

    Anything else runs eagerly: evaluation, batches of another size (the last one of an epoch),
    other gates than those that were announced, modules with hooks. What is not expected is said
    once. Larger batches, parameters that have moved and modules that are others are recorded anew,
    and so is a change of the attributes in `networks.watch.SCALARS`; others are those of the
    recording.

    Args:
        network: in training mode when it is recorded.
        capture: "none": always eager; "graphs"; "compiled": torch compiles the parts first.
        open_gates: what a gate per block is where it is open; None: 1. Gates per sample say it.
        batch_size: of the batches that are recorded; None: of the largest so far.
        run: what is called with the images instead of the network, of which it runs parts.
        say: is told once what was recorded, or why not.

    Raises:
        ValueError: unknown `capture`.
    """

    def __init__(
        self,
        network: nn.Module,
        capture: Capture = "graphs",
        open_gates: Sequence[float] | None = None,
        batch_size: int | None = None,
        run: Callable[[Tensor], object] | None = None,
        say: Callable[[str], None] = warnings.warn,
    ):
        check_capture(capture)
        self.network, self.capture, self.say = network, capture, say
        self.run = network if run is None else run
        self.watch = Watch(network.modules())
        if open_gates is None and isinstance(network, ResidualNetwork):
            open_gates = [1.0] * network.num_blocks
        self.open_gates, self.batch_size = open_gates, batch_size
        self.chain: Chain | None = None
        self.kind: tuple = ()
        self.size: tuple = ()
        self.state: Look | None = None
        self.num_recordings = 0
        self.said: set[str] = set()

    def __call__(self, images: Tensor, gates: Gates | None = None) -> object:
        """Returns what the network returns, see there; gates are on the CPU."""
        if gates is not None:
            gates = torch.as_tensor(gates, dtype=torch.float64, device="cpu")
        if not self.records(images, gates):
            return self.run(images) if gates is None else self.network(images, gates=gates)
        is_open = [True] * len(self.chain.steps)
        if gates is not None:
            is_open = [True, *(gates != 0).view(len(gates), -1).any(1).tolist(), True]
            if gates.dim() == 2:
                self.index.copy_(send((gates != 0).nonzero()[:, 1], images.device))
        parts = self.chain.chosen(is_open)
        parameters = [parameter for part in parts for parameter in part.parameters]
        outputs = Replay.apply(self.chain, parts, images, *parameters)
        return pytree.tree_unflatten(list(outputs), self.structure)

    def __reduce__(self) -> tuple:
        """A copy or a pickle holds no recording."""
        return CapturedNetwork, (
            *(self.network, self.capture, self.open_gates, self.batch_size),
            *(None if self.run is self.network else self.run, self.say),
        )

    # --- whether to record ------------------------------------------------------------------------

    def records(self, images: Tensor, gates: Tensor | None) -> bool:
        """Tells whether this batch is replayed; records it if it is the first of its kind."""
        if self.capture == "none" or not self.network.training or not torch.is_grad_enabled():
            return False
        if self.batch_size not in (None, len(images)):
            return False
        reason = self.why_not(images, gates)
        if reason is None:
            kind, size = self.kind_of(images, gates), size_of(images, gates)
            if kind == self.kind and self.state and self.watch.is_as(self.state):
                if size == self.size:
                    return self.chain is not None
                if size[0] < self.size[0]:  # the last batch of an epoch
                    return False
            if self.num_recordings < MAX_RECORDINGS:
                self.kind, self.size = kind, size
                self.record(images, gates)
                return self.chain is not None
            reason = f"its batches come in more than {MAX_RECORDINGS} kinds"
        self.tell(f"{type(self.network).__name__} is not recorded and runs eagerly: {reason}")
        return False

    def why_not(self, images: Tensor, gates: Tensor | None) -> str | None:
        if images.requires_grad:
            return "the images require gradients"
        if not self.watch.is_complete():
            self.watch, self.state = Watch(self.network.modules()), None
        if self.watch.has_hooks():
            return "a module has a hook"
        if any(isinstance(module, nn.SyncBatchNorm) for module in self.watch.modules):
            return "a SyncBatchNorm talks to other processes"
        if gates is None:
            return None
        if not isinstance(self.network, ResidualNetwork) or self.network.plain:
            return "it has no blocks that can be closed"
        opened = self.opened(gates)
        if len(gates) != len(opened):
            return None  # which the network refuses
        opened = opened.view(-1, *[1] * (gates.dim() - 1))
        if not ((gates == 0) | (gates == opened)).all():
            return "a gate is neither 0 nor what was announced for an open one"
        return None

    def opened(self, gates: Tensor) -> Tensor:
        """Returns what the gate of each block is where it is open, (num_blocks,)."""
        if gates.dim() == 2:
            return gates.amax(1)
        return torch.tensor(self.open_gates, dtype=torch.float64)

    def kind_of(self, images: Tensor, gates: Tensor | None) -> tuple:
        device = images.device
        autocast = autocast_dtype(device.type)
        return images.shape[1:], images.dtype, device, autocast, gates is None or gates.dim()

    def tell(self, message: str) -> None:
        if message not in self.said:
            self.said.add(message)
            self.say(message)

    # --- recording --------------------------------------------------------------------------------

    def record(self, images: Tensor, gates: Tensor | None) -> None:
        """Records the network for batches like this one; where it cannot be, says why."""
        self.chain, self.state = None, self.watch.look()
        self.num_recordings += 1
        name, before = type(self.network).__name__, reserved(images.device)
        if any(parameter._backward_hooks for parameter in self.network.parameters()):
            # The recording would run it, too, and autograd once more on what comes of that.
            return self.tell(f"{name} is not recorded and runs eagerly: a parameter has a hook")
        begin, reason = time.perf_counter(), ""
        # What a library does on its first use may end a capture: once more.
        for _ in range(2 if images.device.type == "cuda" else 1):
            try:
                self.chain, reason = self.make_chain(images, gates), ""
                break
            except torch.OutOfMemoryError:
                reason = (
                    f"{reserved(images.device) - before:.1f} GiB more are not enough for "
                    f"{len(images)} images; lower batch_size, or set capture to none"
                )
            except RuntimeError as error:
                reason = str(error).strip().partition("\n")[0]
            # Not inside the clause, where the error still holds what was recorded.
            gc.collect()
            if images.device.type == "cuda":
                torch.cuda.empty_cache()
        if reason:
            return self.tell(f"{name} cannot be recorded and runs eagerly: {reason}")
        self.tell(
            f"{name} is recorded for batches of {len(images)}: "
            f"{time.perf_counter() - begin:.1f} s, {reserved(images.device) - before:.1f} GiB"
        )

    def make_chain(self, images: Tensor, gates: Tensor | None) -> Chain:
        network, compiles = self.network, self.capture == "compiled"
        source = Buffer(images, has_gradient=False)
        source.value.copy_(images)
        # Compiled as a whole, a deep network takes minutes; its blocks are few kinds.
        in_blocks = compiles and isinstance(network, ResidualNetwork) and self.run is network
        autocast = autocast_as_now(images.device.type)
        with unchanged(network, images.device), torch.no_grad(), autocast():
            if gates is not None or in_blocks:
                steps = self.make_steps(source, gates)
            else:
                with torch.enable_grad():
                    outputs, self.structure = pytree.tree_flatten(self.run(source.value))
                # An output of frozen parts alone has none, but could.
                can = [isinstance(each, Tensor) and each.is_floating_point() for each in outputs]
                if not all(can) or not any(each.requires_grad for each in outputs):
                    raise RuntimeError("it returns something that has no gradient")
                targets = [Buffer(each.detach()) for each in outputs]
                del outputs  # and what they hold for a backward
                steps = [(None, Part(self.run, source, targets, list(network.parameters())))]
            once = Once(self.watch.modules, autocast_dtype(images.device.type))
            return Chain(source, steps, Recorder(images.device), once, autocast, compiles)

    def make_steps(
        self, source: Buffer, gates: Tensor | None
    ) -> list[tuple[Part | None, Part | None]]:
        """Returns stem, blocks and head of a residual network; runs each of them once."""
        network, num_images = self.network, len(source.value)
        inside = {module for block in network.blocks for module in block.modules()}
        outside = [module for module in self.watch.modules if module not in inside]
        others = list({p: None for m in outside for p in m.parameters(recurse=False)})
        stream = Buffer(network.stem(source.value))
        steps: list = [(None, Part(network.stem, source, [stream], others))]
        counts = [num_images] * network.num_blocks
        opened = None if gates is None else self.opened(gates).tolist()
        if gates is not None and gates.dim() == 2:
            counts = (gates != 0).sum(1).tolist()
            self.index = torch.zeros(sum(counts), dtype=torch.int64, device=source.value.device)
            indices = self.index.split(counts)
        for number, block in enumerate(network.blocks):
            gate: Gate = None if opened is None else opened[number]
            if gates is not None and gates.dim() == 2:
                everyone = counts[number] == num_images
                gate = Rows(None if everyone else indices[number], gate)
            stream, step = make_step(block, gate, counts[number], stream)
            steps.append(step)
        logits, self.structure = pytree.tree_flatten(network.head(stream.value))
        steps.append((None, Part(network.head, stream, [Buffer(logits[0])], others)))
        return steps


def make_step(
    block: nn.Module, gate: Gate, count: int, stream: Buffer
) -> tuple[Buffer, tuple[Part | None, Part | None]]:
    """Returns what a block writes, and its parts for a closed and an open gate.

    Args:
        block: a residual block.
        gate: where it is open; None: it is never closed.
        count: number of rows that it is open for.
        stream: what it reads; holds the stream of some batch.
    """
    parameters, x = list(block.parameters()), stream.value
    if gate is None:
        target = Buffer(block(x))
        return target, (None, Part(block, stream, [target], parameters))
    closed, shut = None, partial(block, gate=0.0)
    target = stream
    if block(x, 0.0) is not x:
        target = Buffer(block(x, 1.0))
        closed = Part(shut, stream, [target], parameters)
    if count == 0:
        return target, (closed, None)
    if not isinstance(gate, Rows) or gate.index is None or not block.closes_by_sample:
        return target, (closed, Part(partial(block, gate=gate), stream, [target], parameters))
    on_rows = partial(block, gate=Rows(None, gate.scale))
    others = None if closed is None else shut
    return target, (closed, RowPart(on_rows, others, gate.index, stream, target, parameters))


def size_of(images: Tensor, gates: Tensor | None) -> tuple:
    """Returns the number of images and, of gates per sample, rows and gate of each block."""
    if gates is None or gates.dim() == 1:
        return (len(images),)
    return len(images), *(gates != 0).sum(1).tolist(), *gates.amax(1).tolist()


def reserved(device: torch.device) -> float:
    """Returns the memory of a GPU that torch holds, in GiB; 0 for a CPU."""
    return torch.cuda.memory_reserved(device) / 2**30 if device.type == "cuda" else 0.0


@contextlib.contextmanager
def unchanged(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Puts back the statistics of BN and the generators; frees nothing and changes no weight."""
    buffers = [(each, each.clone()) for each in network.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
