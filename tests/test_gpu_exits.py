"""Early exit on a CUDA device: recorded stages answer as eager ones, and the host never waits."""

import math
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from test_exit_stream import NETWORKS, Witness, thresholds_of, write_images
from test_slimmable_exits import network as calibrated_width
from torch import Tensor

from networks import (
    CifarResNet,
    EarlyExit,
    ExitStream,
    ResNetWithExits,
    Staged,
    early_exit,
    early_exit_stream,
    exit_stream,
    join_answers,
    recalibrate,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def strict_arithmetic():
    """TF32 rounds differently at every batch size; and a warning says that nothing is recorded."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs kernel by kernel")
        yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def answer_all(stream: ExitStream, images: Tensor) -> Tensor:
    """Returns the logits of all images."""
    parts = stream.push(images), stream.finish()
    return join_answers([part for part in parts if part is not None]).logits


def small_resnet() -> ResNetWithExits:
    torch.manual_seed(0)
    return ResNetWithExits(CifarResNet(8), [0, 2]).cuda().eval()


@pytest.mark.parametrize(
    ("criterion", "memory_format"),
    [("entropy", torch.channels_last), ("confidence", torch.contiguous_format)],
)
@pytest.mark.parametrize("name", NETWORKS)
def test_recorded_exits_are_those_of_early_exit(name: str, criterion: str, memory_format) -> None:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    network = make().double().cuda().to(memory_format=memory_format).eval()
    images = torch.randn(150, *shape, dtype=torch.float64).cuda()
    images = images.to(memory_format=memory_format)
    thresholds = thresholds_of(network, images, criterion)
    expected = early_exit(network, images, thresholds, criterion)
    stream = ExitStream(network, thresholds, criterion, 8, "graphs")
    one = EarlyExit(network, thresholds, criterion)
    ones = join_answers([one(image) for image in images.split(1)])
    for sizes in ([150], [40, 3, 0, 107]):
        parts = [*map(stream.push, images.split(sizes)), stream.finish()]
        answers = join_answers([part for part in parts if part is not None])
        for logits, taken in (answers, ones):
            assert torch.equal(taken, expected.exit_index)
            torch.testing.assert_close(logits, expected.logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", ["tensor", "tuple", "nested"])
@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_bits_and_order(kind: str, batch_size: int, deterministic: bool, monkeypatch) -> None:
    monkeypatch.setattr(exit_stream, "WINDOW", 8)
    logits = torch.randn(200, 4, 3, generator=torch.Generator().manual_seed(0)) * 2
    images = write_images(logits).cuda()
    expected = early_exit(Witness(4, 3, kind), images, [0.5, 0.4, 0.6])
    stream = ExitStream(QuietWitness(4, 3, kind), [0.5, 0.4, 0.6], "entropy", batch_size, "graphs")
    torch.use_deterministic_algorithms(deterministic)
    try:
        for _ in range(3):
            parts = [stream.push(batch) for batch in images.split([60, 1, 0, 39, 100])]
            answers = join_answers([each for each in [*parts, stream.finish()] if each is not None])
            assert torch.equal(answers.exit_index, expected.exit_index)
            assert torch.equal(answers.logits, expected.logits)
    finally:
        torch.use_deterministic_algorithms(False)


class QuietWitness(Witness):
    """A witness that does not look at what it computes, which no recording allows."""

    def exit(self, index: int, state) -> Tensor:
        logits = self.images(state)[:, :, 0, 0] * (-1) ** (index + 1)
        return logits[:, index * self.num_classes : (index + 1) * self.num_classes]


def test_the_host_never_waits_for_the_whole_device() -> None:
    """Once recorded: it waits for the event of an earlier run, and for nothing else."""
    network, images = small_resnet(), torch.randn(512, 3, 16, 16, device="cuda")
    stream = ExitStream(network, thresholds_of(network, images, "entropy"), "entropy", 16, "graphs")
    for _ in range(2):
        answer_all(stream, images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        answer_all(stream, images)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_one_image_asks_once_per_exit() -> None:
    network, image = small_resnet(), torch.randn(1, 3, 16, 16, device="cuda")
    one = EarlyExit(network, [-math.inf, -math.inf])
    one(image)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            one(image)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([each for each in caught if "synchroniz" in str(each.message)]) == 3


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(poison: float) -> None:
    logits = torch.zeros(90, 3, 2)
    logits[:, :, 0] = 9
    logits[70] = poison
    stream = ExitStream(QuietWitness(3, 2), [0.5, 0.5], "entropy", 8, "graphs")
    answer_all(stream, write_images(torch.randn(64, 3, 2)).cuda())  # everything is recorded
    with pytest.raises(FloatingPointError, match="have logits that are not finite"):
        answer_all(stream, write_images(logits).cuda())
    one = EarlyExit(QuietWitness(3, 2), [0.5, 0.5])
    with pytest.raises(FloatingPointError, match="1 of 1 images"):
        one(write_images(logits)[70:71].cuda())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_recorded(dtype: torch.dtype) -> None:
    network, images = small_resnet(), torch.randn(64, 3, 16, 16, device="cuda")
    with torch.autocast("cuda", dtype):
        expected = early_exit(network, images, [-math.inf, -math.inf])
        (answers,) = early_exit_stream(
            network, [images], [-math.inf, -math.inf], batch_size=8, capture="graphs"
        )
        one = EarlyExit(network, [-math.inf, -math.inf])
        ones = join_answers([one(image) for image in images.split(1)])
    for got in (answers, ones):
        assert got.logits.dtype == dtype
        torch.testing.assert_close(got.logits, expected.logits, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("change", ["in place", "assigned", "assigned in the last stage"])
def test_other_weights_are_answered_with(change: str) -> None:
    """Those that lie elsewhere need another recording."""
    network, images = small_resnet(), torch.randn(64, 3, 16, 16, device="cuda")
    limits = [-math.inf, -math.inf]
    stream, one = ExitStream(network, limits, "entropy", 8, "graphs"), EarlyExit(network, limits)
    for _ in range(2):
        answer_all(stream, images)
    one(images[:1])
    part = "trunk.layer3" if "last" in change else ""
    state = network.state_dict()
    other = {name: tensor * 1.1 for name, tensor in state.items() if name.startswith(part)}
    network.load_state_dict(other, strict=False, assign=change != "in place")
    expected = early_exit(network, images, limits).logits
    torch.testing.assert_close(answer_all(stream, images), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(one(images[:1]).logits, expected[:1], rtol=1e-3, atol=1e-3)


def test_a_width_answers_with_its_weights_and_statistics() -> None:
    net = calibrated_width().cuda().eval()
    view, images = net.at(0.35), torch.randn(16, 3, 16, 16, device="cuda")
    limits = [-math.inf, -math.inf]
    stream, one = ExitStream(view, limits, "entropy", 8, "graphs"), EarlyExit(view, limits)
    for change in (
        lambda: None,
        lambda: recalibrate(net, [images], [partial(net, width_mult=0.35)]),
    ):
        change()
        expected = early_exit(view, images, limits).logits
        for _ in range(2):
            torch.testing.assert_close(answer_all(stream, images), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(one(images[:1]).logits, expected[:1], rtol=1e-3, atol=1e-3)
    assert one.is_recorded


def test_what_cannot_be_recorded_runs_eagerly_and_says_so_once() -> None:
    """In a process of its own: torch does not quite recover from a recording that fails."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("runs kernel by kernel: ") == 2


def run_what_cannot_be_recorded() -> None:
    network, images = small_resnet(), torch.randn(32, 3, 16, 16).cuda()

    def ask(images: Tensor) -> Tensor:
        """Waits for a value, which no recording allows."""
        return network.stages[0](images * float(images.isfinite().all()))

    staged = Staged([ask, *network.stages[1:]], network.exits)
    limits = [-math.inf, -math.inf]
    expected = early_exit(staged, images, limits).logits
    stream, one = ExitStream(staged, limits, "entropy", 8, "graphs"), EarlyExit(staged, limits)
    for logits in (
        answer_all(stream, images),
        torch.cat([one(image).logits for image in images.split(1)]),
    ):
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


if __name__ == "__main__":
    run_what_cannot_be_recorded()
