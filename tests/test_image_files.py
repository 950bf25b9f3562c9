"""Every image of a folder once, each pixel as it is stored; what cannot be read is named."""

import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.decoded_folder import read_folder
from datamodules.image_files import decode, list_all, list_classes, list_labelled

STORED = np.array([[0, 16384, 32768, 49152, 65280, 65535]], np.uint16)
SHOWN = [0, 64, 128, 192, 255, 255]


def write_png_16(path: Path, pixels: np.ndarray, colour_type: int) -> None:
    """Writes (H, W, C) of 16 bits; Pillow itself writes no such colours."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks))


@pytest.mark.parametrize(
    ("name", "dtype"), [("a.png", "<u2"), ("a.pgm", "<u2"), ("a.tif", "<u2"), ("a.tif", ">u2")]
)
def test_grey_of_16_bits_keeps_its_upper_8(tmp_path, name, dtype):
    Image.fromarray(STORED.astype(dtype)).save(tmp_path / name)
    assert np.asarray(decode(str(tmp_path / name)))[0].tolist() == [[x] * 3 for x in SHOWN]


@pytest.mark.parametrize(("colour_type", "alpha"), [(2, False), (6, True)])
def test_colours_of_16_bits_keep_their_upper_8(tmp_path, colour_type, alpha):
    channels = [STORED, STORED[:, ::-1], STORED] + [np.full_like(STORED, 77)] * alpha
    write_png_16(tmp_path / "a.png", np.stack(channels, -1), colour_type)
    shown = np.asarray(decode(str(tmp_path / "a.png")))[0]
    assert shown.tolist() == [list(pixel) for pixel in zip(SHOWN, SHOWN[::-1], SHOWN, strict=True)]


def test_pixels_of_another_range_than_16_bits_are_refused(tmp_path):
    """Numbers of 32 bits from 0 to 255 may be meant as they are, or as parts of a larger range."""
    path = tmp_path / "a.tif"
    for pixel in (255, 65535, 65536, -1):
        Image.fromarray(np.array([[0, pixel]], np.int32)).save(path)
        with pytest.raises(ValueError, match=r"the image .*a\.tif \(its pixels, from .*not of 16"):
            decode(str(path))
    Image.fromarray(np.array([[0.0, 1.0]], np.float32)).save(path)
    with pytest.raises(ValueError, match=r"the image .*a\.tif \(its pixels are floats, whose"):
        decode(str(path))


def test_a_tiff_of_12_bits_is_refused(tmp_path):
    entries = [(256, 4, 1, 2), (257, 4, 1, 1), (258, 3, 1, 12), (259, 3, 1, 1), (262, 3, 1, 1)]
    entries += [(273, 4, 1, 200), (277, 3, 1, 1), (278, 4, 1, 1), (279, 4, 1, 3)]
    table = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *x) for x in entries)
    content = b"II*\0" + struct.pack("<I", 8) + table + struct.pack("<I", 0)
    (tmp_path / "a.tif").write_bytes(content.ljust(200, b"\0") + b"\xff\xf0\x80")
    with pytest.raises(ValueError, match=r"a\.tif \(its pixels, from .* to .* are not of 16 bits"):
        decode(str(tmp_path / "a.tif"))


def test_other_modes_are_shown_in_their_colours(tmp_path, recwarn):
    def shown(name: str, image: Image.Image, **how) -> list:
        image.save(tmp_path / name, **how)
        return np.asarray(decode(str(tmp_path / name)))[0].tolist()

    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert shown("p.png", palette) == [[10, 20, 30], [40, 50, 60]]
    assert shown("p.png", palette, transparency=b"\x00\x80") == [[10, 20, 30], [40, 50, 60]]
    bits = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    assert shown("1.png", bits) == shown("1.tif", bits) == [[0] * 3, [255] * 3]
    assert shown("la.png", Image.new("LA", (1, 1), (9, 0))) == [[9, 9, 9]]
    assert shown("rgba.png", Image.new("RGBA", (1, 1), (9, 8, 7, 0))) == [[9, 8, 7]]
    assert shown("cmyk.tif", Image.new("CMYK", (1, 1), (255, 0, 0, 0))) == [[0, 255, 255]]
    assert not recwarn.list


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [63, 31])  # Pillow warns above the limit, raises above twice it
def test_a_decompression_bomb_is_named_in_one_line(tmp_path, monkeypatch, limit):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    decode(str(tmp_path / "a.png"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(
        ValueError, match=r"^cannot decode the image .*a\.png \(.*(8x8|64) pixels"
    ) as caught:
        decode(str(tmp_path / "a.png"))
    assert "\n" not in str(caught.value)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of two images each."""
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / "train" / name / f"{i}.png")
    return tmp_path / "train"


