"""What nobody may read in a run folder or on a server: keys and passwords that a user has given."""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

SECRET = re.compile(
    r"(^|[._-])(api_?key|(access|auth|bearer|secret)_?(key|token)|hf_token|token"
    r"|pass(word|wd|phrase)|secret|credentials?)\+?$",
    re.IGNORECASE,
)
"""Names of arguments whose texts are masked."""
MASK = "***"


def masked(tree: Any) -> Any:
    """Returns a configuration in which every text under the name of a secret is masked."""
    if isinstance(tree, list | tuple):
        return [masked(each) for each in tree]
    if not isinstance(tree, Mapping):
        return tree
    return {
        key: MASK if SECRET.search(str(key)) and isinstance(value, str) else masked(value)
        for key, value in tree.items()
    }


def masked_words(args: Sequence[str]) -> list[str]:
    """Returns a command line, as ``--key=value`` or in two words, with its secrets masked."""
    words, hides = [], False
    for arg in args:
        option, equals, _ = arg.partition("=")
        is_option = arg.startswith("-")
        is_secret = is_option and bool(SECRET.search(option.lstrip("-")))
        if hides and not is_option:
            words.append(MASK)
        else:
            words.append(f"{option}={MASK}" if is_secret and equals else arg)
        hides = is_secret and not equals
    return words


def without_secrets(text: str, args: Sequence[str]) -> str:
    """Returns a text in which the secrets of a command line are masked."""
    for arg, shown in zip(args, masked_words(args), strict=True):
        if arg != shown:
            secret = arg if shown == MASK else arg.partition("=")[2]
            text = text.replace(secret, MASK)
    return text


@contextmanager
def masked_command() -> Iterator[None]:
    """Masks the command line for those who ask Python for it, as W&B does."""
    before = sys.argv
    sys.argv = masked_words(before)
    try:
        yield
    finally:
        sys.argv = before
