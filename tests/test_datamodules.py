"""Order, augmentation, normalisation, ranks and resuming: what all data modules share."""

import pickle
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kernel_count import KernelCount
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from datamodules import InMemoryDataModule
from datamodules.augmentation import draw_views
from datamodules.in_memory import LabelledImages, has_room
from datamodules.order import evaluation_batches, training_batches

NUM_IMAGES = 60
SHAPE = (3, 6, 8)
NORMALIZATIONS = ["pixel_mean", "pixel_mean_scalar_std", "channel", "scale"]


@dataclass(eq=False, kw_only=True)
class Numbered(InMemoryDataModule):
    """Random images, each labelled with its own number."""

    num_classes = NUM_IMAGES
    image_shape = SHAPE

    batch_size: int = 7
    eval_batch_size: int = 4
    val_size: int = 13
    crop_padding: int = 2
    horizontal_flip: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.num_reads = 0

    def read(self, download):
        self.num_reads += 1
        chance = torch.Generator().manual_seed(1)
        # Smooth differences between pixels and channels, so that the statistics differ as well.
        base = torch.linspace(20, 120, 3 * 6 * 8).view(SHAPE)
        images = (base + torch.rand(NUM_IMAGES, *SHAPE, generator=chance) * 100).to(torch.uint8)
        test = LabelledImages(images.flip(0)[:11], torch.arange(11))
        return LabelledImages(images, torch.arange(NUM_IMAGES)), test


def ready(rank=0, world_size=1, epoch=0, batch=0, **changes) -> Numbered:
    """A data module that was set up under a trainer at the given place."""
    data = Numbered(**changes)
    progress = SimpleNamespace(current=SimpleNamespace(ready=batch))
    data.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        current_epoch=epoch,
        overfit_batches=0.0,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )
    data.setup("fit")
    return data


