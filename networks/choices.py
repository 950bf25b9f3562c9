"""What arguments may be: one of a few words, or numbers of a range.

A parser knows types alone, and Python not even these. NaN passes whatever asks if it is too small.
"""

from collections.abc import Callable, Iterable
from numbers import Integral, Real
from reprlib import repr as shown
from typing import Any, get_args

MANY = 2**20
"""Of channels, classes or pixels: who asks for more has slipped, and would fill any memory."""
MANY_LAYERS = 10_000


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raises ValueError unless a value is one of a `Literal`'s, or of a collection.

    Call it before an `if` over the choices: None and misspelt words would end up in its `else`.
    """
    choices = get_args(choices) or tuple(choices)
    if value not in choices:
        *others, last = map(str, choices)
        raise ValueError(f"{name} is {shown(value)}: give {', '.join(others)} or {last}")


def check_counts(least: int = 1, most: int = MANY, **counts: object) -> None:
    """Raises ValueError unless arguments are whole numbers of a range, or lists of them."""
    what = f"from {least} to {most}"
    for name, value in counts.items():
        _check(name, value, Integral, lambda count: least <= count <= most, "whole number", what)


def check_numbers(interval: str, **numbers: object) -> None:
    """Raises ValueError unless arguments are numbers of an interval, or lists of them.

    Args:
        interval: its ends, and whether they belong to it, as in "(0, 1]" or "[0, inf)".
        numbers: the arguments.
    """
    low, high = map(float, interval[1:-1].split(","))
    ends = {low} if interval[0] == "[" else set()
    ends |= {high} if interval[-1] == "]" else set()
    for name, value in numbers.items():
        _check(name, value, Real, lambda x: low < x < high or x in ends, "number", f"in {interval}")


def layers_of(depth: int, factor: int, others: int, examples: Iterable[int]) -> int:
    """Returns n of a network of ``factor * n + others`` layers.

    Raises:
        ValueError: no network has this depth.
    """
    fits = isinstance(depth, Integral) and others < depth <= MANY_LAYERS
    if not fits or (depth - others) % factor:
        known = ", ".join(map(str, examples))
        raise ValueError(
            f"depth is {shown(depth)}: give {factor}n+{others}, such as {known}, up to "
            f"{MANY_LAYERS:,}"
        )
    return (depth - others) // factor


def _check(
    name: str, value: Any, kind: type, fits: Callable[[Any], bool], noun: str, which: str
) -> None:
    is_list = isinstance(value, list | tuple)
    for each in value if is_list else [value]:
        if isinstance(each, bool) or not isinstance(each, kind) or not fits(each):
            noun = f"{noun}s" if is_list else f"a {noun}"
            value = list(value) if is_list else value
            raise ValueError(f"{name} is {shown(value)}: give {noun} {which}")
