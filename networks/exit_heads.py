"""Default exits for networks that are not ours: each reads out as the network does, only earlier.

    (N, C, H, W)   mean over the pixels, linear layer
    (N, H, W, C)   the same (Swin)
    (N, T, C)      mean over the class tokens if the network has some and reads them, else over the
                   tokens that are parts of the image; linear layer
    (N, C)         linear layer

Networks that normalise before their branches (ViT, DeiT, Mixer, Swin, ConvNeXt: those with a
LayerNorm) have states that nothing has normalised, so every exit has a LayerNorm of its own: before
the mean, or, as in ConvNeXt, behind that over the pixels of (N, C, H, W).
Weights are drawn as torch draws those of `nn.Linear`, from U(-b, b) with
b = 1 / sqrt(inputs), by the global generator.
"""

import math
from typing import Literal

from torch import Tensor, nn

Layout = Literal["channels_first", "channels_last", "tokens", "vector"]
CLASS_TOKENS = ("class_token", "cls_token", "dist_token")
"""Names of these parameters in torchvision and timm; they come before the tokens of the image."""


class ReadOut(nn.Module):
    """From a state to one vector per image, (N, C).

    Args:
        layout: of the states.
        tokens: which are averaged; None: there are none.
    """

    def __init__(self, layout: Layout, tokens: slice | None = None):
        super().__init__()
        self.layout, self.tokens = layout, tokens

    def forward(self, state: Tensor) -> Tensor:
        if self.layout == "channels_first":
            return state.mean((2, 3))
        if self.layout == "channels_last":
            return state.mean((1, 2))
        if self.layout == "vector":
            return state
        return state[:, self.tokens].mean(1)

    def extra_repr(self) -> str:
        if self.layout != "tokens":
            return self.layout
        return f"tokens {self.tokens.start} to {self.tokens.stop - 1}"


def default_exit(
    network: nn.Module, square: Tensor, oblong: Tensor | None, num_classes: int
) -> nn.Sequential:
    """Returns an exit for a state, with random weights.

    Args:
        network: that is cut, for what it has and how it reads its tokens out.
        square: the state of square images.
        oblong: the state of images of another height and the same width; None: it takes none.
        num_classes: number of logits.

    Raises:
        ValueError: the state is of no layout that is known.
    """
    layout = layout_of(square, oblong)
    channels = square.shape[1 if layout == "channels_first" else -1]
    tokens = tokens_read(network, square.shape[1]) if layout == "tokens" else None
    norms = [nn.LayerNorm(channels)] if has_layer_norm(network) else []
    layers = [ReadOut(layout, tokens), *norms]
    if layout in ("tokens", "channels_last"):
        layers.reverse()
    return nn.Sequential(*layers, nn.Linear(channels, num_classes))


def layout_of(square: Tensor, oblong: Tensor | None) -> Layout:
    """Returns how a state is laid out; see `default_exit`."""
    num_dims = square.dim() if isinstance(square, Tensor) else 0
    if num_dims in (2, 3):
        return "vector" if num_dims == 2 else "tokens"
    if num_dims != 4:
        what = f"tensor of {num_dims} dimensions" if num_dims else type(square).__name__
        raise ValueError(f"what goes on there is a {what}: give exits of your own")
    _, first, second, third = square.shape
    if oblong is not None and oblong.shape[1:] != square.shape[1:]:
        return "channels_first" if oblong.shape[1] == first else "channels_last"
    if first != second == third:
        return "channels_first"
    if first == second != third:
        return "channels_last"
    raise ValueError(
        f"its state of {first} x {second} x {third} does not tell where the channels are: give "
        "exits of your own"
    )


def tokens_read(network: nn.Module, num_tokens: int) -> slice:
    """Returns the tokens whose mean a network reads out: class tokens, or those of the image."""
    num_class_tokens = sum(
        isinstance(getattr(network, name, None), Tensor) for name in CLASS_TOKENS
    )
    num_others = getattr(network, "num_prefix_tokens", None) or num_class_tokens
    num_patches = num_tokens - num_others
    if num_patches < 1 or math.isqrt(num_patches) ** 2 != num_patches:  # they come in later
        return slice(0, num_tokens)
    # As timm calls it; torchvision's reads the class token.
    if num_class_tokens and getattr(network, "global_pool", "token") == "token":
        return slice(0, num_class_tokens)
    return slice(num_others, num_tokens)


def has_layer_norm(network: nn.Module) -> bool:
    return any(isinstance(module, nn.LayerNorm) for module in network.modules())
