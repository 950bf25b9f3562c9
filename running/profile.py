"""What an experiment costs before anybody trains it: of each operating point and each stage."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from pytorch_lightning.cli import LightningArgumentParser
from torch import Tensor, nn

from endless import is_endless
from lightning_modules import FULL, Cost, ImageClassifier, check_data
from networks import (
    NUM_TIMED_ROUNDS,
    TIMED_BATCH_SIZE,
    AtWidth,
    MultiExitNetwork,
    count_exit_macs,
    count_params,
    count_stage_macs,
    count_stage_params,
    early_exit,
    kept_bytes,
    peak_bytes,
    settle_statistics,
    time_points,
    time_stages,
    walk_stages,
    walk_whole,
)
from running.cli import ExperimentCLI
from running.suggestions import nearest_file

TIMES = {"ms_alone": 20, "ms_in_batch": NUM_TIMED_ROUNDS}
"""Costs that are measured times, and how many runs each is the median of: one image takes less time
and varies more."""

Points = dict[str, Callable[[Tensor], Tensor]]
Columns = dict[str, Mapping[str, float]]
"""By the name of the cost, then by that of a point or a stage."""


class Costs(NamedTuple):
    """What an operating point or a stage costs per image; None where that cannot be said.

    Attributes:
        kind: "point" or "stage".
        name: of the point ("full", "w0.5", ...) or of the stage ("layer1", "exit1", ...).
        macs: multiply-accumulates.
        params: learnable numbers.
        kept_bytes: what a training pass keeps for backward, see `networks.profiling`.
        peak_bytes: of the activations that live at once, at most, while one image is classified.
        ms_alone: milliseconds of a batch of one image.
        ms_in_batch: milliseconds per image of a batch of the size that was asked for.
    """

    kind: str
    name: str
    macs: int
    params: int
    kept_bytes: int | None
    peak_bytes: int
    ms_alone: float
    ms_in_batch: float


class _Built(ExperimentCLI):
    """Parses an experiment and builds model and data as `fit` does, without a Trainer."""

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        """Parses; Lightning would warn that the process has arguments of its own."""
        self.config = parser.parse_args(args)

    def instantiate_trainer(self, **kwargs: object) -> None:
        """Returns nothing: no trainer."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Does nothing: it is built."""


def profile_experiment(
    path: Path, device: torch.device, batch_size: int = TIMED_BATCH_SIZE
) -> list[Costs]:
    """Measures an experiment; reads its YAML alone, and no data.

    Args:
        path: of the YAML.
        device: where it is measured.
        batch_size: of the batch whose time per image is measured.

    Raises:
        ValueError: it is no experiment, its data module says nothing of its images, or the device
            has too little memory for the batch.
        FileNotFoundError: no such file.
    """
    check_experiment(path)
    built = _Built(["fit", "-c", str(path)])
    image_shape = getattr(built.datamodule, "image_shape", None)
    if image_shape is None:
        raise ValueError(
            f"{path}: {type(built.datamodule).__name__} has no image_shape, which says how large "
            "its images are: give it one, (C, H, W)"
        )
    check_data(built.model.net, None, image_shape)
    try:
        return profile(built.model, image_shape, device, batch_size)
    except RuntimeError as error:
        # A GPU's class, and what an allocator of a CPU says.
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise ValueError(
            f"{path}: {device} has too little memory for {batch_size} images: lower --batch_size"
        ) from error


def check_experiment(path: Path) -> None:
    """Raises FileNotFoundError or ValueError unless a file is a YAML with a model."""
    if not path.is_file():
        raise FileNotFoundError(f"no experiment {path}{nearest_file(path) or ': name a YAML'}")
    try:
        content = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if is_endless(content):
        raise ValueError(f"{path} refers to itself, or says too much: correct it")
    if not isinstance(content, dict) or "model" not in content:
        raise ValueError(
            f"{path} has no model, so it is no experiment: each -c is an experiment of its own, "
            "and instead of a machine file there is --device"
        )


