"""What the command `profile` measures: against closed forms, torchvision, and a second count."""

import csv
import re
from pathlib import Path

import methods
import pytest
import torch
import torchvision
import yaml
from rich.console import Console
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from benchmarks.densenet_memory import StorageWatch
from networks import (
    CifarDenseNet,
    CifarResNet,
    DenseNet,
    ResNet,
    SlimmableMobileNetV2,
    count_exit_macs,
    count_macs,
    count_params,
    count_params_run,
    count_stage_macs,
    count_stage_params,
    extract,
    kept_bytes,
    peak_bytes,
    profiling,
    time_stages,
    walk_stages,
    walk_whole,
)
from running import main
from running.commands.profile import table_of
from running.profile import Costs, profile, profile_experiment

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
EXPERIMENTS = sorted(
    path
    for path in (ROOT / "experiments").rglob("*.yaml")
    if "model" in yaml.safe_load(path.read_text())
)


def plain(inplace: bool) -> nn.Sequential:
    """Two convolutions and a classifier, at 6x6."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(inplace),
        nn.Conv2d(8, 4, 1),
        nn.Flatten(),
        nn.Linear(4 * 36, 5),
    )


def seed_free(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_memory_of_a_plain_network_is_that_of_its_formula(inplace):
    """Backward needs what the ReLU put out, once for two readers, and what the classifier reads."""
    network, image = plain(inplace), seed_free(1, 3, 6, 6)
    walk = walk_whole("all", network)
    assert kept_bytes(network, walk, image) == {"all": 4 * (8 + 4) * 36}
    # Without gradients a layer's input lives while it runs: that of the ReLU, unless it is its
    # output, or that of the second convolution.
    live = 8 + 4 if inplace else 8 + 8
    assert peak_bytes(network.eval(), walk, image) == {"all": 4 * live * 36}


def test_memory_of_stages_is_what_each_is_the_first_to_keep():
    network, image = plain(inplace=False), seed_free(1, 3, 6, 6)
    walk = walk_stages(network, network)
    assert kept_bytes(network, walk, image) == {"0": 4 * 8 * 36, "2": 0, "4": 4 * 4 * 36}
    # The second stage begins when the first has let go of all but its output.
    peaks = peak_bytes(network.eval(), walk, image)
    assert peaks == {"0": 4 * 16 * 36, "2": 4 * 12 * 36, "4": 4 * (4 * 36 + 5)}


@pytest.mark.parametrize(
    "network",
    [
        CifarResNet(8),
        CifarDenseNet(13, 6),
        CifarDenseNet(13, 6, memory_efficient=True),
        CifarDenseNet(22, 6, bottleneck=True, compression=0.5, memory_efficient=True),
    ],
    ids=["resnet", "densenet", "memory-efficient", "memory-efficient bottleneck"],
)
def test_kept_bytes_are_what_lives_behind_the_pass(network):
    """Weak references to all storages find what autograd keeps, whoever has told it to."""
    image = seed_free(1, 3, 32, 32)
    live = {}
    for count in (2, 4):
        images = image.expand(count, -1, -1, -1).clone()
        with StorageWatch() as watch:
            logits = network(images)
        live[count] = watch.live_bytes([images, *network.parameters(), *network.buffers()])
        live[count] -= logits.nbytes
    kept = kept_bytes(network, walk_whole("", network), image)
    assert kept == {"": (live[4] - live[2]) / 2}


def test_a_memory_efficient_densenet_shows_what_it_saves():
    image, kept = seed_free(1, 3, 32, 32), {}
    for efficient in (False, True):
        network = CifarDenseNet(40, memory_efficient=efficient)
        whole = kept_bytes(network, walk_whole("", network), image)[""]
        by_stage = kept_bytes(network, walk_stages(network, network), image)
        assert sum(by_stage.values()) == whole  # no hook has made it keep more
        kept[efficient] = whole
    assert kept[True] < 0.25 * kept[False]


def test_a_pass_that_was_measured_leaves_nothing_behind(monkeypatch):
    """Whoever hands a tensor with its graph to that graph keeps both for good."""
    network, image, storages = CifarResNet(8), seed_free(1, 3, 32, 32), []

    def watched(storage):
        storages.append(StorageWeakRef(storage))
        return storages[-1]

    known = profiling._storages(network, image)
    monkeypatch.setattr(profiling, "StorageWeakRef", watched)
    kept_bytes(network, walk_whole("", network), image)
    others = [ref for ref in storages if ref not in known]
    assert len(others) > 20
    assert all(ref.expired() for ref in others)


# --- parity ---------------------------------------------------------------------------------------


def costs_of(network: nn.Module) -> list[dict[str, int]]:
    """Returns MACs, parameters and bytes kept by stage, of an image of ImageNet's size."""
    image, walk = torch.empty(1, 3, 224, 224, device="meta"), walk_stages(network, network)
    kept = kept_bytes(network.train(), walk, image)
    macs, params = count_stage_macs(walk, image), count_stage_params(network, walk, image)
    assert sum(macs.values()) == count_macs(network.eval(), image)
    assert sum(params.values()) == count_params(network)
    return [macs, params, kept]


