"""A training step reads nothing back from its device, and sends it nothing that has to be waited
for.

Shown without a GPU: the network and the batches live on torch's device "meta", which knows shapes
and has no values, while gates, widths and other chance stay on the CPU. Whoever asks for a value
there asks a GPU for it, too.
"""

import contextlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import methods
import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.callbacks import LearningRateMonitor, RichProgressBar
from pytorch_lightning.strategies import SingleDeviceStrategy
from quiet import quiet_trainer
from torch import Tensor
from torch.optim.lr_scheduler import MultiStepLR
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_modules import LitResNet
from running import CSVHistory, RunCheckpoint

ROOT = Path(__file__).parent.parent
META = torch.device("meta")
FIRST_WATCHED, NUM_WATCHED = 2, 4  # batches; the first ones make what is kept
READS = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "repeat_interleave",
}
"""Operations whose result, or its shape, is a value: a GPU has to be waited for."""
FROM_NUMBERS = (torch.tensor, torch.as_tensor, torch.from_numpy)


def is_there(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device == META


class Waits(TorchDispatchMode):
    """Raises AssertionError where a value is read back, or a copy has to be waited for.

    Copies that need not be waited for are counted.
    """

    num_copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [x for x in tensors if is_there(x)]
        if name in READS and there:
            complain(f"{name} reads a value back")
        if name.startswith("index") and there:
            masks = [x for x in pytree.tree_leaves(args[1:]) if isinstance(x, Tensor)]
            if any(x.dtype in (torch.bool, torch.uint8) for x in masks):
                complain(f"{name} by a mask reads how many are chosen")
        if name in ("_to_copy", "copy_"):
            self.check_copy(name, args, kwargs)
        return func(*args, **kwargs)

    def check_copy(self, name: str, args: tuple, kwargs: dict[str, Any]) -> None:
        if name == "copy_":
            to, of, is_asynchronous = args[0].device, args[1].device, args[2:] == (True,)
        else:
            of, to = args[0].device, torch.device(kwargs.get("device") or args[0].device)
            is_asynchronous = kwargs.get("non_blocking", False)
        if of == META and to != META:
            complain(f"{name} copies to the {to}")
        if of != META and to == META:
            if not is_asynchronous:
                complain(f"{name} copies from the {of} and waits")
            self.num_copies += 1


def complain(what: str) -> None:
    """Raises AssertionError that names the line of ours, or else of others, that did it."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT)]
    place = (ours or frames)[-1]
    raise AssertionError(f"{what}: {place.filename}:{place.lineno}, {place.line}")


class TensorsOfNumbers(TorchFunctionMode):
    """Raises AssertionError where Python's numbers become a tensor on the device: a copy."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in FROM_NUMBERS and is_there(result):
            complain(f"{func.__name__} copies numbers to the device, and waits")
        return result


class Elsewhere(CPUAccelerator):
    """Lets Lightning train on the device "meta"."""

    def setup_device(self, device: torch.device) -> None:
        assert device == META


class OnMeta(SingleDeviceStrategy):
    def teardown(self) -> None:
        """Brings nothing back: there are no values."""
        trainer = self.lightning_module.trainer
        trainer._logger_connector.reset_metrics()
        trainer._results.clear()


class Enough(Exception):
    """What was to be seen has been seen."""


class Watched(Callback):
    """Watches whole rounds of Lightning's loop, from the start of a batch to that of another.

    A list of callbacks begins with it.
    """

    def __init__(self) -> None:
        self.waits = Waits()
        self.open = contextlib.ExitStack()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == FIRST_WATCHED:
            self.open.enter_context(TensorsOfNumbers())
            self.open.enter_context(self.waits)
        elif batch_idx == FIRST_WATCHED + NUM_WATCHED:
            self.open.close()
            raise Enough


class Batches:
    """Serves one batch, which lies on the device, again and again."""

    def __init__(self) -> None:
        self.batch = torch.empty(16, 1, 32, 32, device=META), torch.zeros(16).long().to(META)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([self.batch] * 8)


@pytest.fixture(autouse=True)
def whole_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives "meta" what other devices have: autocast, and an address for every tensor."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(Tensor, "data_ptr", lambda tensor: tensor.untyped_storage()._cdata)


def watch(
    module: LightningModule, folder: Path, callbacks: Sequence[Callback] = (), **arguments: Any
) -> float:
    """Trains a few steps under watch.

    Returns:
        How many copies to the device there were per batch, none of them waited for.
    """
    watched = Watched()
    defaults = {"log_every_n_steps": 100, "limit_val_batches": 0, "enable_progress_bar": True}
    trainer = quiet_trainer(
        folder,
        accelerator=Elsewhere(),
        strategy=OnMeta(META),
        logger=CSVHistory(folder / "metrics.csv"),
        enable_checkpointing=True,
        callbacks=[watched, *callbacks, RichProgressBar(), RunCheckpoint()],
        **(defaults | arguments),
    )
    with watched.open, pytest.raises(Enough):
        trainer.fit(module, Batches())
    return watched.waits.num_copies / NUM_WATCHED


@pytest.mark.parametrize("method", methods.TRAINED)
def test_step(method: str, tmp_path: Path) -> None:
    """With the callbacks, the schedule and the books of a run of the command line."""
    module = methods.build(methods.METHODS[method])
    module.lr_scheduler, module.lr_interval = partial(MultiStepLR, milestones=[4]), "step"
    callbacks = [methods.build(each) for each in methods.config(method)["trainer"]["callbacks"]]
    callbacks.append(LearningRateMonitor())
    # The indices of a step, if it has any, travel together.
    assert watch(module, tmp_path, callbacks) <= (getattr(module, "mode", "") == "row")


@pytest.mark.parametrize(
    "arguments",
    [
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 1.0},
        {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
    ],
    ids=str,
)
def test_step_under_other_settings(arguments: dict[str, Any], tmp_path: Path) -> None:
    assert watch(methods.build(methods.METHODS["resnet"]), tmp_path, **arguments) == 0


WAITS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "item": (lambda x: x[0].item(), "_local_scalar_dense reads"),
    "bool": (lambda x: bool(x[0] > 0), "reads a value back"),
    "int": (lambda x: int(x[0]), "reads a value back"),
    "list": (lambda x: x.tolist(), "copies to the cpu"),
    "equal": (lambda x: torch.equal(x, x), "equal reads"),
    "nonzero": (lambda x: x.nonzero(), "nonzero reads"),
    "unique": (lambda x: x.unique(), "_unique2 reads"),
    "masked": (lambda x: x.masked_select(x > 0), "masked_select reads"),
    "mask": (lambda x: x[x > 0], "index by a mask reads"),
    "fill by mask": (lambda x: x.index_put_((x > 0,), x), "index_put_ by a mask reads"),
    "cpu": (lambda x: x.cpu(), "_to_copy copies to the cpu"),
    "number": (lambda x: torch.tensor(3, device=x.device), "tensor copies numbers"),
    "copy": (lambda x: torch.ones(3).to(x.device), "_to_copy copies from the cpu and waits"),
    "copy into": (lambda x: x.copy_(torch.ones(4)), "copy_ copies from the cpu and waits"),
}