def profile(
    module: ImageClassifier,
    image_shape: tuple[int, int, int],
    device: torch.device,
    batch_size: int = TIMED_BATCH_SIZE,
) -> list[Costs]:
    """Measures the operating points and the stages of a module, on random images.

    What thresholds cost depends on the images and the training. Where they are given, their point
    is an image that stays to the end, which costs the most.

    Args:
        module: its weights may be random. Its BN statistics and given thresholds are lost.
        image_shape: (C, H, W).
        device: where it is measured, and where the module stays.
        batch_size: of the larger batch that is timed.

    Returns:
        The points, then the stages: of a network with exits all stages and all exits, of another
        one those of its whole network.
    """
    module.to(device)
    chance = torch.Generator().manual_seed(0)
    images = torch.randn(max(2, batch_size), *image_shape, generator=chance).to(device)
    image, net, networks = images[:1], module.net, take_thresholds(module)
    points = dict(module.evaluated_points())
    stages = walk_stages(net, points[FULL])

    module.train()
    kept = {name: _whole(kept_bytes, net, run, image) for name, run in points.items()}
    by_stage: Columns = {"kept_bytes": kept_bytes(net, stages, image)}
    module.eval()
    settle_statistics(net, images[:2], [*points.values(), partial(stages, mark=_ignore)])

    by_stage["macs"] = count_stage_macs(stages, image)
    by_stage["params"] = count_stage_params(net, stages, image)
    by_stage["peak_bytes"] = peak_bytes(net, stages, image)
    points |= {name: partial(stay, network) for name, network in networks.items()}
    peaks = {name: _whole(peak_bytes, net, run, image) for name, run in points.items()}
    by_point = counts_of_points(module, networks, image) | {"kept_bytes": kept, "peak_bytes": peaks}
    for (key, num_rounds), batch in zip(TIMES.items(), (image, images[:batch_size]), strict=True):
        by_point[key] = time_points(points, [batch], num_rounds)
        by_stage[key] = time_stages(stages, batch, num_rounds)
    return [*_rows("point", by_point), *_rows("stage", by_stage)]


def counts_of_points(
    module: ImageClassifier, networks: Mapping[str, MultiExitNetwork], image: Tensor
) -> Columns:
    """Returns MACs and parameters of the points, and of images that stay in these networks."""
    with torch.no_grad():
        costs = dict(module.costs(image))
        for name, network in networks.items():
            macs = count_exit_macs(network, image).leaving[-1]
            narrow = network.extract() if isinstance(network, AtWidth) else network
            costs[name] = Cost(macs, count_params(narrow))
    return {
        "macs": {name: round(cost.macs) for name, cost in costs.items()},
        "params": {name: cost.params for name, cost in costs.items()},
    }


def stay(network: MultiExitNetwork, images: Tensor) -> Tensor:
    """Returns the logits of images that stay to the end, and are asked at every exit."""
    return early_exit(network, images, [-math.inf] * (network.num_exits - 1)).logits


def take_thresholds(module: ImageClassifier) -> dict[str, MultiExitNetwork]:
    """Takes given thresholds away from a module; returns the network of each of their points."""
    names = module.operating_points().keys() - module.evaluated_points().keys()
    networks = {name: module.network_of(name) for name in names}
    if names:
        module.given_thresholds = None
    return networks


def _whole(
    measure: Callable[..., Mapping[str, int]],
    network: nn.Module,
    run: Callable[[Tensor], object],
    image: Tensor,
) -> int:
    """Returns what is measured of a function that is one stage."""
    (value,) = measure(network, walk_whole("", run), image).values()
    return value


def _ignore(name: str) -> None:
    """A mark that leaves none."""


def _rows(kind: str, columns: Columns) -> list[Costs]:
    return [
        Costs(kind, name, **{key: values.get(name) for key, values in columns.items()})
        for name in columns["macs"]
    ]
