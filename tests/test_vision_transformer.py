"""Vision Transformers, against torchvision's of the same weights; gates: test_residual_branches."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import vision_transformer

from networks import VisionTransformer, count_macs, count_params

SMALL = {
    "image_size": 32,
    "patch_size": 4,
    "num_layers": 3,
    "num_heads": 2,
    "hidden_dim": 16,
    "mlp_dim": 24,
    "num_classes": 10,
}


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def pair(**options: object) -> tuple[VisionTransformer, nn.Module]:
    """Returns ours and torchvision's with the same weights, none of which is 0."""
    torch.manual_seed(0)
    theirs = vision_transformer.VisionTransformer(**SMALL, **options)
    for parameter in theirs.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    ours = VisionTransformer(**SMALL, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str
)
def test_logits_and_gradients_are_those_of_torchvision(
    dtype: torch.dtype, tolerance: float
) -> None:
    ours, theirs = (network.to(dtype) for network in pair())
    labels, results = torch.arange(5), []
    for network in (ours, theirs):
        logits = network.train()(images(dtype))
        F.cross_entropy(logits, labels).backward()
        results.append([logits, *(parameter.grad for parameter in network.parameters())])
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)
    with torch.no_grad():  # where torchvision's attention has a kernel of its own
        logits = [network.eval()(images(dtype)) for network in (ours, theirs)]
    torch.testing.assert_close(*logits, rtol=tolerance, atol=tolerance)


def test_same_seed_draws_the_weights_of_torchvision() -> None:
    torch.manual_seed(3)
    ours = VisionTransformer(**SMALL).state_dict()
    torch.manual_seed(3)
    theirs = vision_transformer.VisionTransformer(**SMALL).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_dropout_is_where_torchvision_has_it() -> None:
    """Theirs lays tokens before images, so the same seed drops others: something that shows."""
    logits, plain = [], pair()[0](images())
    for network in pair(dropout=0.3):
        torch.testing.assert_close(network.eval()(images()), plain, rtol=1e-5, atol=1e-5)
        assert not torch.equal(network.train()(images()), network(images()))
        names = [name for name, m in network.named_modules() if isinstance(m, nn.Dropout)]
        assert len(names) == 1 + 3 * SMALL["num_layers"]
        for name in names:
            assert network.get_submodule(name).p == 0.3
            network.set_submodule(name, nn.Hardtanh(-0.4, 0.5))
        logits.append(network(images()))
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    assert (logits[0] - plain).abs().min() > 1e-3


def test_released_weights_have_older_names_and_load() -> None:
    ours, theirs = pair()
    released = {
        key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
        for key, value in theirs.state_dict().items()
    }
    assert set(released) != set(theirs.state_dict())
    ours.heads.head.weight.data.zero_()
    ours.encoder.layers[0].mlp[0].weight.data.zero_()
    ours.load_state_dict(released)
    torch.testing.assert_close(ours(images()), theirs(images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_b_16", {}),
        ("vit_b_32", {"patch_size": 32}),
        (
            "vit_l_16",
            {"num_layers": 24, "num_heads": 16, "hidden_dim": 1024, "mlp_dim": 4096},
        ),
    ],
)
def test_sizes_are_those_of_torchvision(name: str, arguments: dict[str, int]) -> None:
    """MACs as torchvision states them, attention included."""
    with torch.device("meta"):
        ours = VisionTransformer(**arguments).eval()
        theirs = torchvision.models.get_model(name).state_dict()
        macs = count_macs(ours, torch.empty(1, 3, 224, 224))
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.items()
    }
    stated = torchvision.models.get_model_weights(name).DEFAULT.value.meta["_ops"]
    if name == "vit_b_16":
        stated = torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1.meta["_ops"]
    assert macs / 1e9 == pytest.approx(stated, abs=5e-4)


@pytest.mark.parametrize(
    ("heads", "dim", "millions", "billions"), [(3, 192, 5.7, 1.25), (6, 384, 22.1, 4.6)]
)
def test_sizes_of_deit(heads: int, dim: int, millions: float, billions: float) -> None:
    """Parameters: Touvron et al., table 1; MACs: timm's profile of the same networks."""
    with torch.device("meta"):
        network = VisionTransformer(num_heads=heads, hidden_dim=dim, mlp_dim=4 * dim).eval()
        macs = count_macs(network, torch.empty(1, 3, 224, 224))
    assert round(count_params(network) / 1e6, 1) == millions
    assert macs / 1e9 == pytest.approx(billions, abs=0.01)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="image_size 32 is no multiple of patch_size 5"):
        VisionTransformer(**SMALL | {"patch_size": 5})
    with pytest.raises(ValueError, match="hidden_dim 16 is no multiple of num_heads 3"):
        VisionTransformer(**SMALL | {"num_heads": 3})
    network = VisionTransformer(**SMALL)
    with pytest.raises(ValueError, match="images of 32 x 28 pixels for a position embedding of 32"):
        network(torch.zeros(2, 3, 32, 28))


def test_channels_of_the_images() -> None:
    network = VisionTransformer(**SMALL, in_channels=1)
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 10)
