"""Operating points as files: what comes out of them is what the checkpoint says."""

import copy
import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from methods import ANSWERING, METHODS, OF_ANY_WIDTH, WITH_EXITS, build, variants_slow
from PIL import Image
from torch import Tensor, nn

from datamodules import DigitsDataModule, ImageFormat, prepare_images
from lightning_modules.exit_outputs import FoundThresholds
from networks import (
    BranchyAlexNet,
    BranchyLeNet,
    BranchyResNet,
    CifarDenseNet,
    CifarResNet,
    DenseNet,
    MSDNet,
    OnlyUsed,
    ResNet,
    ResNetWithExits,
    SlimmableCifarResNet,
    SlimmableMobileNetV1,
    SlimmableMobileNetV2,
    SlimmableResNet,
    early_exit,
    exit_score,
    extract,
    fold_survival_probs,
    recalibrate,
    run_to_exit,
)
from running import LoadedRun
from running.exporting import written_together
from running.exporting.check import Answers, Classify, checkpoint, compare, find_images, in_batches
from running.exporting.files import (
    as_json,
    onnx_classifier,
    stages_classifier,
    stages_folder,
    write,
)
from running.exporting.onnx_graph import join_exits, to_onnx, to_program
from running.exporting.pieces import EarlyExit, Piece, take_out

# --- networks -------------------------------------------------------------------------------------


def small_msdnet(lazy: bool) -> MSDNet:
    widths = {"num_channels": 4, "growth_rate": 4, "growth_factors": [1, 2]}
    return MSDNet(3, 1, 1, **widths, bottleneck_factors=[1, 2], lazy=lazy)


def universally_slimmable() -> nn.Module:
    network = SlimmableCifarResNet(8, width_mult_range=[0.25, 1.0])
    recalibrate(network, [torch.randn(8, 3, 32, 32)], [partial(network, width_mult=0.3)])
    return extract(network.eval(), 0.3)


SWITCHED = {"width_mults": [0.25, 1.0]}
NETWORKS = {
    **{f"cifar_{kind}": lambda kind=kind: CifarResNet(8, shortcut=kind) for kind in ("A", "B")},
    "cifar_C": lambda: CifarResNet(8, shortcut="C"),
    "cifar_A_average": lambda: CifarResNet(8, shortcut="A-average"),
    "cifar_A_prepend": lambda: CifarResNet(8, shortcut="A-prepend"),
    "preactivation": lambda: CifarResNet(11, preactivation=True, bottleneck=True),
    "plain": lambda: CifarResNet(8, plain=True),
    "folded": lambda: fold_survival_probs(CifarResNet(8), [1.0, 0.8, 0.5]),
    "densenet": lambda: CifarDenseNet(7),
    "memory_efficient": lambda: CifarDenseNet(7, drop_rate=0.2, memory_efficient=True),
    "branchy_lenet": lambda: BranchyLeNet(in_channels=3, image_size=32),
    "branchy_alexnet": BranchyAlexNet,
    "branchy_alexnet_paper": lambda: BranchyAlexNet(taps="paper"),
    "branchy_resnet": lambda: BranchyResNet(8),
    "branchy_resnet_paper": lambda: BranchyResNet(8, taps="paper"),
    "resnet_with_exits": lambda: ResNetWithExits(CifarResNet(8), [0, 2]),
    "msdnet": lambda: small_msdnet(False),
    "msdnet_lazy": lambda: small_msdnet(True),
    "slimmable": lambda: SlimmableCifarResNet(8, **SWITCHED),
    "width": lambda: extract(SlimmableCifarResNet(8, **SWITCHED).eval(), 0.25, fold_bn=True),
    "any_width": universally_slimmable,
}
LARGE = {
    "resnet18": lambda: ResNet(18, num_classes=10),
    "resnet50": lambda: ResNet(50, num_classes=10),
    "densenet121": lambda: DenseNet(121, num_classes=10, memory_efficient=True),
    "slimmable_resnet50": lambda: SlimmableResNet(num_classes=10, **SWITCHED),
    "mobilenet_v1": lambda: SlimmableMobileNetV1(num_classes=10, **SWITCHED),
    "mobilenet_v2": lambda: SlimmableMobileNetV2(num_classes=10, **SWITCHED),
}


