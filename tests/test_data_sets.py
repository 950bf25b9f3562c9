"""Data sets are read as their files say, split as the papers do, and missed in one line."""

import hashlib
import os
import pickle
import platform

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from sklearn.datasets import load_digits
from torchvision import datasets

from chance import generator
from datamodules import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    DigitsDataModule,
    SVHNDataModule,
)
from datamodules.digits import hold_out
from datamodules.svhn import split_per_class


def ready(data):
    data.setup("fit")
    return data


def labels_of(loader) -> torch.Tensor:
    return torch.cat([batch[1] for batch in loader])


def as_bytes(data, loader) -> torch.Tensor:
    """The images that the steps receive, in bytes; for "scale" and no augmentation."""
    images = [data.on_after_batch_transfer(batch, 0)[0] for batch in loader]
    return (torch.cat(images) * 255).round().byte()


# --- digits -----------------------------------------------------------------------------


def test_digits_are_split_in_proportion_and_enlarged():
    data = ready(DigitsDataModule(normalization="scale"))
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    counts = [labels_of(loader).bincount(minlength=10) for loader in loaders]
    assert [int(count.sum()) for count in counts] == [1257, 180, 360]
    total = sum(counts)
    assert total.tolist() == np.bincount(load_digits().target).tolist()
    for count in counts:
        assert (count - total * (count.sum() / 1797)).abs().max() < 2

    images = torch.cat([as_bytes(data, loader) for loader in loaders])
    assert images.shape == (1797, *data.image_shape)
    assert torch.equal(
        images, images[:, :, ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3)
    )
    small = (images[:, 0, ::4, ::4].double() * 16 / 255).round()
    rows = {tuple(image.flatten().int().tolist()) for image in small}
    assert rows == {tuple(image.flatten().astype(int).tolist()) for image in load_digits().images}


def test_digits_keep_their_test_images_for_any_val_size():
    def test_images(**changes):
        data = ready(DigitsDataModule(**changes))
        return torch.cat([images for images, _ in data.test_dataloader()])

    assert torch.equal(test_images(), test_images(val_size=0, seed=3))
    assert torch.equal(test_images(), test_images(split_seed=1))
    labels = torch.from_numpy(load_digits().target)
    _, test = hold_out(labels, 360, generator("split", 0, "test"))
    first, _ = next(iter(ready(DigitsDataModule()).test_dataloader()))
    small = torch.from_numpy(load_digits().images)[test]
    assert torch.equal(first[:, 0, ::4, ::4], (small * 255 / 16).round().byte())
    assert test[:6].tolist() == [1258, 1739, 1049, 1335, 1563, 1615]


# --- CIFAR ------------------------------------------------------------------------------


