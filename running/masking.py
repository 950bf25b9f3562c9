"""What nobody may read in a run folder or on a server: keys and passwords that a user has given."""

import hashlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import yaml

from endless import is_endless

SECRET = frozenset(
    (
        *("token", "hf_token", "access_token", "auth_token", "api_key", "apikey", "api_keys"),
        *("password", "passwd", "pwd", "passphrase", "secret", "secret_key", "secret_access_key"),
        *("access_key", "access_key_id", "credentials", "api_token", "bearer_token"),
    )
)
"""Whole names of arguments whose texts are masked: a `class_token` is none."""
MASK = re.compile(r"\*\*\* \(sha256 [0-9a-f]{8}\)")
LEAST = 6
"""Characters of a text that is looked for in another; a shorter one is in many by chance."""


def mask(text: str) -> str:
    """Returns what is shown in place of a secret: equal for equal ones, and for its own mask."""
    if MASK.fullmatch(text):
        return text
    return f"*** (sha256 {hashlib.sha256(text.encode(errors='replace')).hexdigest()[:8]})"


def masked(tree: Any, hides: bool = False) -> Any:
    """Returns a configuration in which texts, and lists of them, of secret names are masked."""
    if isinstance(tree, list | tuple):
        return [masked(each, hides) for each in tree]
    if isinstance(tree, Mapping):
        return {key: masked(value, _is_secret(key)) for key, value in tree.items()}
    return mask(tree) if hides and isinstance(tree, str) else tree


def hidden_texts(tree: Any, hides: bool = False) -> Iterator[str]:
    """Yields the texts of a configuration that `masked` masks."""
    if isinstance(tree, list | tuple):
        for each in tree:
            yield from hidden_texts(each, hides)
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from hidden_texts(value, _is_secret(key))
    elif hides and isinstance(tree, str):
        yield tree


def masked_words(args: Sequence[str]) -> list[str]:
    """Returns a command line, as ``--key=value`` or in two words, with its secrets masked.

    Also those in a value that is YAML itself: ``--data.init_args='{"password": ...}'``.
    """
    return [word.option + _masked_value(word) for word in _split(args)]


def hidden_in_words(args: Sequence[str]) -> Iterator[str]:
    """Yields the texts of a command line that `masked_words` masks."""
    for word in _split(args):
        if word.hides:
            yield word.value
        yield from hidden_texts(_parsed(word.value), word.hides)


def without(text: str, hidden: Iterable[str]) -> str:
    """Returns a text in which others, of `LEAST` characters or more, are masked."""
    for secret in sorted(hidden, key=len, reverse=True):
        if len(secret) >= LEAST:
            text = text.replace(secret, mask(secret))
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


class _Word(NamedTuple):
    option: str  # with its "="
    value: str
    hides: bool  # the value is a secret


def _split(args: Sequence[str]) -> Iterator[_Word]:
    hides = False
    for arg in args:
        if not arg.startswith("-"):
            yield _Word("", arg, hides)
            hides = False
            continue
        option, equals, value = arg.partition("=")
        is_secret = _is_secret(option.lstrip("-"))
        yield _Word(option + equals, value, is_secret and bool(equals))
        hides = is_secret and not equals


def _masked_value(word: _Word) -> str:
    if word.hides:
        return mask(word.value)
    content = _parsed(word.value)
    shown = masked(content)
    if shown == content:
        return word.value
    return yaml.safe_dump(shown, default_flow_style=True, width=10**6).strip()


def _parsed(value: str) -> Any:
    """Returns what a word says as YAML; None if it is none."""
    try:
        content = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    return None if is_endless(content) else content


def _is_secret(name: Any) -> bool:
    last = str(name).lower().rstrip("+").rpartition(".")[2]
    return last.replace("-", "_") in SECRET