def test_images_are_listed_by_class_folder_and_name(folder):
    for name in ("b/c.png", "b-a/d.PNG", "b/notes.txt"):
        (folder / "cat" / name).parent.mkdir(exist_ok=True)
        (folder / "cat" / name).write_bytes(b"")
    cats = [f"{folder}/cat/{name}" for name in ("0.png", "1.png", "b/c.png", "b-a/d.PNG")]
    dogs = [f"{folder}/dog/{name}" for name in ("0.png", "1.png")]
    listed = [(path, 0) for path in cats] + [(path, 1) for path in dogs]
    assert list_labelled(folder, ["cat", "dog"]) == listed
    assert list_all(folder) == sorted(cats + dogs)


@pytest.mark.parametrize("target", [".", "..", "../dog"])
def test_a_link_to_images_that_count_already_is_named(folder, target):
    link = folder / "dog" / "again"
    link.symlink_to(target)
    if target == "../dog":
        link = link.rename(folder / "cat" / "again")
    for listed in (lambda: list_labelled(folder, ["cat", "dog"]), lambda: list_all(folder)):
        with pytest.raises(ValueError, match=r"/again.* are one folder: remove the link,"):
            listed()


def test_links_to_other_folders_are_followed(folder):
    (folder / "cat").rename(folder.parent / "elsewhere")
    (folder / "cat").symlink_to("../elsewhere")
    assert len(list_labelled(folder, ["cat", "dog"])) == len(list_all(folder)) == 4
    assert list_labelled(folder, ["cat", "dog"])[0] == (f"{folder}/cat/0.png", 0)


def test_what_is_hidden_is_no_class_and_no_image(folder):
    before = list_labelled(folder, ["cat", "dog"])
    for name in (".ipynb_checkpoints/0.png", "cat/.ipynb_checkpoints/0.png", "dog/._0.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no image")
    assert list_classes(folder) == ["cat", "dog"]
    assert list_labelled(folder, ["cat", "dog"]) == before
    assert list_all(folder) == [path for path, _ in before]


def test_a_folder_that_may_not_be_read_is_not_passed_over(folder, monkeypatch):
    (folder / "cat" / "closed").mkdir()
    scandir = os.scandir

    def as_no_root(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", as_no_root)
    with pytest.raises(PermissionError, match="closed"):
        list_labelled(folder, ["cat", "dog"])


def test_the_cache_follows_a_file_that_was_replaced_by_one_of_its_size(folder):
    path = folder / "dog" / "1.png"
    before = path.stat()
    read_folder(folder.parent, ("train",))
    Image.new("RGB", (4, 4), (9, 0, 0)).save(path)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns + 1))  # a file system's clock ticks
    images, _ = read_folder(folder.parent, ("train",))["train"]
    assert images[:, 0, 0, 0].tolist() == [0, 1, 0, 9]


def test_a_decoded_folder_shows_16_bits_and_names_what_is_none(folder):
    for path in folder.rglob("*.png"):
        Image.fromarray(STORED).save(path)
    images, _ = read_folder(folder.parent, ("train",))["train"]
    assert images[3, 0, 0].tolist() == SHOWN
    Image.fromarray(STORED.astype(np.float32)).save(folder / "dog" / "x.tif")
    with pytest.raises(ValueError, match=r"dog/x\.tif \(its pixels are floats"):
        read_folder(folder.parent, ("train",))


def test_a_name_that_is_no_utf8_is_read(folder):
    odd = os.fsencode(folder / "dog") + b"/caf\xe9.png"
    try:
        os.rename(folder / "dog" / "1.png", odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    assert len(read_folder(folder.parent, ("train",))["train"][1]) == 4
    Path(os.fsdecode(odd)).write_bytes(b"no image")
    with pytest.raises(ValueError, match=re.escape(os.fsdecode(b"caf\xe9.png"))):
        read_folder(folder.parent, ("train",))
