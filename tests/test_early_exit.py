"""Leaving early and finding thresholds, against closed forms, double loops and worked examples."""

import itertools
import math
from fractions import Fraction
from functools import partial

import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import METHODS, build, config
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from networks import (
    CifarResNet,
    MultiExitNetwork,
    ResNetWithExits,
    Staged,
    confidence,
    count_exit_macs,
    early_exit,
    entropy,
    exit_score,
    exits_taken,
    geometric_fractions,
    load_weights,
    recalibrate,
    run_all_exits,
    run_to_exit,
    screen_thresholds,
    thresholds_for_budget,
    thresholds_for_fractions,
)
from networks.early_exit import leaves
from networks.thresholds import CONFIDENCE_GRID, ENTROPY_GRID

properties = settings(deadline=None, derandomize=True, database=None, max_examples=100)
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
CRITERIA = ["entropy", "confidence"]
STATES = ["tensor", "tuple", "list", "dict", "nested"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
SCORE_DTYPES = {  # of the scores of logits
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
}
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize(
    "method", [name for name in METHODS if "ExitStatistics" in str(config(name))]
)
def test_leaving_early_is_a_part_of_the_full_pass(method: str) -> None:
    """Of the network of every method with exits."""
    network = build(METHODS[method]["init_args"]["net"]).eval()
    images = torch.randn(64, 1, 32, 32)
    recalibrate(network, [images])
    every_exit = torch.stack(network(images), 1)
    scores = confidence(every_exit.flatten(0, 1)).view(64, -1)
    thresholds = scores[:, :-1].quantile(0.6, dim=0).tolist()
    answers = early_exit(network, images, thresholds, "confidence")
    assert torch.equal(answers.exit_index, exits_taken(scores, thresholds, "confidence"))
    assert len(answers.exit_index.unique()) == network.num_exits
    expected = every_exit[torch.arange(64), answers.exit_index]
    torch.testing.assert_close(answers.logits, expected, rtol=1e-4, atol=1e-5)


# --- A network whose logits are written in the images, and which remembers whom it saw ---


class Witness:
    """Every number it computes is exact, so results can be compared bit for bit.

    Stages change the sign of all tensors of the state, exits take it back. Every image carries a
    number, in tensors of different rank, so that an exit sees rows that went astray.
    """

    def __init__(self, num_exits: int, num_classes: int, kind: str = "tensor"):
        self.num_classes, self.kind = num_classes, kind
        self.stages = [partial(self.stage, index) for index in range(num_exits)]
        self.exits = [partial(self.exit, index) for index in range(num_exits)]
        self.received, self.handed_on, self.asked = [], [], []

    def stage(self, index: int, state):
        assert index == len(self.received), "a stage ran twice, or was left out"
        self.received.append(state)
        state = self.pack(state) if index == 0 else state
        state = pytree.tree_map_only(Tensor, torch.neg, state)
        self.handed_on.append(state)
        return state

    def exit(self, index: int, state) -> Tensor:
        assert state is self.handed_on[-1]
        self.asked.append(sorted(self.names(state)))
        logits = self.images(state)[:, :, 0, 0] * (-1) ** (index + 1)
        return logits[:, index * self.num_classes : (index + 1) * self.num_classes]

    def pack(self, images: Tensor):
        names = images[:, 0, 1, 1]
        return {
            "tensor": images,
            "tuple": (images, names),
            "list": [names[:, None], images],
            "dict": {"images": images, "names": names.view(-1, 1, 1, 1, 1)},
            "nested": {"a": [names, (names[:, None, None], "no tensor")], "b": {"images": images}},
        }[self.kind]

    def images(self, state) -> Tensor:
        return next(leaf for leaf in self.tensors(state) if leaf.dim() == 4)

    def tensors(self, state) -> list[Tensor]:
        return [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]

    def names(self, state) -> list[int]:
        names = self.images(state)[:, 0, 1, 1].abs().tolist()
        for leaf in self.tensors(state):
            assert leaf.dim() == 4 or leaf.abs().flatten().tolist() == names
        return [int(name) for name in names]


def write_images(logits: Tensor) -> Tensor:
    """Returns images (N, K * C, 2, 2) that hold logits (N, K, C), and numbers from 1."""
    images = logits.new_zeros(len(logits), logits[0].numel() if len(logits) else 6, 2, 2)
    images[:, :, 0, 0] = logits.flatten(1) if len(logits) else 0
    images[:, 0, 1, 1] = torch.arange(1, len(logits) + 1).to(images)
    return images


@st.composite
def cases(draw, min_images: int = 0, min_exits: int = 1) -> tuple[Tensor, str, list[float]]:
    """Draws logits (N, K, C), a criterion and thresholds, often such that a score is met."""
    # Many images and exits, for several to leave at different exits; few now and then.
    sizes = [n for n in (5, 6, 7, 6, 7, 4, 3, 2, 1, 0) if n >= min_images]
    num_images = draw(st.sampled_from(sizes))
    num_exits = draw(st.sampled_from([n for n in (4, 3, 4, 3, 2, 1) if n >= min_exits]))
    num_classes = draw(st.integers(2, 4)) if num_images else 6 // num_exits
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    shape = num_images, num_exits, num_classes
    logits = torch.randn(shape, generator=generator) * draw(
        st.sampled_from([1, 2, 0.1, 5, 1, 1000])
    )
    logits = logits.to(draw(st.sampled_from(DTYPES)))
    criterion = draw(st.sampled_from(CRITERIA))
    thresholds = []
    for index in range(num_exits - 1):
        scores = exit_score(logits[:, index], criterion).sort().values.tolist()
        middle_first = scores[len(scores) // 2 :] + scores[: len(scores) // 2]
        ends = [0.0, 0.5, 1.0, math.inf, -math.inf, *[3.0] * (criterion == "entropy")]
        thresholds.append(draw(st.sampled_from([*middle_first, *middle_first, *ends])))
    return logits, criterion, thresholds


def first_exits(logits: Tensor, thresholds: list[float], criterion: str) -> list[int]:
    """Returns where each image leaves, one image and one exit at a time."""
    taken = []
    for image in logits:
        for index, threshold in enumerate(thresholds):
            value = exit_score(image[index : index + 1], criterion).item()
            limit = torch.tensor(threshold, dtype=SCORE_DTYPES[logits.dtype]).item()
            if value < limit if criterion == "entropy" else value >= limit:
                break
        else:
            index = len(thresholds)
        taken.append(index)
    return taken


# --- Inference ---


@pytest.mark.parametrize("device", DEVICES)
@given(case=cases(), kind=st.sampled_from(STATES), memory_format=st.sampled_from(FORMATS))
@properties
def test_leaving_early_is_the_full_pass_at_that_exit(device, case, kind, memory_format):
    logits, criterion, thresholds = case
    num_images, num_exits, num_classes = logits.shape
    images = write_images(logits).to(device, memory_format=memory_format)
    before = images.clone()
    network = Witness(num_exits, num_classes, kind)
    answers = early_exit(network, images, thresholds, criterion)

    full = torch.stack(run_all_exits(Witness(num_exits, num_classes, kind), images), 1)
    assert torch.equal(full.cpu(), logits)
    expected = torch.tensor(first_exits(logits, thresholds, criterion), dtype=torch.int64)
    assert torch.equal(answers.exit_index.cpu(), expected)
    scores = torch.stack([exit_score(full[:, index], criterion) for index in range(num_exits)], 1)
    assert torch.equal(exits_taken(scores, thresholds, criterion).cpu(), expected)
    assert torch.equal(exits_taken(scores[:, :-1], thresholds, criterion).cpu(), expected)
    assert answers.logits.dtype == logits.dtype
    assert answers.logits.device == answers.exit_index.device == images.device
    assert answers.exit_index.dtype == torch.int64
    assert torch.equal(answers.logits.cpu(), logits[torch.arange(num_images), expected])
    assert torch.equal(images, before)
    assert images.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("device", DEVICES)
@given(case=cases(), kind=st.sampled_from(STATES), memory_format=st.sampled_from(FORMATS))
@properties
def test_only_those_still_inside_are_computed(device, case, kind, memory_format):
    logits, criterion, thresholds = case
    images = write_images(logits).to(device, memory_format=memory_format)
    network = Witness(*logits.shape[1:], kind)
    early_exit(network, images, thresholds, criterion)

    taken = first_exits(logits, thresholds, criterion)
    inside = [
        [name for name, index in enumerate(taken, start=1) if index >= stage]
        for stage in range(max(taken, default=0) + 1)
    ]
    assert network.asked == inside
    assert [sorted(network.names(state)) for state in network.handed_on] == inside
    assert network.received[0] is images
    for index in range(1, len(inside)):
        # Nothing is copied where nobody has left.
        is_same = network.received[index] is network.handed_on[index - 1]
        assert is_same == (inside[index] == inside[index - 1])
        state = network.images(network.received[index])
        assert state.is_contiguous(memory_format=memory_format)


@given(case=cases(min_images=1), data=st.data())
@properties
def test_the_order_of_a_batch_is_the_order_of_the_answers(case, data):
    logits, criterion, thresholds = case
    order = data.draw(st.permutations(range(len(logits))))
    shape, images = logits.shape[1:], write_images(logits)
    answers = early_exit(Witness(*shape), images, thresholds, criterion)
    permuted = early_exit(Witness(*shape), images[order], thresholds, criterion)
    assert torch.equal(permuted.logits, answers.logits[order])
    assert torch.equal(permuted.exit_index, answers.exit_index[order])


@given(case=cases(min_images=1, min_exits=2), data=st.data())
@properties
def test_a_stricter_threshold_never_lets_an_image_leave_earlier(case, data):
    logits, criterion, thresholds = case
    amounts = st.sampled_from([0.0, 1e-3, 0.1, 1.0, math.inf])

    def make_stricter(threshold: float) -> float:
        if math.isinf(threshold):
            return threshold
        if criterion == "entropy":
            threshold -= data.draw(amounts)
            return threshold if threshold >= 0 else -math.inf
        threshold += data.draw(amounts)
        return threshold if threshold <= 1 else math.inf

    stricter = [make_stricter(threshold) for threshold in thresholds]
    images = write_images(logits)
    lax = early_exit(Witness(*logits.shape[1:]), images, thresholds, criterion).exit_index
    strict = early_exit(Witness(*logits.shape[1:]), images, stricter, criterion).exit_index
    assert (strict >= lax).all()


@given(case=cases(min_images=1, min_exits=2))
@properties
def test_ends_of_the_criteria(case):
    logits, _, thresholds = case
    num_exits, num_classes = logits.shape[1:]
    above = math.nextafter(math.log(num_classes), math.inf) * (1 + 1e-5)
    for criterion, threshold, expected in [
        ("entropy", 0.0, num_exits - 1),
        ("entropy", above, 0),
        ("confidence", 0.0, 0),
        ("confidence", math.inf, num_exits - 1),
        ("confidence", -math.inf, 0),
        ("entropy", math.inf, 0),
        ("entropy", -math.inf, num_exits - 1),
    ]:
        network = Witness(num_exits, num_classes)
        limits = [threshold] * len(thresholds)
        answers = early_exit(network, write_images(logits), limits, criterion)
        assert (answers.exit_index == expected).all()
        assert torch.equal(answers.logits, logits[:, expected])
        assert len(network.received) == len(network.asked) == expected + 1


@pytest.mark.parametrize("device", DEVICES)
@given(
    case=cases(min_images=1, min_exits=2),
    poison=st.sampled_from([math.nan, math.inf, -math.inf]),
    data=st.data(),
)
@properties
def test_who_has_logits_that_are_not_finite_goes_on(device, case, poison, data):
    logits, criterion, _ = case
    num_images, num_exits, num_classes = logits.shape
    bad = data.draw(st.integers(0, num_images - 1))
    where = data.draw(st.integers(0, num_exits - 1))
    logits[bad, : where + 1, data.draw(st.integers(0, num_classes - 1))] = poison
    everyone = math.inf if criterion == "entropy" else data.draw(st.sampled_from([0.0, -math.inf]))
    images, thresholds = write_images(logits).to(device), [everyone] * (num_exits - 1)
    network = Witness(num_exits, num_classes)
    if where == num_exits - 1:
        with pytest.raises(FloatingPointError, match=r"^1 of 1 images .* not finite at the last"):
            early_exit(network, images, thresholds, criterion)
        return
    answers = early_exit(network, images, thresholds, criterion)
    expected = torch.zeros(num_images, dtype=torch.int64)
    expected[bad] = where + 1
    assert torch.equal(answers.exit_index.cpu(), expected)
    assert answers.logits.isfinite().all()


def test_images_are_not_written_to_though_they_are_logits():
    images = torch.tensor([[0.0, 9.0], [0.0, 1.0], [0.0, 0.5], [0.0, 5.0]])
    before = images.clone()
    identity = nn.Identity().eval()
    network = Staged([identity] * 3, [identity, torch.neg, identity])
    for thresholds in ([0.2, 0.0], [0.2, 0.65]):
        early_exit(network, images, thresholds)
        assert torch.equal(images, before)


def test_who_has_left_is_not_asked_for_finite_logits():
    logits = torch.zeros(2, 2, 3)
    logits[0, 0, 0], logits[0, 1] = 100, math.nan
    answers = early_exit(Witness(2, 3), write_images(logits), [0.5])
    assert answers.exit_index.tolist() == [0, 1]


def test_a_bad_image_is_counted_among_those_at_the_last_exit():
    logits = torch.zeros(5, 2, 3)
    logits[0, 0, 0], logits[3, 1, 2], logits[4, 1] = 100, -math.inf, math.inf
    with pytest.raises(FloatingPointError, match=r"^2 of 4 images"):
        early_exit(Witness(2, 3), write_images(logits), [0.5])


@pytest.mark.parametrize(
    ("thresholds", "criterion", "message"),
    [
        ([0.5], "entropy", "^1 exit thresholds for 3 exits: give 2"),
        ([0.5] * 3, "confidence", "^3 exit thresholds for 3 exits: give 2"),
        ([0.5, math.nan], "entropy", "exit 2 is NaN"),
        ([0.5, 0.5], "margin", "is 'margin': give entropy or confidence"),
        ([0.5, -0.1], "entropy", "^the threshold of exit 2 is -0.1: an entropy is 0 or more"),
        (
            [-0.1, 0.5],
            "confidence",
            "^the threshold of exit 1 is -0.1: a confidence is from 0 to 1",
        ),
        ([0.5, 95], "confidence", "^the threshold of exit 2 is 95: a confidence is from 0 to 1"),
    ],
)
def test_thresholds_that_do_not_fit_are_refused(thresholds, criterion, message):
    network = Witness(3, 2)
    with pytest.raises(ValueError, match=message):
        early_exit(network, write_images(torch.zeros(2, 3, 2)), thresholds, criterion)
    assert not network.received


@pytest.mark.parametrize("gates", ["none", "per block"])
def test_a_network_in_training_mode_is_refused(gates):
    """BN statistics of a training network would also follow who is in the batch."""
    network = ResNetWithExits(CifarResNet(8), exits_after=[1])
    target = network if gates == "none" else network.gated([1.0, 0.5, 1.0])
    with pytest.raises(ValueError, match=r"call network.eval\(\)"):
        early_exit(target, torch.randn(2, 3, 8, 8), [0.5])
    network.eval()
    early_exit(target, torch.randn(2, 3, 8, 8), [0.5])


class Adaptive(nn.Module):
    """What somebody would export who knows no better."""

    def __init__(self, network: MultiExitNetwork):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return early_exit(self.network, images, [0.4, 0.4], "confidence").logits


@pytest.mark.filterwarnings("ignore")  # of the tracer: it is old, and warns of what it bakes
@pytest.mark.parametrize(
    "export",
    [torch.jit.trace, lambda module, images: torch.export.export(module, (images,))],
    ids=["trace", "export"],
)
def test_an_export_that_would_decide_once_for_all_is_refused(export):
    """A trace answered the next batch as if its images left where those of the first had left."""
    torch.manual_seed(0)
    module = Adaptive(Dense()).eval()
    images = torch.randn(16, 6)
    taken = early_exit(module.network, images, [0.4, 0.4], "confidence").exit_index
    assert len(taken.unique()) > 1
    with pytest.raises(ValueError, match=r"Export each of network.stages and network.exits on its"):
        export(module, images)
    assert module(images).shape == (16, 4)  # as ever after that


@pytest.mark.filterwarnings("ignore")
def test_what_the_refusal_of_an_export_advises_works():
    torch.manual_seed(0)
    network, images = Dense().eval(), torch.randn(16, 6)
    stages = [
        torch.jit.trace(stage, torch.randn(3, size))
        for stage, size in zip(network.stages, (6, 5, 5), strict=True)
    ]
    exits = [torch.jit.trace(exit_here, torch.randn(3, 5)) for exit_here in network.exits]
    expected = early_exit(network, images, [0.4, 0.4], "confidence")
    actual = early_exit(Staged(stages, exits), images, [0.4, 0.4], "confidence")
    assert torch.equal(actual.exit_index, expected.exit_index)
    torch.testing.assert_close(actual.logits, expected.logits)


def test_one_exit_can_be_run_alone():
    logits = torch.randn(4, 3, 2)
    for index in range(3):
        network = Witness(3, 2)
        assert torch.equal(run_to_exit(network, index, write_images(logits)), logits[:, index])
        assert len(network.received) == index + 1
        assert len(network.asked) == 1


class Dense(MultiExitNetwork):
    """The smallest network with exits."""

    def __init__(self, num_exits: int = 3, width: int = 5):
        super().__init__()
        self.num_classes = 4
        sizes = [6] + [width] * num_exits
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Flatten(), nn.Linear(a, b)) for a, b in itertools.pairwise(sizes)
        )
        self.exits = nn.ModuleList(nn.Linear(width, 4) for _ in range(num_exits))


