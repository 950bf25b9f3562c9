"""What is exported of an operating point: plain modules, from images in bytes to probabilities."""

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from datamodules import ImageFormat
from lightning_modules import ImageClassifier, LitStochasticDepth, MultiExitClassifier
from networks import (
    AtWidth,
    Criterion,
    MultiExitNetwork,
    OnlyUsed,
    SlimmableNetwork,
    TemperatureScaled,
    exit_score,
    extract,
    fold_survival_probs,
    run_to_exit,
)
from running.loading import LoadedRun

EXAMPLE_SIZE = 2  # of no batch that would be a case of its own


class Piece(NamedTuple):
    """A module to be exported, and what it may be shown."""

    module: nn.Module
    """From a list of tensors to a list of tensors, each of whose first dimension is the batch."""
    example: list[Tensor]
    inputs: list[str]
    outputs: list[str]


class Network(NamedTuple):
    """A point without early exit."""

    piece: Piece


class EarlyExit(NamedTuple):
    """A point whose images leave when they are sure."""

    stages: list[Piece]
    exits: list[Piece]
    thresholds: list[float]
    criterion: Criterion


class FromBytes(nn.Module):
    """Normalises images (uint8, (N, C, H, W), the only tensor of a list) for a module."""

    def __init__(self, image_format: ImageFormat, module: nn.Module):
        super().__init__()
        self.register_buffer("scale", image_format.scale.clone())
        self.register_buffer("shift", image_format.shift.clone())
        self.module = module

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        return self.module([torch.addcmul(self.shift, images[0].float(), self.scale)])


class Probabilities(nn.Module):
    """The probabilities (N, num_classes) of a module's logits; at an exit the score (N,), too."""

    def __init__(self, module: nn.Module, criterion: Criterion | None = None):
        super().__init__()
        self.module = module
        self.criterion = criterion

    def forward(self, state: list[Tensor]) -> list[Tensor]:
        (logits,) = self.module(state)
        scores = [] if self.criterion is None else [exit_score(logits, self.criterion)]
        return [logits.softmax(1), *scores]


def take_out(run: LoadedRun, name: str) -> Network | EarlyExit:
    """Returns an operating point, cut out of its network; the run is left as it is.

    A width is the narrow network, Stochastic Depth the network with the survival probabilities in
    its weights, an exit the network up to there.

    Raises:
        ValueError: no such point, or a width without BN statistics.
    """
    run.point(name)
    module = copy.deepcopy(run.module)
    if isinstance(module, MultiExitClassifier) and name in module.early_points():
        return take_out_exits(module, name, run.image_format)
    images = example_images(run.image_format)
    network, function = ordinary(module, name)
    part = OnlyUsed(network, function, run.image_format.normalize(images))
    whole = FromBytes(run.image_format, Probabilities(part)).eval()
    return Network(Piece(whole, [images], ["images"], ["probabilities"]))


def ordinary(module: ImageClassifier, name: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Returns the network of a point, and the function from images to logits that it computes."""
    points = module.operating_points()
    if isinstance(module.net, SlimmableNetwork):
        widths = dict(zip(points, module.eval_widths, strict=True))
        network = extract(module.net, widths[name], fold_bn=True)
        return network, network
    if isinstance(module, LitStochasticDepth) and not module.rescale:
        network = fold_survival_probs(module.net, module.survival_probs)
        return network, network
    if isinstance(module, MultiExitClassifier):
        names = module.names_of(module.group_of(name))
        if name in names:  # of MSDNet the point itself runs the exits before it, too
            index = names.index(name) - len(names)  # some are not trained
            network = narrowed(module.network_of(name))
            return network, partial(run_to_exit, network, network.num_exits + index)
    return module.net, points[name]


def narrowed(
    network: MultiExitNetwork | TemperatureScaled,
) -> MultiExitNetwork | TemperatureScaled:
    """Returns an ordinary network with the exits of this one, of which it may be a width."""
    if isinstance(network, TemperatureScaled):
        return TemperatureScaled(narrowed(network.network), network.temperatures)
    return network.extract(fold_bn=True) if isinstance(network, AtWidth) else network


def take_out_exits(module: MultiExitClassifier, name: str, image_format: ImageFormat) -> EarlyExit:
    images = example_images(image_format)
    state: object = image_format.normalize(images)
    before, names = [images], ["images"]
    stages, exits = [], []
    answering = narrowed(module.network_of(name))
    for index in range(answering.num_exits):
        # Copies, as each loses what it does not run.
        network, other = copy.deepcopy(answering), copy.deepcopy(answering)
        stage = OnlyUsed(network, network.stages[index], state)
        exit_here = OnlyUsed(other, other.exits[index], stage.example)
        state = stage.example
        whole = stage if index else FromBytes(image_format, stage)
        with torch.no_grad():
            after = whole(before)
        outputs = [f"state{index + 1}_{number}" for number in range(len(after))]
        stages.append(Piece(whole.eval(), before, names, outputs))
        answers = Probabilities(exit_here, module.exit_criterion).eval()
        exits.append(Piece(answers, after, outputs, ["probabilities", "score"]))
        before, names = after, outputs
    thresholds = list(module.early_points()[name].thresholds)
    return EarlyExit(stages, exits, thresholds, module.exit_criterion)


def example_images(image_format: ImageFormat) -> Tensor:
    return torch.zeros(EXAMPLE_SIZE, *image_format.image_shape, dtype=torch.uint8)
