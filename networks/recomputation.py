"""Dense layers that keep their outputs alone: backward computes again what lies between them.

Pleiss et al., Memory-Efficient Implementation of DenseNets (arXiv 1707.06990)

    x_l = dropout(conv(ReLU(BN([x_0, x_1, ..., x_{l-1}])))),   or two such units in a row

All layers of a block are one autograd function. Unlike a checkpoint, which runs its layers twice,
it leaves forward alone: a BN counts its batch once, autocast and dropout have done their work, and
no convolution runs again. Backward computes concatenations, BN and ReLU with the kernels of
forward, and everything else as autograd does, in its order: so no bit differs. But it adds up the
gradients of all x_i in one tensor, where autograd has a kernel for each pair of layers. On a GPU,
where a small kernel costs its launch, that pays for what is computed again.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from networks.bypass import is_simple_conv, is_simple_norm

aten = torch.ops.aten
NATIVE = 0  # torch's own BN, neither cuDNN's nor MIOpen's


class Unit(NamedTuple):
    """Computes ``dropout(then(ReLU(BN(x))))``."""

    norm: nn.Module
    then: Callable[[Tensor], Tensor]
    """A convolution, or a function without parameters: it runs again in backward."""
    drop_rate: float = 0.0


def concatenate(features: Sequence[Tensor]) -> Tensor:
    return features[0] if len(features) == 1 else torch.cat(features, 1)


def run_units(units: Sequence[Unit], features: Sequence[Tensor]) -> Tensor:
    """Runs units one after the other on the concatenation of features (N, C_i, H, W)."""
    x = concatenate(features)
    for norm, then, drop_rate in units:
        x = then(F.relu(norm(x), inplace=True))
        if drop_rate > 0:
            x = F.dropout(x, drop_rate, True)
    return x


def recompute_units(units: Sequence[Unit], features: Sequence[Tensor]) -> Tensor:
    """Is `run_units` of units that are `recomputable`, and keeps less for backward."""
    (x,) = Recomputed.apply([units], len(features), 1, *features, *parameters([units]))
    return x


def recompute_layers(layers: Sequence[Sequence[Unit]], x: Tensor) -> list[Tensor]:
    """Runs layers whose units are `recomputable`, each on x and the outputs of those before it.

    Returns:
        x (N, C, H, W) and the output of each layer, (N, C_i, H, W).
    """
    return list(Recomputed.apply(layers, 1, 1 + len(layers), x, *parameters(layers)))


def parameters(layers: Sequence[Sequence[Unit]]) -> list[Tensor]:
    """Returns weight and bias of each BN, and the weight of the convolution behind it."""
    found = []
    for units in layers:
        for norm, then, _ in units:
            found += [norm.weight, norm.bias]
            if isinstance(then, nn.Conv2d):
                found.append(then.weight)
    return found


def recomputable(units: Sequence[Unit], x: Tensor) -> bool:
    """Tells whether units that read x, and what has its size, can be computed again.

    Not a BN in evaluation mode, or one that synchronises ranks, nor a module that is not torch's
    own or has hooks, since none of them is called.
    """
    if not torch.is_grad_enabled() or x.numel() == x.shape[1]:  # BN will refuse a single value
        return False
    return all(
        is_simple_norm(norm)
        and (not isinstance(then, nn.Module) or is_simple_conv(then))
        and drop_rate < 1
        for norm, then, drop_rate in units
    )


class Recomputed(torch.autograd.Function):
    """Runs layers, and keeps their inputs, their outputs and what lies between two units.

    Differentiable once.

    Args:
        layers: units of each layer.
        num_features: how many tensors the first layer concatenates.
        num_returned: how many are wanted of what the last layer would leave to another behind it.
        tensors: the features, each (N, C_i, H, W), then the parameters of all layers.
    """

    @staticmethod
    def forward(ctx, layers, num_features, num_returned, *tensors):
        features, kept = list(tensors[:num_features]), []
        for units in layers:
            x, between = concatenate(features), None
            for unit in units:
                x, own = forward_unit(unit, x)
                kept.append((between, own))
                between = x
            features.append(x)
        torch._foreach_add_([unit.norm.num_batches_tracked for each in layers for unit in each], 1)
        ctx.layers, ctx.num_features = layers, num_features
        ctx.kinds = [own.kind for _, own in kept]
        ctx.save_for_backward(*features, *(t for x, own in kept for t in (x, *own[1:])))
        return tuple(features[-num_returned:])

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        num_features, size = ctx.num_features, len(Kept._fields)
        tensors, kinds = list(ctx.saved_tensors), list(ctx.kinds)
        of_parameters = []  # the last ones first
        gradient = concatenate(gradients)  # of the last features, those that are returned
        for number in reversed(range(len(ctx.layers))):
            before = gradient.shape[1] - tensors[num_features + number].shape[1]
            rest, gradient = gradient[:, :before], gradient[:, before:]
            for unit in reversed(ctx.layers[number]):
                x, *own = tensors[-size:]
                del tensors[-size:]
                if x is None:
                    x = concatenate(tensors[: num_features + number])
                own = Kept(kinds.pop(), *own)
                gradient, *others = backward_unit(unit, x, own, gradient)
                of_parameters += others
            if before:
                gradient.add_(rest)
        sizes = [feature.shape[1] for feature in tensors[:num_features]]
        return None, None, None, *gradient.split(sizes, 1), *reversed(of_parameters)


class Kept(NamedTuple):
    """What backward needs of a unit beside its input."""

    kind: int
    """Which BN ran."""
    mean: Tensor
    inverse_std: Tensor
    scale: Tensor
    bias: Tensor
    weight: Tensor | None
    """Of the convolution, as it was read."""
    noise: Tensor | None
    """Of dropout."""


def forward_unit(unit: Unit, x: Tensor) -> tuple[Tensor, Kept]:
    norm, then, drop_rate = unit
    y, mean, inverse_std, _, kind = torch._batch_norm_impl_index(
        x,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        True,
        norm.momentum,
        norm.eps,
        torch.backends.cudnn.enabled,
    )
    y.relu_()
    weight = noise = None
    if isinstance(then, nn.Conv2d):
        weight = as_autocast(then.weight)
        y = as_type(y, weight.dtype)
        y = F.conv2d(y, weight, None, then.stride, then.padding, then.dilation, then.groups)
    else:
        y = then(y)
    if drop_rate > 0:
        y, noise = drop(y, drop_rate)
    return y, Kept(kind, mean, inverse_std, norm.weight, norm.bias, weight, noise)


def drop(x: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Returns what `F.dropout` does, and what `drop_backward` needs."""
    if x.is_cuda:
        return torch.native_dropout(x, rate, True)
    noise = F.dropout(torch.ones_like(x), rate)
    return x * noise, noise