def test_costs_add_up():
    network = Dense().eval()
    costs = count_exit_macs(network, torch.empty(1, 6))
    assert costs == ([30, 25, 25], [20, 20, 20])
    assert costs.leaving == [50, 95, 140]
    assert costs.without_branches == [30, 55, 100]
    assert costs.trunk == 100
    staged = Staged(network.stages, network.exits)
    assert count_exit_macs(staged, torch.empty(1, 6)) == costs


def test_answers_carry_no_graph():
    answers = early_exit(Dense().eval(), torch.randn(3, 6), [0.5, 0.5])
    assert not answers.logits.requires_grad


# --- Weights of elsewhere ---


def remove(state_dict, key):
    return {name: value for name, value in state_dict.items() if name != key}


@pytest.mark.parametrize(
    ("state_dict", "message"),
    [
        (lambda: Dense(width=7).state_dict(), r"stages.0.1.weight is \(7, 6\) there and \(5, 6\)"),
        (lambda: remove(Dense().state_dict(), "exits.2.bias"), "exits.2.bias is absent there"),
        (lambda: remove(Dense().state_dict(), "stages.1.1.bias"), "stages.1.1.bias is absent the"),
        (lambda: Dense(num_exits=4).state_dict(), r"stages.3.1.weight is \(5, 5\) there and abs"),
        (lambda: Dense(num_exits=2).state_dict(), "stages.2.1.weight is absent there"),
        (lambda: CifarResNet(8).state_dict(), "stages.0.1.weight is absent there and"),
        (lambda: {}, "is absent there"),
    ],
)
def test_weights_of_another_network_are_refused(state_dict, message):
    network = Dense()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        load_weights(network, state_dict())
    assert "\n" not in str(error.value)
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])


