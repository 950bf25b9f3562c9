"""Before torch is imported: tests run side by side, so that each may use one core."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without it a GPU's products of matrices are not deterministic; torch reads it once.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device, and torch finds none")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