@pytest.fixture
def cifar_batches(tmp_path, monkeypatch):
    """Batches in torchvision's format; returns the folder and the training images and labels."""
    chance = np.random.default_rng(0)
    images = chance.integers(0, 256, (50, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(50) % 10
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    files = {
        "data_batch_1": slice(0, 20),
        "data_batch_2": slice(20, 40),
        "test_batch": slice(40, 50),
    }
    for name, part in files.items():
        content = {"data": images[part].reshape(-1, 3072), "labels": labels[part].tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
    names = [f"class{i}" for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    # Without checksums: those of the real files are part of torchvision's lists.
    train_files = [["data_batch_1", None], ["data_batch_2", None]]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train_files)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", datasets.CIFAR10.meta | {"md5": None})
    return tmp_path, images, labels


def plain_cifar(data_dir, **changes):
    plain = {"crop_padding": 0, "horizontal_flip": False, "normalization": "scale"}
    arguments = plain | {"val_size": 0, "batch_size": 8} | changes
    return CIFAR10DataModule(str(data_dir), **arguments)


def in_stored_order(data):
    """Training images and labels, sorted by label and content."""
    images = as_bytes(data, data.train_dataloader()).numpy()
    labels = labels_of(data.train_dataloader()).tolist()
    return sorted((label, image.tobytes()) for label, image in zip(labels, images, strict=True))


def test_cifar_batches_are_read(cifar_batches):
    folder, images, labels = cifar_batches
    data = plain_cifar(folder)
    data.prepare_data()
    data.setup("fit")
    assert data.class_names[3] == "class3"
    expected = zip(labels[:40].tolist(), images[:40], strict=True)
    assert in_stored_order(data) == sorted((label, image.tobytes()) for label, image in expected)
    assert np.array_equal(as_bytes(data, data.test_dataloader()).numpy(), images[40:])
    assert labels_of(data.test_dataloader()).tolist() == labels[40:].tolist()


def test_channel_normalisation_of_cifar_uses_the_constants_of_the_papers(cifar_batches):
    folder, images, _ = cifar_batches
    data = ready(CIFAR10DataModule(str(folder), val_size=0, batch_size=8))
    outputs, _ = data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)
    mean = np.array([125.3, 123.0, 113.9])[:, None, None]
    std = np.array([63.0, 62.1, 66.7])[:, None, None]
    np.testing.assert_allclose(outputs.numpy(), (images[40:] - mean) / std, atol=2e-6)
    assert CIFAR100DataModule.channel_means == (129.3, 124.1, 112.4)


def test_corrupt_cifar_batches_are_named(cifar_batches):
    folder, _, _ = cifar_batches
    (folder / "cifar-10-batches-py" / "data_batch_2").unlink()
    with pytest.raises(
        ValueError, match=r"cifar-10-batches-py is incomplete or corrupt: remove it"
    ):
        plain_cifar(folder).prepare_data()


def test_cifar_and_svhn_files_are_compared_with_what_is_declared(cifar_batches, svhn, monkeypatch):
    folder, images, _ = cifar_batches
    batch = folder / "cifar-10-batches-py" / "test_batch"
    for labels, message in (
        ([*range(10), 0], "have 10 images and 11 labels"),
        ([*range(1, 11)], "have labels from 1 to 10, but 10 classes count from 0 to 9"),
    ):
        batch.write_bytes(pickle.dumps({"data": images[40:].reshape(-1, 3072), "labels": labels}))
        with pytest.raises(ValueError, match=f"the test data of CIFAR10DataModule {message}"):
            ready(plain_cifar(folder))
    content = {"X": np.zeros((32, 32, 3, 3), np.uint8), "y": np.array([[1], [10], [11]])}
    savemat(svhn / "test_32x32.mat", content)
    monkeypatch.setattr(datasets.svhn, "check_integrity", lambda path, checksum: True)
    monkeypatch.setattr(datasets.SVHN, "_check_integrity", lambda self: True)
    with pytest.raises(ValueError, match="test data of SVHNDataModule have labels from 0 to 11"):
        ready(SVHNDataModule(str(svhn), batch_size=8, val_size=30))


def test_missing_cifar_says_where_it_was_looked_for(tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"cifar-10-batches-py and .*cifar10/.* unpack http"
    ):
        plain_cifar(tmp_path).setup("fit")

    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    with pytest.raises(FileNotFoundError, match=r"downloading it failed: no route") as caught:
        plain_cifar(tmp_path).prepare_data()
    assert "\n" not in str(caught.value)


CLASSES = [f"class{i}" for i in range(10)]


@pytest.fixture
def cifar_folder(tmp_path):
    """Three training images and one test image per class, as PNG; returns the data folder."""
    chance = np.random.default_rng(0)
    for split, count in (("train", 3), ("test", 1)):
        for label, name in enumerate(CLASSES):
            folder = tmp_path / "cifar10" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = chance.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                pixels[0, 0] = label
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path


def test_an_image_folder_is_decoded_once(cifar_folder, monkeypatch):
    data = ready(plain_cifar(cifar_folder))
    assert data.class_names == CLASSES
    assert (cifar_folder / "cifar10.decoded.pt").is_file()
    first = in_stored_order(data)
    assert len(first) == 30
    assert all(np.frombuffer(image, np.uint8)[0] == label for label, image in first)
    path = cifar_folder / "cifar10" / "train" / "class4" / "1.png"
    pixels = np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes()
    assert (4, pixels) in first

    def may_not_be_called(path):
        raise AssertionError(path)

    monkeypatch.setattr("datamodules.decoded_folder.decode", may_not_be_called)
    assert in_stored_order(ready(plain_cifar(cifar_folder))) == first


def test_the_cache_follows_the_folder(cifar_folder):
    ready(plain_cifar(cifar_folder))
    path = cifar_folder / "cifar10" / "train" / "class4" / "new.png"
    Image.new("RGB", (32, 32), (4, 4, 4)).save(path)
    assert len(in_stored_order(ready(plain_cifar(cifar_folder)))) == 31
    Image.new("RGB", (32, 32), (9, 200, 31)).resize((32, 32)).save(path, compress_level=0)
    assert (4, bytes([9] * 1024 + [200] * 1024 + [31] * 1024)) in in_stored_order(
        ready(plain_cifar(cifar_folder))
    )
    assert {entry.name for entry in cifar_folder.iterdir()} == {"cifar10", "cifar10.decoded.pt"}


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut short"])
def test_a_damaged_cache_is_written_again(cifar_folder, content):
    cache = cifar_folder / "cifar10.decoded.pt"
    cache.write_bytes(content)
    assert len(in_stored_order(ready(plain_cifar(cifar_folder)))) == 30
    assert "fingerprint" in torch.load(cache, weights_only=True)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, "pipe"], ids=str)