# --- Criteria ---


@pytest.mark.parametrize("device", DEVICES)
@given(
    seed=st.integers(0, 10**6),
    num_images=st.integers(0, 20),
    num_classes=st.integers(1, 100),
    scale=st.sampled_from([1e-3, 1.0, 10.0, 1e3]),
    dtype=st.sampled_from([*DTYPES, torch.float16]),
)
@properties
def test_criteria_are_scipys(device, seed, num_images, num_classes, scale, dtype):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(num_images, num_classes, generator=generator) * scale).to(dtype)
    probs = scipy.special.softmax(logits.double().numpy(), axis=1)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6 * max(1, scale)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for criterion, expected in [
        ("entropy", scipy.stats.entropy(probs, axis=1)),
        ("confidence", probs.max(1, initial=0)),
    ]:
        actual = exit_score(logits.to(device), criterion).cpu()
        assert actual.dtype == wide
        torch.testing.assert_close(
            actual.double(), torch.as_tensor(expected).double(), rtol=0, atol=tolerance
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_times_its_logarithm_is_nothing(dtype):
    logits = torch.tensor([[0, -1e4, -1e5], [1e30, 0, -1e30], [0, 0, -1e30]], dtype=dtype)
    expected = torch.tensor([0, 0, math.log(2)], dtype=dtype if dtype.itemsize > 2 else None)
    torch.testing.assert_close(entropy(logits), expected)
    assert entropy(logits)[:2].tolist() == [0, 0]
    assert not leaves(entropy(logits), 0.0, "entropy").any()
    assert confidence(logits).tolist() == [1, 1, 0.5]


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_no_score_without_finite_logits(criterion, poison):
    for position in range(3):
        logits = torch.tensor([[1.0, 2.0, 3.0], [30.0, 2.0, 1.0]])
        logits[0, position] = poison
        assert exit_score(logits, criterion).isnan().tolist() == [True, False]


def test_only_confidence_leaves_at_its_threshold():
    scores = torch.tensor([0.25, 0.5, 0.75, math.nan])
    assert leaves(scores, 0.5, "entropy").tolist() == [True, False, False, False]
    assert leaves(scores, 0.5, "confidence").tolist() == [False, True, True, False]


@pytest.mark.parametrize("criterion", ["margin", None])
def test_a_criterion_that_does_not_exist_is_refused_wherever_it_is_used(criterion):
    """It was confidence."""
    scores = torch.zeros(2, 3)
    for run in (
        lambda: exit_score(scores, criterion),
        lambda: leaves(scores, 0.5, criterion),
        lambda: exits_taken(scores, [0.5, 0.5], criterion),
    ):
        with pytest.raises(ValueError, match=f"is {criterion!r}: give entropy or confid"):
            run()


# --- Screening: all thresholds of a grid ---


@st.composite
def screenings(draw):
    """Draws scores with ties and NaN, what is right, costs, criterion and candidates."""
    num_images, num_exits = draw(st.sampled_from([8, 12, 5, 1])), draw(st.sampled_from([3, 2, 4]))
    values = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 2.0, math.nan])
    rows = st.lists(values, min_size=num_exits, max_size=num_exits)
    right = st.lists(st.booleans(), min_size=num_exits, max_size=num_exits)
    num_columns = num_exits - draw(st.integers(0, 1))
    scores = torch.tensor(draw(st.lists(rows, min_size=num_images, max_size=num_images)))
    correct = draw(st.lists(right, min_size=num_images, max_size=num_images))
    steps = draw(st.lists(st.integers(0, 2), min_size=num_exits, max_size=num_exits))
    criterion = draw(st.sampled_from(CRITERIA))
    above = [3.0] * (criterion == "entropy")
    candidates = st.sampled_from([-math.inf, 0.0, 0.1, 0.2, 0.5, 0.9, 1.0, *above, math.inf])
    return (
        scores[:, :num_columns].to(draw(st.sampled_from([torch.float32, torch.float64]))),
        torch.tensor(correct),
        list(itertools.accumulate(steps)),
        criterion,
        draw(st.lists(candidates, min_size=1, max_size=5)),
    )


