"""Whether methods, data and checkpoints fit a network."""

import copy
from collections.abc import Mapping
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from networks import (
    MultiExitNetwork,
    ResidualNetwork,
    Slimmable,
    SlimmableWithExits,
    on_meta,
)


def check_network(net: nn.Module, method: type) -> None:
    """Raises ValueError if a method does not train such a network; names one that does.

    Args:
        net: the network.
        method: a LightningModule. What it trains is the type of its argument `net`; one that takes
            plain logits says so by an attribute `takes_logits`.
    """
    try:
        needed = get_type_hints(method.__init__).get("net", nn.Module)
    except NameError:  # of an annotation for type checkers alone
        return
    others: tuple[type, ...] = ()
    if getattr(method, "takes_logits", False):
        others = (MultiExitNetwork, Slimmable)
    elif needed is not nn.Module and not issubclass(needed, Slimmable):
        others = (Slimmable,)
    if isinstance(net, needed) and not isinstance(net, others):
        return
    fitting = "LitResNet"
    if isinstance(net, SlimmableWithExits):
        fitting = "LitSlimmableExits"
    elif isinstance(net, MultiExitNetwork):
        fitting = "LitBranchyNet or LitMSDNet"
    elif isinstance(net, Slimmable):
        fitting = "LitSlimmable" if net.width_mults else "LitUniversallySlimmable"
    elif isinstance(net, ResidualNetwork):
        fitting = "LitResNet or LitStochasticDepth"
    raise ValueError(
        f"{method.__name__} does not train a {type(net).__name__}: give another network, or use "
        f"{fitting}"
    )


def check_data(
    net: nn.Module, num_classes: int | None, image_shape: tuple[int, int, int] | None
) -> None:
    """Raises ValueError if the data, as far as it is known, does not fit this network.

    Args:
        net: the network.
        num_classes: of the data.
        image_shape: (C, H, W) of the data.
    """
    name = type(net).__name__
    known = getattr(net, "num_classes", None)
    if known is None:
        raise ValueError(f"{name} has no num_classes: give it that attribute, or another network")
    if num_classes is not None and num_classes != known:
        raise ValueError(
            f"the network has {known} classes and the data {num_classes}: "
            f"set the network's num_classes to {num_classes}"
        )
    if image_shape is None:
        return
    channels, height, width = image_shape
    first = next((m for m in net.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and first.in_channels != channels:
        remedy = (
            ", or an image folder's grey to true" if (first.in_channels, channels) == (1, 3) else ""
        )
        raise ValueError(
            f"the network takes {first.in_channels} channels and the images have {channels}: "
            f"set the network's in_channels to {channels}{remedy}"
        )
    size = getattr(net, "image_size", None)
    if size and (height, width) != (size, size):
        raise ValueError(
            f"the network takes images of {size} x {size} pixels and the data has {height} x "
            f"{width}: set the network's image_size"
        )
    try:
        try_out(net, image_shape)
    except Exception as error:  # whatever a network makes of a size
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{name} does not run on images of {channels} x {height} x {width}: {reason}"
        ) from error


def try_out(net: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """Runs a copy of a network, if it can be copied, on two images; without numbers if it can.

    Raises:
        Exception: whatever the network raises of such images.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            on_meta(net, training=True)(torch.empty(2, *image_shape, device="meta"))
            return
        except Exception:  # of the network, or of a layer that needs numbers: with them, below
            pass
        try:
            copied = copy.deepcopy(net).cpu().train()
        except Exception:  # what cannot be copied is tried by the first step
            return
        copied(torch.zeros(2, *image_shape))


def check_same_network(own: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises ValueError if a state dict is of another network than `own`; names a difference."""
    unlike = [
        f"{key} is {_shape(given.get(key))} there and {_shape(own.get(key))} here"
        for key in [*own, *(key for key in given if key not in own)]
        if _shape(given.get(key)) != _shape(own.get(key))
    ]
    if unlike:
        raise ValueError(
            f"the checkpoint is of another network: {len(unlike)} tensors differ "
            f"({unlike[0]}): use the YAML it was trained with, or another run folder"
        )


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    return "absent" if value is None else "other state"
