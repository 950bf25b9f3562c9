"""A part of a network on its own, without the weights of the rest."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class OnlyUsed(nn.Module):
    """What a function computes with a network, as a module that holds no other weights.

    State goes in and comes out as a list of tensors, so that a stage's may be any tree of them.

    Args:
        network: of which the function runs some layers, by calling them; the others lose their
            tensors here. In evaluation mode.
        function: from a tree of tensors to another.
        example: such a tree.

    Attributes:
        example: what `function` returns for the example.
    """

    def __init__(self, network: nn.Module, function: Callable, example: object):
        super().__init__()
        used: set[nn.Module] = set()
        hooks = [
            module.register_forward_pre_hook(lambda module, _: used.add(module))
            for module in network.modules()
        ]
        try:
            with torch.no_grad():
                self.example = function(example)
        finally:
            for hook in hooks:
                hook.remove()
        for module in network.modules():
            if module not in used:
                module._parameters.clear()
                module._buffers.clear()
        self.network = network
        self._function = function
        self._spec = pytree.tree_structure(example)

    def forward(self, state: list[Tensor]) -> list[Tensor]:
        return pytree.tree_leaves(self._function(pytree.tree_unflatten(state, self._spec)))
