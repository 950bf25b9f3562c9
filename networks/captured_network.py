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
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from networks.captured import Capture, Recorder, check_capture
from networks.captured_parts import Buffer, Chain, Part, Replay, RowPart
from networks.resnet import Gates, ResidualNetwork
from networks.rows import Rows, send

MAX_RECORDINGS = 4
"""Of one network; a batch that would need another one runs eagerly."""


class CapturedNetwork:
    """Calls a network; its training steps are recorded for one size of batch.

    Anything else runs eagerly: evaluation, batches of another size (the last one of an epoch),
    other gates than those that were announced, modules with hooks. What is not expected is said
    once. Larger batches and parameters that have moved are recorded anew. Attributes of modules,
    such as a BN's momentum, are those of the recording.

    Args:
        network: in training mode when it is recorded.
        capture: "none": always eager; "graphs"; "compiled": torch compiles the parts first.
        open_gates: what the gate of each block is where it is open; None: 1.
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
        run: Callable[[Tensor], object] | None = None,
        say: Callable[[str], None] = warnings.warn,
    ):
        check_capture(capture)
        self.network, self.capture, self.say = network, capture, say
        self.run = network if run is None else run
        self.modules = list(network.modules())
        if open_gates is None and isinstance(network, ResidualNetwork):
            open_gates = [1.0] * network.num_blocks
        self.open_gates = open_gates
        self.chain: Chain | None = None
        self.kind: tuple = ()
        self.size: tuple = ()
        self.state: list = []
        self.num_recordings = 0
        self.said: set[str] = set()

    def __call__(self, images: Tensor, gates: Gates | None = None) -> object:
        """Returns what the network returns, see there; gates are on the CPU."""
        if gates is not None:
            gates = torch.as_tensor(gates, dtype=torch.float64, device="cpu")
        if not self.records(images, gates):
            return self.run(images) if gates is None else self.network(images, gates=gates)
        is_open = [True]
        if gates is not None:
            is_open = [True, *(gates != 0).view(len(gates), -1).any(1).tolist(), True]
            if gates.dim() == 2:
                self.index.copy_(send((gates != 0).nonzero()[:, 1], images.device))
        parts = self.chain.chosen(is_open)
        parameters = [parameter for part in parts for parameter in part.parameters]
        outputs = Replay.apply(self.chain, parts, images, *parameters)
        return pytree.tree_unflatten(list(outputs), self.structure)

    # --- whether to record ------------------------------------------------------------------------

    def records(self, images: Tensor, gates: Tensor | None) -> bool:
        """Tells whether this batch is replayed; records it if it is the first of its kind."""
        if self.capture == "none" or not self.network.training or not torch.is_grad_enabled():
            return False
        reason = self.why_not(images, gates)
        if reason is None:
            kind, size = self.kind_of(images, gates), size_of(images, gates)
            if kind == self.kind and self.state_of() == self.state:
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
        if any(any(hooks) for hooks in map(hooks_of, self.modules)):
            return "a module has a hook"
        if gates is None:
            return None
        if not isinstance(self.network, ResidualNetwork) or self.network.plain:
            return "it has no blocks that can be closed"
        opened = torch.tensor(self.open_gates, dtype=torch.float64)
        opened = opened.view(-1, *[1] * (gates.dim() - 1))
        if len(gates) != len(opened) or not ((gates == 0) | (gates == opened)).all():
            return "a gate is neither 0 nor what was announced for an open one"
        return None

    def kind_of(self, images: Tensor, gates: Tensor | None) -> tuple:
        device = images.device
        precision = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        return images.shape[1:], images.dtype, device, precision, gates is None or gates.dim()

    def state_of(self) -> list:
        """Returns where the tensors of the network lie, and what else a recording depends on."""
        state: list = []
        for module in self.modules:
            state.append(module.training)
            for each in module._parameters.values():
                state.append(None if each is None else (each.data_ptr(), each.requires_grad))
            for each in module._buffers.values():
                state.append(None if each is None else each.data_ptr())
        return state

    def tell(self, message: str) -> None:
        if message not in self.said:
            self.said.add(message)
            self.say(message)

    # --- recording --------------------------------------------------------------------------------

    def record(self, images: Tensor, gates: Tensor | None) -> None:
        """Records the network for batches like this one; where it cannot be, says why."""
        self.chain, self.state = None, self.state_of()
        self.num_recordings += 1
        begin, name = time.perf_counter(), type(self.network).__name__
        before = reserved(images.device)
        try:
            with unchanged(self.network, images.device):
                self.chain = self.make_chain(images, gates)
        except torch.OutOfMemoryError:
            needed = reserved(images.device) - before
            torch.cuda.empty_cache()
            self.tell(
                f"{name} runs eagerly: recording it for {len(images)} images needs more than the "
                f"{needed:.1f} GiB that were free; lower batch_size, or set capture to none"
            )
        except RuntimeError as error:
            line = str(error).strip().partition("\n")[0]
            self.tell(f"{name} cannot be recorded and runs eagerly: {line}")
        else:
            needed = reserved(images.device) - before
            self.tell(
                f"{name} is recorded for batches of {len(images)}: "
                f"{time.perf_counter() - begin:.1f} s, {needed:.1f} GiB"
            )

    def make_chain(self, images: Tensor, gates: Tensor | None) -> Chain:
        source = Buffer(images, has_gradient=False)
        with torch.no_grad():
            source.value.copy_(images)
            if gates is None:
                outputs, self.structure = pytree.tree_flatten(self.run(images))
                targets = [Buffer(each) for each in outputs]
                parameters = list(self.network.parameters())
                steps = [(None, Part(self.run, source, targets, parameters))]
            else:
                steps = self.make_steps(source, gates)
        return Chain(source, steps, Recorder(images.device), self.capture == "compiled")

    def make_steps(self, source: Buffer, gates: Tensor) -> list[tuple[Part | None, Part | None]]:
        """Returns stem, blocks and head of a residual network; runs each of them once."""
        network = self.network
        of_blocks = {each for block in network.blocks for each in block.parameters()}
        others = [each for each in network.parameters() if each not in of_blocks]
        stream = Buffer(x := network.stem(source.value))
        steps: list = [(None, Part(network.stem, source, [stream], others))]
        is_open = (gates != 0).view(len(gates), -1).sum(1).tolist()
        self.index = torch.zeros(sum(is_open), dtype=torch.int64, device=x.device)
        indices = self.index.split(is_open)
        for block, gate, index in zip(network.blocks, self.open_gates, indices, strict=True):
            before, closed, x = x, block(x, 0.0), block(x, gate)
            target = stream if closed is before else Buffer(x)
            parameters = list(block.parameters())
            shut = partial(block, gate=0.0)
            closed_part = None if target is stream else Part(shut, stream, [target], parameters)
            opened = gate
            if gates.dim() == 2:
                opened = Rows(None if len(index) == len(x) else index, gate)
            if gates.dim() == 1 or opened.index is None or not block.closes_by_sample:
                part = Part(partial(block, gate=opened), stream, [target], parameters)
            elif len(index) == 0:
                part = None
            else:
                on_rows = partial(block, gate=Rows(None, gate))
                closed_rows = None if target is stream else shut
                part = RowPart(on_rows, closed_rows, index, stream, target, parameters)
            steps.append((closed_part, part))
            stream = target
        logits, self.structure = pytree.tree_flatten(network.head(x))
        steps.append((None, Part(network.head, stream, [Buffer(logits[0])], others)))
        return steps


def size_of(images: Tensor, gates: Tensor | None) -> tuple:
    """Returns the number of images and, of gates per sample, that of the rows of each block."""
    if gates is None or gates.dim() == 1:
        return (len(images),)
    return len(images), *(gates != 0).sum(1).tolist()


def hooks_of(module: nn.Module) -> tuple[dict, ...]:
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


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
