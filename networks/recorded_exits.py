"""Leaving early with one image, as fast as a device answers: a recorded function per stage.

A stage, its exit and its criterion are one launch, and between two of them the host asks one
number: whether the image leaves. For many images see `networks.exit_stream`.
"""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from networks.captured import Capture, Recorder, autocast_as_now, check_capture
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
from networks.watch import Watch

T = TypeVar("T")


class EarlyExit:
    """`early_exit` for batches of one image, recorded.

    It is recorded at the first image, and again for images of another shape or type, for another
    autocast, and when parameters have moved. Batches of more images go to `early_exit`, and so do
    all after a warning if the network cannot be recorded: it has hooks, asks the device for a
    value, or needs more memory than there is.

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
        self._states: list[State] = []  # before each stage, and behind the last; of one image
        self._stages: list[Callable[[], tuple[Tensor, Tensor]]] = []
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
        if self._records and len(images) == 1:
            check_evaluation_mode(self.network)
            if self._recorded_for != kind_of(images):
                self._record(images)
        if not self._records or len(images) != 1:
            return early_exit(self.network, images, self.thresholds, self.criterion)
        self._states[0].copy_(images)
        for index, replay in enumerate(self._stages):
            logits, is_done = replay()
            # While the device is busy.
            if index == 0 and self._watch.has_changed():
                self._recorded_for, self._records = None, can_be_recorded(self.network)
                return self(images)
            if is_done:
                return Answers(logits.clone(), torch.full((1,), index, device=logits.device))
        raise not_finite(1, 1)

    def _record(self, images: Tensor) -> None:
        recorder, as_now = Recorder(images.device), autocast_as_now(images.device.type)
        self._stages, self._recorded_for = [], None
        self._watch = NetworkWatch(self.network)
        with torch.inference_mode(False):  # so that it may be written to in any mode
            self._states = [images.clone()]
        for index in range(len(self.network.exits)):
            function = partial(self._run, index, as_now)
            replay = try_to_record(recorder, function, warm_up=True)
            if replay is None:
                self._records, self._states, self._stages = False, [], []
                return
            replay()  # for the warm-up of the next stage to see no rubbish
            self._stages.append(replay)
        self._recorded_for = kind_of(images)

    def _run(self, index: int, as_now: Callable) -> tuple[Tensor, Tensor]:
        """Returns the logits of an exit, and whether they are the answer."""
        with torch.no_grad(), as_now():
            state = self.network.stages[index](self._states[index])
            logits = self.network.exits[index](state)
            self._states[index + 1 :] = [state]
            if index == len(self.thresholds):
                return logits, logits.isfinite().all()
            scores = exit_score(logits, self.criterion)
            return logits, leaves(scores, self.thresholds[index], self.criterion)


def kind_of(images: Tensor) -> object:
    """Returns what a recording depends on."""
    kind = images.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return images.shape[1:], images.dtype, images.device, autocast


# --- what can be recorded -------------------------------------------------------------------------


class NetworkWatch(Watch):
    """Watches all that a network with exits runs.

    It keeps the memory of its tensors, so that an outdated recording does no harm.

    Args:
        network: its stages and exits need not be modules.
    """

    def __init__(self, network: HasExits):
        parts = (network, *network.stages, *network.exits)
        modules = (part for part in parts if isinstance(part, nn.Module))
        super().__init__(modules, trains=False)
        self._before = self.look()
        self._held = [tensor.detach() for tensor in self.tensors() if tensor is not None]

    def has_changed(self) -> bool:
        """Tells whether a recording made when this watch began is out of date."""
        return self.has_hooks() or not self.is_as(self._before)


def can_be_recorded(network: HasExits) -> bool:
    """Tells whether all that a network does happens on the device; warns if it does not."""
    watch = NetworkWatch(network)
    if watch.has_hooks():
        _warn("it has hooks, which a recording would leave out")
    elif watch.is_training():
        _warn("a part of it is in training mode: call network.eval()")
    else:
        return True
    return False


def try_to_record(
    recorder: Recorder, function: Callable[[], T], warm_up: bool
) -> Callable[[], T] | None:
    """Returns the recorded function, or None after a warning that says why there is none."""
    with contextlib.ExitStack() as stack:
        if recorder.records:
            stack.enter_context(torch.cuda.device(recorder.device))
        try:
            if warm_up:
                recorder.warm_up(function)
            return recorder.record(function)
        except RuntimeError as error:
            _warn(str(error).splitlines()[0][:200])
            return None


def _warn(reason: str) -> None:
    warnings.warn(
        f"the network with exits is not recorded and runs kernel by kernel: {reason}", stacklevel=3
    )
