"""The weights of a narrow network, gathered from the wide one.

A slice of a weight is not dense, so that every convolution copies it, forward and backward, and its
gradient is a tensor of zeros for every dimension that was sliced. Here a pass copies the weights of
its width once, in the memory format that they have, by one autograd function for all layers.
Without gradients the copies are kept, as an ordinary network, until the weights change.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from networks.residual_blocks import add_gated
from networks.watch import Watch, same

Sizes = dict[nn.Parameter, tuple[int, ...]]
"""How much of each parameter a width uses: its first channels, along every dimension."""


class Gather(torch.autograd.Function):
    """Dense copies of the first channels of parameters; the gradient of the rest is 0."""

    @staticmethod
    def forward(ctx, sizes: Sequence[tuple[int, ...]], *wide: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.wide = wide
        # A clone keeps the order of the strides, and so channels_last.
        return tuple(
            weight.as_strided(size, weight.stride()).clone()
            for weight, size in zip(wide, sizes, strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = [
            None if grad is None or not needs else torch.empty_like(weight)
            for weight, grad, needs in zip(ctx.wide, grads, ctx.needs_input_grad[1:], strict=True)
        ]
        pairs = [pair for pair in zip(needed, grads, strict=True) if pair[0] is not None]
        if pairs:
            # Few launches for all of them; of the copies, too, where they are dense.
            torch._foreach_zero_([full for full, _ in pairs])
            slices = [full.as_strided(grad.shape, full.stride()) for full, grad in pairs]
            torch._foreach_copy_(slices, [grad for _, grad in pairs])
        return None, *needed


def gather(sizes: Sizes) -> Mapping[nn.Parameter, Tensor]:
    """Returns dense copies of what is left of the parameters that a width cuts."""
    cut = {parameter: size for parameter, size in sizes.items() if parameter.shape != size}
    if not cut:
        return {}
    return dict(zip(cut, Gather.apply(list(cut.values()), *cut), strict=True))


class InPlaceReLU6(torch.autograd.Function):
    """ReLU6 that needs its result for the gradient, as ReLU does.

    torch's keeps its input: in place that is a copy of it.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        nn.functional.hardtanh_(x, 0.0, 6.0)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grad, result, 0.0, 6.0)


# --- ordinary networks ----------------------------------------------------------------------------


class Residual(nn.Module):
    """``activation(shortcut(x) + gate * branch(x))``.

    Args:
        branch: any layers.
        shortcut: layers, or an empty `nn.Sequential`: the identity.
        activation: what follows the addition.
        gate: the factor; None: 1.
    """

    def __init__(
        self,
        branch: nn.Module,
        shortcut: nn.Module,
        activation: nn.Module,
        gate: float | None = None,
    ):
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.activation = activation
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(add_gated(self.shortcut(x), self.branch, x, self.gate))


def fill(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Puts tensors, not copies of them, into a module that was made without memory."""
    # Detached, lest a parameter itself becomes one of both networks.
    state = {name: tensor.detach() for name, tensor in state.items()}
    module.load_state_dict(state, assign=True)
    return module


# --- without gradients ----------------------------------------------------------------------------


class Kept(NamedTuple):
    """A plain network of one width, and what it was made of."""

    plain: nn.Module
    name: str
    tensors: list[Tensor | None]
    stamps: list[int]
    statistics: list[Tensor | None]
    scalars: list[object]


class KeptWidths:
    """The latest narrow networks of a wide one; a copy or a pickle of it holds none.

    A plain network shares the memory of what needs no copy to be dense. Of the rest it has copies.
    They are out of date once a parameter was replaced, moved or changed (its version counter
    tells), or an attribute in `networks.watch.SCALARS` was set. Changes through `.data` have no
    version: `train` and `eval` of the network, which Lightning calls around every evaluation, drop
    all copies.
    """

    LIMIT = 16  # as many widths as the papers evaluate

    def __init__(self) -> None:
        # Not of the network itself, which would then never be freed by counting references.
        self._watch: Watch | None = None
        self._norms: list[nn.Module] = []
        self._kept: OrderedDict[object, Kept] = OrderedDict()

    def get(
        self, network: nn.Module, key: object, make: Callable[[], tuple[str, nn.Module]]
    ) -> nn.Module | None:
        """Returns the plain network of a width, or None: the wide one has to run layer by layer.

        Nothing here waits for a device.

        Args:
            network: the wide network.
            key: the width.
            make: returns its name, and a plain network whose tensors are slices of the wide one's.
        """
        if self._watch is None or not self._watch.is_complete():
            self.clear()
            _, *inside = network.modules()
            self._watch = Watch(inside, parents=[network])
            self._norms = [each for each in self._watch.modules if hasattr(each, "statistics")]
        tensors = self._watch.tensors()
        now = stamps(tensors)
        if now is None or self._watch.has_hooks() or self._watch.is_training():
            return None
        kept = self._kept.get(key)
        if (
            kept is None
            or now != kept.stamps
            or not same(tensors, kept.tensors)
            or not same(self._statistics(kept.name), kept.statistics)
            or self._watch.scalars() != kept.scalars
        ):
            # Tensors of inference mode would have no version for others to watch.
            with torch.inference_mode(False), torch.no_grad():
                name, plain = make()
                make_dense(plain.requires_grad_(False))
            statistics, scalars = self._statistics(name), self._watch.scalars()
            kept = Kept(plain, name, tensors, now, statistics, scalars)
            self._kept[key] = kept
        self._kept.move_to_end(key)
        if len(self._kept) > self.LIMIT:
            self._kept.popitem(last=False)
        return kept.plain

    def _statistics(self, name: str) -> list[Tensor | None]:
        return [norm.statistics.get(name) for norm in self._norms]

    def clear(self) -> None:
        self._watch, self._norms = None, []
        self._kept.clear()

    def __len__(self) -> int:
        return len(self._kept)

    def __reduce__(self) -> tuple:
        return KeptWidths, ()


def make_dense(module: nn.Module) -> None:
    """Copies those tensors of a module that have gaps."""
    for tensor in [*module.parameters(), *module.buffers()]:
        is_image = tensor.dim() == 4
        if not tensor.is_contiguous() and not (
            is_image and tensor.is_contiguous(memory_format=torch.channels_last)
        ):
            tensor.data = tensor.data.clone()


def stamps(tensors: Sequence[Tensor | None]) -> list[int] | None:
    """Returns where tensors lie, and how often they were changed; None: they do not tell."""
    try:
        there = [tensor for tensor in tensors if tensor is not None]
        return [*map(Tensor.data_ptr, there), *map(attrgetter("_version"), there)]
    except RuntimeError:  # of inference mode, or without memory
        return None
