"""Exits on a network that somebody else wrote: any classifier of torchvision, timm or your own.

    network = with_exits(torchvision.models.resnet50(), after=["layer1", "layer2", "layer3"])

The network is cut into stages (see `networks.cutting`), and all that is done with networks with
exits is done with it. No layer is changed: the last exit is the network, bit for bit, in training,
too.
"""

import contextlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from networks.choices import check_counts
from networks.cutting import Cut, on_meta
from networks.early_exit import MultiExitNetwork, State
from networks.exit_heads import default_exit

ExitFactory = Callable[[Any, int], nn.Module]
"""Makes an exit from a state of several images, without numbers, and the number of logits."""

USUAL_SIZE = 224
"""Side of the images that a network is tried with, if nothing says otherwise."""


class WithExits(MultiExitNetwork):
    """A network with exits behind some of its modules.

    Its state dict holds that of the network under ``network.`` and the exits under ``exits.``;
    `load_weights` takes the state dict of the network alone, too. Train, freeze, load and move the
    network as you like, but let it be made of the modules it was cut with.

    Args:
        network: from images (N, C, H, W) to logits (N, num_classes). In a YAML a class, or a
            function that returns a network, as `torchvision.models.resnet50` or `timm.create_model`
            (what the latter hands on, like `num_classes` and `in_chans`, are its `dict_kwargs`).
        after: names of the modules behind which an exit is put, in the order in which they run;
            `places_to_cut` lists them.
        exits: one for each, from the state there to logits, or a function that makes one (see
            `ExitFactory`); None: pooling and a linear layer, see `networks.exit_heads`.
        image_size: side of the images; None: as the network says, or any.

    Raises:
        ValueError: the network cannot be cut there (names the nearest place), does not take such
            images, or the exits do not fit.
    """

    trunk_prefix = "network."

    def __init__(
        self,
        network: nn.Module,
        after: Sequence[str],
        exits: Sequence[nn.Module] | ExitFactory | None = None,
        image_size: int | None = None,
    ):
        super().__init__()
        if image_size is not None:
            check_counts(image_size=image_size)
        own_size = size_of(network)
        size = image_size or own_size or USUAL_SIZE
        cut = Cut(network, after)
        tries = [
            rehearse(cut, images_for(network, num_images, size, size), training)
            for num_images, training in ((3, True), (5, False))
        ]
        overwriting = tries[0].overwriting | tries[1].overwriting
        self.num_classes = tries[0].states[-1].shape[1]
        self.image_size = image_size or own_size
        self.network = network
        self._cut = Cut(network, after, sorted(overwriting)) if overwriting else cut
        if exits is None:
            exits = default_exits(cut, tries[1].states, size)
        elif callable(exits) and not isinstance(exits, nn.Module):
            exits = [exits(state, self.num_classes) for state in tries[1].states[:-1]]
        check_exits(exits, cut.after, tries, self.num_classes)
        self.exits = nn.ModuleList([*exits, nn.Identity()])

    @property
    def stages(self):
        return self._cut.stages

    def in_early_exit(self, key: str) -> bool:
        return key.startswith("exits.")  # the last has no weights of its own


def with_exits(
    network: nn.Module,
    after: Sequence[str],
    exits: Sequence[nn.Module] | ExitFactory | None = None,
    image_size: int | None = None,
) -> WithExits:
    """Returns a network with exits behind some of its modules; see `WithExits`."""
    return WithExits(network, after, exits, image_size)


# --- how the network takes its images -------------------------------------------------------------


def size_of(network: nn.Module) -> int | None:
    """Returns the side of the images that a network insists on, if it says so."""
    size = getattr(network, "image_size", None)  # as torchvision and this project call it
    for module in network.modules():
        if getattr(module, "strict_img_size", False):  # timm's embedding of patches
            height, width = module.img_size
            size = height if height == width else None
    return size if isinstance(size, int) else None


def images_for(network: nn.Module, num_images: int, height: int, width: int) -> Tensor:
    """Returns images without numbers, with as many channels as the first convolution takes."""
    convolutions = (module for module in network.modules() if isinstance(module, nn.Conv2d))
    channels = next((convolution.in_channels for convolution in convolutions), 3)
    types = (each.dtype for each in network.parameters() if each.is_floating_point())
    shape = num_images, channels, height, width
    return torch.empty(shape, device="meta", dtype=next(types, None))


