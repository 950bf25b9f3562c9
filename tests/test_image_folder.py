"""Folders of large images: what a step receives is a function of (image, seed, epoch) alone."""

import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

import preemption
from datamodules import ImageFolderDataModule, ImageNetDataModule
from datamodules.image_augmentation import keyed, training_draw
from datamodules.image_colour import PCA_COMPONENTS, PCA_STD, ColourTransform
from datamodules.image_files import opened, resized


def picture(number: int, size: tuple[int, int]) -> Image.Image:
    """A smooth image (width, height) whose colours are its number's."""
    chance = np.random.default_rng(number)
    small = chance.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes with 6 training and 2 validation images each, of different sizes."""
    root = tmp_path_factory.mktemp("images")
    number = 0
    for split, count in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                number += 1
                image = picture(number, (40 + number, 60 - number))
                image.save(root / split / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    return root


def ready(folder, epoch=0, batch=0, **changes):
    arguments = {"image_size": 24, "batch_size": 5, "eval_batch_size": 3, "num_workers": 0}
    data = ImageFolderDataModule(str(folder), **(arguments | changes))
    progress = SimpleNamespace(current=SimpleNamespace(ready=batch))
    data.trainer = SimpleNamespace(
        global_rank=0,
        world_size=1,
        current_epoch=epoch,
        overfit_batches=0.0,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )
    data.prepare_data()
    data.setup("fit")
    return data


def all_of(loader) -> list[torch.Tensor]:
    """Images, labels and, where they have any, their numbers."""
    return [torch.cat(parts) for parts in zip(*loader, strict=True)]


def test_what_is_known_of_a_folder(folder):
    data = ready(folder)
    assert (data.num_classes, data.class_names, data.image_shape) == (
        2,
        ["cat", "dog"],
        (3, 24, 24),
    )
    splits = ("train", "val", "test", "predict")
    assert [data.num_samples(split) for split in splits] == [12, 4, 4, 4]
    images, labels, numbers = all_of(data.train_dataloader())
    assert images.dtype == torch.uint8
    assert images.shape == (12, 3, 24, 24)
    assert numbers.shape == (12, 13)
    assert labels.bincount().tolist() == [6, 6]
    assert ImageNetDataModule(str(folder)).num_classes == 2


@pytest.mark.parametrize(
    "augmentation", ["resize_crop", "inception", "mobile", "randaugment", "trivialaugment", "none"]
)
def test_workers_make_no_difference(folder, augmentation):
    changes = {"augmentation": augmentation, "random_erasing": 0.5 * (augmentation != "none")}
    alone = ready(folder, 1, **changes)
    workers = ready(folder, 1, **changes, num_workers=2, batch_size=4)
    parts = [all_of(data.train_dataloader()) for data in (alone, workers)]
    assert len(parts[0]) == (2 if augmentation == "none" else 4)
    assert all(torch.equal(one, other) for one, other in zip(*parts, strict=True))


def test_workers_hold_warnings_back_from_their_first_moment(folder, tmp_path, monkeypatch):
    """Until they can outlive them; the process that starts them does not."""

    def outlive_warnings() -> None:
        held_back = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        (tmp_path / str(os.getpid())).write_text(str(held_back >= set(preemption.WARNINGS)))

    monkeypatch.setattr(preemption, "outlive_warnings", outlive_warnings)
    all_of(ready(folder, num_workers=2).train_dataloader())
    assert [path.read_text() for path in tmp_path.iterdir()] == ["True", "True"]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(preemption.WARNINGS)


def test_augmentation_changes_with_the_epoch_and_the_seed_only(folder):
    def sorted_images(*place, **changes):
        images, _, *numbers = all_of(ready(folder, *place, **changes).train_dataloader())
        parts = zip(images, *numbers, strict=True)
        return sorted(tuple(part.numpy().tobytes() for part in sample) for sample in parts)

    assert sorted_images(1) == sorted_images(1, batch_size=12)
    assert not set(sorted_images(1)) & set(sorted_images(2))
    assert not set(sorted_images(1)) & set(sorted_images(1, seed=1))
    for part in range(2):  # the pixels, and the numbers
        assert not {x[part] for x in sorted_images(1)} & {x[part] for x in sorted_images(2)}
    assert sorted_images(1, augmentation="none") == sorted_images(2, augmentation="none")


def test_a_resumed_epoch_goes_on_with_the_same_images(folder):
    whole = list(ready(folder, epoch=3).train_dataloader())
    rest = list(ready(folder, epoch=3, batch=2).train_dataloader())
    assert len(whole) == 3
    assert len(rest) == 1
    assert all(torch.equal(*parts) for parts in zip(rest[0], whole[2], strict=True))


def test_loading_draws_nothing_from_the_global_generator(folder):
    state = torch.get_rng_state()
    data = ready(folder)
    all_of(data.train_dataloader())
    all_of(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_resizes_takes_the_centre_and_normalises(folder):
    data = ready(folder)
    outputs = [data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader()]
    images, labels = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    assert labels.tolist() == [0, 0, 1, 1]
    usual = transforms.Compose(
        [
            transforms.Resize(27),
            transforms.CenterCrop(24),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    paths = sorted((folder / "val").rglob("*.*"))
    assert data.predict_names == [str(path) for path in paths]
    for image, path in zip(images, paths, strict=True):
        expected = usual(Image.open(path).convert("RGB"))
        torch.testing.assert_close(image, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("augmentation", ["inception", "none"])
def test_grey_images_are_those_of_pillow_in_one_channel(folder, augmentation):
    data = ready(folder, grey=True, augmentation=augmentation)
    assert data.image_shape == (1, 24, 24)
    images, _ = zip(
        *(data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()), strict=True
    )
    assert torch.cat(images).shape == (12, 1, 24, 24)
    usual = transforms.Compose([transforms.Resize(27), transforms.CenterCrop(24)])
    shown = torch.cat([images for images, _ in data.val_dataloader()])
    for image, path in zip(shown, data.predict_names, strict=True):
        with Image.open(path) as opened_image:
            expected = np.asarray(usual(opened_image.convert("RGB").convert("L")))
            assert data.image_format.prepare(opened_image).equal(image)
        assert np.array_equal(image[0].numpy(), expected)


def test_training_images_alone_will_do_without_a_test(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / "train/only").mkdir(parents=True, exist_ok=True)
        picture(1, (30, 30)).save(tmp_path / "train/only" / name)
    with pytest.raises(FileNotFoundError, match=r"looked for .*/val/<class>"):
        ready(tmp_path, batch_size=1)
    data = ready(tmp_path, batch_size=1, val_size=1)
    assert [len(all_of(loader)[0]) for loader in (data.train_dataloader(), data.val_dataloader())]
    for loader, remedy in (
        (data.test_dataloader, "put some in .*/test/<class>, or pass --test_after_fit=false"),
        (data.predict_dataloader, "or set predict_dir"),
    ):
        with pytest.raises(FileNotFoundError, match=remedy):
            loader()


def draws(augmentation: str, image: Image.Image, size: int, count: int) -> np.ndarray:
    """The image as the steps receive it under many keys, (count, size, size, 3) in bytes."""
    draw = training_draw(augmentation, size)
    parts, numbers = [], []
    for i in range(count):
        with keyed("test", i):
            box, of_image = draw(image)
        parts.append(np.asarray(resized(image, box, size)))
        numbers.append(of_image)
    images = torch.from_numpy(np.stack(parts)).permute(0, 3, 1, 2)
    shown = ColourTransform((0.0,) * 3, (1.0,) * 3)(images, torch.stack(numbers))
    return shown.permute(0, 2, 3, 1).numpy()


def add_pca_colour(image: Image.Image) -> Image.Image:
    shift = PCA_COMPONENTS @ (PCA_STD * torch.randn(3) * 0.1) * 255
    pixels = np.asarray(image, dtype=np.float32) + shift.numpy()
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("augmentation", ["resize_crop", "inception", "mobile"])
def test_images_are_those_of_torchvision_under_the_same_key(augmentation):
    """Up to the rounding of theirs to bytes in every step, and to the border of the crop."""
    flip = transforms.RandomHorizontalFlip()
    if augmentation == "resize_crop":
        usual = [transforms.RandomCrop(24), flip, add_pca_colour]
    else:
        smallest = 0.08 if augmentation == "inception" else 0.25
        crop = transforms.RandomResizedCrop(24, (smallest, 1))
        usual = [crop, transforms.ColorJitter(0.4, 0.4, 0.4), add_pca_colour, flip]
    image = picture(5, (90, 70))
    for number, shown in enumerate(draws(augmentation, image, 24, 40)):
        with keyed("test", number):
            source = image
            if augmentation == "resize_crop":
                source = transforms.functional.resize(image, int(torch.randint(27, 52, ())))
            expected = np.asarray(transforms.Compose(usual)(source), np.float32)
        # Pillow cuts decimals off in every step, which a factor above 1 enlarges.
        assert np.abs(shown - expected)[4:-4, 4:-4].max() < 4


@pytest.mark.parametrize("augmentation", ["randaugment", "trivialaugment"])
def test_policies_are_those_of_torchvision_under_the_same_key(folder, augmentation):
    """All of a sample is drawn under one key, in the order of torchvision's references."""
    data = ready(folder, 2, augmentation=augmentation)
    images, labels, numbers = all_of(data.train_dataloader())
    assert not numbers.any()
    files, _ = data._splits["train"]
    usual = {
        "randaugment": transforms.RandAugment,
        "trivialaugment": transforms.TrivialAugmentWide,
    }[augmentation]
    changes = transforms.Compose(
        [
            transforms.RandomHorizontalFlip(),
            usual(interpolation=transforms.InterpolationMode.BILINEAR),
        ]
    )
    num_changed = 0
    for index, label in enumerate(files.labels.tolist()):
        shown, *_ = files[2, index]
        with keyed("augmentation", 0, 2, index), opened(str(files.names()[index])) as image:
            top, left, height, width = transforms.RandomResizedCrop.get_params(
                image, [0.08, 1], [3 / 4, 4 / 3]
            )
            cropped = resized(image, (left, top, left + width, top + height), 24)
            expected = np.asarray(changes(cropped))
        assert (shown.numpy() == expected).all()
        num_changed += bool((expected != np.asarray(cropped)).any())
        assert any(torch.equal(shown, each.permute(1, 2, 0)) for each in images[labels == label])
    assert num_changed > 6


