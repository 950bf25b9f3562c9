"""Leaving early with one image, as fast as a device answers: a recorded function per stage.

A stage, its exit and its criterion are one launch, and between two of them the host asks one
number: whether the image leaves. While the device is busy with a stage, the host looks whether what
this stage runs is still what was recorded. For many images see `networks.exit_stream`.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from networks.captured import (
    Capture,
    Recorder,
    autocast_as_now,
    autocast_dtype,
    check_capture,
)
from networks.early_exit import (
    Answers,
    Criterion,
    HasExits,
    State,
    check_evaluation_mode,
    check_thresholds,
    early_exit,
    exit_score,
    leaves,
    not_finite,
)
from networks.slimmable_exits import AtWidth
from networks.slimmable_layers import SlimmableBatchNorm2d
from networks.watch import Watch

T = TypeVar("T")


class EarlyExit:
    """`early_exit` for batches of one image, recorded.

    It is recorded at the first image, and again for images of another shape or type, for another
    autocast, and when parameters have moved or modules are others. The host looks for such changes
    stage by stage: an image that leaves costs no look behind its exit, and a change there is
    noticed by the next image that comes so far. Batches of more images go to `early_exit`. So do
    all, after a warning, if the network cannot be recorded: it has hooks, asks the device for a
    value, or needs more memory than there is.

    Of a slimmable network at a width, the narrow network that is kept is recorded (see
    `KeptWidths`), and again when weights change. To know that it is still the one that is kept
    takes a look at the whole wide network before every image.

    Args:
        network: in evaluation mode. Hooks and parameters are looked for in its modules.
        thresholds: one per exit but the last, shallow to deep.
        criterion: see `early_exit`.
        capture: "none" is `early_exit`; "graphs" and "compiled" are the same here.

    Raises:
        ValueError: wrong thresholds, an unknown criterion or capture.
    """

    def __init__(
        self,
        network: HasExits,
        thresholds: Sequence[float],
        criterion: Criterion = "entropy",
        capture: Capture = "graphs",
    ):
        check_capture(capture)
        check_thresholds(thresholds, len(network.exits), criterion)
        self.network, self.thresholds, self.criterion = network, list(thresholds), criterion
        self._records = capture != "none" and can_be_recorded(network)
        self._answering = network  # what is recorded
        self._states: list[State] = []  # before each stage, and behind the last; of one image
        self._stages: list[Callable[[], tuple[Tensor, Tensor]]] = []
        self._watches: list[NetworkWatch] = []  # of each stage
        self._recorded_for: object = None

    @property
    def is_recorded(self) -> bool:
        """Whether the latest image met recorded stages."""
        return self._recorded_for is not None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Answers:
        """Returns, and raises, what `early_exit` does.

        Args:
            images: (N, C, H, W).
        """
        if len(images) == 1 and self._is_ready(images):
            return self._replay(images)
        return early_exit(self.network, images, self.thresholds, self.criterion)

    def _is_ready(self, images: Tensor) -> bool:
        """Tells whether stages are recorded for an image; records them if none are for its kind."""
        if not self._records:
            return False
        if getattr(self.network, "training", False):  # the flags of its parts are watched
            check_evaluation_mode(self.network)  # raises
        network = answering(self.network)
        if network is self._answering and self._recorded_for == kind_of(images):
            return True
        check_evaluation_mode(self.network)
        self._answering, self._records = network, can_be_recorded(network)
        if self._records:
            self._record(images)
        return self._records

    def _replay(self, images: Tensor) -> Answers:
        self._states[0].copy_(images)
        for index, (replay, watch) in enumerate(zip(self._stages, self._watches, strict=True)):
            logits, is_done = replay()
            if watch.has_changed():  # the host looks while the device is busy
                check_evaluation_mode(self.network)
                self._recorded_for, self._records = None, can_be_recorded(self.network)
                return self(images)
            if is_done:
                return Answers(logits.clone(), torch.full((1,), index, device=logits.device))
        raise not_finite(1, 1)

    def _record(self, images: Tensor) -> None:
        recorder, as_now = Recorder(images.device), autocast_as_now(images.device.type)
        self._stages, self._recorded_for = [], None
        with torch.inference_mode(False):  # so that it may be written to in any mode
            self._states = [images.clone()]
        reads = [Reads() for _ in self._answering.exits]
        for index, read in enumerate(reads):
            function = partial(self._run, index, as_now)
            replay = try_to_record(recorder, function, partial(rehearse, recorder, function, read))
            if replay is None:
                self._records, self._states, self._stages = False, [], []
                return
            replay()  # for the rehearsal of the next stage to see no rubbish
            self._stages.append(replay)
        modules = modules_of(self._answering)
        first, *others = divide(modules, reads)
        # Nothing tells which stage calls a module without tensors, so the first looks where it
        # hangs. To look at the children of all modules would take ten times as long.
        parents = [each for each in modules if not all(map(has_tensors, each.children()))]
        self._watches = [NetworkWatch(first, parents), *map(NetworkWatch, others)]
        self._recorded_for = kind_of(images)

    def _run(self, index: int, as_now: Callable) -> tuple[Tensor, Tensor]:
        """Returns the logits of an exit, and whether they are the answer."""
        with torch.no_grad(), as_now():
            state = self._answering.stages[index](self._states[index])
            logits = self._answering.exits[index](state)
            self._states[index + 1 :] = [state]
            if index == len(self.thresholds):
                return logits, logits.isfinite().all()
            scores = exit_score(logits, self.criterion)
            return logits, leaves(scores, self.thresholds[index], self.criterion)


def answering(network: HasExits) -> HasExits:
    """Returns the network that answers: for a view of a width the narrow network that is kept."""
    kept = network.kept() if isinstance(network, AtWidth) else None
    return network if kept is None else kept


def kind_of(images: Tensor) -> object:
    """Returns what a recording depends on."""
    autocast = autocast_dtype(images.device.type)
    return images.shape[1:], images.dtype, images.device, autocast


# --- what a stage runs ----------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Notes where the memory begins from which operations read."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = pytree.tree_leaves((args, kwargs))
        self.places.update(place_of(each) for each in inputs if isinstance(each, Tensor))
        return func(*args, **(kwargs or {}))


def place_of(tensor: Tensor) -> int:
    """Returns where the memory of a tensor, or of what it is a view of, begins; 0: not known."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # sparse, or of a kind that wraps others
        return 0


