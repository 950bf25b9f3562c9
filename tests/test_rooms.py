"""Who may import whom: the rooms of the house, and the doors between them."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LIGHTNING = {"pytorch_lightning", "lightning_fabric"}
ALLOWED = {
    "networks": {"torch", "networks"},
    "datamodules": {
        *LIGHTNING,
        *{"torch", "torchvision", "chance", "preemption", "datamodules"},
        *{"numpy", "PIL", "scipy", "sklearn"},  # decoders of files
    },
    "callbacks": {*LIGHTNING, "torch", "networks", "callbacks", "rich", "wandb"},
    "lightning_modules": {
        *LIGHTNING,
        *{"torch", "torchmetrics", "chance", "networks", "lightning_modules"},
    },
    "running": {
        *LIGHTNING,
        *{"torch", "jsonargparse", "yaml", "rich", "wandb", "preemption"},
        *{"networks", "datamodules", "lightning_modules", "callbacks", "running"},
    },
    "benchmarks": {
        *LIGHTNING,
        *{"torch", "torchvision", "numpy", "PIL", "chance"},
        *{"networks", "datamodules", "lightning_modules", "callbacks", "running", "benchmarks"},
    },
}


def imported(path: Path) -> set[str]:
    """Returns the top-level names of all imports in a file, those inside functions included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names)


@pytest.mark.parametrize("room", ALLOWED)
def test_room_imports_only_what_it_may(room: str) -> None:
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        assert imported(path) <= ALLOWED[room], f"{path} imports {imported(path) - ALLOWED[room]}"


def test_nobody_imports_main() -> None:
    for room in ALLOWED:
        for path in (ROOT / room).rglob("*.py"):
            assert "main" not in imported(path)


@pytest.mark.parametrize("room", ["networks", "datamodules", "callbacks", "lightning_modules"])
def test_everything_public_is_exported(room: str) -> None:
    module = __import__(room)
    for name in module.__all__:
        assert getattr(module, name).__doc__, f"{room}.{name} has no docstring"


def test_chance_draws_nothing_from_a_global_generator() -> None:
    """A source line that draws must name its generator."""
    drawing = ("rand", "randn", "randint", "randperm", "multinomial", "bernoulli", "normal_")
    for room in ("networks", "datamodules", "lightning_modules", "callbacks"):
        for path in (ROOT / room).rglob("*.py"):
            if "fork_rng" in path.read_text():
                continue  # torchvision's transforms know no generator: seeded inside fork_rng
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                # Weights are drawn once, after seed_everything.
                if node.func.attr in drawing and not ast.unparse(node.func).startswith("nn.init"):
                    keywords = {keyword.arg for keyword in node.keywords}
                    assert "generator" in keywords, f"{path}:{node.lineno}"