def test_what_is_cut_out_is_what_torchvision_cuts_out():
    image = picture(1, (80, 60))
    ours = np.asarray(resized(image, (10, 5, 70, 45), 20))
    usual = transforms.functional.resized_crop(image, 5, 10, 40, 60, [20, 20])
    # Beyond the border of the part our filter sees the image, theirs nothing.
    assert (ours[1:-1, 1:-1] == np.asarray(usual)[1:-1, 1:-1]).all()


@pytest.mark.parametrize(
    ("side", "reduction", "mode"),
    [(95, 1, "RGB"), (96, 2, "RGB"), (192, 4, "L"), (192, 4, "CMYK"), (384, 8, "RGB")],
)
def test_a_jpeg_is_decoded_no_larger_than_needed(tmp_path, monkeypatch, side, reduction, mode):
    picture(3, (401, 399)).convert(mode).save(tmp_path / "a.jpg", quality=95)
    box = (401 - side, 399 - side, 401, 399)
    decoded = []
    resize = Image.Image.resize

    def spy(image, *others, **options):
        decoded.append(image.size)
        return resize(image, *others, **options)

    with opened(str(tmp_path / "a.jpg")) as image:
        monkeypatch.setattr(Image.Image, "resize", spy)
        ours = np.asarray(resized(image, box, 48), np.float32)
    assert decoded == [(-(-401 // reduction), -(-399 // reduction))]
    whole = Image.open(tmp_path / "a.jpg").convert("RGB")
    expected = np.asarray(resize(whole, (48, 48), Image.Resampling.BILINEAR, box=box), np.float32)
    assert np.abs(ours - expected).mean() < 1
    assert np.abs(ours - expected)[1:-1, 1:-1].max() < 5


def test_resize_crop_zooms_crops_and_flips_as_the_paper_says():
    # Red grows to the right and green to the bottom, so that the crop can be read off the pixels.
    ramp = np.zeros((100, 100, 3), np.uint8)
    ramp[:, :, 0] = np.arange(100) * 2 + 20
    ramp[:, :, 1] = np.arange(100)[:, None] * 2 + 20
    images = draws("resize_crop", Image.fromarray(ramp), 50, 300)
    slope = (images[:, :, -1, 0] - images[:, :, 0, 0]).mean(1)
    assert 110 < (slope > 0).sum() < 190
    # The crop shows 50 of 57 to 107 pixels of the short side, so 47% to 88% of the image.
    shown = np.abs(slope) / 2 / 100
    assert 0.44 < shown.min() < 0.5
    assert 0.82 < shown.max() < 0.9


@pytest.mark.parametrize(("augmentation", "smallest"), [("inception", 0.08), ("mobile", 0.25)])
def test_random_sized_crops_show_the_area_they_should(augmentation, smallest):
    draw, image = training_draw(augmentation, 20), Image.new("RGB", (100, 100))
    areas, aspects = [], []
    for i in range(400):
        with keyed("test", i):
            (left, top, right, bottom), _ = draw(image)
        areas.append((right - left) * (bottom - top) / 10_000)
        aspects.append((right - left) / (bottom - top))
        assert min(left, top) >= 0
        assert max(right, bottom) <= 100
    assert smallest - 0.01 < min(areas) < smallest + 0.03
    assert max(areas) > 0.9
    assert 0.73 < min(aspects) < 0.8
    assert 1.25 < max(aspects) < 1.37


def test_colours_shift_along_the_principal_components():
    grey = Image.new("RGB", (60, 60), (128, 128, 128))
    shifts = torch.tensor(draws("resize_crop", grey, 30, 2000)[:, 0, 0]) - 128
    # The covariance is V diag(0.1 * std)^2 V^T in 0..1.
    expected = PCA_COMPONENTS @ torch.diag((25.5 * PCA_STD) ** 2) @ PCA_COMPONENTS.T
    assert (shifts.T.cov() - expected).abs().max() < 0.15 * expected.max()
    torch.testing.assert_close(PCA_COMPONENTS.T @ PCA_COMPONENTS, torch.eye(3), rtol=0, atol=2e-4)


def test_images_held_out_are_not_trained_on_and_not_augmented(folder):
    data = ready(folder, val_size=5, batch_size=7, augmentation="none")
    train, _ = all_of(data.train_dataloader())
    val, _ = all_of(data.val_dataloader())
    everything, _ = all_of(ready(folder, augmentation="none").train_dataloader())
    assert (len(train), len(val), data.num_samples("test")) == (7, 5, 4)
    bytes_of = [
        sorted(image.numpy().tobytes() for image in part) for part in (train, val, everything)
    ]
    assert sorted(bytes_of[0] + bytes_of[1]) == bytes_of[2]
    of_augmented, _ = all_of(ready(folder, val_size=5).val_dataloader())
    assert torch.equal(of_augmented, val)
    other, _ = all_of(ready(folder, val_size=5, split_seed=1).val_dataloader())
    assert not torch.equal(other, val)


def test_the_split_seed_moves_no_test_image(folder):
    names = [ready(folder, val_size=5, split_seed=seed).predict_names for seed in range(3)]
    assert names == [names[0]] * 3


def test_names_that_are_no_utf8_can_be_written(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "only").mkdir(parents=True)
        picture(1, (30, 30)).save(tmp_path / split / "only" / "a.png")
    try:
        os.rename(tmp_path / "val/only/a.png", os.fsencode(tmp_path / "val/only") + b"/\xe9.png")
        for split in ("train", "val"):
            os.rename(tmp_path / split / "only", os.fsencode(tmp_path / split) + b"/\xff")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    data = ready(tmp_path, batch_size=1)
    assert data.class_names == ["\\xff"]
    assert data.predict_names == [f"{tmp_path}/val/\\xff/\\xe9.png"]
    assert len(all_of(data.predict_dataloader())[0]) == 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_folder_to_predict_is_read_faithfully_or_refused(tmp_path, num_workers):
    for split in ("train/only", "val/only", "new"):
        (tmp_path / split).mkdir(parents=True)
        picture(1, (30, 30)).save(tmp_path / split / "a.png")
    grey = np.full((30, 30), 49152, np.uint16)
    Image.fromarray(grey).save(tmp_path / "new" / "a.png")
    Image.fromarray(grey).save(tmp_path / "train" / "only" / "a.png")
    changes = {"augmentation": "none", "batch_size": 1, "num_workers": num_workers}
    data = ready(tmp_path, predict_dir=str(tmp_path / "new"), **changes)
    for loader in (data.train_dataloader(), data.predict_dataloader()):
        assert (all_of(loader)[0] == 192).all()
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "new" / "b.tif")
    data = ready(tmp_path, predict_dir=str(tmp_path / "new"), **changes)
    with pytest.raises(ValueError, match=r"^cannot decode the image .*new/b\.tif \(its pixels are"):
        all_of(data.predict_dataloader())


def test_a_test_folder_and_a_folder_to_predict(tmp_path):
    for split in ("train", "val", "test"):
        (tmp_path / split / "only").mkdir(parents=True)
        picture(1, (30, 30)).save(tmp_path / split / "only" / "a.png")
    picture(2, (30, 30)).save(tmp_path / "test" / "only" / "b.png")
    (tmp_path / "new" / "deep").mkdir(parents=True)
    for name in ("new/x.png", "new/deep/y.jpg"):
        picture(3, (30, 30)).convert("L").save(tmp_path / name)
    (tmp_path / "new" / "notes.txt").write_text("no image")
    data = ready(tmp_path, predict_dir=str(tmp_path / "new"), batch_size=1)
    assert [data.num_samples(split) for split in ("val", "test", "predict")] == [1, 2, 2]
    assert data.predict_names == [str(tmp_path / "new/deep/y.jpg"), str(tmp_path / "new/x.png")]
    images, labels = all_of(data.predict_dataloader())
    assert images.shape == (2, 3, 24, 24)
    assert labels.tolist() == [-1, -1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_corrupt_image_is_named_in_one_line(tmp_path, num_workers):
    for split in ("train", "val"):
        (tmp_path / split / "only").mkdir(parents=True)
        picture(1, (30, 30)).save(tmp_path / split / "only" / "good.png")
    (tmp_path / "train" / "only" / "bad.jpg").write_bytes(b"no image")
    data = ready(tmp_path, batch_size=1, num_workers=num_workers)
    with pytest.raises(ValueError, match=r"^cannot decode the image .*only/bad\.jpg \(") as caught:
        all_of(data.train_dataloader())
    assert "\n" not in str(caught.value)


def test_mistakes_are_explained_in_one_line(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"looked for .*nowhere/train/<class>/\*\.jpg"):
        ready(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"looked for .*empty/\*\*/\*\.jpg"):
        ready(folder, predict_dir=str(tmp_path / "empty"))
    for changes, message in (
        ({"augmentation": "cutmix"}, "'cutmix': give resize_crop, inception, mobile, "),
        ({"augmentation": "none", "random_erasing": 0.5}, "augmentation none: give one or drop"),
        ({"image_size": 0}, "image_size is 0: give a whole number from 1"),
        ({"num_workers": -1}, "num_workers is -1: give a whole number from 0"),
        ({"predict_dir": ""}, "predict_dir is empty: give a value, or leave it out"),
        ({"val_size": -1}, "val_size is -1: give a whole number from 0"),
        ({"val_size": 12}, "val_size is 12 of 12 training images: lower it"),
        ({"batch_size": 13}, "there are 12 training images; batch_size times"),
    ):
        with pytest.raises(ValueError, match=message):
            ready(folder, **changes)
