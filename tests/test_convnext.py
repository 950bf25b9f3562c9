"""ConvNeXt, against torchvision's with the same weights; gates: test_residual_branches."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import convnext
from torchvision.models.convnext import CNBlockConfig

from networks import ConvNeXt, count_macs, count_params

DEPTHS, CHANNELS = (2, 1, 3), (8, 12, 16)


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def torchvision_small() -> nn.Module:
    following = (*CHANNELS[1:], None)
    setting = [CNBlockConfig(*each) for each in zip(CHANNELS, following, DEPTHS, strict=True)]
    return convnext.ConvNeXt(setting, num_classes=10)


def pair() -> tuple[ConvNeXt, nn.Module]:
    """Returns ours and torchvision's with the same weights; branches are not scaled to nothing."""
    torch.manual_seed(0)
    theirs = torchvision_small()
    for name, parameter in theirs.named_parameters():
        parameter.data.add_(torch.randn_like(parameter) * (0.5 if "scale" in name else 0.1))
    ours = ConvNeXt(DEPTHS, CHANNELS, num_classes=10)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str
)
def test_logits_and_gradients_are_those_of_torchvision(
    dtype: torch.dtype, tolerance: float, memory_format: torch.memory_format
) -> None:
    ours, theirs = (network.to(dtype) for network in pair())
    ours.to(memory_format=memory_format)
    x, labels, results = images(dtype), torch.arange(5), []
    for network, batch in ((ours, x.to(memory_format=memory_format)), (theirs, x)):
        logits = network.train()(batch)
        F.cross_entropy(logits, labels).backward()
        results.append([logits, *(parameter.grad for parameter in network.parameters())])
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance, check_stride=False)
    assert torch.equal(ours.eval()(x), ours.train()(x))


def test_same_seed_draws_the_weights_of_torchvision() -> None:
    torch.manual_seed(3)
    ours = ConvNeXt(DEPTHS, CHANNELS, num_classes=10).state_dict()
    torch.manual_seed(3)
    theirs = torchvision_small().state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize(
    ("size", "depth", "channels"),
    [
        ("tiny", 9, (96, 192, 384, 768)),
        ("small", 27, (96, 192, 384, 768)),
        ("base", 27, (128, 256, 512, 1024)),
        ("large", 27, (192, 384, 768, 1536)),
    ],
)
def test_sizes_are_those_of_torchvision(size: str, depth: int, channels: tuple[int, ...]) -> None:
    """The shapes of its tensors, and the parameters and MACs that it states."""
    with torch.device("meta"):
        ours = ConvNeXt((3, 3, depth, 3), channels).eval()
        theirs = torchvision.models.get_model(f"convnext_{size}").state_dict()
        macs = count_macs(ours, torch.empty(1, 3, 224, 224))
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.items()
    }
    stated = torchvision.models.get_model_weights(f"convnext_{size}").DEFAULT.value.meta
    assert count_params(ours) == stated["num_params"]
    assert macs / 1e9 == pytest.approx(stated["_ops"], abs=5e-4)


def test_the_stream_stays_in_channels_last() -> None:
    """Where a permuted LayerNorm and MLP copy nothing."""
    network = ConvNeXt(DEPTHS, CHANNELS).to(memory_format=torch.channels_last)
    x = network.stem(images().to(memory_format=torch.channels_last))
    gates = torch.ones(5)
    gates[::2] = 0
    for block in network.blocks:
        assert x.is_contiguous(memory_format=torch.channels_last)
        x = block(x, gates)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="give each stage a number of blocks and one of ch"):
        ConvNeXt((1, 2), (8, 16, 24))
    with pytest.raises(ValueError, match=r"depths is \[1, 0\]: give whole numbers from 1"):
        ConvNeXt((1, 0), (8, 16))
    with pytest.raises(ValueError, match=r"images of 8 x 32 pixels are too small .* give 16 x 16"):
        ConvNeXt(DEPTHS, CHANNELS)(torch.zeros(2, 3, 8, 32))


def test_channels_and_patches_of_small_images() -> None:
    network = ConvNeXt((1, 1), (8, 16), num_classes=7, in_channels=1, patch_size=2)
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 7)