def drop_backward(gradient: Tensor, noise: Tensor, rate: float) -> Tensor:
    if noise.is_cuda:
        return aten.native_dropout_backward.default(gradient, noise, 1 / (1 - rate))
    return gradient * noise


def as_autocast(weight: Tensor) -> Tensor:
    """Returns the weight as a convolution under the present autocast reads it."""
    device_type = weight.device.type
    if not torch.amp.is_autocast_available(device_type):
        return weight
    if torch.is_autocast_enabled(device_type) and weight.dtype != torch.float64:
        return weight.to(torch.get_autocast_dtype(device_type))
    return weight


def as_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def backward_unit(unit: Unit, x: Tensor, kept: Kept, gradient: Tensor) -> list[Tensor]:
    """Returns the gradients of x and of the parameters: convolution, bias and scale of the BN."""
    then, weight = unit.then, kept.weight
    if kept.noise is not None:
        gradient = drop_backward(gradient, kept.noise, unit.drop_rate)
    y, reserve = normalise_again(x, kept, unit.norm.eps)
    y.relu_()
    of_weight = []
    if weight is None:
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(then(leaf), leaf, gradient)
    else:
        geometry = then.stride, then.padding, then.dilation, False, (0, 0), then.groups
        wanted = [True, then.weight.requires_grad, False]
        gradient, *of_weight, _ = aten.convolution_backward.default(
            gradient, as_type(y, weight.dtype), weight, None, *geometry, wanted
        )
        gradient = as_type(gradient, y.dtype)
    gradient = relu_backward(gradient, y)
    gradient, of_scale, of_bias = aten._batch_norm_impl_index_backward.default(
        kept.kind,
        x,
        gradient,
        kept.scale,
        None,
        None,
        kept.mean,
        kept.inverse_std,
        True,
        unit.norm.eps,
        [True, True, True],
        reserve,
    )
    return [gradient, *of_weight, of_bias, of_scale]


def relu_backward(gradient: Tensor, y: Tensor) -> Tensor:
    """Returns the gradient of what y is the ReLU of, in the memory of y if the layout stays."""
    if gradient.stride() != y.stride():
        return aten.threshold_backward.default(gradient, y, 0)
    return aten.threshold_backward.grad_input(gradient, y, 0, grad_input=y)


def normalise_again(x: Tensor, kept: Kept, eps: float) -> tuple[Tensor, Tensor]:
    """Returns the output of a BN to the bit, and what cuDNN reserves for its backward.

    torch's own BN gives it by the statistics of forward, which pays: to find them takes several
    times as long as to normalise by them.
    """
    mean, inverse_std, scale, bias = kept[1:5]
    if kept.kind == NATIVE and x.is_cuda:
        y = torch.batch_norm_elemt(x, scale, bias, mean, inverse_std, eps)  # has no use for eps
    elif kept.kind == NATIVE and x.device.type == "cpu" and torch.finfo(mean.dtype).bits >= 32:
        # In training and evaluation alike, the CPU computes a * x + (bias - a * mean) with
        # a = scale / std. With the std in the scale, evaluation has the same a.
        one = torch.ones_like(mean)
        y, *_ = torch._batch_norm_impl_index(
            x, scale * inverse_std, bias, mean, one, False, 0.0, 0.0, False
        )
    else:
        y, _, _, reserve, _ = torch._batch_norm_impl_index(
            x, scale, bias, None, None, True, 0.0, eps, kept.kind != NATIVE
        )
        return y, reserve
    return y, mean  # torch's own BN reads nothing of it
