"""What `benchmarks.gpu` measures with, and how it tells: at once, and in one table at the end."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks.timing import Times, describe_failure, free_memory, time_contenders
from lightning_modules import zero_missing_gradients

T = TypeVar("T")


class Setting(NamedTuple):
    """Where, and how thoroughly; `small` is for a test of the code, and its times say nothing."""

    device: torch.device
    small: bool = False

    def pick(self, full: T, small: T) -> T:
        return small if self.small else full

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    def images(self, count: int, size: int, channels: int = 3) -> Tensor:
        """Returns random images in channels_last, (count, channels, size, size)."""
        images = torch.randn(count, channels, size, size, device=self.device)
        return images.contiguous(memory_format=torch.channels_last)

    def labels(self, count: int, num_classes: int = 10) -> Tensor:
        return torch.randint(num_classes, (count,), device=self.device)

    def place(self, network: nn.Module) -> nn.Module:
        return network.to(self.device, memory_format=torch.channels_last)

    def compile(self, network: Callable, mode: str) -> Callable:
        """Returns what torch.compile makes of a network; its code is not run when small."""
        if self.small:
            return torch.compile(network, backend="eager")
        return torch.compile(network, mode=mode)

    def time(
        self,
        builders: Mapping[str, Callable[[], Callable[[], object]]],
        num_rounds: int = 9,
        sample_seconds: float = 0.06,
    ) -> Times:
        if self.small:
            num_rounds, sample_seconds = 1, 0.0
        return time_contenders(builders, self.device, num_rounds, sample_seconds)


def training_step(
    network: nn.Module,
    loss: Callable[[], Tensor],
    amp: contextlib.AbstractContextManager | None = None,
) -> Callable[[], None]:
    """Returns a step of SGD, with one kernel for all parameters where the device has it.

    Args:
        network: has the parameters.
        loss: runs it.
        amp: under what the loss is computed.
    """
    on_gpu = next(network.parameters()).device.type == "cuda"
    optimizer = SGD(network.parameters(), 0.01, 0.9, weight_decay=1e-4, fused=on_gpu)

    def step() -> None:
        optimizer.zero_grad()
        with amp or contextlib.nullcontext():
            value = loss()
        value.backward()
        zero_missing_gradients(network.parameters())  # as LitStochasticDepth does
        optimizer.step()

    return step


class Line(NamedTuple):
    """One promise."""

    promise: str
    value: float | None
    goal: str
    verdict: str


class Report:
    """Collects lines, and prints each at once."""

    def __init__(self) -> None:
        self.lines: list[Line] = []

    def say(self, text: str) -> None:
        print(text, flush=True)

    def show(self, title: str, times: Times, num_images: int) -> None:
        """Prints all contenders of a row, those that failed included."""
        self.say(f"\n{title}")
        for name, seconds in sorted(times.seconds.items(), key=lambda item: item[1]):
            rate = num_images / seconds
            self.say(f"  {name:<44}{1000 * seconds:>10.3f} ms{rate:>12,.0f} images/s")
        for name, reason in times.failures.items():
            self.say(f"  {name:<44}failed: {reason}")

    def ratio(
        self,
        promise: str,
        times: Times,
        over: str,
        under: str,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> None:
        """Adds the time of one contender over that of another."""
        missing = [name for name in (over, under) if name not in times.seconds]
        if missing:
            reason = times.failures.get(missing[0], "not run")
            self.add(promise, None, at_most, at_least, f"{missing[0]}: {reason}")
        else:
            value = times.seconds[over] / times.seconds[under]
            self.add(promise, value, at_most, at_least)

    def add(
        self,
        promise: str,
        value: float | None,
        at_most: float | None = None,
        at_least: float | None = None,
        reason: str = "",
    ) -> None:
        """Adds a line and prints it; without a value it says the reason."""
        goal = f"<= {at_most}" if at_most is not None else ""
        goal = f">= {at_least}" if at_least is not None else goal
        if value is None:
            verdict = f"not measured: {reason}"
        elif not goal:
            verdict = "for comparison"
        else:
            holds = value <= at_most if at_least is None else value >= at_least
            verdict = "holds" if holds else "MISSED"
        self.lines.append(Line(promise, value, goal, verdict))
        self.say(self.format(self.lines[-1]))

    @staticmethod
    def format(line: Line) -> str:
        value = "-" if line.value is None else f"{line.value:.3f}"
        return f"{line.promise:<72}{value:>9}{line.goal:>9}  {line.verdict}"


@contextlib.contextmanager
def row(report: Report, name: str, setting: Setting) -> Iterator[None]:
    """Runs a row: what raises in it is a line that says why, and its memory is given back."""
    torch.manual_seed(0)
    torch.compiler.reset()  # else the graphs of a row before stay, and its limits on recompiling
    try:
        yield
    except Exception as error:  # any: the other rows go on, and this one says why
        report.add(f"row {name}", None, reason=describe_failure(error))
    free_memory(setting.device)
