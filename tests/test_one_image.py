"""One image through recorded stages: what has changed is noticed in the stage that runs it.

A CPU calls functions again instead of recording them, and so could not give an outdated answer.
Here it replays: the operations that were recorded, on the memory where tensors lay then.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from kernel_count import KernelCount
from test_exit_stream import NETWORKS
from test_slimmable_exits import images, network
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet18

from networks import (
    EarlyExit,
    ExitStream,
    MultiExitNetwork,
    SlimmableWithExits,
    early_exit,
    exit_stream,
    recalibrate,
    recorded_exits,
    with_exits,
)
from networks.captured import Recorder
from networks.recorded_exits import Reads, divide, modules_of
from networks.slimmable_base import Slimmable

NUM_EXITS = 3


class Tape(TorchDispatchMode):
    """Operations, to be done once more with the results where they were."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Aliases: a tensor that is moved leaves them where it was.
        given = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        self.steps.append((func, given, pytree.tree_map_only(Tensor, Tensor.detach, result)))
        return result

    def replay(self) -> None:
        for func, (args, kwargs), result in self.steps:
            again = func(*args, **kwargs)
            for old, new in zip(*map(pytree.tree_leaves, (result, again)), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)


class Replaying(Recorder):
    """Records on a CPU, too."""

    num_recordings = 0

    def record(self, function: Callable[[], object]) -> Callable[[], object]:
        Replaying.num_recordings += 1
        with Tape() as tape:
            result = function()
        has_run = True  # which a GPU would not do, so the first replay has been

        def replay() -> object:
            nonlocal has_run
            if not has_run:
                tape.replay()
            has_run = False
            return result

        return replay


@pytest.fixture(autouse=True)
def replaying(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(recorded_exits, "Recorder", Replaying)
    monkeypatch.setattr(exit_stream, "Recorder", Replaying)
    monkeypatch.setattr(Replaying, "num_recordings", 0)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*runs kernel by kernel")
        yield


class Gain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * x


class Row(MultiExitNetwork):
    """Stages and exits are modules, or functions that call them; the answer tells how many ran.

    Exit k is sure where the mean of the image is above k.
    """

    def __init__(self, as_functions: bool):
        super().__init__()
        parts = (
            nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU())
            for _ in range(NUM_EXITS)
        )
        heads = (nn.Sequential(nn.Flatten(), nn.Linear(32, 3)) for _ in range(NUM_EXITS))
        self.parts, self.heads = nn.ModuleList(parts), nn.ModuleList(heads)
        self.as_functions = as_functions

    @property
    def stages(self):
        return self.given(self.parts)

    @property
    def exits(self):
        return self.given(self.heads)

    def given(self, modules: nn.ModuleList):
        return [lambda x, m=m: m(x) for m in modules] if self.as_functions else modules


def recorded_row(as_functions: bool) -> tuple[Row, EarlyExit, list[Tensor]]:
    """Returns a network, its recording, and an image for each exit."""
    network = Row(as_functions).eval()
    images = torch.randn(60, 2, 4, 4)
    with torch.no_grad():
        scores = [-(z.softmax(1) * z.log_softmax(1)).sum(1) for z in network(images)]
    limits = [each.median().item() for each in scores[:-1]]
    taken = early_exit(network, images, limits).exit_index.tolist()
    chosen = [images[taken.index(index)][None] for index in range(NUM_EXITS)]
    one = EarlyExit(network, limits)
    for index, image in enumerate(chosen):
        assert one(image).exit_index.item() == index
    assert one.is_recorded
    assert Replaying.num_recordings == NUM_EXITS
    return network, one, chosen


def move(part: nn.Sequential) -> None:
    part[-2].weight.data = part[-2].weight.data * 1.5


def assign(part: nn.Sequential) -> None:
    part[-2].weight = nn.Parameter(part[-2].weight * 1.5)


def set_buffer(part: nn.Sequential) -> None:
    part[1].running_mean = torch.ones(2)


def set_eps(part: nn.Sequential) -> None:
    part[1].eps = 0.5


def replace(part: nn.Sequential) -> None:
    part[0] = copy.deepcopy(part[0])
    nn.init.zeros_(part[0].weight)


def add(part: nn.Sequential) -> None:
    part.append(Gain().eval())


def remove(part: nn.Sequential) -> None:
    del part[1]


def train(part: nn.Sequential) -> None:
    part[1].train()


def hook(part: nn.Sequential) -> None:
    part[0].register_forward_hook(lambda module, given, out: 1.5 * out)


