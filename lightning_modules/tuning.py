"""Where a training starts from, and what of a network it changes, and how fast."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


@dataclass(frozen=True)
class Tuning:
    """How a training treats the parts of its network; by default all alike, from random weights.

    Parts are named as `net.named_modules()` and `net.named_parameters()` name them, or by patterns
    of such names ("layer1.*"); a module stands for all that is in it.

    Args:
        weights: what a fit starts from, with all tensors but those of another number of classes:
            a file of torch or safetensors; on the command line also a run folder (its selected
            checkpoint), or a name of torchvision's ("ResNet50_Weights.IMAGENET1K_V2"). A run that
            goes on does not read it again.
        freeze: parts that keep their weights. Their modules stay in evaluation mode, so that BN
            normalises by the statistics that it has, and keeps them.
        lr_factors: by part, what the optimizer's learning rate is multiplied by; that of a part
            within another decides.
        decay_norm_and_bias: whether the optimizer's weight decay applies to biases and to other
            parameters of one dimension, as those of BN are; None: as in the method's paper.

    Raises:
        ValueError: a factor that is not above 0.
    """

    weights: str | None = None
    freeze: list[str] | None = None
    lr_factors: dict[str, float] | None = None
    decay_norm_and_bias: bool | None = None

    def __post_init__(self) -> None:
        for pattern, factor in (self.lr_factors or {}).items():
            if not 0 < factor < math.inf:
                remedy = ", or name it in tuning.freeze" if factor == 0 else ""
                raise ValueError(
                    f"tuning.lr_factors of {pattern} is {factor}: give a number above 0{remedy}"
                )


PLAIN = Tuning()


def covers(pattern: str, name: str) -> bool:
    """Tells whether a pattern matches a name, or that of a module around it."""
    around = accumulate(name.split("."), lambda path, part: f"{path}.{part}")
    return any(fnmatchcase(each, pattern) for each in around)


def check_patterns(net: nn.Module, patterns: Iterable[str], argument: str) -> None:
    """Raises ValueError if a pattern matches no part of a network; names the most alike."""
    names = [name for name, _ in (*net.named_modules(), *net.named_parameters()) if name]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            alike = difflib.get_close_matches(pattern, names, 3, cutoff=0)
            raise ValueError(
                f"tuning.{argument} names {pattern!r}, which no part of {type(net).__name__} is "
                f"called: use {', '.join(alike)}"
            )


def freeze(net: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Freezes parameters, and returns the names of the modules that are to stay in evaluation mode.

    These are the modules covered by a pattern, and those all of whose parameters are.

    Raises:
        ValueError: a pattern matches nothing.
    """
    check_patterns(net, patterns, "freeze")

    def is_frozen(name: str) -> bool:
        return any(covers(pattern, name) for pattern in patterns)

    for name, parameter in net.named_parameters(remove_duplicate=False):
        if is_frozen(name):
            parameter.requires_grad_(False)
    frozen = set()
    for name, module in net.named_modules(remove_duplicate=False):
        inside = [f"{name}.{each}" for each, _ in module.named_parameters()]
        if name and (is_frozen(name) or (inside and all(map(is_frozen, inside)))):
            frozen.add(name)
    return frozen


def parameter_groups(
    net: nn.Module, lr_factors: Mapping[str, float], spared: set[nn.Parameter]
) -> list[dict[str, Any]]:
    """Returns the parameters that are not frozen, as torch's optimizers take them.

    Args:
        net: the network.
        lr_factors: by pattern; a group has its own, unless that is 1, as "lr_factor" (see
            `scale_rates`).
        spared: parameters without weight decay.

    Raises:
        ValueError: everything is frozen, a pattern matches nothing, or two that cover the same
            number of parameters want different factors for one.
    """
    check_patterns(net, lr_factors, "lr_factors")
    names = [name for name, _ in net.named_parameters()]
    sizes = {pattern: sum(covers(pattern, name) for name in names) for pattern in lr_factors}
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            key = parameter in spared, factor_of(name, lr_factors, sizes)
            groups.setdefault(key, []).append(parameter)
    if not groups:
        raise ValueError("every part of the network is frozen: leave one out of tuning.freeze")
    return [
        {"params": parameters}
        | ({"weight_decay": 0.0} if is_spared else {})
        | ({} if factor == 1 else {"lr_factor": factor})
        for (is_spared, factor), parameters in sorted(groups.items(), key=lambda each: each[0][0])
    ]


def factor_of(name: str, lr_factors: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    """Returns the factor of the pattern that covers a parameter and the fewest others."""
    covering = sorted((p for p in lr_factors if covers(p, name)), key=sizes.__getitem__)
    if not covering:
        return 1.0
    first, *others = (p for p in covering if sizes[p] == sizes[covering[0]])
    for other in others:
        if lr_factors[other] != lr_factors[first]:
            raise ValueError(
                f"tuning.lr_factors {first!r} and {other!r} give {name} two factors: drop one"
            )
    return lr_factors[first]


def scale_rates(optimizer: Optimizer) -> list[float]:
    """Multiplies the rate of each group by its "lr_factor", and returns these factors.

    torch would keep such a key and do nothing.
    """
    factors = [group.pop("lr_factor", 1.0) for group in optimizer.param_groups]
    for group, factor in zip(optimizer.param_groups, factors, strict=True):
        group["lr"] = group["lr"] * factor
    return factors


def check_ratios(scheduler: LRScheduler, factors: Sequence[float]) -> None:
    """Raises ValueError if a schedule gives groups other rates than their factors say."""
    if len(set(factors)) == 1:
        return
    name = type(scheduler).__name__
    groups = scheduler.optimizer.param_groups
    rates = [group["lr"] / factor for group, factor in zip(groups, factors, strict=True)]
    if any(not math.isclose(rate, rates[0], rel_tol=1e-6, abs_tol=1e-12) for rate in rates):
        raise ValueError(
            f"{name} sets the same rate everywhere, whatever tuning.lr_factors say: use another "
            "lr_scheduler, or drop them"
        )
    if getattr(scheduler, "eta_min", 0) != 0:
        raise ValueError(
            f"eta_min of {name} is the same everywhere, whatever tuning.lr_factors say: set it to 0"
        )


def norms_and_biases(net: nn.Module) -> set[nn.Parameter]:
    """Returns the parameters of one dimension, which norms and biases have, as timm does."""
    return {
        each for name, each in net.named_parameters() if each.ndim < 2 or name.endswith(".bias")
    }
