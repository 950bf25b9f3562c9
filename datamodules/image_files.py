"""Finding and decoding image files.

Links to folders are followed, but no folder may be reached twice: its images would count twice, or
forever. What is hidden (".ipynb_checkpoints", "._cat.jpg") is no class and no image.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

TIFF_BITS_PER_SAMPLE = 258  # the number of that tag

Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a part of an image, in pixels."""


def list_classes(folder: Path) -> list[str]:
    """Returns the names of the subfolders, sorted.

    Raises:
        FileNotFoundError: there is none.
    """
    found = os.scandir(folder) if folder.is_dir() else []
    names = sorted(entry.name for entry in found if entry.is_dir() and not _is_hidden(entry.name))
    if not names:
        raise FileNotFoundError(
            f"no images found: looked for {folder}/<class>/*.jpg and the like; put one folder per "
            f"class there"
        )
    return names


def list_labelled(folder: Path, class_names: list[str]) -> list[tuple[str, int]]:
    """Returns path and label of every image in ``folder/<class>/**``, sorted by class and path.

    Raises:
        FileNotFoundError: a class has no images.
        ValueError: the classes are not `class_names`, or two paths lead to one folder.
    """
    found = list_classes(folder)
    if found != class_names:
        odd = sorted(set(found) ^ set(class_names))
        raise ValueError(
            f"{folder} and the training images differ in the classes {', '.join(odd[:5])}: make "
            f"them equal"
        )
    seen = {os.path.realpath(folder): str(folder)}
    by_class = [_list_images(folder / name, seen) for name in class_names]
    empty = [name for name, paths in zip(class_names, by_class, strict=True) if not paths]
    if empty:
        raise FileNotFoundError(
            f"{folder} has no images for the classes {', '.join(empty[:5])}: looked for files that "
            f"end in {', '.join(IMG_EXTENSIONS)}"
        )
    return [(path, label) for label, paths in enumerate(by_class) for path in paths]


def list_all(folder: Path) -> list[str]:
    """Returns the path of every image below a folder, sorted.

    Raises:
        FileNotFoundError: there is none.
        ValueError: two paths lead to one folder.
    """
    paths = sorted(_list_images(folder, {})) if folder.is_dir() else []
    if not paths:
        raise FileNotFoundError(f"no images found: looked for {folder}/**/*.jpg and the like")
    return paths


def _list_images(folder: Path, seen: dict[str, str]) -> list[str]:
    """Returns the path of every image below a folder, sorted by folder, then by name.

    Args:
        seen: where each real folder was reached; those below this one are added.
    """
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_fail):
        first = seen.setdefault(os.path.realpath(parent), parent)
        if first != parent:
            raise ValueError(
                f"{first} and {parent} are one folder: remove the link, as no image may count twice"
            )
        folders[:] = [name for name in folders if not _is_hidden(name)]
        found += [
            (parent, name)
            for name in names
            if name.lower().endswith(IMG_EXTENSIONS) and not _is_hidden(name)
        ]
    return [os.path.join(parent, name) for parent, name in sorted(found)]


def readable(path: bytes | str) -> str:
    """Returns a path for people; bytes that are no UTF-8 are escaped."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _fail(error: OSError) -> NoReturn:
    """Without it, os.walk passes over a folder that it may not read."""
    raise error


@contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """Opens an image, of which the head is read at once and the pixels when they are asked for.

    Raises:
        ValueError: what is done with it fails, or it has more pixels than Pillow takes for
            harmless; names the path.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # Pillow would wait for what a pipe brings
            raise ValueError("it is no file")
        with Image.open(path) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit and image.width * image.height > limit:
                raise ValueError(f"its {image.width}x{image.height} pixels are more than {limit}")
            yield image
    except Exception as error:  # what Pillow raises differs with the damage
        reason = str(error).replace(f" {path!r}", "")
        raise ValueError(
            f"cannot decode the image {path} ({reason}): replace or remove it"
        ) from error


def decode(path: str) -> Image.Image:
    """Reads an image as RGB of 8 bits, see `to_rgb`.

    Raises:
        ValueError: it cannot be decoded; names the path.
    """
    with opened(path) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns the pixels of an opened image as RGB of 8 bits.

    Of 16 bits per channel the upper 8 are kept. Palettes, grey, black and white, CMYK and the like
    become what Pillow converts them to. Alpha is dropped: a transparent pixel shows the colour that
    is stored in it.

    Raises:
        ValueError: it cannot become 8 bits without guessing its range.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floats, whose range is not known")
    if image.mode.startswith("I"):  # Pillow would clip everything above 255 to white
        bits = getattr(image, "tag_v2", {}).get(TIFF_BITS_PER_SAMPLE, (16,))
        pixels = np.asarray(image)
        low, high = pixels.min(), pixels.max()
        if bits[0] != 16 or low < 0 or high > 65535:
            raise ValueError(f"its pixels, from {low} to {high}, are not of 16 bits")
        image = Image.fromarray((pixels >> 8).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")  # which Pillow advises in a warning, for each image anew
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")  # which copies, needed or not


def as_tensor(image: Image.Image) -> Tensor:
    """Returns a copy of the pixels, as Pillow stores them: (H, W, C), or (H, W) of grey."""
    return torch.from_numpy(np.array(image))


def resized(image: Image.Image, box: Box, size: int) -> Image.Image:
    """Returns a part of an opened image as RGB of (size, size), bilinear with antialiasing.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size, which is cheaper, where the part then still
    has `size` pixels or more in both directions.
    """
    left, top, right, bottom = box
    width, height = image.size
    shortest = min(right - left, bottom - top)
    wanted = next((n for n in (8, 4, 2) if shortest >= n * size), 1)
    draft = image.draft(None, (width // wanted, height // wanted))  # None if it is no JPEG
    reduction = width / draft[1][2] if draft else 1.0
    part = tuple(side / reduction for side in box)
    return to_rgb(image).resize((size, size), Image.Resampling.BILINEAR, box=part)