def screen_by_hand(scores, correct, costs, criterion, candidates):
    """Returns {thresholds: (number right, summed cost, number at each exit)}, image by image."""
    points = {}
    for thresholds in itertools.product(set(candidates), repeat=len(costs) - 1):
        num_right, total, counts = 0, 0, [0] * len(costs)
        for row, right in zip(scores, correct, strict=True):
            index = 0
            for threshold in thresholds:
                value, limit = row[index].item(), torch.tensor(threshold, dtype=scores.dtype).item()
                if value < limit if criterion == "entropy" else value >= limit:
                    break
                index += 1
            num_right += int(right[index])
            total += costs[index]
            counts[index] += 1
        points[thresholds] = num_right, total, counts
    return points


@pytest.mark.parametrize("device", DEVICES)
@given(case=screenings())
@settings(properties, max_examples=150)
def test_screening_is_a_double_loop(device, case):
    scores, correct, costs, criterion, candidates = case
    num_images = len(scores)
    expected = screen_by_hand(*case)
    actual = screen_thresholds(scores.to(device), correct.to(device), costs, criterion, candidates)
    thresholds = [tuple(row) for row in actual.thresholds.tolist()]
    assert sorted(thresholds) == sorted(expected)
    for index, point in enumerate(thresholds):
        num_right, total, counts = expected[point]
        assert actual.accuracy[index].item() == num_right / num_images
        assert actual.shares[index].tolist() == [count / num_images for count in counts]
        assert actual.cost[index].item() == pytest.approx(total / num_images, rel=1e-14)

    # The front, in whole numbers.
    everything = {point[:2] for point in expected.values()}
    best = sorted(
        {
            (total, right)
            for right, total in everything
            if not any(
                (r >= right and t < total) or (r > right and t <= total) for r, t in everything
            )
        }
    )
    front = [expected[thresholds[index]][1::-1] for index in actual.front.tolist()]
    assert front == best

    knee = expected[thresholds[actual.knee]][1::-1]
    assert actual.knee in actual.front.tolist()
    assert height(knee, front) == max(height(point, front) for point in front)

    for total, right in front:
        cheapest = actual.cheapest(right / num_images)
        assert expected[thresholds[cheapest]][:2] == (right, total)
    with pytest.raises(ValueError, match=r"reach an accuracy of 1\.5: the best is"):
        actual.cheapest(1.5)


