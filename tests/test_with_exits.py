"""Exits on networks of torchvision and timm: the network stays what it is, bit for bit."""

import copy
import pickle
from functools import partial

import methods
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import yaml
from torch import Tensor, nn

from lightning_modules import LitResNet
from networks import (
    WithExits,
    count_exit_macs,
    count_macs,
    early_exit,
    exit_score,
    exits_taken,
    load_weights,
    places_to_cut,
    run_to_exit,
    with_exits,
)
from networks.exit_heads import ReadOut
from running.arguments import StrictParser

tv = torchvision.models


def slow(name: str, *values: object):
    return pytest.param(name, *values, id=name, marks=pytest.mark.slow)


def quick(name: str, *values: object):
    return pytest.param(name, *values, id=name)


LAYERS = ["layer1", "layer2", "layer3"]
TRUNKS = {  # how it is built for a number of pixels, places, what its exits read
    "resnet50": (lambda size: tv.resnet50(), LAYERS, "channels_first"),
    "mobilenet_v2": (
        lambda size: tv.mobilenet_v2(),
        ["features.3", "features.6", "features.13"],
        "channels_first",
    ),
    "efficientnet_b0": (
        lambda size: tv.efficientnet_b0(),
        ["features.2", "features.3.1", "features.5"],
        "channels_first",
    ),
    "densenet121": (
        lambda size: tv.densenet121(),
        ["features.denseblock1", "features.transition2", "features.denseblock3"],
        "channels_first",
    ),
    "convnext_tiny": (
        lambda size: tv.convnext_tiny(),
        ["features.1", "features.4", "features.5.3"],
        "channels_first",
    ),
    "vit_b_16": (
        lambda size: tv.vit_b_16(image_size=size),
        [f"encoder.layers.encoder_layer_{k}" for k in (2, 5, 8)],
        "tokens 0 to 0",
    ),
    "swin_t": (lambda size: tv.swin_t(), ["features.1", "features.3"], "channels_last"),
    "timm vit_tiny": (
        lambda size: timm.create_model("vit_tiny_patch16_224", img_size=size),
        ["blocks.2", "blocks.5", "blocks.8"],
        "tokens 0 to 0",
    ),
    "timm efficientnetv2_rw_t": (
        lambda size: timm.create_model("efficientnetv2_rw_t", drop_rate=0.2, drop_path_rate=0.2),
        ["blocks.1", "blocks.3", "blocks.4.2"],
        "channels_first",
    ),
    "timm mixer": (
        lambda size: timm.create_model("mixer_s16_224", img_size=size),
        ["blocks.3"],
        None,  # as many tokens as the images have pieces
    ),
}
SMALL = ("mobilenet_v2", "timm vit_tiny")
EVERY = [(quick if name in SMALL else slow)(name) for name in TRUNKS]


def build(name: str, size: int = 64) -> WithExits:
    """Returns a network in which no branch is closed by weights that are 0."""
    torch.manual_seed(3)
    network = TRUNKS[name][0](size)
    for parameter in network.parameters():
        if parameter.is_meta:
            continue
        if not parameter.any() or (parameter == 1e-6).all():  # a layer scale
            nn.init.normal_(parameter, std=0.2)
    return with_exits(network, TRUNKS[name][1])


def last_stage(network: WithExits, images: Tensor) -> Tensor:
    return run_to_exit(network, network.num_exits - 1, images)


def train_once(network: nn.Module, run, images: Tensor) -> tuple:
    """Returns logits, gradients and BN statistics of a step."""
    torch.manual_seed(5)  # of dropout
    logits = run(images)
    F.cross_entropy(logits, torch.arange(len(images))).backward()
    return logits, [each.grad for each in network.parameters()], list(network.buffers())


def read_by(exit_here: nn.Sequential) -> str:
    return next(layer.extra_repr() for layer in exit_here if isinstance(layer, ReadOut))


def assert_same(one, other) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