def received(data, loader) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the steps receive of a loader."""
    return [data.on_after_batch_transfer(batch, 0) for batch in loader]


def by_label(batches) -> dict[int, torch.Tensor]:
    return {
        int(label): image
        for images, labels in batches
        for image, label in zip(images, labels, strict=True)
    }


def reference_statistics(images: np.ndarray, normalization: str):
    """Mean and std in 0..1, in float64, of (N, C, H, W) bytes."""
    values = images.astype(np.float64) / 255
    if normalization == "scale":
        return 0.0, 1.0
    if normalization == "channel":
        mean = values.mean((0, 2, 3), keepdims=True)[0]
        return mean, values.std((0, 2, 3), keepdims=True, ddof=1)[0]
    return values.mean(0), 1.0 if normalization == "pixel_mean" else values.std(ddof=1)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_batch_equals_the_images_augmented_one_by_one(normalization):
    data = ready(normalization=normalization)
    (images, _), _ = data.read(False)
    train_labels = torch.cat([labels for _, labels, _ in data.train_epoch(0)])
    mean, std = reference_statistics(images[train_labels].numpy(), normalization)

    num_padded = 0
    for batch in data.train_epoch(epoch=3):
        outputs, labels = data.on_after_batch_transfer(batch, 0)
        assert outputs.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert outputs.is_contiguous()
        for output, label, view in zip(outputs, labels, batch[2].tolist(), strict=True):
            flip, top, left = view // 25, view // 5 % 5, view % 5
            image = (images[label].numpy() / 255 - mean) / std
            image = image[:, :, ::-1] if flip else image
            padded = np.pad(image, [(0, 0), (2, 2), (2, 2)])
            inside = np.pad(np.ones_like(image), [(0, 0), (2, 2), (2, 2)])
            crop = np.s_[:, top : top + 6, left : left + 8]
            np.testing.assert_allclose(output.numpy(), padded[crop], rtol=0, atol=2e-6)
            assert (output.numpy()[inside[crop] == 0] == 0).all()
            num_padded += (inside[crop] == 0).sum()
    assert num_padded > 1000


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_evaluation_normalises_and_does_no_more(normalization):
    data = ready(normalization=normalization)
    (images, _), (test_images, _) = data.read(False)
    train = images[[int(label) for _, labels, _ in data.train_epoch(0) for label in labels]]
    mean, std = reference_statistics(train.numpy(), normalization)
    for pool, loader in ((images, data.val_dataloader()), (test_images, data.test_dataloader())):
        for label, output in by_label(received(data, loader)).items():
            expected = (pool[label].numpy() / 255 - mean) / std
            np.testing.assert_allclose(output.numpy(), expected, rtol=0, atol=2e-6)


def test_crops_and_flips_are_uniform():
    views = draw_views(162 * 400, padding=4, horizontal_flip=True, seed=0, epoch=0)
    counts = views.bincount(minlength=162).double()
    assert len(counts) == 162
    # Chi-square with 161 degrees of freedom: mean 161, standard deviation 17.9.
    assert 90 < ((counts - 400) ** 2 / 400).sum() < 250
    assert draw_views(1000, padding=4, horizontal_flip=False, seed=0, epoch=0).max() == 80


def test_few_kernels_make_what_few_bytes_make():
    """A GPU blends in one way, and a CPU in the other."""
    data = ready()
    for images, _, views in data.train_epoch(epoch=3):
        of_bytes = data.transform(images, views)
        shown = data.transform._show(images, views)
        of_kernels = data.transform.blend_in_few_kernels(shown, views)
        assert torch.equal(of_kernels, of_bytes)
        assert torch.equal(of_kernels.signbit(), of_bytes.signbit())
        assert of_kernels.is_contiguous()


def test_a_training_batch_of_bytes_takes_eight_kernels_of_a_gpu(monkeypatch):
    data = ready(batch_size=7)
    monkeypatch.setattr(data.transform, "blend_in_few_bytes", data.transform.blend_in_few_kernels)
    batches = data.train_epoch(epoch=0)
    data.on_after_batch_transfer(next(batches), 0)  # what a transform does once
    batch = next(batches)  # chosen by the host
    with KernelCount() as kernels:
        data.on_after_batch_transfer(batch, 0)
    assert kernels.names.total() <= 8


def test_without_augmentation_training_images_are_as_stored():
    data = ready(crop_padding=0, horizontal_flip=False, val_size=0, normalization="scale")
    (images, _), _ = data.read(False)
    for label, image in by_label(received(data, data.train_dataloader())).items():
        torch.testing.assert_close(image, images[label] / 255)


def test_an_image_is_augmented_alike_in_batches_of_any_size():
    views = []
    for batch_size in (1, 7, 47):
        data = ready(batch_size=batch_size, epoch=5)
        views.append(by_label(received(data, data.train_dataloader())))
    assert len(views[0]) == 47
    for other in views[1:]:
        assert all(torch.equal(other[label], image) for label, image in views[0].items())


def test_order_and_augmentation_are_functions_of_seed_and_epoch():
    def epoch_of(**place):
        data = ready(**place)
        batches = received(data, data.train_dataloader())
        return torch.cat([labels for _, labels in batches]).tolist(), by_label(batches)

    order, images = epoch_of(epoch=2)
    for place, same in (({}, True), ({"epoch": 3}, False), ({"seed": 1}, False)):
        other_order, other_images = epoch_of(**({"epoch": 2} | place))
        assert (other_order == order) == same
        assert all(torch.equal(other_images[label], images[label]) for label in images) == same


@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_the_batches_of_one_process(drop_last):
    single = ready(batch_size=10, epoch=1, drop_last=drop_last)
    ranks = [
        ready(rank, 2, epoch=1, batch_size=5, drop_last=drop_last, crop_padding=2)
        for rank in range(2)
    ]
    whole = received(single, single.train_dataloader())
    parts = [received(data, data.train_dataloader()) for data in ranks]
    assert len(whole) == len(parts[0]) == len(parts[1]) == (4 if drop_last else 5)
    assert len(single.train_dataloader()) == len(ranks[0].train_dataloader()) == len(whole)
    for batch, ((images, labels), *halves) in enumerate(zip(whole, *parts, strict=True)):
        last = batch == 4  # 47 = 4 * 10 + 7: the second rank repeats an image of the first batch
        for rank, (some_images, some_labels) in enumerate(halves):
            count = len(labels[rank::2])
            assert len(some_labels) == count + (last and rank == 1)
            assert torch.equal(some_labels[:count], labels[rank::2])
            assert torch.equal(some_images[:count], images[rank::2])
    if not drop_last:
        assert parts[1][-1][1][-1] == whole[0][1][0]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("split", ["val", "test", "predict"])
def test_evaluation_sees_every_image_once(split, world_size):
    seen, names = [], []
    for rank in range(world_size):
        data = ready(rank, world_size, batch_size=4)
        loader = getattr(data, f"{split}_dataloader")()
        batches = list(loader)
        assert len(loader) == len(batches)
        labels = [int(label) for _, labels in batches for label in labels]
        assert split != "predict" or len(data.predict_names) == len(labels)
        seen += labels
        names += data.predict_names
    assert len(seen) == len(set(seen)) == (13 if split == "val" else 11)
    assert len(set(names)) == 11


def test_a_loader_starts_where_the_trainer_is_when_the_first_batch_is_asked_for():
    data = ready()
    everything = [labels for _, labels, _ in data.train_epoch(epoch=4)]
    loader = data.train_dataloader()
    batches = iter(loader)
    data.trainer.current_epoch = 4
    data.trainer.fit_loop.epoch_loop.batch_progress.current.ready = 3
    rest = [labels for _, labels, _ in batches]
    assert len(loader) == len(everything) == 7
    assert len(rest) == 4
    assert all(torch.equal(a, b) for a, b in zip(rest, everything[3:], strict=True))
    # All done: a full epoch again.
    data.trainer.fit_loop.epoch_loop.batch_progress.current.ready = 7
    assert len(list(loader)) == 7


# --- where the images lie -------------------------------------------------------------------------


@pytest.mark.parametrize("room", [True, False])
@pytest.mark.parametrize("augments", [True, False])
@pytest.mark.parametrize("first_batch", [0, 3, 7])
def test_batches_are_chosen_one_by_one_wherever_the_images_lie(
    monkeypatch, room, augments, first_batch
):
    monkeypatch.setattr("datamodules.in_memory.has_room", lambda pools, device: room)
    data = ready(**({} if augments else {"crop_padding": 0, "horizontal_flip": False}))
    (images, labels), (test_images, test_labels) = data.read(False)
    rows = data.split(labels)
    views = draw_views(47, padding=2, horizontal_flip=True, seed=0, epoch=5)
    expected = [
        (images[rows[0][batch]], labels[rows[0][batch]], *([views[batch]] if augments else []))
        for batch in training_batches(47, 7, seed=0, epoch=5)[first_batch:]
    ]
    val = evaluation_batches(13, 4)
    expected += [(images[rows[1][batch]], labels[rows[1][batch]]) for batch in val]
    expected += [(test_images[b], test_labels[b]) for b in evaluation_batches(11, 4)]
    loaders = (data.train_epoch(5, first_batch), data.val_dataloader(), data.test_dataloader())
    batches = [batch for loader in loaders for batch in loader]
    for batch, parts in zip(batches, expected, strict=True):
        assert all(torch.equal(*pair) for pair in zip(batch, parts, strict=True))


def elsewhere(monkeypatch, resident: bool = True) -> Numbered:
    """Trains on the device that has no memory: reading a value back from it raises."""
    monkeypatch.setattr("datamodules.in_memory.has_room", lambda pools, device: True)
    data = ready()
    data.trainer.strategy.root_device = torch.device("meta")
    data.resident = resident
    return data


def test_images_lie_on_the_device_where_batches_stay(monkeypatch):
    data = elsewhere(monkeypatch)
    there, _ = data._pools()
    assert there.images.device.type == "meta"
    for _ in range(2):
        for loader, width in ((data.train_dataloader(), 3), (data.val_dataloader(), 2)):
            for batch in loader:
                assert len(batch) == width
                assert all(values.device.type == "meta" for values in batch)
                images, _ = data.on_after_batch_transfer(batch, 0)
                assert images.device.type == "meta"
    assert data._pools()[0].images is there.images  # moved once


def test_images_stay_with_the_host_where_the_machine_says_so(monkeypatch):
    batches = list(elsewhere(monkeypatch, resident=False).train_dataloader())
    assert all(values.device.type == "cpu" for batch in batches for values in batch)


def test_another_process_gets_no_memory_of_a_device(monkeypatch):
    data = elsewhere(monkeypatch)
    data._pools()
    assert data._placed
    again = pickle.loads(pickle.dumps(data))
    assert not again._placed
    assert torch.equal(again._train.images, data._train.images)


@pytest.mark.parametrize("chunk", [100, 2**24])
def test_images_and_a_chunk_may_fill_a_quarter_of_the_free_memory_of_a_gpu(monkeypatch, chunk):
    monkeypatch.setattr("datamodules.in_memory.CHUNK", chunk)
    pools = Numbered().read(False)
    needed = 71 * (3 * 6 * 8 + 8) + 10 * min(chunk, NUM_IMAGES * 3 * 6 * 8)
    for free, room in ((4 * needed, True), (4 * needed - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert has_room(pools, torch.device("cuda")) == room
        assert not has_room(pools, torch.device("cpu"))


# --- under a trainer ------------------------------------------------------------------------------


class Recorder(LightningModule):
    """Writes down every training batch that it receives."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        images, labels = batch
        self.seen.append((self.current_epoch, batch_idx, labels.tolist(), images.sum().item()))
        return self.weight * images.mean()

    def validation_step(self, batch, batch_idx):
        pass

    def predict_step(self, batch, batch_idx):
        return batch[1]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(folder, callbacks=(), **changes) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        accelerator="cpu",
        max_epochs=3,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        enable_checkpointing=bool(callbacks),
        **quiet,
        **changes,
    )