def height(point: tuple[int, int], front: list[tuple[int, int]]) -> Fraction:
    """Returns how far above the line between the ends a (cost, right) is, times a constant."""
    (x0, y0), (x1, y1) = front[0], front[-1]
    return Fraction((point[1] - y0) * (x1 - x0) - (point[0] - x0) * (y1 - y0))


def test_points_that_cost_the_same_are_compared_by_accuracy():
    """19 steps of 11 images can be 7 * 1 + 0 * 2 + 4 * 3 or 6 * 1 + 2 * 2 + 3 * 3."""
    ranks = [(2, 2), (3, 2), (1, 3), (3, 0), (3, 2), (2, 3), (3, 1), (0, 1), (3, 2), (1, 1), (2, 2)]
    right = ["110", "000", "100", "011", "000", "010", "001", "111", "101", "011", "010"]
    scores = torch.tensor(ranks) + 0.5
    correct = torch.tensor([[answer == "1" for answer in row] for row in right])
    screening = screen_thresholds(scores, correct, [1, 2, 3], "entropy", [0.0, 1.0, 2.0, 3.0, 4.0])
    totals = [round(11 * cost) for cost in screening.cost[screening.front].tolist()]
    assert totals == [11, 19]
    assert [round(11 * x) for x in screening.accuracy[screening.front].tolist()] == [4, 6]


