"""What a recorded step does once for all of its parts, and not in each of them.

Under autocast every convolution converts its weight, and backward converts the gradient; every BN
counts its batches. Each of these is a kernel: 328 of the 1,292 in a step of a ResNet-110. So a part
reads weights that were converted together, leaves their gradients as they are, and leaves counting
to `Chain`. The numbers are those of eager code, whose autocast converts a weight once a step,
too.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

CONVERTING = {
    *(F.conv1d, F.conv2d, F.conv3d, F.linear),
    *(Tensor.shape.__get__, Tensor.is_cuda.__get__),
}
"""Functions that read a weight as autocast converts it, or what no conversion changes."""
COUNTING = {Tensor.add_}
"""What BN does with its counter; without momentum, it reads it, too."""
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Place(NamedTuple):
    """Where a tensor of a module hangs."""

    members: dict[str, Tensor | None]
    name: str


class StandIns(NamedTuple):
    """What hangs in a network while a part of it runs, and what is left to do then."""

    places: list[tuple[Place, Tensor | None]]
    converted: dict[Tensor, Tensor]
    """By weight what the part reads instead of it."""
    counts: dict[Tensor, int]
    """By counter of a BN how often the part runs that BN."""

    @contextlib.contextmanager
    def hung(self) -> Iterator[None]:
        """Hangs them in their places, and puts back what hung there."""
        before = [place.members[place.name] for place, _ in self.places]
        try:
            for place, tensor in self.places:
                place.members[place.name] = tensor
            yield
        finally:
            for (place, _), tensor in zip(self.places, before, strict=True):
                place.members[place.name] = tensor


NO_STAND_INS = StandIns([], {}, {})


class Once:
    """Finds what parts of a network can leave to be done once, and does it.

    Args:
        modules: all modules of the network.
        dtype: to which autocast converts; None: there is none.
    """

    def __init__(self, modules: Iterable[nn.Module], dtype: torch.dtype | None):
        self._dtype = dtype
        self._weights: dict[Tensor, list[Place]] = {}
        self._counters: dict[Tensor, list[Place]] = {}
        self._converted: dict[Tensor, nn.Parameter] = {}
        for module in modules:
            for name, weight in module._parameters.items():
                # None, or of a class of its own, which may compute in its own way.
                if type(weight) is not nn.Parameter:
                    continue
                if dtype is not None and weight.dtype == torch.float32:
                    self._weights.setdefault(weight, []).append(Place(module._parameters, name))
            if type(module) in NORMS:
                counter = module._buffers.get("num_batches_tracked")
                if counter is not None:
                    place = Place(module._buffers, "num_batches_tracked")
                    self._counters.setdefault(counter, []).append(place)
        # Views of one counter are raised together, which their values would tell twice.
        times = Counter(map(Tensor.data_ptr, self._counters))
        self._counters = {c: p for c, p in self._counters.items() if times[c.data_ptr()] == 1}

    def observe(self, run: Callable[[], Sequence[Tensor]]) -> StandIns:
        """Returns what can stand in while a part runs.

        Args:
            run: runs the part, and returns its outputs with history. It is called twice.
        """
        before = self._counter_values()
        with Uses([*self._weights, *self._counters], self._dtype) as uses:
            outputs = run()
        raised = [now - then for now, then in zip(self._counter_values(), before, strict=True)]
        counted = uses.only_by(COUNTING)
        counts = {
            counter: number
            for counter, number in zip(self._counters, raised, strict=True)
            if counter in counted
        }
        only_converted = uses.only_by(CONVERTING) & copied_leaves(outputs)
        stand_ins = self._stand_in(only_converted, counts)
        # A part that holds a weight elsewhere, too, as in a list, goes on reading it there.
        with Uses(stand_ins.converted, self._dtype) as uses, stand_ins.hung():
            run()
        return self._stand_in(only_converted - uses.seen(), counts)

    def _stand_in(self, chosen: set[Tensor], counts: dict[Tensor, int]) -> StandIns:
        weights = [weight for weight in self._weights if weight in chosen]
        for weight in weights:
            if weight not in self._converted:
                self._converted[weight] = nn.Parameter(weight.detach().to(self._dtype))
                vars(self._converted[weight]).update(vars(weight))  # what users hang on it
        converted = {weight: self._converted[weight] for weight in weights}
        places = [
            (place, converted[weight]) for weight in weights for place in self._weights[weight]
        ]
        places += [(place, None) for counter in counts for place in self._counters[counter]]
        return StandIns(places, converted, counts)

    def _counter_values(self) -> list[int]:
        return torch.stack([*self._counters]).tolist() if self._counters else []

    @torch.no_grad()
    def convert(self) -> None:
        """Converts the weights as they are now."""
        if self._converted:
            torch._foreach_copy_([*self._converted.values()], [*self._converted])

    @staticmethod
    def raise_counters(parts: Iterable[StandIns]) -> None:
        """Raises the counters of the BN in parts that have run."""
        totals: dict[Tensor, int] = {}
        for part in parts:
            for counter, number in part.counts.items():
                totals[counter] = totals.get(counter, 0) + number
        if set(totals.values()) == {1}:
            torch._foreach_add_([*totals], 1)  # in one kernel
        elif totals:
            torch._foreach_add_([*totals], [*totals.values()])


class Uses(TorchFunctionMode):
    """Notes which functions of torch are given some tensors.

    Args:
        tensors: to look out for.
        dtype: to which autocast converts. Under another one a function is not known: it is None.
    """

    def __init__(self, tensors: Iterable[Tensor], dtype: torch.dtype | None) -> None:
        super().__init__()
        self._functions: dict[Tensor, set[Callable | None]] = {tensor: set() for tensor in tensors}
        self._dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        for value in pytree.tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and value in self._functions:
                is_usual = self._dtype in (None, torch.get_autocast_dtype(value.device.type))
                self._functions[value].add(func if is_usual else None)
        return func(*args, **(kwargs or {}))

    def seen(self) -> set[Tensor]:
        """Returns the tensors that some function was given."""
        return {each for each, seen in self._functions.items() if seen}

    def only_by(self, functions: set[Callable]) -> set[Tensor]:
        """Returns the tensors that these functions were given, and no other."""
        return {each for each in self.seen() if self._functions[each] <= functions}


def copied_leaves(outputs: Sequence[Tensor]) -> set[Tensor]:
    """Returns the leaves that reach outputs through copies alone, of another type or place."""
    copied: set[Tensor] = set()
    others: set[Tensor] = set()
    seen = {output.grad_fn for output in outputs if output.grad_fn is not None}
    waiting = list(seen)
    while waiting:
        node = waiting.pop()
        for before, _ in node.next_functions:
            if before is None:
                continue
            if hasattr(before, "variable"):
                (copied if node.name() == "ToCopyBackward0" else others).add(before.variable)
            elif before not in seen:
                seen.add(before)
                waiting.append(before)
    return copied - others
