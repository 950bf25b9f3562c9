"""Leaving early over many images, and with one image recorded, against `early_exit` itself."""

import math
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import METHODS, build, config
from torch import Tensor
from torch.utils import _pytree as pytree

from networks import (
    BranchyAlexNet,
    BranchyLeNet,
    CifarResNet,
    EarlyExit,
    ExitStream,
    MSDNet,
    ResNetWithExits,
    early_exit,
    early_exit_stream,
    exit_score,
    exit_stream,
    join_answers,
    recalibrate,
    recorded_exits,
)
from networks.captured import Recorder
from networks.exit_queue import Queue
from networks.recorded_exits import NetworkWatch, modules_of
from networks.watch import Watch

properties = settings(deadline=None, derandomize=True, database=None, max_examples=60)
CRITERIA = ["entropy", "confidence"]
WITH_EXITS = [name for name in METHODS if "ExitStatistics" in str(config(name))]
NETWORKS = {
    "LeNet": (BranchyLeNet, (1, 28, 28)),
    "AlexNet": (BranchyAlexNet, (3, 32, 32)),
    "ResNet": (lambda: ResNetWithExits(CifarResNet(8), [0, 2]), (3, 16, 16)),
    "MSDNet": (
        lambda: MSDNet(4, base=2, step=1, num_channels=4, growth_rate=4, lazy=True),
        (3, 32, 32),
    ),
}


@pytest.fixture(params=[False, True], ids=["", "padded"])
def padded(request, monkeypatch) -> bool:
    """As on a CPU; and with batches that are filled up and a host that learns late, as on a GPU."""
    if request.param:
        act_as_gpu(monkeypatch)
    return request.param


def act_as_gpu(monkeypatch) -> None:
    start = ExitStream._start

    def start_with_runs_under_way(stream, images):
        start(stream, images)
        stream._max_runs = exit_stream.MAX_RUNS
        stream._queues.clear()
        stream._add_queue(images)

    make_queue = Queue.__init__

    def make_queue_that_asks_nobody(queue, *arguments):
        make_queue(queue, *arguments)
        queue._asks = False
        pytree.tree_map_only(Tensor, Tensor.zero_, queue._leaves)

    monkeypatch.setattr(Queue, "__init__", make_queue_that_asks_nobody)
    monkeypatch.setattr(ExitStream, "_start", start_with_runs_under_way)
    monkeypatch.setattr(ExitStream, "_pads", property(lambda stream: stream._records))


def thresholds_of(network, images: Tensor, criterion: str) -> list[float]:
    """Returns thresholds at which some images leave at each exit, and none is near."""
    thresholds, left = [], images
    for index in range(len(network.exits) - 1):
        scores = exit_score(run_to(network, index, left), criterion).sort().values
        middle = len(scores) // 2
        thresholds.append((scores[middle - 1] + scores[middle]).item() / 2)
        scores = exit_score(run_to(network, index, left), criterion)
        left = left[scores >= thresholds[-1] if criterion == "entropy" else scores < thresholds[-1]]
    return thresholds