def hook_before(part: nn.Sequential) -> None:
    part.register_forward_pre_hook(lambda module, given: (1.5 * given[0],))


MOVES = [move, assign]
OTHERS = [replace, add, remove]
"""Noticed by the first image: what is beside a ReLU may be called by any stage, as the ReLU may."""
CHANGES = [*MOVES, set_buffer, set_eps, *OTHERS]
ENDS = [train, hook, hook_before]
"""After these no network is recorded."""


@pytest.mark.parametrize("as_functions", [False, True])
@pytest.mark.parametrize("change", [*CHANGES, *ENDS])
@pytest.mark.parametrize("stage", range(NUM_EXITS))
def test_a_change_is_noticed_by_the_image_that_meets_it(stage, change, as_functions) -> None:
    network, one, images = recorded_row(as_functions)
    before = [one(image) for image in images]
    change(network.parts[stage])
    for index, image in enumerate(images):
        answers = one(image)
        # The network that is new, and for an image before the change still the old one.
        expected = early_exit(network, image, one.thresholds)
        assert torch.equal(answers.logits, expected.logits)
        assert torch.equal(answers.exit_index, expected.exit_index)
        if index < stage:
            assert torch.equal(answers.logits, before[index].logits)
        is_met = index >= stage
        assert one.is_recorded == (not is_met or change not in ENDS)
        again = NUM_EXITS * (change in OTHERS or (is_met and change in CHANGES))
        assert Replaying.num_recordings == NUM_EXITS + again


@pytest.mark.parametrize("as_functions", [False, True])
@pytest.mark.parametrize("change", [*MOVES, hook_before])
@pytest.mark.parametrize("stage", range(NUM_EXITS))
def test_an_exit_is_looked_at_with_its_stage(stage: int, change, as_functions: bool) -> None:
    network, one, images = recorded_row(as_functions)
    change(network.heads[stage] if change is hook_before else [network.heads[stage][1], None])
    for index, image in enumerate(images):
        expected = early_exit(network, image, one.thresholds)
        assert torch.equal(one(image).logits, expected.logits)
        if index < stage:
            assert (one.is_recorded, Replaying.num_recordings) == (True, NUM_EXITS)
    assert one.is_recorded == (change in MOVES)


def test_what_two_stages_share_is_looked_at_with_the_first_that_runs_it() -> None:
    network, _, images = recorded_row(as_functions=True)
    network.parts[2] = network.parts[1]
    one = EarlyExit(network, [math.inf, math.inf])
    one(images[0])
    first = Replaying.num_recordings
    move(network.parts[2])
    one(images[0])
    assert Replaying.num_recordings == first
    one = EarlyExit(network, [-math.inf, math.inf])
    one(images[0])
    first = Replaying.num_recordings
    move(network.parts[2])
    answers = one(images[0])
    assert answers.exit_index.item() == 1
    assert torch.equal(answers.logits, early_exit(network, images[0], one.thresholds).logits)
    assert Replaying.num_recordings == first + NUM_EXITS


def test_what_no_stage_reads_is_looked_at_with_the_first() -> None:
    """A ReLU has no tensors, so nothing tells which stage calls it."""
    network, one, images = recorded_row(as_functions=False)
    network.parts[2][2].register_forward_hook(lambda module, given, out: 1.5 * out)
    one(images[0])
    assert not one.is_recorded


class Beside(Row):
    """The first stage calls a ReLU that hangs beside what the second one runs."""

    @property
    def stages(self):
        first, second, third = self.parts
        return [lambda x: second[2](first(x)), lambda x: second[1](second[0](x)), third]


def test_what_has_no_tensors_is_looked_for_with_the_first() -> None:
    network, image = Beside(as_functions=True).eval(), torch.randn(1, 2, 4, 4)
    one = EarlyExit(network, [math.inf, math.inf])
    before = one(image).logits
    network.parts[1][2] = Gain()
    after = one(image).logits
    assert torch.equal(after, early_exit(network, image, one.thresholds).logits)
    assert not torch.equal(after, before)


def recalibrated(net: SlimmableWithExits) -> None:
    recalibrate(net, [images(seed=3)], [partial(net, width_mult=0.35)])


@torch.no_grad()
def trained(net: SlimmableWithExits) -> None:
    for parameter in net.parameters():
        parameter.mul_(1.1)


def hooked(net: SlimmableWithExits) -> None:
    net.trunk.fc.register_forward_hook(lambda module, inputs, output: output + 1)


