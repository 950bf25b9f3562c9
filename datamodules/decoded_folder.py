"""Folders of small images, ``<split>/<class>/<image>``, decoded once into one file."""

import hashlib
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff")


def list_images(folder: Path) -> list[Path]:
    """Returns all image files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


def list_classes(folder: Path) -> list[str]:
    """Returns the names of the subfolders, sorted."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def decode(path: Path) -> Image.Image:
    """Reads an image as RGB.

    Raises:
        ValueError: it cannot be decoded; names the path.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises, by format and kind of damage
        raise ValueError(f"cannot decode the image {path} ({error}): replace or remove it") from error


def read_folder(root: Path, splits: tuple[str, ...]) -> dict:
    """Reads every split of a folder, from the cache beside it if that is up to date.

    The cache ``<root>.decoded.pt`` is written again when the names or sizes of the files have changed. Where it cannot
    be written, a warning says so.

    Returns:
        "class_names", and for each split a pair: images uint8 (N, 3, H, W) and labels int64 (N,).

    Raises:
        FileNotFoundError: a split is missing or has no images.
        ValueError: an image is corrupt, or differs from the others in size; the splits differ in classes.
    """
    listing = {split: list_images(root / split) for split in splits}
    for split, paths in listing.items():
        if not paths:
            raise FileNotFoundError(f"no images in {root / split}/<class>/: put them there")
    fingerprint = _fingerprint(root, listing)
    cache = root.with_name(root.name + ".decoded.pt")
    if cache.exists():
        content = torch.load(cache, weights_only=True)
        if content.pop("fingerprint") == fingerprint:
            return content

    class_names = list_classes(root / splits[0])
    content = {"class_names": class_names}
    for split, paths in listing.items():
        if list_classes(root / split) != class_names:
            raise ValueError(f"{root / split} and {root / splits[0]} have different classes: make them equal")
        labels = [class_names.index(path.relative_to(root / split).parts[0]) for path in paths]
        content[split] = (_decode_all(paths), torch.tensor(labels))
    _save(content | {"fingerprint": fingerprint}, cache)
    return content


def _fingerprint(root: Path, listing: dict[str, list[Path]]) -> str:
    digest = hashlib.blake2b()
    for paths in listing.values():
        for path in paths:
            digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
    return digest.hexdigest()


def _decode_all(paths: list[Path]) -> Tensor:
    """Decodes images of one size to (N, 3, H, W). One thread: for small images more are slower (GIL)."""
    first = np.asarray(decode(paths[0]))
    pixels = np.empty((len(paths), *first.shape), dtype=np.uint8)
    for row, path in zip(pixels, paths, strict=True):
        image = np.asarray(decode(path))
        if image.shape != first.shape:
            raise ValueError(
                f"{path} has (height, width, channels) {image.shape} and {paths[0]} has {first.shape}: "
                f"bring them to one size, or use ImageFolderDataModule"
            )
        row[:] = image
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _save(content: dict, cache: Path) -> None:
    """Writes to a temporary file first: the cache is complete or not there."""
    try:
        handle, temporary = tempfile.mkstemp(dir=cache.parent, prefix=cache.name)
    except OSError as error:
        warnings.warn(f"decoded images are kept in memory only, {cache} is not writable: {error}", stacklevel=2)
        return
    os.close(handle)
    try:
        torch.save(content, temporary)
        os.replace(temporary, cache)
    except OSError as error:
        os.unlink(temporary)
        warnings.warn(f"decoded images are kept in memory only, {cache} is not writable: {error}", stacklevel=2)
