"""Rows of `benchmarks.gpu`: inference, by exits and by widths."""

import copy
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torchvision.models import mobilenet_v2

import networks
from benchmarks.early_exit import CASES, Case, find_thresholds, fit_statistics
from benchmarks.gpu_report import Report, Setting
from benchmarks.timing import Times
from networks import (
    CifarResNet,
    ExitCosts,
    MultiExitNetwork,
    ResNetWithExits,
    SlimmableCifarResNet,
    SlimmableMobileNetV2,
    Staged,
    count_exit_macs,
    early_exit,
    extract,
    recalibrate,
    run_all_exits,
    run_to_exit,
)


def recorded(run: Callable[[Tensor], object], batches: list[Tensor]) -> Callable[[], None]:
    """Returns what runs a function on every batch, recorded: what a user could reach without us."""
    replay = networks.CapturedInference(run, batches[0])
    return lambda: [replay(batch) for batch in batches] and None


def eagerly(run: Callable[[Tensor], object], batches: list[Tensor]) -> Callable[[], None]:
    return lambda: [run(batch) for batch in batches] and None


class Exits:
    """A network with exits whose thresholds send known shares of its images to each of them.

    Args:
        case: the network and the shares.
        batches: images.
        setting: where.
    """

    def __init__(self, case: Case, batches: list[Tensor], setting: Setting):
        self.network: MultiExitNetwork = setting.place(case.build())
        self.batches = batches
        fit_statistics(self.network, torch.cat(batches)[:1024])
        self.thresholds = find_thresholds(self.network, batches, case.shares)
        answers = [early_exit(self.network, batch, self.thresholds) for batch in batches]
        self.taken = torch.cat([each.exit_index for each in answers]).cpu()
        self.last = self.network.num_exits - 1

    def part(self, index: int) -> Callable[[Tensor], object]:
        """Returns what computes all exits up to one: what an image costs that leaves there."""
        exits = Staged(self.network.stages[: index + 1], self.network.exits[: index + 1])
        return partial(run_all_exits, exits)

    def builders(self) -> dict[str, Callable[[], Callable[[], None]]]:
        trunk = partial(run_to_exit, self.network, self.last)
        compacting = partial(early_exit, self.network, thresholds=self.thresholds)
        parts = {
            f"exits 1 to {index + 1}, a graph": partial(recorded, self.part(index), self.batches)
            for index in range(self.last + 1)
        }
        return {
            "trunk, a graph": partial(recorded, trunk, self.batches),
            "trunk, eager": lambda: eagerly(trunk, self.batches),
            "early_exit, eager": lambda: eagerly(compacting, self.batches),
            **parts,
        }

    def mean(self, per_exit: list[float]) -> float:
        return torch.tensor(per_exit)[self.taken].double().mean().item()

    def add_promises(
        self, report: Report, name: str, times: Times, ours: str, claims: dict
    ) -> None:
        """Adds what is measured over what is promised by the stages' times and by their MACs."""
        seconds = times.seconds
        costs: ExitCosts = count_exit_macs(self.network, self.batches[0][:1])
        parts = [
            seconds.get(f"exits 1 to {k + 1}, a graph", math.nan) for k in range(self.last + 1)
        ]
        trunk = seconds.get("trunk, a graph", math.nan)
        measured = trunk / seconds.get(ours, math.nan)
        promises = {
            "times": trunk / self.mean(parts),
            "MACs": costs.trunk / self.mean(costs.leaving),
        }
        reason = next((f"{name}: {why}" for name, why in times.failures.items()), "")
        for key, promised in promises.items():
            value = measured / promised
            title = f"{name}: speed-up {measured:.2f} / {promised:.2f}, promised by {key}"
            known = not math.isnan(value)
            report.add(
                title if known else f"{name}: speed-up / promised by {key}",
                value if known else None,
                at_least=claims[key],
                reason=reason,
            )


def small_case(case: Case) -> Case:
    """Returns a case whose network is small: three exits."""

    def build() -> MultiExitNetwork:
        return ResNetWithExits(CifarResNet(8), exits_after=[0, 1])

    return case._replace(build=build, shares=(0.5, 0.25, 0.25))