# --- the networks of others -----------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("training", [False, True])
def test_last_exit_is_the_network_bit_for_bit(name: str, training: bool) -> None:
    """Gradients and BN statistics, too."""
    network, images = build(name).train(training), torch.randn(2, 3, 64, 64)
    original = copy.deepcopy(network.network)
    expected = train_once(original, original, images)
    assert_same(train_once(network.network, partial(last_stage, network), images), expected)


@pytest.mark.parametrize("name", EVERY)
def test_all_exits_train(name: str) -> None:
    network = build(name).train()
    expected = TRUNKS[name][2]
    logits = network(torch.randn(2, 3, 64, 64))
    sum(F.cross_entropy(each, torch.tensor([1, 2])) for each in logits).backward()
    for exit_here in network.exits[:-1]:
        assert expected in (None, read_by(exit_here))
        assert all(each.grad.any() for each in exit_here.parameters())


PUBLISHED = {  # GMACs of torchvision's documentation, of images of 224 pixels
    "resnet50": tv.ResNet50_Weights.IMAGENET1K_V1,
    "mobilenet_v2": tv.MobileNet_V2_Weights.IMAGENET1K_V1,
    "efficientnet_b0": tv.EfficientNet_B0_Weights.IMAGENET1K_V1,
    "densenet121": tv.DenseNet121_Weights.IMAGENET1K_V1,
    "convnext_tiny": tv.ConvNeXt_Tiny_Weights.IMAGENET1K_V1,
    "vit_b_16": tv.ViT_B_16_Weights.IMAGENET1K_V1,
    "swin_t": tv.Swin_T_Weights.IMAGENET1K_V1,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_macs_of_all_stages_are_those_of_the_network(name: str) -> None:
    """And those that torchvision publishes."""
    with torch.device("meta"):
        network, image = build(name, size=224).eval(), torch.empty(1, 3, 224, 224)
    costs = count_exit_macs(network, image)
    assert costs.trunk == count_macs(network.network, image)
    assert costs.trunk == pytest.approx(1e9 * PUBLISHED[name].meta["_ops"], rel=0.02)
    for index, stages in enumerate(costs.without_branches[:-1]):
        macs = count_macs(partial(run_to_exit, network, index), image)
        assert macs == stages + costs.exits[index] < costs.trunk
    assert all(macs < 0.001 * costs.trunk for macs in costs.exits)


@pytest.mark.parametrize("name", EVERY)
def test_leaving_early_is_a_part_of_the_full_pass(name: str) -> None:
    network, images = build(name).double().eval(), torch.randn(6, 3, 64, 64).double()
    every_exit = torch.stack(network(images), 1)
    scores = exit_score(every_exit.flatten(0, 1), "entropy").view(6, -1)
    thresholds = [scores[:, index].sort().values[2:4].mean().item() for index in range(2)]
    thresholds = [*thresholds, 0.0][: network.num_exits - 1]
    answers = early_exit(network, images, thresholds)
    assert torch.equal(answers.exit_index, exits_taken(scores, thresholds, "entropy"))
    assert len(answers.exit_index.unique()) > 1
    expected = every_exit[torch.arange(6), answers.exit_index]
    torch.testing.assert_close(answers.logits, expected, rtol=1e-9, atol=1e-9)


class OneStage(nn.Module):
    """A stage as others export it: a module."""

    def __init__(self, network: WithExits, index: int):
        super().__init__()
        self.network, self.index = network, index

    def forward(self, state: Tensor) -> Tensor:
        return self.network.stages[self.index](state)


def assert_exports(network: WithExits, state: Tensor) -> None:
    """Compares a stage that was exported for two images with it for more."""
    batch = torch.export.Dim("batch", min=1, max=64)
    for index, stage in enumerate(network.stages):
        module, shapes = OneStage(network, index), ({0: batch},)
        exported = torch.export.export(module, (state[:2],), dynamic_shapes=shapes).module()
        before, state = state, stage(state)
        torch.testing.assert_close(exported(before), state, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRUNKS)
def test_every_stage_is_exported_with_any_number_of_images(name: str) -> None:
    assert_exports(build(name).eval(), torch.randn(5, 3, 64, 64))


# --- a small network ------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.conv(x)))


class Encoder(nn.Module):
    """Has a dropout of its own, that only its forward knows."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(8), Block(8)])
        self.scale = nn.Parameter(torch.full((8, 1, 1), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x) * self.scale
        x = F.dropout(x, 0.5, self.training)
        return self.blocks[1](x) * self.scale


class Small(nn.Module):
    """Has what makes cutting hard: see the tests."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.encoder = Encoder()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(dropout, inplace=True)
        self.fc = nn.Linear(8, 4)
        self.unused = nn.Linear(8, 8)
        self.register_buffer("shift", torch.full((8, 1, 1), 0.25))

    def forward(self, images: Tensor, scale: float = 1.0) -> Tensor:
        x = self.relu(self.norm(self.conv(images))) + self.shift
        x = self.relu(self.encoder(x) * scale)
        x = self.drop(self.pool(x).flatten(1))
        return F.dropout(self.fc(x), 0.2, self.training)


PLACES = ["norm", "encoder.blocks.0", "pool"]


def make_small(places: list[str] = PLACES, **arguments) -> WithExits:
    torch.manual_seed(1)
    return with_exits(Small(**arguments), places)


def images(number: int = 6) -> Tensor:
    return torch.randn(number, 1, 12, 12, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("frozen", [None, "encoder", "norm"])
def test_modes_are_those_of_the_network(training: bool, frozen: str | None) -> None:
    """Dropout as a function is traced in the mode of the module that calls it."""
    network = make_small().train(training)
    if frozen is not None:
        network.network.get_submodule(frozen).eval()
    original = copy.deepcopy(network.network)
    expected = train_once(original, original, images()[:4])
    actual = train_once(network.network, partial(last_stage, network), images()[:4])
    assert_same(actual, expected)
    network.train(not training)
    original.train(not training)
    torch.manual_seed(5)
    again = original(images())
    torch.manual_seed(5)
    assert_same(last_stage(network, images()), again)


def test_exits_read_what_the_modules_return() -> None:
    """Also where the next layer overwrites it: behind `norm` is a ReLU in place."""
    network = make_small().eval()
    seen = {}
    for name in PLACES:
        module = network.network.get_submodule(name)
        module.register_forward_hook(lambda *now, name=name: seen.update({name: now[2].clone()}))
    states, state = [], images()
    for stage in network.stages:
        state = stage(state)
        states.append(state)
    for name, state in zip(PLACES, states, strict=False):
        assert_same(state, seen[name])
    assert (states[0] < 0).any()
    logits = network(images())
    expected = [
        F.linear(seen[name].mean((2, 3)), *exit_here[-1].parameters())
        for name, exit_here in zip(PLACES, network.exits, strict=False)
    ]
    torch.testing.assert_close(logits[:-1], expected)


def test_stages_that_overwrite_are_exported() -> None:
    assert_exports(make_small().eval(), images(5))


class Squares(nn.Linear):
    """An exit whose gradient needs the state itself."""

    def __init__(self):
        super().__init__(8, 4)

    def forward(self, state: Tensor) -> Tensor:
        return super().forward(state.square().mean((2, 3)))


@pytest.mark.parametrize("place", ["norm", "pool"])
def test_gradients_reach_what_a_layer_overwrites(place: str) -> None:
    """A ReLU does always, a dropout only in training."""
    network = with_exits(Small(dropout=0.5), [place], [Squares()]).train()
    sum(logits.sum() for logits in network(images())).backward()
    assert network.exits[0].weight.grad.any()


def test_only_what_overwrites_gets_a_copy() -> None:
    network = make_small(["conv", "norm", "encoder", "pool"], dropout=0.5)
    seen = [[], []]
    for state, stage in zip(seen, network.stages[1:3], strict=True):
        x = torch.randn(2, 8, 6, 6)
        state += [stage(x), x]
    assert (seen[1][1] < 0).any()  # the ReLU had another tensor
    assert sorted(network._cut.overwriting) == [2, 4]


def test_making_it_draws_nothing_and_runs_nothing() -> None:
    """Given exits; the default ones draw their weights."""
    network = Small(dropout=0.5)
    network.encoder.eval()
    network.conv.register_forward_hook(lambda *_: pytest.fail("ran"))
    before = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    del network.conv._forward_hooks[next(iter(network.conv._forward_hooks))]
    exits, state = [Squares(), Squares()], torch.get_rng_state()
    with_exits(network, ["conv", "encoder"], exits)
    assert places_to_cut(network)
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [module.training for module in network.modules()]
    assert_same(network.state_dict(), before)
    assert not any(each.is_meta for each in network.parameters())


def forms(network: WithExits) -> dict[str, WithExits]:
    assigned = make_small()
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    assigned.load_state_dict(weights, assign=True)
    loaded = make_small()
    loaded.load_state_dict(network.state_dict())
    return {
        "deepcopy": copy.deepcopy(network),
        "pickle": pickle.loads(pickle.dumps(network)),
        "assigned": assigned,
        "loaded": loaded,
    }


@pytest.mark.parametrize("form", ["deepcopy", "pickle", "assigned", "loaded"])
def test_copies_are_networks_of_their_own(form: str) -> None:
    network = make_small()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    other = forms(network.eval())[form].eval()
    expected = network(images())
    assert_same(other(images()), expected)
    with torch.no_grad():
        other.network.fc.weight.zero_()
        other.network.encoder.scale.zero_()
    assert_same(network(images()), expected)
    assert not other(images())[-1].equal(expected[-1])
    assert other.double()(images().double())[0].dtype == torch.float64


# --- weights --------------------------------------------------------------------------------------


def test_state_dict_keeps_the_names() -> None:
    network = make_small()
    of_network = {f"network.{key}" for key in Small().state_dict()}
    assert {key for key in network.state_dict() if not network.in_early_exit(key)} == of_network
    assert {key for key in network.state_dict() if network.in_early_exit(key)} == {
        f"exits.{index}.1.{kind}" for index in range(3) for kind in ("weight", "bias")
    }


def test_weights_of_the_bare_network_are_its_trunk() -> None:
    torch.manual_seed(9)
    bare, network = Small().eval(), make_small().eval()
    before = copy.deepcopy(network.exits.state_dict())
    load_weights(network, bare.state_dict())
    assert_same(network(images())[-1], bare(images()))
    assert_same(network.exits.state_dict(), before)
    other = make_small(["conv"]).eval()
    load_weights(other, network.state_dict())
    assert_same(other(images())[-1], bare(images()))
    odd = bare.state_dict() | {"unused.weight": torch.zeros(3, 8)}
    with pytest.raises(ValueError, match=r"unused\.weight is \(3, 8\) there and \(8, 8\) here"):
        load_weights(network, odd)


# --- where ----------------------------------------------------------------------------------------


def test_places_are_those_that_can_be_cut() -> None:
    network, possible = Small(), []
    for name, module in network.named_modules():
        try:
            with_exits(network, [name])
        except ValueError:
            continue
        possible.append(name)
        assert module is not network
    places = places_to_cut(network)
    assert set(places) == set(possible)
    assert places == [
        "conv",
        "norm",
        "encoder.blocks.0",
        "encoder.blocks.1",
        "encoder",
        "pool",
        "drop",
        "fc",
    ]


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "densenet121"])
def test_all_places_together_can_be_cut(name: str) -> None:
    """Of those with the same value, one."""
    with torch.device("meta"):
        network = getattr(tv, name)()
    places = places_to_cut(network)
    blocks = {
        "resnet18": ["layer1.0", "layer3"],
        "densenet121": ["features.transition1"],
        "vit_b_16": ["encoder.layers.encoder_layer_0", "encoder"],
    }
    assert set(blocks[name]) <= set(places)
    parents = {name.rpartition(".")[0] for name in places}
    chosen = [name for name in places if name not in parents]
    assert with_exits(network, chosen).num_exits == len(chosen) + 1


