"""Folders of small images, ``<split>/<class>/<image>``, decoded once into one file."""

import hashlib
import os
import platform
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from archive import is_intact
from datamodules.image_files import decode, list_classes, list_labelled, readable


def read_folder(root: Path, splits: tuple[str, ...]) -> dict:
    """Reads every split of a folder, from the cache beside it if that is up to date.

    The cache ``<root>.decoded.pt`` is written again when the names, sizes or modification times of
    the files have changed (also in a copy with new times). Where it cannot be written, a warning
    says so.

    Returns:
        "class_names", and for each split a pair: images uint8 (N, 3, H, W) and labels int64 (N,).

    Raises:
        FileNotFoundError: a split is missing or has no images.
        ValueError: an image is corrupt, or differs from the others in size; the splits differ in
            classes.
    """
    class_names = list_classes(root / splits[0])
    listing = {split: list_labelled(root / split, class_names) for split in splits}
    fingerprint = _fingerprint(root, listing)
    cache = root.with_name(root.name + ".decoded.pt")
    content = _load(cache, fingerprint)
    if content is not None:
        return content

    content = {"class_names": [readable(name) for name in class_names]}
    for split, samples in listing.items():
        paths, labels = zip(*samples, strict=True)
        content[split] = (_decode_all(paths), torch.tensor(labels))
    _save(content | {"fingerprint": fingerprint}, cache)
    return content


def _fingerprint(root: Path, listing: dict[str, list[tuple[str, int]]]) -> str:
    digest = hashlib.blake2b()
    for samples in listing.values():
        for path, _ in samples:
            status = os.stat(path)
            digest.update(os.fsencode(os.path.relpath(path, root)))
            digest.update(f" {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _decode_all(paths: Sequence[str]) -> Tensor:
    """Decodes images of one size to (N, 3, H, W), in one thread: more are slower (GIL)."""
    first = np.asarray(decode(paths[0]))
    pixels = np.empty((len(paths), *first.shape), dtype=np.uint8)
    for row, path in zip(pixels, paths, strict=True):
        image = np.asarray(decode(path))
        if image.shape != first.shape:
            raise ValueError(
                f"{path} has (height, width, channels) {image.shape}, but {paths[0]} has "
                f"{first.shape}: bring them to one size, or use ImageFolderDataModule"
            )
        row[:] = image
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _load(cache: Path, fingerprint: str) -> dict | None:
    """Returns the content of the cache, or None if it is missing, damaged or out of date."""
    if not cache.is_file() or not is_intact(cache):  # a pipe would be waited for
        return None
    try:
        content = torch.load(cache, weights_only=True)
    except Exception:  # what torch raises depends on where the file stops making sense
        return None
    is_ours = isinstance(content, dict) and content.pop("fingerprint", None) == fingerprint
    return content if is_ours and "class_names" in content else None


def _save(content: dict, cache: Path) -> None:
    """Writes to a file of this process first: the cache is complete or not there."""
    temporary = cache.with_name(f"{cache.name}.{platform.node()}.{os.getpid()}")
    try:
        torch.save(content, temporary)
        temporary.replace(cache)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        warnings.warn(
            f"cannot write {cache} ({error}): images are decoded anew in every run", stacklevel=2
        )
