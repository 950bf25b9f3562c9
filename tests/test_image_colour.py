"""Colours of a batch on the device: each image as torchvision makes it, one at a time."""

from itertools import permutations

import pytest
import torch
from torchvision.transforms.v2 import functional

from datamodules.erasing import erase
from datamodules.image_colour import (
    BRIGHTNESS,
    CONTRAST,
    PCA_COMPONENTS,
    PCA_STD,
    SATURATION,
    ColourTransform,
    colour_numbers,
)

ADJUST = {
    BRIGHTNESS: functional.adjust_brightness,
    CONTRAST: functional.adjust_contrast,
    SATURATION: functional.adjust_saturation,
}
MEAN, STD = (120.0, 110.0, 100.0), (60.0, 55.0, 50.0)
NOTHING = torch.zeros(3)


def some_images(count: int) -> torch.Tensor:
    """Bytes with whole areas of black and white, in which every step clamps."""
    chance = torch.Generator().manual_seed(0)
    values = torch.randint(-60, 316, (count, 3, 7, 9), generator=chance)
    return values.clamp_(0, 255).to(torch.uint8)


def in_bytes(images: torch.Tensor, numbers: list[torch.Tensor]) -> torch.Tensor:
    return ColourTransform((0.0,) * 3, (1.0,) * 3)(images, torch.stack(numbers))


@pytest.mark.parametrize("kind", ADJUST)
def test_each_step_is_torchvisions(kind):
    factors = (0.6, 0.83, 1.0, 1.21, 1.4)
    images = some_images(len(factors))
    shown = in_bytes(images, [colour_numbers(False, NOTHING, [(kind, f)]) for f in factors])
    for image, output, factor in zip(images, shown, factors, strict=True):
        expected = ADJUST[kind](image / 255, factor) * 255
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-3)
    assert torch.equal(shown[2], images[2].float())


@pytest.mark.parametrize("kind", ADJUST)
def test_each_step_of_a_grey_image_is_torchvisions(kind):
    factors = (0.6, 1.4)
    images = some_images(len(factors))[:, :1]
    numbers = torch.stack([colour_numbers(True, NOTHING, [(kind, f)]) for f in factors])
    shown = ColourTransform((120.0,), (60.0,))(images, numbers)
    assert shown.shape == images.shape
    for image, output, factor in zip(images, shown, factors, strict=True):
        expected = ADJUST[kind](image.flip(2) / 255, factor) * 255
        # The shares of the colours in grey sum to 0.9999.
        torch.testing.assert_close(output * 60 + 120, expected, rtol=0, atol=0.06)


def test_each_image_of_a_batch_has_an_order_of_its_own():
    orders = list(permutations(ADJUST))
    chance = torch.Generator().manual_seed(1)
    factors = (0.6 + 0.8 * torch.rand(len(orders), 3, generator=chance)).tolist()
    normals = torch.randn(len(orders), 3, generator=chance)
    jitters = [list(zip(*pair, strict=True)) for pair in zip(orders, factors, strict=True)]
    images = some_images(1).expand(len(orders), -1, -1, -1)
    shown = in_bytes(
        images, [colour_numbers(False, *pair) for pair in zip(normals, jitters, strict=True)]
    )
    for image, output, jitter, normal in zip(images, shown, jitters, normals, strict=True):
        expected = image / 255
        for kind, factor in jitter:
            expected = ADJUST[kind](expected, factor)
        shift = PCA_COMPONENTS @ (0.1 * PCA_STD * normal)
        expected = (expected + shift[:, None, None]).clamp(0, 1) * 255
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-3)
    assert len({output.numpy().tobytes() for output in shown}) == len(orders)


def test_flips_and_normalisation_are_exact():
    images = some_images(6)
    transform = ColourTransform(MEAN, STD)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    flips = [False, True, True, False, True, False]
    still = transform(images)
    torch.testing.assert_close(still, (images - mean) / std, rtol=0, atol=2e-6)
    shown = transform(images, torch.stack([colour_numbers(flip, NOTHING) for flip in flips]))
    for image, output, flip in zip(still, shown, flips, strict=True):
        assert torch.equal(output, image.flip(2) if flip else image)


@pytest.mark.parametrize("jitter", [(), [(CONTRAST, 0.7), (SATURATION, 1.3)]])
def test_the_memory_format_of_the_bytes_makes_no_difference(jitter):
    images, transform = some_images(4), ColourTransform(MEAN, STD)
    numbers = torch.stack([colour_numbers(True, torch.ones(3), jitter)] * 4)
    before = images.clone()
    expected = transform(images, numbers)
    assert torch.equal(images, before)
    for other in (images.contiguous(memory_format=torch.channels_last), images.expand(4, 3, 7, 9)):
        output = transform(other, numbers)
        assert output.is_contiguous()
        assert output.dtype == torch.float32
        assert torch.equal(output, expected)


def test_nothing_is_read_back_from_the_device():
    """On this device, which has no memory, that would raise."""
    numbers = torch.stack([colour_numbers(True, torch.ones(3), [(CONTRAST, 0.7)])] * 4)
    transform = ColourTransform(MEAN, STD).to("meta")
    output = transform(some_images(4).to("meta"), numbers.to("meta"))
    output = erase(output, torch.ones(4, 4, dtype=torch.int64, device="meta"))
    assert output.shape == (4, 3, 7, 9)