def as_list(outputs: Tensor | list[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else outputs


def draw_statistics(network: nn.Module) -> nn.Module:
    """Gives every BN numbers of its own, that its folding can be wrong."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.to(memory_format=torch.channels_last).eval()


def part_of(name: str) -> tuple[nn.Module, Piece]:
    """Returns a network, and what is exported of it."""
    torch.manual_seed(0)
    network = draw_statistics((NETWORKS | LARGE)[name]())
    example = torch.zeros(2, 3, 32, 32)
    part = OnlyUsed(network, network, example)
    outputs = [f"logits{number}" for number in range(len(as_list(network(example))))]
    return network, Piece(part, [example], ["images"], outputs)


@pytest.mark.parametrize(
    "name", [*NETWORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)]
)
def test_every_network_is_a_program_for_any_number_of_images(name: str) -> None:
    network, piece = part_of(name)
    program = to_program(piece.module, piece.example).module()
    for num_images in (1, 3, 7):
        images = torch.randn(num_images, 3, 32, 32)
        with torch.no_grad():
            for logits, same in zip(as_list(network(images)), program([images]), strict=True):
                assert torch.equal(logits, same)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NETWORKS, *LARGE])
def test_every_network_is_an_onnx_file_for_any_number_of_images(name: str, tmp_path: Path) -> None:
    network, piece = part_of(name)
    onnx.save_model(to_onnx(piece), tmp_path / "network.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx")
    for num_images in (1, 3, 7):
        images = torch.randn(num_images, 3, 32, 32)
        with torch.no_grad():
            expected = as_list(network(images))
        found = session.run(None, {"images": images.numpy()})
        for logits, close in zip(expected, found, strict=True):
            assert np.abs(close - logits.numpy()).max() <= 1e-4 * logits.abs().max()
            assert (close.argmax(1) == logits.argmax(1).numpy()).all()


def test_the_program_of_a_large_batch_is_not_cut_into_pieces() -> None:
    """Eagerly the normalisation of B-AlexNet works piece by piece, depending on the batch."""
    network = BranchyAlexNet().eval()
    program = torch.export.export(
        network, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    images = torch.randn(130, 3, 32, 32)
    with torch.no_grad():
        for ours, theirs in zip(network(images), program.module()(images), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_gates_of_blocks_are_exported_and_gates_of_images_refused() -> None:
    class Gated(nn.Module):
        def __init__(self, gates):
            super().__init__()
            self.network, self.gates = CifarResNet(8).eval(), gates

        def forward(self, images):
            return self.network(images, gates=self.gates)

    images = torch.zeros(2, 3, 32, 32)
    gated = Gated([1.0, 0.0, 0.5])
    program = torch.export.export(gated, (images,), strict=False)
    with torch.no_grad():
        assert torch.equal(program.module()(images), gated(images))
    with pytest.raises(RuntimeError, match="fold_survival_probs"):
        torch.export.export(Gated(torch.ones(3, 2)), (images,), strict=False)


# --- points ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[ImageFormat, Tensor]:
    data = DigitsDataModule()
    data.setup("test")
    return data.image_format, next(iter(data.load_eval([torch.arange(60)], "test")))[0]


def fake_run(method: str, digits: tuple[ImageFormat, Tensor], **arguments: object) -> LoadedRun:
    """Returns a network that was never trained, with thresholds that part the images."""
    image_format, images = digits
    torch.manual_seed(0)
    spec = METHODS[method]
    module = build({**spec, "init_args": spec["init_args"] | arguments}).eval()
    draw_statistics(module.net)
    normalized = image_format.normalize(images)
    if method in OF_ANY_WIDTH:
        runs = module.calibration_runs(module.evaluated_points())
        recalibrate(module.net, [normalized], runs)
        module.eval()
    if method == "branchynet_calibrated":
        module.found = FoundThresholds(temperatures=[0.5, 1.5, 3.0], accuracies=[1.0])
        module.found = module.found._replace(curve=[[0.5, 0.5]], macs=[1.0], last_accuracy=1.0)
    if method in WITH_EXITS:
        with torch.no_grad():
            logits = module.answering_net(normalized)
        scores = [exit_score(each, module.exit_criterion) for each in logits[:-1]]
        middle = [(s.sort().values[29] + s.sort().values[30]).item() / 2 for s in scores]
        module.given_thresholds = middle
    return LoadedRun(Path("runs/method/name/seed0"), module, image_format, Path("last.ckpt"))


QUICK = {
    ("resnet", "full"),
    ("stochastic_depth", "full"),
    ("branchynet", "exit1"),
    ("msdnet", "exit1"),
    ("slimmable", "w0.25"),
    ("universally_slimmable", "w0.25"),
}
"""One of each kind; the others are slow."""
POINTS = [
    pytest.param(method, point, marks=() if (method, point) in QUICK else pytest.mark.slow)
    for method in ANSWERING
    for point in build(METHODS[method]).operating_points()
]


@pytest.mark.parametrize(("method", "point"), POINTS)
def test_every_point_is_what_the_checkpoint_says(
    method: str, point: str, digits: tuple[ImageFormat, Tensor], tmp_path: Path
) -> None:
    run = fake_run(method, digits)
    before = [tensor.clone() for tensor in run.module.parameters()]
    taken, images = take_out(run, point), digits[1]
    ours = in_batches(checkpoint(run, point), images, 64)
    for kind in ("onnx", "torch"):
        ((_, classify, _),) = write(run, point, taken, kind, tmp_path / kind)
        for size in (7, 1):
            found = compare(run, point, images, ours, in_batches(classify, images, size))
            assert found.num_same_classes == len(images)
            assert found.difference < 1e-4
    assert all(map(torch.equal, before, run.module.parameters()))


@pytest.mark.parametrize("point", ["exit1", "exit2", "full"])
# Of widths the BNs are in the convolutions; what is left is the test below.
@pytest.mark.parametrize("method", variants_slow(m for m in WITH_EXITS if m != "slimmable_exits"))
def test_an_exit_holds_no_other_exit_and_nothing_behind_it(
    method: str, point: str, digits: tuple[ImageFormat, Tensor]
) -> None:
    run = fake_run(method, digits)
    index = run.module.exit_names.index(point)
    held = sum(p.numel() for p in take_out(run, point).piece.module.parameters())
    names = set()
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: names.add(name))
        for name, module in run.net.named_modules()
    ]
    run_to_exit(run.net, index, torch.zeros(1, *run.image_format.image_shape))
    for hook in hooks:
        hook.remove()
    needed = sum(
        p.numel() for name, p in run.net.named_parameters() if name.rpartition(".")[0] in names
    )
    assert held == needed < sum(p.numel() for p in run.net.parameters())


def test_a_width_is_a_narrow_network(digits: tuple[ImageFormat, Tensor]) -> None:
    run = fake_run("slimmable", digits)
    narrow, wide = (num_weights(run, name) for name in ("w0.25", "full"))
    assert narrow < wide / 10


def test_an_exit_of_a_width_is_narrow_and_ends_there(digits: tuple[ImageFormat, Tensor]) -> None:
    """9 weights and a bias, which was BN's, of every channel of the stem; 10 logits."""
    run = fake_run("slimmable_exits", digits)
    channels = 12  # 0.6 of 16, in multiples of 4
    assert num_weights(run, "w0.6_exit1") == (9 + 1) * channels + 10 * (channels + 1)
    numbers = [num_weights(run, name) for name in ("w0.6_exit1", "w0.6_exit2", "w0.6", "full")]
    assert numbers == sorted(set(numbers))


def num_weights(run: LoadedRun, point: str) -> int:
    return sum(p.numel() for p in take_out(run, point).piece.module.parameters())


# --- early exit -----------------------------------------------------------------------------------


class Adaptive(NamedTuple):
    """A point that leaves early, as it was exported."""

    run: LoadedRun
    point: EarlyExit
    file: Path
    exits: list
    """ONNX models."""
    stages: list


@pytest.fixture(scope="module", params=variants_slow(WITH_EXITS))
def adaptive(
    request: pytest.FixtureRequest,
    digits: tuple[ImageFormat, Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> Adaptive:
    run, folder = fake_run(request.param, digits), tmp_path_factory.mktemp(request.param)
    point = take_out(run, "adaptive")
    file = folder / "adaptive.onnx"
    for _ in write(run, "adaptive", point, "onnx", file):
        pass
    models = (
        [onnx.load(path) for path in sorted(stages_folder(file).glob(f"{kind}*.onnx"))]
        for kind in ("exit", "stage")
    )
    return Adaptive(run, point, file, *models)


def with_thresholds(thresholds: list[float], adaptive: Adaptive, folder: Path) -> list[Classify]:
    """Returns file and folder with other thresholds, and with the models of `adaptive`."""
    other = folder / "stages"
    shutil.copytree(stages_folder(adaptive.file), other)
    for number, model in enumerate(adaptive.exits, start=1):
        onnx.save_model(model, other / f"exit{number}.onnx")
    manifest = json.loads((other / "manifest.json").read_text())
    for part, threshold in zip(manifest["exits"], map(as_json, thresholds), strict=False):
        part["threshold"] = threshold
    (other / "manifest.json").write_text(json.dumps(manifest))
    point = adaptive.point._replace(thresholds=thresholds)
    onnx.save_model(join_exits(point, adaptive.stages, adaptive.exits), folder / "file.onnx")
    return [onnx_classifier(folder / "file.onnx"), stages_classifier(other)]


def test_early_exit_is_what_the_checkpoint_says(
    adaptive: Adaptive, digits: tuple[ImageFormat, Tensor]
) -> None:
    run, images = adaptive.run, digits[1]
    ours = in_batches(checkpoint(run, "adaptive"), images, 64)
    assert set(ours.exits.tolist()) == {1, 2, 3}
    for classify in (
        onnx_classifier(adaptive.file),
        stages_classifier(stages_folder(adaptive.file)),
    ):
        for size in (1, 7, 60):
            found = compare(run, "adaptive", images, ours, in_batches(classify, images, size))
            assert found.num_same_exits == found.num_same_classes == 60
            assert found.difference < 1e-4


@pytest.mark.parametrize("last", [1, 2, 3])
def test_edges_of_thresholds(
    last: int, adaptive: Adaptive, digits: tuple[ImageFormat, Tensor], tmp_path: Path
) -> None:
    """Nobody leaves at an entropy of 0 or a confidence of inf, and all do at the other end."""
    nobody, everybody = (0.0, math.inf) if adaptive.point.criterion == "entropy" else (math.inf, 0)
    thresholds = [float(everybody if number == last else nobody) for number in (1, 2)]
    images = digits[1][:5]
    normalized = adaptive.run.image_format.normalize(images)
    answering = adaptive.run.module.answering_net
    logits = early_exit(answering, normalized, thresholds, adaptive.point.criterion).logits
    for classify in with_thresholds(thresholds, adaptive, tmp_path):
        for size in (5, 1):
            answers = in_batches(classify, images, size)
            assert (answers.exits == last).all()
            assert torch.allclose(answers.probabilities, logits.softmax(1), atol=1e-5)


def test_what_is_not_a_number_never_leaves(
    adaptive: Adaptive, digits: tuple[ImageFormat, Tensor], tmp_path: Path
) -> None:
    exits = copy.deepcopy(adaptive.exits)
    for weights in exits[0].graph.initializer:
        if weights.data_type == onnx.TensorProto.FLOAT:
            spoiled = np.full(weights.dims, np.nan, np.float32)
            weights.CopyFrom(onnx.numpy_helper.from_array(spoiled, weights.name))
    everybody = math.inf if adaptive.point.criterion == "entropy" else 0.0
    blind = adaptive._replace(exits=exits)
    for classify in with_thresholds([everybody] * 2, blind, tmp_path):
        answers = classify(digits[1][:4])
        assert (answers.exits == 2).all()
        assert answers.probabilities.isfinite().all()


def test_no_images_have_no_answers(adaptive: Adaptive, digits: tuple[ImageFormat, Tensor]) -> None:
    answers = stages_classifier(stages_folder(adaptive.file))(digits[1][:0])
    assert answers.probabilities.shape == (0, 10)
    assert answers.exits.shape == (0,)


def nodes_run(model: Path, image: Tensor, folder: Path) -> str:
    """Returns the names of the nodes that onnxruntime says it has run."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(model, options)
    session.run(None, {"images": image.numpy()})
    events = json.loads(Path(session.end_profiling()).read_text())
    return " ".join(event["name"] for event in events if event["cat"] == "Node")


def test_the_runtime_stops_where_the_image_leaves(
    adaptive: Adaptive, digits: tuple[ImageFormat, Tensor], tmp_path: Path
) -> None:
    """It names what it has run."""
    answers = in_batches(onnx_classifier(adaptive.file), digits[1], 1)
    for number in (1, 2, 3):
        image = digits[1][answers.exits == number][:1]
        names = nodes_run(adaptive.file, image, tmp_path)
        for stage in (1, 2, 3):
            assert (f"stage{stage}/" in names) == (f"exit{stage}/" in names) == (stage <= number)


def test_files_say_what_they_are(adaptive: Adaptive) -> None:
    model = onnx.load(adaptive.file)
    onnx.checker.check_model(model, full_check=True)
    facts = {each.key: each.value for each in model.metadata_props}
    assert facts["point"] == "adaptive"
    assert facts["run"] == "method/name/seed0"
    assert json.loads(facts["class_names"]) == [str(digit) for digit in range(10)]
    assert json.loads(facts["image_shape"]) == [1, 32, 32]
    assert facts["torch"] == torch.__version__
    assert facts["onnx"] == onnx.__version__
    assert int(facts["opset"]) == model.opset_import[0].version
    assert "uint8 (N, 1, 32, 32), grey" in facts["images"]
    assert str(Path(__file__).parent.parent).encode() not in adaptive.file.read_bytes()
    manifest = json.loads((stages_folder(adaptive.file) / "manifest.json").read_text())
    assert manifest["criterion"] == adaptive.point.criterion == facts["criterion"]
    assert [each["threshold"] for each in manifest["exits"]] == [*adaptive.point.thresholds, None]
    assert {key: manifest[key] for key in ("point", "torch")} == {
        key: facts[key] for key in ("point", "torch")
    }
    inputs = [(each.name, each.type.tensor_type.elem_type) for each in model.graph.input]
    assert inputs == [("images", onnx.TensorProto.UINT8)]
    assert [each.name for each in model.graph.output] == ["probabilities", "exit"]


# --- checks ---------------------------------------------------------------------------------------


def test_answers_that_differ_are_refused(digits: tuple[ImageFormat, Tensor]) -> None:
    run = fake_run("branchynet", digits)
    images = digits[1]
    ours = in_batches(checkpoint(run, "adaptive"), images, 64)
    assert compare(run, "adaptive", images, ours, ours).difference == 0
    probabilities = ours.probabilities.clone()
    probabilities[3, 0] += 0.01
    with pytest.raises(ValueError, match=r"not written.*differ by 1\.0e-02"):
        compare(run, "adaptive", images, ours, Answers(probabilities, ours.exits))
    with pytest.raises(ValueError, match="not written"):
        compare(run, "adaptive", images, ours, Answers(probabilities * math.nan, ours.exits))
    exits = ours.exits.clone()
    exits[5] = exits[5] % 3 + 1
    with pytest.raises(ValueError, match="1 of 60 images take another exit"):
        compare(run, "adaptive", images, ours, Answers(ours.probabilities, exits))


def test_an_edge_is_one_of_the_width_that_a_point_has(digits: tuple[ImageFormat, Tensor]) -> None:
    run, images = fake_run("slimmable_exits", digits), digits[1]
    (name,) = (name for name in run.module.early_points() if name.startswith("w"))
    with torch.no_grad():
        first, *_ = run.module.network_of(name)(run.image_format.normalize(images))
    edge = exit_score(first, run.module.exit_criterion)[7].item()
    run.module.given_thresholds = [edge, *run.module.given_thresholds[1:]]
    ours = in_batches(checkpoint(run, name), images, 64)
    for index in (7, 8):
        exits = ours.exits.clone()
        exits[index] = 2 if exits[index] == 1 else 1
        theirs = Answers(ours.probabilities, exits)
        if index == 7:
            assert compare(run, name, images, ours, theirs).num_same_exits == 59
        else:
            with pytest.raises(ValueError, match="1 of 60 images take another exit"):
                compare(run, name, images, ours, theirs)


def test_images_of_a_folder_are_what_predict_sees(
    digits: tuple[ImageFormat, Tensor], tmp_path: Path
) -> None:
    run = fake_run("resnet", digits)
    pixels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000  # 16 bits
    Image.fromarray(pixels).save(tmp_path / "a.png")
    images, _ = find_images(run, tmp_path)
    assert torch.equal(images, prepare_images([tmp_path / "a.png"], digits[0]))
    assert images.unique().numel() > 50


def test_ties_are_no_difference(digits: tuple[ImageFormat, Tensor]) -> None:
    run = fake_run("resnet", digits)
    images = digits[1][:2]
    tie = torch.tensor([[0.5, 0.499999], [0.9, 0.1]])
    other = torch.tensor([[0.499999, 0.5], [0.9, 0.1]])
    found = compare(run, "full", images, Answers(tie), Answers(other))
    assert found.num_same_classes == 1
    near, other = torch.tensor([[0.5003, 0.4997]]), torch.tensor([[0.4997, 0.5003]])
    with pytest.raises(ValueError, match="0 same classes"):
        compare(run, "full", images[:1], Answers(near), Answers(other))


def test_nothing_is_left_of_what_failed(tmp_path: Path) -> None:
    files = [tmp_path / "new" / "a.onnx", tmp_path / "new" / "a_stages"]

    def fail() -> None:
        with written_together(files, False) as there:
            (there / "a.onnx").write_text("half")
            raise ValueError("it differs")

    with pytest.raises(ValueError, match="it differs"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_replaced_on_request_alone(tmp_path: Path) -> None:
    files = [tmp_path / "a.onnx", tmp_path / "a_stages"]
    for content in ("old", "new"):
        with written_together(files, content == "new") as there:
            (there / "a.onnx").write_text(content)
            (there / "a_stages").mkdir()
            (there / "a_stages" / "stage1.onnx").write_text(content)
    assert files[0].read_text() == "new"
    assert (files[1] / "stage1.onnx").read_text() == "new"
    assert sorted(tmp_path.iterdir()) == files
    with (
        pytest.raises(FileExistsError, match="give --overwrite"),
        written_together(files, False),
    ):
        pass
