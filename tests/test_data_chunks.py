"""Training batches that are slices of chunks, as where a data set lies on a GPU.

Here they lie on the CPU, and `makes_chunks` is told to say that they are made.
"""

from types import SimpleNamespace

import pytest
import torch
from kernel_count import KernelCount
from pytorch_lightning.callbacks import ModelCheckpoint
from test_datamodules import Numbered, Recorder, elsewhere, ready, received, trainer
from torch.multiprocessing.reductions import StorageWeakRef

from callbacks.bn_recalibration import training_images
from datamodules.in_memory import ON_THE_WAY

NUM_VALUES = 3 * 6 * 8
"""Of an image."""
BATCH = 7 * NUM_VALUES
"""Of a batch."""
PLAIN = {"crop_padding": 0, "horizontal_flip": False}


@pytest.fixture
def in_chunks(monkeypatch):
    """Makes training images by the chunk from now on, of so many values."""

    def start(size: int = 3 * BATCH) -> None:
        monkeypatch.setattr("datamodules.in_memory.CHUNK", size)
        monkeypatch.setattr(Numbered, "makes_chunks", lambda data, train: True)

    return start


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        for values, expected in zip(batch, other, strict=True):
            assert values.dtype == expected.dtype
            assert values.stride() == expected.stride()
            assert torch.equal(values, expected)


@pytest.mark.parametrize("size", [1, 3 * BATCH, 4 * BATCH - 1, 1000 * BATCH])
@pytest.mark.parametrize("first_batch", [0, 2, 6, 7])
@pytest.mark.parametrize(
    "changes", [{}, {"random_erasing": 0.5}, PLAIN, PLAIN | {"random_erasing": 0.5}]
)
def test_chunks_have_the_bits_of_single_batches(in_chunks, changes, first_batch, size):
    data = ready(**changes)
    expected = received(data, data.train_epoch(3, first_batch))
    assert [len(labels) for _, labels in expected] == [7, 7, 7, 7, 7, 7, 5][first_batch:]
    in_chunks(size)
    batches = list(data.train_epoch(3, first_batch))
    assert_same(batches, expected)
    assert all(images.dtype == torch.float32 for images, _ in batches)
    for batch, same in zip(batches, received(data, batches), strict=True):
        assert same is batch


def test_chunks_have_the_bits_of_single_batches_in_the_way_of_a_gpu(in_chunks, monkeypatch):
    data = ready(random_erasing=0.5)
    expected = received(data, data.train_epoch(3))
    monkeypatch.setattr(data.transform, "blend_in_few_bytes", data.transform.blend_in_few_kernels)
    in_chunks()
    batches = list(data.train_epoch(3))
    assert_same(batches, expected)
    chunks = {images.untyped_storage().data_ptr(): images for images, _ in batches}.values()
    # A chunk takes the memory of its images, and of nothing else.
    assert [len(images.untyped_storage()) for images in chunks] == [
        4 * 21 * NUM_VALUES,
        4 * 21 * NUM_VALUES,
        4 * 5 * NUM_VALUES,
    ]


@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_have_chunks_of_their_own(in_chunks, drop_last):
    ranks = [ready(rank, 2, epoch=3, drop_last=drop_last) for rank in range(2)]
    expected = [received(data, data.train_dataloader()) for data in ranks]
    in_chunks()
    for data, batches in zip(ranks, expected, strict=True):
        assert len(batches) == (3 if drop_last else 4)
        assert_same(data.train_dataloader(), batches)


def test_a_batch_within_a_chunk_computes_nothing(in_chunks):
    in_chunks()
    data = ready(random_erasing=0.5)
    loader = iter(data.train_dataloader())
    counts = []
    for _ in range(7):
        with KernelCount() as kernels:
            data.on_after_batch_transfer(next(loader), 0)
        counts.append(kernels.names.total())
        assert kernels.names.keys() >= {"aten::detach"}  # it counts what is done here
    assert counts[0] > 5
    assert counts[3] > 5
    assert counts[1:3] == counts[4:6] == [0, 0]


def test_evaluation_and_images_that_are_not_on_a_gpu_stay_bytes(in_chunks, monkeypatch):
    in_chunks()
    data = ready()
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert all(images.dtype == torch.uint8 for images, _ in loader)
    monkeypatch.undo()
    assert not data.makes_chunks(data._pools()[0])
    assert all(batch[0].dtype == torch.uint8 for batch in data.train_dataloader())