def test_a_resnet_costs_what_torchvisions_does_stage_by_stage():
    """And keeps as much for backward."""
    with torch.device("meta"):
        ours, theirs = costs_of(ResNet(50)), costs_of(torchvision.models.resnet50())
    assert list(ours[0]) == ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]
    assert ours == theirs


@pytest.mark.slow
def test_a_densenet_costs_what_torchvisions_does():
    with torch.device("meta"):
        ours, theirs = costs_of(DenseNet(121)), costs_of(torchvision.models.densenet121())
    assert [sum(each.values()) for each in ours] == [sum(each.values()) for each in theirs]


def test_a_mobilenet_costs_what_torchvisions_does_and_keeps_no_copies():
    """Torch's in-place ReLU6 keeps its input, and its result is kept by the layer behind it."""
    with torch.device("meta"):
        ours = costs_of(SlimmableMobileNetV2(1000, width_mults=[1.0]))
        network = torchvision.models.mobilenet_v2(dropout=0.0)
        theirs = costs_of(network)
        sizes: list[int] = []
        for module in network.modules():
            if isinstance(module, nn.ReLU6):
                module.register_forward_hook(lambda _, inputs, output: sizes.append(output.nbytes))
        network(torch.empty(1, 3, 224, 224))
    *counts, kept = (
        [sum(each.values()) for each in pair] for pair in zip(ours, theirs, strict=True)
    )
    assert all(own == other for own, other in counts)
    assert kept[1] - kept[0] == sum(sizes[:-1])  # behind the last one nobody keeps the result


# --- stages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", methods.METHODS)
def test_stages_are_the_whole_network(method):
    module = methods.build(methods.METHODS[method])
    rows = profile(module, (1, 32, 32), CPU, batch_size=2)
    points = {row.name: row for row in rows if row.kind == "point"}
    stages = [row for row in rows if row.kind == "stage"]
    assert list(points) == list(module.operating_points())
    assert len(stages) > 1
    assert all(row.ms_alone > 0 and row.ms_in_batch > 0 for row in rows)
    image = seed_free(1, 1, 32, 32)
    whole = module.net if hasattr(module, "exit_names") else module.operating_points()["full"]
    assert sum(row.macs for row in stages) == count_macs(whole, image)
    assert sum(row.params for row in stages) == count_params_run(module.net, whole, image)
    macs, params = module.costs(image)["full"]
    assert (points["full"].macs, points["full"].params) == (macs, params)
    assert sum(row.kept_bytes for row in stages) >= points["full"].kept_bytes > 0
    assert max(row.peak_bytes for row in stages) >= points["full"].peak_bytes > 0


def test_stages_and_exits_cost_what_they_cost_apart():
    net = methods.build(methods.METHODS["msdnet"]["init_args"]["net"]).eval()
    image = seed_free(1, 1, 32, 32)
    macs = count_stage_macs(walk_stages(net, net), image)
    assert list(macs) == ["stage1", "exit1", "stage2", "exit2", "stage3", "exit3"]
    costs = count_exit_macs(net, image)
    assert list(macs.values())[::2] == costs.stages
    assert list(macs.values())[1::2] == costs.exits


def test_time_of_a_stage_is_the_median_of_its_rounds(monkeypatch):
    now, rounds = [0.0], []
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: now[0])

    def walk(images, mark):
        rounds.append(None)
        for name, seconds in (("a", {1: 100.0, 2: 7.0}.get(len(rounds), 1.0)), ("b", 3.0)):
            mark(name)
            now[0] += seconds
        mark("a")  # again
        now[0] += 1.0

    times = time_stages(walk, torch.zeros(4, 1), num_rounds=3)
    assert len(rounds) == 4
    assert times == {"a": 500.0, "b": 750.0}


def test_given_thresholds_cost_what_an_image_costs_that_stays():
    spec = methods.METHODS["branchynet"]
    spec = spec | {"init_args": spec["init_args"] | {"exit_thresholds": [0.3, 0.3]}}
    module = methods.build(spec)
    rows = {row.name: row for row in profile(module, (1, 32, 32), CPU, 2) if row.kind == "point"}
    assert list(rows) == ["exit1", "exit2", "full", "adaptive"]
    leaving = count_exit_macs(module.net, seed_free(1, 1, 32, 32)).leaving
    assert rows["adaptive"].macs == leaving[-1] > rows["full"].macs
    assert rows["adaptive"].kept_bytes is None  # training leaves nobody early