@torch.no_grad()
def run_to(network, index: int, images: Tensor) -> Tensor:
    for stage in network.stages[: index + 1]:
        images = stage(images)
    return network.exits[index](images)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_answers_as_when_a_batch_leaves_early(name, criterion, memory_format, padded):
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    network = make().double().to(memory_format=memory_format).eval()
    images = torch.randn(29, *shape, dtype=torch.float64).to(memory_format=memory_format)
    thresholds = thresholds_of(network, images, criterion)
    ends = [math.inf] * len(thresholds), [-math.inf] * len(thresholds)
    for limits, *all_sizes in (
        (thresholds, [29], [1] * 29, [20, 3, 0, 6]),
        (ends[0], [8] * 3 + [5]),
        (ends[1], [17, 12]),
    ):
        expected = early_exit(network, images, limits, criterion)
        assert limits in ends or len(expected.exit_index.unique()) == len(network.exits)
        for sizes in all_sizes:
            batches = images.split(sizes)
            answers = list(
                early_exit_stream(network, batches, limits, criterion, 8, capture="graphs")
            )
            assert [len(each.logits) for each in answers] == sizes
            logits, taken = join_answers(answers)
            assert torch.equal(taken, expected.exit_index)
            torch.testing.assert_close(logits, expected.logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", WITH_EXITS)
def test_networks_of_the_methods(method: str) -> None:
    network = build(METHODS[method]["init_args"]["net"]).double().eval()
    images = torch.randn(40, 1, 32, 32, dtype=torch.float64)
    recalibrate(network, [images])
    thresholds = thresholds_of(network, images, "confidence")
    expected = early_exit(network, images, thresholds, "confidence")
    parts = list(early_exit_stream(network, images.split(7), thresholds, "confidence", 16))
    one = EarlyExit(network, thresholds, "confidence")
    for answers in (join_answers(parts), join_answers([one(image) for image in images.split(1)])):
        assert torch.equal(answers.exit_index, expected.exit_index)
        torch.testing.assert_close(answers.logits, expected.logits, rtol=1e-12, atol=1e-12)


# --- A network whose logits are written in the images: every number is exact ---


class Witness:
    """Stages change the sign of all tensors of the state, exits take it back."""

    def __init__(self, num_exits: int, num_classes: int, kind: str = "tensor"):
        self.num_classes, self.kind = num_classes, kind
        self.stages = [partial(self.stage, index) for index in range(num_exits)]
        self.exits = [partial(self.exit, index) for index in range(num_exits)]
        self.sizes: list[list[int]] = [[] for _ in range(num_exits)]

    def stage(self, index: int, state):
        state = self.pack(state) if index == 0 else state
        self.sizes[index].append(len(self.images(state)))
        return pytree.tree_map_only(Tensor, torch.neg, state)

    def exit(self, index: int, state) -> Tensor:
        images = self.images(state)
        for leaf in pytree.tree_leaves(state):  # rows of all tensors stay together
            if isinstance(leaf, Tensor) and leaf.dim() != 4:
                assert torch.equal(leaf.flatten(), images[:, 0, 1, 1])
        logits = images[:, :, 0, 0] * (-1) ** (index + 1)
        return logits[:, index * self.num_classes : (index + 1) * self.num_classes]

    def pack(self, images: Tensor):
        names = images[:, 0, 1, 1]
        nested = {"a": [names, (names[:, None, None], "no tensor")], "b": {"images": images}}
        return {"tensor": images, "tuple": (images, names), "nested": nested}[self.kind]

    def images(self, state) -> Tensor:
        leaves = pytree.tree_leaves(state)
        return next(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() == 4)


def write_images(logits: Tensor) -> Tensor:
    images = logits.new_zeros(len(logits), logits[0].numel(), 2, 2)
    images[:, :, 0, 0] = logits.flatten(1)
    images[:, 0, 1, 1] = torch.arange(1, len(logits) + 1).to(images)
    return images


@st.composite
def cases(draw):
    num_images, num_exits = draw(st.integers(1, 60)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    scale = draw(st.sampled_from([1, 2, 5]))
    logits = torch.randn(num_images, num_exits, 3, generator=generator) * scale
    criterion = draw(st.sampled_from(CRITERIA))
    thresholds = []
    for index in range(num_exits - 1):
        scores = exit_score(logits[:, index], criterion).tolist()
        ends = [math.inf, -math.inf, 0.5]
        thresholds.append(draw(st.sampled_from([*scores[:9], *ends])))
    cuts = sorted(draw(st.lists(st.integers(0, num_images), max_size=12)))
    return logits, criterion, thresholds, cuts


@pytest.mark.parametrize("acts_as_gpu", [False, True])
@given(
    case=cases(),
    kind=st.sampled_from(["tensor", "tuple", "nested"]),
    batch_size=st.integers(1, 12),
    window=st.sampled_from([2, 3, 64]),
    memory_format=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
@properties
def test_bits_and_order(acts_as_gpu, case, kind, batch_size, window, memory_format):
    logits, criterion, thresholds, cuts = case
    images = write_images(logits).to(memory_format=memory_format)
    before = images.clone()
    shape = logits.shape[1:]
    batches = images.tensor_split(cuts)
    expected = early_exit(Witness(*shape, kind), images, thresholds, criterion)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exit_stream, "WINDOW", window)
        if acts_as_gpu:
            act_as_gpu(patch)
        network = Witness(*shape, kind)
        answers = list(
            early_exit_stream(network, batches, thresholds, criterion, batch_size, "graphs")
        )
    assert [len(each.exit_index) for each in answers] == [len(batch) for batch in batches]
    logits, taken = join_answers(answers)
    assert torch.equal(taken, expected.exit_index)
    assert torch.equal(logits, expected.logits)
    assert torch.equal(images, before)
    for index, inside in enumerate(network.sizes):
        wanted = int((taken >= index).sum())
        assert max(inside, default=0) <= batch_size
        if not acts_as_gpu:
            assert sum(inside) == wanted  # nobody is computed in vain, or twice
            smaller = [size for size in inside if size < batch_size]
            assert window < 64 or len(smaller) <= 1


def test_no_images() -> None:
    images = write_images(torch.randn(5, 2, 3))
    assert list(early_exit_stream(Witness(2, 3), [], [0.5])) == []
    for batches, sizes in (([images[:0]], [0]), ([images[:0], images[:0]], [0, 0])):
        answers = list(early_exit_stream(Witness(2, 3), batches, [0.5]))
        assert [tuple(each.logits.shape) for each in answers] == [(size, 3) for size in sizes]
    batches = [images[:0], images, images[:0]]
    answers = list(early_exit_stream(Witness(2, 3), batches, [0.5]))
    assert [len(each.exit_index) for each in answers] == [0, 5, 0]
    assert ExitStream(Witness(2, 3), [0.5]).finish() is None


def test_a_stream_can_be_used_again(padded) -> None:
    logits = torch.randn(21, 3, 2)
    images = write_images(logits)
    expected = early_exit(Witness(3, 2), images, [0.4, 0.6])
    stream = ExitStream(Witness(3, 2), [0.4, 0.6], batch_size=4, capture="graphs")
    for _ in range(3):
        parts = [stream.push(batch) for batch in images.split(5)] + [stream.finish()]
        answers = join_answers([part for part in parts if part is not None])
        assert torch.equal(answers.exit_index, expected.exit_index)
        assert torch.equal(answers.logits, expected.logits)


def test_answers_are_not_kept_back_for_ever(padded, monkeypatch) -> None:
    """Not even behind an image that waits for a batch which never fills."""
    monkeypatch.setattr(exit_stream, "WINDOW", 4)
    logits = torch.zeros(400, 2, 3)
    logits[1:, 0, 0] = 100  # all others leave at once
    network = Witness(2, 3)
    num_pushed = num_known = 0

    def batches():
        nonlocal num_pushed
        for batch in write_images(logits).split(7):
            assert num_pushed - num_known <= 4 * 8 + 7
            num_pushed += len(batch)
            yield batch

    for answers in early_exit_stream(network, batches(), [0.5], batch_size=8, capture="graphs"):
        num_known += len(answers.exit_index)
    assert num_known == 400


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("batch_size", [4, 64])
def test_logits_that_are_not_finite(poison: float, batch_size: int, padded) -> None:
    """At the last exit they are refused; elsewhere such an image goes on."""
    logits = torch.zeros(30, 3, 2)
    logits[:, :, 0] = 9
    logits[7, 0, 1] = logits[9, :2, 1] = poison
    images, limits = write_images(logits), [0.5, 0.5]
    expected = early_exit(Witness(3, 2), images, limits)
    assert sorted(expected.exit_index.tolist()) == [0] * 28 + [1, 2]
    arguments = {"batch_size": batch_size, "capture": "graphs"}
    (answers,) = early_exit_stream(Witness(3, 2), [images], limits, **arguments)
    assert torch.equal(answers.exit_index, expected.exit_index)
    assert torch.equal(answers.logits, expected.logits)
    logits[9] = poison
    with pytest.raises(
        FloatingPointError, match=r"1 of \d+ images have logits that are not finite"
    ):
        list(early_exit_stream(Witness(3, 2), [write_images(logits)], limits, **arguments))


def test_bad_input_is_refused_before_anything_runs() -> None:
    network, images = Witness(2, 3), write_images(torch.randn(5, 2, 3))
    for arguments, message in (
        ({"thresholds": [0.5, 0.5]}, "2 exit thresholds for 2 exits: give 1"),
        ({"criterion": "margin"}, "is 'margin': give entropy or confidence"),
        ({"capture": "all"}, "is 'all': give none"),
    ):
        with pytest.raises(ValueError, match=message):
            early_exit_stream(network, [images], **{"thresholds": [0.5], **arguments})
        with pytest.raises(ValueError, match=message):
            EarlyExit(network, **{"thresholds": [0.5], **arguments})
    with pytest.raises(ValueError, match="a batch size of 0: give a whole number, 1 or more"):
        early_exit_stream(network, [images], [0.5], batch_size=0)
    assert network.sizes == [[], []]


@pytest.mark.parametrize("other", [torch.zeros(2, 1, 2, 2), torch.zeros(2, 6, 2, 2).double()])
def test_images_unlike_those_before_are_refused(other: Tensor) -> None:
    """Copied into a queue, they would be broadcast and rounded in silence."""
    stream = ExitStream(Witness(2, 3), [0.5])
    stream.push(write_images(torch.randn(5, 2, 3)))
    with pytest.raises(ValueError, match="give all batches of a stream alike"):
        stream.push(other)


@pytest.mark.parametrize("make", [EarlyExit, ExitStream])
def test_a_network_in_training_mode_is_refused(make) -> None:
    network = ResNetWithExits(CifarResNet(8), [1])
    answer = make(network, [0.5], capture="graphs")
    answer = answer.push if make is ExitStream else answer
    with pytest.raises(ValueError, match=r"call network.eval\(\)"):
        answer(torch.randn(1, 3, 8, 8))


def test_autocast_is_respected() -> None:
    torch.manual_seed(0)
    network = ResNetWithExits(CifarResNet(8), [0, 2]).eval()
    images = torch.randn(24, 3, 16, 16)
    one = EarlyExit(network, [2.2, 2.2])
    plain = join_answers([one(image) for image in images.split(1)])
    with torch.autocast("cpu", torch.bfloat16):
        expected = early_exit(network, images, [2.2, 2.2])
        (answers,) = early_exit_stream(network, [images], [2.2, 2.2], batch_size=8)
        ones = join_answers([one(image) for image in images.split(1)])
    assert answers.logits.dtype == ones.logits.dtype == expected.logits.dtype == torch.bfloat16
    assert plain.logits.dtype == torch.float32
    for got in (answers, ones):
        torch.testing.assert_close(got.logits, expected.logits, rtol=0.05, atol=0.05)


# --- One image ---


@given(case=cases(), kind=st.sampled_from(["tensor", "tuple", "nested"]))
@properties
def test_one_image_at_a_time_has_the_bits_of_early_exit(case, kind) -> None:
    logits, criterion, thresholds, _ = case
    images, network = write_images(logits), Witness(*logits.shape[1:], kind)
    one = EarlyExit(network, thresholds, criterion)
    one(images[:1])
    assert one.is_recorded
    network.sizes = [[] for _ in network.sizes]
    for image in images.split(1):
        expected = early_exit(Witness(*logits.shape[1:], kind), image, thresholds, criterion)
        answers = one(image)
        assert torch.equal(answers.logits, expected.logits)
        assert torch.equal(answers.exit_index, expected.exit_index)
        assert answers.exit_index.dtype == torch.int64
    expected = early_exit(Witness(*logits.shape[1:], kind), images, thresholds, criterion)
    for index, sizes in enumerate(network.sizes):  # and no stage runs for who has left
        assert len(sizes) == (expected.exit_index >= index).sum()
    for actual, wanted in zip(one(images), expected, strict=True):  # more images at once
        assert torch.equal(actual, wanted)


def test_one_image_that_is_not_finite_is_refused() -> None:
    one = EarlyExit(Witness(2, 3), [0.5])
    with pytest.raises(FloatingPointError, match="1 of 1 images have logits that are not finite"):
        one(write_images(torch.full((1, 2, 3), math.nan)))


# --- What cannot be recorded ---


class FailingRecorder(Recorder):
    """Says that it records, as on a GPU, and fails as one without memory does."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.num_tries = 0

    def record(self, function):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")


@pytest.mark.parametrize("make", [EarlyExit, ExitStream])
def test_without_memory_it_runs_eagerly_and_says_so_once(make, monkeypatch) -> None:
    for module in (exit_stream, recorded_exits):
        monkeypatch.setattr(module, "Recorder", FailingRecorder)
    images = write_images(torch.randn(9, 2, 3))
    expected = early_exit(Witness(2, 3), images, [0.5])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if make is ExitStream:
            answers = list(
                early_exit_stream(Witness(2, 3), [images], [0.5], batch_size=2, capture="graphs")
            )
        else:
            one = EarlyExit(Witness(2, 3), [0.5])
            answers = [one(image) for image in images.split(1)]
    assert torch.equal(join_answers(answers).logits, expected.logits)
    (warning,) = caught
    assert "runs kernel by kernel: CUDA out of memory. Tried to alloc" in str(warning.message)


@pytest.mark.parametrize("make", [EarlyExit, ExitStream])
def test_hooks_are_not_left_out(make) -> None:
    network = ResNetWithExits(CifarResNet(8), [1]).eval()
    seen = []
    network.trunk.conv1.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="it has hooks, which a recording would leave out"):
        answer = make(network, [-math.inf], capture="graphs")
    for image in torch.randn(3, 3, 8, 8).split(1):
        (answer.push if make is ExitStream else answer)(image)
    if make is ExitStream:
        answer.finish()
    assert len(seen) == (1 if make is ExitStream else 3)
    assert make is ExitStream or not answer.is_recorded


def test_parameters_that_move_are_noticed() -> None:
    network = ResNetWithExits(CifarResNet(8), [1]).eval()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    watch = NetworkWatch(modules_of(network))
    network.load_state_dict(state)
    network.trunk.conv1.weight.data.mul_(2)
    assert not watch.has_changed()  # new values where the old ones were
    for move in (
        lambda: network.load_state_dict(state, assign=True),
        lambda: network.double(),
        lambda: setattr(network.trunk.bn1, "running_mean", torch.zeros(16)),
        lambda: setattr(network.trunk, "fc", torch.nn.Linear(64, 10)),
        lambda: setattr(network.trunk.conv1, "first_child", torch.nn.ReLU()),
        lambda: setattr(network.early_exits[0][0], "first", torch.nn.Parameter(torch.ones(1))),
        lambda: setattr(network.trunk.bn1, "eps", 0.1),
        lambda: network.trunk.layer2.train(),
        lambda: network.trunk.layer3.register_forward_hook(lambda *_: None),
    ):
        watch = NetworkWatch(modules_of(network))
        move()
        assert watch.has_changed()


def test_stream_that_has_failed_is_over() -> None:
    network = ResNetWithExits(CifarResNet(8), [1]).eval()
    images = torch.randn(6, 3, 8, 8)
    images[2] = torch.nan
    stream = ExitStream(network, [-math.inf], batch_size=2)
    with pytest.raises(FloatingPointError):
        stream.push(images)
    for use in (stream.finish, lambda: stream.push(torch.randn(2, 3, 8, 8))):
        with pytest.raises(ValueError, match="start another one"):
            use()


@pytest.mark.parametrize(
    ("batch", "what"),
    [((torch.zeros(2, 3, 8, 8), torch.zeros(2)), "tuple"), (torch.zeros(3, 8, 8), "\\(3, 8, 8\\)")],
)
def test_what_is_no_batch_is_refused(batch: object, what: str) -> None:
    network = ResNetWithExits(CifarResNet(8), [1]).eval()
    with pytest.raises(ValueError, match=f"{what} is no batch of images: give tensors"):
        list(early_exit_stream(network, [batch], [0.5]))


def test_who_requires_gradients_is_no_matter_of_answers_but_of_training():
    network = BranchyLeNet().eval()
    answers, trains = NetworkWatch(modules_of(network)), Watch(network.modules())
    before = trains.look()
    assert trains.is_as(before)
    network.requires_grad_(False)
    assert not trains.is_as(before)
    assert not answers.has_changed()
    network.train()
    assert answers.has_changed()
