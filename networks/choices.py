"""Arguments that are one of a few words."""

from typing import Any, get_args


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raises ValueError unless a value is one of a `Literal`'s; the message names them.

    Call it before an `if` over the choices: None and misspelt words would end up in its `else`.
    """
    if value not in get_args(choices):
        *others, last = get_args(choices)
        raise ValueError(f"{name} {value!r} is unknown: use {', '.join(others)} or {last}")
