"""Random erasing draws torchvision's boxes, keyed, and fills them after everything else."""

from pathlib import Path

import pytest
import torch
from test_image_folder import folder, ready
from torch import Tensor
from torchvision import transforms

from chance import generator
from datamodules import DigitsDataModule
from datamodules.erasing import NUM_TRIES, draw_boxes, erase

__all__ = ["folder"]


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (3, 40)])
def test_boxes_are_torchvisions(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets our draws, one by one; of flat images most tries do not fit."""
    count, key = 300, ("erasing", 0, 0)
    boxes = draw_boxes(count, size, 1.0, generator(*key))
    draws = torch.rand(count, 2 * NUM_TRIES + 3, dtype=torch.float64, generator=generator(*key))
    image = torch.zeros(1, *size)
    for box, (_, row, column, *tries) in zip(boxes.tolist(), draws.tolist(), strict=True):
        shapes, places = iter(tries), iter([row, column])

        def uniform_(self: Tensor, low: float, high: float) -> Tensor:
            return torch.as_tensor(low + (high - low) * next(shapes), dtype=torch.float64)  # noqa: B023

        def randint(low: int, high: int, size: tuple[int]) -> Tensor:
            return torch.tensor(int(next(places) * high))  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "uniform_", uniform_)
            patch.setattr(torch, "randint", randint)
            top, left, height, width, _ = transforms.RandomErasing.get_params(
                image, (0.02, 0.33), (0.3, 3.3), [0.0]
            )
        whole = (height, width) == size  # what torchvision gives when no try fits
        assert box == ([0] * 4 if whole else [top, top + height, left, left + width])
    assert (boxes[:, 1] > boxes[:, 0]).any()


def test_coins_fall_as_often_as_they_should_and_move_no_box() -> None:
    some, all_ = (draw_boxes(4000, (32, 32), p, generator("erasing", 0)) for p in (0.25, 1.0))
    erased = some.any(1)
    assert erased.double().mean() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(some[erased], all_[erased])


def test_what_is_erased_is_what_torchvision_erases() -> None:
    images = torch.randn(5, 3, 20, 30)
    boxes = draw_boxes(5, (20, 30), 0.7, generator("test", 1))
    assert boxes.any(1).tolist() != [True] * 5
    expected = torch.stack(
        [
            transforms.functional.erase(
                image, top, left, bottom - top, right - left, torch.zeros(())
            )
            for image, (top, bottom, left, right) in zip(images, boxes.tolist(), strict=True)
        ]
    )
    assert torch.equal(erase(images.clone(), boxes), expected)


def epoch_of(data: DigitsDataModule, epoch: int) -> Tensor:
    """Returns the images of an epoch, in the order of the samples."""
    batches = list(data.train_epoch(epoch))
    images = torch.cat([data.on_after_batch_transfer(batch, 0)[0] for batch in batches])
    chance = generator("order", data.seed, epoch)
    return images[torch.randperm(len(images), generator=chance).argsort()]


@pytest.mark.parametrize("crop_padding", [0, 2])
def test_a_box_belongs_to_epoch_and_sample(crop_padding: int) -> None:
    def module(**changes: float) -> DigitsDataModule:
        data = DigitsDataModule(crop_padding=crop_padding, **changes)
        data.setup("fit")
        return data

    plain, erasing = module(), module(random_erasing=0.5, batch_size=100)
    one, other = epoch_of(plain, 1), epoch_of(erasing, 1)
    boxes = draw_boxes(1257, (32, 32), 0.5, generator("erasing", 0, 1))
    assert torch.equal(erase(one, boxes), other)
    assert torch.equal(other, epoch_of(module(random_erasing=0.5, batch_size=7), 1))
    assert not torch.equal(other, epoch_of(erasing, 2))
    (images, labels), *_ = list(erasing.val_dataloader())
    assert torch.equal(
        erasing.on_after_batch_transfer((images, labels), 0)[0], plain.transform(images)
    )


def test_images_of_a_folder_are_erased_after_their_colours(folder: Path) -> None:
    plain, erasing = (ready(folder, 1, random_erasing=prob) for prob in (0.0, 1.0))
    for whole, erased in zip(plain.train_dataloader(), erasing.train_dataloader(), strict=True):
        before, _ = plain.on_after_batch_transfer(whole, 0)
        after, _ = erasing.on_after_batch_transfer(erased, 0)
        assert torch.equal(erase(before, erased[-1]), after)
        assert erased[-1].any(1).all()
    # Every sample has a box of its own, and another one in every epoch.
    boxes = [
        tuple(box.tolist())
        for epoch in (1, 2)
        for *_, parts in ready(folder, epoch, random_erasing=1.0).train_dataloader()
        for box in parts
    ]
    assert len(set(boxes)) == len(boxes) == 24


def test_mistakes_are_named() -> None:
    for prob in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"random_erasing is {prob}: give a number from"):
            DigitsDataModule(random_erasing=prob)
