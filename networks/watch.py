"""Whether a network has changed since something was made of it: a recording, or a copy."""

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

SCALARS = ("drop_rate", "eps", "momentum", "p", "track_running_stats")
"""Attributes of modules that decide what is computed, and that schedules are known to change."""


def has_hooks(module: nn.Module) -> bool:
    return any(hooks_of(module))


def hooks_of(module: nn.Module) -> tuple[dict, ...]:
    return (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )


def same(some: Sequence[object], others: Sequence[object]) -> bool:
    """Tells whether two sequences hold the same objects, not only equal ones."""
    return len(some) == len(others) and all(map(is_, some, others))


class Look(NamedTuple):
    """What a network was at some moment."""

    tensors: list[Tensor | None]
    there: list[Tensor]
    """Those that are not None."""
    places: list[int]
    values: list[object]


class Watch:
    """Modules of a network, laid out such that a look at all of them is quick.

    One image through a network in 20 recordings takes a device some 100 microseconds, so no loop
    here runs in Python where one in C does.

    Args:
        modules: watched one by one: what is inside of one only if it is among them, too.
        parents: modules that are no part of it, but whose children are not to change either.
        trains: whether what is made of it has gradients, and depends on who requires one.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        parents: Iterable[nn.Module] = (),
        trains: bool = True,
    ):
        self._trains = trains
        self.modules = list(dict.fromkeys(modules))
        children = [m._modules for m in (*parents, *self.modules)]
        owned = [d for m in self.modules for d in (m._parameters, m._buffers)]
        self._parents, self._owners = list(filter(None, children)), list(filter(None, owned))
        self._empty = [d for d in (*children, *owned) if not d]
        self._members = self._members_now()
        self._hooks = [hooks for module in self.modules for hooks in hooks_of(module)]
        self._attributes = list(map(vars, self.modules))
        scalars = [(there, name) for there in self._attributes for name in SCALARS if name in there]
        self._scalars = [there for there, _ in scalars], [name for _, name in scalars]

    def _members_now(self) -> list[nn.Module | None]:
        return list(chain.from_iterable(map(dict.values, self._parents)))

    def is_complete(self) -> bool:
        """Tells whether no module was replaced, added or taken away.

        It is not complete, either, once a module that had no children, no parameters or no buffers
        has some.
        """
        return not any(self._empty) and same(self._members_now(), self._members)

    def has_hooks(self) -> bool:
        return any(self._hooks) or _has_any_global_hook()

    def is_training(self) -> bool:
        return any(map(itemgetter("training"), self._attributes))

    def tensors(self) -> list[Tensor | None]:
        """Returns all parameters and buffers, those that are shared more than once."""
        return list(chain.from_iterable(map(dict.values, self._owners)))

    def look(self) -> Look:
        """Returns what a recording depends on; waits for no device."""
        tensors = self.tensors()
        there = [each for each in tensors if each is not None]
        return Look(tensors, there, self._places(there), self._values(there))

    def _places(self, tensors: list[Tensor]) -> list[int]:
        return list(map(Tensor.data_ptr, tensors))

    def _values(self, tensors: list[Tensor]) -> list[object]:
        values: list[object] = list(map(itemgetter("training"), self._attributes))
        if self._trains:
            values += map(attrgetter("requires_grad"), tensors)
        return values + self.scalars()

    def scalars(self) -> list[object]:
        """Returns the attributes in `SCALARS` of the modules that had them from the beginning."""
        return list(map(dict.__getitem__, *self._scalars))

    def is_as(self, before: Look) -> bool:
        """Tells whether the network is what it was; the values of its tensors may have changed."""
        return (
            self.is_complete()
            and same(self.tensors(), before.tensors)
            and self._places(before.there) == before.places
            and self._values(before.there) == before.values
        )