@pytest.mark.parametrize("name", ON_THE_WAY)
def test_a_method_that_may_change_batches_gets_single_ones_of_bytes(name):
    class Own(Numbered):
        pass

    on_gpu = SimpleNamespace(images=SimpleNamespace(is_cuda=True))
    assert Own().makes_chunks(on_gpu)
    setattr(Own, name, lambda self, batch, *others: getattr(Numbered, name)(self, batch, *others))
    assert not Own().makes_chunks(on_gpu)


def test_chunks_are_made_where_the_images_lie_and_read_nothing_back(in_chunks, monkeypatch):
    """That device has no memory: reading a value back from it raises."""
    in_chunks()
    data = elsewhere(monkeypatch)
    batches = list(data.train_dataloader())
    assert len(batches) == 7
    assert all(values.device.type == "meta" for batch in batches for values in batch)
    assert data.transform.shift.device.type == "meta"


def test_a_chunk_is_given_up_before_the_next_is_made(in_chunks, monkeypatch):
    in_chunks()
    data = ready(random_erasing=0.5)
    given, made = [], []
    finish, transform = data.finish, data.transform.forward

    def watched_transform(images, views):
        assert all(chunk.expired() for chunk in given + made)
        given.append(StorageWeakRef(images.untyped_storage()))
        return transform(images, views)

    def watched_finish(chunk):
        images, labels = finish(chunk)
        made.append(StorageWeakRef(images.untyped_storage()))
        return images, labels

    monkeypatch.setattr(data.transform, "forward", watched_transform)
    monkeypatch.setattr(data, "finish", watched_finish)
    batches = data.train_epoch(0)
    for _ in range(7):
        images, _ = next(batches)
        assert [chunk.expired() for chunk in made].count(False) == 1
        assert all(chunk.expired() for chunk in given)  # bytes
        del images
    assert len(made) == 3
    assert not list(batches)
    assert made[-1].expired()


def test_a_step_that_changes_its_images_changes_no_others(in_chunks):
    data = ready()
    expected = received(data, data.train_epoch(0))
    in_chunks()
    weight = torch.ones((), requires_grad=True)
    for batch, (images, _) in zip(data.train_epoch(0), expected, strict=True):
        assert_same([batch[:1]], [(images,)])
        batch[0].mul_(weight).sum().backward()
        batch[0].detach().zero_()
        weight.data.add_(1)


@pytest.mark.parametrize("num_images", [3, 20, 1000])
def test_recalibration_gets_the_images_of_single_batches(in_chunks, num_images):
    data = ready(epoch=2)
    place = SimpleNamespace(datamodule=data, current_epoch=2, world_size=1)
    expected = list(training_images(place, torch.device("cpu"), num_images))
    in_chunks()
    images = list(training_images(place, torch.device("cpu"), num_images))
    assert_same([images], [expected])
    assert sum(map(len, images)) == min(num_images, 47)


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_that_resumes_within_a_chunk_sees_what_single_batches_hold(tmp_path, in_chunks):
    whole = Recorder()
    keep = ModelCheckpoint(tmp_path / "kept", "{step}", save_top_k=-1, every_n_train_steps=1)
    trainer(tmp_path, [keep]).fit(whole, datamodule=Numbered(random_erasing=0.5))
    assert len(whole.seen) == 21
    in_chunks()
    for step in (1, 4, 6, 7, 15):
        path = tmp_path / "kept" / f"step={step}.ckpt"
        resumed = Recorder()
        trainer(tmp_path).fit(resumed, datamodule=Numbered(random_erasing=0.5), ckpt_path=path)
        assert resumed.seen == whole.seen[step:]


def test_recalibration_gets_what_the_data_module_does_before_a_transfer(monkeypatch):
    data = ready(epoch=2, **PLAIN)
    place = SimpleNamespace(datamodule=data, current_epoch=2, world_size=1)
    (images, *_) = training_images(place, torch.device("cpu"), 7)

    def inverted(batch, dataloader_idx):
        return [255 - batch[0], *batch[1:]]

    monkeypatch.setattr(data, "on_before_batch_transfer", inverted)
    (others, *_) = training_images(place, torch.device("cpu"), 7)
    scale, shift = data.transform.scale, data.transform.shift
    torch.testing.assert_close(others, 255 * scale + 2 * shift - images)


def test_floats_that_lost_their_type_are_refused():
    """They may be normalised already: somebody on the way has made a tuple of a finished batch."""
    data = ready()
    images, labels = next(iter(received(data, data.train_epoch(0))))
    with pytest.raises(ValueError, match="float32 and not `Finished`: give bytes"):
        data.on_after_batch_transfer((images, labels), 0)