@pytest.mark.parametrize("name", WAITS)
def test_every_wait_is_seen(name: str) -> None:
    wait, message = WAITS[name]
    with TensorsOfNumbers(), Waits(), pytest.raises(AssertionError, match=message):
        wait(torch.empty(4, device=META))


def test_what_need_not_wait_is_let_through() -> None:
    x = torch.empty(4, device=META)
    with TensorsOfNumbers(), Waits() as waits:
        torch.where(x.isfinite(), 3.0, x).add_(2).sum()
        torch.full((2,), 3.0, device=META)
        x[torch.empty(2, dtype=torch.long, device=META)].copy_(x[:2])
        assert torch.ones(3).nonzero().tolist() == [[0], [1], [2]]  # chance is drawn on the CPU
        torch.ones(3).to(META, non_blocking=True)
        x.copy_(torch.ones(4), non_blocking=True)
    assert waits.num_copies == 2


class WithNumberInTheBar(LitResNet):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx >= FIRST_WATCHED:
            self.log("loss", loss, prog_bar=True, logger=False)
        return loss


def test_wait_of_lightning_is_seen(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense reads a value back"):
        watch(WithNumberInTheBar(methods.build(methods.SMALL_NET)), tmp_path)


def test_logged_step_reads_in_one_place(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"to the cpu: .*lightning_modules/losses\.py:\d+"):
        watch(methods.build(methods.METHODS["resnet"]), tmp_path, log_every_n_steps=4)