class Rehearsal(NamedTuple):
    """What is known of a network without computing anything."""

    states: list[State]
    """Behind each stage, the last are logits; on the meta device."""
    overwriting: set[int]
    """Numbers of the stages that overwrite the state that they are given."""


def rehearse(cut: Cut, images: Tensor, training: bool) -> Rehearsal:
    """Runs the stages of a network for the shapes alone.

    Args:
        cut: the network.
        images: on the meta device.
        training: mode of the network.

    Raises:
        ValueError: it does not take such images, what goes on behind a stage has not a row for each
            image, or the last stage gives no logits.
    """
    name = type(cut.network).__name__
    twin, state = on_meta(cut.network, training), images
    states, overwriting = [], set()
    for index, code in enumerate(cut.uniform(training)):
        before = versions(state)
        try:
            with without_traces():
                new = code(twin, state)
        except Exception as error:  # whatever foreign code makes of a size
            shape = " x ".join(map(str, images.shape[1:]))
            raise ValueError(
                f"{name} does not run on images of {shape}: {first_line(error)}; give the "
                "image_size that it takes"
            ) from error
        if index and versions(state) != before:
            overwriting.add(index)
        state = new
        states.append(state)
        for leaf in pytree.tree_leaves(state):
            if not isinstance(leaf, Tensor) or leaf.shape[:1] != images.shape[:1]:
                where = cut.after[index] if index < len(cut.after) else "the last layer"
                raise ValueError(
                    f"cannot cut {name} after {where}: what goes on there is {describe(leaf)} for "
                    f"{len(images)} images, and has not a row for each"
                )
    if not isinstance(state, Tensor) or state.dim() != 2:
        raise ValueError(
            f"{name} gives {describe(state)} for {len(images)} images: logits (N, num_classes) "
            "are needed"
        )
    return Rehearsal(states, overwriting)


@contextlib.contextmanager
def without_traces():
    """Neither remembers gradients nor draws from the global generator."""
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        yield


def versions(state: State) -> list[int]:
    """Returns how often each tensor was written to."""
    return [leaf._version for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def first_line(error: Exception) -> str:
    text = re.sub(r"Proxy\(\w+\)", "another", str(error))  # of a message that was traced
    return text.strip().partition("\n")[0].rstrip(".") or type(error).__name__


# --- exits ----------------------------------------------------------------------------------------


def default_exits(cut: Cut, states: Sequence[State], size: int) -> list[nn.Module]:
    """Returns exits for square images of this size, beside the tensors of the network.

    Raises:
        ValueError: a state is none that the default is made for.
    """
    network = cut.network
    oblong: Sequence[State | None] = [None] * len(states)
    with contextlib.suppress(ValueError):  # it takes squares alone
        oblong = rehearse(cut, images_for(network, 5, 2 * size, size), training=False).states
    exits = []
    for name, square, other in zip(cut.after, states, oblong, strict=False):
        try:
            exits.append(default_exit(network, square, other, states[-1].shape[1]))
        except ValueError as error:
            raise ValueError(f"no default exit after {name}: {error}") from error
    beside = next(network.parameters(), None)
    return exits if beside is None else [each.to(beside.device, beside.dtype) for each in exits]


def check_exits(
    exits: Sequence[nn.Module], after: Sequence[str], tries: Sequence[Rehearsal], num_classes: int
) -> None:
    """Raises ValueError unless exits turn the states into logits, and leave them as they are."""
    is_list = not isinstance(exits, nn.Module) or isinstance(exits, nn.ModuleList)
    if not is_list or len(exits) != len(after):
        number = len(exits) if is_list else "one module"
        raise ValueError(f"{number} as exits for {len(after)} places: give a list, one for each")
    for number, (name, exit_here) in enumerate(zip(after, exits, strict=True)):
        for rehearsal, training in zip(tries, (True, False), strict=True):
            state = rehearsal.states[number]
            before = versions(state)
            try:
                with without_traces():
                    logits = on_meta(exit_here, training)(state)
            except Exception as error:
                raise ValueError(
                    f"the exit after {name} does not take {describe(state)}: {first_line(error)}"
                ) from error
            if versions(state) != before:
                raise ValueError(
                    f"the exit after {name} overwrites the state that the next stage needs: make "
                    "its first layers leave it, inplace=False"
                )
            if describe(logits) != f"a tensor {(len(rehearsal.states[-1]), num_classes)}":
                raise ValueError(
                    f"the exit after {name} gives {describe(logits)} for {len(logits)} images of "
                    f"{num_classes} classes"
                )
