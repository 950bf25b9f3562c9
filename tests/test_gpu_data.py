"""Data on a CUDA device: same numbers wherever they lie, and no batch makes the host wait."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning_fabric.utilities import move_data_to_device
from PIL import Image
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from datamodules import DigitsDataModule, ImageFolderDataModule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
DEVICE = torch.device("cuda", 0)


@contextmanager
def no_waiting():
    """Raises RuntimeError where the host would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def ready(data):
    """Sets a data module up under a trainer on the device, at the start of epoch 0."""
    progress = SimpleNamespace(current=SimpleNamespace(ready=0))
    data.trainer = SimpleNamespace(
        global_rank=0,
        world_size=1,
        current_epoch=0,
        overfit_batches=0.0,
        strategy=SimpleNamespace(root_device=DEVICE),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )
    data.setup("fit")
    return data


def digits(resident: bool) -> DigitsDataModule:
    data = DigitsDataModule(crop_padding=2, batch_size=32)
    data.resident = resident
    return ready(data)


def received(data, batches) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        data.on_after_batch_transfer(move_data_to_device(batch, DEVICE), 0) for batch in batches
    ]


def test_the_sync_debug_mode_sees_a_host_that_waits():
    with no_waiting(), pytest.raises(RuntimeError):
        torch.ones(3, device=DEVICE).sum().item()


@pytest.mark.parametrize("resident", [True, False])
def test_no_batch_of_a_small_data_set_makes_the_host_wait(resident):
    data = digits(resident)
    loader = data.train_dataloader()
    received(data, [next(iter(loader))])  # places the images
    with no_waiting():
        train = received(data, loader)
        val = received(data, data.val_dataloader())
    assert [len(train), len(val)] == [40, 1]
    assert all(values.device == DEVICE for batch in train + val for values in batch)


@pytest.mark.parametrize("chunk", [1, 5 * 32 * 32 * 32, 2**24])  # of one batch, of five, of all
def test_batches_are_the_same_wherever_the_images_lie(monkeypatch, chunk):
    monkeypatch.setattr("datamodules.in_memory.CHUNK", chunk)
    here, there = digits(False), digits(True)
    here.random_erasing = there.random_erasing = 0.5
    for split in ("train", "val", "test"):
        loaders = [getattr(data, f"{split}_dataloader")() for data in (here, there)]
        for ours, theirs in zip(*loaders, strict=True):
            assert all(values.is_pinned() for values in ours)
            assert all(values.device == DEVICE for values in theirs)
            moved = move_data_to_device(theirs, DEVICE)
            assert all(a is b for a, b in zip(moved, theirs, strict=True))  # no copy
            (images, labels), (others, their_labels) = received(here, [ours]) + received(
                there, [theirs]
            )
            assert torch.equal(images, others)
            assert torch.equal(labels, their_labels)
            is_finished = split == "train"
            assert (others is theirs[0]) == is_finished
            assert theirs[0].is_floating_point() == is_finished


def test_too_many_images_stay_with_the_host(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 1000))
    data = digits(True)
    assert all(values.is_pinned() for batch in data.train_dataloader() for values in batch)


class Recorder(LightningModule):
    """Keeps every training batch that it receives."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        images, labels = batch
        self.seen.append((images.clone(), labels.clone()))
        return self.weight * images.mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_trainer_sees_the_same_wherever_the_images_lie(tmp_path):
    def seen(resident: bool, steps: int, ckpt_path=None) -> list:
        data = DigitsDataModule(crop_padding=2, batch_size=256, val_size=0)  # 6 batches
        data.resident = resident
        module = Recorder()
        Trainer(
            accelerator="gpu",
            devices=1,
            max_steps=steps,
            default_root_dir=tmp_path,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[ModelCheckpoint(tmp_path / str(resident), "{step}", every_n_train_steps=4)],
        ).fit(module, datamodule=data, ckpt_path=ckpt_path)
        return module.seen

    whole = seen(False, 9)
    parts = seen(True, 4)
    parts += seen(True, 9, tmp_path / "True" / "step=4.ckpt")
    assert len(whole) == len(parts) == 9
    for ours, theirs in zip(whole, parts, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One class with 12 training and 4 validation images."""
    root = tmp_path_factory.mktemp("images")
    chance = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        (root / split / "only").mkdir(parents=True)
        for i in range(count):
            small = chance.integers(0, 256, (5, 6, 3), dtype=np.uint8)
            image = Image.fromarray(small).resize((90 + i, 70), Image.Resampling.BICUBIC)
            image.save(root / split / "only" / f"{i}.jpg")
    return root


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("augmentation", ["resize_crop", "inception", "none"])
def test_no_batch_of_an_image_folder_makes_the_host_wait(folder, augmentation, num_workers):
    data = ready(
        ImageFolderDataModule(
            str(folder),
            image_size=32,
            augmentation=augmentation,
            batch_size=4,
            num_workers=num_workers,
        )
    )
    batches = list(data.train_dataloader())
    assert all(values.is_pinned() for batch in batches for values in batch)
    expected = [data.transform(batch[0], *batch[2:]) for batch in batches]
    received(data, batches[:1])  # moves the transform
    with no_waiting():
        outputs = received(data, batches)
    for (images, labels), batch, there in zip(outputs, batches, expected, strict=True):
        assert images.device == labels.device == DEVICE
        assert images.is_contiguous()
        assert torch.equal(labels.cpu(), batch[1])
        torch.testing.assert_close(images.cpu(), there, rtol=0, atol=1e-4)
