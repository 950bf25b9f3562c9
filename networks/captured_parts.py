"""The parts of a recorded network: pairs of recordings, forward and backward, between buffers.

Forward reads one buffer and writes another; backward turns the gradient of the second into that of
the first and leaves those of the parameters. What they are for: see `networks.captured_network`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from networks.captured import Recorder
from networks.captured_once import NO_STAND_INS, Once
from networks.rows import put_rows, take_rows

MAX_COMPILED = 64
"""Kinds of parts that torch compiles before it gives up; its own limit is 8."""


class Buffer:
    """Memory that stays where it is: what a part reads or writes, and its gradient."""

    def __init__(self, example: Tensor, has_gradient: bool = True):
        self.value = torch.zeros_like(example)
        self.gradient = torch.zeros_like(example) if has_gradient else None


class Part:
    """A function between buffers, and its derivative.

    Args:
        function: from a tensor to a tree of tensors.
        source: what it reads.
        targets: what it writes, one per tensor.
        parameters: those that it uses.
    """

    def __init__(
        self,
        function: Callable[[Tensor], object],
        source: Buffer,
        targets: Sequence[Buffer],
        parameters: Sequence[Tensor],
    ):
        self.function, self.source, self.targets = function, source, targets
        self.parameters = [each for each in parameters if each.requires_grad]
        self.leaves, self.stand_ins = self.parameters, NO_STAND_INS
        self.compute: Callable = write_outputs
        self.tape: tuple | None = None
        self.replay_forward: Callable[[], object] = self.forward
        self.replay_backward: Callable[[], Sequence[Tensor | None]] = self.backward

    def leave_to(self, once: Once) -> None:
        """Leaves to `once` what can be done once a step; runs forward to find out what."""

        def run() -> list[Tensor]:
            self.forward()
            (_, outputs), self.tape = self.tape, None
            return outputs

        self.stand_ins = once.observe(run)
        self.leaves = [self.stand_ins.converted.get(each, each) for each in self.parameters]

    def forward(self) -> None:
        x = self.source.value
        x = x.clone() if self.source in self.targets else x.detach()
        x.requires_grad_(self.source.gradient is not None)
        self.tape = x, self.compute(self.function, x, [each.value for each in self.targets])

    def backward(self) -> Sequence[Tensor | None]:
        (x, outputs), self.tape = self.tape, None
        gradients = [each.gradient for each in self.targets]
        if self.source.gradient is None:
            return differentiate(outputs, self.leaves, gradients)
        of_source, *rest = differentiate(outputs, [x, *self.leaves], gradients)
        self.source.gradient.copy_(of_source)
        return rest


class RowPart(Part):
    """A block on some rows of the stream; for the others it is closed.

    Args:
        block: the open block.
        closed: the closed one, which treats every sample for itself; None: it changes nothing.
        index: numbers of the rows, (n,).
        source, target, parameters: see `Part`.
    """

    def __init__(
        self,
        block: Callable[[Tensor], Tensor],
        closed: Callable[[Tensor], Tensor] | None,
        index: Tensor,
        source: Buffer,
        target: Buffer,
        parameters: Sequence[Tensor],
    ):
        super().__init__(block, source, [target], parameters)
        self.index = index
        self.others = None if closed is None else Part(closed, source, [target], [])

    def forward(self) -> None:
        if self.others is not None:
            self.others.forward()
        x = take_rows(self.source.value, self.index).requires_grad_()
        self.tape = x, self.compute(self.function, x, ())
        put_rows(self.targets[0].value, self.index, self.tape[1][0].detach())

    def backward(self) -> Sequence[Tensor | None]:
        (x, rows), self.tape = self.tape, None
        of_rows = take_rows(self.targets[0].gradient, self.index)
        of_x, *rest = differentiate(rows, [x, *self.leaves], [of_rows])
        if self.others is not None:
            self.others.backward()
        put_rows(self.source.gradient, self.index, of_x)
        return rest


def write_outputs(
    function: Callable[[Tensor], object], x: Tensor, values: Sequence[Tensor]
) -> list[Tensor]:
    """Calls a function, writes its tensors to `values`, if any, and returns them with history."""
    outputs = pytree.tree_leaves(function(x))
    with torch.no_grad():
        for value, output in zip(values, outputs, strict=bool(values)):
            value.copy_(output)
    return outputs


def differentiate(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], gradients: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    pairs = zip(outputs, gradients, strict=True)
    pairs = [(output, gradient) for output, gradient in pairs if output.requires_grad]
    if not inputs or not pairs:  # of frozen parts
        return [None] * len(inputs)
    outputs, gradients = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, inputs, gradients, allow_unused=True)


def own_copies(
    recorded: Sequence[Tensor | None], parameters: Sequence[Tensor]
) -> list[Tensor | None]:
    """Returns copies of gradients, each in the type of its parameter, in few kernels.

    A recorded gradient that became .grad would be added to itself by the next batch.
    """
    pairs = list(zip(recorded, parameters, strict=True))
    copies = [
        None if g is None or g.dtype == p.dtype else torch.empty_like(g, dtype=p.dtype)
        for g, p in pairs
    ]
    converted = [(copy, g) for copy, (g, _) in zip(copies, pairs, strict=True) if copy is not None]
    if converted:
        torch._foreach_copy_(*map(list, zip(*converted, strict=True)))
    alike = [i for i, (g, p) in enumerate(pairs) if g is not None and g.dtype == p.dtype]
    if alike:
        copied = torch._foreach_mul([recorded[i] for i in alike], 1.0)
        for i, copy in zip(alike, copied, strict=True):
            copies[i] = copy
    return copies


class Chain:
    """Parts in a row, recorded.

    Args:
        source: what the first part reads.
        steps: for each place the part of a closed and of an open gate; None: nothing is run.
        recorder: records them.
        once: does what parts leave to it.
        autocast: under what forward runs; backward runs under none.
        compiles: whether the parts are compiled first.
    """

    def __init__(
        self,
        source: Buffer,
        steps: Sequence[tuple[Part | None, Part | None]],
        recorder: Recorder,
        once: Once,
        autocast: Callable[[], AbstractContextManager],
        compiles: bool,
    ):
        self.source, self.steps, self.once, self.autocast = source, steps, once, autocast
        self.device_type = recorder.device.type
        self.targets = steps[-1][True].targets
        self.num_forward = 0
        parts = [part for step in steps for part in step if part is not None]
        with torch.enable_grad(), autocast():
            for part in parts:
                part.leave_to(once)
        limit: AbstractContextManager = nullcontext()
        if compiles:
            limit = torch._dynamo.config.patch(recompile_limit=MAX_COMPILED)
            for part in parts:
                part.compute = torch.compile(write_outputs, dynamic=False)

        def run_all() -> None:
            for part in parts:
                self.run_forward(part)
            for part in reversed(parts):
                self.run_backward(part)

        with limit:
            recorder.warm_up(run_all)
        for part in parts:
            part.replay_forward = recorder.record(partial(self.run_forward, part))
        for part in reversed(parts):
            part.replay_backward = recorder.record(partial(self.run_backward, part))

    def run_forward(self, part: Part) -> None:
        with torch.enable_grad(), self.autocast(), part.stand_ins.hung():
            part.forward()

    def run_backward(self, part: Part) -> Sequence[Tensor | None]:
        with torch.autocast(self.device_type, enabled=False):
            return part.backward()

    def chosen(self, is_open: Sequence[bool]) -> list[Part]:
        parts = (step[choice] for step, choice in zip(self.steps, is_open, strict=True))
        return [part for part in parts if part is not None]

    def forward(self, parts: Sequence[Part], images: Tensor) -> list[Tensor]:
        self.num_forward += 1
        self.source.value.copy_(images)
        self.once.convert()
        for part in parts:
            part.replay_forward()
        self.once.raise_counters(part.stand_ins for part in parts)
        return [each.value.clone() for each in self.targets]

    def backward(
        self, parts: Sequence[Part], gradients: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """Returns a gradient per parameter of the parts; its memory is the caller's."""
        for target, gradient in zip(self.targets, gradients, strict=True):
            target.gradient.copy_(gradient)
        groups = [part.replay_backward() for part in reversed(parts)]
        recorded = [gradient for group in reversed(groups) for gradient in group]
        return own_copies(recorded, [each for part in parts for each in part.parameters])


class Replay(torch.autograd.Function):
    """All parts that run in a step, as one node of autograd."""

    @staticmethod
    def forward(ctx, chain: Chain, parts: Sequence[Part], images: Tensor, *parameters: Tensor):
        ctx.chain, ctx.parts = chain, parts
        ctx.set_materialize_grads(False)
        outputs = tuple(chain.forward(parts, images))
        ctx.number = chain.num_forward
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor):
        if ctx.number != ctx.chain.num_forward:
            raise RuntimeError(
                "a recorded network has run again (or backward has) since the forward whose "
                "gradients are asked for: call backward once after every forward, or set capture "
                "to none"
            )
        if any(gradient is None for gradient in gradients):
            raise RuntimeError(
                "the loss does not use all outputs of a recorded network, whose gradients eager "
                "code would leave out: use all of them, or set capture to none"
            )
        ctx.chain.num_forward += 1
        return None, None, None, *ctx.chain.backward(ctx.parts, gradients)