MOMENTS = {
    "step": {"every_n_train_steps": 1},
    "validation": {"every_n_epochs": 1, "save_on_train_epoch_end": False},
    "epoch": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
}


WITH_VALIDATION = [
    (13, {}, 7),
    (13, {"limit_train_batches": 4}, 4),
    (13, {"val_check_interval": 3}, 7),
]
WITHOUT_VALIDATION = (0, {}, 9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("moment", "val_size", "how", "num_batches"),
    [(moment, *case) for moment in MOMENTS for case in WITH_VALIDATION]
    + [(moment, *WITHOUT_VALIDATION) for moment in ("step", "epoch")],
)
def test_a_resumed_trainer_sees_what_it_would_have_seen(
    tmp_path, moment, val_size, how, num_batches
):
    keep = ModelCheckpoint(tmp_path / "kept", "{step}-", save_top_k=-1, **MOMENTS[moment])
    uninterrupted = Recorder()
    trainer(tmp_path, [keep], **how).fit(uninterrupted, datamodule=Numbered(val_size=val_size))
    assert len(uninterrupted.seen) == 3 * num_batches

    checkpoints = list((tmp_path / "kept").glob("*.ckpt"))
    assert len(checkpoints) >= 3
    for path in checkpoints:
        step = int(path.stem.removeprefix("step=").split("-")[0])
        resumed = Recorder()
        data = Numbered(val_size=val_size)
        trainer(tmp_path, **how).fit(resumed, datamodule=data, ckpt_path=path)
        assert resumed.seen == uninterrupted.seen[step:], path.name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("amount", [2, 0.3])
