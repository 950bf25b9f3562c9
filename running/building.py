"""What is told when a class cannot be built from the arguments that a user has given it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

BUILD_ERRORS = (
    *(TypeError, ArithmeticError, AssertionError, AttributeError, ImportError, LookupError),
    NotImplementedError,
)
"""What Python raises of a wrong argument, besides ValueError and OSError."""


@contextmanager
def building(config: Mapping[str, Any]) -> Iterator[None]:
    """Tells in one line of a class that cannot be built, with its arguments.

    Args:
        config: what is built.

    Raises:
        ValueError: in place of what Python raises of a wrong argument.
    """
    try:
        yield
    except BUILD_ERRORS as error:
        what = _innermost(error.__traceback__, dict(_classes("trainer", config)))
        reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise ValueError(f"{what} cannot be built ({reason}): correct its arguments") from error


def _classes(key: str, section: Any) -> Iterator[tuple[str, str]]:
    """Yields by its name each class that a configuration names, with its arguments."""
    if isinstance(section, list):
        for each in section:
            yield from _classes(key, each)
    if not isinstance(section, Mapping):
        return
    if isinstance(section.get("class_path"), str):
        init_args = section.get("init_args") or {}
        plain = {k: v for k, v in init_args.items() if not isinstance(v, Mapping | list)}
        name = section["class_path"].rsplit(".", 1)[-1]
        yield name, f"{section['class_path']}({', '.join(f'{k}={v}' for k, v in plain.items())})"
    for name, value in section.items():
        yield from _classes(name, value)


def _innermost(traceback: TracebackType | None, classes: Mapping[str, str]) -> str:
    """Returns the class whose constructor has failed, of those that were named."""
    what = "what the command names"
    while traceback is not None:
        frame = traceback.tb_frame
        name = type(frame.f_locals.get("self")).__name__
        if frame.f_code.co_name == "__init__":
            what = classes.get(name, "the Trainer" if name == "Trainer" else what)
        traceback = traceback.tb_next
    return what
