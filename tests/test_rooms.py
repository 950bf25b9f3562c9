"""Who may import whom: the rooms of the house, and the doors between them."""

import ast
import importlib
import re
import sys
import typing
from pathlib import Path

import pytest
from pytorch_lightning import Callback
from torch.optim.lr_scheduler import LRScheduler

from datamodules import ImageDataModule
from lightning_modules import ImageClassifier
from networks import MultiExitNetwork, ResidualNetwork, SlimmableNetwork

ROOT = Path(__file__).parent.parent

LIGHTNING = {"pytorch_lightning", "lightning_fabric"}
ALLOWED = {
    "networks": {"torch", "networks"},
    "datamodules": {
        *LIGHTNING,
        *{"torch", "torchvision", "archive", "chance", "preemption", "datamodules"},
        *{"numpy", "PIL", "scipy", "sklearn"},  # decoders of files
    },
    "callbacks": {*LIGHTNING, "torch", "networks", "callbacks", "rich", "wandb", "PIL"},
    "lightning_modules": {
        *LIGHTNING,
        *{"torch", "torchmetrics", "archive", "chance", "networks", "lightning_modules"},
        "safetensors",  # a format of weights
    },
    "running": {
        *LIGHTNING,
        *{"torch", "torchvision", "jsonargparse", "yaml", "rich", "wandb"},
        *{"archive", "endless", "preemption", "trainer_keys"},
        "shtab",  # what a shell completes
        *{"onnx", "onnxruntime", "onnxscript", "numpy", "PIL"},  # what leaves the project
        *{"networks", "datamodules", "lightning_modules", "callbacks", "reports", "running"},
    },
    "reports": {
        "altair",
        "vl_convert",
        "yaml",
        "rich",
        "PIL",
        "endless",
        "trainer_keys",
        "networks",
        "reports",
    },
    "benchmarks": {
        *LIGHTNING,
        *{"torch", "torchvision", "timm", "numpy", "PIL", "chance"},
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
    """And the entry point hands over to one room."""
    for room in ALLOWED:
        for path in (ROOT / room).rglob("*.py"):
            assert "main" not in imported(path)
    assert imported(ROOT / "main.py") == {"preemption", "running"}
    assert imported(ROOT / "preemption.py") == imported(ROOT / "archive.py") == set()
    assert imported(ROOT / "endless.py") == set()


@pytest.mark.parametrize("room", ALLOWED)
def test_other_rooms_are_entered_by_their_door(room: str) -> None:
    """What one room uses of another is exported there."""
    for path in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                other, *inner = node.module.split(".")
                assert other == room or other not in ALLOWED or not inner, f"{path}:{node.lineno}"


MAX_LINES = 400
MAX_FUNCTION = 45
"""Lines from the `def` to the end, the docstring included."""


def product() -> list[Path]:
    return [*ROOT.glob("*.py"), *(path for room in ALLOWED for path in (ROOT / room).rglob("*.py"))]


def long_functions(text: str) -> set[str]:
    return {
        node.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION
    }


def test_files_and_functions_are_short() -> None:
    assert len(product()) > 50
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in product()}
    assert [name for name, text in texts.items() if len(text.splitlines()) > MAX_LINES] == []
    long = {name: long_functions(text) for name, text in texts.items()}
    assert {name: functions for name, functions in long.items() if functions} == {}


@pytest.mark.parametrize(("num_lines", "found"), [(45, set()), (46, {"f"})])
def test_a_long_function_is_seen(num_lines: int, found: set[str]) -> None:
    body = "    pass\n" * (num_lines - 1)
    assert long_functions(f"@decorated\ndef f():\n{body}") == found


BASES = {
    "networks": (ResidualNetwork, MultiExitNetwork, SlimmableNetwork),
    "datamodules": (ImageDataModule,),
    "callbacks": (Callback,),
    "lightning_modules": (ImageClassifier, LRScheduler),
}
"""What a YAML may name is one of these."""


@pytest.mark.parametrize("room", BASES)
def test_everything_that_a_yaml_may_name_is_exported(room: str) -> None:
    package = importlib.import_module(room)
    found = set()
    for path in (ROOT / room).glob("*.py"):
        module = importlib.import_module(f"{room}.{path.stem}")
        for name, value in vars(module).items():
            if isinstance(value, type) and issubclass(value, BASES[room]):
                found |= {name} if value.__module__.split(".")[0] == room else set()
    assert found
    # Bases of several methods or schedules, and a network that another one is made of.
    inner = {"ExitPoints", "SandwichTraining", "SlimmableClassifier", "FittedLR"}
    assert found - inner - {"UnpaddedCifarResNet"} <= set(package.__all__)


@pytest.mark.parametrize("room", [*BASES, "running"])
def test_everything_exported_is_documented(room: str) -> None:
    package = importlib.import_module(room)
    imported_here = {
        alias.asname or alias.name
        for node in ast.parse((ROOT / room / "__init__.py").read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported_here == set(package.__all__)
    for name in package.__all__:
        value = getattr(package, name)
        if callable(value) and not isinstance(value, typing._LiteralGenericAlias):
            assert value.__doc__, f"{room}.{name} has no docstring"


DRAWING = re.compile(
    r"(rand|randn|randint|randperm|multinomial|bernoulli|poisson|normal|binomial)(_like)?_?$"
    r"|(uniform|random|exponential|geometric|cauchy|log_normal)_$"
    r"|(shuffle|choice|choices|sample|default_rng|RandomState|rvs)$"
)


def draws_without_a_key(tree: ast.Module) -> list[int]:
    """Returns the lines of a file that draw random numbers, and name no generator for it."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            if {"secrets", "numpy.random", "torch.distributions", "scipy.stats"} & set(names):
                lines.append(node.lineno)
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        if function.startswith(("nn.init.", "random.Random(")):
            continue  # weights are drawn once, after seed_everything; a keyed generator of Python's
        keywords = {keyword.arg for keyword in node.keywords}
        is_unkeyed_object = function == "random.Random" and not node.args
        is_layer = function.startswith("self.") and not function.endswith("_")  # self.normal(x)
        draws = DRAWING.match(function.rsplit(".", 1)[-1]) and "generator" not in keywords
        draws = draws and not is_layer
        if draws or is_unkeyed_object:
            lines.append(node.lineno)
    return lines


def test_chance_draws_nothing_from_a_global_generator() -> None:
    """A source line that draws must name its generator."""
    for room in ALLOWED.keys() - {"benchmarks"}:
        for path in (ROOT / room).rglob("*.py"):
            text = path.read_text()
            if "fork_rng" in text:
                continue  # torchvision's transforms know no generator: seeded inside fork_rng
            assert not draws_without_a_key(ast.parse(text)), path


@pytest.mark.parametrize(
    "line",
    [
        "torch.rand(3)",
        "torch.rand_like(x)",
        "x.bernoulli_(0.5)",
        "x.uniform_()",
        "x.random_(4)",
        "torch.normal(0, 1, (3,))",
        "random.shuffle(x)",
        "random.Random().random()",
        "np.random.default_rng()",
        "from torch.distributions import Bernoulli",
        "import numpy.random",
    ],
)
def test_every_way_to_draw_is_seen(line: str) -> None:
    assert draws_without_a_key(ast.parse(line))


@pytest.mark.parametrize(
    "line", ["torch.rand(3, generator=g)", "nn.init.normal_(w)", "random.Random(3).sample(x, 2)"]
)
def test_keyed_draws_are_no_offence(line: str) -> None:
    assert not draws_without_a_key(ast.parse(line))
