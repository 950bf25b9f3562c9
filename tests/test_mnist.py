"""MNIST's files are found, read as they say, and refused when they are damaged or do not match."""

import gzip

import numpy as np
import pytest
from test_data_sets import as_bytes, labels_of, ready

from datamodules import FashionMNISTDataModule, MNISTDataModule


def write_mnist(folder, compress: bool) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    chance = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": chance.integers(0, 256, (40, 28, 28), dtype=np.uint8),
        "train-labels-idx1-ubyte": np.arange(40, dtype=np.uint8) % 10,
        "t10k-images-idx3-ubyte": chance.integers(0, 256, (20, 28, 28), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": np.arange(20, dtype=np.uint8) % 10,
    }
    for name, array in arrays.items():
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
        content = header + array.tobytes()
        path = folder / (name + ".gz" if compress else name)
        path.write_bytes(gzip.compress(content) if compress else content)
    return arrays


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    ("module", "folder"),
    [
        (MNISTDataModule, "."),
        (MNISTDataModule, "MNIST/raw"),
        (FashionMNISTDataModule, "."),
        (FashionMNISTDataModule, "FashionMNIST/raw"),
        (FashionMNISTDataModule, "fashion-mnist"),
    ],
)
def test_mnist_files_are_found_and_read(tmp_path, module, folder, compress):
    arrays = write_mnist(tmp_path / folder, compress)
    data = module(str(tmp_path), batch_size=8, val_size=10)
    data.prepare_data()
    data.setup("fit")
    assert len(labels_of(data.train_dataloader())) == 30
    assert len(labels_of(data.val_dataloader())) == 10
    images = as_bytes(data, data.test_dataloader())
    assert np.array_equal(images[:, 0].numpy(), arrays["t10k-images-idx3-ubyte"])
    assert images.shape[1:] == data.image_shape
    assert labels_of(data.test_dataloader()).tolist() == list(range(10)) * 2
    assert len(data.class_names) == data.num_classes == 10


def test_corrupt_and_missing_mnist_files_are_named(tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"FashionMNIST not found: looked for .* get them from"
    ):
        ready(FashionMNISTDataModule(str(tmp_path)))

    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", no_network)
    with pytest.raises(FileNotFoundError, match="downloading them failed: no route"):
        FashionMNISTDataModule(str(tmp_path)).prepare_data()

    for content in (b"", b"\0\0\x08\x03\0\0\0\x28", b"\x89PNG....", b"\0\0\x08"):
        write_mnist(tmp_path, compress=False)
        (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
        with pytest.raises(
            ValueError, match=r"cannot read .*train-images-idx3-ubyte \(.*remove it"
        ):
            ready(FashionMNISTDataModule(str(tmp_path), val_size=10, batch_size=8))
    (tmp_path / "train-images-idx3-ubyte").unlink()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"not gzip")
    with pytest.raises(ValueError, match=r"cannot read .*train-images-idx3-ubyte\.gz"):
        ready(FashionMNISTDataModule(str(tmp_path), val_size=10, batch_size=8))


def test_damaged_archives_of_mnist_are_named_in_one_line(tmp_path):
    write_mnist(tmp_path, compress=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    flipped = whole[:12] + bytes([whole[12] ^ 255]) + whole[13:]
    for content in (whole[:9], whole[:500], whole[:-3], flipped, whole[:2] + b"\7" + whole[3:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read .*t10k-images.* remove it") as caught:
            ready(MNISTDataModule(str(tmp_path), val_size=10, batch_size=8))
        assert "\n" not in str(caught.value)


def test_mnist_files_that_do_not_belong_together_are_refused(tmp_path):
    arrays = write_mnist(tmp_path, compress=False)

    def with_labels(labels: np.ndarray, message: str) -> None:
        header = bytes([0, 0, 8, labels.ndim]) + np.array(labels.shape, ">i4").tobytes()
        (tmp_path / "train-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
        with pytest.raises(ValueError, match=message):
            ready(MNISTDataModule(str(tmp_path), val_size=10, batch_size=8))

    labels = arrays["train-labels-idx1-ubyte"]
    with_labels(labels[:30], "MNISTDataModule have 40 images and 30 labels: get the files again")
    with_labels(labels + 1, "labels from 1 to 10, but 10 classes count from 0 to 9")
    with_labels(arrays["train-images-idx3-ubyte"], r"with labels of \(28, 28\), not of \(1, 28, 28")
    with_labels(np.array(3, np.uint8), "it does not start like an idx file")
