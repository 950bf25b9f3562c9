"""Vision Transformers with a gate per residual branch; torchvision's state dicts load.

Dosovitskiy et al., An Image is Worth 16x16 Words (arXiv 2010.11929)
Touvron et al., Training data-efficient image transformers (arXiv 2012.12877)

    x = x + gate_{2i-1} * attention_i(norm(x)),  x = x + gate_{2i} * mlp_i(norm(x))

A layer has two branches, so there are two gates per layer: those of its attention and its MLP, in
this order, as with timm's drop path.

| size               | num_layers | num_heads | hidden_dim | mlp_dim |
|--------------------|------------|-----------|------------|---------|
| DeiT-Ti            | 12         | 3         | 192        | 768     |
| DeiT-S             | 12         | 6         | 384        | 1536    |
| ViT-B, DeiT-B      | 12         | 12        | 768        | 3072    |
| ViT-L              | 24         | 16        | 1024       | 4096    |
| ViT-H              | 32         | 16        | 1280       | 5120    |

Differences from torchvision's network:
    * Attention is `scaled_dot_product_attention` in training and evaluation alike; torchvision's
      has a kernel of its own in evaluation, whose work no counter of operations sees.
    * `in_channels`; no representation layer, and no dropout of attention weights.
    * DeiT's distillation token is left out.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.choices import MANY_LAYERS, check_counts, check_numbers
from networks.residual_branches import Branch
from networks.resnet import ResidualNetwork

EPS = 1e-6
"""Of the LayerNorms."""


class SelfAttention(nn.Module):
    """Attention of all tokens to all; parameters and their first values as `MultiheadAttention`."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Returns what each token reads from the others, (N, T, dim), of tokens (N, T, dim)."""
        # Queries, keys and values: (N, num_heads, T, dim / num_heads) each.
        parts = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        parts = parts.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(*parts.unbind())
        return self.out_proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Sequential):
    """Two linear layers for each token."""

    def __init__(self, dim: int, mlp_dim: int, dropout: float):
        first, second = nn.Linear(dim, mlp_dim), nn.Linear(mlp_dim, dim)
        super().__init__(first, nn.GELU(), nn.Dropout(dropout), second, nn.Dropout(dropout))
        for layer in (first, second):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *arguments: object) -> None:
        # The weights that torchvision has released are older than its names.
        for old, new in (("linear_1", "0"), ("linear_2", "3")):
            for kind in ("weight", "bias"):
                if f"{prefix}{old}.{kind}" in state_dict:
                    value = state_dict.pop(f"{prefix}{old}.{kind}")
                    state_dict[f"{prefix}{new}.{kind}"] = value
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class EncoderLayer(nn.Module):
    """The modules of a layer's two branches, in torchvision's names."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, dropout: float):
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim, EPS)
        self.self_attention = SelfAttention(dim, num_heads)
        self.dropout = nn.Dropout(dropout)
        self.ln_2 = nn.LayerNorm(dim, EPS)
        self.mlp = Mlp(dim, mlp_dim, dropout)

    def branches(self) -> tuple[Branch, Branch]:
        return (
            Branch((self.ln_1, self.self_attention, self.dropout), self.self_attention.out_proj),
            Branch((self.ln_2, self.mlp), self.mlp[3]),
        )


class Encoder(nn.Module):
    """The position embedding, the layers and the last norm, in torchvision's names."""

    def __init__(
        self,
        num_tokens: int,
        num_layers: int,
        num_heads: int,
        dim: int,
        mlp_dim: int,
        dropout: float,
    ):
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(1, num_tokens, dim))
        nn.init.normal_(self.pos_embedding, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.Sequential()
        for number in range(num_layers):
            layer = EncoderLayer(dim, num_heads, mlp_dim, dropout)
            self.layers.add_module(f"encoder_layer_{number}", layer)
        self.ln = nn.LayerNorm(dim, EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Returns what the first layer reads: tokens (N, T, dim) with their position embedding."""
        return self.dropout(x + self.pos_embedding)


class VisionTransformer(ResidualNetwork):
    """A Vision Transformer: `num_blocks` = 2 `num_layers` gates, attention and MLP in turn.

    Args:
        image_size: side of the images, in pixels.
        patch_size: side of what becomes a token.
        num_layers, num_heads, hidden_dim, mlp_dim: see the table above.
        num_classes: number of logits.
        in_channels: channels of the images.
        dropout: share of numbers that training sets to 0, behind the embedding and in the layers.

    Raises:
        ValueError: patches that do not fit the image, or heads that do not fit `hidden_dim`.
    """

    blocks_per_layer = 2

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        num_layers: int = 12,
        num_heads: int = 12,
        hidden_dim: int = 768,
        mlp_dim: int = 3072,
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.0,
    ):
        super().__init__()
        check_counts(image_size=image_size, patch_size=patch_size, num_heads=num_heads)
        check_counts(hidden_dim=hidden_dim, mlp_dim=mlp_dim)
        check_counts(num_classes=num_classes, in_channels=in_channels)
        check_counts(most=MANY_LAYERS, num_layers=num_layers)
        check_numbers("[0, 1)", dropout=dropout)
        if image_size % patch_size:
            raise ValueError(
                f"image_size {image_size} is no multiple of patch_size {patch_size}: choose a "
                "patch_size that divides it"
            )
        if hidden_dim % num_heads:
            raise ValueError(
                f"hidden_dim {hidden_dim} is no multiple of num_heads {num_heads}: choose a number "
                "of heads that divides it"
            )
        self.image_size = image_size
        self.num_classes = num_classes

        self.conv_proj = nn.Conv2d(in_channels, hidden_dim, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, hidden_dim))
        num_tokens = 1 + (image_size // patch_size) ** 2
        self.encoder = Encoder(num_tokens, num_layers, num_heads, hidden_dim, mlp_dim, dropout)
        self.heads = nn.Sequential(OrderedDict(head=nn.Linear(hidden_dim, num_classes)))

        fan_in = in_channels * patch_size**2
        nn.init.trunc_normal_(self.conv_proj.weight, std=math.sqrt(1 / fan_in))
        for zeros in (self.conv_proj.bias, self.heads.head.weight, self.heads.head.bias):
            nn.init.zeros_(zeros)

    @property
    def blocks(self) -> list[Branch]:
        return [branch for layer in self.encoder.layers for branch in layer.branches()]

    def stem(self, images: Tensor) -> Tensor:
        """Returns the tokens (N, 1 + patches, hidden_dim), that of the class first.

        Raises:
            ValueError: the images are of another size than the position embedding.
        """
        height, width = images.shape[2:]
        if (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"images of {height} x {width} pixels for a position embedding of "
                f"{self.image_size} x {self.image_size}: resize them, or set image_size"
            )
        x = self.conv_proj(images).flatten(2).transpose(1, 2)
        # Not len(x), which torch.export takes for a constant.
        class_token = self.class_token.expand(x.shape[0], -1, -1)
        return self.encoder(torch.cat([class_token, x], dim=1))

    def head(self, x: Tensor) -> Tensor:
        # Only the class's token is read, and a LayerNorm treats every token for itself.
        return self.heads(self.encoder.ln(x[:, 0]))