def test_a_cache_that_holds_something_else_is_written_again(cifar_folder, content):
    cache = cifar_folder / "cifar10.decoded.pt"
    os.mkfifo(cache) if content == "pipe" else torch.save(content, cache)
    assert len(in_stored_order(ready(plain_cifar(cifar_folder)))) == 30
    assert "fingerprint" in torch.load(cache, weights_only=True)


@pytest.mark.parametrize("error", [PermissionError("read-only"), RuntimeError("disk full")])
def test_a_cache_that_cannot_be_written_is_done_without(cifar_folder, monkeypatch, error):
    def break_off(content, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", break_off)
    with pytest.warns(UserWarning, match=rf"cannot write .*cifar10.decoded.pt \({error}\)"):
        data = ready(plain_cifar(cifar_folder))
    assert len(in_stored_order(data)) == 30
    assert [entry.name for entry in cifar_folder.iterdir()] == ["cifar10"]


def test_a_cache_is_not_written_where_a_link_leads(cifar_folder, tmp_path):
    name = f"cifar10.decoded.pt.{platform.node()}.{os.getpid()}"  # what others can guess
    (tmp_path / "mine.txt").write_text("mine")
    (cifar_folder / name).symlink_to(tmp_path / "mine.txt")
    ready(plain_cifar(cifar_folder))
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert not (cifar_folder / "cifar10.decoded.pt").is_symlink()


def test_bad_images_are_named_in_one_line(cifar_folder):
    path = cifar_folder / "cifar10" / "train" / "class7" / "2.png"
    whole = path.read_bytes()
    for content in (b"", b"no image", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"cannot decode the image .*class7/2\.png \("
        ) as caught:
            ready(plain_cifar(cifar_folder))
        assert "\n" not in str(caught.value)
    Image.new("RGB", (32, 31)).save(path)
    with pytest.raises(
        ValueError, match=r"class7/2\.png has \(height, width, channels\) \(31, 32, 3\)"
    ):
        ready(plain_cifar(cifar_folder))


def test_folders_that_are_no_cifar_are_refused(cifar_folder):
    (cifar_folder / "cifar10" / "test" / "class3").rename(cifar_folder / "cifar10" / "test" / "odd")
    with pytest.raises(ValueError, match="differ in the classes class3, odd: make them equal"):
        ready(plain_cifar(cifar_folder))
    for split in ("train", "test"):
        for path in (cifar_folder / "cifar10" / split).iterdir():
            if path.name in ("class3", "odd"):
                path.rename(cifar_folder / f"{split}3")
    with pytest.raises(ValueError, match="has 9 classes, not 10: use Image"):
        ready(plain_cifar(cifar_folder))
    (cifar_folder / "train3" / "x").mkdir()
    (cifar_folder / "train3" / "x").rename(cifar_folder / "cifar10" / "train" / "empty")
    (cifar_folder / "cifar10" / "test" / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="train has no images for the classes empty: "):
        ready(plain_cifar(cifar_folder))


# --- SVHN -------------------------------------------------------------------------------


def test_svhn_holds_out_400_and_200_of_every_class():
    chance = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (604_388,), generator=chance)
    train, val = split_per_class(labels, 73_257, 400, 200, generator("split", 0))
    assert len(train) == 598_388
    assert len(val) == 6000
    assert torch.equal(torch.cat([train, val]).sort()[0], torch.arange(604_388))
    assert labels[val[val < 73_257]].bincount().tolist() == [400] * 10
    assert labels[val[val >= 73_257]].bincount().tolist() == [200] * 10
    assert not torch.equal(val, split_per_class(labels, 73_257, 400, 200, generator("split", 1))[1])


