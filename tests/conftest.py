"""Before torch is imported: tests run side by side, so that each may use one core."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

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


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a function from a row of `methods.METHODS` to the folder of a short run of it.

    A row is trained once for all processes of the tests: who changes a run copies it first.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all processes
    folder = folder / "trained"
    folder.mkdir(exist_ok=True)

    def run_of(method: str) -> Path:
        with (folder / f"{method}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            run = folder / method / "run"
            if not (run / "finished.yaml").exists():
                from test_loading import train

                assert train(folder / method, method) == run
        return run

    return run_of