class Changed(nn.Module):
    """A network whose forward is the test's."""

    def __init__(self, run, **modules: nn.Module):
        super().__init__()
        self.conv, self.block, self.fc = nn.Conv2d(1, 8, 3), Block(8), nn.Linear(8, 4)
        self.run = run
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, images: Tensor) -> Tensor:
        return self.run(self, images)


def pooled(self, x: Tensor) -> Tensor:
    return self.fc(x.mean((2, 3)))


def plain(self, images: Tensor) -> Tensor:
    return pooled(self, self.block(self.conv(images)))


def branching(self, images: Tensor) -> Tensor:
    x = self.conv(images)
    return plain(self, images) if x.sum() > 0 else pooled(self, x)


def with_a_skip(self, images: Tensor) -> Tensor:
    x = self.conv(images)
    return pooled(self, self.block(x) + x)


def with_a_table(self, images: Tensor) -> Tensor:
    table, x = self.table(self.fc.bias), self.conv(images)
    return pooled(self, self.block(x) + table.mean())


def with_an_own_tensor(self, images: Tensor) -> Tensor:
    return pooled(self, self.block(self.conv(images) + torch.arange(8).view(8, 1, 1)))


def with_a_coin(self, images: Tensor) -> Tensor:
    x = self.conv(images)
    return pooled(self, self.block(x) if torch.rand(1) < 0.5 else x)


