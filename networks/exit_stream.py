"""Leaving early over many images, at a constant batch size.

    every stage has a queue, and runs when a whole batch waits there, the deepest first
    who stays joins the next queue; at the end the rest of each queue is run

After Hu et al., E3 (SOSP 2024), for one device. Batches that shrink (`early_exit`) make the deep
stages slow, and every new size costs. Here no size ever changes. So a stage with its exit, its
criterion and the way into the next queue is one recorded function: the host launches it, and learns
from one small copy, while the next one runs already, who stayed.

Where rows go is decided on the device. Of each image the answers of all exits are written to one
place, one after the other, and the last counts. Queues are rings of blocks; a stage reads a block
where it lies, and there is a recording for each.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

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
from networks.exit_queue import Queue, Reader
from networks.recorded_exits import (
    NetworkWatch,
    answering,
    can_be_recorded,
    kind_of,
    modules_of,
    try_to_record,
)
from networks.rows import write_rows

STREAM_BATCH_SIZE = 256
WINDOW = 64
"""Batches after which an image has its answer, even if a stage has to run on less than a batch."""
MAX_RUNS = 2
"""Runs that a GPU has to do while the host does not know yet what came of them."""
NOBODY = 1 << 62  # number of the image in a row that only fills a batch


class Run(NamedTuple):
    """A stage that was launched, and whose outcome the host does not know yet."""

    index: int
    images: Tensor
    """Their numbers, on the host."""
    wait: Callable[[], Tensor]
    """Returns who stays (N,), or at the last exit whose logits are not finite; on the host."""


class ExitStream:
    """Classifies images that come little by little; each leaves at the first exit where it is sure.

    Every image gets the answer of `early_exit`, and answers come in the order of images, late: at
    most `WINDOW` batches. Logits that are not finite at the last exit are refused, and the stream
    ends.

    With `capture` every stage is recorded when it is used for the first time, and again when
    parameters have moved; one that cannot be recorded (it has hooks, asks the device for a value,
    or needs more memory than there is) runs kernel by kernel, after a warning.

    Args:
        network: in evaluation mode.
        thresholds: one per exit but the last, shallow to deep.
        criterion: see `early_exit`.
        batch_size: images on which a stage runs.
        capture: "graphs" and "compiled" are the same here.

    Raises:
        ValueError: wrong thresholds or batch size, an unknown criterion or capture.
    """

    def __init__(
        self,
        network: HasExits,
        thresholds: Sequence[float],
        criterion: Criterion = "entropy",
        batch_size: int = STREAM_BATCH_SIZE,
        capture: Capture = "none",
    ):
        check_capture(capture)
        check_thresholds(thresholds, len(network.exits), criterion)
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"a batch size of {batch_size}: give a whole number, 1 or more")
        self.network, self.criterion, self.batch_size = network, criterion, batch_size
        self.thresholds = list(thresholds)
        self._records = capture != "none" and can_be_recorded(network)
        self._answering = network  # what runs
        self._num_rows = WINDOW * batch_size
        self._queues: list[Queue] = []  # of the stages that were needed so far
        self._limits: list[Tensor] = []  # (batch_size,) of each exit but the last
        self._answers: Answers | None = None
        self._warm: set[int] = set()  # stages that have run on a full batch
        self._steps: dict[tuple[int, int], Callable[[], Tensor] | None] = {}  # by stage and block
        self._runs: deque[Run] = deque()
        self._num_pushed = self._num_taken = 0
        self._taken: list[Answers] = []
        self._has_failed = False

    @torch.no_grad()
    def push(self, images: Tensor) -> Answers | None:
        """Adds images; returns the next answers that are known, of any number, or None.

        Args:
            images: (N, C, H, W), any N.

        Raises:
            ValueError: a network in training mode, or images unlike those before.
            FloatingPointError: an image has logits that are not finite at the last exit.
        """
        check_evaluation_mode(self.network)
        self._check_is_whole()
        check_images(images)
        if not self._queues:
            self._start(images)
        kind = kind_of(images)
        if kind != self._kind:
            raise ValueError(
                f"images are {describe(*kind)} now and were {describe(*self._kind)}: give all "
                "batches of a stream alike, or start another one"
            )
        self._drop_outdated()
        while len(images):
            part, images = images.tensor_split([self._queues[0].num_missing])
            self._keep_window(len(part))
            rows = self._row_numbers[self._num_pushed % self._num_rows :][: len(part)]
            self._queues[0].put_images(part, rows, self._num_pushed)
            self._num_pushed += len(part)
            self._advance()
        return self._hand_over()

    @torch.no_grad()
    def finish(self) -> Answers | None:
        """Returns the answers of all other images; the stream may then be used again."""
        self._check_is_whole()
        if not self._queues:
            return None
        self._drop_outdated()
        self._flush()
        self._take()
        return self._hand_over()

    def _check_is_whole(self) -> None:
        if self._has_failed:
            raise ValueError("this stream has met logits that are not finite: start another one")

    def _drop_outdated(self) -> None:
        """Forgets the recordings of a network that is another one now."""
        before, self._answering = self._answering, answering(self.network)
        if self._records and (self._answering is not before or self._watch.has_changed()):
            self._steps.clear()
            self._recorder = Recorder(self._recorder.device)  # the old one's memory goes with it
            self._records = can_be_recorded(self._answering)
            self._watch = NetworkWatch(modules_of(self._answering))

    def _start(self, images: Tensor) -> None:
        device = images.device
        self._kind = kind_of(images)
        self._recorder, self._answering = Recorder(device), answering(self.network)
        self._watch = NetworkWatch(modules_of(self._answering))
        # A GPU is to be busy while the host looks at what came of the runs before.
        self._max_runs = MAX_RUNS if device.type == "cuda" else 0
        self._reader = Reader(device, self.batch_size, self._max_runs + 1)
        with torch.inference_mode(False):
            self._row_numbers = torch.arange(2 * self._num_rows, device=device) % self._num_rows
        self._add_queue(images)

    @property
    def _pads(self) -> bool:
        """Whether a full batch is faster than a smaller one, since it is recorded."""
        return self._records and self._recorder.records

    def _add_queue(self, example: State) -> None:
        # Less than a batch that is known to wait, one of every run under way, one of the next run.
        self._queues.append(Queue(example, self.batch_size, self._max_runs + 2))

    # --- on the device ----------------------------------------------------------------------------

    def _step(self, index: int, num_rows: int) -> Tensor:
        """Runs a stage, its exit and its criterion on the next block of the queue.

        Returns:
            (num_rows,) bool, who stays; at the last exit, whose logits are not finite.
        """
        queue = self._queues[index]
        rows = queue.rows[queue.start : queue.start + num_rows]
        state = self._answering.stages[index](queue.block(num_rows))
        logits = self._answering.exits[index](state)
        self._answer(rows, logits, index)
        if index == len(self.thresholds):
            return (logits * 0).sum(1) != 0
        scores = exit_score(logits, self.criterion)
        if len(self._limits) == index:
            with torch.inference_mode(False):
                size, threshold = self.batch_size, self.thresholds[index]
                self._limits.append(scores.new_full((size,), threshold))
        staying = ~leaves(scores, self._limits[index][:num_rows], self.criterion)
        if len(self._queues) == index + 1:
            self._add_queue(state)
        self._queues[index + 1].put(state, rows, staying)
        return staying

    def _fill_limits(self, index: int, first: int, value: float) -> None:
        """Gives rows that fill a batch a limit of their own, if the exit is not the last."""
        if index < len(self.thresholds):
            self._limits[index][first:] = value

    def _answer(self, rows: Tensor, logits: Tensor, index: int) -> None:
        if self._answers is None:
            with torch.inference_mode(False):
                num_rows = self._num_rows + 1  # one for rows that are nobody's
                exit_index = torch.zeros(num_rows, dtype=torch.int64, device=logits.device)
                self._answers = Answers(logits.new_zeros(num_rows, logits.shape[1]), exit_index)
        write_rows(self._answers.logits, rows, logits.to(self._answers.logits.dtype))
        self._answers.exit_index.index_fill_(0, rows, index)

    # --- on the host ------------------------------------------------------------------------------

    def _run(self, index: int, num_rows: int) -> None:
        """Launches a stage on the first rows of its queue."""
        queue, size = self._queues[index], num_rows
        # A batch is filled up where that spares a launch of every kernel.
        if num_rows < self.batch_size and self._pads and index in self._warm:
            size = self.batch_size
            queue.rows[queue.start + num_rows : queue.start + size] = self._num_rows
        is_filled = size > num_rows
        if is_filled:
            self._fill_limits(
                index, num_rows, math.inf if self.criterion == "entropy" else -math.inf
            )
        chosen = self._replay(index) if size == self.batch_size else self._step(index, size)
        images = queue.take(num_rows)
        if is_filled:
            self._fill_limits(index, num_rows, [*self.thresholds, math.inf][index])
            images = torch.cat([images, torch.full((size - num_rows,), NOBODY)])
        self._runs.append(Run(index, images, self._reader.read(chosen)))
        while len(self._runs) > self._max_runs:
            self._settle()

    def _replay(self, index: int) -> Tensor:
        """Runs a stage on a full block; from the second time on it is recorded."""
        step = partial(self._step, index, self.batch_size)
        place = index, self._queues[index].start
        if self._records and index in self._warm and place not in self._steps:
            as_now = autocast_as_now(self._recorder.device.type)

            def run() -> Tensor:
                with torch.no_grad(), as_now():
                    return step()

            recorded = try_to_record(self._recorder, run)
            self._records = recorded is not None
            self._steps[place] = recorded
        self._warm.add(index)
        return (self._steps[place] if self._records and place in self._steps else step)()

    def _settle(self) -> None:
        """Waits for the outcome of the earliest run."""
        run = self._runs.popleft()
        images = run.images[run.wait()]
        if run.index < len(self.thresholds):
            queue = self._queues[run.index + 1]
            queue.waiting = torch.cat([queue.waiting, images])
        elif num_bad := int((images != NOBODY).sum()):
            self._has_failed = True
            raise not_finite(num_bad, int((run.images != NOBODY).sum()))

    def _advance(self) -> None:
        """Runs stages for which a whole batch is known to wait."""
        while True:
            indices = range(len(self._queues))
            full = [k for k in indices if len(self._queues[k].waiting) >= self.batch_size]
            if not full:
                return
            self._run(full[-1], self.batch_size)

    def _flush(self) -> None:
        """Runs everything that waits, with less than a batch in the end."""
        while True:
            self._advance()
            if self._runs:
                self._settle()
                continue
            index = next((k for k, queue in enumerate(self._queues) if len(queue.waiting)), None)
            if index is None:
                break
            self._run(index, len(self._queues[index].waiting))
        for queue in self._queues:
            queue.restart()

    def _keep_window(self, num_more: int) -> None:
        """Makes room among the answers."""
        if self._num_pushed + num_more - self._num_taken <= self._num_rows:
            return
        self._take()
        if self._num_pushed - self._num_taken > self._num_rows // 2:
            self._flush()
            self._take()

    def _take(self) -> None:
        """Copies out the answers of all images before the first that is still inside."""
        inside = [queue.waiting for queue in self._queues] + [run.images for run in self._runs]
        firsts = [int(images.min()) for images in inside if len(images)]
        stop = min([self._num_pushed, *firsts])
        if stop > self._num_taken:
            first = self._num_taken % self._num_rows
            rows = self._row_numbers[first : first + stop - self._num_taken]
            self._taken.append(Answers(*(values[rows] for values in self._answers)))
            self._num_taken = stop

    def _hand_over(self) -> Answers | None:
        taken, self._taken = self._taken, []
        return join_answers(taken) if taken else None


def describe(shape: torch.Size, dtype: torch.dtype, device: torch.device, autocast: object) -> str:
    precision = f", autocast to {autocast}" if autocast else ""
    return f"{tuple(shape)} of {dtype} on {device}{precision}"


def check_images(images: object) -> None:
    """Raises ValueError if this is no batch of images."""
    if not isinstance(images, Tensor) or images.dim() != 4:
        what = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"{what} is no batch of images: give tensors (N, C, H, W), without labels")


def join_answers(parts: Sequence[Answers]) -> Answers:
    """Returns the answers of several batches as those of one."""
    return Answers(*map(torch.cat, zip(*parts, strict=True)))


def early_exit_stream(
    network: HasExits,
    batches: Iterable[Tensor],
    thresholds: Sequence[float],
    criterion: Criterion = "entropy",
    batch_size: int = STREAM_BATCH_SIZE,
    capture: Capture = "none",
) -> Iterator[Answers]:
    """Classifies batches of images; each image leaves at the first exit where it is sure.

    The answers are those of `early_exit`, batch by batch, and up to `WINDOW` times `batch_size`
    images late. See `ExitStream` for the arguments and errors.

    Args:
        network: in evaluation mode.
        batches: (N, C, H, W) each, of any sizes, on the device of the network.
        thresholds, criterion, batch_size, capture: see `ExitStream`.

    Returns:
        The answers to each batch, in order.
    """
    return _answer_batches(ExitStream(network, thresholds, criterion, batch_size, capture), batches)


def _answer_batches(stream: ExitStream, batches: Iterable[Tensor]) -> Iterator[Answers]:
    sizes: deque[int] = deque()
    known: Answers | None = None

    def complete() -> Iterator[Answers]:
        nonlocal known
        while known is not None and sizes and len(known.exit_index) >= sizes[0]:
            size = sizes.popleft()
            yield Answers(*(values[:size] for values in known))
            known = Answers(*(values[size:] for values in known))

    for images in batches:
        check_images(images)
        sizes.append(len(images))
        answers = stream.push(images)
        if answers is not None:
            known = answers if known is None else join_answers([known, answers])
            yield from complete()
    if not sizes:
        return
    last = stream.finish()
    if last is None:  # of no images
        last = early_exit(stream.network, images[:0], stream.thresholds, stream.criterion)
    known = last if known is None else join_answers([known, last])
    yield from complete()
