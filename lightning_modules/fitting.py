"""Whether data and checkpoints fit a network."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def check_data(
    net: nn.Module, num_classes: int | None, image_shape: tuple[int, int, int] | None
) -> None:
    """Raises ValueError if the data, as far as it is known, is none for this network.

    Args:
        net: the network.
        num_classes: of the data.
        image_shape: (C, H, W) of the data.
    """
    if num_classes is not None and num_classes != net.num_classes:
        raise ValueError(
            f"the network has {net.num_classes} classes and the data {num_classes}: "
            f"set the network's num_classes to {num_classes}"
        )
    if image_shape is None:
        return
    channels, height, width = image_shape
    first = next((m for m in net.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and first.in_channels != channels:
        raise ValueError(
            f"the network takes {first.in_channels} channels and the images have {channels}: "
            f"set the network's in_channels to {channels}"
        )
    size = getattr(net, "image_size", None)
    if size and (height, width) != (size, size):
        raise ValueError(
            f"the network takes images of {size} x {size} pixels and the data has {height} x "
            f"{width}: set the network's image_size"
        )


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
