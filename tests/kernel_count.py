"""Counts the operations of a step: on a GPU each costs a launch, whatever it computes."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode


class KernelCount(TorchDispatchMode):
    """Counts operations that compute something: neither views nor memory that is only reserved."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.name()] += not (func.is_view or "empty" in func.name())
        return func(*args, **(kwargs or {}))