def without_rows(self, images: Tensor) -> Tensor:
    x = self.block(self.conv(images).mean(0, keepdim=True))
    return pooled(self, x).expand(5, -1)


def with_aux_logits(self, images: Tensor):
    x = self.block(self.conv(images))
    return (pooled(self, x), pooled(self, x)) if self.training else pooled(self, x)


def hooked() -> nn.Module:
    network = Small()
    network.encoder.register_forward_hook(lambda *_: None)
    return network


def with_a_state() -> nn.Module:
    network = Small()
    network.last = network.fc.weight * 2  # of an earlier forward
    return network


REFUSED = {
    "no copy": (with_a_state, ["conv"], "Small cannot be copied: Only Tensors created explicitly"),
    "unknown": (
        Small,
        ["encoder.block.0"],
        "Small has no module 'encoder.block.0': similar are enc",
    ),
    "itself": (Small, [""], "Small has no module ''"),
    "none": (Small, [], "after is []: give a list of names"),
    "one name": (Small, "norm", "after is 'norm': give a list of names"),
    "order": (
        Small,
        ["pool", "norm"],
        "norm does not end later than pool: give after in the order",
    ),
    "twice the same": (Small, ["norm", "norm"], "norm does not end later than norm"),
    "same value": (Small, ["pool", "pool"], "pool does not end later than pool"),
    "inside a block": (
        Small,
        ["encoder.blocks.1.conv"],
        "cannot cut after encoder.blocks.1.conv: 2 values are needed behind it, and a stage hands "
        "on one; the nearest place is encoder.blocks.1",
    ),
    "called twice": (
        Small,
        ["relu"],
        "cannot cut after relu: it is called 2 times; the nearest pl",
    ),
    "never called": (Small, ["unused"], "cannot cut after unused: it is never called; the nearest"),
    "the end": (
        partial(Changed, plain),
        ["fc"],
        "cannot cut after fc: nothing follows it; the nearest place is block",
    ),
    "hook": (hooked, ["encoder.blocks.0"], "encoder is cut, so its hooks would never run: remove"),
    "control flow": (
        partial(Changed, branching),
        ["conv"],
        "cannot cut Changed: what it computes depends on values: symbolically traced variables "
        "cannot be used as inputs to control flow; there is no place to cut it",
    ),
    "skip": (
        partial(Changed, with_a_skip),
        ["block"],
        "cannot cut after block: 2 values are needed behind it, and a stage hands on one; the "
        "nearest place is conv",
    ),
    "table": (
        partial(Changed, with_a_table, table=nn.Linear(4, 4)),
        ["conv"],
        "cannot cut after conv: 2 values are needed behind it, and a stage hands on one; there is "
        "no place to cut it",
    ),
    "own tensor": (
        partial(Changed, with_an_own_tensor),
        ["conv"],
        "it uses a tensor that is neither a parameter nor a buffer",
    ),
    "coin": (partial(Changed, with_a_coin), ["conv"], "its own forward draws a random number"),
    "no rows": (
        partial(Changed, without_rows),
        ["block"],
        "cannot cut Changed after block: what goes on there is a tensor (1, 8, 222, 222) for 3 "
        "images, and has not a row for each",
    ),
    "auxiliary logits": (
        partial(Changed, with_aux_logits),
        ["conv"],
        "Changed gives a tuple for 3 images: logits (N, num_classes) are needed",
    ),
    "size": (
        partial(tv.VisionTransformer, 32, 8, 1, 2, 16, 32),
        ["encoder.layers"],
        "VisionTransformer does not run on images of 3 x 48 x 48: Wrong image height! Expected 32 "
        "but got another!; give the image_size that it takes",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_is_one_clear_line(name: str) -> None:
    make, places, message = REFUSED[name]
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        with_exits(make(), places, image_size=48 if name == "size" else None)
    assert message in str(error.value)


# --- exits ----------------------------------------------------------------------------------------


BAD_EXITS = {
    "too few": ([Squares()], "1 as exits for 2 places: give a list, one for each"),
    "one module": (Squares(), "one module as exits for 2 places: give a list, one for each"),
    "width": (
        [Squares(), nn.Sequential(nn.Flatten(), nn.Linear(8, 4))],
        "the exit after encoder does not take a tensor (3, 8, 224, 224): ",
    ),
    "classes": (
        lambda state, _: nn.Sequential(ReadOut("channels_first"), nn.Linear(8, 5)),
        "the exit after norm gives a tensor (3, 5) for 3 images of 4 classes",
    ),
    "overwrites": (
        [nn.Sequential(nn.ReLU(inplace=True), Squares()), Squares()],
        "the exit after norm overwrites the state that the next stage needs: make its first layers "
        "leave it, inplace=False",
    ),
}


@pytest.mark.parametrize("name", BAD_EXITS)
def test_exits_that_do_not_fit_are_refused(name: str) -> None:
    exits, message = BAD_EXITS[name]
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        with_exits(Small(), ["norm", "encoder"], exits)
    assert message in str(error.value)


def test_a_function_makes_an_exit_for_each_place() -> None:
    seen = []

    def make(state: Tensor, num_classes: int) -> nn.Module:
        seen.append((tuple(state.shape[1:]), num_classes))
        return nn.Sequential(ReadOut("channels_first"), nn.Linear(state.shape[1], num_classes))

    network = with_exits(Small(), ["norm", "pool"], make, image_size=16)
    assert seen == [((8, 16, 16), 4), ((8, 1, 1), 4)]
    assert network.num_classes == 4
    assert network.image_size == 16
    assert network.num_exits == 3


HEADS = {  # network, place, what is read, width
    "tokens with a class token": ("vit_tiny_patch16_224", {}, "blocks.1", "tokens 0 to 0", 192),
    "before the class token": ("vit_tiny_patch16_224", {}, "patch_embed", "tokens 0 to 195", 192),
    "mean of the pieces": (
        *("vit_tiny_patch16_224", {"global_pool": "avg"}, "blocks.1", "tokens 1 to 196", 192),
    ),
    "two class tokens": ("deit_tiny_distilled_patch16_224", {}, "blocks.1", "tokens 0 to 1", 192),
    "no class token": ("mixer_s16_224", {}, "blocks.1", "tokens 0 to 195", 512),
    "shifted windows": ("swin_tiny_patch4_window7_224", {}, "layers.1", "channels_last", 192),
    "no square needed": ("resnet18", {}, "layer1", "channels_first", 64),
    "vector": ("resnet18", {}, "global_pool", "vector", 512),
    "pooled": ("vgg11", {}, "features", "channels_first", 512),
}


@pytest.mark.parametrize("name", HEADS)
def test_default_exit_reads_what_the_network_reads(name: str) -> None:
    model, arguments, place, read, width = HEADS[name]
    with torch.device("meta"):
        network = with_exits(timm.create_model(model, num_classes=7, **arguments), [place])
    exit_here = network.exits[0]
    assert read_by(exit_here) == read
    assert (exit_here[-1].in_features, exit_here[-1].out_features) == (width, 7)
    has_norm = not model.startswith(("resnet", "vgg"))
    assert [type(layer) for layer in exit_here].count(nn.LayerNorm) == has_norm


def test_default_exit_computes_the_read_out() -> None:
    """Behind the last block it is the network's own, given its weights."""
    torch.manual_seed(0)
    for model, last, norm in [
        ("vit_tiny_patch16_224", "blocks", "norm"),
        ("swin_tiny_patch4_window7_224", "layers", "norm"),
        ("test_convnext", "stages", "head.norm"),
    ]:
        network = with_exits(timm.create_model(model, num_classes=7), [last]).eval()
        layer_norm, linear = (each for each in network.exits[0] if not isinstance(each, ReadOut))
        own = network.network
        layer_norm.load_state_dict(own.get_submodule(norm).state_dict())
        layer_norm.eps = own.get_submodule(norm).eps
        linear.load_state_dict(own.get_classifier().state_dict())
        early, full = network(torch.randn(2, 3, 224, 224))
        torch.testing.assert_close(early, full, rtol=1e-4, atol=1e-4)


def test_exits_lie_where_the_network_does() -> None:
    network = with_exits(Small().double(), ["norm"])
    assert network.exits[0][-1].weight.dtype == torch.float64
    network(images().double())


# --- from a YAML ----------------------------------------------------------------------------------


SPECS = {
    "torchvision": {
        "class_path": "torchvision.models.resnet18",
        "init_args": {"num_classes": 10},
    },
    "a default that no YAML can say": {
        "class_path": "torchvision.models.VisionTransformer",
        "init_args": {
            **{"image_size": 32, "patch_size": 8, "num_layers": 1, "num_heads": 2},
            **{"hidden_dim": 8, "mlp_dim": 8, "num_classes": 10},
        },
    },
    "timm": {
        "class_path": "timm.create_model",
        "init_args": {"model_name": "test_resnet"},
        "dict_kwargs": {"num_classes": 10, "in_chans": 1},
    },
}
BEHIND = {"torchvision": "layer1", "timm": "layer1", "a default that no YAML can say": "encoder"}


@pytest.mark.parametrize("name", SPECS)
def test_yaml_names_a_class_or_a_function(name: str) -> None:
    """And what is written down of it makes the same network again."""
    parser = StrictParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "net")
    net = {"network": SPECS[name], "after": [BEHIND[name]]}
    if name == "timm":
        linear = {"class_path": "torch.nn.Linear"}
        linear["init_args"] = {"in_features": 96, "out_features": 10}
        net |= {"after": ["global_pool"], "exits": [linear]}
    content = {"net": {"class_path": "networks.WithExits", "init_args": net}}
    parsed = parser.parse_object(content)
    network = parser.instantiate_classes(parsed).net
    assert isinstance(network, WithExits)
    assert network.num_classes == 10
    dump = parser.dump(parsed, skip_none=False)
    assert "Unable" not in dump
    again = parser.parse_object(yaml.safe_load(dump))
    assert again == parsed
    other = parser.instantiate_classes(again).net
    assert other.state_dict().keys() == network.state_dict().keys()


def test_trunk_of_a_run_is_the_bare_network() -> None:
    """What a plain method has trained is what exits are put on."""
    net = methods.build(SPECS["timm"])
    plain_module = LitResNet(net)
    weights = {key.removeprefix("net."): each for key, each in plain_module.state_dict().items()}
    network = with_exits(methods.build(SPECS["timm"]), ["layer1"])
    load_weights(network, weights)
    assert_same(network.network.state_dict(), net.state_dict())
