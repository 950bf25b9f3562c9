"""Functions that are recorded once and run again on the same memory: CUDA graphs.

A step of a deep, narrow network is thousands of kernels of a few microseconds, and a GPU waits for
Python to launch them. A recorded function is one launch. On a CPU recording changes nothing, so a
recorded function is called again, and what is built on it can be compared with eager code bit for
bit.

    recorder.warm_up(function);  replay = recorder.record(function);  result = replay()

A recorded function takes no arguments: it reads tensors that stay where they are, and whoever calls
it fills them first. Its result lies where it lay when it was recorded, so the next replay
overwrites it.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Literal, TypeVar

import torch
from torch.utils import _pytree as pytree

from networks.choices import check_choice

Capture = Literal["none", "graphs", "compiled"]
"""How a network is run: kernel by kernel, as CUDA graphs, or as CUDA graphs of compiled blocks."""
NUM_WARMUPS = 3
T = TypeVar("T")


def check_capture(capture: str) -> None:
    """Raises ValueError if this is no way to run a network."""
    check_choice("capture", capture, Capture)


class Recorder:
    """Records functions that share one pool of memory.

    What one recorded function leaves behind another may overwrite, unless a tensor of it is still
    held while the other is recorded. So they must be replayed in the order in which they were
    recorded; some may be left out.

    Args:
        device: where the functions run.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.records = device.type == "cuda"
        # Its own: torch's default one belongs to the device that was the first to capture.
        self.stream = torch.cuda.Stream(device) if self.records else None
        self.pool = torch.cuda.graph_pool_handle() if self.records else None

    def warm_up(self, function: Callable[[], object]) -> None:
        """Runs a function some times beside the main stream, as capture demands.

        cuDNN chooses its kernels and libraries reserve their memory. Whatever the function changes
        (statistics of BN, a generator's state) the caller puts back.
        """
        if not self.records:
            return
        gc.collect()  # see `no_collection`
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for _ in range(NUM_WARMUPS):
                function()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        torch.cuda.synchronize(self.device)

    def record(self, function: Callable[[], T]) -> Callable[[], T]:
        """Returns what runs the function again and returns its result; see the module's page."""
        if not self.records:
            return function
        graph = torch.cuda.CUDAGraph()
        # Relaxed: libraries may load what they need, other threads may use the device meanwhile.
        capture = torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="relaxed")
        # One that fails leaves its own stream behind as the current one.
        here = torch.cuda.stream(torch.cuda.current_stream(self.device))
        failure: Exception | None = None
        try:
            with here, no_collection(), capture:
                try:
                    result = function()
                except Exception as error:  # kept, since the capture's end raises another one
                    failure = error
                    raise
        except BaseException:
            self.end_capture()
            if failure is not None:  # and not what came of it at the end of the capture
                raise failure from None
            raise

        def replay() -> T:
            graph.replay()
            return result

        return replay

    def end_capture(self) -> None:
        """Ends what a capture that has failed has begun; torch itself leaves it open.

        The allocator would go on reserving for the pool, and the generator would refuse to draw
        until another capture ends well.
        """
        with contextlib.suppress(AttributeError, RuntimeError):
            torch._C._cuda_endAllocateToPool(self.stream.device_index, self.pool)
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize(self.device)
            stream = torch.cuda.Stream(self.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
                torch.zeros(1, device=self.device)


class CapturedInference:
    """A function without gradients, recorded for inputs of one shape.

    Calling it copies the inputs to where the recording reads them, and returns what it writes: that
    stays valid until the next call. It reads the parameters where they were: after they have moved
    (`.to`, loading with assign) make another one.

    Args:
        function: from a tree of tensors to a tree of tensors; the same kernels whatever the values.
        example: inputs of the shape, type, memory format and device of those to come.
    """

    def __init__(self, function: Callable[..., object], *example: object):
        tensors, self._structure = pytree.tree_flatten(example)
        self.inputs = [tensor.clone() for tensor in tensors]
        recorder = Recorder(tensors[0].device)

        def run() -> object:
            with torch.no_grad(), as_now():
                return function(*pytree.tree_unflatten(self.inputs, self._structure))

        as_now = autocast_as_now(tensors[0].device.type)
        recorder.warm_up(run)
        self.replay = recorder.record(run)

    def __call__(self, *inputs: object) -> object:
        for own, tensor in zip(self.inputs, pytree.tree_leaves(inputs), strict=True):
            own.copy_(tensor)
        return self.replay()


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Keeps garbage: an older recording in it would give its memory back, which ends a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def autocast_as_now(device_type: str) -> Callable[[], AbstractContextManager]:
    """Returns what makes the present autocast again, without its cache of converted weights.

    In a recording such a cache would hold tensors of the recording's memory.
    """
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype, enabled=enabled, cache_enabled=False)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Returns the type that the present autocast converts to; None: there is none."""
    enabled = torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if enabled else None