@pytest.mark.parametrize(("criterion", "grid"), [("entropy", ENTROPY_GRID), ("confidence", None)])
def test_candidates_are_the_authors_and_nobody(criterion, grid):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(50, 3, generator=generator)
    correct = torch.rand(50, 3, generator=generator) < 0.5
    screening = screen_thresholds(scores, correct, [1, 2, 3], criterion)
    nobody = 0.0 if criterion == "entropy" else math.inf
    size = len({nobody, *(grid or CONFIDENCE_GRID)})
    assert screening.thresholds.shape == (size**2, 2)
    assert screening.shares.shape == (size**2, 3)
    alone = (screening.thresholds == nobody).all(1).nonzero().item()
    assert screening.shares[alone].tolist() == [0, 0, 1]
    assert screening.cost[alone] == 3
    assert screening.shares[:, 0].max() == 1


def test_candidates_of_the_authors_are_those_of_the_released_code():
    assert sorted(ENTROPY_GRID) == [
        *(1e-4, 5e-4, 1e-3, 5e-3, 0.01, 0.025, 0.05, 0.075),
        *(0.1, 0.25, 0.5, 0.75, 1, 2, 3, 5, 10),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scores": torch.rand(5, 1)}, "do not fit"),
        ({"scores": torch.rand(5, 4)}, "do not fit"),
        ({"scores": torch.rand(4, 3)}, "do not fit"),
        ({"costs": [1, 2]}, "2 costs do not fit"),
        ({"costs": [1, 2, 3, 4]}, "4 costs do not fit"),
        ({"criterion": "margin"}, "is 'margin': give"),
        ({"candidates": [0.5, math.nan]}, "NaN"),
        ({"candidates": [0.5, -0.5]}, "threshold is -0.5: an entropy is 0 or more"),
        (
            {"candidates": [0.5, 2.0], "criterion": "confidence"},
            "is 2.0: a confidence is from 0 to",
        ),
        ({"candidates": torch.linspace(0, 1, 3500).tolist()}, "3500 .* 2 exits .* too large"),
        (
            {"scores": torch.rand(0, 3), "correct": torch.zeros(0, 3, dtype=torch.bool)},
            "no images",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_screenings_that_do_not_fit_are_refused(arguments, message):
    fitting = {
        "scores": torch.rand(5, 3),
        "correct": torch.zeros(5, 3, dtype=torch.bool),
        "costs": [1, 2, 3],
    }
    screen_thresholds(**fitting)
    with pytest.raises(ValueError, match=message):
        screen_thresholds(**{**fitting, **arguments})


# --- Thresholds for given shares ---

CONFIDENCES = [  # of eight images at two early exits; the last exit's do not count
    [0.95, 0.99, 0.1],
    [0.90, 0.10, 0.1],
    [0.90, 0.99, 0.1],
    [0.80, 0.40, 0.1],
    [0.70, 0.85, 0.1],
    [0.60, 0.60, 0.1],
    [0.50, 0.75, 0.1],
    [0.40, 0.60, 0.1],
]


@pytest.mark.parametrize("num_columns", [2, 3])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(
    ("fractions", "limits", "taken"),
    [
        # The 2nd has 0.9, and so has the 3rd. The 2nd of the five others has 0.75.
        ([0.25, 0.25, 0.5], [0.9, 0.75], [0, 0, 0, 2, 1, 2, 1, 2]),
        # 3.99 images are 3; the 3rd of the five has 0.6, and so has the 4th.
        ([0.25, 0.499, 0.251], [0.9, 0.6], [0, 0, 0, 2, 1, 1, 1, 1]),
        # Less than an image is nobody.
        ([0.124, 0.25, 0.626], [None, 0.99], [1, 2, 1, 2, 2, 2, 2, 2]),
        ([0.125, 0.125, 0.75], [0.95, 0.99], [0, 2, 1, 2, 2, 2, 2, 2]),
        # Of the five who are left six cannot leave: nobody does. Five can.
        ([0.25, 0.75, 0.0], [0.9, None], [0, 0, 0, 2, 2, 2, 2, 2]),
        ([0.25, 0.625, 0.125], [0.9, 0.4], [0, 0, 0, 1, 1, 1, 1, 1]),
        ([1.0, 0.0, 0.0], [0.4, None], [0] * 8),
        ([0.0, 0.0, 1.0], [None, None], [2] * 8),
    ],
)
def test_fractions_of_eight_images(fractions, limits, taken, criterion, num_columns):
    scores = torch.tensor(CONFIDENCES, dtype=torch.float64)
    nobody, expected = math.inf, list(limits)
    if criterion == "entropy":  # the mirror image; whoever is at the limit must be below it
        scores, nobody = 1 - scores, -math.inf
        expected = [
            None if limit is None else math.nextafter(1 - limit, math.inf) for limit in limits
        ]
    expected = [nobody if limit is None else limit for limit in expected]
    actual = thresholds_for_fractions(scores[:, :num_columns], fractions, criterion)
    assert actual == expected
    assert all(type(threshold) is float for threshold in actual)
    assert exits_taken(scores, actual, criterion).tolist() == taken


@pytest.mark.parametrize(
    ("ratio", "limits", "taken", "cost"),
    [
        # Shares 4/7, 2/7, 1/7 of 8 images: 4.57 and 2.29, that is 4 and 2. The 4th has 0.8. Of the
        # others, who have 0.85, 0.6, 0.75 and 0.6, the 2nd has 0.75.
        (0.5, [0.8, 0.75], [0, 1, 2, 0, 2], (1 + 3 + 6 + 1 + 6) / 5),
        # Shares 1/7, 2/7, 4/7: 1 and 2. The first has 0.95; of the others the 2nd has 0.85.
        (2.0, [0.95, 0.85], [0, 1, 2, 2, 2], (1 + 3 + 6 + 6 + 6) / 5),
        # Shares 1/3: 2.67 are 2. The 2nd and the 3rd have 0.9; of the others the 2nd has 0.75.
        (1.0, [0.9, 0.75], [0, 1, 2, 2, 2], (1 + 3 + 6 + 6 + 6) / 5),
        # Shares 1/111, 10/111, 100/111: 0.07 is nobody and 0.72 is nobody.
        (10.0, [math.inf, math.inf], [2, 2, 2, 2, 2], 6),
    ],
)
def test_budgeted_rule_by_hand(ratio, limits, taken, cost):
    """From validation confidences to the mean cost of five test images, exits that cost 1, 3, 6."""
    validation = torch.tensor(CONFIDENCES, dtype=torch.float64)
    thresholds = thresholds_for_fractions(validation, geometric_fractions(ratio, 3))
    assert thresholds == limits
    test = torch.tensor([[0.97, 0.1], [0.3, 0.9], [0.79, 0.5], [0.8, 0.2], [0.1, 0.74]])
    exits = exits_taken(test.double(), thresholds, "confidence")
    assert exits.tolist() == taken
    assert torch.tensor([1.0, 3.0, 6.0])[exits].mean().item() == pytest.approx(cost)


def test_fractions_are_counted_in_single_precision():
    """0.29 * 100 is 28.999999999999996 in double precision, 29 in the released code."""
    scores = torch.arange(100.0).flip(0).div(100)[:, None]
    assert math.floor(0.29 * 100) == 28
    thresholds = thresholds_for_fractions(scores, [0.29, 0.71])
    assert (exits_taken(scores, thresholds, "confidence") == 0).sum() == 29


@pytest.mark.parametrize("criterion", CRITERIA)
def test_who_has_no_score_is_left_but_never_leaves(criterion):
    scores = torch.tensor([[0.5], [math.nan], [0.5], [math.nan]])
    thresholds = thresholds_for_fractions(scores, [0.5, 0.5], criterion)
    assert exits_taken(scores, thresholds, criterion).tolist() == [0, 1, 0, 1]


@given(
    seed=st.integers(0, 10**6),
    num_images=st.integers(0, 200),
    num_exits=st.integers(2, 5),
    ratio=st.floats(0.1, 10),
    criterion=st.sampled_from(CRITERIA),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@properties
def test_without_ties_each_exit_gets_its_share(
    seed, num_images, num_exits, ratio, criterion, dtype
):
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(num_images, generator=generator) for _ in range(num_exits)]
    scores = (torch.stack(order, 1) + 1).to(dtype) / (num_images + 1)
    fractions = geometric_fractions(ratio, num_exits)
    thresholds = thresholds_for_fractions(scores, fractions, criterion)
    taken = exits_taken(scores, thresholds, criterion)
    for index, fraction in enumerate(fractions[:-1]):
        count = math.floor((torch.tensor(fraction) * num_images).item())
        assert (taken == index).sum() == count


@pytest.mark.parametrize(
    ("fractions", "criterion", "message"),
    [
        ([0.5, 0.5], "confidence", r"2 fractions for scores \(8, 3\)"),
        ([0.25] * 4 + [0.0], "confidence", r"5 fractions for scores \(8, 3\)"),
        ([0.5, 0.5, 0.5], "confidence", "must sum to 1"),
        ([0.3, 0.3, 0.3], "confidence", "must sum to 1"),
        ([1.5, -1.0, 0.5], "confidence", "no shares"),
        ([math.nan, 0.5, 0.5], "confidence", "no shares"),
        ([0.5, 0.25, 0.25], "margin", "is 'margin': give"),
    ],
)
def test_fractions_that_do_not_fit_are_refused(fractions, criterion, message):
    with pytest.raises(ValueError, match=message):
        thresholds_for_fractions(torch.tensor(CONFIDENCES), fractions, criterion)


@given(ratio=st.floats(1e-3, 1e3), num_exits=st.integers(1, 12))
@properties
def test_geometric_fractions(ratio, num_exits):
    powers = [Fraction(ratio) ** k for k in range(1, num_exits + 1)]
    expected = [float(power / sum(powers)) for power in powers]
    assert geometric_fractions(ratio, num_exits) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize(
    ("ratio", "num_exits", "index", "num_images", "count"),
    [
        # 10 exits: 0.1^k / sum is 0.009000000001, of which 5,000 are 45 and those of 10,000 are 90.
        (0.1, 10, 2, 5_000, 45),
        (0.1, 10, 2, 10_000, 90),
        (0.2, 11, 0, 5_000, 3_999),  # of 4000.00008
        (0.2, 11, 3, 10_000, 63),  # of 64.0000013
    ],
)
def test_shares_are_rounded_as_in_the_released_code(ratio, num_exits, index, num_images, count):
    """Rounded otherwise, an image more or less is to leave."""
    fractions = geometric_fractions(ratio, num_exits)
    scores = torch.rand(num_images, num_exits, generator=torch.Generator().manual_seed(0)).double()
    scores += torch.arange(num_images)[:, None] * 1e-9  # no ties
    thresholds = thresholds_for_fractions(scores, fractions)
    taken = exits_taken(scores, thresholds, "confidence")
    assert (taken == index).sum() == count


@pytest.mark.parametrize(("ratio", "expected"), [(1e-300, [1, 0, 0]), (1e300, [0, 0, 1])])
def test_geometric_fractions_do_not_overflow(ratio, expected):
    assert geometric_fractions(ratio, 3) == pytest.approx(expected)


# --- Thresholds for a budget ---


@pytest.mark.parametrize("device", DEVICES)
@given(
    seed=st.integers(0, 10**6),
    num_images=st.integers(1, 300),
    steps=st.lists(st.integers(1, 10**6), min_size=2, max_size=5),
    where=st.floats(0, 1),
    criterion=st.sampled_from(CRITERIA),
)
@properties
def test_a_budget_is_kept_and_used_but_for_one_image(
    device, seed, num_images, steps, where, criterion
):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_images, len(steps), generator=generator, dtype=torch.float64)
    costs = list(itertools.accumulate(steps))
    budget = costs[0] + where * (costs[-1] - costs[0])
    thresholds = thresholds_for_budget(scores.to(device), costs, budget, criterion)
    taken = exits_taken(scores, thresholds, criterion)
    spent = sum(costs[index] for index in taken.tolist()) / num_images
    assert spent <= budget * (1 + 1e-12)
    assert budget - spent <= (costs[-1] - costs[0]) / num_images * (1 + 1e-9)


@pytest.mark.parametrize("budget", [1.1, 1.5, 2.0, 2.5])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_budget_is_found_though_an_image_has_no_score(criterion, budget):
    scores = torch.rand(100, 3, generator=torch.Generator().manual_seed(0))
    scores[7, 0] = math.nan
    costs = [1.0, 2.0, 3.0]
    thresholds = thresholds_for_budget(scores, costs, budget, criterion)
    taken = exits_taken(scores, thresholds, criterion)
    assert budget - 0.05 <= 1 + taken.double().mean() <= budget


@pytest.mark.parametrize("budget", [99, 301, math.nan, math.inf])
def test_a_budget_that_no_exit_can_meet_is_refused(budget):
    with pytest.raises(ValueError, match="outside what the exits cost: 100 to 300"):
        thresholds_for_budget(torch.rand(9, 3), [100, 200, 300], budget)


def test_a_budget_below_what_the_scores_allow_is_refused():
    """Nobody has a score, so nobody leaves before the last exit."""
    scores = torch.full((4, 2), math.nan)
    with pytest.raises(ValueError, match="no thresholds keep to a budget of 150"):
        thresholds_for_budget(scores, [100, 200], 150)


def test_a_budget_needs_costs_of_all_exits_and_a_known_criterion():
    with pytest.raises(ValueError, match=r"2 fractions for scores \(9, 4\)"):
        thresholds_for_budget(torch.rand(9, 4), [100, 200], 150)
    with pytest.raises(ValueError, match="is 'margin': give"):
        thresholds_for_budget(torch.rand(9, 2), [100, 200], 150, "margin")
