"""Finding and decoding image files."""

import os
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, has_file_allowed_extension
from torchvision.datasets.folder import make_dataset as _make_dataset


def list_classes(folder: Path) -> list[str]:
    """Returns the names of the subfolders, sorted.

    Raises:
        FileNotFoundError: there is none.
    """
    try:
        return find_classes(folder)[0]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no images found: looked for {folder}/<class>/*.jpg and the like; put one folder per "
            f"class there"
        ) from error


def list_labelled(folder: Path, class_names: list[str]) -> list[tuple[str, int]]:
    """Returns path and label of every image in ``folder/<class>/**``, sorted by class and path.

    Raises:
        FileNotFoundError: a class has no images.
        ValueError: the classes are not `class_names`.
    """
    found = list_classes(folder)
    if found != class_names:
        odd = sorted(set(found) ^ set(class_names))
        raise ValueError(
            f"{folder} and the training images differ in the classes {', '.join(odd[:5])}: make "
            f"them equal"
        )
    try:
        return _make_dataset(
            folder, {name: i for i, name in enumerate(class_names)}, IMG_EXTENSIONS
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder}: {error}") from error


def list_all(folder: Path) -> list[str]:
    """Returns the path of every image below a folder, sorted.

    Raises:
        FileNotFoundError: there is none.
    """
    paths = sorted(
        os.path.join(parent, name)
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if has_file_allowed_extension(name, IMG_EXTENSIONS)
    )
    if not paths:
        raise FileNotFoundError(f"no images found: looked for {folder}/**/*.jpg and the like")
    return paths


def decode(path: str) -> Image.Image:
    """Reads an image as RGB.

    Raises:
        ValueError: it cannot be decoded; names the path.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (
        OSError,
        SyntaxError,
        ValueError,
    ) as error:  # what Pillow raises differs with the damage
        reason = str(error).replace(f" {path!r}", "")
        raise ValueError(
            f"cannot decode the image {path} ({reason}): replace or remove it"
        ) from error
