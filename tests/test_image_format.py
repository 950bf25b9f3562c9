"""Images of any kind become what evaluation made of those of the data set."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

from datamodules import DigitsDataModule, ImageFolderDataModule, ImageFormat, prepare_images
from datamodules.image_colour import ColourTransform


def image_format(channels: int = 3, height: int = 32, width: int = 32, **more) -> ImageFormat:
    shape = (channels, height, width)
    scale, shift = torch.full((channels, 1, 1), 0.5), torch.ones(shape)
    defaults = {"class_names": None, "is_cropped": False}
    return ImageFormat("SomeData", shape, scale, shift, **(defaults | more))


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)


def pixels(array: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.permute(2, 0, 1) if tensor.ndim == 3 else tensor[None]


def test_an_image_of_the_shape_is_taken_as_it_is() -> None:
    for channels in (1, 3):
        array = picture(24, 40, channels)
        form = image_format(channels, 24, 40)
        assert form.fits(Image.fromarray(array))
        assert torch.equal(form.prepare(Image.fromarray(array)), pixels(array))


def test_what_is_wider_or_higher_is_cut_at_the_centre() -> None:
    array = picture(32, 64)
    form = image_format()
    assert not form.fits(Image.fromarray(array))
    assert torch.equal(form.prepare(Image.fromarray(array)), pixels(array)[:, :, 16:48])
    upright = np.ascontiguousarray(array.swapaxes(0, 1))
    assert torch.equal(form.prepare(Image.fromarray(upright)), pixels(upright)[:, 16:48])


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 160), (8, 8), (16, 12)])
def test_another_size_is_resized_until_it_covers(height: int, width: int) -> None:
    """The largest square around the centre, as Pillow resizes a box."""
    image = Image.fromarray(picture(height, width))
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    expected = image.resize((32, 32), Image.Resampling.BILINEAR, box)
    assert torch.equal(image_format().prepare(image), pixels(np.array(expected)))
    if height == width:
        assert torch.equal(
            image_format().prepare(image), functional.pil_to_tensor(functional.resize(image, 32))
        )


def test_cropped_images_are_those_of_the_image_folder(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
    paths = []
    for number, (size, mode) in enumerate(
        [((50, 90), "RGB"), ((90, 50), "L"), ((20, 20), "RGBA"), ((33, 41), "P"), ((32, 32), "1")]
    ):
        image = Image.fromarray(picture(*size)).convert(mode)
        image.save(tmp_path / f"train/{'ab'[number % 2]}/{number}.png")
        paths.append(tmp_path / f"val/{'ab'[number % 2]}/{number}.png")
        image.save(paths[-1])
    data = ImageFolderDataModule(
        str(tmp_path), image_size=32, num_workers=0, batch_size=1, eval_batch_size=9
    )
    data.setup("test")
    (batch,) = data.test_dataloader()
    form = data.image_format
    assert form.is_cropped
    assert form.class_names == ["a", "b"]
    with warnings.catch_warnings(action="error"):
        prepared = prepare_images(sorted(paths), form)
    assert torch.equal(prepared, batch[0])
    assert torch.equal(form.normalize(prepared), data.on_after_batch_transfer(batch, 0)[0])


def test_a_digit_of_the_files_is_enlarged_as_the_data_set_is() -> None:
    data = DigitsDataModule()
    data.setup("test")
    (batch,) = data.test_dataloader()
    form = ImageFormat.from_checkpoint(data.image_format.to_checkpoint())
    small = [Image.fromarray(image[0, ::4, ::4].numpy()) for image in batch[0]]
    with warnings.catch_warnings(action="error"):
        assert torch.equal(prepare_images(small, form), batch[0])
    assert torch.equal(form.normalize(batch[0]), data.on_after_batch_transfer(batch, 0)[0])


def test_colours() -> None:
    """Grey becomes colour without loss and back; colours become Pillow's L."""
    grey, colour = picture(32, 32, 1), picture(32, 32)
    assert torch.equal(
        image_format(3).prepare(Image.fromarray(grey)), pixels(grey).expand(3, 32, 32)
    )
    assert torch.equal(image_format(1).prepare(Image.fromarray(grey)), pixels(grey))
    expected = pixels(np.array(Image.fromarray(colour).convert("L")))
    assert torch.equal(image_format(1).prepare(Image.fromarray(colour)), expected)
    alpha = Image.fromarray(np.dstack([colour, grey]))
    assert torch.equal(image_format(3).prepare(alpha), pixels(colour))


def test_of_16_bits_the_upper_8_are_kept() -> None:
    deep = (picture(32, 32, 1).astype(np.uint16) << 8) + 255
    prepared = image_format(1).prepare(Image.fromarray(deep))
    assert torch.equal(prepared, pixels(picture(32, 32, 1)))


def test_other_sizes_are_told_once() -> None:
    images = [Image.new("RGB", size) for size in ((32, 32), (28, 28), (99, 40))]
    with pytest.warns(UserWarning, match="2 of 3 images are not of 32 x 32 pixels, as") as told:
        prepare_images(images, image_format())
    assert len(told) == 1


def test_channels_that_no_file_has_are_refused() -> None:
    with pytest.raises(ValueError, match="images of 4 channels cannot be made of image files"):
        image_format(4).prepare(Image.new("RGBA", (32, 32)))


def test_normalizing_needs_no_memory_format() -> None:
    images = pixels(picture(32, 32))[None].repeat(4, 1, 1, 1)
    form = image_format()
    expected = form.normalize(images)
    strided = form.normalize(images.contiguous(memory_format=torch.channels_last))
    assert torch.equal(strided, expected)
    assert strided.is_contiguous()
    torch.testing.assert_close(expected, images.float() * 0.5 + 1)
    mean = ColourTransform([1.0] * 3, [2.0] * 3)
    torch.testing.assert_close(mean(images), (images.float() - 1) / 2)