def rehearse(recorder: Recorder, function: Callable[[], object], reads: Reads) -> None:
    """Runs a function as capture demands, and notes what it reads."""
    with reads:  # here alone: torch may choose other kernels where somebody listens
        function()
    recorder.warm_up(function)


def modules_of(network: HasExits) -> list[nn.Module]:
    """Returns all modules of a network, whose stages and exits need not be modules."""
    parts = (network, *network.stages, *network.exits)
    modules = (part.modules() for part in parts if isinstance(part, nn.Module))
    return list(dict.fromkeys(chain.from_iterable(modules)))


def has_tensors(module: nn.Module) -> bool:
    return bool([*module.parameters(), *module.buffers()])


def divide(modules: Iterable[nn.Module], reads: Sequence[Reads]) -> list[list[nn.Module]]:
    """Divides modules among stages: each goes to the first that reads a tensor in it.

    Where no stage does, as with a ReLU, it goes to the first of all, since nothing tells which one
    calls it.

    Args:
        modules: of a network.
        reads: of each stage with its exit.
    """
    parts: list[list[nn.Module]] = [[] for _ in reads]
    for module in modules:
        own = {place_of(tensor) for tensor in (*module.parameters(), *module.buffers())}
        readers = (k for k, each in enumerate(reads) if not own.isdisjoint(each.places))
        parts[next(readers, 0)].append(module)
    return parts


# --- what can be recorded -------------------------------------------------------------------------


class NetworkWatch(Watch):
    """Watches some modules of a network that answers, and the statistics of their widths.

    It keeps the memory of their tensors, so that an outdated recording does no harm.

    Args:
        modules, parents: see `Watch`.
    """

    def __init__(self, modules: Iterable[nn.Module], parents: Iterable[nn.Module] = ()):
        super().__init__(modules, parents, trains=False)
        self._norms = [each for each in self.modules if isinstance(each, SlimmableBatchNorm2d)]
        self._before = self.look()
        self._held = [tensor.detach() for tensor in self.tensors() if tensor is not None]

    def tensors(self) -> list[Tensor | None]:
        statistics = (norm.statistics.values() for norm in self._norms)
        return [*super().tensors(), *chain.from_iterable(statistics)]

    def has_changed(self) -> bool:
        """Tells whether a recording made when this watch began is out of date."""
        return self.has_hooks() or not self.is_as(self._before)


def can_be_recorded(network: HasExits) -> bool:
    """Tells whether all that a network does happens on the device; warns if it does not."""
    watch = NetworkWatch(modules_of(network))
    if watch.has_hooks():
        _warn("it has hooks, which a recording would leave out")
    elif watch.is_training():
        _warn("a part of it is in training mode: call network.eval()")
    else:
        return True
    return False


def try_to_record(
    recorder: Recorder, function: Callable[[], T], before: Callable[[], object] | None = None
) -> Callable[[], T] | None:
    """Returns the recorded function, or None after a warning that says why there is none.

    Args:
        recorder: of the device.
        function: see `Recorder.record`.
        before: is called first; where it fails, there is no recording either.
    """
    with contextlib.ExitStack() as stack:
        if recorder.records:
            stack.enter_context(torch.cuda.device(recorder.device))
        try:
            if before is not None:
                before()
            return recorder.record(function)
        except RuntimeError as error:
            _warn(str(error).splitlines()[0][:200])
            return None


def _warn(reason: str) -> None:
    warnings.warn(
        f"the network with exits is not recorded and runs kernel by kernel: {reason}", stacklevel=3
    )
