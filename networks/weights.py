"""Weights of elsewhere for a network: all of them have to fit, but for the classes.

    the head:        tensors (num_classes, ...) that differ from those given in that number alone
    the early exits: those of a network with exits; all are given, with their shapes, or all stay

Everything else must be there, with its shape.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

OPTIONAL = ("num_batches_tracked", "_extra_state")
"""What a network keeps if it is not given: older files count no batches."""
MAX_NAMED = 3


class LoadedWeights(NamedTuple):
    """What became of the tensors of a network, and of those given; by name."""

    loaded: list[str]
    head: list[str]
    """As they were before, since the classes are others."""
    exits: list[str]
    """Of early exits; as they were before."""
    unused: list[str]
    """Given, and not loaded."""

    def describe(self) -> str:
        """Returns all of it in a line."""
        parts = [f"{len(self.loaded)} tensors loaded"]
        if self.head:
            parts.append(f"new, for another number of classes: {shorten(self.head)}")
        if self.exits:
            parts.append(f"new early exits: {shorten(self.exits)}")
        if self.unused:
            parts.append(f"not used: {shorten(self.unused)}")
        return "; ".join(parts)


def shorten(names: list[str]) -> str:
    """Returns the first names, and how many there are beside them."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def load_weights(network: nn.Module, weights: Mapping[str, Any]) -> LoadedWeights:
    """Loads weights in place, and says which.

    Args:
        network: has an attribute `num_classes`. One with exits may have `trunk_prefix`, which the
            names of a trunk alone lack, and says `in_early_exit`.
        weights: a state dict, of such a network or of its trunk.

    Raises:
        ValueError: they are of another network; names the first tensors that differ. Nothing has
            been changed then.
    """
    own, given = network.state_dict(), dict(weights)
    prefix = getattr(network, "trunk_prefix", "")
    if not any(key.startswith(prefix) for key in given):
        given = {prefix + key: value for key, value in given.items()}
    head = find_head(network.num_classes, own, given)
    missing = {key for key in own if key not in given and key.endswith(OPTIONAL)}
    unlike = [
        key
        for key in [*own, *(key for key in given if key not in own)]
        if key not in head and key not in missing and shape(own, key) != shape(given, key)
    ]
    in_early_exit = getattr(network, "in_early_exit", lambda key: False)
    exits: list[str] = []
    if any(map(in_early_exit, unlike)):
        exits = [key for key in own if in_early_exit(key)]
        unlike = [key for key in unlike if not in_early_exit(key)]
    if unlike:
        shapes = [
            f"{key} is {shape(given, key)} there and {shape(own, key)} here" for key in unlike
        ]
        raise ValueError(
            f"the weights are of another network: {len(unlike)} tensors differ "
            f"({shorten(shapes)}): give those of the same network"
        )
    kept = {*head, *exits}
    loaded = {key: value for key, value in given.items() if key in own and key not in kept}
    network.load_state_dict(loaded, strict=False)
    return LoadedWeights(
        list(loaded),
        [key for key in head if key not in exits],
        exits,
        [key for key in given if key not in loaded],
    )


def find_head(num_classes: int, own: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Returns the tensors that give one number per class, if there are other classes there."""
    counts = {
        key: given[key].shape[0]
        for key, value in own.items()
        if isinstance(value, Tensor) and isinstance(given.get(key), Tensor)
        if 0 < value.ndim == given[key].ndim and value.shape[0] == num_classes
        if value.shape != given[key].shape and value.shape[1:] == given[key].shape[1:]
    }
    return list(counts) if len(set(counts.values())) == 1 else []


def shape(tensors: Mapping[str, Any], key: str) -> str:
    if key not in tensors:
        return "absent"
    value = tensors[key]
    return str(tuple(value.shape)) if isinstance(value, Tensor) else "other state"