def test_a_trainer_that_overfits_sees_the_same_images_in_every_epoch(tmp_path, amount):
    keep = ModelCheckpoint(tmp_path / "kept", "{step}", save_top_k=-1, every_n_train_steps=1)
    model = Recorder()
    trainer(tmp_path, [keep], overfit_batches=amount).fit(model, datamodule=Numbered())
    labels = [[row[2] for row in model.seen if row[0] == epoch] for epoch in range(3)]
    assert len(labels[0]) == 2
    assert labels[0] == labels[1] == labels[2]
    assert len({row[3] for row in model.seen}) == 6  # augmented anew
    resumed = Recorder()
    again = trainer(tmp_path, overfit_batches=amount)
    again.fit(resumed, datamodule=Numbered(), ckpt_path=tmp_path / "kept" / "step=3.ckpt")
    assert resumed.seen == model.seen[3:]


def test_predict_gives_every_image_and_its_name():
    data = Numbered()
    outputs = trainer(None).predict(Recorder(), datamodule=data)
    assert torch.cat(outputs).tolist() == list(range(11))
    assert len(data.predict_names) == 11


def test_data_is_read_once():
    data = Numbered()
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    assert data.num_reads == 1


def test_the_split_depends_on_the_split_seed_alone():
    def split(**changes):
        data = ready(**changes)
        train = sorted(int(label) for _, labels, _ in data.train_dataloader() for label in labels)
        val = sorted(int(label) for _, labels in data.val_dataloader() for label in labels)
        return train, val

    train, val = split()
    assert len(train) == 47
    assert sorted(train + val) == list(range(NUM_IMAGES))
    assert split(seed=5, batch_size=3) == (train, val)
    assert split(split_seed=1) != (train, val)
    assert ready(val_size=0).val_dataloader() == []