def test_given_thresholds_cost_what_the_narrow_network_does_at_a_width():
    spec = methods.METHODS["slimmable_exits"]
    spec = spec | {"init_args": spec["init_args"] | {"exit_thresholds": [0.3, 0.3]}}
    module = methods.build(spec)
    rows = {row.name: row for row in profile(module, (1, 32, 32), CPU, 2) if row.kind == "point"}
    narrow = extract(module.net, 0.6, gates=module.survival_probs)
    leaving = count_exit_macs(narrow, seed_free(1, 1, 32, 32)).leaving
    assert rows["w0.6_adaptive"].macs == leaving[-1] > rows["w0.6"].macs
    assert rows["w0.6_adaptive"].params == count_params(narrow) < rows["adaptive"].params
    assert rows["adaptive"].params == count_params(module.net)


# --- experiments ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_experiment_can_be_profiled_without_its_data(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("running.profile.TIMES", {"ms_alone": 1, "ms_in_batch": 1})
    rows = profile_experiment(path, CPU, batch_size=1)
    assert {row.kind for row in rows} == {"point", "stage"}
    assert all(row.macs >= 0 and row.peak_bytes > 0 and row.ms_alone > 0 for row in rows)
    assert list(tmp_path.iterdir()) == []


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(methods.config("branchynet")))
    return path


def test_several_experiments_are_a_table_each_a_file_and_a_picture(experiment, tmp_path, capsys):
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(methods.config("universally_slimmable")))
    out = tmp_path / "new" / "folder"
    words = ["-c", str(experiment), "-c", str(other), "--batch_size", "3", "--out", str(out)]
    before = set(tmp_path.iterdir())
    assert main(["profile", *words]) == 0
    assert {path.name for path in out.iterdir()} == {"profile.csv", "profile.png"}
    assert set(tmp_path.iterdir()) - before == {tmp_path / "new"}
    assert (out / "profile.png").read_bytes().startswith(b"\x89PNG")
    with (out / "profile.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["experiment", *Costs._fields, "batch_size", "device"]
    assert list(dict.fromkeys(row["experiment"] for row in rows)) == [str(experiment), str(other)]
    assert {row["batch_size"] for row in rows} == {"3"}
    points = [row["name"] for row in rows if row["kind"] == "point"]
    assert points == ["exit1", "exit2", "full", "w0.25", "w0.6", "full"]
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines() if str(tmp_path) not in line)
    assert "stage3" in printed
    assert "w0.6" in printed

    assert main(["profile", *words]) == 2  # what is there is not lost
    assert "profile.csv exists: remove it" in capsys.readouterr().err


def test_without_out_nothing_is_written(experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    assert main(["profile", "-c", str(experiment), "--batch_size", "1", "--device", "cpu"]) == 0
    assert set(tmp_path.rglob("*")) == before


def test_the_table_fits_80_columns_whatever_the_numbers():
    row = Costs("stage", "a_stage_of_a_very_long_name", 10**12, 10**9, 10**10, 10**9, 1e4, 1e-4)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table_of("x", [row], 1024))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert all(cell in capture.get() for cell in ("1T", "1G", "9,537", "954", "10,000", "0.0001"))


MISTAKES = {
    "no file": (["-c", "{tmp}/smal.yaml"], r"no experiment .*smal\.yaml: did you mean .*small"),
    "a machine file": (["-c", str(ROOT / "experiments/machines/gpu.yaml")], "gpu.yaml has no mod"),
    "a sweep": (["-c", str(ROOT / "experiments/sweep.yaml")], "sweep.yaml has no model"),
    "no YAML": (["-c", "{tmp}/broken.yaml"], "broken.yaml is no YAML"),
    "no GPU": (["-c", "{tmp}/small.yaml", "--device", "cuda"], "torch finds no GPU"),
    "another device": (["-c", "{tmp}/small.yaml", "--device", "tpu"], "invalid choice: 'tpu'"),
    "no images": (["-c", "{tmp}/small.yaml", "--batch_size", "0"], "--batch_size is 0: give 1"),
    "twice": (["-c", "{tmp}/small.yaml", "-c", "{tmp}/small.yaml"], "small.yaml is given twice"),
    "no folder": (["-c", "{tmp}/small.yaml", "--out", "{tmp}/small.yaml"], "cannot be written to"),
    "nothing": ([], "required: -c"),
    "a wrong key": (["-c", "{tmp}/wrong.yaml"], "Key 'modle' is not expected|'modle'"),
    "channels": (["-c", "{tmp}/channels.yaml"], "takes 3 channels and the images have 1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name, experiment, tmp_path, capsys):
    (tmp_path / "broken.yaml").write_text("model: [")
    config = methods.config("resnet")
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(config | {"modle": 3}))
    config["model"]["init_args"]["net"]["init_args"]["in_channels"] = 3
    (tmp_path / "channels.yaml").write_text(yaml.safe_dump(config))
    if name == "no GPU" and torch.cuda.is_available():
        pytest.skip("is about machines without a GPU, and there is one")
    words, message = MISTAKES[name]
    assert main(["profile", *(word.replace("{tmp}", str(tmp_path)) for word in words)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "Seed set" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert re.search(message, lines[0])