@torch.no_grad()
def exits(report: Report, setting: Setting) -> None:
    """Early exit over a data set, in batches."""
    batch_size, num_batches = setting.pick(256, 8), setting.pick(40, 2)
    for name in ("ResNet-110", "MSDNet"):
        case = setting.pick(CASES[name], small_case(CASES[name]))
        batches = list(setting.images(batch_size * num_batches, 32).split(batch_size))
        contest = Exits(case, batches, setting)

        def ours(contest: Exits = contest) -> Callable[[], None]:
            stream = networks.ExitStream(
                contest.network, contest.thresholds, batch_size=batch_size, capture="graphs"
            )

            def classify() -> None:
                for batch in contest.batches:
                    stream.push(batch)
                stream.finish()

            return classify

        builders = {"ours, at a constant batch size": ours, **contest.builders()}
        times = setting.time(builders, num_rounds=5)
        report.show(
            f"{name}, {num_batches} batches of {batch_size}, TF32", times, len(contest.taken)
        )
        claims = {"times": 0.92, "MACs": 0.85}
        title = f"{name}, batch {batch_size}"
        contest.add_promises(report, title, times, "ours, at a constant batch size", claims)


@torch.no_grad()
def latency(report: Report, setting: Setting) -> None:
    """Early exit of one image after the other."""
    for name in ("ResNet-110", "MSDNet"):
        case = setting.pick(CASES[name], small_case(CASES[name]))
        batches = list(setting.images(setting.pick(case.pool_size, 8), 32).split(1))
        contest = Exits(case, batches, setting)

        def ours(thresholds: list[float], contest: Exits = contest) -> Callable[[], None]:
            return eagerly(networks.EarlyExit(contest.network, thresholds), contest.batches)

        nobody = [-math.inf] * contest.last
        builders = {
            "ours, a graph per stage": partial(ours, contest.thresholds),
            "ours, nobody leaves": partial(ours, nobody),
            **contest.builders(),
        }
        times = setting.time(builders)
        report.show(f"{name}, one image, TF32", times, len(contest.taken))
        claims = {"times": 0.9, "MACs": None}
        contest.add_promises(report, f"{name}, one image", times, "ours, a graph per stage", claims)
        everything = f"exits 1 to {contest.last + 1}, a graph"
        report.ratio(
            f"{name}, one image: nobody leaves / all exits in one graph",
            times,
            "ours, nobody leaves",
            everything,
            at_most=1.05,
        )


@torch.no_grad()
def widths(report: Report, setting: Setting) -> None:
    """A width in place beside a network of that width, one image."""
    images = torch.randn(1, 3, *[setting.pick(224, 64)] * 2, device=setting.device)
    chosen = setting.pick((1.0, 0.75, 0.5, 0.35), (0.5,))
    network = SlimmableMobileNetV2(width_mult_range=(0.35, 1.0)).to(setting.device)
    batch = torch.randn(8, *images.shape[1:], device=setting.device)
    recalibrate(network, [batch], [partial(network, width_mult=width) for width in chosen])
    network.eval()
    for width in chosen:
        built = mobilenet_v2(width_mult=width).to(setting.device).eval()
        cut = extract(network, width)
        times = setting.time(
            {
                "in place": lambda width=width: lambda: network(images, width),
                "torchvision's network of that width": lambda built=built: lambda: built(images),
                "extracted": lambda cut=cut: lambda: cut(images),
                "torchvision's, a graph": partial(recorded, built, [images]),
                "extracted, a graph": partial(recorded, cut, [images]),
            }
        )
        report.show(f"MobileNet v2 at width {width}, one image, TF32", times, 1)
        other = "torchvision's network of that width"
        report.ratio(f"width {width} in place / {other}", times, "in place", other, at_most=1.05)


@torch.no_grad()
def recalibration(report: Report, setting: Setting) -> None:
    """Recalibration of 16 widths beside the passes by the batch that it consists of."""
    batch_size, size = setting.pick(128, 8), setting.pick(20, 8)
    chosen = [0.25 + 0.05 * index for index in range(setting.pick(16, 2))]
    network = setting.place(SlimmableCifarResNet(size, width_mult_range=(0.25, 1.0))).eval()
    training = copy.deepcopy(network).train()
    # As many images as BNRecalibration takes by default.
    batches = [setting.images(batch_size, 32) for _ in range(setting.pick(8, 2))]
    runs = [partial(network, width_mult=width) for width in chosen]

    def passes() -> None:
        for images in batches:
            for each in chosen:
                training(images, each)

    times = setting.time(
        {
            "recalibration": lambda: lambda: recalibrate(network, batches, runs),
            "passes by the batch": lambda: passes,
        }
    )
    num_images = batch_size * len(batches)
    report.show(f"{len(chosen)} widths of ResNet-{size}, {num_images} images", times, num_images)
    promise = f"recalibration of {len(chosen)} widths / {len(chosen)} passes by the batch"
    report.ratio(promise, times, "recalibration", "passes by the batch", at_most=1.15)