@pytest.fixture
def svhn(tmp_path, monkeypatch):
    """Files like the originals: 5, 4 and 1 images per digit; the first pixel tells the file."""
    parts = {}
    for number, (part, count) in enumerate((("train", 5), ("extra", 4), ("test", 1))):
        name = f"{part}_32x32.mat"
        labels = np.arange(1, 11).repeat(count)  # as in the files: 10 stands for the digit 0
        images = np.zeros((32, 32, 3, len(labels)), np.uint8)
        images[0, 0, 0] = number
        images[0, 1, 0] = labels
        savemat(tmp_path / name, {"X": images, "y": labels[:, None]})
        checksum = hashlib.md5((tmp_path / name).read_bytes()).hexdigest()
        parts[part] = [f"http://somewhere/{name}", name, checksum]
    monkeypatch.setattr(datasets.SVHN, "split_list", parts)
    return tmp_path


def test_svhn_joins_train_and_extra(svhn):
    data = SVHNDataModule(str(svhn), batch_size=8, val_size=30)
    data.prepare_data()
    data.setup("fit")
    for loader, count, files in (
        (data.train_dataloader(), 60, {0: 30, 1: 30}),
        (data.val_dataloader(), 30, {0: 20, 1: 10}),
        (data.test_dataloader(), 10, {2: 10}),
    ):
        images, labels = as_bytes(data, loader), labels_of(loader)
        assert len(labels) == count
        assert labels.bincount().tolist() == [count // 10] * 10
        assert torch.equal(images[:, 0, 0, 1].long() % 10, labels)
        assert (
            dict(enumerate(images[:, 0, 0, 0].bincount().tolist())) | files == {0: 0, 1: 0} | files
        )


def test_svhn_mistakes_are_explained(svhn):
    with pytest.raises(ValueError, match="val_size is 20: give a multiple of 30"):
        SVHNDataModule(str(svhn), val_size=20)
    with pytest.raises(ValueError, match="class 0 has 5 images, of which val_size asks for 6"):
        split_per_class(torch.zeros(5, dtype=torch.int64), 5, 6, 0, generator("split", 0))
    (svhn / "extra_32x32.mat").write_bytes(b"no matrix")
    with pytest.raises(ValueError, match=r"extra_32x32\.mat is corrupt: remove it"):
        ready(SVHNDataModule(str(svhn), val_size=0))
    (svhn / "extra_32x32.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"looked for .*extra_32x32\.mat; get it from http"):
        ready(SVHNDataModule(str(svhn), val_size=0))