def test_statistics_come_from_the_training_split_alone():
    data = ready(normalization="pixel_mean_scalar_std")
    held_out = [int(label) for _, labels in data.val_dataloader() for label in labels]
    read = data.read

    def with_other_validation_images(download):
        train, test = read(download)
        train.images[held_out] = 255
        return train, LabelledImages(test.images * 0, test.labels)

    other = Numbered(normalization="pixel_mean_scalar_std")
    other.read = with_other_validation_images
    other.setup("fit")
    assert torch.equal(other.transform.shift, data.transform.shift)
    assert torch.equal(other.transform.scale, data.transform.scale)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0: give a whole number from 1"),
        ({"eval_batch_size": -1}, "eval_batch_size is -1: give a whole number from 1"),
        ({"val_size": -1}, "val_size is -1: give"),
        ({"val_size": NUM_IMAGES}, "val_size is 60 of 60 training images: lower it"),
        ({"crop_padding": -1}, "crop_padding is -1: give"),
        ({"crop_padding": 6}, "crop_padding is 6: give 0 to 5 pixels"),
        ({"normalization": "whitening"}, "'whitening': give pixel_mean, "),
        (
            {"batch_size": 48},
            "there are 47 training images; batch_size times",
        ),
    ],
)
def test_arguments_out_of_range_are_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        ready(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images, labels: (images[:40], labels), "have 40 images and 60 labels: get"),
        (lambda images, labels: (images[:0], labels[:0]), "have 0 images and 0 labels: get"),
        (
            lambda images, labels: (images[:, :1], labels),
            r"of \(1, 6, 8\) with labels of \(\), not",
        ),
        (lambda images, labels: (images, labels[:, None]), r"with labels of \(1,\), not of \(3, 6"),
        (lambda images, labels: (images, labels + 1), "labels from 1 to 60, but 60 classes count"),
        (lambda images, labels: (images, labels - 1), "labels from -1 to 58, but 60 classes"),
    ],
)
@pytest.mark.parametrize("part", ["training", "test"])
def test_data_that_are_not_as_declared_are_refused_in_one_line(change, message, part):
    class Wrong(Numbered):
        def read(self, download):
            good, _ = super().read(download)
            wrong = LabelledImages(*change(*good))
            return (wrong, good) if part == "training" else (good, wrong)

    with pytest.raises(ValueError, match=f"^the {part} data of Wrong .*{message}") as caught:
        Wrong().setup("fit")
    assert "\n" not in str(caught.value)


def test_a_step_of_all_ranks_may_not_ask_for_more_than_there_is():
    with pytest.raises(ValueError, match=r"asks for 60 of them in every step"):
        ready(0, 2, batch_size=30)