@pytest.mark.parametrize("is_kept", [True, False])
@pytest.mark.parametrize("change", [recalibrated, trained, hooked])
@pytest.mark.parametrize("way", ["image", "stream"])
def test_a_changed_width_is_noticed(way: str, change, is_kept: bool, monkeypatch) -> None:
    """What is recorded is the narrow network that is kept; where none is, the wide one at work."""
    if not is_kept:
        monkeypatch.setattr(Slimmable, "kept", lambda *_: None)
    net = network()
    view, x, late = net.at(0.35), images(2), [math.inf, math.inf]
    if way == "image":
        run = EarlyExit(view, late, "confidence")
        answer = lambda: torch.cat([run(image).logits for image in x.split(1)])  # noqa: E731
    else:
        run = ExitStream(view, late, "confidence", batch_size=2, capture="graphs")

        def answer() -> Tensor:
            run.push(x)
            return run.finish().logits

    for _ in range(3):  # a stream records later
        before = answer()
    num_recordings = Replaying.num_recordings
    assert num_recordings > 0
    change(net)
    for _ in range(3):
        after = answer()
    torch.testing.assert_close(after, early_exit(view, x, late, "confidence").logits)
    assert not torch.allclose(after, before)
    if change is not hooked and (is_kept or change is recalibrated):
        assert Replaying.num_recordings > num_recordings


def test_a_recorded_width_copies_no_weights() -> None:
    net = network()
    run = EarlyExit(net.at(0.35), [math.inf, math.inf], "confidence")
    run(images(1))
    with KernelCount() as count:
        run(images(1))
    assert run.is_recorded
    assert count.names["aten::clone"] <= 1  # of the answer


@pytest.mark.parametrize("is_root", [True, False])
def test_training_ends_no_recording(is_root: bool) -> None:
    network, one, images = recorded_row(as_functions=False)
    part = network if is_root else network.heads[2]
    part.train()
    with pytest.raises(ValueError, match=r"call network.eval\(\)"):
        one(images[2])
    part.eval()
    assert one(images[2]).exit_index.item() == 2
    assert (one.is_recorded, Replaying.num_recordings) == (True, NUM_EXITS)


def test_a_network_in_training_is_refused_before_it_runs(monkeypatch) -> None:
    """On a CPU, which calls functions again, a BN would learn from the image."""
    monkeypatch.setattr(recorded_exits, "Recorder", Recorder)
    network, image = Row(as_functions=False).eval(), torch.randn(1, 2, 4, 4)
    one = EarlyExit(network, [-math.inf, -math.inf])
    one(image)
    assert one.is_recorded
    before = copy.deepcopy(network.state_dict())
    network.train()
    with pytest.raises(ValueError, match=r"call network.eval\(\)"):
        one(image)
    assert all(map(torch.equal, network.state_dict().values(), before.values()))


# --- which stage reads what -----------------------------------------------------------------------


def foreign() -> MultiExitNetwork:
    return with_exits(resnet18(num_classes=5), ["layer1.0", "layer2", "layer4.0"])


@pytest.mark.parametrize(
    ("make", "shape"), [*NETWORKS.values(), (foreign, (3, 32, 32))], ids=[*NETWORKS, "foreign"]
)
def test_modules_are_those_of_the_first_stage_that_they_decide_about(make, shape) -> None:
    """Where a tensor is NaN, the first logits that are tell which stage reads it."""
    network, images = make().eval(), torch.randn(1, *shape)
    reads, state = [Reads() for _ in network.exits], images
    with torch.no_grad():
        for index, read in enumerate(reads):
            with read:
                state = network.stages[index](state)
                network.exits[index](state)
    owned = {each: list(each.parameters(recurse=False)) for each in network.modules()}
    firsts = {each: first_exit(network, images, own[0]) for each, own in owned.items() if own}
    parts = divide(modules_of(network), reads)
    assert sorted(map(id, network.modules())) == sorted(id(m) for part in parts for m in part)
    assert all(parts)
    for index, part in enumerate(parts):
        for module in part:
            inside = [firsts[each] for each in module.modules() if each in firsts]
            assert index == min(inside, default=0)


@torch.no_grad()
def first_exit(network: MultiExitNetwork, images: Tensor, tensor: Tensor) -> int:
    """Returns the first exit for which a tensor matters."""
    value = tensor.clone()
    tensor.fill_(torch.nan)
    is_bad = [logits.isnan().any().item() for logits in network(images)]
    tensor.copy_(value)
    return is_bad.index(True)
